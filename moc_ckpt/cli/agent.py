"""`moc-ckpt agent`: the agents of this node, what their ranks hold in memory and write to storage."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import (
    PROBLEM,
    AsJson,
    age,
    print_json,
    size,
    stderr,
    stdout,
    what_went_wrong,
)
from moc_ckpt.cli.jobs import find_jobs
from moc_ckpt.errors import CheckpointNotFoundError, ConfigError, StorageError
from moc_ckpt.persist.process import is_alive
from moc_ckpt.persist.protocol import RankStatus, Status, StatusRequest, Stop, Stopping
from moc_ckpt.persist.survey import Holdings, ask_agent, read_holdings
from moc_ckpt.snapshot.places import find_arenas, node_name

__all__ = ["agent", "find_jobs"]

_REFRESH_S = 1.0
_SHOWN_STEPS = 4

agent = typer.Typer(
    name="agent",
    help="The agents of this node: one process per job, which writes snapshots from memory to storage.",
    no_args_is_help=True,
    add_completion=False,
)

_SaveDir = Annotated[
    str | None, typer.Argument(metavar="[DIR]", help="The job's save_dir (path or URL); without it every job here.")
]
_Job = Annotated[str | None, typer.Option("--job", metavar="KEY", help="The job's key (MOC_JOB_ID).")]
_Folder = Annotated[Path | None, typer.Option("--dir", metavar="PATH", help="The job's directory in shared memory.")]


# ---- what there is ----


@dataclass(frozen=True, slots=True)
class _Seen:
    """One job of this node: its directory, its agent's word (None if none answers) and its arenas."""

    folder: Path
    status: Status | None
    problem: str
    arenas: list[Holdings]


def _look(folder: Path) -> _Seen:
    status, problem = None, ""
    try:
        found = ask_agent(folder, StatusRequest())
        if isinstance(found, Status):
            status = found
    except StorageError as error:
        problem = error.what
    return _Seen(folder, status, problem, [read_holdings(path) for path in find_arenas(folder)])


# ---- status ----


