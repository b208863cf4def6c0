"""What ranks tell each other once per snapshot (invariant I7), as the numbers of one vote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.votes import Ballot

__all__ = ["MAX_IN_FLIGHT", "Status", "Tally", "digest"]

MAX_IN_FLIGHT = 8
"""Saves that may be in flight at once, to different directories."""

_Ints = npt.NDArray[np.int64]
_FLAGS = 2 + 2 * MAX_IN_FLIGHT
_RATES = 4
_UNKNOWN = np.iinfo(np.int64).max


def digest(*values: object) -> int:
    """Returns a number for values that print alike, to compare them between ranks."""
    data = repr(values).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 2


@dataclass(frozen=True, slots=True)
class Status:
    """What one rank says.

    Attributes:
        counts: int64 [layout.size] tokens since the last vote.
        can_fill: its arena has room for another snapshot.
        filled: its snapshot of the vote before is whole (True if there was none).
        settled: for each save in flight, whether this rank knows how it ended.
        failed: for each, whether it failed.
        call: digest of what this vote is about: all ranks must mean the same.
        arguments: digest of the arguments of save_checkpoint.
        buffers: digest of its dense buffers.
        copy_rate: bytes/s of its last snapshot; 0 if unknown.
        persist_rate: bytes/s of its last persist; 0 if unknown.
        compute_us: microseconds that its last forward and backward pass took; 0 if unknown.
        step_us: microseconds that its steps take; 0 if unknown.
    """

    counts: _Ints
    can_fill: bool
    filled: bool
    settled: tuple[bool, ...]
    failed: tuple[bool, ...]
    call: int
    arguments: int
    buffers: int
    copy_rate: int = 0
    persist_rate: int = 0
    compute_us: int = 0
    step_us: int = 0

    @staticmethod
    def sizes(counts: int) -> tuple[int, int]:
        """Returns the lengths of the two vectors, for so many counts."""
        return counts + _FLAGS, 6 + _RATES

    def ballot(self) -> Ballot:
        """Returns the status as the vectors of a vote."""
        flags = np.zeros(_FLAGS, dtype=np.int64)
        flags[0], flags[1] = self.can_fill, self.filled
        flags[2 : 2 + len(self.settled)] = self.settled
        flags[2 + MAX_IN_FLIGHT : 2 + MAX_IN_FLIGHT + len(self.failed)] = self.failed
        rates = [rate or _UNKNOWN for rate in (self.copy_rate, self.persist_rate, self.compute_us, self.step_us)]
        digests = (self.call, self.arguments, self.buffers)
        mins = np.array([*(sign * one for one in digests for sign in (1, -1)), *rates], dtype=np.int64)
        return Ballot(np.concatenate([self.counts, flags]), mins)


@dataclass(frozen=True, slots=True)
class Tally:
    """What all ranks said.

    Attributes:
        counts: int64 [layout.size] tokens of all ranks since the last vote.
        can_fill: every arena has room for another snapshot.
        filled: the snapshot of the vote before is whole on every rank.
        settled: for each save in flight, whether every rank knows how it ended.
        failed: for each, whether it failed for any rank.
        agreed: all ranks meant the same.
        same_arguments: save_checkpoint has the same arguments on all ranks.
        same_buffers: dense buffers are equal on all ranks.
        copy_rate: bytes/s of the slowest rank; 0 if nobody knows.
        persist_rate: likewise.
        compute_us: microseconds of the shortest forward and backward pass; 0 if nobody knows.
        step_us: microseconds of the shortest step; 0 if nobody knows.
    """

    counts: _Ints
    can_fill: bool
    filled: bool
    settled: tuple[bool, ...]
    failed: tuple[bool, ...]
    agreed: bool
    same_arguments: bool
    same_buffers: bool
    copy_rate: int
    persist_rate: int
    compute_us: int
    step_us: int

    @classmethod
    def of(cls, totals: Ballot, *, world: int, counts: int, saves: int) -> Tally:
        """Reads the totals of a vote.

        Args:
            totals: the vote's result.
            world: number of ranks.
            counts: length of `counts`.
            saves: number of saves in flight when it was submitted.
        """
        flags = totals.sums[counts:]
        settled = flags[2 : 2 + saves] == world
        failed = flags[2 + MAX_IN_FLIGHT : 2 + MAX_IN_FLIGHT + saves] > 0
        copy_rate, persist_rate, compute, step = (0 if rate == _UNKNOWN else int(rate) for rate in totals.mins[6:])
        agreed, same_arguments, same_buffers = (bool(totals.mins[i] == -totals.mins[i + 1]) for i in (0, 2, 4))
        return cls(
            counts=totals.sums[:counts],
            can_fill=bool(flags[0] == world),
            filled=bool(flags[1] == world),
            settled=tuple(map(bool, settled)),
            failed=tuple(map(bool, failed)),
            agreed=agreed,
            same_arguments=same_arguments,
            same_buffers=same_buffers,
            copy_rate=copy_rate,
            persist_rate=persist_rate,
            compute_us=compute,
            step_us=step,
        )
