"""Which node holds which replicas of one MoE layer: MRO and what it is compared with. Pure.

`mro` is the placement to use. `mro_paper` is the construction of Lazarus (arXiv 2407.04656, section 4.1), which `mro`
improves where the last group of experts finds fewer nodes than it has replicas; docs/lazarus-placement.md shows where.
`spread` and `compact` are the paper's baselines. How likely each survives: `probability.py`.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus import _build
from moc_ckpt.lazarus._improve import improved
from moc_ckpt.lazarus.allocation import layer_text
from moc_ckpt.lazarus.probability import closed_form
from moc_ckpt.lazarus.types import Placement

__all__ = ["PLACEMENTS", "check_replicas", "closed_form_mro", "compact", "mro", "mro_paper", "spread"]


def mro(replicas: Sequence[int], nodes: int, slots: int, *, layer: int | None = None) -> Placement:
    """Places replicas so that the chance to keep every expert is as high as possible (maximum rank overlap).

    The published construction, and where that leaves experts on fewer nodes than they have replicas, the best of it, of
    variants in which the last group borrows slots from others, and, up to 10 nodes, of a local search over all
    placements. It is the optimum at every number of failed nodes in all cases that were enumerated.

    Args:
        replicas: for each expert its number of slots, at least 1; their sum is at most nodes * slots.
        nodes: N.
        slots: c, slots of each node.
        layer: ordinal of the MoE layer, for messages.

    Returns:
        A placement of N places. Nodes are interchangeable; the ones of the least replicated experts come first.

    Raises:
        ConfigError: if the replicas do not fit, or an expert has none.
    """
    return _placed(replicas, nodes, slots, layer, improved)


def mro_paper(replicas: Sequence[int], nodes: int, slots: int, *, layer: int | None = None) -> Placement:
    """The published construction, for comparison. Arguments, result and errors are those of `mro`."""
    return _placed(replicas, nodes, slots, layer, _build.published)


def compact(replicas: Sequence[int], nodes: int, slots: int, *, layer: int | None = None) -> Placement:
    """Every expert on as few nodes as possible. Arguments, result and errors are those of `mro`."""
    return _placed(replicas, nodes, slots, layer, _build.compact)


def spread(replicas: Sequence[int], nodes: int, slots: int, *, layer: int | None = None) -> Placement:
    """Replicas dealt out round robin, expert by expert. Arguments, result and errors are those of `mro`."""
    check_replicas(replicas, nodes, slots, layer=layer)
    return _frozen(_build.spread(replicas, nodes), len(replicas))


PLACEMENTS: dict[str, Callable[..., Placement]] = {
    "mro": mro,
    "mro_paper": mro_paper,
    "spread": spread,
    "compact": compact,
}
"""All placements by the name that the command line uses."""


def closed_form_mro(replicas: Sequence[int], nodes: int, slots: int) -> tuple[int, ...] | None:
    """Counts what MRO survives from the numbers of replicas alone, without a placement.

    If all experts fit onto one node only the least replicated one matters, else the first of each group of c: their
    node sets are disjoint.

    Args:
        replicas: as for `mro`.
        nodes: N.
        slots: c.

    Returns:
        The counts of `probability.count_recoverable`; None if the last group lacks nodes: there is no closed form.
    """
    ordered = sorted(replicas)
    if not _build.regular(ordered, nodes, slots):
        return None
    return closed_form([min(ordered[0], nodes)] if len(ordered) <= slots else ordered[::slots], nodes)


def _placed(
    replicas: Sequence[int],
    nodes: int,
    slots: int,
    layer: int | None,
    build: Callable[[Sequence[int], int, int], _build.Nodes],
) -> Placement:
    check_replicas(replicas, nodes, slots, layer=layer)
    order = sorted(range(len(replicas)), key=lambda expert: (replicas[expert], expert))
    placed = build([int(replicas[expert]) for expert in order], nodes, slots)
    return _frozen([[order[index] for index in held] for held in placed], len(replicas))


def _frozen(nodes: _build.Nodes, experts: int) -> Placement:
    return Placement(experts, tuple(tuple(held) for held in nodes))


def check_replicas(replicas: Sequence[int], nodes: int, slots: int, *, layer: int | None = None) -> None:
    """Refuses numbers of replicas that cannot be placed. Arguments are those of `mro`.

    Raises:
        ConfigError: names the expert, and the layer if given.
    """
    where = layer_text(layer)
    for name, value in (("nodes", nodes), ("slots", slots)):
        if value < 1:
            raise ConfigError(f"{name} is {value}", where=where, fix="give at least 1")
    if not replicas:
        raise ConfigError("there are no experts", where=where, fix="give the replicas of each expert")
    used = 0
    for expert, number in enumerate(replicas):
        if not isinstance(number, numbers.Integral) or number < 1:
            raise ConfigError(
                f"expert {expert} is to have {number!r} replicas",
                where=where,
                fix="give a whole number of at least 1: without a replica the expert would not exist",
            )
        used += int(number)
        if used > nodes * slots:
            raise ConfigError(
                f"{nodes} nodes of {slots} slots have {nodes * slots} slots, "
                f"and {sum(replicas)} replicas are to be placed: expert {expert} does not fit",
                where=where,
                fix="give more slots or nodes, or fewer replicas",
            )