@agent.command()
def status(
    save_dir: _SaveDir = None,
    job: _Job = None,
    folder: _Folder = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the agents of this node: their ranks, what is in memory, how old it is, and what is being written.

    Exit status 1: no agent lives.
    """
    with what_went_wrong(as_json):
        if watch and as_json:
            raise ConfigError("--watch shows a screen, --json prints one object", fix="give one of the two")
        if watch:
            _watch(save_dir, job, folder)
            return
        jobs = [_look(found) for found in find_jobs(save_dir, job, folder)]
    if as_json:
        print_json({"node": node_name(), "jobs": [_as_data(item) for item in jobs]})
    else:
        stdout().print(_as_text(jobs))
    if not any(item.status for item in jobs):
        raise typer.Exit(PROBLEM)


def _watch(save_dir: str | None, job: str | None, folder: Path | None) -> None:
    console = stdout()
    find_jobs(save_dir, job, folder)  # a job that is not there is an error at the start, and may go later
    with suppress(KeyboardInterrupt), Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            jobs: list[_Seen] = []
            with suppress(CheckpointNotFoundError):
                jobs = [_look(found) for found in find_jobs(save_dir, job, folder)]
            clock = Text(time.strftime("%H:%M:%S  "), style="dim")
            live.update(Group(_as_text(jobs), clock.append("Ctrl-C ends")), refresh=True)
            time.sleep(_REFRESH_S)


def _ranks(job: _Seen) -> list[tuple[RankStatus | None, Holdings | None]]:
    """Pairs what the agent says of each rank with its arena; arenas whose trainer is gone stand alone."""
    arenas = {str(item.path): item for item in job.arenas}
    pairs: list[tuple[RankStatus | None, Holdings | None]] = [
        (rank, arenas.pop(rank.arena, None)) for rank in (job.status.ranks if job.status else [])
    ]
    pairs += [(None, item) for item in arenas.values()]
    return sorted(pairs, key=lambda pair: (_rank_of(pair), _run_of(pair)))


def _rank_of(pair: tuple[RankStatus | None, Holdings | None]) -> int:
    rank, held = pair
    return rank.rank if rank is not None else held.rank if held is not None else -1


def _run_of(pair: tuple[RankStatus | None, Holdings | None]) -> str:
    rank, held = pair
    return rank.run if rank is not None else held.run if held is not None else ""


def _now_of(pairs: list[tuple[RankStatus | None, Holdings | None]]) -> tuple[int | None, dict[int, float]]:
    """Returns the newest step that is known of the job, and when which step was snapshotted."""
    times: dict[int, float] = {}
    steps: list[int] = []
    for rank, held in pairs:
        for step, moment in rank.steps if rank is not None else ():
            times[step] = min(moment, times.get(step, moment))
            steps.append(step)
        if held is not None:
            steps += [step for step in (*held.dense[:1], held.newest) if step is not None]
    return max(steps, default=None), times


def _as_data(job: _Seen) -> dict[str, Any]:
    pairs = _ranks(job)
    now, times = _now_of(pairs)
    told = msgspec.to_builtins(job.status) if job.status is not None else None
    if told is not None:
        told.pop("ranks")
        told.pop("type", None)
    return {
        "directory": str(job.folder),
        "job": job.status.job if job.status else job.folder.name,
        "agent": told,
        "problem": job.problem or None,
        "newest_step": now,
        "ranks": [
            {
                "run": _run_of((rank, held)),
                "rank": _rank_of((rank, held)),
                "pid": rank.pid if rank else held.pid if held else None,
                "alive": rank.alive if rank else bool(held and held.alive),
                "connected": bool(rank and rank.connected),
                "saves": _saves_data(rank) if rank else None,
                "memory": _memory_data(held, now, times) if held else None,
            }
            for rank, held in pairs
        ],
    }


def _saves_data(rank: RankStatus) -> dict[str, Any]:
    return {
        "queued": rank.queued,
        "writing": rank.writing,
        "committing": rank.committing,
        "done": rank.done,
        "failed": rank.failed,
        "last_bytes": rank.bytes,
        "last_seconds": rank.seconds,
        "last_gb_per_s": _rate(rank),
        "error": rank.error or None,
    }


def _memory_data(held: Holdings, now: int | None, times: dict[int, float]) -> dict[str, Any]:
    return {
        "arena": str(held.path),
        "bytes": held.nbytes,
        "slots": held.states,
        "dense_steps": list(held.dense),
        "restorable_steps": list(held.restorable),
        "experts": held.experts,
        "expert_versions": held.versions,
        "oldest_expert_step": held.oldest,
        "newest_expert_step": held.newest,
        "dense_age_steps": _behind(held.dense[0] if held.dense else None, now),
        "dense_age_s": _seconds(held.dense[0] if held.dense else None, times),
        "oldest_expert_age_steps": _behind(held.oldest, now),
        "oldest_expert_age_s": _seconds(held.oldest, times),
        "error": held.error or None,
    }


def _rate(rank: RankStatus) -> float | None:
    return rank.bytes / 1e9 / rank.seconds if rank.seconds > 0 and rank.bytes else None


def _behind(step: int | None, now: int | None) -> int | None:
    return now - step if step is not None and now is not None else None


def _seconds(step: int | None, times: dict[int, float]) -> float | None:
    """How long ago a step was snapshotted; None if that is not known."""
    return max(time.time() - times[step], 0.0) if step is not None and step in times else None


def _as_text(jobs: list[_Seen]) -> Group:
    if not jobs:
        return Group(Text("no job of this user has an agent or memory on this node"))
    parts: list[Any] = []
    for job in jobs:
        parts += [_heading(job), *_body(job), Text()]
    return Group(*parts[:-1])


def _heading(job: _Seen) -> Text:
    told = job.status
    name = Text.assemble(("job ", "bold"), (told.job if told else job.folder.name, "bold"))
    if told is None:
        state = job.problem or "no agent lives here"
        return name.append(f"  {state}", "bold red").append(f"  ({job.folder})", "dim")
    line = name.append(f"  agent {told.pid} on {told.node}", "bold green")
    line.append(f", up {age(told.uptime_s)}, {size(told.rss)}, version {told.version}  ")
    if told.stopping:
        line.append(f"ending: {told.stopping}  ", "bold yellow")
    elif told.idle_s is not None:
        line.append(f"no trainer, ends in {age(told.linger_s - told.idle_s)}  ", "yellow")
    return line.append(f"({job.folder})", "dim")


def _body(job: _Seen) -> list[Any]:
    pairs = _ranks(job)
    if not pairs:
        return [Text("  no rank, no memory", style="dim")]
    now, times = _now_of(pairs)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("rank", justify="right")
    for name in ("process", "memory", "dense steps", "experts", "slots", "saves", "last part"):
        table.add_column(name, overflow="fold")
    notes = []
    for rank, held in pairs:
        table.add_row(
            str(_rank_of((rank, held))),
            _process_text(rank, held),
            size(held.nbytes) if held and not held.error else "-",
            _dense_text(held, now, times),
            _experts_text(held, now, times),
            _slots_text(held),
            _saves_text(rank),
            _part_text(rank),
        )
        if rank is not None and rank.error:
            notes.append((_rank_of((rank, held)), "last failure", rank.error))
        if held is not None and held.error:
            notes.append((_rank_of((rank, held)), held.path.name, held.error))
    lines = [Text(f"  rank {number}, {what}: {text}", style="yellow") for number, what, text in notes]
    return [table, *lines]


def _process_text(rank: RankStatus | None, held: Holdings | None) -> Text:
    pid = str(rank.pid if rank else held.pid if held else 0)
    if not (rank.alive if rank else held is not None and held.alive):
        # Ended or killed: memory does not tell.
        return Text(f"{pid}\ngone", style="yellow")
    if rank is None or not rank.connected:
        return Text(f"{pid}\nnot connected", style="yellow")
    return Text(pid)


def _age_text(step: int | None, now: int | None, times: dict[int, float]) -> str:
    behind, seconds = _behind(step, now), _seconds(step, times)
    told = [] if not behind else [f"{behind:,} step{'s' if behind != 1 else ''}"]
    if seconds is not None:
        told.append(age(seconds))
    told[-1:] = [f"{last} ago" for last in told[-1:]]
    return ", ".join(told)


def _lines(first: str | Text, second: str = "") -> Text:
    """Returns a cell of a line and, dimmed, what explains it."""
    return Text.assemble(first, (f"\n{second}" if second else "", "dim"))


def _dense_text(held: Holdings | None, now: int | None, times: dict[int, float]) -> Text:
    if held is None or not held.restorable:
        return Text("-", style="dim")
    shown = ", ".join(f"{step:,}" for step in held.restorable[:_SHOWN_STEPS])
    shown += ", …" if len(held.restorable) > _SHOWN_STEPS else ""
    return _lines(shown, _age_text(held.restorable[0], now, times))


def _experts_text(held: Holdings | None, now: int | None, times: dict[int, float]) -> Text:
    if held is None or not held.experts or held.oldest is None or held.newest is None:
        return Text("-", style="dim")
    steps = f"{held.oldest:,}" if held.oldest == held.newest else f"{held.oldest:,} to {held.newest:,}"
    told = _age_text(held.oldest, now, times)
    return _lines(f"{held.experts:,} at {steps}", f"oldest: {told}" if told else "")


def _slots_text(held: Holdings | None) -> Text:
    if held is None or held.states is None:
        return Text("-", style="dim")
    used = [(name.lower(), held.states[name]) for name in ("FILLING", "FILLED", "PERSISTING", "COMMITTED")]
    told = ", ".join(f"{count:,} {name}" for name, count in used if count)
    return _lines(told or "none in use", f"{held.states['FREE']:,} of {sum(held.states.values()):,} free")


def _saves_text(rank: RankStatus | None) -> Text:
    if rank is None:
        return Text("-", style="dim")
    done = Text(f"{rank.done:,} done")
    if rank.failed:
        done.append(f", {rank.failed:,} failed", "red")
    now = [("writing", rank.writing), ("queued", rank.queued), ("committing", rank.committing)]
    return _lines(done, ", ".join(f"{count} {name}" for name, count in now if count))


def _part_text(rank: RankStatus | None) -> Text:
    rate = _rate(rank) if rank else None
    if rank is None or rate is None:
        return Text("-", style="dim")
    return _lines(size(rank.bytes), f"{rate:.2f} GB/s")


# ---- stop ----


@agent.command()
def stop(
    save_dir: _SaveDir = None,
    job: _Job = None,
    folder: _Folder = None,
    now: Annotated[bool, typer.Option("--now", help="At once: what is being written is cut off.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for its end.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """End an agent after its work, or at once. A run that is still training starts another one when it needs it."""
    with what_went_wrong(as_json):
        found = [item for item in map(_look, find_jobs(save_dir, job, folder)) if item.status is not None]
        if not found:
            raise CheckpointNotFoundError("no agent lives on this node", fix="there is nothing to stop")
        if len(found) > 1:
            names = ", ".join(item.folder.name for item in found)
            raise ConfigError(f"{len(found)} agents live on this node: {names}", fix="name one with --job")
        target = found[0]
        assert target.status is not None
        answer = ask_agent(target.folder, Stop("moc-ckpt agent stop", now))
        if not isinstance(answer, Stopping):
            raise StorageError("the agent gave no answer to that", where=str(target.folder), fix="look at its log")
        connected = sum(rank.connected for rank in target.status.ranks)
        _await_end(stderr(), answer, wait_s, target.folder)
    if as_json:
        print_json(
            {"job": target.status.job, "pid": answer.pid, "unfinished": answer.unfinished, "trainers": connected}
        )
        return
    console = stdout()
    console.print(Text.assemble(("ended ", "bold green"), f"agent {answer.pid} of job {target.status.job}"))
    if connected:
        ranks = f"{connected} rank{'s of its run are' if connected != 1 else ' of its run is'} still training"
        console.print(f"{ranks}: the first one on this node starts another agent, which gets what is unfinished")


def _await_end(console: Console, answer: Stopping, wait_s: float, folder: Path) -> None:
    end = time.monotonic() + wait_s
    saves = f"{answer.unfinished} save{'s' if answer.unfinished != 1 else ''}"
    with console.status(f"waiting for agent {answer.pid} ({saves} unfinished)"):
        while True:
            if not is_alive(answer.pid):
                return
            if time.monotonic() >= end:
                raise StorageError(
                    f"agent {answer.pid} has not ended within {wait_s:g} s",
                    where=str(folder),
                    fix="`moc-ckpt agent status` shows what it does; --now cuts it off",
                )
            time.sleep(0.05)
