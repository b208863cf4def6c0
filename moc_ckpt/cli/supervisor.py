"""Processes of a supervised command: started, watched, ended with what they started, started again. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moc_ckpt.persist.process import start_ticks

__all__ = ["Processes", "Run", "Supervisor", "how_it_ended"]

LONG_RUN_S = 600.0
"""After a run of so many seconds the next crash waits as the first one did."""
LONGEST_BACKOFF_S = 600.0
"""Doubling ends here, or at the first wait if that is longer."""

# What a crash leaves cannot make a last save together; it only gets the time to put itself in order.
_LEFT_OVER_S = 30.0
_KILL_S = 10.0
_POLL_S = 0.05
_AGENT = b"moc_ckpt.persist.agent"  # holds what a restart recovers from, and ends by itself


def how_it_ended(code: int) -> tuple[int, str]:
    """Returns the exit status that a shell would show, and words, for a return code of `subprocess`."""
    if code >= 0:
        return code, f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return 128 - code, f"killed by {name}"


class Processes:
    """A command and everything that it starts, in whatever session: launchers give their workers sessions of their own.

    Args:
        command: program and arguments.
        environ: its environment; a mark is added by which what it starts is known.
        stdout: where its output goes; None: where this process's goes.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], stdout: int | None = None) -> None:
        mark = f"MOC_RUN_{uuid.uuid4().hex}"
        self._mark = f"{mark}=1".encode()
        self.command = subprocess.Popen(command, env={**environ, mark: "1"}, stdout=stdout, start_new_session=True)

    def signal_group(self, signum: int) -> None:
        """Sends a signal to the command and to what is in its process group."""
        # As long as anybody is in the group, its number is given to nobody else.
        if self.command.poll() is None or self._in_group():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.command.pid, signum)

    def left(self) -> dict[int, int]:
        """Returns what lives of the command and its offspring, node agents excepted: pid -> start time in ticks."""
        parents: dict[int, int] = {}
        ours: set[int] = set()
        if self.command.poll() is None:
            ours.add(self.command.pid)
        for pid, parent, group, session in _processes():
            parents[pid] = parent
            if self.command.pid in (group, session) or self._is_marked(pid):
                ours.add(pid)
        # Children of ours that have another environment.
        grown = True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in ours} - ours
            ours |= more
            grown = bool(more)
        ours.discard(os.getpid())
        found = {pid: ticks for pid in ours if (ticks := start_ticks(pid)) is not None}
        return {pid: ticks for pid, ticks in found.items() if not _is_agent(pid)}

    def end(self, grace_s: float) -> tuple[int, int]:
        """Ends what lives: SIGTERM, after `grace_s` SIGKILL.

        Returns:
            How many processes were left, and how many of them had to be killed.
        """
        told: set[tuple[int, int]] = set()
        deadline = time.monotonic() + grace_s
        while (left := self.left()) and time.monotonic() < deadline:
            for pid, ticks in left.items():
                if (pid, ticks) not in told:
                    told.add((pid, ticks))
                    _send(pid, ticks, signal.SIGTERM)
            time.sleep(_POLL_S)
        killed = self.kill()
        return len(told | killed), len(killed)

    def kill(self) -> set[tuple[int, int]]:
        """Kills what lives; returns whom, as (pid, start time)."""
        killed: set[tuple[int, int]] = set()
        deadline = time.monotonic() + _KILL_S
        while (left := self.left()) and time.monotonic() < deadline:
            for pid, ticks in left.items():
                killed.add((pid, ticks))
                _send(pid, ticks, signal.SIGKILL)
            time.sleep(_POLL_S)
        return killed

    def _in_group(self) -> bool:
        return any(group == self.command.pid for _, _, group, _ in _processes())

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            return False


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """Returns (pid, parent, group, session) of every process that has not ended."""
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            fields = (path / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if len(fields) > 3 and fields[0] not in (b"Z", b"X", b"x"):
            yield int(path.name), int(fields[1]), int(fields[2]), int(fields[3])


def _is_agent(pid: int) -> bool:
    try:
        return _AGENT in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _send(pid: int, ticks: int, signum: int) -> None:
    if start_ticks(pid) == ticks:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


@dataclass(slots=True)
class Run:
    """One run of the command.

    Attributes:
        attempt: its number, from 1.
        status: exit status, 128 + n for signal n.
        how: the same in words.
        seconds: how long it ran.
        left: processes that it left and that were ended.
        killed: how many of them took a SIGKILL.
        found: what `before_restart` said after it.
    """

    attempt: int
    status: int
    how: str
    seconds: float
    left: int = 0
    killed: int = 0
    found: list[str] = field(default_factory=list)


class Supervisor:
    """Runs a command until it ends well, was told to end, or has crashed too often.

    Args:
        command: program and arguments.
        job: the job's id, which the command gets as MOC_JOB_ID.
        max_restarts: restarts after which a crash is the last one.
        backoff_s: seconds before the first restart; doubles with every crash.
        grace_s: seconds that the command has for its last save once it was told to end.
        say: tells people.
        before_restart: called with the job after a crash; returns lines for people.
        stdout: where the command's output goes; None: where this process's goes.

    Attributes:
        runs: what happened so far.
        reason: why it is over: `ended`, `stopped` (by a signal) or `gave up`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        job: str,
        max_restarts: int,
        backoff_s: float,
        grace_s: float,
        say: Callable[[str], None],
        before_restart: Callable[[str], list[str]],
        stdout: int | None = None,
    ) -> None:
        self._command, self._job, self._stdout = list(command), job, stdout
        self._max_restarts, self._first_backoff_s, self._grace_s = max_restarts, backoff_s, grace_s
        self._say, self._before_restart = say, before_restart
        self._signals: list[int] = []
        self.runs: list[Run] = []
        self.reason = ""

    def run(self) -> int:
        """Returns the exit status: the command's own, or 128 + n where signal n came while none was running.

        Raises:
            OSError: if the command cannot be started.
        """
        with self._hear():
            backoff = self._first_backoff_s
            while True:
                run = self._once(len(self.runs) + 1)
                self.runs.append(run)
                name = self._name(run.attempt)
                if self._signals:
                    return self._over("stopped", run.status)
                if run.status == 0:
                    return self._over("ended", 0)
                self._note_left(name, run)
                self._find(run)
                if run.attempt > self._max_restarts:
                    self._say(f"gave up after {self._max_restarts} restarts; status {run.status}")
                    return self._over("gave up", run.status)
                if run.seconds >= LONG_RUN_S:
                    backoff = self._first_backoff_s
                if not self._signals:
                    self._say(f"restart {run.attempt} of {self._max_restarts} in {backoff:g} s")
                self._pause(backoff)
                if self._signals:
                    self._say(f"{signal.Signals(self._signals[0]).name}: no restart")
                    return self._over("stopped", 128 + self._signals[0])
                backoff = min(backoff * 2, max(self._first_backoff_s, LONGEST_BACKOFF_S))

    def _once(self, attempt: int) -> Run:
        name, begin = self._name(attempt), time.monotonic()
        environ = {**os.environ, "MOC_JOB_ID": self._job, "MOC_RESTART_COUNT": str(attempt - 1)}
        processes = Processes(self._command, environ, self._stdout)
        self._say(f"{name}: started process {processes.command.pid}, job {self._job}")
        try:
            while processes.command.poll() is None and not self._signals:
                time.sleep(_POLL_S)
            killed = self._stop(processes, name) if self._signals else 0
            status, how = how_it_ended(processes.command.wait())
            seconds = time.monotonic() - begin
            self._say(f"{name}: {how} after {seconds:.1f} s")
            run = Run(attempt, status, how, seconds, killed=killed)
            if status and not self._signals:
                run.left, run.killed = processes.end(min(self._grace_s, _LEFT_OVER_S))
            return run
        except BaseException:
            processes.kill()
            raise

    def _stop(self, processes: Processes, name: str) -> int:
        """Lets the command make its last save; returns how many processes had to be killed."""
        self._say(
            f"{name}: {signal.Signals(self._signals[0]).name}: told the command to save and end, "
            f"which it must within {self._grace_s:g} s"
        )
        processes.signal_group(signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        # Where the command is a shell it dies at once, and what it started is still saving.
        while processes.left():
            impatient = self._signals.count(signal.SIGINT) > 1
            if impatient or time.monotonic() >= deadline:
                killed = len(processes.kill())
                why = "Ctrl-C again" if impatient else f"not ended within {self._grace_s:g} s"
                self._say(f"{name}: {why}: killed {killed} process{'es' if killed != 1 else ''}")
                return killed
            time.sleep(_POLL_S)
        return 0

    def _note_left(self, name: str, run: Run) -> None:
        if run.left:
            killed = f", {run.killed} of them by SIGKILL" if run.killed else ""
            self._say(f"{name}: ended {run.left} process{'es' if run.left != 1 else ''} that it left{killed}")

    def _find(self, run: Run) -> None:
        try:
            run.found = self._before_restart(self._job)
        except Exception as error:  # whatever it is, a restart is worth more
            run.found = [f"what memory holds is not known: {error}"]
        for line in run.found:
            self._say(f"  {line}")

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_S))

    def _name(self, attempt: int) -> str:
        return f"attempt {attempt} of {self._max_restarts + 1}"

    def _over(self, reason: str, status: int) -> int:
        self.reason = reason
        return status

    @contextmanager
    def _hear(self) -> Iterator[None]:
        """Notes SIGTERM and SIGINT instead of dying of them."""

        def note(signum: int, _: Any) -> None:
            self._signals.append(signum)

        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup and the like
                    before[signum] = signal.signal(signum, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
