"""How far the run is, and carrying that through checkpoints."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_moe.runtime import Runtime

__all__ = ["Progress", "load_checkpoint", "save_checkpoint"]

# What should be the same for the loss to continue exactly.
_RECORDED = (
    *("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length", "num_experts"),
    *("expert_interval", "topk", "moe_train_capacity_factor", "moe_min_capacity", "moe_loss_coeff"),
    *("disable_moe_token_dropping", "hidden_dropout", "attention_dropout", "global_batch_size", "micro_batch_size"),
    *("seed", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_decay_iters", "weight_decay", "clip_grad"),
    *("bf16", "fp16", "data_path", "split", "tokenizer_type"),
)


@dataclass
class Progress:
    """The counters of a run.

    Attributes:
        iteration: finished iterations.
        consumed: training samples consumed by all ranks; the position in the data.
        settings: the arguments that shape the loss, as plain data.
        saved_at: the iteration of the last checkpoint of this process, or -1.
    """

    iteration: int = 0
    consumed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    saved_at: int = -1

    @classmethod
    def start(cls, args: argparse.Namespace, world_size: int, fingerprint: str) -> Progress:
        """Return the counters of a new run.

        Args:
            args: settled arguments.
            world_size: the number of ranks.
            fingerprint: of the data.
        """
        settings = {name: getattr(args, name) for name in _RECORDED}
        return cls(settings={**settings, "world_size": world_size, "data": fingerprint})

    def client_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the engine's own state: plain data only."""
        return {
            "iteration": self.iteration,
            "consumed_train_samples": self.consumed,
            "args": dict(self.settings),
        }

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Take the counters from a checkpoint.

        Args:
            state: what `client_state` returned when it was saved.

        Returns:
            One sentence for each setting that has changed since.
        """
        self.iteration = int(state["iteration"])
        self.consumed = int(state["consumed_train_samples"])
        self.saved_at = self.iteration
        then = state.get("args", {})
        return [
            f"{name}: {then[name]} in the checkpoint, {value} now"
            for name, value in self.settings.items()
            if name in then and then[name] != value
        ]


def save_checkpoint(
    engine: Any, args: argparse.Namespace, progress: Progress, runtime: Runtime, *, last: bool = False
) -> None:
    """Save, once per iteration at most.

    Args:
        engine: the DeepSpeed engine.
        args: settled arguments; without --save nothing happens.
        progress: the counters.
        runtime: for the message.
        last: the run ends here: with the plugin every expert is saved, so that a continuation loses nothing.
    """
    if not args.save or progress.saved_at == progress.iteration:
        return
    started = time.perf_counter()
    moc = getattr(engine, "moc", None)
    if last and moc is not None:
        moc.save(args.save, client_state=progress.client_state(), full=True)
    else:
        engine.save_checkpoint(args.save, client_state=progress.client_state())
    progress.saved_at = progress.iteration
    took = time.perf_counter() - started
    runtime.print(f" saved iteration {progress.iteration} to {args.save} (training waited {took * 1e3:.0f} ms)")


def load_checkpoint(engine: Any, args: argparse.Namespace, progress: Progress, runtime: Runtime) -> bool:
    """Resume from --load, if there is something.

    Args:
        engine: the DeepSpeed engine.
        args: settled arguments.
        progress: changed in place.
        runtime: for the messages.

    Returns:
        True if the run was resumed.
    """
    if not args.load:
        return False
    if not Path(args.load).is_dir() and "://" not in args.load:
        runtime.print(f" nothing in {args.load} yet: starting from scratch")
        return False
    started = time.perf_counter()
    path, state = engine.load_checkpoint(args.load)
    if path is None:
        runtime.print(f" no checkpoint in {args.load}: starting from scratch")
        return False
    changes = progress.restore(state)
    runtime.print(
        f" resumed {path} in {time.perf_counter() - started:.2f} s: iteration {progress.iteration}, "
        f"{progress.consumed} samples consumed"
    )
    for change in changes:
        runtime.print(f" changed since the checkpoint: {change}")
    return True
