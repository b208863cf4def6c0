"""What a checkpoint directory and shared memory hold that nobody needs any more (invariant I6). No torch.

Retention after a commit knows which saves are in flight. Here nobody does, so what may be in flight is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.persist.heartbeat import live_writer
from moc_ckpt.persist.protocol import Status, StatusRequest
from moc_ckpt.persist.survey import ask_agent, read_holdings
from moc_ckpt.snapshot.arena import Arena, forsaken, is_over, writer_pid
from moc_ckpt.snapshot.places import find_arenas, job_dir, job_key
from moc_ckpt.storage.checkpoint import LOCK, parts_status, read_outcome, save_prefix
from moc_ckpt.storage.retention import RetentionReport, apply_retention
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.usage import last_change, used_bytes
from moc_ckpt.storage.verify import first_damage

__all__ = ["IDLE_S", "ArenaGarbage", "Garbage", "collect_arenas", "collect_garbage"]

IDLE_S = 900.0
"""Seconds without a change after which a save of an unknown run counts as abandoned: more than a commit may take."""
_UNFINISHED = re.compile(
    r"^(\.(latest|lock|probe)|attempts/\.\d{6,}\.json|[^/]+/\.manifest\.json)\.tmp-\d+-[0-9a-f]{8}$"
)
"""Files that a commit, an attempt or a heartbeat leaves unfinished when it is killed. Those of saves go with them."""


@dataclass(slots=True)
class Garbage:
    """What was removed from a checkpoint directory, or with a dry run would be.

    Attributes:
        report: tags, saves and packs.
        writer: the run that writes into the directory, for people; empty if none does.
        nbytes: bytes by what they belong to: a dropped tag, or the directory of a save.
        stays: directories of saves that stay because they may be in flight -> why that is.
        files: unfinished files beside the saves, by their key -> bytes.
    """

    report: RetentionReport
    writer: str
    nbytes: dict[str, int] = field(default_factory=dict)
    stays: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return sum(self.nbytes.values()) + sum(self.files.values())


class _Writers:
    """Tells which saves somebody may still be writing, and why."""

    def __init__(self, store: Store, writer: str, idle_s: float) -> None:
        self._store = store
        self._writer = writer
        self._idle_s = idle_s
        self._now: float | None = None
        self.reasons: dict[str, str] = {}

    def may_write(self, tag: str, save_id: str) -> bool:
        """See `apply_retention`. Called under the directory's lock."""
        reason = self._reason(tag, save_id)
        if reason:
            self.reasons[save_prefix(tag, save_id)] = reason
        return bool(reason)

    def _reason(self, tag: str, save_id: str) -> str:
        ended = False
        with suppress(StorageError):  # a note that is not readable tells nothing
            ended = read_outcome(self._store, tag, save_id) is not None
        changed = last_change(self._store, save_prefix(tag, save_id))
        if self._writer and not (ended and changed is not None):
            return f"{self._writer} may be writing it"
        if self._idle_s <= 0:
            return ""
        if changed is None:
            status = parts_status(self._store, tag, save_id)
            if ended or status.done or status.failed:
                return ""
            return "no rank has written its part, and an object store does not tell since when"
        idle = max(self._clock() - changed, 0.0)
        return f"it changed {idle:,.0f} s ago" if idle < self._idle_s else ""

    def _clock(self) -> float:
        """Returns the time by the clock that sets the times of files: that of a file server may differ from ours."""
        if self._now is None:
            self._now = time.time()
            if self._store.local_path is not None:
                with suppress(OSError):
                    lock = self._store.local_path / LOCK
                    os.utime(lock)
                    self._now = lock.stat().st_mtime
        return self._now


def collect_garbage(
    store: Store,
    *,
    keep_last: int,
    keep_every: int = 0,
    idle_s: float = IDLE_S,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
    timeout_s: float = 60.0,
) -> Garbage:
    """Removes the checkpoints that are not kept, what saves that never committed left, and packs nobody refers to.

    Args:
        store: the checkpoint root.
        keep_last: number of newest checkpoints that stay; 0 keeps all. Those of which a file is missing or of another
            size stay and do not count, so that what can be loaded is not removed for what cannot.
        keep_every: checkpoints whose step is a multiple of this stay as well; 0 for none.
        idle_s: a save that was not committed stays for so many seconds after its last change; 0: nobody writes any,
            as the caller knows. While a run has the directory its saves stay whatever this is.
        dry_run: remove nothing.
        progress: called with the bytes found so far.
        timeout_s: seconds to wait for the lock.

    Raises:
        StorageError: if something cannot be removed, or the lock is taken.
    """
    writer = live_writer(store) or _busy_agent(store)
    writers = _Writers(store, writer, idle_s)
    found: list[tuple[str, int]] = []
    total = 0

    def removing(key: str) -> None:
        nonlocal total
        found.append((key, used_bytes(store, key)))
        total += found[-1][1]
        progress(total)

    report = apply_retention(
        store,
        keep_last=keep_last,
        keep_every=keep_every,
        may_be_written=writers.may_write,
        remnants=not writer,
        removing=removing,
        damage=lambda manifest: first_damage(store, manifest),
        dry_run=dry_run,
        timeout_s=timeout_s,
    )
    garbage = Garbage(report, writer)
    for key, nbytes in found:
        tag, save_id = key.split("/")[:2]
        owner = tag if tag in report.dropped else f"{tag}/{save_id}"
        garbage.nbytes[owner] = garbage.nbytes.get(owner, 0) + nbytes
    garbage.stays = {save: writers.reasons.get(save, "it is in flight") for save in report.in_flight}
    if store.local_path is not None and not writer and not report.blocked:
        garbage.files = _remove_unfinished(store.local_path, time.time() - idle_s, dry_run=dry_run)
    return garbage


