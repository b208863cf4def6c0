"""Collectives with deadlines in which an error on one rank reaches all ranks (invariant I8).

The group is a gloo group of this package's own, so that it can neither disturb nor be disturbed by
the collectives of training. A section of rank-local work must not contain another collective: a rank
that failed before it would leave the others waiting.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from moc_ckpt import errors
from moc_ckpt.errors import MocError, RankError, RendezvousTimeoutError

__all__ = ["Comm"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


# The barrier in front of each collective has the deadline; the group's own timeout is only a backstop.
_BACKSTOP = timedelta(hours=1)
_GO = "go"
_MIXED = "mixed:"


class _World(NamedTuple):
    """What all engines of one process group world share."""

    world: Any
    group: Any
    token: str
    engines: Iterator[int]


_worlds: list[_World] = []


def _own_world() -> _World:
    """Returns this package's group over the current world, made once; collective the first time."""
    world = dist.group.WORLD
    for known in _worlds:
        if known.world is world:
            return known
    group = dist.new_group(backend="gloo", timeout=_BACKSTOP)
    # The store may outlive a world, and with it keys of its barriers.
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0, group=group)
    # Groups of a world that was destroyed are of no use any more.
    _worlds[:] = [_World(world, group, token[0], itertools.count())]
    return _worlds[0]


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
        self._arrivals = 0
        self._group = None
        if self.world > 1:
            own = _own_world()
            self._group = own.group
            self._store = dist.distributed_c10d._get_default_store()
            # Engines are built in the same order on all ranks.
            self._prefix = f"moc_ckpt/{own.token}/{next(own.engines)}"

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
        """Waits until all ranks are here, or gives up on all of them alike.

        Through the job's key-value store rather than a barrier of the backend: those wait without a deadline when the
        rank that they count on is the absent one, and cannot name the others.
        """
        self._arrivals += 1
        key, deadline = f"{self._prefix}/{self._arrivals}", self._deadlines[wait]
        self._store.set(f"{key}/{self.rank}", "1")
        common = self._store.compare_set(f"{key}/what", "", what).decode()
        if common != what:
            self._store.compare_set(f"{key}/verdict", "", f"{_MIXED}{what!r} while others are at {common!r}")
        elif self._store.add(f"{key}/count", 1) == self.world:
            self._store.compare_set(f"{key}/verdict", "", _GO)
        try:
            self._store.wait([f"{key}/verdict"], timedelta(seconds=deadline))
        except RuntimeError:
            missing = [rank for rank in range(self.world) if not self._store.check([f"{key}/{rank}"])]
            # Whoever decides first decides for all: a rank that arrives late must give up as well.
            self._store.compare_set(f"{key}/verdict", "", ",".join(map(str, missing)) or "?")
        verdict = self._store.get(f"{key}/verdict").decode()
        if verdict.startswith(_MIXED):
            raise RankError(
                f"ranks make different calls: some are at {verdict.removeprefix(_MIXED)}",
                where=f"rank {self.rank} of {self.world}",
                fix="call save_checkpoint and load_checkpoint alike on all ranks; an earlier error on one rank alone "
                "may have been ignored",
            )
        if verdict != _GO:
            raise RendezvousTimeoutError(
                f"ranks {verdict} did not arrive at {what!r} within {deadline:g} s",
                where=f"rank {self.rank} of {self.world}",
                fix=f"look at the log of ranks {verdict}; raise moc_checkpoint.timeouts.{wait}_s if they were slow",
            )
        # Everybody is here, so everybody has read the verdict before this one.
        old = f"{self._prefix}/{self._arrivals - 1}"
        self._store.delete_key(f"{old}/{self.rank}")
        if self.rank == 0:
            for name in ("count", "what", "verdict"):
                self._store.delete_key(f"{old}/{name}")


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
