"""Processor time and memory of processes, from /proc (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_seconds", "descendants", "descriptors", "matching", "resident_bytes", "shared_bytes", "threads"]

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Returns the processor seconds of a process and of the children it has waited for; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    parts = text.rpartition(")")[2].split()  # the name before it may hold anything
    return sum(int(value) for value in parts[11:15]) / _TICK


def resident_bytes(pid: int) -> int:
    """Returns the resident bytes of a process that are its own: anonymous, without files and shared memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def descriptors(pid: int) -> int:
    """Returns the number of open descriptors of a process; 0 if it is gone."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


def threads(pid: int) -> int:
    """Returns the number of threads of a process; 0 if it is gone."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0


def descendants(pid: int) -> set[int]:
    """Returns the processes below a process."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    found: set[int] = set()
    left = [pid]
    while left:
        children = parents.get(left.pop(), [])
        found.update(children)
        left.extend(children)
    return found


def matching(*arguments: str) -> set[int]:
    """Returns the other processes that have all of these among the arguments of their command line."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                given = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if all(argument.encode() in given for argument in arguments):
                found.add(int(folder.name))
    return found


def shared_bytes(folder: Path) -> int:
    """Returns the bytes that files below a folder really take, e.g. arenas in shared memory."""
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        try:
            if path.is_file():
                total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total
