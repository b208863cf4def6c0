"""Files of a tree, replaced all together or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moc_ckpt.errors import StorageError

__all__ = ["refuse", "replace"]

_FIX = "nothing was changed"


def refuse(root: Path, file: str) -> os.stat_result:
    """Checks that a file may be replaced.

    Args:
        root: of the tree.
        file: relative to it.

    Returns:
        Its status.

    Raises:
        StorageError: if it is a symbolic link, not a regular file, or read-only, or if its directory is.
    """
    path = root / file
    places = [path, *(parent for parent in path.parents if root in parent.parents)]
    try:
        for place in places:
            if place.is_symlink():
                raise StorageError(
                    f"{'the file' if place == path else 'its directory'} is a symbolic link to {place.readlink()}",
                    where=str(place),
                    fix=f"patch the tree that it leads to; {_FIX}",
                )
        status = path.stat()
    except OSError as error:
        raise StorageError(f"it cannot be read: {error.strerror}", where=str(path), fix=_FIX) from error
    if not stat.S_ISREG(status.st_mode):
        raise StorageError("it is not a regular file", where=str(path), fix=_FIX)
    # By its mode as well: whoever made it so meant it, also for root.
    if not status.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise StorageError("the file is read-only", where=str(path), fix=f"make it writable or copy the tree; {_FIX}")
    if not path.parent.stat().st_mode & 0o222 or not os.access(path.parent, os.W_OK):
        raise StorageError(
            "the directory is read-only", where=str(path.parent), fix=f"make it writable or copy the tree; {_FIX}"
        )
    return status


def replace(root: Path, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
    """Replaces files: all are written beside their places first, then renamed one after the other.

    Args:
        root: of the tree.
        before: what the files were when they were read, by name relative to the root.
        after: what they become.

    Raises:
        StorageError: if one of them may not be replaced, was changed meanwhile, or cannot be written; none is changed
            then.
    """
    statuses = {file: refuse(root, file) for file in sorted(after)}
    waiting: dict[str, Path] = {}
    done: list[str] = []
    try:
        for file, status in statuses.items():
            waiting[file] = _write(root / file, after[file], status)
        for file in after:
            if (root / file).read_bytes() != before[file]:
                raise StorageError("somebody changed the file meanwhile", where=str(root / file), fix=f"retry; {_FIX}")
        for file in list(waiting):
            waiting[file].replace(root / file)
            done.append(file)
            del waiting[file]
    except BaseException as error:
        for file in done:
            _write(root / file, before[file], statuses[file]).replace(root / file)
        if isinstance(error, OSError):
            raise StorageError(
                f"cannot write: {error.strerror}", where=str(error.filename or root), fix=_FIX
            ) from error
        raise
    finally:
        for path in waiting.values():
            with suppress(OSError):
                path.unlink()


def _write(path: Path, data: bytes, status: os.stat_result) -> Path:
    """Writes a file beside its place, with the same mode and owner."""
    temporary = path.with_name(f".{path.name}.moc-ckpt-{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            with suppress(PermissionError):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary
