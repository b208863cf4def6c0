"""A scheduling problem taken from an ownership, without the ranks that cannot matter. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._grid import Layer
from moc_ckpt.pec.ownership import Ownership

__all__ = ["Problem", "build_problem"]

_Ints = npt.NDArray[np.int64]

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
