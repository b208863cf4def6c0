"""Constructions of placements, as lists of the experts of each node. Pure.

Experts are numbered by replicas, the fewest first: expert 0 is the least replicated one. `placement.py` translates.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

__all__ = ["Nodes", "borrowed", "compact", "fill", "node_masks", "published", "regular", "shifted", "spread"]

Nodes = list[list[int]]
"""For each node the experts in its slots, in any order."""


def node_masks(nodes: Nodes, experts: int) -> list[int]:
    """Returns for each expert the mask of the nodes that hold it."""
    masks = [0] * experts
    for node, held in enumerate(nodes):
        bit = 1 << node
        for expert in held:
            masks[expert] |= bit
    return masks


def regular(replicas: Sequence[int], count: int, slots: int) -> bool:
    """Whether the published construction gives every group all the nodes that it wants."""
    return len(replicas) <= slots or sum(replicas[::slots]) <= count


def published(replicas: Sequence[int], count: int, slots: int) -> Nodes:
    """The published construction (Lazarus, section 4.1).

    Groups of c consecutive experts have a set of nodes each, as many as their first expert has replicas, and each of
    these nodes holds the whole group. What is left goes evenly into vacant slots. If all experts fit onto one node
    expert e is on the first r_e nodes.

    Args:
        replicas: of each expert, ascending.
        count: N, number of nodes.
        slots: c, slots of each node.
    """
    experts = len(replicas)
    if experts <= slots:
        nodes: Nodes = [[] for _ in range(count)]
        for expert, number in enumerate(replicas):
            for node in nodes[:number]:
                node.append(expert)
        left = [max(number - count, 0) for number in replicas]
    else:
        nodes, left = _groups(replicas, count, range(0, experts, slots))
    fill(nodes, left, slots)
    return nodes


def _groups(replicas: Sequence[int], count: int, firsts: Sequence[int]) -> tuple[Nodes, list[int]]:
    """Gives each group of experts, told by its first one, nodes of its own; returns also the replicas left."""
    nodes: Nodes = []
    left = list(replicas)
    for first, stop in zip(firsts, [*firsts[1:], len(replicas)], strict=True):
        members = range(first, stop)
        # Only the last group may find fewer nodes than it wants: the groups before it fit.
        size = min(replicas[first], count - len(nodes))
        nodes += [list(members) for _ in range(size)]
        for expert in members:
            left[expert] -= size
    nodes += [[] for _ in range(count - len(nodes))]
    return nodes, left


def fill(nodes: Nodes, left: Sequence[int], slots: int) -> None:
    """Puts replicas into vacant slots evenly: each onto the emptiest node, one without a copy where there is one.

    Args:
        nodes: changed in place; has room for all of them.
        left: replicas of each expert to be placed.
        slots: c.
    """
    room = [slots - len(held) for held in nodes]
    masks = node_masks(nodes, len(left))
    queue = [(-vacant, node) for node, vacant in enumerate(room) if vacant]
    heapq.heapify(queue)
    for expert, number in enumerate(left):
        passed = []
        while number and queue:
            _, node = heapq.heappop(queue)
            if not masks[expert] >> node & 1:
                nodes[node].append(expert)
                masks[expert] |= 1 << node
                room[node] -= 1
                number -= 1
            passed.append(node)
        if number:  # every node with room has a copy
            again = [(nodes[node].count(expert), -room[node], node) for node in passed if room[node]]
            heapq.heapify(again)
            for _ in range(number):
                copies, _, node = heapq.heappop(again)
                nodes[node].append(expert)
                room[node] -= 1
                if room[node]:
                    heapq.heappush(again, (copies + 1, -room[node], node))
        for node in passed:
            if room[node]:
                heapq.heappush(queue, (-room[node], node))


def shifted(replicas: Sequence[int], count: int, slots: int) -> Iterable[Nodes]:
    """Yields variants of the published construction in which another group than the last is the small one.

    Its nodes then have vacant slots, where experts of the last group find more nodes. The last but one group first.

    Args:
        replicas: of each expert, ascending; c does not divide their number.
        count: N.
        slots: c.
    """
    experts = len(replicas)
    small, full = experts % slots, experts // slots
    for before in range(full - 1, -1, -1):
        firsts = [index * slots for index in range(before + 1)]
        firsts += [before * slots + small + index * slots for index in range(full - before)]
        sizes = [replicas[first] for first in firsts]
        if sum(sizes[:-1]) < count:
            nodes, left = _groups(replicas, count, firsts)
            fill(nodes, left, slots)
            yield nodes


def borrowed(replicas: Sequence[int], count: int, slots: int) -> Iterable[Nodes]:
    """Yields variants of the published construction for a last group that finds fewer nodes than it wants.

    The last group Z of q experts takes over slots on nodes of other groups, and the experts that were there move onto
    Z's own nodes, in whose vacant slots the published construction puts second copies of Z. Moving the same experts of
    one group each time keeps the number of different sets of nodes low, which is what counts.

    Args:
        replicas: of each expert, ascending; more than c of them, and not `regular`.
        count: N.
        slots: c.
    """
    experts = len(replicas)
    last = (experts - 1) // slots * slots
    groups = list(range(0, last, slots))
    own = count - sum(replicas[first] for first in groups)
    wanted = replicas[last] - own
    for donors in (groups[::-1], groups):
        for rotate in (False, True):
            for number in dict.fromkeys((wanted, -(-wanted // 2), 1)):
                yield _borrow(replicas, count, slots, donors, number, rotate)


def _borrow(replicas: Sequence[int], count: int, slots: int, donors: Sequence[int], number: int, rotate: bool) -> Nodes:
    experts = len(replicas)
    last = (experts - 1) // slots * slots
    nodes, left = _groups(replicas, count, range(0, experts, slots))
    newcomers = list(range(last, experts))
    begin = {}
    position = 0
    for first in range(0, last, slots):
        begin[first] = position
        position += replicas[first]
    own = list(range(position, count))
    # One node of a donor always keeps its whole group.
    places = [begin[first] + offset for first in donors for offset in range(replicas[first] - 1, 0, -1)][:number]
    moved: dict[int, int] = {}
    for turn, node in enumerate(places):
        members = sorted(nodes[node], key=lambda expert: (replicas[expert], expert))
        shift = turn * len(newcomers) if rotate else 0
        out = [members[-1 - (shift + index) % len(members)] for index in range(len(newcomers))]
        nodes[node] = [expert for expert in members if expert not in out] + newcomers
        for expert in out:
            moved[expert] = moved.get(expert, 0) + 1
        for expert in newcomers:
            left[expert] -= 1
    # Experts that moved away side by side arrive side by side, as far as there is room.
    for expert in sorted(moved):
        for node in sorted(own, key=lambda node: (-len(nodes[node]), node) if not rotate else (len(nodes[node]), node)):
            if moved[expert] and len(nodes[node]) < slots and expert not in nodes[node]:
                nodes[node].append(expert)
                moved[expert] -= 1
        left[expert] += moved[expert]
    fill(nodes, left, slots)
    return nodes


def spread(replicas: Sequence[int], count: int) -> Nodes:
    """Round robin: one replica after the other, each on the next node (the paper's baseline)."""
    nodes: Nodes = [[] for _ in range(count)]
    node = 0
    for expert, number in enumerate(replicas):
        for _ in range(number):
            nodes[node].append(expert)
            node = (node + 1) % count
    return nodes


def compact(replicas: Sequence[int], count: int, slots: int) -> Nodes:
    """Each expert on as few nodes as possible (the paper's other baseline): whole nodes, then the tightest fit."""
    nodes: Nodes = [[] for _ in range(count)]
    for expert in sorted(range(len(replicas)), key=lambda index: (-replicas[index], index)):
        number = replicas[expert]
        while number:
            room = [(slots - len(held), node) for node, held in enumerate(nodes) if len(held) < slots]
            fits = [item for item in room if item[0] >= number]
            vacant, node = min(fits) if fits else min(room, key=lambda item: (-item[0], item[1]))
            take = min(vacant, number)
            nodes[node] += [expert] * take
            number -= take
    return nodes
