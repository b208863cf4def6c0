"""Better placements than the published one where it leaves experts under-spread. Pure.

What is compared: how many failures of 1, 2, … nodes are fatal, the fewest nodes first (they are the likeliest), so a
placement that is best in this order is dominated by none, and is the best at every count if there is such a one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

from moc_ckpt.lazarus._build import Nodes, borrowed, node_masks, published, regular, shifted
from moc_ckpt.lazarus.probability import TooManyStatesError, count_sets, leading_terms

__all__ = ["improved"]

_TABLE_NODES = 10
"""Up to so many nodes all 2^N failures are looked at, in one integer of 2^N bits."""
_MAX_TRIALS = 3_000
"""Changes that the local search looks at from one start."""
_STARTS = 2
_MANY_SLOTS = 512
_MAX_STATES = 256

_Score = tuple[int, ...]


def improved(replicas: Sequence[int], count: int, slots: int) -> Nodes:
    """Returns the published construction or something better (no exhaustive search).

    Args:
        replicas: of each expert, ascending.
        count: N, nodes.
        slots: c, slots of each node.
    """
    start = published(replicas, count, slots)
    if regular(replicas, count, slots):
        return start
    experts = len(replicas)
    # Building and counting take milliseconds each where there are thousands of slots.
    few = 2 if count * slots > _MANY_SLOTS else None
    variants = [
        *islice(shifted(replicas, count, slots), few),
        *islice(borrowed(replicas, count, slots), few),
    ]
    if count <= _TABLE_NODES:
        score = _table_score(count)
        ranked = sorted([start, *variants], key=lambda nodes: score(node_masks(nodes, experts)))
        found = [_climb(nodes, experts, slots, score) for nodes in ranked[:_STARTS]]
        return min(found, key=lambda nodes: score(node_masks(nodes, experts)))
    ranked = sorted(variants, key=lambda nodes: leading_terms(node_masks(nodes, experts), count))
    best, most = start, count_sets(node_masks(start, experts), count)
    for nodes in ranked[: few or 2 * _STARTS]:
        try:
            survived = count_sets(node_masks(nodes, experts), count, max_states=_MAX_STATES)
        except TooManyStatesError:
            continue
        if survived > most:
            best, most = nodes, survived
    return best


@lru_cache(maxsize=2)
def _tables(count: int) -> tuple[list[int], list[int]]:
    """Returns for each mask the failures that contain it, and for each size the failures of it; a bit per failure."""
    full = (1 << (1 << count)) - 1
    single = []
    for node in range(count):
        step = 1 << node
        block = ((1 << step) - 1) << step
        single.append(block * (full // ((1 << 2 * step) - 1)))
    above = [full]
    for node in range(count):
        above += [item & single[node] for item in above]
    sizes = [0] * (count + 1)
    for failure in range(1 << count):
        sizes[failure.bit_count()] |= 1 << failure
    return above, sizes


def _table_score(count: int) -> Callable[[Sequence[int]], _Score]:
    above, sizes = _tables(count)

    def score(masks: Sequence[int]) -> _Score:
        fatal = 0
        for mask in masks:
            fatal |= above[mask]
        return tuple((fatal & size).bit_count() for size in sizes)

    return score


def _climb(nodes: Nodes, experts: int, slots: int, score: Callable[[Sequence[int]], _Score]) -> Nodes:
    """Moves single replicas, or swaps two, as long as that helps: steepest first, up to `_MAX_TRIALS` trials.

    Of equally good placements the one with more copies on different nodes is preferred, which leaves more ways on.
    """

    def value(masks: Sequence[int]) -> tuple[_Score, int]:
        return score(masks), -sum(mask.bit_count() for mask in masks)

    nodes = [list(held) for held in nodes]
    best = value(node_masks(nodes, experts))
    trials = 0
    while trials < _MAX_TRIALS:
        masks = node_masks(nodes, experts)
        counted = [{expert: held.count(expert) for expert in set(held)} for held in nodes]
        step: tuple[int, int, int, int] | None = None
        for here, there, out, back in _changes(nodes, slots):
            changed = list(masks)
            changed[out] = _without(masks[out], here, counted[here][out]) | 1 << there
            if back >= 0:
                changed[back] = _without(masks[back], there, counted[there][back]) | 1 << here
            if changed == masks:
                continue
            trials += 1
            found = value(changed)
            if found < best:
                best, step = found, (here, there, out, back)
            if trials >= _MAX_TRIALS:  # within one round: with many slots it has millions
                break
        if step is None:
            break
        here, there, out, back = step
        nodes[here].remove(out)
        nodes[there].append(out)
        if back >= 0:
            nodes[there].remove(back)
            nodes[here].append(back)
    return nodes


def _changes(nodes: Nodes, slots: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (node, other node, expert that moves there, expert that comes back), each once; -1: into a vacant slot."""
    for here, held in enumerate(nodes):
        for there, others in enumerate(nodes):
            if there == here:
                continue
            vacant = [-1] if len(others) < slots else []
            # A swap is seen from one of its sides.
            comers = [*vacant, *(sorted(set(others)) if there > here else ())]
            yield from ((here, there, out, back) for out in sorted(set(held)) for back in comers if out != back)


def _without(mask: int, node: int, copies: int) -> int:
    return mask & ~(1 << node) if copies == 1 else mask
