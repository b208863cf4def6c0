"""How much shared memory a rank needs for its snapshots (DESIGN section 8). Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from moc_ckpt.errors import ConfigError

__all__ = ["ArenaNeed", "apply_budget", "arena_need", "largest_selection"]

# The slots of an arena are whole pages (moc_ckpt.snapshot.records), and its head is small.
_PAGE = 4096
_HEAD = 3 * _PAGE
_RECORD = 512


@dataclass(frozen=True, slots=True)
class ArenaNeed:
    """What one rank's arena must hold; all sizes are bytes in whole pages.

    Versions of the experts that may be in memory at once: the newest confirmed one of each (N), the snapshot before
    this one, which the other ranks have not confirmed yet (K), this one (K), and what a persist still reads although
    it is superseded (pins). Dense state likewise: three copies and the pinned one. The newest committed version of
    everything is one copy more.

    Attributes:
        unit_count: expert units that this rank owns part of.
        expert_bytes: one version of all of them.
        window_bytes: the largest selection of a snapshot.
        pins_bytes: the most that a persist pins of the experts.
        dense_bytes: one version of the dense state.
        pinned_dense: dense versions that persists pin at once.
        keep_committed: whether the newest committed version of everything stays.
    """

    unit_count: int
    expert_bytes: int
    window_bytes: int
    pins_bytes: int
    dense_bytes: int
    pinned_dense: int
    keep_committed: bool

    @property
    def dense_copies(self) -> int:
        """Dense versions in memory at once."""
        return 3 + self.pinned_dense + self.keep_committed

    @property
    def dense(self) -> int:
        """Bytes of the dense region."""
        return self.dense_copies * self.dense_bytes

    @property
    def experts(self) -> int:
        """Bytes of the experts region."""
        return (1 + self.keep_committed) * self.expert_bytes + 2 * self.window_bytes + self.pins_bytes

    @property
    def slots(self) -> int:
        """Number of slots; with every dense version goes one `extra` slot."""
        return (4 + self.keep_committed) * self.unit_count + 2 * self.dense_copies + 2

    @property
    def total(self) -> int:
        """Bytes of shared memory that are reserved at start."""
        return _HEAD + _rounded(self.slots * _RECORD) + self.dense + self.experts

    @property
    def formula(self) -> str:
        """How the total comes about, for people."""
        kept = f" + {_size(self.expert_bytes)} (committed)" if self.keep_committed else ""
        pins = f" + {_size(self.pins_bytes)} (persist)" if self.pins_bytes else ""
        return (
            f"experts {_size(self.expert_bytes)} (N) + 2 x {_size(self.window_bytes)} (K){pins}{kept}, "
            f"dense {self.dense_copies} x {_size(self.dense_bytes)}: {_size(self.total)}"
        )


def largest_selection(expert_bytes: Mapping[str, int], selections: Iterable[Collection[str]]) -> int:
    """Returns the most bytes that one of the selections takes in this rank's arena.

    Args:
        expert_bytes: bytes of each expert unit that this rank owns part of.
        selections: unit names of each snapshot; units of other ranks count nothing.
    """
    return max((sum(_rounded(expert_bytes.get(unit, 0)) for unit in units) for units in selections), default=0)


def arena_need(
    expert_bytes: Mapping[str, int],
    window_bytes: int,
    dense_bytes: int,
    *,
    pins_bytes: int = 0,
    pinned_dense: int = 0,
    keep_committed: bool = False,
) -> ArenaNeed:
    """Returns what a rank needs so that no snapshot lacks room while at most one persist runs.

    Args:
        expert_bytes: bytes of each expert unit that this rank owns part of.
        window_bytes: bytes of the largest selection of a snapshot on this rank (`largest_selection`). A first
            snapshot, of everything, needs no more: nothing else is in memory then.
        dense_bytes: bytes of this rank's dense state.
        pins_bytes: the most bytes of experts that a persist reads (`largest_selection`).
        pinned_dense: 1 if dense state is persisted while snapshots go on, else 0.
        keep_committed: also keep the newest committed version of everything.

    Raises:
        ValueError: if a size is negative.
    """
    sizes = (*expert_bytes.values(), window_bytes, dense_bytes, pins_bytes, pinned_dense)
    if min(sizes) < 0:
        raise ValueError("the sizes of an arena must not be negative")
    everything = sum(map(_rounded, expert_bytes.values()))
    return ArenaNeed(
        unit_count=len(expert_bytes),
        expert_bytes=everything,
        window_bytes=min(_rounded(window_bytes), everything),
        pins_bytes=min(_rounded(pins_bytes), everything),
        dense_bytes=_rounded(dense_bytes),
        pinned_dense=pinned_dense,
        keep_committed=keep_committed,
    )


def apply_budget(need: ArenaNeed, budget_bytes: int | None) -> ArenaNeed:
    """Returns what is affordable: the need itself, or the need without the committed versions.

    Args:
        need: what one rank wants.
        budget_bytes: what it may take; None for no limit.

    Raises:
        ConfigError: if even the smallest need exceeds the budget.
    """
    if budget_bytes is None or need.total <= budget_bytes:
        return need
    least = replace(need, keep_committed=False)
    if least.total <= budget_bytes:
        return least
    raise ConfigError(
        f"snapshots need {_size(least.total)} of host memory on this rank, the budget is {_size(budget_bytes)}",
        where=f"host.memory_budget_gib; {least.formula}",
        fix="raise the budget, lower k_snapshot or k_persist, or do without snapshots in memory: save_mode durable "
        "with snapshot_interval 0",
    )


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
