"""`moc-ckpt recover`: after a crash, bring what memory still holds to storage, and say what a restart goes on from."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.agent import find_jobs
from moc_ckpt.cli.common import PROBLEM, AsJson, Directory, print_json, size, stderr, stdout, what_went_wrong, when
from moc_ckpt.errors import CheckpointNotFoundError, MocError, StaleAttemptError, StorageError
from moc_ckpt.recovery.flush import flush_job
from moc_ckpt.recovery.flush_plan import Flush
from moc_ckpt.recovery.memory import open_memory
from moc_ckpt.recovery.report import LayerLoss, RestoreCost, restore_cost
from moc_ckpt.storage import verify as storage_verify
from moc_ckpt.storage.attempts import list_attempts
from moc_ckpt.storage.checkpoint import latest_tag, list_tags, load_manifest
from moc_ckpt.storage.commit import finish_pointer, is_interrupted
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import number_ranges

__all__ = ["recover"]

_SHOWN_LAYERS = 24


@dataclass(slots=True)
class _Found:
    """What was found and done.

    Attributes:
        manifest: the checkpoint that a restart goes on from.
        flush: what memory had that storage lacked; None if nothing.
        flushed: it is on storage now.
        notes: what kept memory from being of use, and what else to know.
        damaged: newer checkpoints that cannot be loaded, and why.
        latest: what `latest` was repaired to, or would be; empty if it is fine.
    """

    manifest: Manifest | None = None
    flush: Flush | None = None
    flushed: bool = False
    notes: list[str] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    latest: str = ""


def recover(
    directory: Directory,
    tag: Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Look at this checkpoint only.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Use what this node's memory holds.")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of the checkpoint as well.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Longest wait for the agent, s.")] = 600,
    as_json: AsJson = False,
) -> None:
    """After a crash: flush the newest snapshot in memory to DIR, check it, and say what a restart goes on from.

    Works without memory, too: it then names the newest checkpoint that can be loaded, and what that costs.
    """
    with what_went_wrong(as_json):
        store = open_store(directory)
        found = _Found()
        if memory and tag is None:
            _flush(store, found, timeout, dry_run=dry_run)
        _choose(store, tag, found, verify=verify)
        if found.manifest is None and not (found.flush and dry_run):
            _nothing(store, found)
        if tag is None and found.manifest is not None:
            _repair_latest(store, found, dry_run=dry_run)
        command = _command(store)
    cost = restore_cost(found.manifest) if found.manifest is not None else None
    if as_json:
        print_json(_as_data(store, found, cost, command, dry_run=dry_run))
    else:
        _show(store, found, cost, command, dry_run=dry_run)
    if found.damaged:
        raise typer.Exit(PROBLEM)


def _folders(store: Store) -> list[Path]:
    """Returns the jobs of this node whose memory belongs to the directory."""
    found = []
    for folder in find_jobs(None, None, None):
        with open_memory(folder) as memory:
            url = memory.inventory.url if memory is not None else None
            if url is not None and open_store(url).url == store.url:
                found.append(folder)
    return found


def _flush(store: Store, found: _Found, timeout: float, *, dry_run: bool) -> None:
    for folder in _folders(store):
        with Progress(
            TextColumn("flushing memory"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=stderr(),
            transient=True,
        ) as bar:
            task = bar.add_task("flush", total=None)

            def show(done: int, total: int, bar: Progress = bar, task: Any = task) -> None:
                bar.update(task, completed=done, total=total)

            try:
                flush, manifest = flush_job(folder, store, deadline_s=timeout, dry_run=dry_run, progress=show)
            except (StorageError, StaleAttemptError) as error:
                # What is on storage is there all the same.
                found.notes.append("memory: " + str(error).replace("\n  ", "; "))
                continue
        if flush is not None:
            found.flush, found.flushed = flush, manifest is not None


def _choose(store: Store, tag: str | None, found: _Found, *, verify: bool) -> None:
    """Finds the newest checkpoint that can be loaded, or looks at the one that was asked for."""
    if tag is not None:
        manifest = load_manifest(store, tag)
        if trouble := _trouble(store, manifest, verify=verify):
            found.damaged.append((tag, trouble))
        else:
            found.manifest = manifest
        return
    manifests = []
    for name in list_tags(store) if store.root_exists() else []:
        try:
            manifests.append(load_manifest(store, name))
        except StorageError as error:
            found.damaged.append((name, error.what))
    manifests.sort(key=lambda item: item.order, reverse=True)
    for manifest in _from_latest(store, manifests, found):
        if not (trouble := _trouble(store, manifest, verify=verify)):
            found.manifest = manifest
            break
        found.damaged.append((manifest.tag, trouble))


def _from_latest(store: Store, manifests: list[Manifest], found: _Found) -> list[Manifest]:
    """Returns what a load may take, in its order: from what `latest` names on, unless a crash left that behind."""
    try:
        named = latest_tag(store)
    except StorageError:
        return manifests
    at = next((number for number, manifest in enumerate(manifests) if manifest.tag == named), None)
    if at is None or any(is_interrupted(store, manifest) for manifest in manifests[:at]):
        return manifests
    if at:
        found.notes.append(f"`latest` names {named}, older than {manifests[0].tag}: a load takes what it names")
    return manifests[at:]


def _trouble(store: Store, manifest: Manifest, *, verify: bool) -> str:
    """Returns why a checkpoint cannot be loaded; empty if it can, as far as was looked."""
    if verify:
        report = storage_verify.verify(store, manifest.tag)
        return "" if report.ok else f"{report.problems[0].what} ({report.problems[0].file})"
    try:
        for pack in manifest.packs:
            PackReader(store, pack.path, pack.nbytes).check()
        for extra in manifest.extra.values():
            if not store.exists(extra.path):
                return f"a file is missing ({store.locate(extra.path)})"
    except MocError as error:
        return f"{error.what} ({error.where})"
    return ""


def _nothing(store: Store, found: _Found) -> None:
    if found.damaged:
        what = "; ".join(f"{tag}: {why}" for tag, why in found.damaged[:3])
        raise CheckpointNotFoundError(
            f"no checkpoint in this directory can be loaded: {what}",
            where=store.url,
            fix="restore the files named from a copy; `moc-ckpt verify` lists all that is damaged",
        )
    told = f" ({'; '.join(found.notes)})" if found.notes else ""
    raise CheckpointNotFoundError(
        f"there is no checkpoint in this directory, and no memory of its run on this node{told}",
        where=store.url,
        fix="name the save_dir of a run; on several nodes, look on each",
    )


def _repair_latest(store: Store, found: _Found, *, dry_run: bool) -> None:
    assert found.manifest is not None
    try:
        named = latest_tag(store)
        # A checkpoint that is damaged otherwise is passed over by a load; `latest` only has to name one.
        good = named is not None and (named == found.manifest.tag or load_manifest(store, named) is not None)
    except MocError:
        good = False
    if not good or is_interrupted(store, found.manifest):
        found.latest = found.manifest.tag
        if not dry_run:
            finish_pointer(store, found.manifest)


def _command(store: Store) -> tuple[list[str], str]:
    """Returns the command that started the last run, and its working directory; both may be unknown."""
    try:
        attempts = list_attempts(store)
    except MocError:
        return [], ""
    for attempt in reversed(attempts):
        command = attempt.info.get("command")
        if isinstance(command, list) and command:
            return [str(word) for word in command], str(attempt.info.get("cwd", ""))
    return [], ""


def _as_data(
    store: Store, found: _Found, cost: RestoreCost | None, command: tuple[list[str], str], *, dry_run: bool
) -> dict[str, Any]:
    manifest, flush = found.manifest, found.flush
    return {
        "directory": store.url,
        "dry_run": dry_run,
        "tag": manifest.tag if manifest else None,
        "step": manifest.step if manifest else None,
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
        "damaged": [{"tag": tag, "why": why} for tag, why in found.damaged],
        "latest_repaired_to": found.latest or None,
        "experts": [
            {"unit": f"expert/{layer.layer}/{expert}", "behind": steps}
            for layer in (cost.layers if cost else ())
            for expert, steps in layer.behind.items()
        ],
        "layers": [
            {"layer": layer.layer, "module": layer.prefix, "tokens_lost": layer.tokens, "share": layer.share}
            for layer in (cost.layers if cost else ())
        ],
        "tokens_lost": cost.tokens if cost else None,
        "plt": cost.plt if cost else None,
        "plt_before": cost.plt_before if cost else None,
        "command": command[0] or None,
        "cwd": command[1] or None,
    }


def _show(
    store: Store, found: _Found, cost: RestoreCost | None, command: tuple[list[str], str], *, dry_run: bool
) -> None:
    console = stdout()
    for note in found.notes:
        console.print(Text.assemble(("note: ", "bold yellow"), note), soft_wrap=True)
    if found.flush is not None:
        console.print(_flush_text(found.flush, done=found.flushed), soft_wrap=True)
    for tag, why in found.damaged:
        console.print(Text.assemble(("damaged ", "bold red"), f"{tag}: {why}"), soft_wrap=True)
    manifest = found.manifest
    if manifest is None or cost is None:
        return
    if found.latest:
        did = "would name" if dry_run else "now names"
        why = "`latest` named no checkpoint, or a crash came before it was moved"
        console.print(Text(f"{why}; it {did} {found.latest}"), soft_wrap=True)
    head = f"{manifest.tag} in {store.url}: step {manifest.step:,}, committed {when(manifest.created)}"
    label = "on storage now " if found.flush is not None and dry_run else "a restart goes on from "
    console.print(Text.assemble((label, "bold green"), head), soft_wrap=True)
    _show_cost(cost)
    words, cwd = command
    if words:
        again = f"cd {shlex.quote(cwd)} && {shlex.join(words)}" if cwd else shlex.join(words)
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


def _show_cost(cost: RestoreCost) -> None:
    console = stdout()
    behind = [layer for layer in cost.layers if layer.behind]
    if not cost.layers:
        return
    if not behind:
        console.print("every expert is of that step: nothing is lost")
        return
    table = Table(title="experts that go back further", title_justify="left")
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
    if cost.plt is not None and cost.plt_before is not None and cost.tokens is not None:
        console.print(
            f"{cost.tokens:,} tokens lost; PLT {100 * cost.plt_before:.2f} % so far, "
            f"{100 * cost.plt:.2f} % with this restart"
        )


def _ages(layer: LayerLoss) -> str:
    groups: dict[int, list[int]] = {}
    for expert, steps in layer.behind.items():
        groups.setdefault(steps, []).append(expert)
    return "   ".join(f"{steps}: {number_ranges(experts)}" for steps, experts in sorted(groups.items()))
