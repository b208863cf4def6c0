"""What the verbs share: errors on the screen, exit status, sizes and times for people."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from moc_ckpt.errors import CheckpointNotFoundError, ClientStateError, ConfigError, MocError, UnsupportedError
from moc_ckpt.storage.checkpoint import latest_tag, list_checkpoints
from moc_ckpt.storage.store import Store

__all__ = [
    "PROBLEM",
    "WRONG_USE",
    "AsJson",
    "Directory",
    "Tag",
    "age",
    "bytes_progress",
    "choose_tag",
    "integration",
    "print_json",
    "size",
    "stderr",
    "stdout",
    "what_went_wrong",
    "when",
]

PROBLEM = 1
"""Exit status: something is wrong with the data."""
WRONG_USE = 2
"""Exit status: the command asks for something that is not there or not possible."""

# Arguments that every verb on a checkpoint takes.
Directory = Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint directory or URL (a run's save_dir).")]
Tag = Annotated[str | None, typer.Argument(help="Checkpoint; without it the one that `latest` names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def stdout() -> Console:
    """Returns the console for results."""
    return Console(highlight=False)


def stderr() -> Console:
    """Returns the console for progress and errors."""
    return Console(stderr=True, highlight=False)


def print_json(data: dict[str, Any]) -> None:
    """Prints one JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


@contextmanager
def what_went_wrong(as_json: bool) -> Iterator[None]:
    """Turns errors of this package into a message (what, where, what to do) and an exit status.

    Args:
        as_json: print the error as a JSON object on stdout too.
    """
    try:
        yield
    except MocError as error:
        if as_json:
            kind = type(error).__name__
            print_json({"error": {"type": kind, "what": error.what, "where": error.where, "fix": error.fix}})
        console = stderr()
        console.print(Text.assemble(("error: ", "bold red"), error.what), soft_wrap=True)
        if error.where:
            console.print(Text.assemble(("  where:      ", "bold"), error.where), soft_wrap=True)
        if error.fix:
            console.print(Text.assemble(("  what to do: ", "bold"), error.fix), soft_wrap=True)
        wrong_use = isinstance(error, (CheckpointNotFoundError, ClientStateError, ConfigError, UnsupportedError))
        raise typer.Exit(WRONG_USE if wrong_use else PROBLEM) from None


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many bytes of how many are done; yields what is to be called with both."""
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def integration(module: str) -> Any:
    """Returns a module of the integrations, which need torch: the other verbs run without.

    Args:
        module: its name below `moc_ckpt.integrations`.

    Raises:
        ConfigError: if torch is not installed.
    """
    try:
        return importlib.import_module(f"moc_ckpt.integrations.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("moc_ckpt"):
            raise
        raise ConfigError(
            f"this needs {error.name}, which is not installed",
            where="the Python environment of moc-ckpt",
            fix="install torch and deepspeed beside moc_ckpt, or run it where training runs",
        ) from error


def choose_tag(store: Store, tag: str | None) -> str:
    """Returns the tag asked for, else the one that `latest` names, else the newest commit.

    Raises:
        CheckpointNotFoundError: if there is none.
    """
    if tag is not None:
        return tag
    if not store.root_exists():
        raise CheckpointNotFoundError(
            "the checkpoint directory does not exist", where=store.url, fix="check the path and the mount"
        )
    found = latest_tag(store) or next((item.tag for item in list_checkpoints(store)), None)
    if found is None:
        raise CheckpointNotFoundError(
            "there is no checkpoint in this directory", where=store.url, fix="name the save_dir of a run"
        )
    return found


def size(nbytes: float) -> str:
    """Returns a size for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"


def age(seconds: float) -> str:
    """Returns how long ago something was, for people."""
    seconds = max(seconds, 0)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def when(created: float) -> str:
    """Returns a local time and how long ago that was."""
    local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created))
    return f"{local} ({age(time.time() - created)} ago)"
