"""Every placement of small cases, straight from the definition. Shares no code with the package. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

__all__ = ["allocations", "cases", "placements", "survival", "survivals"]


def cases(nodes: int, slots: int, experts: int) -> Iterator[tuple[int, int, int]]:
    """Yields (N, c, E) up to these sizes, without those that have fewer slots than experts."""
    for count in range(1, nodes + 1):
        for room in range(1, slots + 1):
            for number in range(1, experts + 1):
                if count * room >= number:
                    yield count, room, number


def allocations(nodes: int, slots: int, experts: int) -> Iterator[tuple[int, ...]]:
    """Yields all numbers of replicas, ascending, that fit into the slots; some may stay vacant."""

    def extend(begin: tuple[int, ...], room: int) -> Iterator[tuple[int, ...]]:
        rest = experts - len(begin)
        if not rest:
            yield begin
            return
        for number in range(begin[-1] if begin else 1, room // rest + 1):
            yield from extend((*begin, number), room - number)

    yield from extend((), nodes * slots)


def placements(replicas: Sequence[int], nodes: int, slots: int) -> Iterator[list[tuple[int, ...]]]:
    """Yields all placements, but for the order of the nodes: for each node how many slots each expert has."""
    contents = [()]
    for most in replicas:
        contents = [(*some, more) for some in contents for more in range(min(most, slots - sum(some)) + 1)]
    left, chosen = list(replicas), []

    def search(start: int) -> Iterator[list[tuple[int, ...]]]:
        if sum(left) > (nodes - len(chosen)) * slots:
            return
        if len(chosen) == nodes:
            yield list(chosen)
            return
        for index in range(start, len(contents)):
            content = contents[index]
            if all(amount <= have for amount, have in zip(content, left, strict=True)):
                for expert, amount in enumerate(content):
                    left[expert] -= amount
                chosen.append(content)
                yield from search(index)
                chosen.pop()
                for expert, amount in enumerate(content):
                    left[expert] += amount

    yield from search(0)


@lru_cache(maxsize=64)
def _fatal(nodes: int, holders: tuple[int, ...]) -> int:
    """Returns a bit for each set of failed nodes that has all of these nodes."""
    found = 0
    for failure in range(1 << nodes):
        if all(failure >> node & 1 for node in holders):
            found |= 1 << failure
    return found


@lru_cache(maxsize=8)
def _sizes(nodes: int) -> tuple[int, ...]:
    return tuple(
        sum(1 << sum(1 << node for node in failed) for failed in combinations(range(nodes), size))
        for size in range(nodes + 1)
    )


def survival(held: Sequence[Sequence[int]], nodes: int) -> tuple[int, ...]:
    """Counts, for k = 0 to N, the sets of k failed nodes that leave every expert a slot.

    Args:
        held: for each node how many slots each expert has.
        nodes: N.
    """
    fatal = 0
    for expert in range(len(held[0])):
        fatal |= _fatal(nodes, tuple(node for node in range(nodes) if held[node][expert]))
    return tuple(comb(nodes, size) - (fatal & which).bit_count() for size, which in enumerate(_sizes(nodes)))


def survivals(replicas: Sequence[int], nodes: int, slots: int) -> set[tuple[int, ...]]:
    """Returns what all placements survive."""
    return {survival(held, nodes) for held in placements(replicas, nodes, slots)}
