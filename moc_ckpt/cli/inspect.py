"""`moc-ckpt inspect`: what is in a checkpoint and in its directory."""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import AsJson, Directory, Tag, age, choose_tag, print_json, size, stdout, what_went_wrong, when
from moc_ckpt.cli.heat_map import HeatMap
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.state.unit_text import number_ranges
from moc_ckpt.storage.checkpoint import CheckpointSummary, list_checkpoints, load_manifest
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import open_store

__all__ = ["inspect"]

# A table of exact ages follows the map if it has at most so many layers, and ages in each.
_TABLE_LAYERS = 8
_TABLE_GROUPS = 6
_SHOWN_TAGS = 6


def inspect(
    directory: Directory,
    tag: Tag = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: step, topology, bytes, the age of every expert, and the other tags."""
    with what_went_wrong(as_json):
        store = open_store(directory)
        manifest = load_manifest(store, choose_tag(store, tag))
        tags = list_checkpoints(store, [manifest])
        if as_json:
            print_json(_as_data(manifest, tags, store.url))
        else:
            stdout().print(_as_text(manifest, tags, store.url))


def _as_data(manifest: Manifest, tags: list[CheckpointSummary], url: str) -> dict[str, Any]:
    sizes = manifest.bytes_by_unit()
    ledger = _ledger(manifest)
    return {
        "directory": url,
        "tag": manifest.tag,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "save_id": manifest.save_id,
        "created": manifest.created,
        "format_version": manifest.format_version,
        "parameters": manifest.parameters,
        "bytes": manifest.nbytes,
        "bytes_per_parameter": manifest.nbytes / manifest.parameters if manifest.parameters else None,
        "stored_bytes": manifest.stored_bytes,
        "kinds": manifest.bytes_by_kind(),
        "topology": msgspec.to_builtins(manifest.topology),
        "moe_layers": msgspec.to_builtins(manifest.moe_layers),
        "units": [
            {
                "name": unit.name,
                "version": {"attempt": unit.attempt, "step": unit.step},
                "behind": manifest.step - unit.step if parse_expert_unit(unit.name) is not None else None,
                "tokens": unit.tokens,
                "bytes": sizes[unit.name],
            }
            for unit in manifest.units
        ],
        "plt": ledger["plt"] if ledger is not None else None,
        "ledger": ledger,
        "older_tags": _older_tags(manifest),
        "packs": msgspec.to_builtins(manifest.packs),
        "extra": msgspec.to_builtins(manifest.extra),
        "tags": [
            {
                "tag": item.tag,
                "step": item.step,
                "attempt": item.attempt,
                "created": item.created,
                "bytes": item.nbytes,
                "stored_bytes": item.stored_bytes,
                "error": item.error or None,
            }
            for item in tags
        ],
    }


def _as_text(manifest: Manifest, tags: list[CheckpointSummary], url: str) -> Group:
    parts: list[Any] = [_summary(manifest, url), Text()]
    if manifest.moe_layers:
        parts += _experts(manifest)
    return Group(*parts, _tags(manifest, tags))


def _older_tags(manifest: Manifest) -> list[str]:
    """Returns the other tags whose packs the checkpoint needs."""
    return sorted({pack.path.partition("/")[0] for pack in manifest.packs} - {manifest.tag})


def _summary(manifest: Manifest, url: str) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    top = manifest.topology
    experts = ", ".join(f"{group} {count}" for group, count in sorted(top.expert_parallel.items())) or "none"
    per_parameter = f", {manifest.nbytes / manifest.parameters:.2f} bytes per parameter" if manifest.parameters else ""
    older = _older_tags(manifest)
    rows = [
        ("checkpoint", f"{manifest.tag} in {url}"),
        ("step", f"{manifest.step:,} (attempt {manifest.attempt})"),
        ("committed", when(manifest.created)),
        ("run", f"{top.world} ranks, ZeRO stage {top.zero_stage}, {top.precision}; expert parallel: {experts}"),
        ("written by", ", ".join(f"{name} {version}" for name, version in sorted(top.versions.items())) or "unknown"),
        ("parameters", f"{manifest.parameters:,}"),
        ("state", f"{size(manifest.nbytes)} ({manifest.nbytes:,} bytes{per_parameter})"),
    ]
    rows += [("", f"{kind}: {size(nbytes)}") for kind, nbytes in sorted(manifest.bytes_by_kind().items())]
    stored = f"{size(manifest.stored_bytes)} in {len(manifest.packs)} packs and {len(manifest.extra)} extra files"
    if older:
        names = ", ".join(older[:_SHOWN_TAGS]) + (", …" if len(older) > _SHOWN_TAGS else "")
        stored += f"; some of the packs are those of {len(older)} older tag{'s' if len(older) > 1 else ''}: {names}"
    rows.append(("files", stored))
    if manifest.moe_layers:
        rows.append(("experts", _expert_text(manifest)))
    rows += _plt_rows(manifest)
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _ages(manifest: Manifest) -> dict[int, dict[int, int]]:
    """Returns the age in steps by expert, by layer ordinal."""
    ages: dict[int, dict[int, int]] = {layer.ordinal: {} for layer in manifest.moe_layers}
    for unit in manifest.units:
        place = parse_expert_unit(unit.name)
        if place is not None:
            ages.setdefault(place[0], {})[place[1]] = manifest.step - unit.step
    return ages


def _experts(manifest: Manifest) -> list[Any]:
    """Returns a map of the experts' ages and, if that is short, a table; nothing if all are of the same step."""
    ages = _ages(manifest)
    counts = {layer.ordinal: layer.num_experts for layer in manifest.moe_layers}
    if _all_from_the_step(ages, counts):
        return []
    note = "exact ages: --json"
    title = Text("MoE layers: steps that each expert's version is behind the checkpoint", style="italic")
    parts = [title, HeatMap(ages, counts, note), Text()]
    groups = {ordinal: _by_age(row) for ordinal, row in ages.items()}
    if len(counts) <= _TABLE_LAYERS and all(len(row) <= _TABLE_GROUPS for row in groups.values()):
        parts += [_exact_table(manifest, groups), Text()]
    return parts


def _all_from_the_step(ages: dict[int, dict[int, int]], counts: dict[int, int]) -> bool:
    return all(len(ages[layer]) == count and not any(ages[layer].values()) for layer, count in counts.items())


def _by_age(ages: dict[int, int]) -> list[tuple[int, str]]:
    """Returns (age, experts as text), the youngest first."""
    groups: dict[int, list[int]] = {}
    for expert, behind in ages.items():
        groups.setdefault(behind, []).append(expert)
    return [(behind, number_ranges(experts)) for behind, experts in sorted(groups.items())]


def _exact_table(manifest: Manifest, groups: dict[int, list[tuple[int, str]]]) -> Table:
    table = Table(title="MoE layers", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("module", overflow="fold")
    table.add_column("experts", justify="right")
    table.add_column("steps behind: experts", overflow="fold")
    for layer in manifest.moe_layers:
        shown = "   ".join(f"{behind}: {experts}" for behind, experts in groups[layer.ordinal])
        table.add_row(str(layer.ordinal), Text(layer.prefix), str(layer.num_experts), shown)
    return table


def _expert_text(manifest: Manifest) -> str:
    """Returns e.g. "16 in each of 12 MoE layers, all from this step"."""
    counts = {layer.ordinal: layer.num_experts for layer in manifest.moe_layers}
    total = sum(counts.values())
    layers = f"{len(counts)} MoE layers" if len(counts) > 1 else "1 MoE layer"
    if len(counts) > 1 and len(set(counts.values())) == 1:
        text = f"{next(iter(counts.values()))} in each of {layers}"
    else:
        text = f"{total} in {layers}"
    ages = _ages(manifest)
    if _all_from_the_step(ages, counts):
        return f"{text}, all from step {manifest.step:,}"
    every = [age for row in ages.values() for age in row.values()]
    fresh, behind = every.count(0), max(every, default=0)
    missing = f", {total - len(every):,} missing" if len(every) < total else ""
    older = f"{len(every) - fresh:,} older, by {behind:,} steps at most"
    return f"{text}: {fresh:,} from step {manifest.step:,}, {older}{missing}"


def _ledger(manifest: Manifest) -> dict[str, Any] | None:
    """Returns the lost-token ledger in short; what an older version did not record is None."""
    ledger = manifest.ledger
    if ledger is None:
        return None
    recoveries = _as_list(ledger.get("recoveries"))
    lost = [_total(layer) for layer in _as_list(ledger.get("lost"))]
    if not lost:  # per layer of each recovery
        rows = [_as_list(item.get("lost")) for item in recoveries if isinstance(item, dict)]
        lost = [sum(map(_total, column)) for column in zip_longest(*rows, fillvalue=0)]
    known = "lost" in ledger or "recoveries" in ledger
    plt = ledger.get("plt")
    return {
        "plt": plt if isinstance(plt, (int, float)) else None,
        "k": ledger.get("k"),
        "recoveries": recoveries if "recoveries" in ledger else None,
        "tokens_lost": sum(lost) if known else None,
        "tokens_lost_per_layer": lost if known else None,
        "tokens_processed": _total(ledger["processed"]) if "processed" in ledger else None,
    }


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _total(value: Any) -> int | float:
    """Returns the sum of all numbers in nested lists."""
    if isinstance(value, (list, tuple)):
        return sum(map(_total, value))
    return value if isinstance(value, (int, float)) else 0


def _plt_rows(manifest: Manifest) -> list[tuple[str, str]]:
    ledger = _ledger(manifest)
    if ledger is None:
        return []
    plt, recoveries, lost = ledger["plt"], ledger["recoveries"], ledger["tokens_lost"]
    details = []
    if recoveries is not None:
        details.append(f"{len(recoveries)} recover{'y' if len(recoveries) == 1 else 'ies'}")
    if lost is not None:
        details.append(f"{lost:,} tokens lost")
    text = "unknown" if plt is None else f"{100 * plt:.2f} %"
    rows = [("PLT", f"{text} ({', '.join(details)})" if details else text)]
    if recoveries and isinstance(last := recoveries[-1], dict) and "step" in last:
        cost = f", {_total(last['lost']):,} tokens lost" if "lost" in last else ""
        rows.append(("", f"last recovery: step {last['step']} of attempt {last.get('attempt', '?')}{cost}"))
    if k := sorted({value for value in _as_list(ledger["k"]) if isinstance(value, int)}):
        rows.append(("K", f"{k[0]} per MoE layer" if len(k) == 1 else f"{k[0]} to {k[-1]} per MoE layer"))
    return rows


def _tags(manifest: Manifest, tags: list[CheckpointSummary]) -> Table:
    table = Table(title="checkpoints in this directory, the newest commit first", title_justify="left")
    table.add_column("tag", overflow="fold")
    table.add_column("step", justify="right")
    table.add_column("attempt", justify="right")
    table.add_column("state", justify="right")
    table.add_column("own files", justify="right")
    table.add_column("age", justify="right")
    for item in tags:
        name = Text(item.tag + (" (this one)" if item.tag == manifest.tag else ""))
        if item.error:
            table.add_row(name, "?", "?", Text(item.error, style="red"), "", "")
            continue
        cells = (str(item.step), str(item.attempt), size(item.nbytes), size(item.stored_bytes))
        table.add_row(name, *cells, age(time.time() - item.created))
    return table
