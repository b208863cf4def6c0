"""The agent's front: connections, who lives, when to end (DESIGN section 9). One thread owns all sockets. No torch."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moc_ckpt._version import __version__
from moc_ckpt.errors import MocError
from moc_ckpt.events import EventKind
from moc_ckpt.persist import process
from moc_ckpt.persist.agent_work import Work
from moc_ckpt.persist.protocol import (
    MAX_MESSAGE,
    PROTOCOL,
    Cancel,
    Event,
    Goodbye,
    Hello,
    MessageError,
    OtherProtocol,
    Persist,
    RankStatus,
    Refused,
    Status,
    StatusRequest,
    Stop,
    Stopping,
    ToClient,
    Welcome,
    Wire,
    decode_to_agent,
    peer,
)
from moc_ckpt.snapshot.arena import Arena, writer_pid

__all__ = ["AgentServer", "on_signals"]

_TICK_S = 0.5
_HANDSHAKE_S = 30.0
_HANDSHAKE_BYTES = 64 << 10
_MOST_STRANGERS = 64
_COMMIT_WAIT_S = 20.0
_ABORT_WAIT_S = 1.0
_FIRST_TRAINER_S = 60.0
_STEPS_KEPT = 64

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Trainer:
    """One rank's process; it may lose its connection and come back."""

    hello: Hello
    pid: int
    started: int | None
    line: _Line | None = None
    left: bool = False
    steps: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_STEPS_KEPT))

    @property
    def who(self) -> tuple[str, int]:
        return self.hello.run, self.hello.rank

    def alive(self) -> bool:
        """Whether the process lives; a later one with its number does not count."""
        started = process.start_ticks(self.pid)
        return started is not None and started == self.started


@dataclass(eq=False, slots=True)
class _Line:
    """One connection."""

    wire: Wire
    pid: int
    since: float
    trainer: _Trainer | None = None
    closing: bool = False
    watched: int = selectors.EVENT_READ


