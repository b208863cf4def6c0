"""What K and the intervals are decided from, and what a decision is (MoC-System, sections 2.3, 5.3 and 6.2.5). Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from moc_ckpt.errors import ConfigError
from moc_ckpt.pec.k_values import AUTO, K

__all__ = ["Decision", "Interval", "KChoice", "Measured", "Overhead", "Settings", "WindowBytes", "check_mtbf"]

Interval = int | Literal["auto"]
"""Steps between two snapshots or persists; 0: none."""
WindowBytes = Callable[[int], int] | Sequence[int]
"""Bytes that the most loaded rank saves with K experts per layer, dense state included; as a sequence, by K from 0."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run measured: for every field the worst of all ranks, so that the values are equal on all of them.

    Attributes:
        copy_bytes_per_s: device to host, of snapshots as they are taken.
        forward_backward_s: s per step in which a copy can hide: all micro-batches, without the update.
        step_s: s per step, without stalls of checkpointing.
        persist_bytes_per_s: host to storage, by rank, from the start of a persist until its commit; None: not measured.
        restart_s: s from a fault until training goes on, without the steps that are repeated; None: not known.
        stall_s: s of host time per snapshot that no copy explains (launching copies, bookkeeping).
        persist_cost_s: s that one persist slows the training down by.

    Raises:
        ValueError: if a value is not finite, or not positive (costs and restart: negative).
    """

    copy_bytes_per_s: float
    forward_backward_s: float
    step_s: float
    persist_bytes_per_s: float | None = None
    restart_s: float | None = None
    stall_s: float = 0.0
    persist_cost_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("persist_bytes_per_s", "restart_s"):
                continue
            zero = field.name in ("restart_s", "stall_s", "persist_cost_s")
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise ValueError(
                    f"{field.name} is {value}; it must be finite and {'not negative' if zero else 'above 0'}"
                )

    def minima(self) -> tuple[float, ...]:
        """Returns the values such that the element-wise minimum over ranks is the worst of them (one reduction)."""
        return tuple(
            math.inf if value is None else -value if name in _MAXIMA else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        )

    @classmethod
    def from_minima(cls, values: Sequence[float]) -> Measured:
        """Builds it from the element-wise minimum of all ranks' `minima`.

        Args:
            values: that minimum; infinity where no rank had measured a value.
        """
        given: dict[str, Any] = {}
        for field, value in zip(fields(cls), values, strict=True):
            given[field.name] = None if value == math.inf else abs(value) if field.name in _MAXIMA else value
        return cls(**given)


_MAXIMA = ("restart_s", "stall_s", "persist_cost_s")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user configured; `auto` is decided here, everything else is kept.

    Attributes:
        experts: N, experts of the largest MoE layer; 0 for a model without any.
        k_snapshot: experts per MoE layer in a snapshot.
        k_persist: experts per MoE layer in a persist; `auto`: as many as in a snapshot.
        snapshot_interval: steps; 0: no automatic snapshots.
        persist_interval: steps; 0: no automatic persists.
        mtbf_s: mean time between faults, s; None: not given.
        k_min: K is not chosen below (Dynamic-K's floor).

    Raises:
        ConfigError: naming a value that cannot be.
    """

    experts: int
    k_snapshot: K = AUTO
    k_persist: K = AUTO
    snapshot_interval: Interval = AUTO
    persist_interval: Interval = AUTO
    mtbf_s: float | None = None
    k_min: int = 1

    def __post_init__(self) -> None:
        for name, least in (("experts", 0), ("k_min", 0), ("k_snapshot", 1), ("k_persist", 1)):
            value = getattr(self, name)
            if value != AUTO and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}", where="adaptive configuration")
        for name in ("snapshot_interval", "persist_interval"):
            value = getattr(self, name)
            if value != AUTO and value < 0:
                raise ConfigError(f"{name} is {value}; it must be at least 0", where="adaptive configuration")
        check_mtbf(self.mtbf_s)


@dataclass(frozen=True, slots=True)
class KChoice:
    """A value of K and what its snapshots cost.

    Attributes:
        k: experts per MoE layer.
        nbytes: of the most loaded rank.
        copy_s: s of that rank's copy.
        exposed_s: s of it that do not hide behind forward and backward: O_save of equation 10.
        hides: it hides with the margin.
    """

    k: int
    nbytes: int
    copy_s: float
    exposed_s: float
    hides: bool


@dataclass(frozen=True, slots=True)
class Overhead:
    """What checkpointing is expected to cost, s per training step.

    Attributes:
        step_s: s per step without it.
        save_s: stalls of snapshots.
        persist_s: what persists slow the training down by.
        restart_s: restarts after faults; 0 without an MTBF or a known restart time.
        lost_memory_s: steps repeated after faults that leave the snapshots in host memory.
        lost_storage_s: steps repeated after faults that lose them, so that the last commit is used.
    """

    step_s: float
    save_s: float
    persist_s: float
    restart_s: float
    lost_memory_s: float
    lost_storage_s: float

    @property
    def share_memory(self) -> float:
        """The total as a share of the training time, if every fault leaves the snapshots in memory."""
        return (self.save_s + self.persist_s + self.restart_s + self.lost_memory_s) / self.step_s

    @property
    def share_storage(self) -> float:
        """The total as a share of the training time, if every fault loses them."""
        return (self.save_s + self.persist_s + self.restart_s + self.lost_storage_s) / self.step_s


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided, from what, and why.

    Attributes:
        k: experts per MoE layer in a snapshot.
        snapshot_interval: steps; 0: no automatic snapshots.
        persist_interval: steps; 0: no automatic persists.
        choice: K's costs.
        settings: what was configured.
        inputs: what was measured.
        overhead: what this is expected to cost.
        reasons: one sentence for each value, with its numbers, for the log.
    """

    k: int
    snapshot_interval: int
    persist_interval: int
    choice: KChoice
    settings: Settings
    inputs: Measured
    overhead: Overhead
    reasons: tuple[str, ...]


def check_mtbf(mtbf_s: float | None) -> None:
    """Refuses a mean time between faults (s) that is not above 0; ConfigError."""
    if mtbf_s is not None and not (math.isfinite(mtbf_s) and mtbf_s > 0):
        raise ConfigError(
            f"mtbf_s is {mtbf_s}; it must be above 0",
            where="moc_checkpoint.mtbf_s",
            fix="give the mean time between faults of the whole job in seconds, or null",
        )
