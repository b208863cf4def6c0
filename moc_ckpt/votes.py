"""Background votes: one small reduction per snapshot, whose result is used at the next one (invariant I7).

Training never waits for the network here: a vote is handed to a thread of its own, and who needs its result asks for it
a step later. The thread has a gloo group of its own, so that it can neither disturb nor be disturbed by the collectives
of training, and uses the group object itself, which outlives `destroy_process_group` at the end of a script.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moc_ckpt.errors import RendezvousTimeoutError

__all__ = ["Ballot", "Votes"]

logger = logging.getLogger("moc_ckpt")

_Ints = npt.NDArray[np.int64]
T = TypeVar("T")

# A rank that failed tells so within this time after the collective broke; who stays silent is absent.
_ROLL_CALL_S = 1.0


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one rank says, or what all of them said.

    Attributes:
        sums: int64 [m], added over the ranks.
        mins: int64 [n], of which the smallest over the ranks counts.
    """

    sums: _Ints
    mins: _Ints


@dataclass(slots=True)
class _Vote(Generic[T]):
    what: str
    sizes: tuple[int, int]
    prepare: Callable[[], Ballot]
    finish: Callable[[Ballot], T]
    result: Future[T]


class Votes:
    """Reductions over all ranks in a background thread, in the order of submission.

    Building it is collective; so is every vote: all ranks submit the same votes in the same order. `submit` and `post`
    may be called from one thread at a time.

    Args:
        deadline_s: seconds after which a vote gives up on ranks that do not take part.
    """

    def __init__(self, *, deadline_s: float) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._timeout = timedelta(seconds=deadline_s)
        self._group: Any = None
        self._rounds = 0
        if self._world > 1:
            # With only its own deadline the group would stop serving after the first late vote.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            token = [uuid.uuid4().hex]
            dist.broadcast_object_list(token, src=0, group=self._group)
            self._store = dist.distributed_c10d._get_default_store()
            self._prefix = f"moc_ckpt/votes/{token[0]}"
        self._jobs: queue.SimpleQueue[_Vote[Any] | Callable[[], None] | None] = queue.SimpleQueue()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="moc-votes", daemon=True)
        self._thread.start()

    def submit(
        self, what: str, sizes: tuple[int, int], prepare: Callable[[], Ballot], finish: Callable[[Ballot], T]
    ) -> Future[T]:
        """Hands a vote to the thread; returns at once.

        Args:
            what: name of the vote, for messages.
            sizes: lengths of `sums` and `mins`, equal on all ranks.
            prepare: returns this rank's ballot; runs in the thread. If it raises, the rank still takes part, and the
                vote fails on every rank.
            finish: turns the totals into the result; runs in the thread.

        Returns:
            The result. It fails with what `prepare` or `finish` raised, or with RendezvousTimeoutError.
        """
        vote = _Vote(what, sizes, prepare, finish, Future())
        self._jobs.put(vote)
        return vote.result

    def post(self, work: Callable[[], None]) -> None:
        """Lets the thread do `work` after everything submitted so far; what it raises is logged."""
        self._jobs.put(work)

    def idle(self, timeout_s: float) -> bool:
        """Waits until everything submitted so far is done; tells whether it is."""
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after what it still has to do, and its connections.

        Not collective: a vote in which this rank has not taken part yet fails on the others. Doing it again changes
        nothing.
        """
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._group is not None and not self._thread.is_alive():
            group, self._group = self._group, None
            # Three threads and a socket per rank: a process that builds many engines would collect them. The script
            # may have destroyed all groups already.
            with suppress(ValueError, RuntimeError):
                dist.destroy_process_group(group)

    # ------------------------------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if isinstance(job, _Vote):
                    self._run(job)
                else:
                    job()
            except Exception:
                logger.exception("background work failed")

    def _run(self, vote: _Vote[Any]) -> None:
        self._rounds += 1
        failure: Exception | None = None
        # The last entry of `mins` says that this rank is well.
        sums, mins = np.zeros(vote.sizes[0], dtype=np.int64), np.zeros(vote.sizes[1] + 1, dtype=np.int64)
        try:
            if self._broken is not None:
                raise self._broken
            ballot = vote.prepare()
            sums[:], mins[:-1], mins[-1] = ballot.sums, ballot.mins, 1
        except Exception as error:
            failure = error
        try:
            # After a vote that broke off, the ranks may not be at the same place any more.
            if self._group is not None and self._broken is None:
                self._reduce(vote.what, sums, dist.ReduceOp.SUM)
                self._reduce(vote.what, mins, dist.ReduceOp.MIN)
        except Exception as error:
            self._broken = failure = error
        try:
            if failure is None and mins[-1] != 1:
                failure = RuntimeError(f"{vote.what} failed on another rank")
            if failure is not None:
                raise failure
            vote.result.set_result(vote.finish(Ballot(sums, mins[:-1])))
        except Exception as error:
            vote.result.set_exception(error)

    def _reduce(self, what: str, values: _Ints, how: Any) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = how
        options.timeout = self._timeout
        try:
            self._group.allreduce([torch.from_numpy(values)], options).wait()
        except RuntimeError as error:
            absent = self._roll_call()
            who = f"ranks {', '.join(map(str, absent))}" if absent else "other ranks"
            raise RendezvousTimeoutError(
                f"{who} did not take part in {what!r}: {str(error).splitlines()[0]}",
                where=f"rank {self._rank} of {self._world}",
                fix=f"look at the log of {who}; raise moc_checkpoint.timeouts.rendezvous_s if they were slow",
            ) from error

    def _roll_call(self) -> list[int]:
        """Returns the ranks that do not even report that the vote broke off."""
        try:
            key = f"{self._prefix}/{self._rounds}"
            self._store.set(f"{key}/{self._rank}", "1")
            time.sleep(_ROLL_CALL_S)
            return [rank for rank in range(self._world) if not self._store.check([f"{key}/{rank}"])]
        except RuntimeError:  # the store went with rank 0's node
            return []
