"""Writing packs: one pass over the source, checksums and disk writes on worker threads.

A source that can show its memory (`pieces`) is written straight from there; the others fill staging buffers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import struct
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from moc_ckpt.errors import StorageError
from moc_ckpt.storage.checksum import crc32c, crc32c_combine
from moc_ckpt.storage.local import LocalStore, fsync_dir, make_dirs, raise_storage_error, temporary_name
from moc_ckpt.storage.pack_layout import (
    ALIGNMENT,
    MAX_CHUNK,
    METADATA_FILE,
    REMOTE_SHARD_BYTES,
    SHARD_BYTES,
    PackLayout,
    encode_metadata,
    plan_pack,
)
from moc_ckpt.storage.store import Store

__all__ = ["ByteSource", "PackResult", "PieceSource", "write_pack"]


_IOV_MAX = 1024


class ByteSource(Protocol):
    """Where the bytes of a pack come from."""

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        """Fills `dst` (uint8, one dimension) with the pack's bytes [offset, offset + len(dst)), gaps with zeros.

        Called with increasing offsets from the thread that called `write_pack`, but for a `PieceSource`.
        """


class PieceSource(ByteSource, Protocol):
    """A source whose bytes lie in host memory that does not change while the pack is written.

    On a file system both methods are called from several threads at once, in any order.
    """

    def pieces(self, offset: int, nbytes: int) -> Sequence[np.ndarray | memoryview] | None:
        """Returns memory (uint8) that holds the pack's bytes [offset, offset + nbytes), piece by piece, without a copy.

        Both numbers are multiples of 4096, and so must be the address and the length of every piece. None where this
        range cannot be shown so: `read_into` is called for it then.
        """


@dataclass(frozen=True, slots=True)
class PackResult:
    """What `write_pack` wrote.

    Attributes:
        crc32c: checksum of each entry's bytes, in the order given.
        stored_bytes: bytes of all objects of the pack, metadata included.
    """

    crc32c: list[int]
    stored_bytes: int


class _BufferPool:
    """Page-aligned staging buffers, kept for the life of the process."""

    KEEP = 6

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self) -> mmap.mmap:
        with self._lock:
            if self._free:
                return self._free.pop()
        buffer = mmap.mmap(-1, MAX_CHUNK + ALIGNMENT)
        with suppress(OSError, AttributeError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer

    def give(self, buffer: mmap.mmap) -> None:
        with self._lock:
            if len(self._free) < self.KEEP:
                self._free.append(buffer)


_pool = _BufferPool()


class _EntryChecksums:
    """Collects the crc32c of entries that sub-chunks cut at arbitrary places."""

    def __init__(self, entries: Sequence[tuple[int, int]], nbytes: int) -> None:
        end = 0
        for offset, length in entries:
            if length < 0 or offset < end or offset + length > nbytes:
                raise ValueError(
                    f"entry [{offset}, {offset + length}) overlaps the one before or leaves the pack of {nbytes} bytes"
                )
            end = offset + length
        self._entries = entries
        self._starts = [offset for offset, _ in entries]
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}

    def add(self, offset: int, data: np.ndarray) -> int:
        """Takes the pack's bytes from `offset` on; returns their crc32c. Thread-safe for different ranges."""
        end = offset + len(data)
        total, at = 0, offset
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while index < len(self._entries) and self._starts[index] < end:
            start, length = self._entries[index]
            low, high = max(start, offset), min(start + length, end)
            if low < high:
                crc = crc32c(data[low - offset : high - offset])
                self._pieces.setdefault(index, []).append((low, high - low, crc))
                total = crc32c(data[at - offset : low - offset], total)
                total = crc32c_combine(total, crc, high - low)
                at = high
            index += 1
        return crc32c(data[at - offset :], total)

    def results(self) -> list[int]:
        """Returns the checksum of every entry, once all bytes have been added."""
        sums = []
        for index in range(len(self._entries)):
            total = 0
            for _, length, crc in sorted(self._pieces.get(index, ())):
                total = crc32c_combine(total, crc, length)
            sums.append(total)
        return sums


