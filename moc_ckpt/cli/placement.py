"""`moc-ckpt placement`: how many replicas each expert gets, on which nodes, and what failures that survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moc_ckpt.cli.common import AsJson, print_json, stdout, what_went_wrong
from moc_ckpt.cli.placement_input import parse_numbers, parse_racks, read_checkpoint, read_loads, read_plan, skewed
from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.allocation import Allocation, allocate
from moc_ckpt.lazarus.domains import count_recoverable_domains, spread_over_domains
from moc_ckpt.lazarus.evenness import even_out, imbalance
from moc_ckpt.lazarus.placement import PLACEMENTS
from moc_ckpt.lazarus.probability import TooManyStatesError, count_recoverable, probabilities, recoverable_bound
from moc_ckpt.lazarus.ranks import split
from moc_ckpt.lazarus.types import Placement
from moc_ckpt.state.unit_text import number_ranges

__all__ = ["LayerPlan", "Planned", "placement"]

_LOADS = "loads: one of these"
_CLUSTER = "the nodes"
_MOVE = "moving from an old plan"
# About 10 s.
_MOST_NODES = 2048
_OUTPUT = "output"

Probabilities = dict[str, tuple[float, ...] | None]
"""By placement and number of failed nodes; None for one that is too irregular to be counted."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What was planned for one MoE layer.

    Attributes:
        layer: its ordinal.
        loads: of the experts; None where the replicas were given.
        allocation: of replicas.
        placements: by name, of nodes.
        survival: by name, for k failed nodes.
        bound: what no placement can exceed, for k failed nodes.
        rack_survival: by name, for k failed racks; None without racks.
        ranks: `mro` on ranks; None without --gpus-per-node.
    """

    layer: int
    loads: tuple[float, ...] | None
    allocation: Allocation
    placements: dict[str, Placement]
    survival: Probabilities
    bound: tuple[float, ...]
    rack_survival: Probabilities | None
    ranks: Placement | None

    @property
    def mro(self) -> Placement:
        """The placement to use."""
        return self.placements["mro"]

    @property
    def imbalance(self) -> float | None:
        """Work of the most loaded node over the mean."""
        return None if self.loads is None else imbalance(self.mro, self.loads)


@dataclass(frozen=True, slots=True)
class Planned:
    """All that the verb found out.

    Attributes:
        nodes: N.
        slots: c.
        layers: for each MoE layer.
        survival: of all layers together; of the only one if there is one.
        racks: for each node its rack; None without racks.
        migration: from the old plan; None without one.
    """

    nodes: int
    slots: int
    layers: tuple[LayerPlan, ...]
    survival: Probabilities
    racks: tuple[int, ...] | None
    migration: Any


def placement(
    loads: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each expert, such as 5,3,1,1; or a file of them, a line (or JSON list) per MoE layer.",
            rich_help_panel=_LOADS,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Tokens from a checkpoint's ledger.", rich_help_panel=_LOADS),
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="Of the checkpoint. (default: `latest`)", rich_help_panel=_LOADS)
    ] = None,
    skew: Annotated[
        float | None,
        typer.Option(metavar="R", help="One expert has R times the mean load.", rich_help_panel=_LOADS),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts, for --skew.", rich_help_panel=_LOADS)] = None,
    replicas: Annotated[
        str | None, typer.Option(help="Replicas of each expert, such as 2,3,3,4.", rich_help_panel=_LOADS)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Nodes. (default: those of --old that are left)", rich_help_panel=_CLUSTER)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots of each node, shared by its GPUs.", rich_help_panel=_CLUSTER)
    ] = None,
    fault_threshold: Annotated[
        int | None,
        typer.Option(help="Replicas of each expert at least. (default: 2, or 1 on one node)", rich_help_panel=_CLUSTER),
    ] = None,
    racks: Annotated[
        str | None,
        typer.Option(help="Nodes that fail together: number of racks, or the rack of each.", rich_help_panel=_CLUSTER),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Show the slots of each GPU, too.", rich_help_panel=_CLUSTER)
    ] = None,
    old: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What an earlier --json printed: plan the transfers.", rich_help_panel=_MOVE),
    ] = None,
    failed: Annotated[
        str, typer.Option(help="Nodes of the old plan that are gone, such as 1,3.", rich_help_panel=_MOVE)
    ] = "",
    joined: Annotated[int, typer.Option(help="New nodes.", rich_help_panel=_MOVE)] = 0,
    from_checkpoint: Annotated[
        bool,
        typer.Option(
            "--from-checkpoint",
            help="Take experts that no live node holds from a checkpoint.",
            rich_help_panel=_MOVE,
        ),
    ] = False,
    layer: Annotated[int | None, typer.Option(help="Only this MoE layer, in full.", rich_help_panel=_OUTPUT)] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw survival by failed nodes (needs matplotlib).", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plan replicas of experts: how many, on which nodes, what failures they survive, what has to move.

    MRO is the placement to use; mro_paper (the published construction), spread and compact are shown beside it.
    """
    with what_went_wrong(as_json):
        before = read_plan(old) if old is not None else None
        gone = parse_numbers(failed, "--failed")
        if before is None and (gone or joined or from_checkpoint):
            raise ConfigError("there is no old plan", where="--failed, --joined, --from-checkpoint", fix="give --old")
        if nodes is None and before is not None:
            nodes = len(next(iter(before.values())).slots) - len(set(gone)) + joined
        if nodes is None or slots is None:
            raise ConfigError("the cluster is not known", where="--nodes, --slots", fix="give both")
        if nodes > _MOST_NODES:
            raise ConfigError(
                f"{nodes:,} nodes: survival is counted exactly, and for more than {_MOST_NODES:,} that takes minutes",
                where="--nodes",
                fix="plan a part of the cluster; placements of its parts are independent of each other",
            )
        given = _given(loads, checkpoint, tag, skew, experts, replicas)
        threshold = min(2, nodes) if fault_threshold is None else fault_threshold
        rack_of = parse_racks(racks, nodes) if racks is not None else None
        if layer is not None and not 0 <= layer < len(given):
            raise ConfigError(f"there is no MoE layer {layer}", where="--layer", fix=f"give 0 to {len(given) - 1}")
        chosen = range(len(given)) if layer is None else [layer]
        plans = tuple(
            _plan(ordinal, given[ordinal], replicas is not None, nodes, slots, threshold, rack_of, gpus_per_node)
            for ordinal in chosen
        )
        migration = None
        if before is not None:
            ordinals = [item.layer for item in plans]
            if layer is not None:
                before = {name: held for name, held in before.items() if name == layer}
            if list(before) != ordinals:
                raise ConfigError(
                    f"the old plan has not the MoE layers {number_ranges(ordinals)}",
                    where=f"--old {old}",
                    fix="plan the same layers as it, or one of them with --layer",
                )
            from moc_ckpt.lazarus.migration import migrate  # needs scipy, whose import takes long

            migration = migrate(
                list(before.values()),
                [item.mro for item in plans],
                failed=gone,
                joined=joined,
                allow_checkpoint=from_checkpoint,
                domains=rack_of,
                plan_domains=rack_of,
                first_layer=ordinals[0],
            )
        found = Planned(nodes, slots, plans, _together(plans), rack_of, migration)
        if plot is not None:
            from moc_ckpt.cli.placement_plot import draw

            draw(found, plot)
        if as_json:
            print_json(_as_data(found))
        else:
            from moc_ckpt.cli.placement_view import as_text

            stdout().print(as_text(found, plot))


