"""Even work among placements that survive alike. Pure.

How likely a placement survives depends on which sets of nodes its experts have, not on which expert has which of them.
Experts with equally many replicas can therefore change places freely: every failure is survived by as many experts as
before. Rounding to whole replicas makes their loads per slot unequal, so it matters to the work of the nodes who is
where. The paper has nothing about it: it groups experts that are neighbours by load, so that those with more work per
slot than the mean come together on the same nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.types import Placement

__all__ = ["even_out", "imbalance", "reassigned", "work_per_slot"]

_ENOUGH = 1.005
"""Work of the most loaded place over the mean at which the search ends."""


def work_per_slot(placement: Placement, loads: Sequence[float]) -> list[float]:
    """Returns the tokens that each slot of an expert takes, by expert: equal shares."""
    return [load / max(number, 1) for load, number in zip(loads, placement.replicas(), strict=True)]


def imbalance(placement: Placement, loads: Sequence[float]) -> float:
    """Returns the work of the most loaded place over the mean place; 1 is perfect, and stands for no work as well.

    Every slot of an expert takes an equal share of its tokens.

    Args:
        placement: of one layer.
        loads: per expert its tokens.
    """
    total = sum(loads)
    if not total:
        return 1.0
    shares = work_per_slot(placement, loads)
    most = max(sum(shares[expert] for expert in held) for held in placement.slots)
    return most * len(placement.slots) / total


def even_out(placement: Placement, loads: Sequence[float]) -> Placement:
    """Lets experts with equally many slots change places until the most loaded place cannot be relieved any more.

    Each step exchanges an expert of the most loaded place for one of its kind with less work per slot, such that no
    place that gets the former has as much to do as the most loaded one had. That is a local optimum; the work of the
    most loaded place never grows.

    Args:
        placement: of one layer.
        loads: per expert its tokens; only their proportions count.

    Returns:
        A placement in which the experts have the node sets of the given one, each the set (with its multiplicities) of
        an expert with equally many slots: every chance of survival is exactly the same, also with failure domains.

    Raises:
        ConfigError: if the loads are of other experts.
    """
    if len(loads) != placement.num_experts:
        raise ConfigError(
            f"loads of {len(loads)} experts for a placement of {placement.num_experts}", fix="give one for each"
        )
    where: list[list[int]] = [[] for _ in loads]
    for place, held in enumerate(placement.slots):
        for expert in held:
            where[expert].append(place)
    roles = reassigned(where, work_per_slot(placement, loads), len(placement.slots))
    slots: list[list[int]] = [[] for _ in placement.slots]
    for expert, role in enumerate(roles):
        for place in where[role]:
            slots[place].append(expert)
    return Placement(placement.num_experts, tuple(map(tuple, slots)))


def reassigned(where: Sequence[Sequence[int]], shares: Sequence[float], places: int) -> list[int]:
    """Shares roles of equal size out anew, so that the most loaded place has less to do.

    Args:
        where: for each role its places, one per slot. Item i begins with role i.
        shares: work per slot of each item.
        places: number of places.

    Returns:
        For each item the role that it has now.
    """
    if places < 2 or not where:
        return list(range(len(where)))
    cast = _Cast(where, shares, places)
    goal = cast.work.mean() * _ENOUGH
    # Each exchange makes the loads smaller in the order of their sizes, so it ends; a bound keeps its time in bounds.
    for _ in range(4 * max(places, len(where))):
        top = int(cast.work.argmax())
        if cast.work[top] <= goal or not any(cast.relieve(top, role) for role in cast.roles_at(top)):
            break
    found = [0] * len(where)
    for role, item in enumerate(cast.items):
        found[item] = role
    return found


@dataclass(slots=True)
class _Class:
    """Roles of one size.

    Attributes:
        roles: [roles] their numbers, ascending.
        places: [roles, size] the places of each.
        times: [roles, size] how often each of these is among the role's places.
        shares: [roles] the work per slot of who has the role.
    """

    roles: NDArray[np.int64]
    places: NDArray[np.int64]
    times: NDArray[np.int64]
    shares: NDArray[np.float64]


class _Cast:
    """Who has which role, and the work that this makes. Arguments are those of `reassigned`."""

    def __init__(self, where: Sequence[Sequence[int]], shares: Sequence[float], places: int) -> None:
        sizes = np.array([len(held) for held in where])
        flat = np.fromiter((place for held in where for place in held), np.int64, int(sizes.sum()))
        each = np.asarray(shares, dtype=np.float64)
        self.items = list(range(len(where)))
        self.work = np.zeros(places)
        np.add.at(self.work, flat, np.repeat(each, sizes))
        # One number per role and place: a single sort counts how often each place is among a role's.
        pairs, back, counts = np.unique(
            np.repeat(np.arange(len(where)), sizes) * places + flat, return_inverse=True, return_counts=True
        )
        starts = np.cumsum(sizes) - sizes
        self._classes: dict[int, _Class] = {}
        for size in np.unique(sizes[sizes > 0]).tolist():
            roles = np.flatnonzero(sizes == size)
            at = starts[roles, None] + np.arange(size)
            self._classes[size] = _Class(roles, flat[at], counts[back][at], each[roles])
        self._sizes = sizes.tolist()
        owners, at_place = np.divmod(pairs, places)
        order = np.argsort(at_place, kind="stable")
        self._owners = owners[order]
        self._bounds = np.searchsorted(at_place[order], np.arange(places + 1))

    def roles_at(self, place: int) -> list[int]:
        """Returns the roles that a place takes part in, ascending."""
        found: list[int] = self._owners[self._bounds[place] : self._bounds[place + 1]].tolist()
        return found

    def relieve(self, top: int, role: int) -> bool:
        """Gives a role at the most loaded place to who has less work per slot, if that helps; tells whether it did."""
        one = self._classes[self._sizes[role]]
        row = int(np.searchsorted(one.roles, role))
        less = one.shares[row] - one.shares
        others = np.flatnonzero(less > 0)
        if not len(others):
            return False
        less, places = less[others], one.places[others]
        own = np.bincount(one.places[row], minlength=len(self.work))
        # Only the other role's places can get more; of this role's own the most loaded one says how far they fall.
        most = (self.work[places] + less[:, None] * (one.times[others] - own[places])).max(axis=1)
        both = (places == top).sum(axis=1)
        after = np.maximum(most, self.work[top] - less * (own[top] - both))
        best = int(after.argmin())
        if not after[best] < self.work[top] * (1 - 1e-12):
            return False
        other, moved = int(others[best]), float(less[best])
        self.work -= moved * own
        np.add.at(self.work, one.places[other], moved)
        one.shares[[row, other]] = one.shares[[other, row]]
        second = int(one.roles[other])
        self.items[role], self.items[second] = self.items[second], self.items[role]
        return True
