"""`moc-ckpt recover`: after a crash, bring what memory still holds to storage, and say what a restart goes on from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moc_ckpt.cli.common import PROBLEM, AsJson, Directory, bytes_progress, print_json, stderr, what_went_wrong
from moc_ckpt.cli.jobs import find_jobs
from moc_ckpt.cli.recover_view import Damaged, Found, as_data, show
from moc_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    MocError,
    NewerFormatError,
    StaleAttemptError,
    StorageError,
)
from moc_ckpt.recovery.checks import Checker
from moc_ckpt.recovery.report import RestoreCosts, restore_cost
from moc_ckpt.recovery.search import Search, Target
from moc_ckpt.storage.attempts import list_attempts
from moc_ckpt.storage.commit import finish_pointer, is_interrupted
from moc_ckpt.storage.store import Store, open_store

__all__ = ["recover"]


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
        found = Found()
        if memory and tag is None:
            _flush(store, found, timeout, dry_run=dry_run)
        _choose(store, tag, found, verify=verify)
        if found.manifest is None and not (found.flush and dry_run):
            _nothing(store, found)
        if tag is None and found.manifest is not None:
            _repair_latest(store, found, dry_run=dry_run)
        found.command, found.cwd = _command(store)
        found.costs = _costs(found.target) if found.target is not None else None
    if as_json:
        print_json(as_data(store, found, dry_run=dry_run))
    else:
        show(store, found, dry_run=dry_run)
    if found.damaged:
        raise typer.Exit(PROBLEM)


def _folders(store: Store) -> list[Path]:
    """Returns the jobs of this node whose memory belongs to the directory."""
    folders = find_jobs(None, None, None)
    if not folders:
        return []
    from moc_ckpt.recovery.memory import open_memory

    found = []
    for folder in folders:
        with open_memory(folder) as memory:
            url = memory.inventory.url if memory is not None else None
            if url is not None and open_store(url).url == store.url:
                found.append(folder)
    return found


def _flush(store: Store, found: Found, timeout: float, *, dry_run: bool) -> None:
    folders = _folders(store)
    if not folders:
        return
    # Where there is no memory, what follows would be most of the time that the command takes.
    from moc_ckpt.recovery.flush import flush_job

    for folder in folders:
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


def _choose(store: Store, tag: str | None, found: Found, *, verify: bool) -> None:
    """Finds what a load restores: it asks the same search, and looks at the same files."""
    search = found.search = Search(store, tag)
    with bytes_progress("reading") if verify else nullcontext(lambda done, total: None) as show:
        checker = Checker(store, contents=verify, progress=show)
        try:
            target: Target | str | None = search.start()
            if search.latest is not None and search.latest.newer is not None and search.latest.manifest is not None:
                named, newer = search.latest.manifest.tag, search.latest.newer.tag
                found.notes.append(f"`latest` names {named}, older than {newer}: a load takes what it names")
            while isinstance(target, Target) and (damage := checker.check(target.manifest)):
                name = target.manifest.tag
                found.damaged += [Damaged(name, f"{item.what} ({item.where})", item.units) for item in damage]
                target = search.without(damage)
        except NewerFormatError:
            raise
        except (CorruptionError, FormatError, CheckpointNotFoundError):
            if tag is not None:
                raise
            target = None
    if tag is None:
        # Also those that nothing needs now: another restart may.
        search.manifests.readable()
        there = search.manifests.tags()
        found.damaged[:0] = [
            Damaged(name, error.what) for name, error in search.manifests.unreadable() if name in there
        ]
    if isinstance(target, Target):
        found.target = target
    elif target:
        found.why = target


def _costs(target: Target) -> RestoreCosts:
    now = restore_cost(target.manifest)
    return RestoreCosts(now, restore_cost(target.plain) if target.plain is not None else now)


def _nothing(store: Store, found: Found) -> None:
    if found.damaged:
        what = "; ".join(f"{item.tag}: {item.why}" for item in found.damaged[:3]) + found.why
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


def _repair_latest(store: Store, found: Found, *, dry_run: bool) -> None:
    assert found.manifest is not None and found.search is not None
    latest = found.search.latest
    # A checkpoint that is damaged otherwise is passed over by a load; `latest` only has to name one.
    if latest is None or not latest.is_right or is_interrupted(store, found.manifest):
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
