"""The optimisation behind `plan_cycle`: bounds, a first schedule, local search, branch and bound. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._exact import Tree
from moc_ckpt.pec._grid import Grid, Layer, Slots
from moc_ckpt.pec._problem import Problem, joint_groups
from moc_ckpt.pec._search import improve
from moc_ckpt.pec.bounds import crowd_bound, rank_bounds

__all__ = ["Solution", "solve"]

_Ints = npt.NDArray[np.int64]

# Effort is counted in cells looked at, never in seconds: every rank must come to the same schedule.
_MAX_CELLS = 2**21
_SEARCH_WORK = 4_000_000
_SEARCH_WORK_PER_EXPERT = 6_000
_TREE_WORK = 60_000_000
_TREE_NODES = 20_000
_NODE_WORK = 3000
_TREE_EXPERTS = 256  # the tree is this deep, and Python's stack is finite
_RANKS_PROVEN = 32


@dataclass(slots=True)
class Solution:
    """A schedule and what is known of it.

    Attributes:
        slots: per layer of the problem, the window of each pending expert.
        peak: its most loaded rank over all steps, bytes; an upper bound where cycles were not followed step by step.
        bound: no schedule is below this, bytes.
    """

    slots: Slots
    peak: int
    bound: int


@dataclass(slots=True)
class _State:
    """The best schedule so far."""

    problem: Problem
    groups: list[list[int]]
    grids: list[Grid]
    bound: int
    peak: int = 0
    best: list[Slots] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.peak <= self.bound

    def restart(self) -> None:
        """Puts the best schedule back into the grids."""
        for grid, slots in zip(self.grids, self.best, strict=True):
            grid.place(slots)

    def meet(self) -> int:
        """Gives each grid the largest loads of the others as its base; returns the bottleneck."""
        own = [grid.own_peaks() for grid in self.grids]
        total = self.problem.base + sum(own) if own else self.problem.base
        for grid, peaks in zip(self.grids, own, strict=True):
            grid.rebase(total - peaks)
        return max(int(total.max(initial=0)), self.problem.floor)

    def note(self) -> bool:
        """Keeps the grids' schedule if it is the best; returns whether it is."""
        peak = self.meet()
        if self.best and peak >= self.peak:
            return False
        self.peak, self.best = peak, [grid.copy_slots() for grid in self.grids]
        return True


