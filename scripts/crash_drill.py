"""Kills a training run on purpose and checks that it comes back where it must.

Starts the command, waits until it saves, and then, one after the other: kills every trainer (kill -9); kills trainers
and the node agent; kills both and wipes the node's memory, as if the node were lost. After each it waits until the run
has restored itself (starting it again if it does not do so by itself) and compares the step with what memory, or
storage, held at that moment. Give it a directory of its own: the run loses steps, as in a real crash.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moc_ckpt.errors import MocError
from moc_ckpt.events import Event, EventKind, read_events
from moc_ckpt.persist.protocol import RankStatus, Status, StatusRequest
from moc_ckpt.persist.survey import ask_agent
from moc_ckpt.recovery.memory import open_memory
from moc_ckpt.snapshot.places import find_arenas, job_dir, job_key
from moc_ckpt.storage.checkpoint import latest_tag, load_manifest
from moc_ckpt.storage.store import open_store

T = TypeVar("T")

DRILLS = {
    "trainers": "every trainer is killed",
    "agent": "trainers and node agent are killed",
    "node": "trainers and agent are killed, the memory is wiped",
}
_LOOK_S = 0.2
_QUIET_S = 60.0


class DrillError(Exception):
    """The drill cannot go on, or the run did not come back."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the run after one drill.

    Attributes:
        drill: its name.
        trainers: processes that were killed.
        before: the newest step that memory held whole just before.
        memory: the newest step that memory held whole; None if it was wiped or held none.
        storage: the step of the newest commit.
        expected: where the run must go on from.
        resumed: where it did.
        from_memory: bytes of tensors that came from memory.
        from_storage: bytes that came from storage.
        away_s: seconds from the kill to the restored state.
    """

    drill: str
    trainers: int
    before: int
    memory: int | None
    storage: int
    expected: int
    resumed: int
    from_memory: int
    from_storage: int
    away_s: float

    @property
    def ok(self) -> bool:
        """Whether it came back where it must."""
        return self.resumed == self.expected


class Drill:
    """A run under the drill, and what can be seen of it from outside.

    Args:
        save_dir: where the run saves.
        command: what starts it.
        log: where its output goes.
        timeout_s: seconds that a start, or coming back, may take.
    """

    def __init__(self, save_dir: str, command: Sequence[str], log: Path, timeout_s: float) -> None:
        self._store = open_store(save_dir, create=True)
        self._command = list(command)
        self._log = log
        self._timeout_s = timeout_s
        self._env = {**os.environ, "MOC_JOB_ID": os.environ.get("MOC_JOB_ID") or f"drill-{os.getpid()}"}
        self._folder = job_dir(job_key(save_dir, self._env), create=False)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_at = 0.0

    def start(self) -> None:
        """Starts the command."""
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with self._log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    self._command, stdout=log, env=self._env, start_new_session=True, **streams
                )
            except OSError as error:
                raise DrillError(f"the command cannot be started: {error}") from error

    def trained(self, since: float) -> list[RankStatus]:
        """Waits until the run has committed since a time, and holds a newer step in memory; returns its ranks."""

        def look() -> list[RankStatus] | None:
            ranks = self._ranks()
            if not ranks or len(ranks) != ranks[0].world:
                return None
            committed = self._events(EventKind.COMMITTED, since)
            newest = max((event.step or 0 for event in committed), default=None)
            memory = self._memory_step() if newest is not None else None
            return ranks if memory is not None and newest is not None and memory > newest else None

        return self._wait("a checkpoint, and a newer snapshot in memory", look)

    def crash(self, how: str, ranks: Sequence[RankStatus]) -> Result:
        """Kills what a drill kills, and waits until the run is back."""
        status = self._status()
        before = self._memory_step() or 0
        begun = time.time()
        for rank in ranks:
            _kill(rank.pid)
        _until_gone([rank.pid for rank in ranks])
        memory = self._memory_step()
        if how != "trainers" and status is not None:
            _kill(status.pid)
            _until_gone([status.pid])
        if how == "node":
            for arena in find_arenas(self._folder):
                arena.unlink(missing_ok=True)
            memory = None
        event = self._wait("the run to restore itself", lambda: self._restored(begun))
        # What the agent was still writing when the trainers died counts as well.
        commits = [item.step or 0 for item in self._events(EventKind.COMMITTED, 0.0) if item.time <= event.time]
        storage = max((step for step in commits if memory is None or step <= memory), default=0)
        if memory is None:
            storage = self._stored_before(event)
        return Result(
            drill=how,
            trainers=len(ranks),
            before=before,
            memory=memory,
            storage=storage,
            expected=max(storage, memory if memory is not None else 0),
            resumed=event.step or 0,
            from_memory=int(event.fields.get("memory_bytes", 0)) + int(event.fields.get("peer_bytes", 0)),
            from_storage=int(event.fields.get("storage_bytes", 0)),
            away_s=event.time - begun,
        )

    def stop(self) -> int | None:
        """Tells the run to save and end; returns its exit status."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode

    def tail(self, lines: int = 15) -> str:
        """Returns the end of the run's output."""
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def _restored(self, since: float) -> Event | None:
        return next(iter(self._events(EventKind.RECOVERED, since)), None)

    def _stored_before(self, event: Event) -> int:
        """The step of the newest commit when a run restored: what it says itself, or what `latest` names."""
        if event.tag is not None:
            named = [item for item in self._events(EventKind.COMMITTED, 0.0) if item.time <= event.time]
            return max((item.step or 0 for item in named), default=0)
        tag = latest_tag(self._store)
        return load_manifest(self._store, tag).step if tag is not None else 0

    def _events(self, kind: EventKind, since: float) -> list[Event]:
        return [event for event in read_events(self._store) if event.event == kind and event.time >= since]

    def _status(self) -> Status | None:
        try:
            answer = ask_agent(self._folder, StatusRequest())
        except MocError:
            return None
        return answer if isinstance(answer, Status) else None

    def _ranks(self) -> list[RankStatus]:
        status = self._status()
        living = [rank for rank in status.ranks if rank.alive] if status is not None else []
        newest = living[-1].run if living else ""
        return [rank for rank in living if rank.run == newest]

    def _memory_step(self) -> int | None:
        """The newest step that memory holds whole on all ranks."""
        try:
            with open_memory(self._folder) as memory:
                chosen = memory.inventory.choose() if memory is not None else None
        except MocError:  # it is just being made, or removed
            return None
        return chosen.step if chosen is not None else None

    def _wait(self, what: str, look: Callable[[], T | None]) -> T:
        """Waits for something, starting the run again whenever its command has ended."""
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            found = look()
            if found is not None:
                return found
            assert self._process is not None
            status = self._process.poll()
            if status is not None:
                if status == 0:
                    raise DrillError("the run has come to its end: give it more iterations")
                if time.monotonic() - self._ended_at < 5.0:
                    raise DrillError(f"the command ends with {status} as soon as it is started:\n{self.tail()}")
                self._ended_at = time.monotonic()
                self.start()
            time.sleep(_LOOK_S)
        raise DrillError(f"waited {self._timeout_s:g} s for {what}:\n{self.tail()}")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _until_gone(pids: Sequence[int]) -> None:
    """Waits until the kernel has taken processes' memory and locks back."""
    end = time.monotonic() + _QUIET_S
    while time.monotonic() < end:
        if not any(_runs(pid) for pid in pids):
            return
        time.sleep(0.02)
    raise DrillError(f"processes {', '.join(map(str, pids))} do not end")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def show(console: Console, results: Sequence[Result]) -> None:
    """Prints what became of the run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (
        "drill",
        "killed",
        "was at",
        "memory",
        "storage",
        "back at",
        "lost",
        "read from",
        "away",
    ):
        left = name in ("drill", "read from")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for item in results:
        mark = "[green]✓[/]" if item.ok else f"[red]✗ expected {item.expected}[/]"
        table.add_row(
            item.drill,
            str(item.trainers),
            str(item.before),
            "-" if item.memory is None else str(item.memory),
            str(item.storage),
            f"{item.resumed} {mark}",
            # A run that is killed a moment later may have kept one more step than was seen.
            str(max(0, item.before - item.resumed)),
            _places(item),
            f"{item.away_s:.1f} s",
        )
    console.print(table)


def _places(item: Result) -> str:
    total = item.from_memory + item.from_storage
    share = item.from_memory / total if total else 0.0
    return "storage" if not share else "memory" if share == 1 else f"memory {share:.0%}"


def main() -> None:
    """Runs the drills."""
    parser = argparse.ArgumentParser(
        prog="crash_drill.sh",
        usage="crash_drill.sh [-h] [--drills …] [--timeout S] [--log FILE] [--json] DIR -- COMMAND …",
        description=__doc__,
    )
    parser.add_argument("save_dir", metavar="DIR", help="where the run saves its checkpoints")
    parser.add_argument("--drills", default=",".join(DRILLS), help="which, in this order (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a start, or to be back (%(default)g)")
    parser.add_argument("--log", type=Path, default=Path("crash_drill.log"), help="the run's output (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:cut]), words[cut + 1 :]
    drills = [name.strip() for name in options.drills.split(",") if name.strip()]
    if not command:
        parser.error("name the command that starts the run, after --")
    if unknown := [name for name in drills if name not in DRILLS]:
        parser.error(f"no such drill: {', '.join(unknown)}; there are {', '.join(DRILLS)}")
    console = Console(quiet=options.json)
    drill = Drill(options.save_dir, command, options.log, options.timeout)
    results: list[Result] = []
    error = ""
    # Whoever ends the drill must not be left with its run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        since = time.time()
        console.print(f"starting the run, output in {options.log}", highlight=False)
        drill.start()
        for name in drills:
            ranks = drill.trained(since)
            console.print(f"[bold]{name}[/]: {DRILLS[name]}", highlight=False)
            since = time.time()
            results.append(drill.crash(name, ranks))
    except (DrillError, MocError) as caught:
        error = str(caught)
    except KeyboardInterrupt:
        error = "interrupted"
    finally:
        status = drill.stop()
    good = not error and all(item.ok for item in results)
    if options.json:
        rows = [{**asdict(item), "ok": item.ok} for item in results]
        print(json.dumps({"ok": good, "error": error, "drills": rows, "status": status}, indent=2))
    elif results:
        show(console, results)
    if error:
        console.print(f"[bold red]the drill ended early:[/] {escape(error)}", highlight=False)
    elif good:
        console.print("[bold green]The run came back each time where it had to.[/]")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
