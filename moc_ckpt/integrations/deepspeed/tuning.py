"""K and the intervals that apply now, and the measurements that `auto` is decided from (DESIGN section 12)."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from moc_ckpt.config import MocConfig
from moc_ckpt.integrations.deepspeed.rounds import Tally
from moc_ckpt.pec.k_values import AUTO, K
from moc_ckpt.plan.adaptive import Decision, Interval, Measured, Settings, decide, reconsider
from moc_ckpt.snapshot.stager import CopyJob

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.host import Host
    from moc_ckpt.integrations.deepspeed.pec import PartialExperts

__all__ = ["Tuner"]

logger = logging.getLogger("moc_ckpt")

_STEPS = 16
# The first steps compile and allocate: nothing is decided from them.
_WARM_UP = 5
# Until it was measured, `auto` takes a snapshot at every step: it is over after a few.
_FIRST_INTERVAL = 1
_FIRST_PERSIST = 10
# At the beginning of a step the device waits for the host, kernel by kernel; later the host is ahead. Only then does
# work of other threads, some milliseconds of the interpreter, cost training nothing. (share of the step, seconds at
# most) by which a vote begins later, and a snapshot's copies: far less than what a decision about K leaves free.
_VOTE_HOLD_BACK = (0.25, 0.1)
_COPY_HOLD_BACK = (0.03, 0.01)


class Tuner:
    """Decides when snapshots and persists are due, equally on all ranks, and measures what that depends on.

    Args:
        config: the validated configuration.
        pec: the experts' side.
        host: the node's side: what a snapshot takes, and how much memory there is.
        rank: this rank; rank 0 logs.

    Attributes:
        k: K of snapshots per MoE layer; `auto` means all.
        snapshot_interval: steps; 0: none.
        persist_interval: steps; 0: none.
        skipped: snapshots and persists that were skipped.
        stall_s: seconds that the training thread lost since the last report.
        decision: the last decision of what is `auto`; None before the first, or if nothing is.
    """

    def __init__(self, config: MocConfig, pec: PartialExperts, host: Host, rank: int) -> None:
        device = host.device
        self._config = config
        self._pec = pec
        self._ownership = host.ownership
        self._host = host
        self._rank = rank
        self._device = device if device.type == "cuda" else None
        self._auto = (
            config.selection != "full" and config.k_snapshot == AUTO and config.snapshot_interval != 0,
            config.snapshot_interval == AUTO,
            config.persist_interval == AUTO,
        )
        self.k: K = config.k_snapshot if host.max_k >= max(pec.full_k, default=1) else host.max_k
        self.snapshot_interval = self._first(config.snapshot_interval, _FIRST_INTERVAL)
        self.persist_interval = self._first(config.persist_interval, _FIRST_PERSIST)
        self.skipped = 0
        self.stall_s = 0.0
        self.decision: Decision | None = None
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._compute: deque[float] = deque(maxlen=_STEPS)
        self._seen = 0
        self._ended: float | None = None
        self._in_step = 0.0
        self._boundary: Any = None
        self._marks: tuple[Any, Any] | None = None
        self._copy_rates: deque[float] = deque(maxlen=_STEPS // 2)
        self._persist_rate = 0
        self.last_copy: tuple[int, float] = (0, 0.0)

    @staticmethod
    def _first(interval: Interval, auto: int) -> int:
        return auto if interval == AUTO else int(interval)

    def due(self, step: int) -> tuple[bool, bool]:
        """Tells whether a snapshot and a persist are due after a step; a persist brings its own snapshot."""
        snapshot = self.snapshot_interval > 0 and step % self.snapshot_interval == 0
        persist = self.persist_interval > 0 and step % self.persist_interval == 0
        return snapshot, persist

    # ------------------------------------------------------------------------------------------ measuring

    def step_ended(self) -> None:
        """Is called at the end of every optimizer step, before anything else is done."""
        now = time.perf_counter()
        if self._ended is not None:
            self._seen += 1
            if self._seen > _WARM_UP:
                self._steps.append(max(now - self._ended - self._in_step, 1e-6))
        self._ended, self._in_step = now, 0.0
        if self._device is not None and any(self._auto):
            if self._marks is not None and self._marks[1].query():
                self._compute.append(self._marks[0].elapsed_time(self._marks[1]) / 1000)
                self._marks = None
            self._boundary = torch.cuda.Event(enable_timing=True)
            self._boundary.record()

    def update_begins(self) -> None:
        """Is called right before the optimizer's update."""
        if self._ended is None or self._seen < _WARM_UP:
            return
        if self._device is None:
            self._compute.append(max(time.perf_counter() - self._ended - self._in_step, 1e-6))
        elif self._boundary is not None and self._marks is None:
            # The host runs ahead of the device, so the device's clock is asked.
            after = torch.cuda.Event(enable_timing=True)
            after.record()
            self._marks, self._boundary = (self._boundary, after), None

    def stalled(self, seconds: float) -> None:
        """Takes in that the training thread waited."""
        self.stall_s += seconds

    def take_stall(self) -> float:
        """Returns the seconds that the training thread lost since the last call."""
        seconds, self.stall_s = self.stall_s, 0.0
        return seconds

    def snapshot_took(self, seconds: float) -> None:
        """Takes in what deciding and scheduling a snapshot cost the training thread."""
        self.stall_s += seconds
        self._in_step += seconds

    def copied(self, job: CopyJob) -> None:
        """Takes in a snapshot's copies; any thread."""
        if job.seconds > 0 and job.nbytes:
            self._copy_rates.append(job.nbytes / job.seconds)
            self.last_copy = (job.nbytes, job.seconds)

    def persisted(self, nbytes: int, seconds: float) -> None:
        """Takes in a persist that was committed: what this rank wrote, and how long it took; any thread."""
        if seconds > 0 and nbytes:
            self._persist_rate = max(int(nbytes / seconds), 1)

    def rates(self) -> dict[str, int]:
        """Returns what this rank adds to a vote."""
        return {
            # One slow copy is no reason to change K: the windows would have to be planned anew, back and forth.
            "copy_rate": int(statistics.median(self._copy_rates)) if self._copy_rates else 0,
            "persist_rate": self._persist_rate,
            # What snapshots slow down must not make room for larger ones: the quicker steps count.
            "compute_us": _micros(self._compute, 0.25),
            "step_us": _micros(self._steps, 0.5),
        }

    @property
    def vote_hold_back_s(self) -> float:
        """Seconds to let pass before a vote's work begins. Any thread."""
        return self._hold_back(*_VOTE_HOLD_BACK)

    @property
    def copy_hold_back_s(self) -> float:
        """Seconds to let pass before a snapshot's copies begin; 0.0 where host memory is copied."""
        return self._hold_back(*_COPY_HOLD_BACK) if self._device is not None else 0.0

    def _hold_back(self, share: float, most_s: float) -> float:
        """Nothing until it is known how long a step takes."""
        return min(share * _micros(self._steps, 0.5) / 1e6, most_s)

    # ------------------------------------------------------------------------------------------ deciding

    def reconsider(self, tally: Tally) -> Decision | None:
        """Decides anew what is `auto`, if what was measured has changed; the same on all ranks. Changes nothing.

        May be called from the votes' thread, before `apply`.
        """
        if not any(self._auto) or not (tally.copy_rate and tally.compute_us and tally.step_us):
            return None
        measured = Measured(
            copy_bytes_per_s=float(tally.copy_rate),
            forward_backward_s=tally.compute_us / 1e6,
            step_s=tally.step_us / 1e6,
            persist_bytes_per_s=float(tally.persist_rate) if tally.persist_rate else None,
        )
        if self.decision is not None and not reconsider(self.decision, measured):
            return None
        config = self._config
        settings = Settings(
            experts=max(self._pec.full_k, default=0),
            k_snapshot=config.k_snapshot if config.selection != "full" else max(self._pec.full_k, default=1),
            k_persist=config.k_persist,
            snapshot_interval=config.snapshot_interval,
            persist_interval=config.persist_interval,
            mtbf_s=config.mtbf_s,
            k_min=max(1, self._pec.ledger.floor),
        )
        return decide(measured, settings, self._bottleneck)

    def k_after(self, decision: Decision | None) -> K:
        """Returns the K of snapshots once a decision applies; the present one without."""
        return self.k if decision is None or not self._auto[0] else min(max(1, decision.k), self._host.max_k)

    def apply(self, decision: Decision) -> bool:
        """Lets a decision apply from now on; tells whether anything is different."""
        before = (self.k, self.snapshot_interval, self.persist_interval)
        self.decision, self.k = decision, self.k_after(decision)
        self.snapshot_interval = decision.snapshot_interval if self._auto[1] else self.snapshot_interval
        self.persist_interval = decision.persist_interval if self._auto[2] else self.persist_interval
        changed = before != (self.k, self.snapshot_interval, self.persist_interval)
        if self._rank == 0:
            for reason in decision.reasons if changed else ():
                logger.info("auto: %s", reason)
        return changed

    def _bottleneck(self, k: int) -> int:
        """Returns about what the most loaded rank copies with K experts per layer: its even share of the windows.

        The optimum for each K would take a schedule for each; windows are balanced to a few per cent, and a decision
        leaves a margin.
        """
        ownership = self._ownership
        dense = ownership.dense
        every = ownership.loads(range(ownership.offsets[-1])) - dense
        share = min(1.0, k / max(ownership.experts, default=1))
        return int((dense + every * share).max())


def _micros(values: deque[float], share: float) -> int:
    if len(values) < _STEPS // 4:
        return 0
    return int(sorted(values)[int(share * len(values))] * 1e6)
