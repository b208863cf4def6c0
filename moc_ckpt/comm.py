"""Collectives with deadlines in which an error on one rank reaches all ranks (invariant I8).

The group is a gloo group of this package's own, so that it can neither disturb nor be disturbed by
the collectives of training. A section of rank-local work must not contain another collective: a rank
that failed before it would leave the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from moc_ckpt import errors
from moc_ckpt.errors import MocError, RankError, RendezvousTimeoutError

__all__ = ["Comm"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


# The barrier in front of each collective has the deadline; the group's own timeout is only a backstop.
_BACKSTOP = timedelta(hours=1)
_groups: list[tuple[Any, Any]] = []


def _own_group() -> Any:
    """Returns this package's group over the current world, made once; collective the first time."""
    world = dist.group.WORLD
    for known, group in _groups:
        if known is world:
            return group
    # Groups of a world that was destroyed are of no use any more.
    _groups[:] = [(world, dist.new_group(backend="gloo", timeout=_BACKSTOP))]
    return _groups[0][1]


class Comm:
    """All ranks of a job. Not thread-safe; every method is collective and called in the same order on all ranks.

    Args:
        rendezvous_s: deadline in seconds for all ranks to arrive at a collective.
        commit_s: deadline in seconds for collectives that follow long rank-local work (I/O).
    """

    def __init__(self, *, rendezvous_s: float, commit_s: float) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._deadlines = {"rendezvous": rendezvous_s, "commit": commit_s}
        self._group = _own_group() if self.world > 1 else None

    def exchange(self, what: str, work: Callable[[], T], *, wait: str = "rendezvous") -> list[T]:
        """Runs `work` on every rank and returns the results of all ranks, in rank order.

        Args:
            what: name of the work, for messages.
            work: rank-local work without collectives; its result must be picklable and small.
            wait: `rendezvous` or `commit`, the deadline that applies.

        Raises:
            MocError: on every rank, if `work` raised on any rank: the rank's own error where it failed
                itself, else an error of the same class that names the failing ranks.
            RendezvousTimeoutError: if a rank did not arrive in time.
        """
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        mine = (result, _describe(error))
        if self._group is None:
            replies = [mine]
        else:
            self._barrier(what, wait)
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, mine, group=self._group)
            replies = gathered
        failed = {rank: reply[1] for rank, reply in enumerate(replies) if reply[1] is not None}
        if failed:
            if error is not None:
                raise error
            raise _rebuild(what, failed)
        return [reply[0] for reply in replies]

    def agree(self, what: str, work: Callable[[], T], *, wait: str = "commit") -> T:
        """Runs `work` on every rank; returns this rank's own result once all ranks have succeeded.

        The result stays local. Raises as `exchange` does.
        """
        box: list[T] = []
        self.exchange(what, lambda: box.append(work()), wait=wait)
        return box[0]

    def from_first(self, what: str, work: Callable[[], T], *, wait: str = "rendezvous") -> T:
        """Runs `work` on rank 0 only and returns its (picklable) result on all ranks; raises as `exchange` does."""
        result: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as caught:
                error = caught
        if self._group is not None:
            self._barrier(what, wait)
            box = [(result, _describe(error))]
            dist.broadcast_object_list(box, src=0, group=self._group)
            result, description = box[0]
            if description is not None and error is None:
                raise _rebuild(what, {0: description})
        if error is not None:
            raise error
        return result

    def _barrier(self, what: str, wait: str) -> None:
        deadline = self._deadlines[wait]
        try:
            dist.monitored_barrier(self._group, timeout=timedelta(seconds=deadline), wait_all_ranks=True)
        except RuntimeError as error:
            raise RendezvousTimeoutError(
                f"not all ranks arrived at {what!r} within {deadline:g} s ({str(error).splitlines()[0]})",
                where=f"rank {self.rank} of {self.world}" + ("" if self.rank == 0 else "; rank 0 names who is missing"),
                fix=f"look at the log of the missing ranks; raise moc_checkpoint.timeouts.{wait}_s if they were slow",
            ) from error


def _describe(error: Exception | None) -> tuple[str, str, str, str] | None:
    if error is None:
        return None
    if isinstance(error, MocError):
        return type(error).__name__, error.what, error.where, error.fix
    # Others still see what it was; the rank itself raises the original with its traceback.
    logger.error("rank-local failure", exc_info=error)
    return "RankError", f"{type(error).__name__}: {error}", "", ""


def _rebuild(what: str, failed: dict[int, tuple[str, str, str, str]]) -> MocError:
    first = min(failed)
    name, text, where, fix = failed[first]
    cls = getattr(errors, name, RankError)
    ranks = ", ".join(str(rank) for rank in sorted(failed)[:16]) + (", …" if len(failed) > 16 else "")
    place = f"rank {first}" if len(failed) == 1 else f"ranks {ranks} (this is rank {first}'s error)"
    return cls(f"{what} failed on {place}: {text}", where=where, fix=fix)
