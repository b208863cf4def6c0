"""A checkpoint root on a local (or mounted) file system, with plain system calls."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from moc_ckpt.errors import StorageError
from moc_ckpt.storage.store import Store, check_key

__all__ = ["LocalStore", "fsync_dir", "make_dirs", "raise_storage_error", "temporary_name"]

_TMP_MARK = ".tmp-"
_IOV_MAX = 1024
_READAHEAD_MIN = 1 << 20
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_FIXES = {
    errno.ENOSPC: "free space there, or point save_dir at a larger disk",
    errno.EDQUOT: "the quota is used up: free space, or ask for a larger quota",
    errno.EROFS: "the file system is mounted read-only: remount it, or choose another directory",
    errno.EACCES: "give this user write permission, or choose another directory",
    errno.EPERM: "give this user write permission, or choose another directory",
    errno.EIO: "the device reports an I/O error: look at the kernel log (dmesg) and the disk's health",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter tag or directory",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}


def raise_storage_error(exc: OSError, action: str, path: str | Path, need: int | None = None) -> NoReturn:
    """Raises the StorageError that explains a failed system call.

    Args:
        exc: what the system reported.
        action: what was being done, e.g. "writing a pack".
        path: the file concerned.
        need: bytes that were needed there, if that matters.
    """
    room = ""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT) and need is not None:
        room = f" ({need:,} bytes needed{_free_text(Path(path))})"
    raise StorageError(
        f"{action} failed: {exc.strerror or exc}{room}",
        where=str(path),
        fix=_FIXES.get(exc.errno or 0, "check the path and the file system's health"),
    ) from exc


def _free_text(path: Path) -> str:
    with suppress(OSError):
        place = path if path.is_dir() else path.parent
        return f", {shutil.disk_usage(place).free:,} bytes free"
    return ""


def temporary_name(path: Path) -> Path:
    """Returns a fresh hidden name next to `path`, which listings skip."""
    return path.with_name(f".{path.name}{_TMP_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def fsync_dir(path: Path) -> None:
    """Makes the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some network file systems refuse fsync on directories; they make entries durable by themselves.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Makes a directory and its parents, durably.

    Raises:
        OSError: if one cannot be made.
    """
    missing = []
    top = path
    while not top.is_dir() and top.parent != top:
        missing.append(top)
        top = top.parent
    for part in reversed(missing):
        try:
            part.mkdir(exist_ok=True)
            fsync_dir(part.parent)
        except FileNotFoundError:  # a collector pruned the empty parent just now
            part.mkdir(parents=True, exist_ok=True)
            fsync_dir(part.parent)


class LocalStore(Store):
    """A checkpoint root in a directory.

    Args:
        root: the directory.
        create: make it if it is missing.

    Raises:
        StorageError: if it cannot be made.
    """

    local_path: Path

    def __init__(self, root: Path, *, create: bool = False) -> None:
        self.local_path = Path(os.path.abspath(root.expanduser()))  # noqa: PTH100 (resolve() would follow links)
        self.url = str(self.local_path)
        if create:
            try:
                make_dirs(self.local_path)
            except OSError as exc:
                raise_storage_error(exc, "making the checkpoint directory", self.local_path)

    def path(self, key: str) -> Path:
        """Returns the file of `key`."""
        return self.local_path / check_key(key)

    def read(self, key: str) -> bytes | None:
        """See `Store.read`."""
        path = self.path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as exc:
            raise_storage_error(exc, "reading", path)

    def read_ranges(self, key: str, ranges: list[tuple[int, MutableSequence[memoryview]]]) -> None:
        """See `Store.read_ranges`."""
        path = self.path(key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise FileNotFoundError(str(path)) from None
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise_storage_error(exc, "opening", path)
        try:
            size = os.fstat(fd).st_size
            for offset, views in ranges:
                start = offset if offset >= 0 else size + offset
                count = sum(len(view) for view in views)
                if start < 0 or start + count > size:
                    raise EOFError(f"{path} ends at byte {size:,}")
                if count >= _READAHEAD_MIN:
                    # Threads that read neighbouring parts defeat the kernel's own detection of sequential reading.
                    os.posix_fadvise(fd, start, count, os.POSIX_FADV_WILLNEED)
                _preadv_all(fd, views, start)
        except OSError as exc:
            raise_storage_error(exc, "reading", path)
        finally:
            os.close(fd)

    def write(self, key: str, data: bytes) -> None:
        """See `Store.write`."""
        path = self.path(key)
        try:
            tmp = self._write_temporary(path, data)
            try:
                tmp.replace(path)
            except OSError:
                tmp.unlink(missing_ok=True)
                raise
            fsync_dir(path.parent)
        except OSError as exc:
            raise_storage_error(exc, "writing", path, len(data))

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`."""
        path = self.path(key)
        try:
            tmp = self._write_temporary(path, data)
            try:
                # A hard link appears with its whole content or not at all, and never replaces.
                os.link(tmp, path)
            except FileExistsError:
                return False
            except OSError as exc:
                if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                return _create_without_links(path, data)
            finally:
                tmp.unlink(missing_ok=True)
            fsync_dir(path.parent)
        except OSError as exc:
            raise_storage_error(exc, "creating", path, len(data))
        return True

    def append(self, key: str, data: bytes) -> None:
        """See `Store.append`."""
        path = self.path(key)
        try:
            try:
                fd = os.open(path, _APPEND, 0o666)
            except FileNotFoundError:
                make_dirs(path.parent)
                fd = os.open(path, _APPEND, 0o666)
            try:
                # One call, so that appends of several processes do not mix; a short write is a disk that is full,
                # which the next call reports.
                done = os.write(fd, data)
                while done < len(data):
                    done += os.write(fd, data[done:])
            finally:
                os.close(fd)
        except OSError as exc:
            raise_storage_error(exc, "appending", path, len(data))

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        make_dirs(path.parent)
        tmp = temporary_name(path)
        try:
            with tmp.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            tmp.unlink(missing_ok=True)
            raise
        return tmp

    def list_dirs(self, prefix: str = "") -> list[str]:
        """See `Store.list_dirs`."""
        top = self._directory(prefix)
        try:
            with os.scandir(top) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            raise_storage_error(exc, "listing", top)

    def _directory(self, prefix: str) -> Path:
        prefix = prefix.rstrip("/")
        return self.path(prefix) if prefix else self.local_path

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        path = self.path(key)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                fsync_dir(path.parent)
        except NotADirectoryError:
            return
        except OSError as exc:
            raise_storage_error(exc, "removing", path)

    def delete_prefix(self, prefix: str) -> None:
        """See `Store.delete_prefix`."""
        path = self.path(prefix.rstrip("/"))
        try:
            if path.is_symlink() or path.is_file():
                return
            # Two collectors may be at work on the same files.
            for _ in range(3):
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
                if not path.exists():
                    break
            if path.parent.is_dir():
                fsync_dir(path.parent)
        except OSError as exc:
            raise_storage_error(exc, "removing", path)

    def prune(self, prefix: str) -> None:
        """See `Store.prune`."""
        path = self.path(prefix)
        try:
            path.rmdir()
            fsync_dir(path.parent)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise_storage_error(exc, "removing", path)

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        return self.path(key).is_file()

    def root_exists(self) -> bool:
        """See `Store.root_exists`."""
        return self.local_path.is_dir()

    def check_writable(self, need_bytes: int = 0) -> None:
        """See `Store.check_writable`."""
        root = self.local_path
        if not root.exists():
            parent = next(path for path in root.parents if path.exists())
            raise StorageError(
                "the checkpoint directory does not exist",
                where=f"{root} (the path exists up to {parent})",
                fix="make it, or check that the file system it belongs to is mounted",
            )
        if not root.is_dir():
            raise StorageError("the checkpoint path is a file", where=str(root), fix="name a directory")
        # Only a real write finds read-only mounts, quotas and full disks (root passes every permission check).
        probe = temporary_name(root / "probe")
        try:
            try:
                with probe.open("xb") as file:
                    file.write(b"\0" * 4096)
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                probe.unlink(missing_ok=True)
            free = shutil.disk_usage(root).free
        except OSError as exc:
            raise_storage_error(exc, "a test write to the checkpoint directory", root, max(need_bytes, 4096))
        if free < need_bytes:
            raise StorageError(
                f"not enough space for a checkpoint: {need_bytes:,} bytes needed, {free:,} bytes free",
                where=str(root),
                fix=_FIXES[errno.ENOSPC],
            )

    @contextmanager
    def lock(self, name: str, timeout_s: float = 60.0) -> Iterator[None]:
        """See `Store.lock`."""
        path = self.path(name)
        try:
            make_dirs(path.parent)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise_storage_error(exc, "opening the lock", path)
        try:
            deadline = time.monotonic() + timeout_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StorageError(
                            f"another process held the lock for all of {timeout_s:g} s",
                            where=str(path),
                            fix="look for another commit, gc or training run on this directory (`fuser` shows who)",
                        ) from None
                    time.sleep(0.01)
                except OSError as exc:
                    raise_storage_error(exc, "locking", path)
            yield
        finally:
            os.close(fd)

    def list(self, prefix: str = "") -> list[str]:
        """See `Store.list`."""
        top = self._directory(prefix)
        keys: list[str] = []
        for where, _, names in os.walk(top):
            base = Path(where).relative_to(self.local_path).as_posix()
            keys += [name if base == "." else f"{base}/{name}" for name in names if not _hidden(name)]
        return sorted(keys)


def _hidden(name: str) -> bool:
    return (name.startswith(".") and _TMP_MARK in name) or name.endswith(".__lock")


def _create_without_links(path: Path, data: bytes) -> bool:
    """Creates a file where hard links are refused; a crash half-way may leave it truncated."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    fsync_dir(path.parent)
    return True


def _preadv_all(fd: int, views: MutableSequence[memoryview], offset: int) -> None:
    pending = [view for view in views if len(view)]
    while pending:
        count = os.preadv(fd, pending[:_IOV_MAX], offset)
        if count <= 0:
            raise EOFError(f"the file ended at byte {offset:,}")
        offset += count
        while pending and count >= len(pending[0]):
            count -= len(pending.pop(0))
        if count:
            pending[0] = pending[0][count:]