def _given(
    loads: str | None,
    checkpoint: str | None,
    tag: str | None,
    skew: float | None,
    experts: int | None,
    replicas: str | None,
) -> Sequence[Sequence[float]]:
    options = {"--loads": loads, "--checkpoint": checkpoint, "--skew": skew, "--replicas": replicas}
    names = [name for name, value in options.items() if value is not None]
    if len(names) != 1:
        raise ConfigError(
            f"{' and '.join(names)} exclude each other" if names else "the loads of the experts are not known",
            where="the command line",
            fix=f"give one of {', '.join(options)}",
        )
    if (experts is None) != (skew is None):
        raise ConfigError("--skew and --experts belong together", where="the command line", fix="give both")
    if tag is not None and checkpoint is None:
        raise ConfigError("--tag is a checkpoint's", where="--tag", fix="give --checkpoint")
    if checkpoint is not None:
        return read_checkpoint(checkpoint, tag)
    if loads is not None:
        return read_loads(loads)
    if skew is not None:
        return skewed(skew, experts or 0)
    return [parse_numbers(replicas or "", "--replicas")]


def _plan(
    ordinal: int,
    given: Sequence[float],
    are_replicas: bool,
    nodes: int,
    slots: int,
    threshold: int,
    racks: tuple[int, ...] | None,
    gpus_per_node: int | None,
) -> LayerPlan:
    if are_replicas:
        least = min(map(int, given), default=0)
        allocation = Allocation(tuple(map(int, given)), least, least)
    else:
        allocation = allocate(given, nodes, slots, threshold, layer=ordinal)
    placements = {name: place(allocation.replicas, nodes, slots, layer=ordinal) for name, place in PLACEMENTS.items()}
    loads = None if are_replicas else given
    if loads is not None:
        # It survives alike; the others are shown as they are published.
        placements["mro"] = even_out(placements["mro"], loads)
    rack_survival: Probabilities | None = None
    if racks is not None:
        rack_survival = {"mro_unaware": _rack_survival(placements["mro"], racks)}
        placements["mro"] = spread_over_domains(placements["mro"], racks)
        rack_survival = {name: _rack_survival(item, racks) for name, item in placements.items()} | rack_survival
    bound = probabilities(recoverable_bound(allocation.replicas, nodes, slots))
    return LayerPlan(
        ordinal,
        None if loads is None else tuple(loads),
        allocation,
        placements,
        {name: _survival(item) for name, item in placements.items()},
        bound,
        rack_survival,
        split(placements["mro"], gpus_per_node, loads=loads) if gpus_per_node is not None else None,
    )


