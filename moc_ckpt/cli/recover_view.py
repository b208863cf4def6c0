"""What `moc-ckpt recover` found, as JSON and for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import size, stdout, when
from moc_ckpt.recovery.report import LayerLoss, RestoreCost, RestoreCosts
from moc_ckpt.recovery.search import Search, Target
from moc_ckpt.recovery.versions import UnitSource
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.state.unit_text import compact_units, number_ranges
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import Store

if TYPE_CHECKING:
    from moc_ckpt.recovery.flush_plan import Flush

__all__ = ["Damaged", "Found", "as_data", "show"]

_SHOWN_LAYERS = 24


class Damaged(NamedTuple):
    """What is damaged of a checkpoint; without units it is all of it."""

    tag: str
    why: str
    units: tuple[str, ...] = ()


@dataclass(slots=True)
class Found:
    """What was found and done.

    Attributes:
        target: what a restart goes on from, and what damage costs it.
        costs: what that gives up.
        why: what keeps a load from going on from something older.
        search: the search that named it.
        flush: what memory had that storage lacked; None if nothing.
        flushed: it is on storage now.
        notes: what kept memory from being of use, and what else to know.
        damaged: what is damaged, of this checkpoint and of others.
        latest: what `latest` was repaired to, or would be; empty if it is fine.
        command: what started the last run; empty if nobody knows.
        cwd: its working directory.
    """

    target: Target | None = None
    costs: RestoreCosts | None = None
    why: str = ""
    search: Search | None = None
    flush: Flush | None = None
    flushed: bool = False
    notes: list[str] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)
    latest: str = ""
    command: list[str] = field(default_factory=list)
    cwd: str = ""

    @property
    def manifest(self) -> Manifest | None:
        """The checkpoint that a restart goes on from, with the versions that it restores."""
        return self.target.manifest if self.target is not None else None

    @property
    def replaced(self) -> tuple[UnitSource, ...]:
        """The experts that damage sends to other versions."""
        return self.target.setback.replaced if self.target is not None else ()

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Newer checkpoints that cannot be restored."""
        return self.target.setback.passed_over if self.target is not None else ()


def as_data(store: Store, found: Found, *, dry_run: bool) -> dict[str, Any]:
    """Returns all of it as plain data."""
    manifest, flush, costs = found.manifest, found.flush, found.costs
    cost = costs.now if costs is not None else None
    by_damage = costs.damage_by_layer if costs is not None else {}
    return {
        "directory": store.url,
        "dry_run": dry_run,
        "tag": manifest.tag if manifest else None,
        "step": manifest.step if manifest else None,
        "attempt": manifest.attempt if manifest else None,
        "flushed": found.flushed,
        "memory": None
        if flush is None
        else {
            "tag": flush.tag,
            "step": flush.step,
            "stored_step": flush.stored_step,
            "experts": dict(flush.experts),
            "bytes": flush.nbytes,
        },
        "notes": found.notes,
        "damaged": [{"tag": item.tag, "why": item.why, "units": list(item.units)} for item in found.damaged],
        "passed_over": list(found.passed_over),
        "latest_repaired_to": found.latest or None,
        "experts": [
            {"unit": unit.name, "behind": manifest.step - unit.step, "attempt": unit.attempt, "step": unit.step}
            for unit in (manifest.units if manifest else ())
            if manifest and unit.version != manifest.version and parse_expert_unit(unit.name) is not None
        ],
        "fallback": [
            {
                "unit": item.unit,
                "attempt": item.version.attempt,
                "step": item.version.step,
                "instead_of": {"attempt": item.wanted.attempt, "step": item.wanted.step},
                "tag": item.tag,
                "tokens_lost": item.lost,
            }
            for item in found.replaced
        ],
        "layers": [
            {
                "layer": layer.layer,
                "module": layer.prefix,
                "tokens_lost": layer.tokens,
                "share": layer.share,
                "damage_tokens_lost": by_damage[layer.layer],
            }
            for layer in (cost.layers if cost else ())
        ],
        "tokens_lost": cost.tokens if cost else None,
        "plt": cost.plt if cost else None,
        "plt_before": cost.plt_before if cost else None,
        "damage_tokens_lost": costs.damage_tokens if costs else None,
        "damage_plt": costs.damage_plt if costs else None,
        "command": found.command or None,
        "cwd": found.cwd or None,
    }


def show(store: Store, found: Found, *, dry_run: bool) -> None:
    """Prints it for people."""
    console = stdout()
    for note in found.notes:
        console.print(Text.assemble(("note: ", "bold yellow"), note), soft_wrap=True)
    if found.flush is not None:
        console.print(_flush_text(found.flush, done=found.flushed), soft_wrap=True)
    for item in found.damaged:
        units = f": {compact_units(item.units)}" if item.units else ""
        console.print(Text.assemble(("damaged ", "bold red"), f"{item.tag}: {item.why}{units}"), soft_wrap=True)
    manifest, costs = found.manifest, found.costs
    if manifest is None or costs is None:
        return
    if found.latest:
        did = "would name" if dry_run else "now names"
        why = "`latest` named no checkpoint, or a crash came before it was moved"
        console.print(Text(f"{why}; it {did} {found.latest}"), soft_wrap=True)
    if found.passed_over:
        console.print(f"cannot be restored: {', '.join(found.passed_over)}", soft_wrap=True, markup=False)
    head = f"{manifest.tag} in {store.url}: step {manifest.step:,}, committed {when(manifest.created)}"
    label = "on storage now " if found.flush is not None and dry_run else "a restart goes on from "
    console.print(Text.assemble((label, "bold green"), head), soft_wrap=True)
    _show_fallback(manifest, found.replaced, costs)
    _show_cost(costs, without_memory=found.flush is not None and not found.flushed)
    if found.command:
        words = shlex.join(found.command)
        again = f"cd {shlex.quote(found.cwd)} && {words}" if found.cwd else words
        console.print(Text.assemble(("start it again: ", "bold"), again), soft_wrap=True)
    else:
        console.print("start it again with the command that started it; load_checkpoint finds this checkpoint")


