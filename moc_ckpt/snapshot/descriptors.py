"""Descriptors of slots: opaque bytes that say what a unit's bytes mean, each stored once (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from moc_ckpt.snapshot.extents import Extent, FreeSpace
from moc_ckpt.snapshot.records import DESCRIPTOR_GRAIN, Region, rounded
from moc_ckpt.storage.checksum import crc32c

__all__ = ["Descriptors"]


class Descriptors:
    """The descriptors in one region of an arena. Not thread-safe.

    A unit's descriptor rarely changes, so equal ones are stored once and counted: a snapshot then writes none.

    Args:
        region: where they go.
        write: writes bytes at a file offset.
    """

    def __init__(self, region: Region, write: Callable[[int, bytes], None]) -> None:
        self._space = FreeSpace(*region)
        self._write = write
        self._known: dict[bytes, tuple[int, int, int]] = {b"": (0, 0, 0)}
        self._uses: dict[int, int] = {}
        self._blobs: dict[int, bytes] = {}

    def put(self, blobs: Sequence[bytes]) -> list[tuple[int, int, int]] | None:
        """Returns (file offset, bytes, crc32c) of each, or None if there is no room. Counts a use of each."""
        known = self._known
        fresh = [blob for blob in dict.fromkeys(blobs) if blob not in known]
        if fresh:
            places = self._space.plan([rounded(len(blob), DESCRIPTOR_GRAIN) for blob in fresh], 1)
            if places is None:
                return None
            offsets = [extents[0][0] for extents in places]
            for at, data in _joined(zip(offsets, fresh, strict=True)):
                self._write(at, data)
            self._space.take(extents[0] for extents in places)
            for at, blob in zip(offsets, fresh, strict=True):
                known[blob] = (at, len(blob), crc32c(blob))
                self._blobs[at], self._uses[at] = blob, 0
        found = [known[blob] for blob in blobs]
        for at, nbytes, _ in found:
            if nbytes:
                self._uses[at] += 1
        return found

    def adopt(self, meta: Extent) -> None:
        """Counts a use of a descriptor that an earlier process stored. ValueError if it cannot lie there."""
        at, nbytes = meta
        if nbytes and at not in self._uses:
            self._space.take([(at, rounded(nbytes, DESCRIPTOR_GRAIN))])
            self._uses[at] = 0
        if nbytes:
            self._uses[at] += 1

    def drop(self, metas: Iterable[Extent]) -> None:
        """Ends uses; what nobody uses any more is freed."""
        gone = []
        for at, nbytes in metas:
            if not nbytes:
                continue
            self._uses[at] -= 1
            if not self._uses[at]:
                del self._uses[at]
                if at in self._blobs:  # not one that an earlier process stored
                    del self._known[self._blobs.pop(at)]
                gone.append((at, rounded(nbytes, DESCRIPTOR_GRAIN)))
        self._space.give(gone)


def _joined(items: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Joins blobs that lie one after the other, padded, so that one system call writes them."""
    runs: list[tuple[int, bytearray]] = []
    for at, blob in items:
        padded = blob.ljust(rounded(len(blob), DESCRIPTOR_GRAIN), b"\0")
        if runs and runs[-1][0] + len(runs[-1][1]) == at:
            runs[-1][1].extend(padded)
        else:
            runs.append((at, bytearray(padded)))
    return [(at, bytes(data)) for at, data in runs]
