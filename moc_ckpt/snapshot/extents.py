"""Free byte ranges of a region, and where a group of requests goes in them (pure)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

__all__ = ["Extent", "FreeSpace"]

Extent = tuple[int, int]
"""(first byte, bytes)."""


class FreeSpace:
    """The free extents of a region: disjoint, ascending, never touching each other. Not thread-safe.

    All sizes and places are whole numbers of whatever grain the caller uses; nothing here rounds.

    Args:
        start: first byte of the region.
        size: bytes of the region, all free at first.
    """

    def __init__(self, start: int, size: int) -> None:
        self._region = (start, start + size)
        self._starts = [start] if size else []
        self._sizes = [size] if size else []
        self.free = size

    def holes(self) -> list[Extent]:
        """Returns the free extents in order of address."""
        return list(zip(self._starts, self._sizes, strict=True))

    def find(self, size: int) -> int | None:
        """Returns where `size` > 0 bytes fit in one piece: a hole of just that size, else the first large enough."""
        if size in self._sizes:
            return self._starts[self._sizes.index(size)]
        for start, room in zip(self._starts, self._sizes, strict=True):
            if room >= size:
                return start
        return None

    def plan(self, sizes: Sequence[int], limit: int) -> list[tuple[Extent, ...]] | None:
        """Chooses places for a group of requests; takes nothing.

        A group that fits into one hole goes there, one request after the other. Otherwise each request, the largest
        first, goes into the smallest hole that holds it whole: requests of recurring sizes so find the holes that
        their predecessors left. What fits nowhere whole is cut over the largest holes. So free bytes are never lost
        to fragmentation unless a request would fall into more than `limit` extents.

        Args:
            sizes: bytes of each request.
            limit: extents that one request may have at most, at least 1.

        Returns:
            The extents of each request (none for a request of 0 bytes), or None if there is no room.
        """
        total = sum(sizes)
        if total > self.free:
            return None
        if not total:
            return [()] * len(sizes)
        start = self.find(total)
        if start is not None:
            return _flow(sizes, [(start, total)], 1)
        holes = sorted(zip(self._sizes, self._starts, strict=True))
        placed: list[tuple[Extent, ...]] = [()] * len(sizes)
        cut = []
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            size = sizes[index]
            best = bisect_left(holes, (size, -1))
            if best == len(holes):
                cut.append(index)
            elif size:
                room, at = holes.pop(best)
                placed[index] = ((at, size),)
                if room > size:
                    insort(holes, (room - size, at + size))
        pieces = _flow([sizes[index] for index in cut], ((at, room) for room, at in reversed(holes)), limit)
        if pieces is None:
            return None
        for index, extents in zip(cut, pieces, strict=True):
            placed[index] = extents
        return placed

    def take(self, extents: Iterable[Extent]) -> None:
        """Makes extents used.

        Raises:
            ValueError: if a byte of them is not free; nothing was taken then.
        """
        runs = _merge(extents)
        for start, stop in runs:
            index = bisect_right(self._starts, start) - 1
            if index < 0 or stop > self._starts[index] + self._sizes[index]:
                raise ValueError(f"[{start}, {stop}) is not free")
        for start, stop in runs:
            index = bisect_right(self._starts, start) - 1
            first, end = self._starts[index], self._starts[index] + self._sizes[index]
            rest = [hole for hole in ((first, start - first), (stop, end - stop)) if hole[1]]
            self._starts[index : index + 1] = [hole[0] for hole in rest]
            self._sizes[index : index + 1] = [hole[1] for hole in rest]
            self.free -= stop - start

    def give(self, extents: Iterable[Extent]) -> None:
        """Makes extents free again and joins them with their free neighbours.

        Raises:
            ValueError: if a byte of them is free already or outside the region; nothing was changed then.
        """
        runs = _merge(extents)
        for start, stop in runs:
            after = bisect_right(self._starts, start)
            before = self._starts[after - 1] + self._sizes[after - 1] if after else self._region[0]
            beyond = self._starts[after] if after < len(self._starts) else self._region[1]
            if start < before or stop > beyond:
                raise ValueError(f"[{start}, {stop}) is free already, or outside the region")
        for start, stop in runs:
            self.free += stop - start
            low = high = bisect_right(self._starts, start)
            if low and self._starts[low - 1] + self._sizes[low - 1] == start:
                low -= 1
                start = self._starts[low]
            if high < len(self._starts) and self._starts[high] == stop:
                stop += self._sizes[high]
                high += 1
            self._starts[low:high] = [start]
            self._sizes[low:high] = [stop - start]


def _flow(sizes: Sequence[int], holes: Iterable[Extent], limit: int) -> list[tuple[Extent, ...]] | None:
    """Fills the holes in the order given; they have room enough. None if a request would need too many extents."""
    rest = iter(holes)
    at = room = 0
    placed: list[tuple[Extent, ...]] = []
    for size in sizes:
        if size <= room:  # the usual case
            placed.append(((at, size),) if size else ())
            at += size
            room -= size
            continue
        pieces = []
        while size:
            if not room:
                at, room = next(rest)
            piece = min(room, size)
            pieces.append((at, piece))
            at, room, size = at + piece, room - piece, size - piece
        if len(pieces) > limit:
            return None
        placed.append(tuple(pieces))
    return placed


def _merge(extents: Iterable[Extent]) -> list[Extent]:
    """Returns [start, stop) of the runs that extents make up, ascending.

    Raises:
        ValueError: if two overlap or one is empty.
    """
    runs: list[Extent] = []
    first = end = -1
    for start, size in sorted(extents):
        if size <= 0 or start < end:
            raise ValueError(f"extent [{start}, {start + size}) is empty or overlaps another one")
        if start != end:
            if end >= 0:
                runs.append((first, end))
            first = start
        end = start + size
    if end >= 0:
        runs.append((first, end))
    return runs
