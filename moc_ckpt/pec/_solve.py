"""The optimisation behind `plan_cycle`: bounds, a first schedule, local search, branch and bound. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._exact import Tree
from moc_ckpt.pec._grid import Grid, Layer, Slots
from moc_ckpt.pec._meet import MAX_PERIOD, fold, meeting_modulus, others_at
from moc_ckpt.pec._problem import Problem
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
_TREE_EXPERTS = 64  # with more, a tree over all ranks hardly ever ends
_DIVE = 4  # nodes per expert
_RANK_WORK = 5_000_000
_RANK_EXPERTS = 256
_LAYER_WORK = 1000
_CLOSE = 1000  # of the bound: in a large problem less than this part is not worth another start


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
    """The best schedule so far, and grids to look for a better one in.

    Either one grid has all layers, or each length of cycle has its own, whose base is the most that the others add.
    """

    problem: Problem
    groups: list[list[int]]
    grids: list[Grid]
    bound: int
    peak: int = 0
    best: Slots = field(default_factory=list)

    @classmethod
    def start(cls, problem: Problem, bound: int, apart: bool) -> _State:
        """Returns a state with empty grids."""
        everything = list(range(len(problem.layers)))
        cycles = [layer.cycle for layer in problem.layers]
        groups = [everything] if everything else []
        if apart:
            groups = [[index for index in everything if cycles[index] == cycle] for cycle in sorted(set(cycles))]
        grids = [
            Grid([problem.layers[index] for index in group], problem.base, problem.period(group), problem.repeat)
            for group in groups
        ]
        return cls(problem, groups, grids, bound)

    @property
    def done(self) -> bool:
        return self.peak <= self.bound

    @property
    def close(self) -> bool:
        return (self.peak - self.bound) * _CLOSE <= self.bound

    def fill(self, order: Sequence[int], ever_first: bool) -> None:
        """Makes a first schedule."""
        for group, grid in zip(self.groups, self.grids, strict=True):
            grid.rebase(self.problem.base)
            grid.fill([group.index(layer) for layer in order if layer in group], ever_first)
        self.note()

    def restart(self) -> None:
        """Puts the best schedule back into the grids."""
        for group, grid in zip(self.groups, self.grids, strict=True):
            grid.place([self.best[index] for index in group])
        self.meet()

    def meet(self) -> int:
        """Gives each grid what the others add at most as its base; returns the bottleneck."""
        if len(self.grids) < 2:
            return max([grid.peak() for grid in self.grids] + [self.problem.floor])
        common = meeting_modulus([grid.period for grid in self.grids])
        if common > MAX_PERIOD or common * self.problem.world > _MAX_CELLS:
            common = 1
        folded = [fold(grid.own(), common) for grid in self.grids]
        total = self.problem.base + sum(np.tile(part, (common // len(part), 1)) for part in folded)
        for grid, part in zip(self.grids, folded, strict=True):
            grid.rebase(others_at(total, part, grid.period))
        return max(int(total.max(initial=0)), self.problem.floor)

    def note(self) -> bool:
        """Keeps the grids' schedule if it is the best; returns whether it is."""
        peak = self.meet()
        if self.best and peak >= self.peak:
            return False
        self.peak, self.best = peak, [np.zeros(0, dtype=np.int64)] * len(self.problem.layers)
        for group, grid in zip(self.groups, self.grids, strict=True):
            for index, slots in zip(group, grid.copy_slots(), strict=True):
                self.best[index] = slots
        return True


