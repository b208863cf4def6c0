"""One checkpoint root, wherever it lives: the few operations that everything else is built on."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableSequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from moc_ckpt.errors import StorageError

__all__ = ["Store", "check_key", "open_store"]

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://")
_REMOTE_SCHEMES = ("s3://", "gs://", "memory://")


def check_key(key: str) -> str:
    """Returns `key` if it is a relative POSIX path that stays inside its root.

    Raises:
        StorageError: if it is empty, absolute, or has an empty, `.` or `..` component.
    """
    if not key or "\0" in key or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(
            f"{key!r} is not a key: keys are relative paths without '..'",
            fix="if the name came from a manifest, the file is damaged or was not written by this package",
        )
    return key


class Store(ABC):
    """A checkpoint root: a directory or a prefix of an object store.

    Keys are relative POSIX paths. Every write but `append` is atomic (a reader sees the old object or the new one) and
    durable when the call returns. All methods may be called from several threads and processes at once.

    Attributes:
        url: where the root is, for messages.
        local_path: the root directory on a local file system, else None.
    """

    url: str
    local_path: Path | None = None

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Returns the object's bytes, None if there is no such object.

        Raises:
            StorageError: if it cannot be read.
        """

    @abstractmethod
    def read_ranges(self, key: str, ranges: list[tuple[int, MutableSequence[memoryview]]]) -> None:
        """Fills buffers from byte ranges of one object.

        Args:
            key: the object.
            ranges: (offset in bytes, buffers filled one after the other from there). A negative offset means
                the object's last bytes; it must then be minus the buffers' size.

        Raises:
            FileNotFoundError: if there is no such object.
            EOFError: if a range ends behind the object's end.
            StorageError: if it cannot be read for another reason.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Writes or replaces an object.

        Raises:
            StorageError: if it cannot be written; the object is then as it was before.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes an object unless it exists; of several callers exactly one gets True.

        Raises:
            StorageError: if it cannot be written.
        """

    @abstractmethod
    def append(self, key: str, data: bytes) -> None:
        """Adds bytes to the end of an object, which begins empty. Meant for logs.

        Unlike the other writes this is not durable against a failure of the machine: when it returns the bytes
        outlive this process, but a machine that goes down may lose or cut off what was appended last. On a file
        system the appends of several processes of one machine do not mix. An object store cannot append: the object
        is read and written again, so it should be small and have one writer.

        Args:
            key: the object.
            data: what to add.

        Raises:
            StorageError: if it cannot be added; a part of it may be there then.
        """

    @abstractmethod
    def list_dirs(self, prefix: str = "") -> list[str]:
        """Returns the sorted names of the directories directly in the directory `prefix`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; no error if there is none."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> None:
        """Removes every object below the directory `prefix` (and, on a file system, the directory)."""

    @abstractmethod
    def prune(self, prefix: str) -> None:
        """Removes the directory `prefix` if it is empty; nothing to do in an object store."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Tells whether there is an object `key`."""

    @abstractmethod
    def root_exists(self) -> bool:
        """Tells whether the root itself exists (always True in an object store)."""

    @abstractmethod
    def check_writable(self, need_bytes: int = 0) -> None:
        """Raises if writing here cannot work, before anything is touched. Leaves nothing behind.

        Args:
            need_bytes: room that the caller is going to need; 0 if it does not know.

        Raises:
            StorageError: naming the obstacle and what to do about it.
        """

    @abstractmethod
    def lock(self, name: str, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        """Returns a context that holds an exclusive lock among all processes using this root.

        Not reentrant. A holder that died does not block others (for longer than `LOCK_LEASE_S` in an object store).

        Args:
            name: file name of the lock.
            timeout_s: seconds to wait for another holder.

        Raises:
            StorageError: on entering, if another holder kept it all that time.
        """

    def locate(self, key: str) -> str:
        """Returns the full path or URL of `key`, for messages."""
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted keys of all objects below the directory `prefix`, at any depth."""


def open_store(url: str | os.PathLike[str] | Mapping[str, Any], *, create: bool = False) -> Store:
    """Opens a checkpoint root.

    Args:
        url: a path, `file://`, `s3://bucket/prefix`, `gs://bucket/prefix`, `memory://name` (shared within this
            process), or a TensorStore KvStore spec as a dict.
        create: make the directory (and its parents) if it is missing.

    Returns:
        The store. A root that is missing is no error here; reading finds nothing in it.

    Raises:
        StorageError: if the address makes no sense, or the directory cannot be made.
    """
    from moc_ckpt.storage.local import LocalStore

    if isinstance(url, Mapping):
        from moc_ckpt.storage.remote import KvStore

        return KvStore(dict(url))
    if isinstance(url, os.PathLike):
        return LocalStore(Path(url), create=create)
    if not url:
        raise StorageError("the checkpoint directory is an empty string", fix="name a directory or a URL")
    if url.startswith("file://"):
        split = urlsplit(url)
        if split.netloc not in ("", "localhost") or not split.path:
            raise StorageError(f"{url} names another machine", fix="write file:///absolute/path")
        return LocalStore(Path(unquote(split.path)), create=create)
    if url.startswith(_REMOTE_SCHEMES):
        from moc_ckpt.storage.remote import KvStore

        return KvStore(url)
    if _SCHEME.match(url):
        raise StorageError(
            f"{url.partition('://')[0]}:// is not supported",
            where=url,
            fix="use a path, file://, s3://, gs:// or memory://",
        )
    return LocalStore(Path(url), create=create)
