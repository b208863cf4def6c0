"""Who sends what: transfers of which each may only use some sources, the largest load as low as possible. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence

__all__ = ["balanced_sources"]

_PASSES = 10
"""Rounds in which every transfer takes the least loaded source anew; they leave few chains to be searched."""


def balanced_sources(
    transfers: Sequence[Hashable], choices: Mapping[Hashable, Sequence[int]], count: int
) -> list[int | None]:
    """Chooses a source for each transfer so that the most loaded source is as little loaded as possible.

    First each takes the least loaded one, those with the fewest choices first, and again when all have chosen. Then
    loads are moved along chains, from a most loaded source to one with at least two less, until there is no such chain.
    Then no other choice has a lower maximum m: whatever the most loaded sources reach has at least m - 1 each, and the
    transfers of all these can go nowhere else.

    Args:
        transfers: for each transfer what is sent: a key of `choices`.
        choices: for each thing to send the sources that have it; none if it has no source.
        count: number of sources.

    Returns:
        For each transfer its source, or None.
    """
    loads = [0] * count
    chosen: list[int | None] = [None] * len(transfers)
    held: list[set[int]] = [set() for _ in range(count)]
    order = sorted(range(len(transfers)), key=lambda index: (len(choices[transfers[index]]), index))
    for _ in range(_PASSES):
        last = list(chosen)
        for job in order:
            if sources := choices[transfers[job]]:
                if (before := chosen[job]) is not None:
                    loads[before] -= 1
                source = min(sources, key=loads.__getitem__)
                chosen[job] = source
                loads[source] += 1
        if chosen == last:
            break
    for job, taken in enumerate(chosen):
        if taken is not None:
            held[taken].add(job)
    while chain := _chain(transfers, choices, held, loads):
        for job, source, target in chain:
            held[source].remove(job)
            held[target].add(job)
            chosen[job] = target
        loads[chain[0][1]] -= 1
        loads[chain[-1][2]] += 1
    return chosen


def _chain(
    transfers: Sequence[Hashable],
    choices: Mapping[Hashable, Sequence[int]],
    held: Sequence[set[int]],
    loads: Sequence[int],
) -> list[tuple[int, int, int]]:
    """Returns moves (transfer, source, target) from a most loaded source to one with two less; none if not possible."""
    most = max(loads, default=0)
    came: dict[int, tuple[int, int] | None] = {source: None for source, load in enumerate(loads) if load == most}
    queue, seen = deque(came), set()
    while queue and len(came) < len(loads):
        source = queue.popleft()
        for job in held[source]:
            what = transfers[job]
            if what in seen:
                continue
            seen.add(what)
            for target in choices[what]:
                if target in came:
                    continue
                came[target] = (job, source)
                if loads[target] + 2 <= most:
                    moves = []
                    step = target
                    while (back := came[step]) is not None:
                        moves.append((*back, step))
                        step = back[1]
                    return moves[::-1]
                queue.append(target)
    return []
