"""What `moc-ckpt placement` shows in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.placement import LayerPlan, Planned, Probabilities
from moc_ckpt.lazarus.types import Placement
from moc_ckpt.state.unit_text import number_ranges

__all__ = ["as_text"]

_SHOWN_EXPERTS = 24
_SHOWN_NODES = 24
_SHOWN_SLOTS = 64
_SHOWN_FAILURES = 14
_SHOWN_TRANSFERS = 20
_BAR = 12
_COLOURS = {"mro": "green", "mro_paper": "cyan", "spread": "yellow", "compact": "magenta"}
_EPSILON = 5e-4
"""Probabilities this close to 0 and 1 are not told apart from them."""


def as_text(found: Planned, plot: Path | None = None) -> Group:
    """Returns tables: replicas, map, survival, transfers.

    Args:
        found: what was planned.
        plot: where a plot was drawn, to be named.
    """
    parts: list[Any] = [_summary(found)]
    if len(found.layers) == 1:
        plan = found.layers[0]
        parts += [Text(), _experts(plan), Text(), _map(found, plan)]
        if plan.ranks is not None:
            parts += [Text(), _ranks(found, plan.ranks)]
    else:
        parts += [Text(), _layers(found.layers)]
    bound = found.layers[0].bound if len(found.layers) == 1 else None
    title = "every expert survives" if len(found.layers) == 1 else "every expert of all these layers survives"
    parts += [Text(), _survival(f"{title}, by failed nodes", "nodes", found.survival, bound)]
    racks = found.layers[0].rack_survival
    if racks is not None and len(found.layers) == 1:
        parts += [Text(), _survival("every expert survives, by failed racks", "racks", racks, None)]
    if found.migration is not None:
        parts += [Text(), *_transfers(found)]
    if plot is not None:
        parts += [Text(), Text(f"plot: {plot}")]
    return Group(*parts)


def _noted(table: Table, note: str) -> Group:
    return Group(table, Text(note, style="dim")) if note else Group(table)


def _summary(found: Planned) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    racks = f" in {max(found.racks) + 1} racks" if found.racks is not None else ""
    room = found.nodes * found.slots
    table.add_row("cluster", f"{found.nodes:,} nodes{racks} of {found.slots} slots: {room:,} slots per MoE layer")
    counts = sorted({len(plan.allocation.replicas) for plan in found.layers})
    what = f"{' or '.join(map(str, counts))} experts"
    layers = f"MoE layer {found.layers[0].layer}: {what}" if len(found.layers) == 1 else ""
    table.add_row("model", layers or f"{len(found.layers)} MoE layers of {what}")
    least = min(plan.allocation.fault_threshold for plan in found.layers)
    spread_out = all(_spread_out(plan) for plan in found.layers)
    failures = "any failed node is survived" if least == 2 else f"any {least - 1} failed nodes are survived"
    safe = f"; {failures}" if spread_out and least > 1 else ""
    table.add_row("replicas", f"at least {least} of each expert{safe}")
    for note in dict.fromkeys(plan.allocation.note for plan in found.layers):
        if note:
            table.add_row("note", Text(note, style="yellow"))
    return table


def _spread_out(plan: LayerPlan) -> bool:
    survived = plan.survival["mro"]
    least = plan.allocation.fault_threshold
    return survived is not None and all(value == 1 for value in survived[:least])


def _experts(plan: LayerPlan) -> Group:
    table = Table(title="replicas", title_justify="left", box=None, pad_edge=False)
    for name in ("expert", "tokens", "share", "replicas", "of slots"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("nodes", overflow="fold")
    replicas, loads = plan.allocation.replicas, plan.loads
    order = sorted(range(len(replicas)), key=lambda expert: (-replicas[expert], expert))
    shown = set(order if len(order) <= _SHOWN_EXPERTS else order[: _SHOWN_EXPERTS // 2] + order[-_SHOWN_EXPERTS // 2 :])
    total, slots = sum(loads) if loads else 0, sum(replicas)
    hidden = 0
    for expert in order:
        if expert not in shown:
            hidden += 1
            continue
        if hidden:
            table.add_row("...", "", "", "", "", "", Text(f"{hidden} more", style="dim"))
            hidden = 0
        load = loads[expert] if loads else None
        table.add_row(
            str(expert),
            "-" if load is None else f"{load:,}",
            "-" if load is None or not total else f"{load / total:.1%}",
            str(replicas[expert]),
            f"{replicas[expert] / slots:.1%}",
            ProgressBar(total=max(replicas), completed=replicas[expert], width=_BAR),
            number_ranges(plan.mro.holders(expert)),
        )
    return _noted(table, "" if plan.imbalance is None else f"most loaded node: {plan.imbalance:.2f} times the mean")


def _map(found: Planned, plan: LayerPlan) -> Group:
    """A row for each node, or for neighbours that hold the same; less replicated experts are brighter."""
    table = Table(title="placement (mro)", title_justify="left", box=None, pad_edge=False)
    table.add_column("nodes", justify="right")
    if found.racks is not None:
        table.add_column("rack", justify="right")
    table.add_column("experts in its slots", overflow="fold")
    replicas = plan.allocation.replicas
    styles = _styles(replicas)
    width = len(str(len(replicas) - 1))
    rack = found.racks or (0,) * found.nodes
    rows = [
        ([node for node, _ in some], held, domain)
        for (held, domain), some in groupby(enumerate(plan.mro.slots), key=lambda item: (item[1], rack[item[0]]))
    ]
    for places, held, domain in rows[:_SHOWN_NODES]:
        cells = Text()
        for expert in held[:_SHOWN_SLOTS]:
            cells.append(f"{expert:>{width}} ", styles[expert])
        if len(held) > _SHOWN_SLOTS:
            cells.append(f"and {len(held) - _SHOWN_SLOTS} more", "dim")
        if len(held) < found.slots:
            cells.append(f"({found.slots - len(held)} vacant)", "dim")
        name = number_ranges(places)
        table.add_row(*([name, str(domain), cells] if found.racks is not None else [name, cells]))
    hidden = len(rows) - _SHOWN_NODES
    return _noted(table, f"{hidden} more rows: --json has all" if hidden > 0 else "")


def _styles(replicas: Sequence[int]) -> list[str]:
    """Returns a style for each expert: the fewer replicas the hotter, plain above four different numbers."""
    ranked = sorted(set(replicas))
    colours = ("bold red", "yellow", "green", "cyan")
    return [colours[ranked.index(number)] if ranked.index(number) < len(colours) else "" for number in replicas]


def _ranks(found: Planned, ranks: Placement) -> Group:
    per_node = len(ranks.slots) // found.nodes
    table = Table(title="GPUs (mro)", title_justify="left", box=None, pad_edge=False)
    table.add_column("node", justify="right")
    for gpu in range(per_node):
        table.add_column(f"GPU {gpu}", overflow="fold")
    for node in range(min(found.nodes, _SHOWN_NODES)):
        held = ranks.slots[node * per_node : (node + 1) * per_node]
        table.add_row(str(node), *(" ".join(map(str, experts)) for experts in held))
    copies = sum(len(ranks.distinct(rank)) for rank in range(len(ranks.slots)))
    return _noted(table, f"{copies:,} copies of experts in {sum(map(len, ranks.slots)):,} slots")


def _layers(plans: Iterable[LayerPlan]) -> Group:
    table = Table(title="MoE layers (mro)", title_justify="left", box=None, pad_edge=False)
    for name in ("layer", "experts", "replicas", "imbalance", "1 node fails", "2", "3", "4"):
        table.add_column(name, justify="right")
    for plan in plans:
        replicas = plan.allocation.replicas
        survived = plan.survival["mro"]
        cells = ["-"] * 4 if survived is None else [_percent(value) for value in survived[1:5]]
        table.add_row(
            str(plan.layer),
            str(len(replicas)),
            f"{min(replicas)} to {max(replicas)}",
            "-" if plan.imbalance is None else f"{plan.imbalance:.2f}",
            *cells,
            *[""] * (4 - len(cells)),
        )
    return _noted(table, "--layer N shows one in full")


def _survival(title: str, unit: str, survival: Probabilities, bound: Sequence[float] | None) -> Group:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("failed", justify="right")
    shown = {name: values for name, values in survival.items() if not _is_copy(name, values, survival)}
    for name in shown:
        table.add_column(name, justify="right", style=_COLOURS.get(name, ""))
        table.add_column("")
    if bound is not None:
        table.add_column("at most", justify="right", style="dim")
    width = _BAR if len(shown) <= 4 else _BAR // 2
    known = [values for values in shown.values() if values is not None]
    for failed in _choose(known):
        cells: list[Any] = [str(failed)]
        for name, values in shown.items():
            if values is None:
                cells += ["?", ""]
                continue
            style = _COLOURS.get(name, "white")
            cells += [
                _percent(values[failed]),
                ProgressBar(total=1, completed=values[failed], width=width, complete_style=style, finished_style=style),
            ]
        if bound is not None:
            cells.append(_percent(bound[failed]))
        table.add_row(*cells)
    notes = []
    if "mro_paper" in survival and "mro_paper" not in shown:
        notes.append("mro_paper (the published construction) is the same as mro")
    if any(values is None for values in shown.values()):
        notes.append("?: too irregular to be counted")
    if bound is not None:
        notes.append("at most: no placement of these replicas can exceed it")
    if "mro_unaware" in shown:
        notes.append("mro_unaware: mro without regard to racks")
    return _noted(table, "; ".join(notes))


def _is_copy(name: str, values: tuple[float, ...] | None, survival: Mapping[str, Any]) -> bool:
    return name in ("mro_paper",) and values == survival["mro"]


def _choose(known: Sequence[Sequence[float]]) -> list[int]:
    """Returns the numbers of failures to show: those where something happens, not too many."""
    if not known:
        return []
    total = len(known[0]) - 1
    last = next((k for k in range(1, total + 1) if all(values[k] < _EPSILON for values in known)), total)
    if last <= _SHOWN_FAILURES:
        return list(range(1, last + 1))
    # Where a baseline fails is one row; the rest goes to where the best one does.
    first = next((k for k in range(1, total) if max(values[k + 1] for values in known) < 1 - _EPSILON), 1)
    steps = _SHOWN_FAILURES - 2
    return sorted({1, 2, *(first + (last - first) * step // steps for step in range(steps + 1))})


def _percent(value: float) -> str:
    if value in (0, 1):
        return f"{value:.0%}"
    if value < _EPSILON:
        return "<0.1%"
    return f"{value:.1%}" if value < 1 - _EPSILON else ">99.9%"


def _transfers(found: Planned) -> Iterator[Any]:
    migration = found.migration
    moved = sum(item.transfers for item in migration.layers)
    greedy = sum(item.greedy for item in migration.layers)
    simple = sum(item.identity for item in migration.layers)
    table = Table(
        show_header=False, box=None, pad_edge=False, title="transfers from the old plan", title_justify="left"
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("nodes", number_ranges(migration.nodes))
    table.add_row("copies", f"{moved:,} move; greedy {greedy:,}, nodes in order {simple:,}")
    if moved:
        sent, received = migration.sent, migration.received
        table.add_row("sent", f"{min(sent.values())} to {max(sent.values())} by each node")
        table.add_row("received", f"{min(received.values())} to {max(received.values())} by each node")
    lost = migration.from_checkpoint
    if lost:
        names = ", ".join(f"{expert} of layer {layer}" for layer, expert in lost[:_SHOWN_TRANSFERS])
        table.add_row("checkpoint", Text(f"{len(lost)} experts have no live copy: {names}", style="yellow"))
    yield table
    if not moved:
        return
    rows = Table(box=None, pad_edge=False)
    for name in ("layer", "expert", "from node", "to node"):
        rows.add_column(name, justify="right")
    for item in migration.transfers[:_SHOWN_TRANSFERS]:
        source = "checkpoint" if item.source is None else str(item.source)
        rows.add_row(str(item.layer), str(item.expert), source, str(item.destination))
    hidden = len(migration.transfers) - _SHOWN_TRANSFERS
    yield Text()
    yield _noted(rows, f"{hidden} more: --json has all" if hidden > 0 else "")