class AgentServer:
    """Serves the trainers of one job on this node until they are gone, or until it is told to stop.

    Args:
        folder: the job's directory.
        listener: the bound socket; the server owns it, and removes its path at the end.
        job: the job key.
        node: this node's name.
        linger_s: seconds to live on without trainers and work.
        grace_s: see `committer.await_commit`.
        uid: user whose processes are served.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        listener: socket.socket,
        *,
        job: str,
        node: str,
        linger_s: float,
        grace_s: float,
        uid: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._listener: socket.socket | None = listener
        self._path = str(listener.getsockname())
        self._job = job
        self._node = node
        self._linger_s = linger_s
        self._uid = os.getuid() if uid is None else uid
        self._clock = clock
        self._begun = clock()
        self._idle_since = clock()
        self._lines: set[_Line] = set()
        self._trainers: dict[tuple[str, int], _Trainer] = {}
        self._outbox: deque[tuple[_Trainer, ToClient]] = deque()
        self._stopping = ""
        self._now = False
        self._abort = False
        self._met = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._wake = socket.socketpair()
        for end in (self._bell, self._wake):
            end.setblocking(False)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self.work = Work(folder, node, grace_s=grace_s, changed=self._ring)

    # ---- the loop ----

    def run(self) -> None:
        """Serves until it is time to end; then finishes the running writes and returns."""
        try:
            while not self._is_over():
                for key, events in self._selector.select(_TICK_S):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._bell:
                        with suppress(BlockingIOError):
                            self._bell.recv(4096)
                    else:
                        self._serve(key.data, events)
                self._deliver()
                self._look_after()
        finally:
            self._stop_listening()
            self.work.close(_ABORT_WAIT_S if self._abort else _COMMIT_WAIT_S, abort=self._abort)
            self._deliver()
            for line in list(self._lines):
                self._drop(line)
            self._selector.close()
            self._bell.close()
            self._wake.close()

    def stop(self, reason: str, *, now: bool = False, abort: bool = False) -> None:
        """Ends the agent. Safe in a signal handler.

        Args:
            reason: why.
            now: after the writes that are running, else once all work is done.
            abort: do not even finish those.
        """
        self._stopping = self._stopping or reason
        self._now = self._now or now
        self._abort = self._abort or abort
        self._ring()

    def _ring(self) -> None:
        with suppress(OSError):
            self._wake.send(b"!")

    def _is_over(self) -> bool:
        if self._now:
            _log.info("ending now: %s", self._stopping)
            return True
        if self.work.unfinished():
            return False
        if self._stopping:
            _log.info("ending: %s", self._stopping)
            return True
        if self._trainers:  # with `linger_s` 0 no time has to pass
            return False
        if self._clock() - self._idle_since < max(self._linger_s, 0.0 if self._met else _FIRST_TRAINER_S):
            return False
        _log.info("ending: no trainer for %.0f s", self._linger_s)
        self._remove_arenas()
        return True

    def _look_after(self) -> None:
        """Notices who is gone; runs at least every `_TICK_S`."""
        for trainer in list(self._trainers.values()):
            if trainer.line is not None or (not trainer.left and trainer.alive()):
                continue
            if self.work.unfinished(trainer.who):
                continue
            self.work.forget(trainer.who)
            del self._trainers[trainer.who]
            if not trainer.left:
                _log.warning("rank %d (process %d) died", trainer.hello.rank, trainer.pid)
                if trainer.pid > 0:  # else it is in a pid namespace that cannot be seen: it may live
                    self._tidy(trainer.hello.arena)
        if self._trainers or self.work.unfinished():
            self._idle_since = self._clock()
        late = self._clock() - _HANDSHAKE_S
        for line in [line for line in self._lines if line.trainer is None and line.since < late]:
            _log.warning("process %d connected and said nothing", line.pid)
            self._drop(line)

    # ---- connections ----

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log.warning("a connection was not taken: %s", error)
            return
        pid, uid = peer(sock)
        strangers = sum(line.trainer is None for line in self._lines)
        if uid != self._uid or strangers >= _MOST_STRANGERS:
            why = f"it is of user {uid}" if uid != self._uid else "too many have connected without a word"
            _log.warning("process %d is refused: %s", pid, why)
            sock.close()
            return
        line = _Line(Wire(sock, _HANDSHAKE_BYTES), pid, self._clock())
        self._lines.add(line)
        self._selector.register(sock, selectors.EVENT_READ, line)

    def _serve(self, line: _Line, events: int) -> None:
        if line not in self._lines:
            return
        try:
            if events & selectors.EVENT_WRITE:
                line.wire.flush()
            if events & selectors.EVENT_READ:
                for body in line.wire.receive():
                    self._handle(line, decode_to_agent(body))
        except MessageError as error:
            _log.warning("process %d is refused: %s", line.pid, error)
            line.wire.ended = True
        except Exception:
            _log.exception("serving process %d failed", line.pid)
            line.wire.ended = True
        self._settle(line)

    def _settle(self, line: _Line) -> None:
        """Closes a connection that is over, else waits for room where something is left to send."""
        if line not in self._lines:
            return
        if line.wire.ended or (line.closing and not line.wire.unsent):
            self._drop(line)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.wire.unsent else 0)
        if wanted != line.watched:
            line.watched = wanted
            self._selector.modify(line.wire.sock, wanted, line)

    def _drop(self, line: _Line) -> None:
        self._lines.discard(line)
        with suppress(KeyError, ValueError):
            self._selector.unregister(line.wire.sock)
        line.wire.close()
        trainer = line.trainer
        if trainer is not None and trainer.line is line:
            trainer.line = None
            if not trainer.left:
                _log.warning("rank %d (process %d) is not connected any more", trainer.hello.rank, trainer.pid)

    def _deliver(self) -> None:
        while self._outbox:
            trainer, message = self._outbox.popleft()
            if trainer.line is not None:
                self._send(trainer.line, message)

    def _send(self, line: _Line, message: ToClient) -> None:
        try:
            line.wire.send(message)
        except MessageError as error:
            _log.warning("process %d is dropped: %s", line.pid, error)
            line.wire.ended = True
        self._settle(line)

    # ---- messages ----

    def _handle(self, line: _Line, message: object) -> None:
        trainer = line.trainer
        if isinstance(message, StatusRequest):
            self._send(line, self._status())
        elif isinstance(message, Stop):
            _log.info("process %d asks to stop: %s", line.pid, message.reason)
            self._send(line, Stopping(os.getpid(), self.work.unfinished()))
            self.stop(message.reason or "asked to", now=message.now, abort=message.now)
        elif isinstance(message, Hello):
            self._hello(line, message)
        elif isinstance(message, OtherProtocol):
            self._refuse_version(line, message.protocol, message.version)
        elif trainer is None:
            raise MessageError(f"a {type(message).__name__} before any Hello")
        elif isinstance(message, Persist):
            self._persist(trainer, message)
        elif isinstance(message, Cancel):
            self.work.cancel(trainer.who, message.seq)
        elif isinstance(message, Event):
            if message.step is not None and message.event == EventKind.SNAPSHOTTED.value:
                trainer.steps.append((message.step, time.time()))
            self.work.event(message)
        elif isinstance(message, Goodbye):
            trainer.left = True
            line.closing = True

    def _hello(self, line: _Line, hello: Hello) -> None:
        if line.trainer is not None:
            raise MessageError("a second Hello")
        if hello.version != __version__:
            self._refuse_version(line, hello.protocol, hello.version)
            return
        problem = ""
        if self._stopping:
            problem = f"the agent is ending: {self._stopping}"
        elif hello.job != self._job:
            problem = f"this is the agent of job {self._job}, not of {hello.job}"
        elif hello.arena and Path(hello.arena).parent != self._folder:
            problem = f"the arena {hello.arena} is not in {self._folder}"
        if problem:
            self._refuse(line, problem)
            return
        trainer = self._trainers.get((hello.run, hello.rank))
        if trainer is not None and trainer.line is not None:
            old, trainer.line = trainer.line, None
            self._drop(old)
        if trainer is None or trainer.pid != line.pid:
            # The number that the kernel gives; 0 for a process of a pid namespace that cannot be seen.
            trainer = self._trainers[hello.run, hello.rank] = _Trainer(hello, line.pid, process.start_ticks(line.pid))
        trainer.hello, trainer.line, trainer.left = hello, line, False
        line.trainer = trainer
        self._met = True
        line.wire.limit = MAX_MESSAGE
        _log.info("rank %d of %d (process %d) is here", hello.rank, hello.world, line.pid)
        self._send(line, Welcome(os.getpid(), self._node))

    def _refuse(self, line: _Line, reason: str) -> None:
        _log.warning("process %d is refused: %s", line.pid, reason)
        line.closing = True
        self._send(line, Refused(reason))

    def _refuse_version(self, line: _Line, protocol: int, version: str) -> None:
        """Refuses a trainer of another version, and makes room for its agent unless someone is served here."""
        mine = f"this agent is of version {__version__} (protocol {PROTOCOL})"
        others = [trainer for trainer in self._trainers.values() if trainer.line is not None]
        if others:
            self._refuse(line, f"{mine} and serves {len(others)} trainers; version {version} waits until they are gone")
            return
        self._refuse(line, f"{mine}; it makes room for version {version} (protocol {protocol})")
        self.stop(f"a trainer of version {version} wants an agent of its own")

    def _persist(self, trainer: _Trainer, request: Persist) -> None:
        def reply(message: ToClient) -> None:
            self._outbox.append((trainer, message))
            self._ring()

        if self._stopping and not self.work.knows(request):
            # Not answered: the trainer sends it to the next agent. What other ranks here wait for is finished.
            _log.info("%s of rank %d is left to the next agent", request.part.tag, request.part.rank)
            return
        self.work.submit(trainer.who, request, reply)

    # ---- arenas ----

    def _tidy(self, arena: str) -> None:
        """Drops the half-filled slots and the pins of a trainer that is dead, and whose saves have ended."""
        if not arena or not Path(arena).exists():
            return
        try:
            with Arena.open(Path(arena), writable=True) as opened:  # refused while anybody writes it
                filling, pins = opened.table.drop_filling(), opened.table.drop_pins()
            _log.info("%s: %d half-filled slots and %d pins dropped", arena, filling, pins)
        except (MocError, OSError, ValueError) as error:
            _log.warning("%s: its half-filled slots were not dropped: %s", arena, error)

    def _remove_arenas(self) -> None:
        """Gives back the memory of trainers that have been gone for the whole linger time."""
        for path in sorted(self._folder.glob("*.arena")):
            try:
                if writer_pid(path) is None:
                    nbytes = path.stat().st_size
                    path.unlink(missing_ok=True)
                    _log.info("%s removed (%d bytes)", path, nbytes)
            except (MocError, OSError) as error:
                _log.warning("%s was left alone: %s", path, error)

    # ---- the rest ----

    def _stop_listening(self) -> None:
        if self._listener is not None:
            # First the name, so that nobody connects to a socket that is never served.
            with suppress(OSError):
                Path(self._path).unlink(missing_ok=True)
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _status(self) -> Status:
        rss, fds = process.memory_and_descriptors()
        busy = bool(self._trainers) or self.work.unfinished() > 0
        ranks = []
        for trainer in sorted(self._trainers.values(), key=lambda item: (item.hello.rank, item.hello.run)):
            hello, counts = trainer.hello, self.work.counts(trainer.who)
            ranks.append(
                RankStatus(
                    run=hello.run,
                    rank=hello.rank,
                    local_rank=hello.local_rank,
                    world=hello.world,
                    pid=trainer.pid,
                    alive=trainer.line is not None or trainer.alive(),
                    connected=trainer.line is not None,
                    arena=hello.arena,
                    queued=counts.queued,
                    writing=counts.writing,
                    committing=counts.committing,
                    done=counts.done,
                    failed=counts.failed,
                    bytes=counts.nbytes,
                    seconds=counts.seconds,
                    error=counts.error,
                    steps=list(trainer.steps),
                )
            )
        return Status(
            pid=os.getpid(),
            node=self._node,
            job=self._job,
            version=__version__,
            uptime_s=self._clock() - self._begun,
            linger_s=self._linger_s,
            idle_s=None if busy else self._clock() - self._idle_since,
            stopping=self._stopping,
            rss=rss,
            fds=fds,
            ranks=ranks,
        )


def on_signals(server: AgentServer) -> None:
    """Lets SIGTERM and SIGINT end the agent after the running writes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: server.stop(signal.Signals(got).name, now=True))
