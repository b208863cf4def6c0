"""Arenas: one file in shared memory per rank, with its slots (DESIGN section 8).

The writer holds a lock on the file that the kernel takes back when the process ends, so nobody changes the slots of a
living trainer, and everybody can tell whether it lives.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np

from moc_ckpt.errors import CorruptionError, FormatError, StorageError
from moc_ckpt.snapshot.arena_format import (
    CLOCK_AT,
    HEADER_BYTES,
    IDENTITY_AT,
    ArenaSpec,
    Identity,
    pack_header,
    pack_identity,
    unpack_header,
    unpack_identity,
)
from moc_ckpt.snapshot.places import UNNAMED, agent_lock_path, find_arenas
from moc_ckpt.snapshot.records import GRAIN, Slot
from moc_ckpt.snapshot.slots import SlotTable
from moc_ckpt.storage.local import raise_storage_error

__all__ = ["Arena", "ArenaSpec", "Identity", "forsaken", "is_over", "writer_pid"]

_POPULATE_PIECE = 64 << 20
_RESERVE_PIECE = 1 << 30
_MADV_POPULATE_WRITE = 23
_STARTING_S = 600.0
_ROOM_FIX = (
    "give shared memory more room (docker run --shm-size=…, Kubernetes: an emptyDir with medium: Memory, a host: mount "
    "-o remount,size=… /dev/shm), or name a larger tmpfs in MOC_SHM_DIR; or lower host.memory_budget_gib or "
    "k_snapshot; or do without an arena: save_mode durable"
)


class Arena:
    """An open arena; made by `create` or `open`. Its slot table is thread-safe, the rest is not.

    Attributes:
        path: the file.
        spec: its sizes.
        table: its slots.
        nbytes: size of the file (and of the mapping), sparse regions included.
        writable: whether this process may change it.
    """

    def __init__(self, path: Path, fd: int, spec: ArenaSpec, *, writable: bool) -> None:
        self.path = path
        self.spec = spec
        self.nbytes = spec.nbytes
        self.writable = writable
        self._fd = fd
        try:
            self._map = mmap.mmap(fd, self.nbytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        except OSError as exc:
            raise_storage_error(exc, "mapping an arena", path, self.nbytes)
        with suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_DONTDUMP)  # a core dump of the state would fill the disk
        self._array: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self._table: SlotTable | None = None

    # ---- making and finding ----

    @classmethod
    def create(
        cls,
        path: Path,
        spec: ArenaSpec,
        identity: Identity,
        *,
        progress: Callable[[int, int], None] | None = None,
        threads: int = 4,
    ) -> Arena:
        """Makes an arena: reserves its memory, then touches every page of it, so that no copy meets a cold page.

        This takes long (about 1 s per GiB). A file that could not be finished is removed.

        Args:
            path: the file, which must not exist; its directory must.
            spec: the sizes.
            identity: whose it is.
            progress: called in this thread with (bytes populated, bytes in all).
            threads: how many threads touch pages, at least 1.

        Raises:
            StorageError: if the file exists or there is not enough room.
            ValueError: if the identity does not fit.
        """
        blob = pack_identity(1, identity)
        fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        arena = None
        try:
            _lock_for_writing(fd, path)
            _reserve(fd, path, spec)
            arena = cls(path, fd, spec, writable=True)
            _populate(arena.array[: spec.reserved], progress or _ignore, max(1, threads), path)
            arena.array[IDENTITY_AT[0] : IDENTITY_AT[0] + len(blob)] = np.frombuffer(blob, dtype=np.uint8)
            header = np.frombuffer(pack_header(spec), dtype=np.uint8)
            arena.array[8 : len(header)] = header[8:]
            arena.array[:8].view(np.uint64)[0] = header[:8].view(np.uint64)[0]
            arena._attach()
        except BaseException:
            _close_quietly(arena, fd)
            path.unlink(missing_ok=True)
            raise
        return arena

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Arena:
        """Opens an arena that exists.

        Args:
            path: the file.
            writable: take over its slot table. Its writer must be gone.

        Raises:
            FormatError: if it is not an arena of this version, was not finished, or is another user's.
            CorruptionError: if it is damaged.
            StorageError: if it cannot be opened, or `writable` and another process is writing it.
        """
        fd = _open(path, os.O_RDWR if writable else os.O_RDONLY)
        arena = None
        try:
            _check_owner(fd, path)
            if writable:
                _lock_for_writing(fd, path)
            spec = unpack_header(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size, str(path))
            arena = cls(path, fd, spec, writable=writable)
            _ = arena.identity
            arena._attach()
        except BaseException:
            _close_quietly(arena, fd)
            raise
        return arena

    def _attach(self) -> None:
        regions = self.spec.regions()
        self._table = SlotTable(
            self.array,
            regions["records"],
            regions,
            regions["descriptors"],
            clock_at=CLOCK_AT,
            write=self._pwrite if self.writable else None,
            where=str(self.path),
        )

    # ---- using ----

    @property
    def array(self) -> np.ndarray:
        """The whole file as uint8, sharing memory; read-only unless `writable`.

        The sparse regions must not be written through it; reading them where nothing was written takes memory.
        """
        if self._array is None:
            raise ValueError(f"the arena {self.path} is closed")
        return self._array

    @property
    def table(self) -> SlotTable:
        """The slots."""
        if self._table is None:
            raise ValueError(f"the arena {self.path} is closed")
        return self._table

    @property
    def address(self) -> int:
        """Address of the mapping. Its first `spec.reserved` bytes are populated and may be registered with a device."""
        return int(self.array.ctypes.data)

    @property
    def identity(self) -> Identity:
        """Whose arena it is, by its newest whole record.

        Raises:
            CorruptionError: if neither copy is whole.
        """
        return self._identity()[1]

    def _identity(self) -> tuple[int, Identity]:
        pages = [self.array[at : at + GRAIN].tobytes() for at in IDENTITY_AT]
        found = [item for item in map(unpack_identity, pages) if item is not None]
        if not found:
            raise CorruptionError(
                "the identity of the arena is damaged", where=str(self.path), fix="remove the file; it cannot be used"
            )
        return max(found, key=lambda item: item[0])

    def update_identity(self, **changes: object) -> Identity:
        """Changes fields of the identity; a kill at any moment leaves the old one or the new one.

        Args:
            **changes: new values by field name.

        Raises:
            TypeError: if there is no such field.
            ValueError: if the arena is read-only, or the identity does not fit.
        """
        self._check_writable()
        number, old = self._identity()
        new = msgspec.structs.replace(old, **changes)
        blob = pack_identity(number + 1, new)
        at = IDENTITY_AT[number % 2]
        self.array[at : at + len(blob)] = np.frombuffer(blob, dtype=np.uint8)
        return new

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Writes bytes at a file offset in the sparse regions.

        Raises:
            StorageError: if shared memory is full.
            ValueError: if the arena is read-only or the range is outside.
        """
        sparse = self.spec.reserved
        if not sparse <= offset <= offset + len(data) <= self.nbytes:
            raise ValueError(f"[{offset}, {offset + len(data)}) is not in the sparse regions [{sparse}, {self.nbytes})")
        try:
            self._pwrite(offset, data)
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                _raise_no_room(exc, self.path, len(data))
            raise_storage_error(exc, "writing to shared memory", self.path, len(data))

    def write_slot(self, slot: Slot, data: bytes) -> None:
        """Writes the bytes of a slot in the sparse regions.

        Raises:
            StorageError: if shared memory is full.
            ValueError: if they are not as many as the slot has.
        """
        if len(data) != slot.nbytes:
            raise ValueError(f"{len(data)} bytes for a slot of {slot.nbytes}")
        rest = memoryview(data)
        for offset, size in slot.extents:
            self.write(offset, rest[:size])
            rest = rest[size:]

    def read_slot(self, slot: Slot) -> bytes:
        """Returns a copy of a slot's bytes."""
        data = b"".join(self.array[offset : offset + size].tobytes() for offset, size in slot.extents)
        return data[: slot.nbytes]

    def _check_writable(self) -> None:
        if not self.writable:
            raise ValueError(f"the arena {self.path} was opened for reading only")

    def _pwrite(self, offset: int, data: bytes | memoryview) -> None:
        self._check_writable()
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    # ---- ending ----

    def close(self) -> None:
        """Ends the use of the file here; the memory stays mapped as long as somebody holds a view of `array`.

        This gives back the writer's lock, as closing any other descriptor of the file in this process does.
        """
        if self._array is None:
            return
        self._array = self._table = None
        with suppress(BufferError):
            self._map.close()
        os.close(self._fd)
        self._fd = -1

    def move(self, path: Path) -> None:
        """Gives the file another name, that of another arena perhaps, which is then gone."""
        self.path.replace(path)
        self.path = path

    def unlink(self) -> None:
        """Removes the file, if it is still there; its memory is freed once nobody has it mapped."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def writer_pid(path: Path) -> int | None:
    """Returns the process that has an arena open for writing; None if nobody has.

    The kernel knows, so no number is mistaken for another process that got it later. 0: a process that cannot be
    named here (another container). To be asked by other processes only: a file's locks are lost when the process
    that has them closes the file anywhere, and are never in its own way.

    Raises:
        StorageError: if the file cannot be opened.
    """
    fd = _open(path, os.O_RDWR)
    try:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, lock))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else max(pid, 0)


def forsaken(base: Path, own: Container[Path] = ()) -> list[Path]:
    """Returns the directories of unnamed jobs that are over: no arena has a writer and no agent lives.

    Args:
        base: the directory of all of this user's jobs.
        own: arenas of this process, whose directories are not looked at: it would lose their locks.
    """
    found = []
    for folder in base.glob(f"{UNNAMED}*"):
        with suppress(OSError, StorageError):
            # A job that is just starting has neither arenas nor an agent yet.
            if any(path in own for path in find_arenas(folder)) or time.time() - folder.stat().st_mtime < _STARTING_S:
                continue
            if is_over(folder):
                found.append(folder)
    return found


def is_over(folder: Path) -> bool:
    """Tells whether nobody has a job: none of its arenas has a writer and no agent lives.

    To be asked by processes that write no arena of it, as `writer_pid`.

    Raises:
        OSError, StorageError: if that cannot be told.
    """
    return not _is_locked(agent_lock_path(folder)) and all(writer_pid(path) is None for path in find_arenas(folder))


def _is_locked(path: Path) -> bool:
    """Tells whether an agent keeps a lock file; it may not exist."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# ---- the file ----


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError as exc:
        raise StorageError(
            "there is an arena of that name already",
            where=str(path),
            fix="another process of this run made it: give every run its own name; nothing was changed",
        ) from exc
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            _raise_no_room(exc, path, None)
        raise_storage_error(exc, "opening an arena", path)


