"""Which versions of the experts memory and each directory hold, as all ranks know them, and what to take next. Pure.

All ranks feed these tables the same decisions (invariant I7), so they are equal everywhere without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.rotation import Experts, Rotation, advance
from moc_ckpt.pec.selection import Held, choose_persist, fill
from moc_ckpt.pec.selector import Method, SaveHistory, Selection, after_save, select

__all__ = [
    "DirectoryVersions",
    "MemoryVersions",
    "Place",
    "largest_choice",
    "largest_window",
    "persist_history",
    "plan_persist",
    "plan_snapshot",
]

Place = tuple[int, int]
"""(layer, expert)."""


class MemoryVersions:
    """Versions of every expert that the arenas hold on all of its owners. Not thread-safe.

    Args:
        experts: number of experts of each MoE layer.

    Attributes:
        experts: number of experts of each MoE layer.
        confirmed: step of the newest snapshot that is known to be whole on every rank; -1 if none is.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        self.experts = tuple(experts)
        self._steps: dict[Place, list[int]] = {
            (layer, expert): [] for layer, count in enumerate(experts) for expert in range(count)
        }
        # Experts of which more than one version is held: the only ones that a confirmation concerns.
        self._several: set[Place] = set()
        self.confirmed = -1

    def took(self, step: int, places: Iterable[Place]) -> None:
        """Takes in that a snapshot of these experts was begun; steps only grow."""
        for place in places:
            steps = self._steps[place]
            if not steps:
                steps.append(step)
            elif steps[-1] < step:
                steps.append(step)
                self._several.add(place)

    def confirm(self, step: int) -> list[Place]:
        """Takes in that the snapshot of a step is whole everywhere.

        Returns:
            The experts of which an older version is not needed any more.
        """
        self.confirmed = max(self.confirmed, step)
        older = []
        for place in sorted(self._several):
            steps = self._steps[place]
            if len(steps) > 1 and steps[1] <= self.confirmed:
                while len(steps) > 1 and steps[1] <= self.confirmed:
                    del steps[0]
                older.append(place)
            if len(steps) < 2:
                self._several.discard(place)
        return older

    def drop(self, step: int) -> None:
        """Takes in that the snapshot of a step failed on some rank: nothing of it may be used."""
        for steps in self._steps.values():
            if step in steps:
                steps.remove(step)

    def newest(self, place: Place) -> int | None:
        """Returns the step of the newest version; None if there is none."""
        steps = self._steps[place]
        return steps[-1] if steps else None

    def at(self, step: int) -> set[Place]:
        """Returns the experts whose newest version is of this step."""
        return {place for place, steps in self._steps.items() if steps and steps[-1] == step}

    def steps(self) -> set[int]:
        """Returns all steps of which any expert is held."""
        return {step for steps in self._steps.values() for step in steps}

    @property
    def missing(self) -> frozenset[Place]:
        """Experts without any version: every snapshot takes them (invariant I5)."""
        return frozenset(place for place, steps in self._steps.items() if not steps)

    def stalest_first(self) -> list[Place]:
        """Returns all experts, those with the oldest newest version first."""
        return [
            place for _, place in sorted((steps[-1] if steps else -1, place) for place, steps in self._steps.items())
        ]

    def forget(self) -> None:
        """Forgets everything: the live state has become another one."""
        for steps in self._steps.values():
            steps.clear()
        self._several.clear()
        self.confirmed = -1


@dataclass(slots=True)
class DirectoryVersions:
    """What one directory holds of every expert, and what its saves have taken.

    Attributes:
        history: the saves so far.
        stored: step of the newest committed version of each expert; those without one are missing.
        failed: experts of saves that failed since: they go first.
        failures: saves that failed in a row.
    """

    history: SaveHistory
    stored: dict[Place, int] = field(default_factory=dict)
    failed: set[Place] = field(default_factory=set)
    failures: int = 0

    def committed(self, versions: Mapping[Place, int], history: SaveHistory) -> None:
        """Takes in that a save was committed: the step of each expert that it stored."""
        self.stored.update(versions)
        self.failed -= versions.keys()
        self.failures = 0
        self.history = history

    def lost(self, versions: Iterable[Place]) -> None:
        """Takes in that a save of these experts failed."""
        self.failed |= set(versions)
        self.failures += 1


def plan_snapshot(
    memory: MemoryVersions,
    history: SaveHistory,
    ledger: Ledger,
    ownership: Ownership,
    *,
    method: Method,
    k: Sequence[int],
    balance: bool,
) -> Selection:
    """Selects the experts of a snapshot (DESIGN section 6, invariant I5).

    Args:
        memory: what memory holds.
        history: what snapshots have taken so far.
        ledger: tokens as of the last vote.
        ownership: bytes of every expert on every rank.
        method: `sequential`, `load_aware` or `full`.
        k: K of each layer.
        balance: add experts, the stalest first, where every owner has room below the most loaded rank.
    """
    selection = select(history, ledger, ownership, method, k, memory.missing)
    if not balance or selection.k == ownership.experts:
        return selection
    offsets = ownership.offsets
    units = [offsets[layer] + expert for layer, expert in selection.places]
    order = [offsets[layer] + expert for layer, expert in memory.stalest_first()]
    filled = fill(ownership, units, order)
    if len(filled) == len(units):
        return selection
    experts = _by_layer(filled, offsets)
    after = after_save(history, selection.after.rotation, experts, ledger.learnt, ledger)
    return Selection(experts, selection.k, after)


