"""Requests checked, and the arenas that they are read from. No torch."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moc_ckpt.errors import StorageError
from moc_ckpt.persist.protocol import Persist
from moc_ckpt.persist.source import FileSource
from moc_ckpt.storage.checkpoint import part_key
from moc_ckpt.storage.local import LocalStore
from moc_ckpt.storage.manifest import Part, decode_part
from moc_ckpt.storage.store import Store

__all__ = ["Arenas", "GuardedSource", "check_request", "is_published", "read_extras", "remove_leftovers"]


_TEMPORARY = ".*.tmp-*"  # as `storage.local.temporary_name` makes them


class Arenas:
    """The arenas that this process has mapped, for reading only. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[tuple[int, int, int], tuple[str, int], np.ndarray]] = {}

    def map(self, request: Persist, who: tuple[str, int]) -> np.ndarray:
        """Returns the bytes of a request's arena, uint8.

        Args:
            request: the request; what it asks for must lie inside.
            who: run and rank, for `forget`.

        Raises:
            StorageError: if the file cannot be read, is not a plain one of this user, or is too short.
        """
        fd = _open_owned(request.arena)
        try:
            info = os.fstat(fd)
            now = (info.st_dev, info.st_ino, info.st_size)
            with self._lock:
                known, _, array = self._known.get(request.arena, ((0, 0, 0), who, np.zeros(0, np.uint8)))
            if known != now:  # new, or made again under the same name
                array = _map(fd, info.st_size)
                with self._lock:
                    self._known[request.arena] = (now, who, array)
        finally:
            os.close(fd)
        end = max((offset + nbytes for pack in request.packs for _, offset, nbytes in pack.spans), default=0)
        if end > len(array):
            raise StorageError(
                f"the arena has {len(array):,} bytes, a request reads up to byte {end:,}",
                where=request.arena,
                fix="report this; training goes on",
            )
        return array

    def forget(self, who: tuple[str, int]) -> None:
        """Lets go of a trainer's arenas; their memory is freed once nothing is written from them."""
        with self._lock:
            for path in [path for path, (_, owner, _) in self._known.items() if owner == who]:
                del self._known[path]


class GuardedSource(FileSource):
    """Reads an arena as long as the bytes are wanted.

    Args:
        array: the arena.
        spans: see `FileSource`.
        check: raises once they are not.
    """

    def __init__(self, array: np.ndarray, spans: list[tuple[int, int, int]], check: Callable[[], None]) -> None:
        super().__init__(array, spans)
        self._check_wanted = check

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        """See `FileSource.read_into`."""
        self._check_wanted()
        super().read_into(dst, offset)

    def pieces(self, offset: int, nbytes: int) -> list[np.ndarray] | None:
        """See `FileSource.pieces`."""
        self._check_wanted()
        return super().pieces(offset, nbytes)


def check_request(request: Persist, rank: int, folder: Path) -> None:
    """Refuses a request that makes no sense, before anything is touched.

    Raises:
        StorageError: naming what is wrong.
    """
    part = request.part
    problem = ""
    if part.rank != rank:
        problem = f"rank {rank} sent the part of rank {part.rank}"
    elif not 0 <= part.rank < part.world:
        problem = f"there is no rank {part.rank} in a world of {part.world}"
    elif request.url.startswith("memory://"):
        problem = "memory:// lives in one process only: the agent cannot write there"
    elif Path(request.arena).parent != folder:
        problem = f"the arena {request.arena} is not in the job's directory {folder}"
    elif [pack.key for pack in request.packs] != [pack.path for pack in part.packs]:
        problem = "the packs are not those of the part"
    elif not request.commit_s > 0 or request.threads < 1:
        problem = f"commit_s {request.commit_s} and threads {request.threads} must be positive"
    else:
        for pack, record in zip(request.packs, part.packs, strict=True):
            problem = problem or _check_spans(pack.spans, record.nbytes, record.path)
            if pack.nbytes != record.nbytes:
                problem = f"{pack.key} has {record.nbytes:,} bytes in the part, {pack.nbytes:,} in the request"
            elif not record.path.startswith(f"{part.tag}/{part.save_id}/packs/rank_{part.rank:05d}."):
                problem = f"{record.path} is not a pack of this save"
        if any(extra.offset < 0 or extra.nbytes < 0 for extra in request.extras):
            problem = "an extra file has a negative place or size"
    if problem:
        raise StorageError(problem, where=f"the save {part.tag!r} of rank {rank}", fix="report this; training goes on")


def _check_spans(spans: list[tuple[int, int, int]], nbytes: int, where: str) -> str:
    end = 0
    for place, offset, size in spans:
        if place < end or size < 0 or offset < 0 or place + size > nbytes:
            return f"{where}: the span {(place, offset, size)} overlaps the one before or leaves the pack"
        end = place + size
    return ""


def is_published(store: Store, part: Part) -> bool:
    """Tells whether the rank's part was published before, by this agent or one that is gone."""
    data = store.read(part_key(part.tag, part.save_id, part.rank))
    if data is None:
        return False
    try:
        found = decode_part(data, part.tag)
    except StorageError:
        return False
    same = (found.save_id, found.attempt, found.step, found.rank, found.world)
    return same == (part.save_id, part.attempt, part.step, part.rank, part.world)


def remove_leftovers(store: Store, request: Persist) -> None:
    """Removes unfinished objects that a writer left in a request's packs when it was killed. Finished ones stay."""
    if isinstance(store, LocalStore):
        for pack in request.packs:
            for path in store.path(pack.key).rglob(_TEMPORARY):
                path.unlink(missing_ok=True)


def _open_owned(path: str) -> int:
    """Opens an arena's file for reading: a plain file of this user.

    Raises:
        StorageError: if it is not.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StorageError(
            f"the arena cannot be opened: {error.strerror}", where=path, fix="training goes on; was it removed?"
        ) from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid():
        os.close(fd)
        raise StorageError("the arena is not a plain file of this user", where=path, fix="look who made it")
    return fd


def _map(fd: int, size: int) -> np.ndarray:
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), np.uint8)


def read_extras(request: Persist) -> dict[str, bytes]:
    """Reads the small files with system calls: their region may have holes, which a mapping must not touch."""
    if not request.extras:
        return {}
    fd = _open_owned(request.arena)
    try:
        found = {}
        for extra in request.extras:
            data = os.pread(fd, extra.nbytes, extra.offset)
            if len(data) != extra.nbytes:
                raise StorageError(
                    f"{extra.name}: {extra.nbytes:,} bytes at {extra.offset:,} are not in the arena",
                    where=request.arena,
                    fix="report this; training goes on",
                )
            found[extra.name] = data
        return found
    finally:
        os.close(fd)
