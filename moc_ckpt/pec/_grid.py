"""The loads of every step and rank while a schedule is being made. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Grid", "Layer", "Slots"]

_Ints = npt.NDArray[np.int64]
_HUGE = np.iinfo(np.int64).max

Slots = list[_Ints]
"""Per layer, the window of each pending expert."""


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """The pending experts of one layer and their shares.

    Attributes:
        cycle: number of windows.
        limit: the most experts of a window.
        columns: [C] ranks that own something of the layer, ascending.
        table: [experts, C] bytes of each expert on those ranks.
        ranks: [experts, D] the ranks of each expert, padded with the number of ranks.
        nbytes: [experts, D] its bytes there, padded with 0.
    """

    cycle: int
    limit: int
    columns: _Ints
    table: _Ints
    ranks: _Ints
    nbytes: _Ints

    @classmethod
    def build(cls, cycle: int, limit: int, size: int, world: int, expert: _Ints, rank: _Ints, nbytes: _Ints) -> Layer:
        """Builds it from shares sorted by expert.

        Args:
            cycle: number of windows.
            limit: the most experts of a window.
            size: number of experts.
            world: number of ranks.
            expert: [M] expert of each share.
            rank: [M] its rank; an expert has at most one share on a rank.
            nbytes: [M] its bytes.
        """
        columns, column = np.unique(rank, return_inverse=True)
        table = np.zeros((size, len(columns)), dtype=np.int64)
        table[expert, column] = nbytes
        shares = np.bincount(expert, minlength=size)
        place = np.arange(len(expert)) - (np.cumsum(shares) - shares)[expert]
        shape = (size, int(shares.max(initial=0)))
        ranks, sizes = np.full(shape, world, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        ranks[expert, place] = rank
        sizes[expert, place] = nbytes
        return cls(cycle, limit, columns, table, ranks, sizes)

    @property
    def size(self) -> int:
        """Number of pending experts."""
        return len(self.ranks)


class Grid:
    """Loads [period, ranks] of a schedule that may still lack experts. Changed in place; not thread-safe.

    Row t is step t. A layer that repeats has its window s in the rows s, s + cycle, s + 2 * cycle, …; one that runs
    once has it in row s alone.

    Attributes:
        layers: the layers.
        base: [ranks] bytes of every step, or [period, ranks] of each.
        repeat: whether the windows repeat.
        period: number of rows.
        loads: [period, ranks + 1] bytes; the last column takes the padding of shares and means nothing.
        slots: per layer [experts] the window of each expert; -1 if it has none yet.
        counts: per layer [cycle] experts in each window.
        views: per layer [rows of a window, windows, ranks + 1] the same memory as `loads`.
    """

    def __init__(self, layers: Sequence[Layer], base: _Ints, period: int, repeat: bool) -> None:
        self.layers = tuple(layers)
        self.base = base.copy()
        self.repeat = repeat
        self.period = period
        self.world = len(base)
        self.loads = np.zeros((period, self.world + 1), dtype=np.int64)
        self.loads[:, : self.world] = base
        self.slots: Slots = [np.full(layer.size, -1, dtype=np.int64) for layer in self.layers]
        self.counts = [np.zeros(layer.cycle, dtype=np.int64) for layer in self.layers]
        self.views = [
            self.loads.reshape(-1, layer.cycle if repeat else period, self.world + 1) for layer in self.layers
        ]

    def peak(self) -> int:
        """Returns the largest load, bytes."""
        return int(self.loads[:, : self.world].max(initial=0))

    def own(self) -> _Ints:
        """Returns [period, ranks] the loads without the base, bytes."""
        found: _Ints = self.loads[:, : self.world] - self.base
        return found

    def rebase(self, base: _Ints) -> None:
        """Takes another base, [ranks] or [period, ranks] bytes."""
        self.loads[:, : self.world] += base - self.base
        self.base = base.copy()

    def copy_slots(self) -> Slots:
        """Returns a copy of the schedule."""
        return [slots.copy() for slots in self.slots]

    def shift(self, layer: int, expert: int, slot: int) -> None:
        """Moves an expert into a window; -1 takes it out of the schedule."""
        plan, view, counts = self.layers[layer], self.views[layer], self.counts[layer]
        old = int(self.slots[layer][expert])
        ranks, nbytes = plan.ranks[expert], plan.nbytes[expert]
        if old >= 0:
            view[:, old, ranks] -= nbytes
            counts[old] -= 1
        if slot >= 0:
            view[:, slot, ranks] += nbytes
            counts[slot] += 1
        self.slots[layer][expert] = slot

    def place(self, slots: Slots) -> None:
        """Takes over a schedule in which every expert has a window."""
        self.loads[:] = 0
        self.loads[:, : self.world] = self.base
        for layer, plan in enumerate(self.layers):
            self.slots[layer] = slots[layer].copy()
            self.counts[layer] = np.bincount(slots[layer], minlength=plan.cycle)
            windows = np.zeros((plan.cycle, self.world + 1), dtype=np.int64)
            np.add.at(windows, (slots[layer][:, None], plan.ranks), plan.nbytes)
            self.views[layer][:, : plan.cycle] += windows

    def clear(self) -> None:
        """Takes every expert out of the schedule."""
        self.loads[:] = 0
        self.loads[:, : self.world] = self.base
        for slots, counts in zip(self.slots, self.counts, strict=True):
            slots[:] = -1
            counts[:] = 0

    def fill(self, order: Sequence[int], ever_first: bool = False) -> None:
        """Gives every expert a window, layer by layer, large experts first: greedy.

        Two things are kept low: the loads of the expert's ranks in the steps that the window is in, and what the
        layers of this cycle length ever add to a step, because layers of other cycle lengths meet that (of windows
        that are alike modulo the common divisor, they meet all alike).

        Args:
            order: the layers, each once.
            ever_first: whether the second comes first.
        """
        self.clear()
        cycles = {layer.cycle for layer in self.layers}
        apart = {cycle: np.zeros((cycle, self.world + 1), dtype=np.int64) for cycle in cycles}
        for layer in order:
            plan, view, counts = self.layers[layer], self.views[layer], self.counts[layer]
            common = math.gcd(plan.cycle, math.lcm(*(cycles - {plan.cycle})))
            mixed = self.repeat and len(cycles) > 1 and common < plan.cycle
            windows = np.arange(plan.cycle)
            for expert in np.argsort(-plan.nbytes.max(axis=1, initial=0), kind="stable").tolist():
                ranks, nbytes = plan.ranks[expert], plan.nbytes[expert]
                peaks = (view[:, : plan.cycle, ranks] + nbytes).max(axis=2, initial=0).max(axis=0)
                peaks[counts >= plan.limit] = _HUGE
                slot = int(peaks.argmin())
                if mixed:
                    own = apart[plan.cycle][:, ranks]
                    ever = own.reshape(plan.cycle // common, common, len(ranks)).max(axis=0)[windows % common]
                    rises = (np.maximum(own + nbytes, ever) - ever).sum(axis=1)
                    rises[counts >= plan.limit] = _HUGE
                    slot = int(np.lexsort((peaks, rises) if ever_first else (rises, peaks))[0])
                    apart[plan.cycle][slot, ranks] += nbytes
                self.shift(layer, expert, slot)
