"""`moc-ckpt inspect`: what is in a checkpoint and in its directory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import AsJson, Directory, Tag, age, choose_tag, print_json, size, stdout, what_went_wrong, when
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.storage.checkpoint import CheckpointSummary, list_checkpoints, load_manifest
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import open_store

__all__ = ["inspect"]


def inspect(
    directory: Directory,
    tag: Tag = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: step, topology, bytes, the age of every expert, and the other tags."""
    with what_went_wrong(as_json):
        store = open_store(directory)
        manifest = load_manifest(store, choose_tag(store, tag))
        tags = list_checkpoints(store)
        if as_json:
            print_json(_as_data(manifest, tags, store.url))
        else:
            stdout().print(_as_text(manifest, tags, store.url))


def _as_data(manifest: Manifest, tags: list[CheckpointSummary], url: str) -> dict[str, Any]:
    sizes = manifest.bytes_by_unit()
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
                "tokens": unit.tokens,
                "bytes": sizes[unit.name],
            }
            for unit in manifest.units
        ],
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
        parts += [_experts(manifest), Text()]
    return Group(*parts, _tags(manifest, tags))


def _summary(manifest: Manifest, url: str) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    top = manifest.topology
    experts = ", ".join(f"{group} {count}" for group, count in sorted(top.expert_parallel.items())) or "none"
    per_parameter = f", {manifest.nbytes / manifest.parameters:.2f} bytes per parameter" if manifest.parameters else ""
    older = len({pack.path.partition("/")[0] for pack in manifest.packs} - {manifest.tag})
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
        stored += f"; some of the packs are those of {older} older tag{'s' if older > 1 else ''}"
    rows.append(("files", stored))
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _experts(manifest: Manifest) -> Table:
    table = Table(title="MoE layers: steps that each expert is older than the checkpoint", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("module", overflow="fold")
    table.add_column("experts", justify="right")
    table.add_column("oldest", justify="right")
    table.add_column("steps behind: experts", overflow="fold")
    ages: dict[int, dict[int, list[int]]] = {}
    for unit in manifest.units:
        place = parse_expert_unit(unit.name)
        if place is not None:
            ages.setdefault(place[0], {}).setdefault(manifest.step - unit.step, []).append(place[1])
    for layer in manifest.moe_layers:
        groups = sorted(ages.get(layer.ordinal, {}).items())
        shown = "   ".join(f"{behind}: {_ranges(experts)}" for behind, experts in groups)
        oldest = str(groups[-1][0]) if groups else "-"
        table.add_row(str(layer.ordinal), Text(layer.prefix), str(layer.num_experts), oldest, shown)
    return table


def _ranges(numbers: Iterable[int]) -> str:
    """Returns e.g. "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


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
