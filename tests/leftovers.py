"""Removes what processes that were killed leave in shared memory and nobody else removes."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["remove_buffers"]

_SHARED = Path("/dev/shm")
# DeepSpeed's communication between CPU ranks: 64 MiB for each, removed only by a process that ends in peace.
_PATTERN = "deepspeed_allreduce_buffer_*"
_YOUNG_S = 30.0


def remove_buffers() -> int:
    """Removes DeepSpeed's buffers of this user that no process maps; returns how many.

    Young ones are left: whoever makes one needs a moment until it is mapped.
    """
    found = [path for path in _SHARED.glob(_PATTERN) if _is_old(path)]
    if not found:
        return 0
    mapped = _mapped()
    count = 0
    for path in found:
        if str(path) not in mapped:
            with suppress(FileNotFoundError):
                path.unlink()
                count += 1
    return count


def _is_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        info = path.stat()
        return info.st_uid == os.getuid() and time.time() - info.st_mtime > _YOUNG_S
    return False


def _mapped() -> set[str]:
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            found.update(
                line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "allreduce_buffer" in line
            )
    return found
