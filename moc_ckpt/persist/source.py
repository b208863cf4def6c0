"""Bytes of a pack that lie scattered in a mapped file, such as the slots of an arena."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from moc_ckpt.storage.pack_layout import ALIGNMENT

__all__ = ["FileSource"]

# So much of a range may be copied (pages where memory ends); beyond that it is better staged as a whole.
_COPIED_SHARE = 8
_COPIED_PAGES = 16


class FileSource:
    """A pack's bytes in a mapped file. Thread-safe; the memory must not change while the pack is written.

    Where a span ends inside a page, or gaps begin, single pages are copied, so that gaps are zeros whatever the memory
    holds there. Everything else is shown where it is, if the places in pack and memory agree modulo 4096.

    Args:
        array: the mapping; uint8, one dimension.
        spans: (offset in the pack, offset in the file, bytes), in any order; they may not overlap in the pack. What
            they leave out is zeros.

    Raises:
        ValueError: if spans overlap or leave the file.
    """

    def __init__(self, array: np.ndarray, spans: Sequence[tuple[int, int, int]]) -> None:
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError("the mapping must be a contiguous one-dimensional uint8 array")
        end = 0
        ordered = sorted(span for span in spans if span[2])
        for place, position, nbytes in ordered:
            if place < end or nbytes < 0 or position < 0 or position + nbytes > len(array):
                raise ValueError(f"span {(place, position, nbytes)} overlaps another one or leaves the file")
            end = place + nbytes
        self._array = array.view(np.ndarray)
        self._address = int(array.ctypes.data)
        self._spans = ordered
        self._starts = [place for place, _, _ in ordered]

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        """Fills uint8 `dst` with the pack's bytes [offset, offset + len(dst)), gaps with zeros."""
        at, stop = offset, offset + len(dst)
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while at < stop and index < len(self._spans):
            place, position, nbytes = self._spans[index]
            low, high = max(place, at), min(place + nbytes, stop)
            if low < high:
                dst[at - offset : low - offset] = 0
                dst[low - offset : high - offset] = self._array[position + low - place : position + high - place]
                at = high
            index += 1
        dst[at - offset :] = 0

    def pieces(self, offset: int, nbytes: int) -> list[np.ndarray] | None:
        """Returns the pack's bytes [offset, offset + nbytes) as memory; see `storage.pack.PieceSource`."""
        if offset % ALIGNMENT or nbytes % ALIGNMENT:
            return None
        limit = max(nbytes // ALIGNMENT // _COPIED_SHARE, _COPIED_PAGES) * ALIGNMENT
        spare: np.ndarray | None = None
        copied = 0
        found: list[np.ndarray] = []
        shown = (-1, -1)  # where in the file the last piece begins and ends, if it was not copied
        at, stop = offset, offset + nbytes
        while at < stop:
            position, count = self._whole_pages(at, stop)
            if count:
                if position == shown[1]:
                    found.pop()
                    position, count, at = shown[0], position + count - shown[0], at - (position - shown[0])
                found.append(self._array[position : position + count])
                at, shown = at + count, (position, position + count)
                continue
            if copied == limit:
                return None
            if spare is None:
                spare = np.frombuffer(mmap.mmap(-1, limit), dtype=np.uint8)
            page = spare[copied : copied + ALIGNMENT]
            self.read_into(page, at)
            found.append(page)
            at, copied, shown = at + ALIGNMENT, copied + ALIGNMENT, (-1, -1)
        return found

    def _whole_pages(self, at: int, stop: int) -> tuple[int, int]:
        """Returns where in the file the pack's byte `at` lies, and how many bytes in whole pages follow there."""
        index = bisect_right(self._starts, at) - 1
        if index < 0:
            return 0, 0
        place, position, nbytes = self._spans[index]
        position += at - place
        count = min(place + nbytes, stop) - at
        if count < ALIGNMENT or (self._address + position) % ALIGNMENT:
            return 0, 0
        return position, count - count % ALIGNMENT
