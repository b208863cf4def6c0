"""Where an arm's arenas and agent are, and how they go."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

from _stall import process
from _stall.arms import Arm

__all__ = ["agents_of", "end_job", "job_folder"]


def job_folder(arm: Arm) -> Path:
    """Returns where an arm's arenas and its agent's files are, in shared memory."""
    base = Path(os.environ.get("MOC_SHM_DIR") or "/dev/shm")
    name = arm.name.replace("/", "-").replace("+", "-")
    return base / f"moc_ckpt-{os.getuid()}" / f"{os.environ['MOC_BENCH_JOB']}-{name}"


def agents_of(folder: Path) -> set[int]:
    """Returns the agents of a job, of which there should be one at most.

    Args:
        folder: from `job_folder`; it is an argument of theirs.
    """
    return process.matching("moc_ckpt.persist.agent", str(folder))


def end_job(folder: Path) -> None:
    """Ends the agent of a job of this benchmark, and removes what it has in shared memory.

    Args:
        folder: from `job_folder`.
    """
    pids = agents_of(folder)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)
