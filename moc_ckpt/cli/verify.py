"""`moc-ckpt verify`: read every byte of a checkpoint and check it."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from moc_ckpt.cli.common import (
    PROBLEM,
    AsJson,
    Directory,
    Tag,
    choose_tag,
    print_json,
    size,
    stderr,
    stdout,
    what_went_wrong,
)
from moc_ckpt.storage import verify as storage_verify
from moc_ckpt.storage.store import Store, open_store

__all__ = ["verify"]


def verify(
    directory: Directory,
    tag: Tag = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint, also what it takes from older tags, and compare every checksum."""
    with what_went_wrong(as_json):
        store = open_store(directory)
        report = _run(store, choose_tag(store, tag))
    if as_json:
        data = asdict(report)
        data["bytes"] = data.pop("nbytes")
        print_json({"ok": report.ok, **data})
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(PROBLEM)


def _run(store: Store, tag: str) -> storage_verify.VerifyReport:
    columns = (
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        return storage_verify.verify(store, tag, lambda done, total: bar.update(task, completed=done, total=total))


def _show(report: storage_verify.VerifyReport) -> None:
    console = stdout()
    read = f"{report.fragments:,} fragments in {report.packs:,} packs, {size(report.nbytes)}"
    if report.ok:
        console.print(Text.assemble(("ok ", "bold green"), f"{report.tag} (step {report.step:,}): {read}, all intact"))
        return
    count = len(report.problems)
    console.print(
        Text.assemble(
            ("damaged ", "bold red"),
            f"{report.tag} (step {report.step:,}): {count} problem{'s' if count > 1 else ''} in {read}",
        )
    )
    for problem in report.problems:
        _show_problem(console, problem)
    console.print("what to do: restore from another tag (`moc-ckpt inspect` lists them), or copy the files named back")


def _show_problem(console: Console, problem: storage_verify.Problem) -> None:
    console.print(Text.assemble(("- ", "bold"), problem.what), soft_wrap=True)
    details = [("file", problem.file), ("unit", problem.unit), ("tensor", problem.tensor)]
    if problem.expected:
        details.append(("crc32c", f"expected {problem.expected}, found {problem.found}"))
    details.append(("to do", problem.fix))
    for name, value in details:
        if value:
            console.print(Text(f"    {name + ':':<8}{value}"), soft_wrap=True)