def _check_owner(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise FormatError(
            "the file is not an arena of this user, or others may touch it",
            where=f"{path}, owner {status.st_uid}, mode {stat.filemode(status.st_mode)}",
            fix="nothing was read from it; check who put it there",
        )


def _lock_for_writing(fd: int, path: Path) -> None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno not in (errno.EACCES, errno.EAGAIN):
            raise_storage_error(exc, "locking an arena", path)
        raise StorageError(
            f"the arena is in use by process {writer_pid(path) or 'of another container'}",
            where=str(path),
            fix="wait until it has ended, or open the arena for reading only",
        ) from exc


def _reserve(fd: int, path: Path, spec: ArenaSpec) -> None:
    """Sets the file's size and reserves its memory; in pieces, since a signal makes the kernel start over."""
    libc = ctypes.CDLL(None, use_errno=True)
    at, stop = 0, spec.reserved
    free = shutil.disk_usage(path.parent).free
    try:
        if stop > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while at < stop:
            size = min(_RESERVE_PIECE, stop - at)
            if libc.fallocate(fd, 0, ctypes.c_longlong(at), ctypes.c_longlong(size)) == 0:
                at += size
            elif (code := ctypes.get_errno()) != errno.EINTR:
                raise OSError(code, os.strerror(code))
        os.ftruncate(fd, spec.nbytes)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            _raise_no_room(exc, path, stop, free)
        if exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise StorageError(
                "the file system of the arena cannot reserve memory",
                where=str(path.parent),
                fix="name a tmpfs in MOC_SHM_DIR (default /dev/shm), or use save_mode durable",
            ) from exc
        raise_storage_error(exc, "reserving shared memory", path, stop)


def _raise_no_room(exc: OSError, path: Path, need: int | None, free: int | None = None) -> NoReturn:
    if free is None:
        free = shutil.disk_usage(path.parent).free
    asked = "" if need is None else f"{need:,} bytes needed, "
    raise StorageError(
        f"shared memory is too small: {asked}{free:,} bytes free", where=str(path), fix=_ROOM_FIX
    ) from exc


def _populate(memory: np.ndarray, progress: Callable[[int, int], None], threads: int, path: Path) -> None:
    """Touches every page, so that later copies meet none that is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    base, total = int(memory.ctypes.data), len(memory)

    def touch(start: int) -> int:
        size = min(_POPULATE_PIECE, total - start)
        while libc.madvise(ctypes.c_void_p(base + start), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # Linux before 5.14. The pages are reserved, so touching cannot fail.
                memory[start : start + size : mmap.PAGESIZE] = 0
                break
            if code not in (errno.EINTR, errno.EAGAIN):
                raise OSError(code, os.strerror(code))
        return size

    done = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="moc-arena") as workers:
        jobs = [workers.submit(touch, start) for start in range(0, total, _POPULATE_PIECE)]
        try:
            for job in as_completed(jobs):
                done += job.result()
                progress(done, total)
        except OSError as exc:
            raise_storage_error(exc, "populating shared memory", path, total)
        finally:
            for job in jobs:
                job.cancel()


def _ignore(_done: int, _total: int) -> None:
    pass


def _close_quietly(arena: Arena | None, fd: int) -> None:
    if arena is None:
        os.close(fd)
    else:
        arena.close()
