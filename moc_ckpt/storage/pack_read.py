"""Reading packs: byte ranges at sub-chunk grain, every sub-chunk checked against its crc32c."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple, NoReturn

import numpy as np

from moc_ckpt.errors import CorruptionError, StorageError
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.pack_layout import METADATA_FILE, PackLayout, decode_metadata
from moc_ckpt.storage.store import Store

__all__ = ["Fault", "PackReader"]

_FIX = "restore from an older checkpoint (`moc-ckpt inspect` lists them) or another copy of this file"
_DIRECT_PIECES = 64
_Piece = tuple[int, int, np.ndarray]  # (first byte in the sub-chunk, one past the last, destination)


class Fault(NamedTuple):
    """Payload bytes [start, stop) of a pack that cannot be read, because the object that holds them is damaged."""

    start: int
    stop: int
    error: CorruptionError


class PackReader:
    """Reads one pack.

    Opens nothing before the first read. May be used from several threads.

    Args:
        store: the checkpoint root.
        key: directory of the pack in it.
        nbytes: payload bytes that the manifest gives for it.
        threads: sub-chunks in flight at once; each needs up to 16 MiB (32 MiB in an object store).
    """

    def __init__(self, store: Store, key: str, nbytes: int, *, threads: int = 4) -> None:
        self._store = store
        self._key = key
        self._nbytes = nbytes
        self._threads = max(1, threads)
        self._lock = threading.Lock()
        self._layout_cache: PackLayout | None = None
        self._checked: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Payload bytes of the pack."""
        return self._nbytes

    @property
    def grain(self) -> int:
        """Payload bytes of one sub-chunk; all of the pack as long as its metadata could not be read."""
        layout = self._layout_cache
        return layout.chunk if layout is not None else self._nbytes

    @property
    def object_bytes(self) -> int:
        """Payload bytes of one object (the last one may have fewer); errors as for `read`."""
        return self._layout.chunk * self._layout.chunks_per_shard

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Returns a new uint8 array with the pack's bytes [offset, offset + nbytes).

        Raises:
            CorruptionError: if a sub-chunk that it needs is missing or damaged; names file and offset.
            StorageError: if the store cannot be read.
            ValueError: if the range leaves the pack.
        """
        dst = np.empty(nbytes, dtype=np.uint8)
        self.read_batch([(offset, dst)])
        return dst

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        """Fills `dst` (uint8, contiguous) from the pack's byte `offset` on. Errors as for `read`."""
        self.read_batch([(offset, dst)])

    def read_batch(self, requests: Sequence[tuple[int, np.ndarray]]) -> None:
        """Fills many destinations, fetching every sub-chunk that they touch exactly once.

        Args:
            requests: (offset in the pack in bytes, destination), destinations uint8, contiguous and writable.
                Ranges may overlap and come in any order.

        Raises:
            CorruptionError: if a sub-chunk is missing or damaged; names file and offset. What the destinations
                then hold is undefined.
            StorageError: if the store cannot be read.
            ValueError: if a range leaves the pack.
        """
        for offset, dst in requests:
            if offset < 0 or offset + dst.nbytes > self._nbytes:
                raise ValueError(
                    f"bytes [{offset}, {offset + dst.nbytes}) are not in {self._key}, which has {self._nbytes}"
                )
            if dst.dtype != np.uint8 or dst.ndim != 1 or not dst.flags.c_contiguous:
                raise ValueError("a destination must be a contiguous one-dimensional uint8 array")
        if not any(dst.nbytes for _, dst in requests):
            return
        work = sorted(self._split(requests).items())
        for shard in sorted({chunk // self._layout.chunks_per_shard for chunk, _ in work}):
            self._check_index(shard)
        if len(work) == 1:
            self._read_chunk(*work[0])
            return
        with ThreadPoolExecutor(min(self._threads, len(work)), thread_name_prefix="moc-read") as workers:
            jobs = [workers.submit(self._read_chunk, chunk, pieces) for chunk, pieces in work]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise

    def check(self) -> None:
        """Checks that every object of the pack is there with the right size and an intact index.

        Reads the metadata and the indexes only, not the payload. Errors as for `read`.
        """
        if self._nbytes:
            for shard in range(self._layout.shards):
                self._check_index(shard)

    def faults(self) -> list[Fault]:
        """Returns what `check` finds, object by object; damaged metadata is a fault of all of the pack.

        Raises:
            StorageError: if the store cannot be read.
        """
        if not self._nbytes:
            return []
        try:
            layout = self._layout
        except CorruptionError as error:
            return [Fault(0, self._nbytes, error)]
        found = []
        for shard in range(layout.shards):
            try:
                self._check_index(shard)
            except CorruptionError as error:
                start = shard * self.object_bytes
                found.append(Fault(start, min(start + self.object_bytes, self._nbytes), error))
        return found

    def scan(self) -> Iterator[tuple[int, np.ndarray | StorageError]]:
        """Reads the whole pack in order, one sub-chunk ahead, without stopping at damage.

        Yields:
            (offset in the pack, its bytes, or the error that keeps them from being read). An error that concerns
            the whole pack comes once, with offset 0, and ends the scan. The arrays may not be kept: they are reused.
        """
        if not self._nbytes:
            return
        try:
            layout = self._layout
        except StorageError as exc:
            yield 0, exc
            return
        buffers = [np.empty(layout.chunk, dtype=np.uint8) for _ in range(2)]

        def fetch(chunk: int) -> np.ndarray | StorageError:
            size = layout.chunk_bytes(chunk)
            dst = buffers[chunk % 2][:size]
            try:
                self._check_index(chunk // layout.chunks_per_shard)
                self._read_chunk(chunk, [(0, size, dst)])
            except StorageError as exc:
                return exc
            return dst

        with ThreadPoolExecutor(1, thread_name_prefix="moc-scan") as worker:
            ahead = worker.submit(fetch, 0)
            for chunk in range(layout.chunks):
                result = ahead.result()
                if chunk + 1 < layout.chunks:
                    ahead = worker.submit(fetch, chunk + 1)
                yield chunk * layout.chunk, result

    @property
    def _layout(self) -> PackLayout:
        with self._lock:
            if self._layout_cache is None:
                name = f"{self._key}/{METADATA_FILE}"
                where = self._store.locate(name)
                data = self._store.read(name)
                if data is None:
                    raise CorruptionError("the metadata of a pack is missing", where=where, fix=_FIX)
                layout = decode_metadata(data, where)
                if layout.nbytes != self._nbytes:
                    raise CorruptionError(
                        f"the pack holds {layout.nbytes:,} bytes, its manifest says {self._nbytes:,}",
                        where=where,
                        fix=_FIX,
                    )
                self._layout_cache = layout
            return self._layout_cache

    def _object(self, shard: int) -> str:
        return f"{self._key}/c/{shard}"

    def _fetch(self, shard: int, ranges: list[tuple[int, list[memoryview]]], what: str) -> None:
        """Reads from one object; translates what can go wrong into errors that name it."""
        name = self._object(shard)
        where = self._store.locate(name)
        try:
            self._store.read_ranges(name, [(offset, views) for offset, views in ranges])
        except FileNotFoundError:
            raise CorruptionError("a file of a pack is missing", where=where, fix=_FIX) from None
        except EOFError:
            raise CorruptionError(f"a pack is truncated: its {what} is cut off", where=where, fix=_FIX) from None
        except StorageError as exc:
            if isinstance(exc.__cause__, OSError) and exc.__cause__.errno == errno.EIO:
                raise CorruptionError(f"{what} cannot be read: {exc.what}", where=where, fix=_FIX) from exc
            raise

    def _check_index(self, shard: int) -> None:
        if shard in self._checked:
            return
        layout = self._layout
        stored = bytearray(layout.index_bytes)
        # Read from the end: this also finds an object that is too long or too short.
        self._fetch(shard, [(-len(stored), [memoryview(stored)])], "index")
        if stored != layout.index(shard):
            raise CorruptionError(
                "the index of a pack is damaged, or the file was truncated",
                where=f"{self._store.locate(self._object(shard))}, "
                f"byte {layout.shard_bytes(shard) - layout.index_bytes:,}",
                fix=_FIX,
            )
        self._checked.add(shard)

    def _split(self, requests: Sequence[tuple[int, np.ndarray]]) -> dict[int, list[_Piece]]:
        """Groups the requests' pieces by sub-chunk."""
        size = self._layout.chunk
        chunks: dict[int, list[_Piece]] = {}
        for offset, dst in requests:
            done = 0
            while done < dst.nbytes:
                chunk, low = divmod(offset + done, size)
                count = min(size - low, dst.nbytes - done)
                chunks.setdefault(chunk, []).append((low, low + count, dst[done : done + count]))
                done += count
        return chunks

    def _read_chunk(self, chunk: int, pieces: list[_Piece]) -> None:
        """Reads one sub-chunk straight into its destinations, the rest of it into scratch memory, and checks it."""
        layout = self._layout
        shard, position = divmod(chunk, layout.chunks_per_shard)
        start = position * layout.frame
        views, late = _scatter(pieces, layout.chunk)
        tail = bytearray(4)
        self._fetch(
            shard, [(start, [*(view.data for view in views), memoryview(tail)])], f"sub-chunk at byte {start:,}"
        )
        actual = 0
        for view in views:
            actual = crc32c(view, actual)
        (expected,) = struct.unpack("<I", tail)
        if actual != expected:
            self._fail_checksum(shard, start, chunk * layout.chunk, expected, actual)
        for low, high, dst in late:
            np.copyto(dst, views[0][low:high])

    def _fail_checksum(self, shard: int, start: int, offset: int, expected: int, actual: int) -> NoReturn:
        raise CorruptionError(
            f"checksum mismatch: stored crc32c {expected:08x}, data has {actual:08x}",
            where=f"{self._store.locate(self._object(shard))}, byte {start:,} (byte {offset:,} of the pack)",
            fix=_FIX,
        )


def _scatter(pieces: list[_Piece], size: int) -> tuple[list[np.ndarray], list[_Piece]]:
    """Lays out the memory that one sub-chunk is read into.

    Returns:
        Arrays that take the sub-chunk's bytes one after the other, and pieces to be copied out of the first array
        afterwards (when pieces overlap, or are so small and many that copying is cheaper).
    """
    ordered = sorted(pieces, key=lambda piece: piece[:2])
    overlap = any(before[1] > after[0] for before, after in pairwise(ordered))
    if overlap or len(ordered) > _DIRECT_PIECES:
        return [np.empty(size, dtype=np.uint8)], ordered
    views: list[np.ndarray] = []
    end = 0
    for low, high, dst in ordered:
        if low > end:
            views.append(np.empty(low - end, dtype=np.uint8))
        views.append(dst)
        end = high
    if end < size:
        views.append(np.empty(size - end, dtype=np.uint8))
    return views, []