def write_pack(
    store: Store,
    key: str,
    nbytes: int,
    entries: Sequence[tuple[int, int]],
    source: ByteSource,
    *,
    threads: int = 2,
    shard_bytes: int | None = None,
) -> PackResult:
    """Writes a pack; when it returns, the pack is durable.

    Memory: on a file system `threads` + 2 staging buffers of 16 MiB at most, none for what the source shows in pieces;
    elsewhere two objects (of 256 MiB at most).

    Args:
        store: the checkpoint root.
        key: directory of the pack in it; must not hold another pack.
        nbytes: payload bytes; with 0 nothing is written.
        entries: (offset, bytes) of the fragments, ascending and disjoint.
        source: gives the bytes; see `PieceSource` for writing without a copy.
        threads: worker threads for checksums and writes, at least 1.
        shard_bytes: size limit of one object in bytes; None for the store's default.

    Returns:
        The entries' checksums and the bytes stored.

    Raises:
        StorageError: if the store fails; names the file and what to do. Unfinished objects are removed.
        ValueError: if the entries overlap or lie outside the pack.
    """
    sums = _EntryChecksums(entries, nbytes)
    if nbytes == 0:
        return PackResult(sums.results(), 0)
    local = isinstance(store, LocalStore)
    layout = plan_pack(nbytes, shard_bytes=shard_bytes or (SHARD_BYTES if local else REMOTE_SHARD_BYTES))
    if isinstance(store, LocalStore):
        _write_local(store, key, layout, sums, source, max(1, threads))
    else:
        _write_remote(store, key, layout, sums, source)
    store.write(f"{key}/{METADATA_FILE}", encode_metadata(layout))
    return PackResult(sums.results(), layout.stored_bytes)


def _fill_frame(frame: np.ndarray, layout: PackLayout, chunk: int, source: ByteSource) -> None:
    """Lets the source fill one sub-chunk, with zeros behind the pack's end and behind the checksum's place."""
    size = layout.chunk_bytes(chunk)
    source.read_into(frame[:size], chunk * layout.chunk)
    frame[size:] = 0


def _seal_frame(frame: np.ndarray, layout: PackLayout, chunk: int, sums: _EntryChecksums) -> None:
    """Adds the sub-chunk's checksum behind it and notes those of the entries in it."""
    size = layout.chunk_bytes(chunk)
    crc = sums.add(chunk * layout.chunk, frame[:size])
    struct.pack_into("<I", frame.data, layout.chunk, crc32c(frame[size : layout.chunk], crc))


# ---- file systems ----


def _write_local(
    store: LocalStore, key: str, layout: PackLayout, sums: _EntryChecksums, source: ByteSource, threads: int
) -> None:
    folder = store.path(key) / "c"
    try:
        make_dirs(folder)
    except OSError as exc:
        raise_storage_error(exc, "making the directory of a pack", folder, layout.stored_bytes)
    with ThreadPoolExecutor(threads, thread_name_prefix="moc-pack") as workers:
        for shard in range(layout.shards):
            path = folder / str(shard)
            tmp = temporary_name(path)
            try:
                _write_shard(tmp, layout, shard, sums, source, workers, threads + 2)
                tmp.replace(path)
                fsync_dir(folder)
            except OSError as exc:
                tmp.unlink(missing_ok=True)
                raise_storage_error(exc, "writing a pack", path, layout.shard_bytes(shard))
            except BaseException:
                tmp.unlink(missing_ok=True)
                raise


