"""Processes of this machine: who lives, and how to stay out of the training's way. No torch."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

__all__ = [
    "is_alive",
    "keep_memory_small",
    "launch_command",
    "lower_priority",
    "memory_and_descriptors",
    "place",
    "start_ticks",
]

# Words by which the programs that start trainers are known, and how many may be above each other.
_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed")
_LAUNCHERS_DEEP = 4

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_WHO_PROCESS = 1
_BEST_EFFORT_LAST = (2 << 13) | 7
_NICE = 10
_M_ARENA_MAX = -8


def start_ticks(pid: int) -> int | None:
    """Returns when a process began, in clock ticks since the boot; None if there is none, or only its remains.

    With it a process can be told from a later one that was given the same number.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = text.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in "ZXx":
        return None
    return int(fields[19])


def is_alive(pid: int) -> bool:
    """Tells whether a process exists and has not ended (one that nobody has waited for yet has)."""
    return pid > 0 and start_ticks(pid) is not None


def place() -> str:
    """Returns what process ids are relative to: this boot of this machine and this pid namespace."""
    boot = "?"
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = "?"
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (not a path)
    return f"{boot} {space}"


def lower_priority() -> None:
    """Gives this process less CPU and I/O priority than the training; where that is refused it stays as it is."""
    with suppress(OSError):
        os.nice(_NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).syscall(number, _WHO_PROCESS, 0, _BEST_EFFORT_LAST)


def keep_memory_small() -> None:
    """Lets all threads of this process allocate from one heap: those that come and go leave no holes behind."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def memory_and_descriptors() -> tuple[int, int]:
    """Returns (resident bytes, open descriptors) of this process."""
    rss = fds = 0
    with suppress(OSError, ValueError, IndexError):
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names only)
    return rss, fds


def launch_command() -> list[str]:
    """Returns the command that started this process, or the launcher above it (torchrun, deepspeed); [] if unknown."""
    pid, found = os.getpid(), _command(os.getpid())
    for _ in range(_LAUNCHERS_DEEP):
        pid = _parent(pid)
        command = _command(pid) if pid > 1 else []
        if not any(mark in word for word in command[:4] for mark in _LAUNCHERS):
            break
        found = command
    return found


def _command(pid: int) -> list[str]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words[:-1]]


def _parent(pid: int) -> int:
    try:
        # The name before it, in brackets, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