def _survival(*placements: Placement) -> tuple[float, ...] | None:
    try:
        return probabilities(count_recoverable(*placements))
    except TooManyStatesError:
        return None


def _rack_survival(item: Placement, racks: Sequence[int]) -> tuple[float, ...] | None:
    try:
        return probabilities(count_recoverable_domains(item, racks))
    except TooManyStatesError:
        return None


def _together(plans: Sequence[LayerPlan]) -> Probabilities:
    if len(plans) == 1:
        return plans[0].survival
    return {name: _survival(*(item.placements[name] for item in plans)) for name in PLACEMENTS}


def _as_data(found: Planned) -> dict[str, Any]:
    layers = [_layer_data(item) for item in found.layers]
    data: dict[str, Any] = {"nodes": found.nodes, "slots": found.slots, "racks": found.racks}
    if len(layers) == 1:
        data |= layers[0]
    data["recovery_probability"] = found.survival
    data["layers"] = layers
    if found.migration is not None:
        data["migration"] = {
            "nodes": found.migration.nodes,
            "placement": [[list(held) for held in item.placement.slots] for item in found.migration.layers],
            "copies_moved": [item.transfers for item in found.migration.layers],
            "copies_moved_greedy": [item.greedy for item in found.migration.layers],
            "copies_moved_in_order": [item.identity for item in found.migration.layers],
            "transfers": [
                {"layer": item.layer, "expert": item.expert, "source": item.source, "destination": item.destination}
                for item in found.migration.transfers
            ],
        }
    return data


def _layer_data(plan: LayerPlan) -> dict[str, Any]:
    data: dict[str, Any] = {
        "layer": plan.layer,
        "loads": plan.loads,
        "fault_threshold": plan.allocation.fault_threshold,
        "fault_threshold_asked": plan.allocation.asked,
        "note": plan.allocation.note or None,
        "replicas": plan.allocation.replicas,
        "placement": plan.mro.slots,
        "imbalance": plan.imbalance,
        "recovery_probability": plan.survival,
        "upper_bound": plan.bound,
        "placements": {name: item.slots for name, item in plan.placements.items()},
    }
    if plan.rack_survival is not None:
        data["rack_recovery_probability"] = plan.rack_survival
    if plan.ranks is not None:
        data["ranks"] = plan.ranks.slots
    return data
