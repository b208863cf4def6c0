"""Certified lower bounds of the bottleneck of a rotation schedule. Pure.

Every bound here holds for each schedule that puts every pending expert into one window of its layer's cycle and at
most K experts into a window. Most look at one rank at a time: the bottleneck of the job is at least that of any rank.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._meet import coprime_groups, meeting_modulus
from moc_ckpt.pec._problem import Problem

__all__ = ["crowd_bound", "packing_bound", "rank_bounds"]

_Ints = npt.NDArray[np.int64]

# Work limit of `rank_bounds`, in shares looked at: a second or so.
_MAX_WORK = 1_000_000
_MAX_PREFIX = 64


@dataclass(frozen=True, slots=True)
class _Owned:
    """What one rank owns of one layer.

    Attributes:
        cycle: number of windows.
        forced: how many of the owned experts are in every window at least: the other windows have no room for more.
        limit: the most experts of a window.
        shares: bytes of the owned experts, the largest first.
    """

    cycle: int
    forced: int
    limit: int
    shares: tuple[int, ...]

    @property
    def least(self) -> int:
        """Bytes that every window has at least: the smallest of the forced number of experts."""
        return sum(self.shares[len(self.shares) - self.forced :])

    @property
    def tops(self) -> int:
        """Bytes that the window of the largest share has at least."""
        rest = self.shares[1:]
        return self.shares[0] + sum(rest[len(rest) - max(self.forced - 1, 0) :])


def packing_bound(items: Iterable[tuple[int, int]], steps: int) -> int:
    """Returns the least possible largest load when these items are spread over steps.

    Of the `steps * j + 1` largest items some step gets `j + 1` or more (pigeonhole), whose sum is at least that of the
    `j + 1` smallest among them; j = 0 is the largest item. And some step has the mean load or more.

    Args:
        items: (size, how often it occurs).
        steps: number of steps.
    """
    runs = sorted(((size, count) for size, count in items if size > 0 and count > 0), reverse=True)
    ends = list(accumulate(count for _, count in runs))
    sums = list(accumulate((size * count for size, count in runs), initial=0))
    total = ends[-1] if ends else 0

    def top(number: int) -> int:
        """Sum of that many largest items."""
        run = bisect_left(ends, number)
        return sums[run + 1] - (ends[run] - number) * runs[run][0] if number else 0

    best = -(-sums[-1] // steps)
    for j in range((total - 1) // steps + 1 if total else 0):
        last = steps * j + 1
        best = max(best, top(last) - top(last - j - 1))
    return best


def crowd_bound(problem: Problem) -> int:
    """Returns a lower bound, bytes, that looks at sets of ranks together; for windows that run once.

    Layers with shorter cycles crowd the first steps. Of a layer that goes on after the first p steps, as many experts
    as the later windows have no room for are in these p steps. Which ones is free, but what they have on a set of
    ranks, each its largest share there, is no less than as many of the smallest among the layer's. These shares, and
    all of the layers that end by then, are spread over p times the number of ranks places, each with at least the
    smallest base of these ranks.

    Args:
        problem: what to schedule; the bound is trivial for one that repeats or has but one cycle length.
    """
    lengths = sorted({layer.cycle for layer in problem.layers})
    if problem.repeat or len(lengths) < 2:
        return problem.floor
    best, work = problem.floor, 0
    prefixes = sorted({*lengths, *range(1, min(lengths[-1], _MAX_PREFIX))})
    for ranks in _rank_sets(problem):
        inside = np.zeros(problem.world + 1, dtype=bool)
        inside[ranks] = True
        shares = [np.where(inside[layer.ranks], layer.nbytes, 0) for layer in problem.layers]
        tops = [np.sort(part.max(axis=1, initial=0)) for part in shares]
        base = problem.base[ranks]
        for steps in prefixes:
            work += sum(part.size for part in shares)
            if work > 10 * _MAX_WORK:
                return best
            parts = []
            for layer, part, top in zip(problem.layers, shares, tops, strict=True):
                number = max(layer.size - max(layer.cycle - steps, 0) * layer.limit, 0)
                parts.append(part.ravel() if number == layer.size else top[:number])
            sizes, times = np.unique(np.concatenate(parts), return_counts=True)
            packed = packing_bound(zip(sizes.tolist(), times.tolist(), strict=True), steps * len(ranks))
            best = max(best, int(base.min()) + packed)
    return best


def _rank_sets(problem: Problem) -> list[_Ints]:
    """Returns all ranks, the ranks of each layer, and each set of ranks that own parts of the same layers."""
    owns = np.zeros((problem.world, len(problem.layers)), dtype=bool)
    for index, layer in enumerate(problem.layers):
        owns[layer.columns, index] = True
    _, which = np.unique(owns, axis=0, return_inverse=True)
    found = [np.arange(problem.world), *(layer.columns for layer in problem.layers)]
    found += [np.flatnonzero(which.ravel() == one) for one in range(int(which.max(initial=-1)) + 1)]
    return list({ranks.tobytes(): ranks for ranks in found if len(ranks)}.values())


def rank_bounds(problem: Problem) -> _Ints:
    """Returns [ranks] a lower bound of the largest load of each rank over all steps, bytes, base included.

    Ranks are looked at closely from the highest mean load downwards, as long as the work limit lasts; the others get
    the bound of their mean.
    """
    everything = list(range(len(problem.layers)))
    groups = coprime_groups([layer.cycle for layer in problem.layers]) if problem.repeat else [everything]
    found = problem.base.copy()
    for layer in problem.layers:
        # Over the period every expert is written once per cycle, so the mean is no more than the largest load. Rounded
        # down per layer, which only weakens it.
        found[layer.columns] += layer.table.sum(axis=0) // layer.cycle if problem.repeat else 0
    order = np.argsort(-found, kind="stable").tolist()
    known: dict[tuple[object, ...], int] = {}
    work = 0
    for rank in order:
        owned = [_owned(problem, group, rank) for group in groups]
        work += len(problem.layers) + sum(len(layer.shares) for group in owned for layer in group)
        if work > _MAX_WORK:
            break
        total = 0
        for layers in owned:
            # Groups of coprime cycles meet in every combination of their steps, so their largest loads add up.
            key = tuple((layer.cycle, layer.forced, layer.limit, layer.shares) for layer in layers)
            if key not in known:
                known[key] = _repeating(layers) if problem.repeat else _once(layers)
            total += known[key]
        found[rank] = max(found[rank], problem.base[rank] + total)
    return found


def _owned(problem: Problem, group: Sequence[int], rank: int) -> list[_Owned]:
    found = []
    for index in group:
        layer = problem.layers[index]
        column = int(np.searchsorted(layer.columns, rank))
        if column == len(layer.columns) or layer.columns[column] != rank:
            continue
        shares = sorted((int(size) for size in layer.table[:, column] if size), reverse=True)
        forced = len(shares) - (layer.cycle - 1) * layer.limit
        found.append(_Owned(layer.cycle, max(forced, 0), layer.limit, tuple(shares)))
    return found


def _repeating(layers: Sequence[_Owned]) -> int:
    """Bound of one rank for layers whose windows repeat."""
    if not layers:
        return 0
    cycles = sorted({layer.cycle for layer in layers})
    period = math.lcm(*cycles)
    # Some step has the largest share of a layer, and at least the forced bytes of all other layers.
    least = sum(layer.least for layer in layers)
    best = max(layer.tops + least - layer.least for layer in layers)
    # The same with all layers of one cycle length packed into its steps.
    for cycle in cycles:
        same = [layer for layer in layers if layer.cycle == cycle]
        items = [(share, 1) for layer in same for share in layer.shares]
        best = max(best, packing_bound(items, cycle) + least - sum(layer.least for layer in same))
    # Fold the period to `fold` residues. The largest load in a residue class is at least the mean of the class, and to
    # this mean an expert of a layer with cycle c adds share * g / c, g = gcd(c, fold), in the fold / g residues that
    # it meets. So packing these parts into `fold` steps is a bound. All is multiplied by `scale` to stay whole.
    # fold = period is the packing of every repetition into every step, fold = 1 the mean.
    folds = {1, period, meeting_modulus(cycles), *cycles, *(math.gcd(a, b) for a in cycles for b in cycles)}
    folds |= {math.lcm(a, b) for a in cycles for b in cycles}
    for fold in sorted(folds):
        common = {cycle: math.gcd(cycle, fold) for cycle in cycles}
        scale = math.lcm(*(cycle // common[cycle] for cycle in cycles))
        items = [
            (share * scale * common[layer.cycle] // layer.cycle, fold // common[layer.cycle])
            for layer in layers
            for share in layer.shares
        ]
        best = max(best, -(-packing_bound(items, fold) // scale))
    return best


def _once(layers: Sequence[_Owned]) -> int:
    """Bound of one rank for layers whose windows run once, from step 0 on."""
    best = 0
    for steps in sorted({layer.cycle for layer in layers}):
        items = []
        for layer in layers:
            # Windows after the first `steps` ones take `limit` experts each at most; the others are in these steps,
            # and whichever these are, they are no smaller than as many of the smallest.
            later = max(layer.cycle - steps, 0) * layer.limit
            items += [(share, 1) for share in layer.shares[min(later, len(layer.shares)) :]]
        best = max(best, packing_bound(items, steps))
    for layer in layers:
        # The step of a layer's largest share has a window of every layer that lasts as long.
        others = sum(other.least for other in layers if other is not layer and other.cycle >= layer.cycle)
        best = max(best, layer.tops + others)
    return best
