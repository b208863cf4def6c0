"""What the experts had to do lately, and whether another placement would pay. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.allocation import Allocation, allocate, layer_text
from moc_ckpt.lazarus.domains import spread_over_domains
from moc_ckpt.lazarus.evenness import even_out, imbalance
from moc_ckpt.lazarus.migration import Migration, migrate
from moc_ckpt.lazarus.placement import mro
from moc_ckpt.lazarus.ranks import join, split
from moc_ckpt.lazarus.types import Placement

__all__ = ["Costs", "LoadHistory", "Rebalance", "as_lists", "layer_seconds", "plan_rebalance", "slots_per_place"]

_PerLayer = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LoadHistory:
    """Tokens per expert over the last observations. Immutable: `observe` returns a new one.

    Attributes:
        window: observations that count; older ones are forgotten.
        samples: (step, per layer and expert the tokens processed so far), the oldest first. The loads are what the
            last one has more than the first one.
    """

    window: int
    samples: tuple[tuple[int, _PerLayer], ...]

    @classmethod
    def start(cls, experts: Sequence[int], window: int = 4) -> LoadHistory:
        """Returns a history that begins at step 0.

        Args:
            experts: number of experts of each MoE layer.
            window: observations that count, at least 1.
        """
        if window < 1:
            raise ConfigError(f"a history of {window} observations", fix="keep at least 1")
        return cls(window, ((0, tuple((0,) * count for count in experts)),))

    def observe(self, step: int, processed: Sequence[Sequence[int]]) -> LoadHistory:
        """Returns the history with one more observation.

        Counts or steps that go back mean that training was restored: the history then begins anew from there.

        Args:
            step: engine.global_steps.
            processed: per layer and expert the tokens processed so far, over all ranks: `processed` of the PEC ledger.

        Raises:
            ConfigError: if layers or experts are not those of the history.
        """
        counts = tuple(tuple(int(count) for count in layer) for layer in processed)
        last_step, last = self.samples[-1]
        if [len(layer) for layer in counts] != [len(layer) for layer in last]:
            raise ConfigError(
                f"counts of {[len(layer) for layer in counts]} experts for layers of {[len(layer) for layer in last]}",
                fix="a history belongs to one model",
            )
        back = step < last_step or any(
            new < old for now, then in zip(counts, last, strict=True) for new, old in zip(now, then, strict=True)
        )
        if back:
            return replace(self, samples=((step, counts),))
        kept = self.samples if step > last_step else self.samples[:-1]
        return replace(self, samples=(*kept, (step, counts))[-self.window - 1 :])

    @property
    def loads(self) -> _PerLayer:
        """Per layer and expert the tokens within the window."""
        first, last = self.samples[0][1], self.samples[-1][1]
        return tuple(
            tuple(new - old for new, old in zip(now, then, strict=True)) for now, then in zip(last, first, strict=True)
        )

    @property
    def steps(self) -> int:
        """Steps within the window."""
        return self.samples[-1][0] - self.samples[0][0]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step and a migration take.

    Attributes:
        layer_s: seconds per step that the experts of one MoE layer need where all nodes have the same work.
        expert_bytes: bytes of one copy of an expert, its optimizer state included.
        bandwidth: bytes per second that a node sends, and receives at the same time.
        fixed_s: seconds that a migration takes beside its transfers (a restart, for now).
    """

    layer_s: float
    expert_bytes: float
    bandwidth: float
    fixed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rebalance:
    """A decision, and the plan that it is about.

    Attributes:
        worth_it: whether the gain is larger than the cost, or a layer has lost its fault threshold.
        before: for each MoE layer the imbalance of the present placement under the new loads.
        after: the same of the plan.
        gain_s: seconds that the plan saves over the steps it is meant for.
        cost_s: seconds that it costs.
        allocations: for each MoE layer; None for one that keeps its placement.
        migration: the new placements of nodes and the transfers between them.
        placements: for each MoE layer the placement after it, of the places that it was planned for (nodes or ranks).
        repaired: numbers of the MoE layers that have an expert on fewer nodes than the fault threshold asks for, which
            the plan puts right whatever it costs.
    """

    worth_it: bool
    before: tuple[float, ...]
    after: tuple[float, ...]
    gain_s: float
    cost_s: float
    allocations: tuple[Allocation | None, ...]
    migration: Migration
    placements: tuple[Placement, ...]
    repaired: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """One line for a log."""
        moved = sum(allocation is not None for allocation in self.allocations)
        worst, best = max(self.before), max(self.after)
        verdict = "is needed" if self.repaired else "pays" if self.worth_it else "does not pay"
        repaired = f"{len(self.repaired)} of them below the fault threshold, " if self.repaired else ""
        return (
            f"rebalance {verdict}: {self.gain_s:.3g} s gained, {self.cost_s:.3g} s spent; "
            f"{moved} of {len(self.before)} MoE layers, "
            f"{repaired}{len(self.migration.transfers)} transfers, worst imbalance {worst:.2f} -> {best:.2f}"
        )

    def to_data(self) -> dict[str, Any]:
        """Returns plain data for an event: the decision, the plan (per layer and place its experts), the transfers."""
        return {
            "worth_it": self.worth_it,
            "gain_s": self.gain_s,
            "cost_s": self.cost_s,
            "imbalance_before": list(self.before),
            "imbalance_after": list(self.after),
            "repaired_layers": list(self.repaired),
            "placements": as_lists(self.placements),
            "transfers": [
                {
                    "layer": item.layer,
                    "expert": item.expert,
                    "source": item.source,
                    "destination": item.destination,
                }
                for item in self.migration.transfers
            ],
        }


