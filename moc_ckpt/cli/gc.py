"""`moc-ckpt gc`: remove what a checkpoint directory no longer needs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import PROBLEM, AsJson, Directory, print_json, size, stderr, stdout, what_went_wrong
from moc_ckpt.errors import CheckpointNotFoundError
from moc_ckpt.persist.garbage import IDLE_S, ArenaGarbage, Garbage, collect_arenas, collect_garbage
from moc_ckpt.storage.checkpoint import ATTEMPTS, CheckpointSummary, list_checkpoints, list_tags, load_manifest
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import first_damage

__all__ = ["gc"]

_SHOWN = 40


def gc(
    directory: Directory,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=0, metavar="N", help="Newest checkpoints to keep; 0 keeps all.")
    ] = None,
    keep_every: Annotated[
        int,
        typer.Option(
            "--keep-every",
            min=0,
            metavar="STEPS",
            help="Keep checkpoints at multiples of so many steps as well; alone: these and the newest one.",
        ),
    ] = 0,
    idle: Annotated[
        float,
        typer.Option(
            "--idle",
            min=0,
            metavar="MINUTES",
            help="A save that was not committed stays until nothing changed in it for so long; 0: no run saves now.",
        ),
    ] = IDLE_S / 60,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, only show what would go.")] = False,
    arenas: Annotated[
        bool, typer.Option("--arenas", help="Remove forsaken arenas in this node's shared memory too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints, leftovers of saves that never committed, and packs that nothing refers to.

    Without --keep-last and --keep-every every checkpoint stays. What a checkpoint that stays refers to stays too, also
    if it belongs to an older one, and so does what a run may be writing. Exit status 1: nothing could be removed, or
    a checkpoint that stays is damaged (then an older one stays in its place).
    """
    with what_went_wrong(as_json):
        store = open_store(directory)
        _check(store)
        if keep_last is None:
            keep_last = 1 if keep_every else 0
        with stderr().status("looking for what can go") as status:
            garbage = collect_garbage(
                store,
                keep_last=keep_last,
                keep_every=keep_every,
                idle_s=60 * idle,
                dry_run=dry_run,
                progress=lambda nbytes: status.update(f"{'found' if dry_run else 'removing'} {size(nbytes)}"),
            )
        memory: list[ArenaGarbage] = []
        if arenas:
            newest = next((item.step for item in list_checkpoints(store) if _is_usable(store, item)), None)
            memory = collect_arenas(store, newest, dry_run=dry_run)
    if as_json:
        print_json(_as_data(store, garbage, memory, dry_run=dry_run))
    else:
        stdout().print(_as_text(store, garbage, memory if arenas else None, dry_run=dry_run))
    if garbage.report.blocked or garbage.report.damaged:
        raise typer.Exit(PROBLEM)


def _is_usable(store: Store, item: CheckpointSummary) -> bool:
    """Tells whether memory need not be kept for what a checkpoint has; looks at no bytes of it."""
    return not item.error and not first_damage(store, load_manifest(store, item.tag))


def _check(store: Store) -> None:
    """Refuses a directory that is none of checkpoints, before a lock file is made in it."""
    if not store.root_exists():
        raise CheckpointNotFoundError(
            "the checkpoint directory does not exist", where=store.url, fix="check the path and the mount"
        )
    if not list_tags(store) and not store.list(ATTEMPTS):
        raise CheckpointNotFoundError(
            "no run of this package ever saved into this directory", where=store.url, fix="name the save_dir of a run"
        )


def _items(garbage: Garbage) -> list[dict[str, Any]]:
    """Returns what goes: checkpoints, then leftovers of saves."""
    report = garbage.report
    packs: dict[str, int] = {}
    for pack in report.packs:
        save = "/".join(pack.split("/")[:2])
        packs[save] = packs.get(save, 0) + 1
    items = []
    for tag in report.dropped:
        count = sum(number for save, number in packs.items() if save.startswith(f"{tag}/"))
        items.append({"kind": "checkpoint", "name": tag, "packs": count, "bytes": garbage.nbytes.get(tag, 0)})
    for save in report.saves:
        tag = save.partition("/")[0]
        if tag not in report.dropped:
            kind = "replaced save" if tag in report.kept else "leftover save"
            items.append(
                {"kind": kind, "name": save, "packs": packs.get(save, 0), "bytes": garbage.nbytes.get(save, 0)}
            )
    items += [
        {"kind": "unfinished file", "name": key, "packs": 0, "bytes": nbytes} for key, nbytes in garbage.files.items()
    ]
    return items


