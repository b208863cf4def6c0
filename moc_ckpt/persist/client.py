"""The trainer's side: connects to the agent, starts one where none lives, keeps requests until they are answered."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.persist.protocol import (
    Cancel,
    Event,
    Goodbye,
    Hello,
    MessageError,
    Outcome,
    Persist,
    Persisted,
    Refused,
    ToAgent,
    Welcome,
    Wire,
    decode_to_client,
    peer,
)
from moc_ckpt.snapshot.places import agent_lock_path, agent_log_path, socket_path

__all__ = ["ANSWER_MARGIN_S", "AgentClient", "start_agent"]

ANSWER_MARGIN_S = 120.0
"""Seconds after a save's own deadline at which a request without an answer fails."""
_SHORTEST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_START_AGAIN_S = 5.0
_STEADY_S = 5.0
_MOST_LOST = 5
_WELCOME_S = 30.0
_TICK_S = 0.5
_MOST_EVENTS = 1000
_LOG_TAIL = 2000

_log = logging.getLogger(__name__)


def start_agent(folder: Path, job: str, *, linger_s: float) -> None:
    """Starts an agent that outlives this process; returns at once. Harmless where one lives already.

    The agent is no child of this process: launchers end what their trainers have started.

    Args:
        folder: the job's directory.
        job: the job key.
        linger_s: seconds that it lives on without trainers and work.

    Raises:
        StorageError: if no process can be started.
    """
    root = str(Path(__file__).absolute().parents[2])
    search = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{search}" if search else root}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # numpy starts none
    command = [sys.executable, "-m", "moc_ckpt.persist.agent", "--dir", str(folder), "--job", job]
    command += ["--linger", repr(float(linger_s))]
    try:
        with agent_log_path(folder).open("ab") as log:
            # The shell ends at once, so the agent belongs to init.
            subprocess.run(
                ["/bin/sh", "-c", '"$@" &', "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                timeout=_WELCOME_S,
                check=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise StorageError(
            f"the agent cannot be started: {error}", where=str(folder), fix="check /bin/sh, Python and process limits"
        ) from error


def _ready(reads: Sequence[socket.socket], writes: Sequence[socket.socket], timeout_s: float) -> None:
    """Waits until one of the sockets can be read, or written; unlike `select` for any number of open files."""
    events: dict[socket.socket, int] = dict.fromkeys(reads, select.POLLIN)
    for sock in writes:
        events[sock] = events.get(sock, 0) | select.POLLOUT
    poll = select.poll()
    for sock, mask in events.items():
        poll.register(sock, mask)
    poll.poll(max(timeout_s, 0.0) * 1000)


@dataclass(slots=True)
class _Pending:
    request: Persist
    future: Future[Outcome]
    deadline: float
    sent: bool = False
    lost: int = 0  # agents that died with it
    persisted: Persisted | None = None


class AgentClient:
    """One trainer's connection to its node's agent. Thread-safe; owns one daemon thread, which does all I/O.

    A lost agent is replaced (by the client with `may_start`) and gets the requests that have no answer again; what it
    finds written already is not written again.

    Args:
        folder: the job's directory.
        hello: who this trainer is.
        may_start: start an agent where none lives; true on one rank of each node.
        linger_s: for an agent that this client starts.
        connect_s: seconds that `start` waits for an agent.
        margin_s: seconds after a save's `commit_s` at which its future fails, if nobody has answered.
    """

    def __init__(
        self,
        folder: Path,
        hello: Hello,
        *,
        may_start: bool,
        linger_s: float = 600.0,
        connect_s: float = 60.0,
        margin_s: float = ANSWER_MARGIN_S,
    ) -> None:
        self._folder = folder
        self._hello = hello
        self._may_start = may_start
        self._linger_s = linger_s
        self._connect_s = connect_s
        self._margin_s = margin_s
        self._mutex = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._events: deque[Event] = deque(maxlen=_MOST_EVENTS)
        self._cancels: list[int] = []
        self._next = 1
        self._welcome: Welcome | None = None
        self._met = threading.Event()
        self._closing = False
        self._trouble = ""
        self._started_at: float | None = None
        self._thread: threading.Thread | None = None
        self._bell, self._wake = socket.socketpair()
        for end in (self._bell, self._wake):
            end.setblocking(False)

    # ---- for the trainer ----

    @property
    def alive(self) -> bool:
        """Whether an agent is connected at the moment."""
        return self._welcome is not None

    @property
    def agent_pid(self) -> int | None:
        """Process id of the connected agent; None while there is none."""
        welcome = self._welcome
        return welcome.pid if welcome is not None else None

    def start(self) -> None:
        """Connects, starting an agent if need be; waits for at most `connect_s`. Not collective.

        Raises:
            StorageError: if there is no agent by then; the client goes on trying all the same until `close`.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moc-agent-client", daemon=True)
            self._thread.start()
        if not self._met.wait(self._connect_s):
            raise StorageError(
                f"no agent answered within {self._connect_s:g} s{self._why()}",
                where=str(self._folder),
                fix=self._advice(),
            )

    def submit(self, request: Persist) -> Future[Outcome]:
        """Hands a request over; returns at once, without any I/O.

        Args:
            request: the request; its `seq` and `again` are set here.

        Returns:
            Its outcome. A save that failed is an outcome as well; the future raises StorageError only if no agent
            answers within `commit_s` plus the margin, or the client is closed before.
        """
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        with self._mutex:
            if self._closing or self._thread is None:
                state = "closed" if self._closing else "not started"
                future.set_exception(
                    StorageError(f"the agent's client is {state}", where=str(self._folder), fix="report this")
                )
                return future
            seq, self._next = self._next, self._next + 1
            request = msgspec.structs.replace(request, seq=seq, again=False)
            deadline = time.monotonic() + request.commit_s + self._margin_s
            self._pending[seq] = _Pending(request, future, deadline)
        self._ring()
        return future

    def event(self, event: Event) -> None:
        """Sends a line for the event log. Never raises and never waits; lines may be lost while no agent lives."""
        with self._mutex:
            if self._closing:
                return
            self._events.append(event)
        self._ring()

    def close(self, deadline_s: float) -> bool:
        """Waits for the answers that are due, says goodbye and disconnects. Never raises.

        The agent goes on with what it was given; only nobody here hears of it: the futures fail.

        Args:
            deadline_s: seconds to wait for answers.

        Returns:
            Whether every request was answered.
        """
        end = time.monotonic() + deadline_s
        with self._mutex:
            waiting = [pending.future for pending in self._pending.values()]
        for future in waiting:
            with suppress(Exception):
                future.exception(timeout=max(end - time.monotonic(), 0.0))
        with self._mutex:
            self._closing = True
        self._ring()
        if self._thread is not None:
            self._thread.join(timeout=10.0)
        with self._mutex:
            pending, self._pending = list(self._pending.values()), {}
        for item in pending:
            item.future.set_exception(
                StorageError(
                    "nobody waits any longer for this save; the agent goes on with it",
                    where=str(self._folder),
                    fix="`moc-ckpt inspect` shows whether it was committed; raise timeouts.exit_s to wait longer",
                )
            )
        return not pending

    # ---- the thread ----

    def _ring(self) -> None:
        with suppress(OSError):
            self._wake.send(b"!")

    def _run(self) -> None:
        pause = _SHORTEST_PAUSE_S
        try:
            while not self._closing:
                wire = self._connect()
                if wire is not None:
                    begun = time.monotonic()
                    try:
                        self._talk(wire)
                    except Exception as error:  # a bug must not end the thread: requests would wait for nothing
                        _log.exception("talking to the agent failed")
                        self._trouble = f"{type(error).__name__}: {error}"
                    finally:
                        self._welcome = None
                        wire.close()
                    if time.monotonic() - begun > _STEADY_S:
                        pause = _SHORTEST_PAUSE_S
                self._expire()
                if not self._closing:
                    self._pause(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE_S)
        finally:
            self._bell.close()
            self._wake.close()

    def _pause(self, seconds: float) -> None:
        """Waits, but not after `close`; new requests do not cut it short."""
        end = time.monotonic() + seconds
        while not self._closing and (left := end - time.monotonic()) > 0:
            _ready([self._bell], [], left)
            self._hush()

    def _hush(self) -> None:
        with suppress(BlockingIOError):
            self._bell.recv(4096)

    def _connect(self) -> Wire | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_TICK_S)
            sock.connect(str(socket_path(self._folder)))
            if peer(sock)[1] != os.getuid():
                raise StorageError(f"the socket is served by user {peer(sock)[1]}", where=str(self._folder))
            return Wire(sock)
        except (OSError, MocError) as error:
            sock.close()
            self._trouble = getattr(error, "strerror", None) or str(error)
        try:
            self._start_one()
        except MocError as error:
            self._trouble = error.what
        return None

    def _start_one(self) -> None:
        """Starts an agent if that is this client's part, none holds the lock, and none was started just now."""
        now = time.monotonic()
        if not self._may_start or (self._started_at is not None and now - self._started_at < _START_AGAIN_S):
            return
        try:
            fd = os.open(agent_lock_path(self._folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError(f"the agent's lock cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # an agent lives: it is about to listen, or finishes its work first
        finally:
            os.close(fd)
        self._started_at = now
        start_agent(self._folder, self._hello.job, linger_s=self._linger_s)

    def _talk(self, wire: Wire) -> None:
        """Serves one connection until it ends."""
        wire.send(self._hello)
        welcome_by = time.monotonic() + _WELCOME_S
        while True:
            writable = [wire.sock] if wire.unsent else []
            _ready([wire.sock, self._bell], writable, _TICK_S)
            self._hush()
            try:
                wire.flush()
                for body in wire.receive():
                    self._hear(decode_to_client(body))
                if self._welcome is not None:
                    self._say(wire)
            except MessageError as error:
                self._trouble = str(error)
                _log.error("the agent's messages make no sense, it is left: %s", error)
                break
            self._expire()
            if self._closing and self._welcome is not None:
                self._leave(wire)
                break
            if self._closing or wire.ended:
                break
            if self._welcome is None and time.monotonic() > welcome_by:
                self._trouble = "the agent does not answer"
                break
        if self._welcome is not None and not self._closing:
            _log.warning("the agent (process %d) is gone", self.agent_pid)
            self._trouble = "the agent is gone"
        self._recall()

    def _recall(self) -> None:
        """Has the requests without an answer sent again, but not those that seem to kill every agent."""
        with self._mutex:
            for pending in self._pending.values():
                if pending.sent:
                    pending.sent, pending.lost = False, pending.lost + 1
                    pending.request = msgspec.structs.replace(pending.request, again=True)
            fatal = [seq for seq, pending in self._pending.items() if pending.lost >= _MOST_LOST]
            items = [self._pending.pop(seq) for seq in fatal]
        for item in items:
            item.future.set_exception(
                StorageError(
                    f"{item.lost} agents ended, one after the other, while they had the save {item.request.part.tag}",
                    where=f"{item.request.url}, rank {item.request.part.rank}",
                    fix=self._advice(),
                )
            )

    def _hear(self, message: object) -> None:
        if isinstance(message, Welcome):
            self._welcome = message
            self._trouble = ""
            self._started_at = None
            self._met.set()
        elif isinstance(message, Refused):
            self._trouble = f"the agent refuses: {message.reason}"
        elif isinstance(message, Persisted):
            with self._mutex:
                pending = self._pending.get(message.seq)
                if pending is not None:
                    pending.persisted = message
        elif isinstance(message, Outcome):
            with self._mutex:
                pending = self._pending.pop(message.seq, None)
            if pending is not None:
                pending.future.set_result(message)

    def _say(self, wire: Wire) -> None:
        """Sends what is due: requests first, then lines of the log."""
        messages: list[ToAgent] = []
        with self._mutex:
            for pending in self._pending.values():
                if not pending.sent:
                    pending.sent = True
                    messages.append(pending.request)
            messages += [Cancel(seq) for seq in self._cancels]
            self._cancels.clear()
            messages += self._events
            self._events.clear()
        for message in messages:
            try:
                wire.send(message)
            except (MessageError, TypeError, ValueError, OverflowError) as error:
                self._cannot_send(message, error)

    def _cannot_send(self, message: ToAgent, error: Exception) -> None:
        if isinstance(message, Persist):
            with self._mutex:
                pending = self._pending.pop(message.seq, None)
            if pending is not None:
                pending.future.set_exception(
                    StorageError(f"the request cannot be sent: {error}", where=message.url, fix="report this")
                )
        else:
            _log.warning("a %s was not sent to the agent: %s", type(message).__name__, error)

    def _expire(self) -> None:
        """Fails the requests whose deadline has passed."""
        now = time.monotonic()
        with self._mutex:
            late = [seq for seq, pending in self._pending.items() if pending.deadline <= now]
            items = [self._pending.pop(seq) for seq in late]
            self._cancels += late
        for item in items:
            part = item.request.part
            where = "its part is written" if item.persisted is not None else "its part is not written"
            item.future.set_exception(
                StorageError(
                    f"nobody said within {item.request.commit_s + self._margin_s:,.0f} s how the save {part.tag} ended "
                    f"({where}){self._why()}",
                    where=f"{item.request.url}, rank {part.rank}",
                    fix=self._advice(),
                )
            )

    def _leave(self, wire: Wire) -> None:
        """Says goodbye, for at most a second."""
        with suppress(MessageError):
            self._say(wire)
            wire.send(Goodbye())
        end = time.monotonic() + 1.0
        while wire.unsent and not wire.ended and time.monotonic() < end:
            _ready([], [wire.sock], 0.1)
            wire.flush()

    def _why(self) -> str:
        return f": {self._trouble}" if self._trouble else ""

    def _advice(self) -> str:
        """Says what to do, with the end of the agent's log."""
        log = agent_log_path(self._folder)
        tail = ""
        with suppress(OSError):
            tail = log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
        last = f"; its last lines: {' | '.join(tail.splitlines()[-3:])}" if tail else ""
        return f"look at `moc-ckpt agent status` and at {log}{last}"