def _write_shard(
    path: Path,
    layout: PackLayout,
    shard: int,
    sums: _EntryChecksums,
    source: ByteSource,
    workers: ThreadPoolExecutor,
    buffers: int,
) -> None:
    size, first = layout.shard_bytes(shard), shard * layout.chunks_per_shard
    fd, direct = _open_for_write(path, direct=layout.aligned)
    try:
        _allocate(fd, -(-size // ALIGNMENT) * ALIGNMENT if direct else size)
        count = layout.shard_chunks(shard)
        if layout.aligned and hasattr(source, "pieces"):
            _write_pieces(fd, layout, first, count, sums, cast("PieceSource", source), workers)
        else:
            _write_staged(fd, layout, first, count, sums, source, workers, buffers)
        _write_index(fd, layout, shard, direct=direct)
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_staged(
    fd: int,
    layout: PackLayout,
    first: int,
    count: int,
    sums: _EntryChecksums,
    source: ByteSource,
    workers: ThreadPoolExecutor,
    buffers: int,
) -> None:
    """Fills buffers on this thread, one sub-chunk after the other, and lets the workers write them."""
    free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    stop = threading.Event()
    maps = [_pool.take() for _ in range(min(buffers, count))]
    for buffer in maps:
        free.put(np.frombuffer(buffer, dtype=np.uint8)[: layout.frame])

    def work(frame: np.ndarray, position: int) -> None:
        try:
            _seal_frame(frame, layout, first + position, sums)
            _pwrite_all(fd, [frame], position * layout.frame)
        except BaseException:
            stop.set()
            raise
        finally:
            free.put(frame)

    jobs: list[Future[None]] = []
    try:
        for position in range(count):
            frame = free.get()
            if stop.is_set():
                break
            _fill_frame(frame, layout, first + position, source)
            jobs.append(workers.submit(work, frame, position))
        for job in jobs:
            job.result()
    finally:
        for job in jobs:
            job.exception()
        for buffer in maps:
            _pool.give(buffer)


def _write_pieces(
    fd: int,
    layout: PackLayout,
    first: int,
    count: int,
    sums: _EntryChecksums,
    source: PieceSource,
    workers: ThreadPoolExecutor,
) -> None:
    """Lets the workers write the source's own memory, and stage what it cannot show."""
    stop = threading.Event()

    def work(position: int) -> None:
        if stop.is_set():
            return
        try:
            if not _write_frame(fd, layout, first + position, position * layout.frame, sums, source):
                buffer = _pool.take()
                try:
                    frame = np.frombuffer(buffer, dtype=np.uint8)[: layout.frame]
                    _fill_frame(frame, layout, first + position, source)
                    _seal_frame(frame, layout, first + position, sums)
                    _pwrite_all(fd, [frame], position * layout.frame)
                finally:
                    _pool.give(buffer)
        except BaseException:
            stop.set()
            raise

    jobs = [workers.submit(work, position) for position in range(count)]
    try:
        for job in jobs:
            job.result()
    finally:
        stop.set()
        for job in jobs:
            job.exception()


def _write_frame(
    fd: int, layout: PackLayout, chunk: int, place: int, sums: _EntryChecksums, source: PieceSource
) -> bool:
    """Writes one sub-chunk from the source's memory; False if it cannot show it."""
    start, size = chunk * layout.chunk, layout.chunk_bytes(chunk)
    whole = size - size % ALIGNMENT
    shown = source.pieces(start, whole) if whole else []
    if shown is None:
        return False
    pieces = [np.frombuffer(piece, dtype=np.uint8) for piece in shown]
    if any(piece.ctypes.data % ALIGNMENT or len(piece) % ALIGNMENT for piece in pieces) or whole != sum(
        map(len, pieces)
    ):
        raise ValueError(f"{type(source).__name__}.pieces({start}, {whole}) is not that many bytes in whole pages")
    crc, at = 0, start
    for piece in pieces:
        crc = crc32c_combine(crc, sums.add(at, piece), len(piece))
        at += len(piece)
    # The bytes of the pack's last page, the padding of its last sub-chunk, and the tail.
    rest = np.frombuffer(mmap.mmap(-1, layout.frame - whole), dtype=np.uint8)
    if size > whole:
        source.read_into(rest[: size - whole], start + whole)
        crc = crc32c_combine(crc, sums.add(start + whole, rest[: size - whole]), size - whole)
    padding = rest[size - whole : layout.chunk - whole]
    struct.pack_into("<I", rest.data, layout.chunk - whole, crc32c(padding, crc))
    _pwrite_all(fd, [*pieces, rest], place)
    return True


def _open_for_write(path: Path, *, direct: bool) -> tuple[int, bool]:
    """Opens a new file, past the page cache if that is possible. Returns (descriptor, direct)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    if direct:
        try:
            fd = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            path.unlink(missing_ok=True)  # some kernels make the file before they refuse
        else:
            try:
                # Refusal may also come with the first write, e.g. where a block is larger than 4096 bytes.
                os.pwrite(fd, memoryview(mmap.mmap(-1, ALIGNMENT)), 0)
                return fd, True
            except OSError as exc:
                os.close(fd)
                path.unlink(missing_ok=True)
                if exc.errno != errno.EINVAL:
                    raise
    return os.open(path, flags, 0o644), False


def _allocate(fd: int, size: int) -> None:
    """Reserves the file's blocks, so that a full disk is found before anything is written.

    Not `os.posix_fallocate`: where the file system cannot allocate, libc would write one byte into every block.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise OSError(code, os.strerror(code))
        return


def _write_index(fd: int, layout: PackLayout, shard: int, *, direct: bool) -> None:
    index = layout.index(shard)
    offset = layout.shard_chunks(shard) * layout.frame
    if not direct:
        _pwrite_all(fd, [np.frombuffer(index, dtype=np.uint8)], offset)
        return
    block = mmap.mmap(-1, -(-len(index) // ALIGNMENT) * ALIGNMENT)
    block[: len(index)] = index
    _pwrite_all(fd, [np.frombuffer(block, dtype=np.uint8)], offset)


def _pwrite_all(fd: int, pieces: Sequence[np.ndarray], offset: int) -> None:
    pending = [piece.data for piece in pieces if len(piece)]
    pending.reverse()
    while pending:
        group = pending[-_IOV_MAX:][::-1]
        count = os.pwritev(fd, group, offset) if len(group) > 1 else os.pwrite(fd, group[0], offset)
        offset += count
        while pending and count >= len(pending[-1]):
            count -= len(pending.pop())
        if count:
            pending[-1] = pending[-1][count:]


# ---- object stores ----


def _write_remote(store: Store, key: str, layout: PackLayout, sums: _EntryChecksums, source: ByteSource) -> None:
    from moc_ckpt.storage.remote import KvStore

    if not isinstance(store, KvStore):
        raise TypeError(f"packs cannot be written to a {type(store).__name__}")
    pending: tuple[str, object] | None = None
    buffer = np.empty(max(layout.shard_bytes(shard) for shard in range(layout.shards)), dtype=np.uint8)
    for shard in range(layout.shards):
        count = layout.shard_chunks(shard)
        for position in range(count):
            frame = buffer[position * layout.frame : (position + 1) * layout.frame]
            chunk = shard * layout.chunks_per_shard + position
            _fill_frame(frame, layout, chunk, source)
            _seal_frame(frame, layout, chunk, sums)
        size = layout.shard_bytes(shard)
        buffer[count * layout.frame : size] = np.frombuffer(layout.index(shard), dtype=np.uint8)
        _await(store, pending)
        name = f"{key}/c/{shard}"
        pending = (name, store.write_async(name, buffer[:size].tobytes()))
    _await(store, pending)


def _await(store: Store, pending: tuple[str, object] | None) -> None:
    if pending is None:
        return
    name, future = pending
    try:
        future.result()  # type: ignore[attr-defined]
    except Exception as exc:
        raise StorageError(
            f"writing a pack failed: {exc}",
            where=store.locate(name),
            fix="check credentials, network and the store's limits; the next save tries again",
        ) from exc