def solve(problem: Problem) -> Solution:
    """Finds a schedule with a bottleneck as low as it can, and a bound as high as it can.

    Args:
        problem: what to schedule.
    """
    bounds = rank_bounds(problem)
    groups = joint_groups(problem, _MAX_CELLS)
    grids = [
        Grid([problem.layers[index] for index in group], problem.base, problem.period(group), problem.repeat)
        for group in groups
    ]
    state = _State(problem, groups, grids, max(int(bounds.max(initial=0)), crowd_bound(problem)))
    work = _SEARCH_WORK + _SEARCH_WORK_PER_EXPERT * sum(layer.size for layer in problem.layers)
    for attempt, (order, ever_first) in enumerate(_orders(problem)):
        for group, grid in zip(groups, grids, strict=True):
            grid.rebase(problem.base)
            grid.fill([group.index(layer) for layer in order if layer in group], ever_first)
        state.note()
        if not state.done:
            _search(state, state.bound, work if attempt == 0 else work // 2)
        if not state.done and attempt == 0:
            _prove_ranks(state, bounds)
            _prove_all(state)
        if state.done:
            break
    else:
        _bisect(state, work // 2)
        _prove_ranks(state, bounds)
    slots: Slots = [np.zeros(0, dtype=np.int64)] * len(problem.layers)
    for group, found in zip(groups, state.best, strict=True):
        for index, windows in zip(group, found, strict=True):
            slots[index] = windows
    return Solution(slots, state.peak, state.bound)


def _orders(problem: Problem) -> list[tuple[list[int], bool]]:
    """Returns ways to place the layers at first: their order, and `ever_first` of `Grid.fill`.

    Each leaves room of another kind, which matters most if cycles differ.
    """
    given = list(range(len(problem.layers)))
    longest = sorted(given, key=lambda index: -problem.layers[index].cycle)
    shortest = sorted(given, key=lambda index: problem.layers[index].cycle)
    return [(given, False), (longest, True), (shortest, False), (given[::-1], False)]


def _search(state: _State, cap: int, work: int) -> bool:
    """Local search for a schedule with no load above `cap`, group by group; returns whether it found one."""
    sweeps = 1 if len(state.grids) == 1 else 4
    for sweep in range(sweeps):
        for grid in state.grids:
            state.meet()
            improve(grid, cap, work // (sweeps * len(state.grids)), seed=sweep)
            state.note()
            if state.peak <= cap:
                return True
    return False


def _bisect(state: _State, work: int) -> None:
    """Local search for the lowest cap that it can meet, between the bound and the best schedule."""
    low = state.bound
    state.restart()
    while low + 1 < state.peak and work > _SEARCH_WORK // 8:
        middle = (low + state.peak) // 2
        if not _search(state, middle, work):
            low = middle
        work = work * 2 // 3


def _tree_nodes(layers: Sequence[Layer], world: int, period: int) -> int:
    """Returns how many nodes a tree of this size may have; 0 if it is too large to be worth it."""
    experts = sum(layer.size for layer in layers)
    steps = max((layer.cycle for layer in layers), default=0)
    if experts > _TREE_EXPERTS:
        return 0
    nodes = _TREE_WORK // (_NODE_WORK + 2 * world * (experts * steps + period))
    return min(nodes, _TREE_NODES) if nodes > 3 * experts else 0


def _prove_ranks(state: _State, bounds: _Ints) -> None:
    """Raises the bound by what single ranks can reach at best, all others left out."""
    problem = state.problem
    seen: set[bytes] = set()
    for rank in np.argsort(-bounds, kind="stable").tolist():
        if state.done or len(seen) >= _RANKS_PROVEN:
            return
        layers = [_only(layer, rank) for layer in problem.layers]
        layers = [layer for layer in layers if layer.size and layer.cycle]
        key = b"".join(np.sort(layer.table[:, 0]).tobytes() + bytes([255]) for layer in layers)
        key += int(problem.base[rank]).to_bytes(8, "little")
        if key in seen:
            continue
        seen.add(key)
        _prove_rank(state, layers, problem.base[rank : rank + 1])


def _prove_rank(state: _State, layers: list[Layer], base: _Ints) -> None:
    cycles = [layer.cycle for layer in layers]
    period = math.lcm(*cycles) if state.problem.repeat else max(cycles, default=0)
    nodes = _tree_nodes(layers, len(base), period)
    if not nodes:
        return
    outcome, _ = Tree(layers, base, period, state.problem.repeat).run(state.bound, nodes)
    if outcome != "none":
        return
    # The rank's own optimum is between the bound and the best schedule.
    low, high = state.bound, state.peak
    while True:
        tree = Tree(layers, base, period, state.problem.repeat)
        outcome, slots = tree.run(high - 1, nodes)
        if outcome == "none":
            state.bound = max(state.bound, high)
            return
        if outcome == "limit":
            state.bound = max(state.bound, low + 1)
            return
        grid = Grid(layers, base, period, state.problem.repeat)
        grid.place(slots)
        high = grid.peak()


def _prove_all(state: _State) -> None:
    """Branch and bound over everything: improves the schedule or proves that nothing can."""
    if len(state.grids) != 1:
        return
    grid = state.grids[0]
    nodes = _tree_nodes(grid.layers, grid.world, grid.period)
    while nodes > 0 and not state.done:
        tree = Tree(grid.layers, state.problem.base, grid.period, grid.repeat)
        outcome, slots = tree.run(state.peak - 1, nodes)
        nodes -= tree.nodes
        if outcome == "none":
            state.bound = state.peak
        if outcome != "found":
            return
        grid.place(slots)
        state.note()


def _only(layer: Layer, rank: int) -> Layer:
    """Returns a layer as one rank sees it: the experts that it owns something of."""
    column = np.flatnonzero(layer.columns == rank)
    sizes = layer.table[:, column[0]] if len(column) else np.zeros(0, dtype=np.int64)
    sizes = sizes[sizes > 0]
    count = len(sizes)
    zeros = np.zeros(count, dtype=np.int64)
    return Layer.build(layer.cycle, layer.limit, count, 1, np.arange(count), zeros, sizes)