def solve(problem: Problem) -> Solution:
    """Finds a schedule with a bottleneck as low as it can, and a bound as high as it can.

    Args:
        problem: what to schedule.
    """
    bounds = rank_bounds(problem)
    period = problem.period(range(len(problem.layers)))
    mixed = problem.repeat and len({layer.cycle for layer in problem.layers}) > 1
    apart = mixed and (period > MAX_PERIOD or period * problem.world > _MAX_CELLS)
    state = _State.start(problem, max(int(bounds.max(initial=0)), crowd_bound(problem)), apart)
    experts = sum(layer.size for layer in problem.layers)
    large, work = experts > _TREE_EXPERTS, _SEARCH_WORK + _SEARCH_WORK_PER_EXPERT * experts
    for attempt, (order, ever_first) in enumerate(_orders(problem)):
        state.fill(order, ever_first)
        if attempt == 0 and not state.done:
            # A short search first: the tree needs a good schedule to cut by, and is fast on small problems.
            _search(state, state.bound, work // 8 if large else work // 50)
            _prove_all(state)
            _prove_ranks(state, bounds)
            _dive(state, state.bound, work)
        if not state.done:
            _search(state, state.bound, work if attempt == 0 else work // 2)
        if state.done or (large and state.close):
            return Solution(state.best, state.peak, state.bound)
    _bisect(state, work // 2)
    if mixed and not apart and not state.done:
        other = _State.start(problem, state.bound, apart=True)
        other.peak, other.best = state.peak, state.best
        other.restart()
        _search(other, other.bound, work // 2)
        state = other
    _prove_ranks(state, bounds)
    return Solution(state.best, state.peak, state.bound)


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
        if not _dive(state, middle, work) and not _search(state, middle, work):
            low = middle
        work = work * 2 // 3


def _node_work(layers: Sequence[Layer], world: int, period: int) -> int:
    """Returns the effort of one node of a tree of this size."""
    steps = max((layer.cycle for layer in layers), default=0)
    return _NODE_WORK + world * (sum(layer.size for layer in layers) * steps + period) // 16


def _prove_ranks(state: _State, bounds: _Ints) -> None:
    """Raises the bound by what single ranks can reach at best, all others left out."""
    problem = state.problem
    seen: set[tuple[object, ...]] = set()
    left = _RANK_WORK
    for rank in np.argsort(-bounds, kind="stable").tolist():
        if state.done or left <= 0:
            return
        left -= _LAYER_WORK * len(problem.layers)
        layers = [_only(layer, rank) for layer in problem.layers]
        layers = [layer for layer in layers if layer.size]
        shares = [(layer.cycle, layer.limit, tuple(sorted(layer.table[:, 0].tolist()))) for layer in layers]
        key = (int(problem.base[rank]), *sorted(shares))
        if key not in seen:
            seen.add(key)
            left -= _prove_rank(state, layers, problem.base[rank : rank + 1], left)


def _prove_rank(state: _State, layers: list[Layer], base: _Ints, work: int) -> int:
    """Raises the bound by the optimum of one rank, if that is above; returns the effort it took."""
    repeat = state.problem.repeat
    experts = sum(layer.size for layer in layers)
    cycles = [layer.cycle for layer in layers]
    period = math.lcm(*cycles) if repeat else max(cycles, default=0)
    each = _node_work(layers, 1, period)
    nodes = limit = min(work // each, _TREE_NODES)
    if experts > _RANK_EXPERTS or limit < 3 * experts:
        return 0
    # First whether it reaches the bound, as most do: then it cannot raise it. If not, from the best schedule downwards.
    cap, below = state.bound, state.peak
    while nodes > 0:
        tree = Tree(layers, base, period, repeat)
        outcome, slots = tree.run(cap, nodes)
        nodes -= tree.nodes
        if outcome == "none":
            state.bound = max(state.bound, cap + 1)
        if outcome == "limit" or (outcome == "found" and cap == state.bound) or state.bound >= below:
            break
        if outcome == "found":
            grid = Grid(layers, base, period, repeat)
            grid.place(slots)
            below = grid.peak()
        cap = below - 1
    return (limit - nodes) * each


def _prove_all(state: _State) -> None:
    """Branch and bound over everything: improves the schedule or proves that nothing can."""
    if len(state.grids) != 1 or sum(layer.size for layer in state.problem.layers) > _TREE_EXPERTS:
        return
    grid = state.grids[0]
    nodes = min(_TREE_WORK // _node_work(grid.layers, grid.world, grid.period), _TREE_NODES)
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


def _dive(state: _State, cap: int, work: int) -> bool:
    """Looks for a schedule with no load above `cap` near the tree's first path; returns whether it found one.

    Placing the experts that have the fewest windows left first gets through tight cases where local search is stuck.
    """
    if state.done or len(state.grids) != 1:
        return state.done
    grid = state.grids[0]
    experts = sum(layer.size for layer in grid.layers)
    nodes = min(_DIVE * experts, work // _node_work(grid.layers, grid.world, grid.period))
    if nodes <= experts:
        return False
    outcome, slots = Tree(grid.layers, state.problem.base, grid.period, grid.repeat).run(cap, nodes)
    if outcome == "none":
        state.bound = max(state.bound, cap + 1)
    if outcome != "found":
        return False
    grid.place(slots)
    return state.note()


def _only(layer: Layer, rank: int) -> Layer:
    """Returns a layer as one rank sees it: the experts that it owns something of."""
    column = np.flatnonzero(layer.columns == rank)
    sizes = layer.table[:, column[0]] if len(column) else np.zeros(0, dtype=np.int64)
    sizes = sizes[sizes > 0]
    count = len(sizes)
    zeros = np.zeros(count, dtype=np.int64)
    return Layer.build(layer.cycle, layer.limit, count, 1, np.arange(count), zeros, sizes)
