"""How likely it is that every expert survives, by counting. Pure.

All nodes are equally likely to fail: what counts is how many of the C(N, k) ways to lose k of N nodes leave a copy of
every expert. Only the sets of nodes that hold an expert matter (bit v of a mask stands for node v), and of these only
the smallest: an expert that is wherever another one is survives with it.

Polynomials count ways by the number of failed nodes. They are packed into one integer, a field of N + 8 bits for each
power: sums and products of polynomials are then those of integers, and no field overflows, since all ways together are
no more than 2^N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.lazarus.types import Placement

__all__ = [
    "TooManyStatesError",
    "closed_form",
    "contract",
    "count_recoverable",
    "count_sets",
    "holder_masks",
    "minimal_sets",
    "probabilities",
    "recoverable_bound",
]

_MAX_STATES = 20_000
_WORK_PER_STATE = 100


class TooManyStatesError(UnsupportedError):
    """A placement is too irregular to be counted within the limits of work."""


def holder_masks(placement: Placement) -> tuple[int, ...]:
    """Returns for each expert the mask of the nodes that have a copy of it."""
    masks = [0] * placement.num_experts
    for place, experts in enumerate(placement.slots):
        bit = 1 << place
        for expert in experts:
            masks[expert] |= bit
    return tuple(masks)


def minimal_sets(masks: Iterable[int]) -> list[int]:
    """Returns the masks that contain no other one, by size and value; each once."""
    found: list[int] = []
    for mask in sorted(set(masks), key=lambda item: (item.bit_count(), item)):
        if not any(mask & small == small for small in found):
            found.append(mask)
    return found


def count_recoverable(*placements: Placement, max_states: int = _MAX_STATES) -> tuple[int, ...]:
    """Counts the failures that leave a copy of every expert.

    Args:
        placements: of one layer, or of several on the same nodes: then every expert of all of them must survive.
        max_states: limit of work, see `count_sets`.

    Returns:
        For k = 0 to N failed nodes, how many of the C(N, k) ways to lose k nodes.

    Raises:
        TooManyStatesError: as `count_sets`.
    """
    masks = [mask for placement in placements for mask in holder_masks(placement)]
    return count_sets(masks, len(placements[0].slots), max_states=max_states)


def count_sets(masks: Iterable[int], nodes: int, *, max_states: int = _MAX_STATES) -> tuple[int, ...]:
    """Counts, by size, the sets of failed nodes that contain none of the masks.

    Masks that share no node are independent: their polynomials multiply. Within such a component nodes that are in the
    same masks form a class, and one class after the other fails (as a whole, or not), with the masks that have a live
    node so far as the state. A mask is forgotten after its last class: those without a live node drop out there.

    Args:
        masks: sets of nodes.
        nodes: N.
        max_states: the most states at a time.

    Returns:
        N + 1 counts.

    Raises:
        TooManyStatesError: if a component needs more.
    """
    width = nodes + 8
    sets = minimal_sets(masks)
    if sets and not sets[0]:  # an expert without any copy
        return (0,) * (nodes + 1)
    total, free = 1, nodes
    for component in _components(sets):
        total *= _count_component(component, width, max_states)
        free -= _union(component).bit_count()
    return _unpack(total * _power(free, width), nodes)


def closed_form(sizes: Sequence[int], nodes: int) -> tuple[int, ...]:
    """Counts as `count_sets` does for disjoint sets, of which only the sizes matter: those of MRO's groups.

    Args:
        sizes: nodes of each group's representative; their sum is at most N.
        nodes: N.
    """
    width = nodes + 8
    total = _power(nodes - sum(sizes), width)
    for size in sizes:
        total *= _power(size, width) - (1 << size * width)
    return _unpack(total, nodes)


def probabilities(counts: Sequence[int]) -> tuple[float, ...]:
    """Returns the counts as shares of all C(N, k) ways, k = 0 to N; rounded once."""
    nodes = len(counts) - 1
    return tuple(count / math.comb(nodes, failed) for failed, count in enumerate(counts))


def contract(placement: Placement, domains: Sequence[int]) -> Placement:
    """Returns the placement on failure domains as if each were one node: counts then are by failed domains.

    Args:
        placement: on nodes.
        domains: for each node the number of its domain, from 0 without gaps.
    """
    held: list[set[int]] = [set() for _ in range(max(domains) + 1)]
    for domain, experts in zip(domains, placement.slots, strict=True):
        held[domain].update(experts)
    return Placement(placement.num_experts, tuple(tuple(experts) for experts in held))


def recoverable_bound(replicas: Sequence[int], nodes: int, slots: int) -> tuple[int, ...]:
    """Returns upper bounds of `count_recoverable` for all placements (docs/lazarus-placement.md proves them).

    Args:
        replicas: of each expert, any order.
        nodes: N.
        slots: c, of each node.

    Returns:
        N + 1 counts.
    """
    ordered = sorted(replicas)
    sizes: dict[int, int] = {}
    for count in ordered:
        sizes[min(count, nodes)] = sizes.get(min(count, nodes), 0) + 1
    smallest = min(sizes)
    bounds = [1]
    dead, used = 0, 0
    for failed in range(1, nodes + 1):
        # The most experts that all fit onto the failed nodes.
        while dead < len(ordered) and used + ordered[dead] <= slots * failed:
            used += ordered[dead]
            dead += 1
        ways = math.comb(nodes, failed)
        lost = 0
        if dead:
            each = {size: math.comb(nodes - size, failed - size) for size in sizes if size <= failed}
            lost = max(each.get(smallest, 0), -(-sum(count * sizes[size] for size, count in each.items()) // dead))
        if slots * (nodes - failed) < len(ordered):
            lost = ways
        # The share of fatal failures grows with the number of failed nodes.
        before = math.comb(nodes, failed - 1)
        lost = max(lost, -(-(before - bounds[-1]) * ways // before))
        bounds.append(ways - lost)
    return tuple(bounds)


@lru_cache(maxsize=4096)
def _power(exponent: int, width: int) -> int:
    """Returns (1 + x)^exponent, packed: each of so many nodes is alive or failed."""
    return ((1 << width) + 1) ** exponent


def _unpack(packed: int, nodes: int) -> tuple[int, ...]:
    width = nodes + 8
    field = (1 << width) - 1
    return tuple(packed >> failed * width & field for failed in range(nodes + 1))


def _union(masks: Iterable[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _components(sets: Iterable[int]) -> list[list[int]]:
    """Groups masks that are connected by common nodes."""
    found: list[tuple[int, list[int]]] = []
    for mask in sets:
        joined, members, apart = mask, [mask], []
        for union, some in found:
            if union & mask:
                joined |= union
                members += some
            else:
                apart.append((union, some))
        found = [*apart, (joined, members)]
    return [members for _, members in found]


def _count_component(sets: list[int], width: int, max_states: int) -> int:
    if len(sets) == 1:
        size = sets[0].bit_count()
        return _power(size, width) - (1 << size * width)
    order = _ordered(_classes(sets))
    last = {}
    for position, (members, _) in enumerate(order):
        for index in _bits(members):
            last[index] = position
    closing = [0] * len(order)
    for index, position in last.items():
        closing[position] |= 1 << index
    states, work = {0: 1}, 0
    for (members, size), closed in zip(order, closing, strict=True):
        all_failed = size * width
        some_alive = _power(size, width) - (1 << all_failed)
        following: dict[int, int] = {}
        for alive, ways in states.items():
            if alive & closed == closed:
                state = alive & ~closed
                following[state] = following.get(state, 0) + (ways << all_failed)
            state = (alive | members) & ~closed
            if (alive | members) & closed == closed:
                following[state] = following.get(state, 0) + ways * some_alive
        states = following
        work += len(states)
        if len(states) > max_states or work > _WORK_PER_STATE * max_states:
            raise TooManyStatesError(
                f"counting the failures that this placement survives needs more than {len(states) - 1:,} states",
                where=f"{len(sets)} sets of nodes that overlap",
                fix="raise max_states, or compare placements on fewer nodes",
            )
    return states.get(0, 0)


def _classes(sets: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (the sets that its nodes are in, number of nodes) of each class."""
    classes: dict[int, int] = {}
    for node in _bits(_union(sets)):
        members = sum(1 << index for index, mask in enumerate(sets) if mask >> node & 1)
        classes[members] = classes.get(members, 0) + 1
    return sorted(classes.items())


def _ordered(classes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Orders classes so that few sets are begun and not finished at any time (greedy)."""
    rest, order, begun = list(classes), [], 0
    uses = [0] * max((members.bit_length() for members, _ in classes), default=0)
    for members, _ in classes:
        for index in _bits(members):
            uses[index] += 1

    def cost(item: tuple[int, int]) -> tuple[int, int]:
        members = item[0]
        ends = sum(uses[index] == 1 for index in _bits(members))
        return (members & ~begun).bit_count() - ends, -members.bit_count()

    while rest:
        best = min(rest, key=cost)
        rest.remove(best)
        order.append(best)
        begun |= best[0]
        for index in _bits(best[0]):
            uses[index] -= 1
    return order


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
