"""From places of nodes to places of ranks, and back. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.evenness import reassigned, work_per_slot
from moc_ckpt.lazarus.types import Placement

__all__ = ["join", "split"]


def join(placement: Placement, ranks_per_node: int) -> Placement:
    """Returns the placement of nodes that one of ranks makes: rank r is on node r // ranks_per_node.

    Raises:
        ConfigError: if there is no whole number of nodes.
    """
    count = len(placement.slots)
    if ranks_per_node < 1 or count % ranks_per_node:
        raise ConfigError(
            f"{count} ranks are no whole number of nodes of {ranks_per_node}", fix="give nodes equally many ranks"
        )
    nodes = range(0, count, ranks_per_node)
    return Placement(
        placement.num_experts, tuple(sum(placement.slots[at : at + ranks_per_node], start=()) for at in nodes)
    )


def split(
    placement: Placement,
    ranks_per_node: int,
    slots_per_rank: int | None = None,
    loads: Sequence[float] | None = None,
) -> Placement:
    """Shares out the slots of each node over its ranks, with few local copies.

    Two slots of an expert on one rank are one copy there. So whole ranks are filled with one expert as long as it has
    as many slots, and what remains of an expert, the most first, goes onto the rank with the least room that takes all
    of it; only if there is none it is split. With loads, experts with equally many slots on their ranks then change
    places within the node, as in `even_out`, so that its ranks have about the same work.

    Args:
        placement: of nodes.
        ranks_per_node: ranks (GPUs) of a node.
        slots_per_rank: slots of a rank; by default those of the fullest node over its ranks, rounded up.
        loads: per expert its tokens; None if they do not matter.

    Returns:
        A placement of nodes * ranks_per_node places: rank r is on node r // ranks_per_node.

    Raises:
        ConfigError: if a node has more experts than its ranks have slots.
    """
    if ranks_per_node < 1:
        raise ConfigError(f"ranks_per_node is {ranks_per_node}", fix="give at least 1")
    most = max((len(experts) for experts in placement.slots), default=0)
    room = slots_per_rank if slots_per_rank is not None else -(-most // ranks_per_node)
    if most > room * ranks_per_node:
        raise ConfigError(
            f"{ranks_per_node} ranks of {room} slots do not hold the {most} slots of a node",
            fix=f"give {-(-most // ranks_per_node)} slots per rank",
        )
    shares = work_per_slot(placement, loads) if loads is not None and ranks_per_node > 1 and room > 1 else None
    # Nodes of one group of experts hold the same ones.
    known: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    ranks: list[tuple[int, ...]] = []
    for experts in placement.slots:
        if experts not in known:
            held = _split_node(experts, ranks_per_node, room)
            known[experts] = held if shares is None else _even_ranks(held, shares)
        ranks += known[experts]
    return Placement(placement.num_experts, tuple(ranks))


def _split_node(experts: tuple[int, ...], count: int, room: int) -> list[tuple[int, ...]]:
    ranks: list[list[int]] = [[] for _ in range(count)]
    # The most slots first: whole ranks come out of that by themselves, since the tightest rank that fits is empty then.
    for expert, number in sorted(Counter(experts).items(), key=lambda item: (-item[1], item[0])):
        while number:
            vacant = [(room - len(held), rank) for rank, held in enumerate(ranks) if len(held) < room]
            fits = [item for item in vacant if item[0] >= number]
            most, rank = min(fits) if fits else max(vacant, key=lambda item: (item[0], -item[1]))
            take = min(number, most)
            ranks[rank] += [expert] * take
            number -= take
    return [tuple(held) for held in ranks]


def _even_ranks(ranks: list[tuple[int, ...]], shares: Sequence[float]) -> list[tuple[int, ...]]:
    blocks = [(expert, rank, number) for rank, held in enumerate(ranks) for expert, number in Counter(held).items()]
    where = [[rank] * number for _, rank, number in blocks]
    roles = reassigned(where, [shares[expert] for expert, _, _ in blocks], len(ranks))
    found: list[list[int]] = [[] for _ in ranks]
    for (expert, _, number), role in zip(blocks, roles, strict=True):
        found[blocks[role][1]] += [expert] * number
    return [tuple(held) for held in found]