def _by_layer(units: Iterable[int], offsets: Sequence[int]) -> Experts:
    found: list[list[int]] = [[] for _ in range(len(offsets) - 1)]
    for unit in units:
        layer = int(np.searchsorted(offsets, unit, side="right")) - 1
        found[layer].append(int(unit - offsets[layer]))
    return tuple(tuple(sorted(experts)) for experts in found)


def largest_window(ownership: Ownership, k: Sequence[int], rank: int, *, method: Method, balance: bool) -> int:
    """Returns the bytes of experts that the largest snapshot takes of one rank, the first one not counted.

    Args:
        ownership: bytes of every expert's slot on every rank.
        k: K of each layer.
        rank: the rank.
        method: `sequential`, `load_aware` or `full`.
        balance: snapshots are filled up to the most loaded rank.
    """
    mine = np.zeros(ownership.offsets[-1], dtype=np.int64)
    own = ownership.rank == rank
    mine[ownership.unit[own]] = ownership.nbytes[own]
    if method == "full" or tuple(k) == ownership.experts:
        return int(mine.sum())
    if method == "load_aware":
        # Any K experts of a layer may be the busiest.
        largest = largest_choice(ownership, k, rank)
        if balance:
            loads = [
                int(ownership.dense[other]) + largest_choice(ownership, k, other) for other in range(ownership.world)
            ]
            largest = max(largest, max(loads) - int(ownership.dense[rank]))
        return min(largest, int(mine.sum()))
    rotation, largest = Rotation(), 0
    for _ in range(max(-(-experts // count) for experts, count in zip(ownership.experts, k, strict=True))):
        picked, rotation = advance(rotation, ownership, k)
        units = [ownership.offsets[layer] + expert for layer, experts in enumerate(picked) for expert in experts]
        largest = max(largest, int(mine[units].sum()))
        if balance:
            largest = max(largest, int(ownership.loads(units).max() - ownership.dense[rank]))
    return min(largest, int(mine.sum()))


def largest_choice(ownership: Ownership, k: Sequence[int], rank: int) -> int:
    """Returns the most bytes that any K experts of each layer take of one rank, as a persist may choose them.

    Args:
        ownership: bytes of every expert's slot on every rank.
        k: K of each layer.
        rank: the rank.
    """
    own = ownership.rank == rank
    mine = np.zeros(ownership.offsets[-1], dtype=np.int64)
    mine[ownership.unit[own]] = ownership.nbytes[own]
    layers = zip(ownership.offsets, ownership.offsets[1:], k, strict=False)
    return sum(int(np.sort(mine[first:last])[::-1][:count].sum()) for first, last, count in layers)


def plan_persist(
    memory: MemoryVersions, directory: DirectoryVersions, k: Sequence[int], *, full: bool
) -> dict[Place, int]:
    """Chooses what a persist takes: the step of each expert's version (DESIGN section 6).

    Args:
        memory: what memory holds, the snapshot of the persist's own step included.
        directory: what the directory holds.
        k: K_persist of each layer.
        full: take every expert of which memory has something newer.
    """
    chosen: dict[Place, int] = {}
    for layer, count in enumerate(k):
        total = memory.experts[layer]
        held = [
            Held(
                expert,
                directory.stored.get((layer, expert)),
                memory.newest((layer, expert)),
                (layer, expert) in directory.failed,
            )
            for expert in range(total)
        ]
        for expert in choose_persist(held, total if full else count):
            step = memory.newest((layer, expert))
            assert step is not None
            chosen[layer, expert] = step
    return chosen


def persist_history(
    directory: DirectoryVersions,
    rotation: Rotation,
    versions: Mapping[Place, int],
    ledger: Ledger,
    learnt_at: Callable[[int], Sequence[np.ndarray]],
) -> SaveHistory:
    """Returns the history of a directory once a persist is committed.

    Args:
        directory: the directory.
        rotation: where the snapshots' rotation is.
        versions: the step of each expert that it stores.
        ledger: tokens at the persist's step.
        learnt_at: per layer, [experts] tokens that the state of a step has learnt.
    """
    experts: list[list[int]] = [[] for _ in ledger.processed]
    learnt = [tokens.copy() for tokens in ledger.learnt]
    for (layer, expert), step in versions.items():
        experts[layer].append(expert)
        learnt[layer][expert] = learnt_at(step)[layer][expert]
    chosen = tuple(tuple(sorted(found)) for found in experts)
    return after_save(directory.history, rotation, chosen, learnt, ledger)