def _flush_text(flush: Flush, *, done: bool) -> Text:
    since = f"storage had step {flush.stored_step:,}" if flush.stored_step is not None else "storage had nothing"
    what = (
        f"step {flush.step:,} and {len(flush.experts):,} experts newer than storage, {size(flush.nbytes)} of "
        f"{flush.world} ranks ({since})"
    )
    if done:
        return Text.assemble(("flushed ", "bold green"), f"{what}: {flush.tag}")
    return Text.assemble(("memory holds ", "bold"), f"{what}; without --dry-run it becomes {flush.tag}")


def _show_fallback(manifest: Manifest, replaced: Iterable[UnitSource], costs: RestoreCosts) -> None:
    """Shows which experts damage sends to which versions, and what that costs beside what the checkpoint costs."""
    layers: dict[int, list[UnitSource]] = {}
    for item in replaced:
        place = parse_expert_unit(item.unit)
        assert place is not None
        layers.setdefault(place[0], []).append(item)
    if not layers:
        return
    processed = {layer.layer: layer for layer in costs.now.layers}
    table = Table(title="experts that go back further because of damage", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("to step: experts", overflow="fold")
    table.add_column("more tokens lost", justify="right")
    table.add_column("share", justify="right")
    more = costs.damage_by_layer
    for number, items in sorted(layers.items())[:_SHOWN_LAYERS]:
        layer, lost = processed[number], more[number]
        share = layer.share_of(lost)
        table.add_row(
            str(number),
            _versions(manifest, items),
            "unknown" if lost is None else f"{lost:,}",
            "" if share is None else f"{100 * share:.2f} %",
        )
    console = stdout()
    console.print(table)
    if len(layers) > _SHOWN_LAYERS:
        console.print(f"… and {len(layers) - _SHOWN_LAYERS} more layers (--json has all)")
    if costs.damage_tokens is not None and costs.damage_plt is not None:
        console.print(f"damage costs {costs.damage_tokens:,} tokens, {100 * costs.damage_plt:.2f} % PLT")


def _versions(manifest: Manifest, items: Iterable[UnitSource]) -> str:
    groups: dict[tuple[int, int], list[int]] = {}
    for item in items:
        place = parse_expert_unit(item.unit)
        assert place is not None
        groups.setdefault(item.version, []).append(place[1])
    texts = []
    for (attempt, step), experts in sorted(groups.items(), reverse=True):
        of = f" (attempt {attempt})" if attempt != manifest.attempt else ""
        texts.append(f"{step:,}{of}: {number_ranges(experts)}")
    return "   ".join(texts)


def _show_cost(costs: RestoreCosts, *, without_memory: bool) -> None:
    """Shows which experts go back further; `without_memory`: what memory holds as well would cost less."""
    console, cost = stdout(), costs.now
    behind = [layer for layer in cost.layers if layer.behind]
    if not cost.layers:
        return
    if not behind:
        console.print("every expert is of that step: nothing is lost")
        return
    title = "experts that go back further" + (", from storage alone" if without_memory else "")
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("module", overflow="fold")
    table.add_column("steps behind: experts", overflow="fold")
    table.add_column("tokens lost", justify="right")
    table.add_column("share", justify="right")
    for layer in behind[:_SHOWN_LAYERS]:
        tokens = "unknown" if layer.tokens is None else f"{layer.tokens:,}"
        share = "" if layer.share is None else f"{100 * layer.share:.2f} %"
        table.add_row(str(layer.layer), Text(layer.prefix), _ages(layer), tokens, share)
    console.print(table)
    if len(behind) > _SHOWN_LAYERS:
        console.print(f"… and {len(behind) - _SHOWN_LAYERS} more layers (--json has all)")
    _show_total(cost, "from storage alone: " if without_memory else "")


def _show_total(cost: RestoreCost, label: str) -> None:
    if cost.plt is not None and cost.plt_before is not None and cost.tokens is not None:
        stdout().print(
            f"{label}{cost.tokens:,} tokens lost; PLT {100 * cost.plt_before:.2f} % so far, "
            f"{100 * cost.plt:.2f} % with this restart"
        )


def _ages(layer: LayerLoss) -> str:
    groups: dict[int, list[int]] = {}
    for expert, steps in layer.behind.items():
        groups.setdefault(steps, []).append(expert)
    return "   ".join(f"{steps}: {number_ranges(experts)}" for steps, experts in sorted(groups.items()))