def _as_data(store: Store, garbage: Garbage, memory: list[ArenaGarbage], *, dry_run: bool) -> dict[str, Any]:
    report = garbage.report
    return {
        "directory": store.url,
        "dry_run": dry_run,
        "removed": _items(garbage),
        "bytes": garbage.total,
        "kept": list(report.kept),
        "packs": report.packs,
        "writer": garbage.writer or None,
        "in_flight": [{"save": save, "reason": reason} for save, reason in garbage.stays.items()],
        "unfinished": report.spared,
        "damaged": report.damaged,
        "blocked": report.blocked or None,
        "arenas": [{"path": str(item.path), "bytes": item.nbytes, "stays": item.stays or None} for item in memory],
    }


def _as_text(store: Store, garbage: Garbage, memory: list[ArenaGarbage] | None, *, dry_run: bool) -> Group:
    report = garbage.report
    parts: list[Any] = []
    if report.blocked:
        parts.append(Text.assemble(("nothing is removed: ", "bold red"), report.blocked))
    else:
        items = _items(garbage)
        if items:
            parts.append(_table(store, items, dry_run=dry_run))
        verb = "would be freed" if dry_run else "freed"
        kept = f"{len(report.kept)} checkpoint{'s' if len(report.kept) != 1 else ''} kept"
        told = f"{size(garbage.total)} {verb}" if items else "nothing to remove"
        parts.append(Text.assemble((told, "bold green"), f", {kept}: {_some(report.kept)}"))
    for tag, what in report.damaged.items():
        parts.append(Text.assemble((f"{tag} is damaged: ", "bold red"), what))
    if report.damaged:
        parts.append(Text("  it stays and does not count, so that older ones stay; `moc-ckpt verify` tells more"))
    if garbage.writer:
        parts.append(Text(f"{garbage.writer} lives: its saves are left alone", style="yellow"))
    parts += [Text(f"stays: {save}: {reason}", style="yellow") for save, reason in garbage.stays.items()]
    if garbage.stays and not garbage.writer:
        parts.append(Text("  run gc again later, or with --idle 0 if you know that no run and no agent writes here"))
    why = "is newer than the newest checkpoint and may still be finished; the next commit lets it go"
    parts += [Text(f"stays: {save} {why}", style="yellow") for save in report.spared]
    if memory is not None:
        parts += _memory_text(memory, dry_run=dry_run)
    return Group(*parts)


def _table(store: Store, items: list[dict[str, Any]], *, dry_run: bool) -> Table:
    title = f"{'would be removed' if dry_run else 'removed'} from {store.url}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("what")
    table.add_column("name", overflow="fold")
    table.add_column("packs", justify="right")
    table.add_column("size", justify="right")
    for item in items[:_SHOWN]:
        table.add_row(item["kind"], Text(item["name"]), str(item["packs"]), size(item["bytes"]))
    if len(items) > _SHOWN:
        rest = items[_SHOWN:]
        packs, nbytes = sum(item["packs"] for item in rest), sum(item["bytes"] for item in rest)
        table.add_row("", f"and {len(rest)} more (--json lists them)", str(packs), size(nbytes))
    return table


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _memory_text(memory: list[ArenaGarbage], *, dry_run: bool) -> list[Text]:
    gone = [item for item in memory if not item.stays]
    verb = "would be removed" if dry_run else "removed"
    lines = [Text(f"shared memory {verb}: {item.path} ({size(item.nbytes)})") for item in gone]
    if not gone:
        lines.append(Text("no forsaken arena in shared memory"))
    return lines + [Text(f"stays: {item.path}: {item.stays}", style="yellow") for item in memory if item.stays]
