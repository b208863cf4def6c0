"""The directories that exports and imports write: made where nothing is, and gone again if they are not finished."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moc_ckpt.errors import ConfigError, StorageError, UnsupportedError
from moc_ckpt.storage.local import fsync_dir, make_dirs, raise_storage_error, temporary_name
from moc_ckpt.storage.store import Store, open_store

__all__ = ["new_directory", "staged_directory"]


@contextmanager
def new_directory(url: str, source: Store, need_bytes: int) -> Iterator[Store]:
    """Makes a directory for an export; should that fail, what was written is removed again.

    Args:
        url: path or URL; must not exist or be empty.
        source: the checkpoint root that is read, which must be elsewhere.
        need_bytes: bytes that are going to be written.

    Raises:
        ConfigError: if there is something already, or it lies in the source.
        StorageError: if there is not enough room or it cannot be written; nothing was changed then.
    """
    out = open_store(url)
    path = out.local_path
    there = out.root_exists()
    if path is not None:
        _check_place(path, source)
        _check_room(path, need_bytes)
    elif out.list():
        raise _not_empty(out.url)
    out = open_store(url, create=True)
    try:
        out.check_writable(need_bytes)
        yield out
    except BaseException:
        with suppress(StorageError, OSError):
            _clear(out, path, there=there)
        raise


@contextmanager
def staged_directory(url: str, source: Store, need_bytes: int) -> Iterator[Path]:
    """Makes a local directory under a hidden name beside its own, which it gets at the end; should that fail, it goes.

    What earlier calls for the same directory left under such names when they were killed is removed first.

    Args:
        url: path of the directory; must not exist or be empty.
        source: the directory that is read, which must be elsewhere.
        need_bytes: bytes that are going to be written.

    Yields:
        The directory under its hidden name; files in it must be durable at the end.

    Raises:
        UnsupportedError: if it is no local directory.
        ConfigError: if there is something already, it lies in the source, or is a mount point.
        StorageError: if there is not enough room or it cannot be written.
    """
    path = open_store(url).local_path
    if path is None:
        raise UnsupportedError("this cannot be written to an object store", where=url, fix="name a directory")
    _check_place(path, source)
    # A link to an empty directory stays one.
    path = path.resolve()
    if path.is_mount():
        raise ConfigError(
            "the output is a mount point, whose name no other directory can get",
            where=str(path),
            fix="name a new directory in it; nothing was written",
        )
    _remove_forsaken(path)
    _check_room(path, need_bytes)
    try:
        make_dirs(path.parent)
        hidden, lock = _make_hidden(path)
    except OSError as exc:
        raise_storage_error(exc, "making the directory", path, need_bytes)
    try:
        try:
            yield hidden
            for item in (hidden, *(item for item in hidden.rglob("*") if item.is_dir())):
                fsync_dir(item)
            hidden.replace(path)
            fsync_dir(path.parent)
        except OSError as exc:
            raise_storage_error(exc, "writing the directory", path, need_bytes)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _make_hidden(path: Path) -> tuple[Path, int]:
    """Makes a hidden directory for `path`; returns it with a descriptor whose lock says that somebody writes it."""
    while True:
        hidden = temporary_name(path)
        hidden.mkdir()
        fd = -1
        # Before it is locked another call may take it for forsaken and remove it.
        with suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(fd)
            if os.path.samestat(hidden.stat(), os.fstat(fd)):
                return hidden, fd
        if fd >= 0:
            os.close(fd)


def _remove_forsaken(path: Path) -> None:
    """Removes the hidden directories of `path` that nobody writes any more; what cannot be told or removed stays."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.tmp-\d+-[0-9a-f]{{8}}")
    with suppress(FileNotFoundError, NotADirectoryError):
        for item in [item for item in path.parent.iterdir() if pattern.fullmatch(item.name)]:
            with suppress(OSError):
                fd = os.open(item, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    if _lock(fd):
                        shutil.rmtree(item)
                finally:
                    os.close(fd)


def _lock(fd: int) -> bool:
    """Locks a directory; False where the file system has no such locks.

    Raises:
        BlockingIOError: if another call has it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _check_place(path: Path, source: Store) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError("the output is a file", where=str(path), fix="name a directory that does not exist yet")
    real = path.resolve()
    if source.local_path is not None and real.is_relative_to(source.local_path.resolve()):
        raise ConfigError(
            "the output lies in the checkpoint directory itself",
            where=str(path),
            fix="name a directory elsewhere; nothing was written",
        )
    if path.is_dir() and any(path.iterdir()):
        raise _not_empty(str(path))
    if not _existing(path).is_dir():
        raise ConfigError(
            "a part of the output's path is a file", where=str(_existing(path)), fix="name another directory"
        )


def _check_room(path: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(_existing(path)).free
    if free < need_bytes:
        raise StorageError(
            f"not enough space for the export: {need_bytes:,} bytes needed, {free:,} bytes free",
            where=str(path),
            fix="free space there, or name a directory on a larger disk; nothing was written",
        )


def _existing(path: Path) -> Path:
    return next(item for item in (path, *path.parents) if item.exists())


def _not_empty(where: str) -> ConfigError:
    return ConfigError(
        "the output directory is not empty",
        where=where,
        fix="name a directory that does not exist or is empty; remove this one if an export was cut off there",
    )


def _clear(out: Store, path: Path | None, *, there: bool) -> None:
    """Removes all of a directory that was empty when this began."""
    if path is None:
        for key in out.list():
            out.delete(key)
        return
    for item in list(path.iterdir()):
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
    if not there:
        path.rmdir()
