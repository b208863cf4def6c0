"""The training loop: one iteration, evaluation, and what happens between iterations."""

from __future__ import annotations

import argparse
import os
import signal
import time
from typing import Any

import torch

from gpt_moe.data import TokenStream, rank_indices
from gpt_moe.model import MoeInterface
from gpt_moe.progress import Progress, save_checkpoint
from gpt_moe.report import LossLog, Reporter
from gpt_moe.runtime import Runtime, preserved_rng

__all__ = ["Trainer"]


class Trainer:
    """Runs the loop.

    Args:
        engine: the DeepSpeed engine.
        args: settled arguments.
        runtime: ranks and device.
        progress: counters, possibly restored.
        streams: training and validation data.
        layers: the MoE layers.
    """

    def __init__(
        self,
        engine: Any,
        args: argparse.Namespace,
        runtime: Runtime,
        progress: Progress,
        streams: tuple[TokenStream, TokenStream],
        layers: list[MoeInterface],
    ) -> None:
        self._engine = engine
        self._args = args
        self._runtime = runtime
        self._progress = progress
        self._train_data, self._valid_data = streams
        self._layers = layers
        self._positions = torch.arange(args.seq_length, device=runtime.device).unsqueeze(0)
        self._vocab = engine.module.vocab_size

    def run(self) -> None:
        """Train until --train-iters, saving and evaluating on the way."""
        args, progress = self._args, self._progress
        reporter = Reporter(args, self._runtime, self._layers)
        log = LossLog(args.loss_log, self._runtime.rank)
        self._engine.train()
        while progress.iteration < args.train_iters:
            lr = self._engine.get_lr()[0]
            loss, moe_loss = self._iteration()
            grad_norm = self._engine.get_global_grad_norm()
            grad_norm = None if grad_norm is None else float(grad_norm)
            reporter.add(loss, moe_loss)
            if log.active:
                log.write(progress, loss.item(), moe_loss.item(), grad_norm, lr)
            if progress.iteration % args.log_interval == 0 or progress.iteration == args.train_iters:
                reporter.line(self._engine, progress, lr, grad_norm)
            started = time.perf_counter()
            if args.eval_iters and progress.iteration % args.eval_interval == 0:
                reporter.validation(progress.iteration, self.evaluate())
            leaving = bool(args.exit_interval) and progress.iteration % args.exit_interval == 0
            last = leaving or progress.iteration >= args.train_iters
            if args.save_interval and progress.iteration % args.save_interval == 0 and not last:
                save_checkpoint(self._engine, args, progress, self._runtime)
            reporter.exclude(time.perf_counter() - started)
            if leaving:
                self._runtime.print(f" leaving at iteration {progress.iteration} (--exit-interval)")
                break
        save_checkpoint(self._engine, args, progress, self._runtime, last=True)

    def _iteration(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one global batch; return this rank's mean losses."""
        args, progress = self._args, self._progress
        steps = rank_indices(
            progress.consumed,
            args.global_batch_size,
            args.micro_batch_size,
            self._runtime.rank,
            self._runtime.world_size,
        )
        total = torch.zeros(2, dtype=torch.float32, device=self._runtime.device)
        for number, positions in enumerate(steps, 1):
            loss, moe_loss = self._losses(self._train_data, positions)
            self._engine.backward(loss + args.moe_loss_coeff * moe_loss)
            total += torch.stack([loss.detach(), moe_loss.detach()]).float()
            if number == len(steps):
                self._maybe_die(progress.iteration + 1)
                # Counted before the update, so that a snapshot taken by the update has the position that follows it.
                progress.iteration += 1
                progress.consumed += args.global_batch_size
            self._engine.step()
        loss, moe_loss = (total / len(steps)).unbind()
        return loss, moe_loss

    def _losses(self, stream: TokenStream, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = stream.batch(positions)
        if rows.max() >= self._vocab:
            raise ValueError(f"{stream.name} has token {rows.max()}, the vocabulary only {self._vocab} (--vocab-size)")
        tokens = torch.from_numpy(rows).to(self._runtime.device, non_blocking=True)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = self._engine(inputs, self._positions.expand_as(inputs), None, labels=labels).float().mean()
        moe_loss = torch.zeros_like(loss)
        for layer in self._layers:
            moe_loss = moe_loss + layer.aux_loss.float()
        return loss, moe_loss

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss over the first --eval-iters global batches of the validation data.

        Always the same samples, so results are comparable; the training's random state is left as it was.
        """
        args = self._args
        total = torch.zeros(1, dtype=torch.float64, device=self._runtime.device)
        self._engine.eval()
        with preserved_rng():
            for number in range(args.eval_iters):
                steps = rank_indices(
                    number * args.global_batch_size,
                    args.global_batch_size,
                    args.micro_batch_size,
                    self._runtime.rank,
                    self._runtime.world_size,
                )
                for positions in steps:
                    total += self._losses(self._valid_data, positions)[0].double() / len(steps)
        self._engine.train()
        torch.distributed.all_reduce(total)
        return float(total) / (args.eval_iters * self._runtime.world_size)

    def _maybe_die(self, iteration: int) -> None:
        args = self._args
        if args.fault_at_iter != iteration or args.fault_rank not in (None, self._runtime.rank):
            return
        print(
            f" rank {self._runtime.rank}: SIGKILL in iteration {iteration}, as ordered by --fault-at-iter", flush=True
        )
        os.kill(os.getpid(), signal.SIGKILL)
