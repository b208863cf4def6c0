"""`moc-ckpt run`: supervises a launch command, and starts it again after a crash."""

from __future__ import annotations

import os
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moc_ckpt.cli.common import print_json, what_went_wrong
from moc_ckpt.cli.supervisor import Supervisor
from moc_ckpt.errors import ConfigError, MocError
from moc_ckpt.persist.protocol import Status, StatusRequest
from moc_ckpt.persist.survey import Holdings, ask_agent, read_holdings
from moc_ckpt.recovery.flush import flush_job
from moc_ckpt.recovery.report import restore_cost
from moc_ckpt.snapshot.places import find_arenas, job_dir, job_key

__all__ = ["before_restart", "run"]

_SHOWN_STEPS = 4


def run(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND…", help="What launches the training, e.g. torchrun …")
    ],
    max_restarts: Annotated[int, typer.Option(min=0, help="Crashes after which it is started again.")] = 10,
    backoff: Annotated[float, typer.Option(min=0, help="Seconds before the first restart; doubles per crash.")] = 10.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds for the last save, from SIGTERM or Ctrl-C to SIGKILL.")
    ] = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in the end; COMMAND's output goes to stderr.")
    ] = False,
) -> None:
    """Run COMMAND, and start it again when it crashes.

    Exit status: COMMAND's own; 128 + n if signal n ended it.
    """
    job = os.environ.get("MOC_JOB_ID", "").strip() or f"run-{uuid.uuid4().hex[:12]}"
    supervisor = Supervisor(
        command,
        job=job,
        max_restarts=max_restarts,
        backoff_s=backoff,
        grace_s=grace,
        say=_say,
        before_restart=before_restart,
        stdout=sys.stderr.fileno() if as_json else None,
    )
    with what_went_wrong(as_json):
        try:
            status = supervisor.run()
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started: {error.strerror}", where="COMMAND", fix="check its name and rights"
            ) from error
    if as_json:
        print_json(
            {
                "job": job,
                "status": status,
                "reason": supervisor.reason,
                "restarts": len(supervisor.runs) - 1,
                "runs": [asdict(one) for one in supervisor.runs],
            }
        )
    raise typer.Exit(status)


def before_restart(job: str) -> list[str]:
    """Is called after a crash, once nothing of the command lives; returns lines about what this node's memory holds.

    Args:
        job: the job's id, as in MOC_JOB_ID.
    """
    folder = job_dir(job_key(None, {"MOC_JOB_ID": job}), create=False)
    arenas = [read_holdings(path) for path in find_arenas(folder)] if folder.is_dir() else []
    if not arenas:
        return ["memory of this node holds nothing of the job"]
    lines = [*map(_line, arenas), *_flush(folder)]
    try:
        answer = ask_agent(folder, StatusRequest())
    except MocError as error:
        return [*lines, f"its agent: {error.what}"]
    if isinstance(answer, Status):
        busy = sum(rank.queued + rank.writing + rank.committing for rank in answer.ranks)
        lines.append(f"its agent, process {answer.pid}, is still writing {busy} saves" if busy else "its agent is idle")
    return lines


def _flush(folder: Path) -> list[str]:
    """Brings to storage what memory has newer; the start of a run would do it too, but where nobody looks."""
    try:
        flush, manifest = flush_job(folder)
    except (MocError, OSError) as error:
        told = str(error).replace("\n  ", "; ")
        return [f"memory is not of use: {told}"]
    if flush is None or manifest is None:
        return ["storage has all that memory holds"]
    had = f"storage had step {flush.stored_step:,}" if flush.stored_step is not None else "storage had nothing"
    lines = [
        f"flushed step {manifest.step:,} and {len(flush.experts):,} experts newer than storage to {manifest.tag} "
        f"in {flush.url} ({had})"
    ]
    cost = restore_cost(manifest)
    if cost.tokens:
        lines.append(f"the restart loses {cost.tokens:,} tokens of experts, PLT {100 * (cost.plt or 0.0):.2f} %")
    return lines


def _line(held: Holdings) -> str:
    if held.error:
        return f"rank {held.rank}: memory cannot be read: {held.error}"
    if not held.versions and not held.dense:
        return f"rank {held.rank}: nothing that is whole"
    dense = ", ".join(map(str, held.restorable[:_SHOWN_STEPS])) or "none"
    experts = f"; {held.experts} experts of steps {held.oldest} to {held.newest}" if held.experts else ""
    return f"rank {held.rank}: dense state of steps {dense}{experts}"


def _say(text: str) -> None:
    """Writes a line on stderr, with the time; nobody to read it is no reason to end a training."""
    try:
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} moc-ckpt run: {text}\n")
        sys.stderr.flush()
    except OSError:
        pass