def _remove_unfinished(root: Path, before: float, *, dry_run: bool) -> dict[str, int]:
    """Removes files that were never finished and have not changed since `before`."""
    found = {}
    for path in sorted([*root.glob(".*.tmp-*"), *root.glob("*/.*.tmp-*")]):
        key = path.relative_to(root).as_posix()
        if not _UNFINISHED.match(key):
            continue
        with suppress(FileNotFoundError):  # finished after all
            try:
                status = path.lstat()
                if status.st_mtime <= before:
                    if not dry_run:
                        path.unlink()
                        with suppress(OSError):  # it held the last file of its tag, or not
                            path.parent.rmdir()
                    found[key] = status.st_size
            except PermissionError as exc:
                raise StorageError(
                    f"an unfinished file cannot be removed: {exc.strerror}",
                    where=str(path),
                    fix="let its owner run gc; all else was removed",
                ) from exc
    return found


def _busy_agent(store: Store) -> str:
    """Returns the agent of this node that still writes for a directory whose trainers may be gone; empty if none."""
    try:
        folder = job_dir(job_key(store.url), create=False)
        status = ask_agent(folder, StatusRequest())
    except (MocError, ValueError):
        return ""
    if not isinstance(status, Status) or not any(
        item.queued or item.writing or item.committing for item in status.ranks
    ):
        return ""
    return f"the agent of job {status.job} (process {status.pid} on {status.node})"


# ---- shared memory ----


@dataclass(frozen=True, slots=True)
class ArenaGarbage:
    """Shared memory of a job of this user on this node.

    Attributes:
        path: the directory of a job, or one arena.
        nbytes: memory that it takes.
        stays: why it was left alone; empty if it was removed, or with a dry run would be.
    """

    path: Path
    nbytes: int
    stays: str = ""


def collect_arenas(store: Store, newest: int | None, *, dry_run: bool = False) -> list[ArenaGarbage]:
    """Removes arenas that nobody can use any more: those of unnamed jobs that are over, and of the directory's own job.

    The latter only if it is over and holds nothing newer than the newest checkpoint: what it holds else is what a
    restart would recover.

    Args:
        store: the checkpoint root.
        newest: step of its newest checkpoint; None if there is none.
        dry_run: remove nothing.

    Raises:
        StorageError: if the directory for shared memory is not this user's own, or something cannot be removed.
    """
    found = []
    for folder in sorted(forsaken(job_dir("any", create=False).parent)):
        nbytes = sum(map(_memory, find_arenas(folder)))
        if not dry_run and is_over(folder):
            try:
                shutil.rmtree(folder)
            except OSError as exc:
                _fail(exc, folder)
        found.append(ArenaGarbage(folder, nbytes))
    try:
        own = job_dir(job_key(store.url), create=False)
    except ValueError:
        return found
    for path in find_arenas(own):
        reason = _why_it_stays(own, path, store.url, newest)
        nbytes = _memory(path)
        if not reason and not dry_run:
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                _fail(exc, path)
        found.append(ArenaGarbage(path, nbytes, reason))
    return found


def _why_it_stays(folder: Path, path: Path, url: str, newest: int | None) -> str:
    try:
        pid = writer_pid(path)
        if pid is not None:
            return f"process {pid or 'of another container'} writes it"
        if not is_over(folder):
            return "the job's agent, or another rank, lives"
    except (OSError, StorageError) as error:
        return f"whether it is in use cannot be told: {error}"
    held = read_holdings(path)
    if held.error:
        return ""  # unfinished or damaged: no run can use it
    try:
        with Arena.open(path) as arena:
            other = arena.identity.url
    except MocError as error:
        return error.what
    if other not in (None, url):
        return f"it is of a run that saves into {other}"
    steps = [step for step in (*held.dense, held.newest) if step is not None]
    if steps and (newest is None or max(steps) > newest):
        storage = "nothing" if newest is None else f"step {newest:,}"
        return f"it holds step {max(steps):,}, storage {storage}: a restarted run may recover it"
    return ""


def _memory(path: Path) -> int:
    """Returns the memory that a sparse file takes."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _fail(exc: OSError, path: Path) -> None:
    raise StorageError(
        f"an arena cannot be removed: {exc.strerror}", where=str(path), fix="look who owns it; other files were removed"
    ) from exc
