"""From the copies that are left to a new placement: which node takes which place, and who sends what. Pure.

Failures, joins and rebalancing are one case: some of the old nodes live, some nodes are new and hold nothing, and a new
plan has as many places as there are nodes then. Places are nodes or ranks alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import ConfigError, MocError
from moc_ckpt.lazarus._sources import balanced_sources
from moc_ckpt.lazarus.allocation import layer_text
from moc_ckpt.lazarus.types import Placement

__all__ = ["LayerMigration", "Migration", "Transfer", "migrate"]

_Costs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One expert that one node has to get.

    Attributes:
        layer: ordinal of the MoE layer.
        expert: number of the expert.
        source: the node that sends it; None: no node has it, it comes from a checkpoint.
        destination: the node that gets it.
    """

    layer: int
    expert: int
    source: int | None
    destination: int


@dataclass(frozen=True, slots=True)
class LayerMigration:
    """What one MoE layer's migration decided.

    Attributes:
        placement: the new placement; its place i is node `Migration.nodes[i]`.
        places: for each of these nodes the place of the plan that it takes.
        transfers: copies that move.
        greedy: copies that would move with the paper's greedy mapping.
        identity: copies that would move if the nodes took the places in order.
    """

    placement: Placement
    places: tuple[int, ...]
    transfers: int
    greedy: int
    identity: int