def as_lists(placements: Sequence[Placement]) -> list[list[list[int]]]:
    """Returns placements as an event has them: per layer and place its experts."""
    return [[list(held) for held in placement.slots] for placement in placements]


def layer_seconds(step_s: float, dense: float, active: float, imbalances: Sequence[float]) -> float:
    """Estimates what the experts of one MoE layer need per step where all places have the same work.

    Computing takes as long as a token passes parameters, and the experts of a layer as long as the most loaded place.

    Args:
        step_s: seconds of a step under the present placements.
        dense: parameters that every token passes.
        active: parameters of one layer's experts that a token passes: k experts.
        imbalances: of each MoE layer, under the present placement.
    """
    passed = dense + active * sum(imbalances)
    return step_s * active / passed if passed else 0.0


def plan_rebalance(
    current: Sequence[Placement],
    loads: Sequence[Sequence[int]],
    *,
    slots: int | None,
    fault_threshold: int,
    steps: int,
    costs: Costs,
    domains: Sequence[int] | None = None,
    ranks_per_node: int = 1,
) -> Rebalance:
    """Plans placements for the loads of late, and decides whether to move to them (pure).

    A layer whose imbalance the plan would not lower keeps its placement, unless an expert of it is on fewer nodes than
    the plan would put it on and the fault threshold asks for: that is put right whatever it costs, and the other layers
    move along if what they gain is more than what they add to the cost. The gain is that of the most loaded places over
    `steps` steps; the cost is that of the node that sends or receives most.

    Args:
        current: for each MoE layer the present placement, of nodes; with `ranks_per_node` above 1 of ranks.
        loads: per layer and expert the tokens, such as `LoadHistory.loads`.
        slots: c, slots of each place of `current`; None for as many as the places of the layer have, all alike.
        fault_threshold: f, as for `allocation.allocate`.
        steps: steps that the plan is meant for: the rebalance interval.
        costs: what steps and transfers take.
        domains: for each node its failure domain, if nodes fail together.
        ranks_per_node: replicas are spread over nodes, each of them so many places of `current` that follow one
            another; the slots of a node are then shared out over its ranks.

    Raises:
        ConfigError: if loads and placements are not of the same model, nodes have different numbers of ranks, places
            have different numbers of slots and none is given, or the costs are not positive.
        MocError: if an expert has no copy.
    """
    if len(current) != len(loads) or not current:
        raise ConfigError(f"loads of {len(loads)} MoE layers for placements of {len(current)}", fix="give one for each")
    numbers = (costs.layer_s, costs.expert_bytes, costs.bandwidth, costs.fixed_s)
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or not costs.bandwidth or steps < 0:
        raise ConfigError("costs are negative, or the bandwidth is not positive", where=str(costs))
    rooms = [slots_per_place(now, layer=layer) if slots is None else slots for layer, now in enumerate(current)]
    present = [join(now, ranks_per_node) for now in current]
    before: list[float] = []
    wanted: list[tuple[Placement, Allocation] | None] = []
    repaired = []
    for layer, (now, nodes, tokens) in enumerate(zip(current, present, loads, strict=True)):
        if now.num_experts != len(tokens):
            raise ConfigError(
                f"loads of {len(tokens)} experts for a placement of {now.num_experts}", where=layer_text(layer)
            )
        before.append(imbalance(now, tokens))
        wanted.append(None)
        if not any(tokens):
            continue
        count, room = len(nodes.slots), rooms[layer] * ranks_per_node
        allocation = allocate(tokens, count, room, fault_threshold, layer=layer)
        plan = even_out(mro(allocation.replicas, count, room, layer=layer), tokens)
        lost = _fewest_nodes(nodes) < min(allocation.fault_threshold, _fewest_nodes(plan))
        if lost:
            repaired.append(layer)
        if lost or imbalance(split(plan, ranks_per_node, rooms[layer], tokens), tokens) < before[layer]:
            wanted[layer] = (plan if domains is None else spread_over_domains(plan, domains), allocation)

    def moving(chosen: Sequence[tuple[Placement, Allocation] | None]) -> Rebalance:
        plans = [now if move is None else move[0] for now, move in zip(present, chosen, strict=True)]
        migration = migrate(present, plans, domains=domains, plan_domains=domains)
        placements = tuple(
            now if move is None else split(moved.placement, ranks_per_node, room, tokens)
            for now, move, moved, room, tokens in zip(current, chosen, migration.layers, rooms, loads, strict=True)
        )
        after = tuple(imbalance(planned, tokens) for planned, tokens in zip(placements, loads, strict=True))
        gain = costs.layer_s * steps * sum(old - new for old, new in zip(before, after, strict=True))
        busiest = max([0, *migration.sent.values(), *migration.received.values()])
        cost = busiest * costs.expert_bytes / costs.bandwidth + costs.fixed_s if any(chosen) else 0.0
        allocations = tuple(move and move[1] for move in chosen)
        worth_it = gain > cost or bool(repaired)
        return Rebalance(
            worth_it, tuple(before), after, gain, cost, allocations, migration, placements, tuple(repaired)
        )

    found = moving(wanted)
    if repaired and len(repaired) < sum(move is not None for move in wanted):
        needed = moving([move if layer in repaired else None for layer, move in enumerate(wanted)])
        if found.gain_s - needed.gain_s <= found.cost_s - needed.cost_s:
            return needed
    return found


def slots_per_place(placement: Placement, *, layer: int | None = None) -> int:
    """Returns the number of slots that every place of a placement has.

    Raises:
        ConfigError: if it is not the same everywhere: nothing is planned for such places.
    """
    counts = {len(held) for held in placement.slots}
    if len(counts) != 1:
        raise ConfigError(
            f"places have {', '.join(map(str, sorted(counts)))} slots, and placements are planned for equally many",
            where=layer_text(layer),
            fix="give every rank the same number of slots",
        )
    return counts.pop()


def _fewest_nodes(placement: Placement) -> int:
    """Returns on how many nodes the expert is that is on the fewest."""
    counted = Counter(expert for held in placement.slots for expert in set(held))
    return min(counted[expert] for expert in range(placement.num_experts))
