"""What the hooks of one process share: the engine that trains, and which save is under way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moc_ckpt.integrations.megatron_deepspeed.plain import encode

__all__ = ["RUN", "RunState", "megatron_args"]

logger = logging.getLogger("moc_ckpt")

CHECKPOINT_VERSION = 3.0


def megatron_args() -> Any:
    """Returns Megatron's global arguments; None before it has parsed them."""
    module = sys.modules.get("megatron.global_vars")
    if module is None:
        return None
    try:
        return module.get_args()
    except AssertionError:
        return None


class RunState:
    """One per process; belongs to the training thread.

    Attributes:
        engine: the engine that `train` trains, if the plugin is at work on it.
        full: the save under way is the last of the run, so it takes every expert.
    """

    def __init__(self) -> None:
        self.engine: Any = None
        self.full = False
        self._saved: tuple[str, int, bool] | None = None

    def adopt(self, engine: Any) -> None:
        """Takes an engine over that is about to be trained. Not collective; all ranks do it."""
        if getattr(engine, "moc", None) is None:
            return
        self.engine = engine
        engine.moc.hold_boundaries()
        engine.moc.register_state(client_state)

    def boundary(self) -> None:
        """Ends the last step: what its snapshot takes is complete only when the loop has counted it.

        Raises:
            SystemExit: after SIGTERM, once everything is saved.
        """
        if self.engine is not None and self.engine.moc is not None:
            self.engine.moc.boundary()

    @contextmanager
    def saving(self, full: bool) -> Iterator[None]:
        """Marks the save that runs inside."""
        self.full = full
        try:
            yield
        finally:
            self.full = False

    def is_last_save(self, iteration: int) -> bool:
        """Tells, equally on all ranks, whether a run that is asked to save now has no step after it."""
        args = megatron_args()
        if iteration >= (args.train_iters or 0):
            return True
        if args.train_tokens is not None and args.consumed_train_tokens >= args.train_tokens:
            return True
        if args.exit_interval and iteration % args.exit_interval == 0:
            return True
        # Whatever is not periodic comes before an exit.
        return not (args.save_interval and iteration % args.save_interval == 0)

    def is_saved(self, directory: str, iteration: int) -> bool:
        """Tells whether this iteration is in this directory already, with every expert."""
        return self._saved == (directory, iteration, True)

    def was_saved(self, directory: str, iteration: int, full: bool) -> None:
        """Notes what was saved last."""
        self._saved = (directory, iteration, full)

    def leave(self) -> None:
        """Is called when the loop is left by `sys.exit()`: a checkpoint of this step gets every expert; collective."""
        args, engine = megatron_args(), self.engine
        self.boundary()
        if engine is None or engine.moc is None or self._saved is None:
            return
        directory, iteration, full = self._saved
        if iteration != args.iteration or full:
            return
        engine.moc.save(directory, client_state=client_state() if args.rank == 0 else {}, full=True)
        self.was_saved(directory, iteration, True)


def client_state() -> dict[str, Any]:
    """Returns what `megatron.checkpointing.load_checkpoint` reads, as plain data; the generators are saved apart."""
    args = megatron_args()
    state = {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": args.iteration,
        "tokens": args.consumed_train_tokens,
    }
    result = encode(state)
    assert isinstance(result, dict)
    return result


RUN = RunState()