@dataclass(frozen=True, slots=True)
class Migration:
    """A migration of all MoE layers.

    Attributes:
        nodes: the nodes after it, ascending. Old nodes keep their numbers; new ones have those after the last old one.
        layers: for each MoE layer.
        transfers: ordered by layer, destination and expert.
    """

    nodes: tuple[int, ...]
    layers: tuple[LayerMigration, ...]
    transfers: tuple[Transfer, ...]

    @property
    def sent(self) -> dict[int, int]:
        """Number of transfers by source, for all nodes."""
        counts = dict.fromkeys(self.nodes, 0)
        for item in self.transfers:
            if item.source is not None:
                counts[item.source] += 1
        return counts

    @property
    def received(self) -> dict[int, int]:
        """Number of transfers by destination, for all nodes."""
        counts = dict.fromkeys(self.nodes, 0)
        for item in self.transfers:
            counts[item.destination] += 1
        return counts

    @property
    def from_checkpoint(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of those that no node has, each once."""
        return tuple(dict.fromkeys((item.layer, item.expert) for item in self.transfers if item.source is None))


def migrate(
    old: Sequence[Placement],
    plan: Sequence[Placement],
    *,
    failed: Sequence[int] = (),
    joined: int = 0,
    allow_checkpoint: bool = False,
    domains: Sequence[int] | None = None,
    plan_domains: Sequence[int] | None = None,
    first_layer: int = 0,
) -> Migration:
    """Plans a migration (pure).

    For every layer the nodes take the places of the plan so that as few copies as possible have to move: of the paper's
    greedy mapping and an optimal assignment the better one. Each missing copy comes from a live node that has one, such
    that the node that sends most, over all layers, sends as little as possible.

    Args:
        old: for each MoE layer the placement so far; place i is node i.
        plan: for each MoE layer the placement wanted.
        failed: nodes that are gone.
        joined: number of new nodes.
        allow_checkpoint: list experts that no live node holds as to be read from a checkpoint, instead of refusing.
        domains: for each node after it (in the order of `Migration.nodes`) its failure domain; with `plan_domains` a
            node only takes a place of its own domain.
        plan_domains: for each place of the plan its failure domain.
        first_layer: ordinal of the first of these MoE layers, in transfers and messages.

    Raises:
        ConfigError: if layers, experts, nodes or domains do not belong together.
        MocError: if an expert has no live copy; it names expert and layer.
    """
    nodes = _nodes(old, plan, failed, joined, first_layer)
    apart = _apart(domains, plan_domains, len(nodes))
    pairs = list(enumerate(zip(old, plan, strict=True), first_layer))
    new_experts = [(layer, expert) for layer, (before, after) in pairs for expert in _lost(before, after, nodes)]
    if new_experts and not allow_checkpoint:
        layer, expert = new_experts[0]
        more = f" (and {len(new_experts) - 1} more)" if len(new_experts) > 1 else ""
        raise MocError(
            f"no live node has a copy of expert {expert} of {layer_text(layer)}{more}",
            where=f"{len(nodes) - joined} live nodes of {len(old[0].slots)}, failed: {', '.join(map(str, failed))}",
            fix="restore from a checkpoint, or plan with experts taken from one",
        )
    layers, needs = [], []
    choices: dict[Hashable, Sequence[int]] = {}
    for layer, (before, after) in pairs:
        holds = _holds(before, nodes)
        wants = _holds(after, range(len(nodes)))
        cost = wants.sum(axis=1)[None, :] - holds.astype(np.int64) @ wants.T.astype(np.int64)
        places, greedy = _mapping(cost, apart)
        missing = wants[places] & ~holds
        layers.append(
            LayerMigration(
                Placement(after.num_experts, tuple(after.slots[place] for place in places)),
                tuple(int(place) for place in places),
                int(missing.sum()),
                greedy,
                int(np.trace(cost)),
            )
        )
        needs += [(layer, expert, index) for index, expert in np.argwhere(missing).tolist()]
        for expert in np.flatnonzero(missing.any(axis=0)).tolist():
            choices[layer, expert] = np.flatnonzero(holds[:, expert]).tolist()
    sources = balanced_sources([(layer, expert) for layer, expert, _ in needs], choices, len(nodes))
    transfers = (
        Transfer(layer, expert, None if source is None else nodes[source], nodes[index])
        for (layer, expert, index), source in zip(needs, sources, strict=True)
    )
    return Migration(nodes, tuple(layers), tuple(transfers))


def _nodes(
    old: Sequence[Placement], plan: Sequence[Placement], failed: Sequence[int], joined: int, first_layer: int
) -> tuple[int, ...]:
    if len(old) != len(plan) or not old:
        raise ConfigError(
            f"the new plan has {len(plan)} MoE layers and the old one {len(old)}", fix="plan for the same model"
        )
    count = len(old[0].slots)
    unknown = sorted(set(failed) - set(range(count)))
    if unknown or joined < 0:
        raise ConfigError(
            f"nodes {unknown} failed" if unknown else f"{joined} nodes joined",
            where=f"an old plan of nodes 0 to {count - 1}",
            fix="name nodes of the old plan",
        )
    nodes = tuple(node for node in range(count) if node not in set(failed)) + tuple(range(count, count + joined))
    for layer, (before, after) in enumerate(zip(old, plan, strict=True), first_layer):
        if before.num_experts != after.num_experts:
            raise ConfigError(
                f"the new plan has {after.num_experts} experts and the old one {before.num_experts}",
                where=layer_text(layer),
                fix="plan for the same model",
            )
        if len(before.slots) != count:
            raise ConfigError(
                f"the old plan has {len(before.slots)} nodes, and {count} in the first layer", where=layer_text(layer)
            )
        if len(after.slots) != len(nodes):
            raise ConfigError(
                f"the plan is for another world: it has {len(after.slots)} places for {len(nodes)} nodes "
                f"({count} - {len(set(failed))} failed + {joined} joined)",
                where=layer_text(layer),
                fix=f"plan for {len(nodes)} nodes",
            )
        absent = set(range(after.num_experts)).difference(*after.slots)
        if absent:
            raise ConfigError(
                f"the plan has no replica of expert {min(absent)}",
                where=layer_text(layer),
                fix="give every expert a slot",
            )
    return nodes


def _apart(domains: Sequence[int] | None, plan_domains: Sequence[int] | None, count: int) -> npt.NDArray[np.bool_]:
    if domains is None and plan_domains is None:
        return np.zeros((count, count), dtype=bool)
    if domains is None or plan_domains is None or sorted(domains) != sorted(plan_domains) or len(domains) != count:
        raise ConfigError(
            "the failure domains of the nodes are not those that the plan was made for",
            where=f"{count} nodes",
            fix="give both, with as many nodes in each domain, or neither",
        )
    return np.asarray(domains)[:, None] != np.asarray(plan_domains)[None, :]


def _lost(old: Placement, plan: Placement, nodes: Sequence[int]) -> list[int]:
    alive = {expert for node in nodes if node < len(old.slots) for expert in old.slots[node]}
    return sorted({expert for experts in plan.slots for expert in experts} - alive)


def _holds(placement: Placement, nodes: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Returns [nodes, experts] whether a node has a copy; a node that the placement does not have has none."""
    found = np.zeros((len(nodes), placement.num_experts), dtype=bool)
    for index, node in enumerate(nodes):
        if node < len(placement.slots):
            found[index, list(placement.slots[node])] = True
    return found


def _mapping(cost: _Costs, apart: npt.NDArray[np.bool_]) -> tuple[_Costs, int]:
    """Returns for each node its place with the least total cost, and the cost of the greedy mapping."""
    from scipy.optimize import linear_sum_assignment  # 0.3 s to import

    blocked = np.where(apart, int(cost.sum()) + 1, cost)
    rows, best = linear_sum_assignment(blocked)
    greedy = _greedy(blocked)
    optimum, simple = int(cost[rows, best].sum()), int(cost[rows, greedy].sum())
    return (greedy if simple <= optimum else best), simple


def _greedy(cost: _Costs) -> _Costs:
    """The paper's mapping: again and again the node and place with the fewest new experts (ties by number)."""
    cost = cost.astype(np.int64)
    count = len(cost)
    places = np.full(count, -1, dtype=np.int64)
    taken = int(cost.max(initial=0)) + 1
    for _ in range(count):
        node, place = divmod(int(cost.argmin()), count)
        places[node] = place
        cost[node, :] = taken
        cost[:, place] = taken
    return places
