"""A scheduling problem taken from an ownership, without the ranks that cannot matter. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._grid import Layer
from moc_ckpt.pec.ownership import Ownership

__all__ = ["MAX_PERIOD", "Problem", "build_problem", "coprime_groups", "joint_groups"]

_Ints = npt.NDArray[np.int64]

MAX_PERIOD = 4096
"""Steps: cycles that meet again only after more steps than this are not followed step by step."""

_DOMINANCE_CHECKS = 200_000


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """What has to be scheduled.

    Attributes:
        layers: the layers that have pending experts.
        ordinals: which layer of the model each is.
        base: [ranks] bytes that each rank writes in every step.
        repeat: whether windows repeat (else every window runs once, and a step is over when no layer has one).
        floor: the largest base of any rank, also of those that were left out; no schedule is below it.
    """

    layers: tuple[Layer, ...]
    ordinals: tuple[int, ...]
    base: _Ints
    repeat: bool
    floor: int

    @property
    def world(self) -> int:
        """Number of ranks that are left."""
        return len(self.base)

    def period(self, group: Sequence[int]) -> int:
        """Returns after how many steps these layers start over, or end."""
        cycles = [self.layers[index].cycle for index in group]
        return math.lcm(*cycles) if self.repeat else max(cycles, default=0)


def build_problem(
    ownership: Ownership,
    pending: Sequence[Sequence[int]],
    cycles: Sequence[int],
    limits: Sequence[int],
    repeat: bool,
) -> Problem:
    """Builds the problem and leaves out ranks that another rank's load always reaches.

    Args:
        ownership: who writes what.
        pending: per layer, the experts to schedule, ascending.
        cycles: per layer, the number of windows.
        limits: per layer, the most experts of a window.
        repeat: whether windows repeat.
    """
    spot = np.full(ownership.offsets[-1], -1, dtype=np.int64)
    home = np.full(ownership.offsets[-1], -1, dtype=np.int64)
    for layer, experts in enumerate(pending):
        units = ownership.offsets[layer] + np.array(experts, dtype=np.int64)
        spot[units] = np.arange(len(units))
        home[units] = layer
    mask = spot[ownership.unit] >= 0
    unit, rank, nbytes = ownership.unit[mask], ownership.rank[mask], ownership.nbytes[mask]
    kept = _undominated(unit, rank, nbytes, ownership.dense)
    place = np.full(ownership.world, -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    mask = place[rank] >= 0
    unit, rank, nbytes = unit[mask], place[rank[mask]], nbytes[mask]
    layers, ordinals = [], []
    for layer, experts in enumerate(pending):
        if len(experts) == 0:
            continue
        mine = home[unit] == layer
        ordinals.append(layer)
        layers.append(
            Layer.build(
                cycles[layer], limits[layer], len(experts), len(kept), spot[unit[mine]], rank[mine], nbytes[mine]
            )
        )
    floor = int(ownership.dense.max(initial=0))
    return Problem(tuple(layers), tuple(ordinals), ownership.dense[kept], repeat, floor)


def coprime_groups(cycles: Sequence[int]) -> list[list[int]]:
    """Returns the layers in groups such that cycles of different groups have no common divisor.

    By the Chinese remainder theorem every combination of one step per group then comes up when windows repeat, so the
    largest load of a rank is exactly its base plus the sum, over the groups, of its largest load from that group.

    Args:
        cycles: number of windows of each layer, above 0.
    """
    groups: list[tuple[int, list[int]]] = []
    for index, cycle in enumerate(cycles):
        period, members = cycle, [index]
        apart = []
        for other, others in groups:
            if math.gcd(other, cycle) == 1:
                apart.append((other, others))
            else:
                period, members = math.lcm(period, other), others + members
        groups = [*apart, (period, members)]
    return sorted(sorted(members) for _, members in groups)


def joint_groups(problem: Problem, max_cells: int) -> list[list[int]]:
    """Returns the layers in groups whose steps can be followed one by one.

    One group if it is small enough; else the coprime groups; and of those that are still too large, one for each
    length of cycle. The largest load of a rank is at most its base plus the sum of its largest loads from the groups,
    and exactly that in the first two cases.

    Args:
        problem: the problem.
        max_cells: the most cells (steps times ranks) of a group of layers with different cycles.
    """
    everything = list(range(len(problem.layers)))

    def small(group: Sequence[int]) -> bool:
        period = problem.period(group)
        return period <= MAX_PERIOD and period * problem.world <= max_cells

    if not problem.repeat or small(everything):
        return [everything] if everything else []
    found = []
    for group in coprime_groups([layer.cycle for layer in problem.layers]):
        if small(group):
            found.append(group)
            continue
        cycles = sorted({problem.layers[index].cycle for index in group})
        found += [[index for index in group if problem.layers[index].cycle == cycle] for cycle in cycles]
    return found


def _undominated(unit: _Ints, rank: _Ints, nbytes: _Ints, dense: _Ints) -> _Ints:
    """Returns the ranks, ascending, but those without shares and those that another one always loads at least as much.

    Of ranks with equal shares the one with the most dense bytes stays. Whether a rank's shares are all below those of
    another one is only looked at while that is cheap; leaving such a rank in is never wrong.
    """
    order = np.lexsort((unit, rank))
    unit, rank, nbytes = unit[order], rank[order], nbytes[order]
    ranks, starts = np.unique(rank, return_index=True)
    ends = [*starts.tolist(), len(rank)][1:]
    best: dict[bytes, int] = {}
    span: dict[int, tuple[int, int]] = {}
    for who, start, end in zip(ranks.tolist(), starts.tolist(), ends, strict=True):
        span[who] = (start, end)
        key = unit[start:end].tobytes() + nbytes[start:end].tobytes()
        if key not in best or dense[who] > dense[best[key]]:
            best[key] = who
    kept = sorted(best.values())
    owners: dict[int, list[int]] = {}
    for who in kept:
        for one in unit[slice(*span[who])].tolist():
            owners.setdefault(one, []).append(who)
    checks, gone = 0, set()
    for who in kept:
        start, end = span[who]
        rare = min(unit[start:end].tolist(), key=lambda one: (len(owners[one]), one))
        for other in owners[rare]:
            if other == who or other in gone or dense[other] < dense[who]:
                continue
            first, last = span[other]
            if last - first < end - start or checks > _DOMINANCE_CHECKS:
                continue
            checks += end - start
            where = first + np.searchsorted(unit[first:last], unit[start:end])
            found = np.minimum(where, last - 1)
            if np.all((unit[found] == unit[start:end]) & (nbytes[found] >= nbytes[start:end])):
                gone.add(who)
                break
    return np.array([who for who in kept if who not in gone], dtype=np.int64)
