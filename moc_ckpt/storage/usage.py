"""How many bytes lie below a key of a checkpoint root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moc_ckpt.errors import StorageError
from moc_ckpt.storage.pack_layout import METADATA_FILE, decode_metadata
from moc_ckpt.storage.store import Store

__all__ = ["last_change", "used_bytes"]


def used_bytes(store: Store, key: str) -> int:
    """Returns the bytes of an object, or of all below a directory, unfinished files included.

    An object store does not tell sizes: there packs are counted by their metadata, and those without it as nothing.

    Raises:
        StorageError: if the store cannot be read.
    """
    if store.local_path is not None:
        return sum(status.st_size for path, status in _walk(store.local_path / key) if path.is_file())
    total = 0
    keys = store.list(key)
    packs = {name.rpartition("/")[0] for name in keys if name.endswith(f"/{METADATA_FILE}")}
    for name in keys or [key]:
        pack = next((parent for parent in (name.rsplit("/", 2)[0], name.rpartition("/")[0]) if parent in packs), None)
        if pack is None and "/packs/" not in name:
            total += len(store.read(name) or b"")
    for pack in packs:
        where = f"{pack}/{METADATA_FILE}"
        try:
            total += decode_metadata(store.read(where) or b"", store.locate(where)).stored_bytes
        except StorageError:  # damaged: how large it is makes no difference to what happens to it
            continue
    return total


def last_change(store: Store, prefix: str) -> float | None:
    """Returns when something below a directory changed last, by the file system's clock; None in an object store."""
    if store.local_path is None:
        return None
    return max((status.st_mtime for _, status in _walk(store.local_path / prefix)), default=0.0)


def _walk(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields everything at and below a path. What vanishes meanwhile is left out."""
    pending = [top]
    while pending:
        path = pending.pop()
        try:
            status = path.lstat()
            yield path, status
            if path.is_dir() and not path.is_symlink():
                pending += path.iterdir()
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise StorageError(
                f"looking at a file failed: {exc.strerror}", where=str(path), fix="check the file system's health"
            ) from exc
