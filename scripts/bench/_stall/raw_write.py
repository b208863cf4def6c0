"""What the storage can do: a plain O_DIRECT write with fsync."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

__all__ = ["raw_write"]

_PIECE = 16 << 20


def raw_write(path: Path, nbytes: int) -> float | None:
    """Writes bytes past the page cache into a preallocated file, syncs and removes it; returns the seconds.

    Args:
        path: the file; it must not exist.
        nbytes: rounded up to whole blocks of 4096.

    Returns:
        Seconds from before the allocation until after the fsync; None where the file system refuses O_DIRECT.
    """
    total = -(-max(1, nbytes) // 4096) * 4096
    with mmap.mmap(-1, min(_PIECE, total)) as buffer:
        buffer[:] = os.urandom(4096) * (len(buffer) // 4096)
        begin = time.perf_counter()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        except OSError:
            path.unlink(missing_ok=True)
            return None
        try:
            os.posix_fallocate(handle, 0, total)
            done = 0
            with memoryview(buffer) as view:
                while done < total:
                    with view[: min(len(buffer), total - done)] as piece:
                        done += os.pwrite(handle, piece, done)
            os.fsync(handle)
            return time.perf_counter() - begin
        except OSError:
            return None
        finally:
            os.close(handle)
            path.unlink(missing_ok=True)
