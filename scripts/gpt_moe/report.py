"""What a person and a script see of a run: log lines, expert load, and the exact loss log."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from gpt_moe.model import MoeMlp
from gpt_moe.progress import Progress
from gpt_moe.runtime import Runtime

__all__ = ["LossLog", "Reporter", "expert_load_line"]


class LossLog:
    """One JSON line per iteration with the loss as decimal and as hexadecimal, so that runs can be compared bit by bit.

    The loss is this rank's own (the mean over its micro batches), which no reduction has touched.

    Args:
        pattern: the path; with "{rank}" in it every rank writes, else rank 0 only. None writes nothing.
        rank: this rank.
    """

    def __init__(self, pattern: str | None, rank: int) -> None:
        self._file: TextIO | None = None
        self._rank = rank
        if pattern and ("{rank}" in pattern or rank == 0):
            path = Path(pattern.replace("{rank}", str(rank)))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1, encoding="utf-8")

    @property
    def active(self) -> bool:
        """Whether this rank writes."""
        return self._file is not None

    def write(self, progress: Progress, loss: float, moe_loss: float, grad_norm: float | None, lr: float) -> None:
        """Append one line.

        Args:
            progress: the counters after the iteration.
            loss: this rank's language-model loss.
            moe_loss: this rank's load-balancing loss.
            grad_norm: the global gradient norm.
            lr: the learning rate used.
        """
        if self._file is None:
            return
        record = {
            "iteration": progress.iteration,
            "rank": self._rank,
            "loss": loss,
            "loss_hex": float(loss).hex(),
            "moe_loss": moe_loss,
            "moe_loss_hex": float(moe_loss).hex(),
            "grad_norm": grad_norm,
            "lr": lr,
            "consumed_samples": progress.consumed,
            "time": round(time.time(), 3),
        }
        self._file.write(json.dumps(record) + "\n")


def expert_load_line(layer: int, counts: list[int]) -> str:
    """Describe how evenly one MoE layer's tokens went to its experts.

    Args:
        layer: ordinal of the MoE layer, from 0.
        counts: tokens per expert.
    """
    total = sum(counts)
    if total == 0:
        return f"   expert load, MoE layer {layer}: no tokens"
    shares = " ".join(f"{100 * count / total:3.0f}" for count in counts)
    return f"   expert load, MoE layer {layer}: {shares} %  max/mean {max(counts) * len(counts) / total:.2f}"


class Reporter:
    """Collects an interval's numbers and prints them on rank 0, in Megatron's manner.

    Args:
        args: settled arguments.
        runtime: ranks and device.
        layers: the MoE layers.
    """

    def __init__(self, args: argparse.Namespace, runtime: Runtime, layers: list[MoeMlp]) -> None:
        self._args = args
        self._runtime = runtime
        self._layers = layers
        self._sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        self._count = 0
        self._skipped = 0
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor, moe_loss: torch.Tensor) -> None:
        """Record one iteration.

        Args:
            loss: this rank's language-model loss.
            moe_loss: this rank's load-balancing loss.
        """
        self._sums += torch.stack([loss, moe_loss]).double()
        self._count += 1

    def line(self, engine: Any, progress: Progress, lr: float, grad_norm: float | None) -> None:
        """Print the interval's line and the expert load; every rank must call this.

        Args:
            engine: the DeepSpeed engine.
            progress: the counters.
            lr: the learning rate used.
            grad_norm: the global gradient norm.
        """
        sums = self._sums / max(1, self._count)
        torch.distributed.all_reduce(sums)
        loss, moe_loss = (sums / self._runtime.world_size).tolist()
        now = time.perf_counter()
        seconds = (now - self._since) / max(1, self._count)
        tokens = self._args.global_batch_size * self._args.seq_length
        skipped = int(getattr(engine, "skipped_steps", 0))
        self._runtime.print(
            f" iteration {progress.iteration:8d}/{self._args.train_iters:8d} | "
            f"consumed samples: {progress.consumed:10d} | "
            f"elapsed time per iteration (ms): {seconds * 1e3:.1f} | tokens/s: {tokens / seconds:.0f} | "
            f"learning rate: {lr:.3E} | lm loss: {loss:.6f} | moe loss: {moe_loss:.6f} | "
            f"grad norm: {'-' if grad_norm is None else f'{grad_norm:.3f}'} | skipped: {skipped - self._skipped}"
        )
        self._expert_load()
        self._sums.zero_()
        self._count = 0
        self._skipped = skipped
        self._since = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Leave seconds (an evaluation, a checkpoint) out of the time per iteration.

        Args:
            seconds: how long it took.
        """
        self._since += seconds

    def validation(self, iteration: int, loss: float) -> None:
        """Print a validation result.

        Args:
            iteration: finished iterations.
            loss: mean language-model loss.
        """
        perplexity = math.exp(min(loss, 20.0))
        self._runtime.print(
            f" validation at iteration {iteration} | lm loss: {loss:.6f} | perplexity: {perplexity:.3f}"
        )

    def _expert_load(self) -> None:
        counts = [layer.take_counts() for layer in self._layers]
        if not counts or any(count is None for count in counts):
            return
        table = torch.stack([count for count in counts if count is not None]).to(torch.int64)
        torch.distributed.all_reduce(table)
        for layer, row in enumerate(table.tolist()):
            self._runtime.print(expert_load_line(layer, row))
