"""What people see of snapshots and asynchronous saves: the log, the event log, and DeepSpeed's monitor."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from moc_ckpt.events import EventKind
from moc_ckpt.integrations.deepspeed.report import bytes_text
from moc_ckpt.snapshot.stager import CopyJob

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.host import Host
    from moc_ckpt.integrations.deepspeed.in_flight import SaveInFlight
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint
    from moc_ckpt.integrations.deepspeed.tuning import Tuner

__all__ = ["PipelineReport"]

logger = logging.getLogger("moc_ckpt")

# A snapshot at every step for weeks would fill the log: between two lines they are only counted.
_QUIET_S = 60.0


class PipelineReport:
    """Reports for one pipeline. Thread-safe, but `flush` belongs to the training thread.

    Failures are reported by the rank that they happened on, everything else by rank 0.

    Args:
        moc: the engine's plugin.
        host: takes the events to the node's agent.
    """

    def __init__(self, moc: MocCheckpoint, host: Host) -> None:
        self._moc = moc
        self._host = host
        self._rank = moc.comm.rank
        self._urls: dict[str, int] = {}
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}
        self._snapshots = 0
        self._copied = 0
        self._copy_s = 0.0
        self._last_line = -_QUIET_S
        self._warned = False

    def opened(self, url: str, attempt: int) -> None:
        """Takes in where events belong: the directory that was opened last."""
        self._urls = {url: attempt}

    def snapshotted(self, step: int, job: CopyJob, experts: int, tuner: Tuner) -> None:
        """Reports a snapshot that is whole on this rank."""
        if self._rank:
            return
        with self._lock:
            self._snapshots += 1
            self._copied += job.nbytes
            self._copy_s += job.seconds
            rate = job.nbytes / job.seconds / 1e9 if job.seconds else 0.0
            self._values |= {"snapshot_bytes": job.nbytes, "copy_gb_per_s": rate, "snapshot_experts": experts}
            now = time.monotonic()
            if now - self._last_line < _QUIET_S:
                return
            count, copied, seconds = self._snapshots, self._copied, self._copy_s
            self._last_line, self._snapshots, self._copied, self._copy_s = now, 0, 0, 0.0
        self._event(
            EventKind.SNAPSHOTTED,
            step,
            snapshots=count,
            bytes=copied,
            seconds=seconds,
            experts=experts,
            runs=job.runs,
            stall_ms=1000 * tuner.stall_s,
        )

    def snapshot_failed(self, step: int, error: Exception) -> None:
        """Reports a snapshot that is not whole on this rank, and so of no use on any."""
        logger.warning("the snapshot of step %d failed on rank %d: %s", step, self._rank, error)
        self._event(EventKind.FAILED, step, what="snapshot", rank=self._rank, reason=str(error))

    def ended(self, save: SaveInFlight) -> None:
        """Reports how a save ended; the agent writes the events."""
        seconds = time.perf_counter() - save.began
        error = save.error()
        if error is not None:
            logger.warning("FAILED on rank %d: %s", self._rank, error)
            return
        if self._rank or save.outcome is None:
            return
        with self._lock:
            self._values |= {"checkpoint_seconds": seconds, "checkpoint_bytes": save.outcome.stored_bytes}
            self._values |= {"k": max(save.k, default=0)}
            if seconds and save.submitted:
                persist = time.perf_counter() - save.submitted
                self._values["persist_gb_per_s"] = save.nbytes / persist / 1e9
        total = sum(self._moc.pec.full_k)
        older = f", {len(save.experts)} of {total} experts" if len(save.experts) < total else ""
        logger.info(
            "COMMITTED %s: step %d, %s%s, %.2f s after its snapshot began, at %s",
            save.tag,
            save.step,
            bytes_text(save.outcome.stored_bytes),
            older,
            seconds,
            save.directory.store.url,
        )

    def skipped(self, step: int, what: str, reason: str) -> None:
        """Reports a snapshot or persist that did not begin."""
        if self._rank == 0:
            logger.info("SKIPPED the %s of step %d: %s", what, step, reason)
            self._event(EventKind.SKIPPED, step, what=what, reason=reason)

    def retuned(self, tuner: Tuner) -> None:
        """Reports that K or an interval has changed."""
        if self._rank == 0:
            every = [
                f"{what} every {steps} steps" if steps else f"{what}s with save_checkpoint only"
                for what, steps in (("snapshot", tuner.snapshot_interval), ("persist", tuner.persist_interval))
            ]
            logger.info("auto: K %s, %s", tuner.k, ", ".join(every))

    def not_opened(self, save_dir: str, error: Exception) -> None:
        """Reports that automatic checkpoints cannot begin now."""
        if self._rank == 0:
            logger.warning("no checkpoint: %s cannot be used now: %s", save_dir, error)

    def no_client_state(self) -> None:
        """Warns once that automatic checkpoints have no state of the caller."""
        if self._rank == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "automatic snapshots hold no client_state: a restore from one returns {}; "
                "engine.moc.register_state(fn) sets what gives it"
            )

    def broken(self, error: Exception) -> None:
        """Reports that this rank takes no more snapshots."""
        logger.error("no more snapshots on rank %d: %s", self._rank, error, exc_info=error)
        self._event(EventKind.FAILED, int(self._moc.engine.global_steps), rank=self._rank, reason=str(error))

    def flush(self, tuner: Tuner) -> None:
        """Hands what was measured since the last time to DeepSpeed's monitor."""
        if self._rank:
            return
        with self._lock:
            values, self._values = self._values, {}
        if values:
            self._moc.report.monitor({**values, "stall_ms": 1000 * tuner.take_stall(), "skipped": tuner.skipped})

    def _event(self, kind: EventKind, step: int, **fields: Any) -> None:
        for url, attempt in self._urls.items():
            self._host.event(url, kind.value, step, attempt=attempt, **fields)
