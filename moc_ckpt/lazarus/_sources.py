"""Who sends what: jobs to machines of which each job may only use some, the largest load as low as possible. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["balanced_sources"]


def balanced_sources(choices: Sequence[Sequence[int]], count: int) -> list[int | None]:
    """Chooses a source for each transfer so that the most loaded source is as little loaded as possible.

    First each takes the least loaded one, those with the fewest choices first. Then loads are moved along chains, from
    the most loaded source to one with at least two less, until there is no such chain: then no other choice has a lower
    maximum (the argument is that of semi-matchings: the sources that the fullest ones reach are all full).

    Args:
        choices: for each transfer the sources that it can use; none for one that has no source.
        count: number of sources.

    Returns:
        For each transfer its source, or None.
    """
    loads = [0] * count
    chosen: list[int | None] = [None] * len(choices)
    jobs: list[set[int]] = [set() for _ in range(count)]
    for job in sorted(range(len(choices)), key=lambda index: (len(choices[index]), index)):
        if choices[job]:
            source = min(choices[job], key=lambda item: (loads[item], item))
            chosen[job] = source
            loads[source] += 1
            jobs[source].add(job)
    stuck: set[int] = set()
    while len(stuck) < count:
        top = max((source for source in range(count) if source not in stuck), key=lambda item: loads[item])
        if loads[top] < max(loads):
            break  # the most loaded ones cannot be relieved
        chain = _chain(top, choices, jobs, loads)
        if chain is None:
            stuck.add(top)
            continue
        for job, source, target in chain:
            jobs[source].remove(job)
            jobs[target].add(job)
            chosen[job] = target
        loads[top] -= 1
        loads[chain[-1][2]] += 1
    return chosen


def _chain(
    top: int, choices: Sequence[Sequence[int]], jobs: Sequence[set[int]], loads: Sequence[int]
) -> list[tuple[int, int, int]] | None:
    """Returns moves (job, source, target) that take one from `top` to a source with at least two less, if there are."""
    came: dict[int, tuple[int, int] | None] = {top: None}
    queue = deque([top])
    while queue:
        source = queue.popleft()
        for job in jobs[source]:
            for target in choices[job]:
                if target in came:
                    continue
                came[target] = (job, source)
                if loads[target] + 2 <= loads[top]:
                    moves = []
                    step: int = target
                    while (back := came[step]) is not None:
                        moves.append((back[0], back[1], step))
                        step = back[1]
                    return moves[::-1]
                queue.append(target)
    return None
