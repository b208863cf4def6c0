"""Even work among placements that survive alike. Pure.

How likely a placement survives depends on which sets of nodes its experts have, not on which expert has which of them.
Experts with equally many replicas can therefore change places freely: every failure is survived by as many experts as
before. Rounding to whole replicas makes their loads per slot unequal, so it matters to the work of the nodes who is
where. The paper has nothing about it: it groups experts that are neighbours by load, so that those with more work per
slot than the mean come together on the same nodes.
"""

from __future__ import annotations

from collections import Counter
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


@dataclass(slots=True)
class _Class:
    """Roles of one size, and who plays them.

    Attributes:
        places: [roles, size] the places of each role.
        times: [roles, size] how often each of these is among the role's places.
        roles: [roles] their numbers.
        items: [roles] who has each role.
        shares: [roles] the work per slot of who has it.
    """

    places: NDArray[np.int64]
    times: NDArray[np.int64]
    roles: NDArray[np.int64]
    items: NDArray[np.int64]
    shares: NDArray[np.float64]


def reassigned(where: Sequence[Sequence[int]], shares: Sequence[float], places: int) -> list[int]:
    """Shares roles of equal size out anew, so that the most loaded place has less to do.

    Args:
        where: for each role its places, one per slot. Item i begins with role i.
        shares: work per slot of each item.
        places: number of places.

    Returns:
        For each item the role that it has now.
    """
    work = np.zeros(places)
    classes, roles_at = _classes(where, shares, places, work)
    goal = work.mean() * _ENOUGH
    # Each exchange makes the loads smaller in the order of their sizes, so it ends; a bound keeps its time in bounds.
    for _ in range(4 * max(places, len(where))):
        top = int(work.argmax())
        if work[top] <= goal or not any(_relieve(top, classes[kind], row, work) for kind, row in roles_at[top]):
            break
    found = [0] * len(where)
    for one in classes:
        for item, role in zip(one.items.tolist(), one.roles.tolist(), strict=True):
            found[item] = role
    return found


def _classes(
    where: Sequence[Sequence[int]], shares: Sequence[float], places: int, work: NDArray[np.float64]
) -> tuple[list[_Class], list[list[tuple[int, int]]]]:
    """Sorts roles by size; adds the work of the places up; tells which roles a place takes part in."""
    by_size: dict[int, list[int]] = {}
    for role, held in enumerate(where):
        if held:
            by_size.setdefault(len(held), []).append(role)
    classes: list[_Class] = []
    roles_at: list[list[tuple[int, int]]] = [[] for _ in range(places)]
    for roles in by_size.values():
        at = np.array([where[role] for role in roles])
        counted = [Counter(where[role]) for role in roles]
        times = np.array([[count[place] for place in where[role]] for role, count in zip(roles, counted, strict=True)])
        share = np.array([shares[role] for role in roles], dtype=np.float64)
        np.add.at(work, at, share[:, None])
        if len(roles) > 1:
            for row, count in enumerate(counted):
                for place in count:
                    roles_at[place].append((len(classes), row))
        classes.append(_Class(at, times, np.array(roles), np.array(roles), share))
    return classes, roles_at


def _relieve(top: int, one: _Class, row: int, work: NDArray[np.float64]) -> bool:
    """Exchanges who has a role at the most loaded place for a lighter one, where that helps; tells whether it did."""
    less = one.shares[row] - one.shares
    others = np.flatnonzero(less > 0)
    if not len(others):
        return False
    less, places = less[others], one.places[others]
    own = np.bincount(one.places[row], minlength=len(work))
    gained = one.times[others] - own[places]
    # The most loaded place is one of the role's own; others of them only get less.
    most = (work[places] + less[:, None] * gained).max(axis=1)
    there = (places == top).sum(axis=1)
    after = np.maximum(most, work[top] - less * (own[top] - there))
    best = int(after.argmin())
    if not after[best] < work[top] * (1 - 1e-12):
        return False
    other, moved = int(others[best]), float(less[best])
    np.add.at(work, one.places[row], -moved)
    np.add.at(work, one.places[other], moved)
    one.items[[row, other]] = one.items[[other, row]]
    one.shares[[row, other]] = one.shares[[other, row]]
    return True
