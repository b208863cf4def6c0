"""Which bytes a snapshot copies where, in as few runs as possible. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["CopyRun", "coalesce", "cut"]


class CopyRun(NamedTuple):
    """One contiguous copy.

    Attributes:
        source: which tensor storage the bytes are in; runs of different ones are never joined.
        start: first byte in it.
        target: first byte in the arena.
        nbytes: length.
    """

    source: int
    start: int
    target: int
    nbytes: int


def cut(pieces: Iterable[tuple[int, int, int, int]], extents: Sequence[tuple[int, int]]) -> list[CopyRun]:
    """Places the pieces of one slot into its extents.

    Args:
        pieces: (source, first byte in it, first byte in the slot, bytes), ascending by place in the slot.
        extents: (first byte in the arena, bytes) that make up the slot, in order.

    Returns:
        The runs; a piece that crosses the end of an extent becomes several.

    Raises:
        ValueError: if a piece does not fit into the slot.
    """
    if len(extents) == 1:
        base, room = extents[0]
        runs = [CopyRun(source, start, base + at, nbytes) for source, start, at, nbytes in pieces if nbytes]
        if runs and runs[-1].target + runs[-1].nbytes > base + room:
            raise ValueError(f"the slot has {room} bytes, the pieces need more")
        return runs
    starts = [0]
    for _, room in extents:
        starts.append(starts[-1] + room)
    runs = []
    for source, start, at, nbytes in pieces:
        if at + nbytes > starts[-1]:
            raise ValueError(f"the slot has {starts[-1]} bytes, the pieces need {at + nbytes}")
        while nbytes:
            index = bisect_right(starts, at) - 1
            count = min(nbytes, starts[index + 1] - at)
            runs.append(CopyRun(source, start, extents[index][0] + at - starts[index], count))
            start, at, nbytes = start + count, at + count, nbytes - count
    return runs


def coalesce(runs: Iterable[CopyRun]) -> list[CopyRun]:
    """Joins runs that follow each other both in their source and in the arena.

    A copy costs some microseconds to issue, whatever its size; flat optimizer partitions lie in few long runs.

    Args:
        runs: in any order; their targets are disjoint.

    Returns:
        As few runs as the addresses allow, ascending by source and place in it.
    """
    joined: list[CopyRun] = []
    for run in sorted(runs):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.source == run.source
            and last.start + last.nbytes == run.start
            and last.target + last.nbytes == run.target
        ):
            joined[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
        else:
            joined.append(run)
    return joined
