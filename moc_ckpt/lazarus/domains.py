"""Failure domains: nodes that fail together, such as those of a rack. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.probability import contract, count_recoverable, holder_masks, minimal_sets
from moc_ckpt.lazarus.types import Placement

__all__ = ["count_recoverable_domains", "spread_over_domains"]

_MAX_TRIALS = 1_500


def count_recoverable_domains(placement: Placement, domains: Sequence[int]) -> tuple[int, ...]:
    """Counts the failures of whole domains that leave a copy of every expert.

    Args:
        placement: of nodes.
        domains: for each node the number of its domain, from 0 without gaps.

    Returns:
        For k = 0 to D failed domains, how many of the C(D, k) ways.

    Raises:
        ConfigError: if the domains are not those of this placement.
        TooManyStatesError: as `probability.count_sets`.
    """
    _check(placement, domains)
    return count_recoverable(contract(placement, domains))


def spread_over_domains(placement: Placement, domains: Sequence[int]) -> Placement:
    """Gives the plan's nodes to real ones so that the failure of whole domains is survived as often as possible.

    Only the nodes change places, so what failures of single nodes do to the placement stays as it is. The nodes of each
    smallest set of holders go to different domains, and all sets to the same ones as far as there is room: as for
    nodes, it is overlap that keeps the number of fatal failures low. Exchanges of two nodes then improve on that.

    Args:
        placement: of the plan's nodes.
        domains: for each real node the number of its domain, from 0 without gaps.

    Returns:
        A placement of the real nodes.

    Raises:
        ConfigError: if the domains are not those of this placement.
    """
    _check(placement, domains)
    nodes = len(domains)
    free = Counter(domains)
    # Large domains first, so that sets begin with the same ones.
    ranked = sorted(free, key=lambda domain: (-free[domain], domain))
    domain_of = [-1] * nodes
    sets = minimal_sets(holder_masks(placement))
    for mask in [*sets, (1 << nodes) - 1]:
        used = Counter(domain_of[node] for node in range(nodes) if mask >> node & 1 and domain_of[node] >= 0)
        for node in range(nodes):
            if mask >> node & 1 and domain_of[node] < 0:
                domain = min((d for d in ranked if free[d]), key=lambda d: (used[d], ranked.index(d)))
                domain_of[node] = domain
                used[domain] += 1
                free[domain] -= 1
    domain_of = _exchanged(sets, domain_of)
    waiting: dict[int, list[int]] = {}
    for node, domain in enumerate(domains):
        waiting.setdefault(domain, []).append(node)
    slots: list[tuple[int, ...]] = [()] * nodes
    for node, domain in enumerate(domain_of):
        slots[waiting[domain].pop(0)] = placement.slots[node]
    return Placement(placement.num_experts, tuple(slots))


def _exchanged(sets: Sequence[int], domain_of: list[int]) -> list[int]:
    """Exchanges nodes of two domains as long as fewer failures of domains are fatal, the fewest domains first."""
    score = _score(sets)
    kinds = [tuple(mask >> node & 1 for mask in sets) for node in range(len(domain_of))]
    best, trials, going = score(domain_of), 0, True
    while going and trials < _MAX_TRIALS:
        going = False
        seen = set()
        for first in range(len(domain_of)):
            for second in range(first):
                kind = (kinds[first], domain_of[first], kinds[second], domain_of[second])
                if kinds[first] == kinds[second] or domain_of[first] == domain_of[second] or kind in seen:
                    continue
                seen.add(kind)
                trials += 1
                changed = list(domain_of)
                changed[first], changed[second] = changed[second], changed[first]
                found = score(changed)
                if found < best:
                    best, domain_of, going = found, changed, True
                    seen.clear()
                if trials >= _MAX_TRIALS:
                    return domain_of
    return domain_of


def _score(sets: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """Returns a function: for nodes' domains the fatal failures by number of domains, to second order."""

    def score(domain_of: Sequence[int]) -> tuple[int, ...]:
        masks = []
        for mask in sets:
            held = 0
            for node, domain in enumerate(domain_of):
                if mask >> node & 1:
                    held |= 1 << domain
            masks.append(held)
        least = minimal_sets(masks)
        sizes = [0] * (max(domain_of) + 2)
        for index, mask in enumerate(least):
            sizes[mask.bit_count()] += 1
            for other in least[:index]:
                sizes[(mask | other).bit_count()] -= 1
        return tuple(sizes)

    return score


def _check(placement: Placement, domains: Sequence[int]) -> None:
    if len(domains) != len(placement.slots):
        raise ConfigError(
            f"{len(domains)} nodes have a failure domain, and the placement has {len(placement.slots)}",
            fix="give one domain for each node",
        )
    numbers = set(domains)
    if numbers != set(range(len(numbers))):
        raise ConfigError(
            f"failure domains are numbered {sorted(numbers)}",
            fix=f"number them from 0 to {len(numbers) - 1} without gaps",
        )
