"""What trainers and the node's agent say to each other: checked msgpack messages over a Unix socket (DESIGN section 9).

A message is four bytes of length (big endian) and that many bytes of msgpack. Nothing is ever unpickled; bytes that are
no known message, or too many of them, end the connection.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from typing import Any

import msgspec

from moc_ckpt.storage.manifest import Part

__all__ = [
    "MAX_MESSAGE",
    "PROTOCOL",
    "Cancel",
    "Event",
    "ExtraJob",
    "Goodbye",
    "Hello",
    "MessageError",
    "OtherProtocol",
    "Outcome",
    "PackJob",
    "Persist",
    "Persisted",
    "RankStatus",
    "Refused",
    "Retention",
    "Status",
    "StatusRequest",
    "Stop",
    "Stopping",
    "ToAgent",
    "ToClient",
    "Welcome",
    "Wire",
    "decode_to_agent",
    "decode_to_client",
    "encode",
    "peer",
]

PROTOCOL = 1
"""Version of these messages."""
MAX_MESSAGE = 256 << 20
"""Bytes of the largest message; the part of a rank with a million fragments has about 40 MiB."""
_LENGTH = struct.Struct(">I")
_READ = 1 << 20
_READS_AT_ONCE = 16
_MAX_UNSENT = 64 << 20
_UCRED = struct.Struct("3i")


class MessageError(ValueError):
    """The other end sent what is no message; the connection is of no use any more."""


# ---- trainer (or command line) -> agent ----


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A trainer introduces itself; the first message of its connection.

    Run and rank together name it: a second connection of the same name takes the place of the first.

    Attributes:
        protocol: `PROTOCOL` of the sender.
        version: version of the package.
        job: the job key.
        run: id of the run, unique per start of the trainers.
        rank: rank in the world.
        local_rank: rank on the node.
        world: number of ranks.
        pid: process id of the trainer, as it sees itself.
        arena: path of its arena; may be empty while it has none.
    """

    protocol: int
    version: str
    job: str
    run: str
    rank: int
    local_rank: int
    world: int
    pid: int
    arena: str


class PackJob(msgspec.Struct, frozen=True):
    """One pack to write.

    Attributes:
        key: the pack's directory below the checkpoint root, as in the part.
        nbytes: bytes of the pack.
        spans: (offset in the pack, offset in the arena file, bytes), by offset; gaps are zeros.
    """

    key: str
    nbytes: int
    spans: list[tuple[int, int, int]]


class ExtraJob(msgspec.Struct, frozen=True):
    """One small file beside the packs: its name, and where its bytes are in the arena file."""

    name: str
    offset: int
    nbytes: int


class Retention(msgspec.Struct, frozen=True):
    """Which checkpoints stay after the commit; see `storage.retention`."""

    keep_last: int
    keep_every: int = 0


class Persist(msgspec.Struct, frozen=True, kw_only=True, tag="persist"):
    """Write this rank's share of a save, and see to the commit.

    Attributes:
        seq: number of the request; `AgentClient.submit` sets it.
        url: the checkpoint root.
        part: the part to publish; checksums and stored sizes are filled in by the writer.
        packs: the packs, in the order of the part's.
        extras: the files beside them.
        arena: path of the file that the bytes are in.
        threads: threads that checksum and write.
        commit_s: seconds within which all ranks must have written their parts.
        retention: which checkpoints stay after the commit; None: all. Rank 0's counts.
        run_prefix: save ids of this run begin with it: those not known finished are in flight, and retention leaves
            them alone.
        again: the request was sent before, possibly to an agent that is gone; `AgentClient` sets it.
    """

    seq: int = 0
    url: str
    part: Part
    packs: list[PackJob]
    extras: list[ExtraJob]
    arena: str
    threads: int
    commit_s: float
    retention: Retention | None
    run_prefix: str
    again: bool = False


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The trainer no longer waits for a request: its arena must not be read for it any more."""

    seq: int


class Event(msgspec.Struct, frozen=True, tag="event"):
    """One line for the event log of the directory `url`; see `events.EventLog.write`."""

    url: str
    event: str
    attempt: int | None = None
    step: int | None = None
    tag: str | None = None
    fields: dict[str, Any] = {}


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The trainer ends on purpose: it does not come back."""


class StatusRequest(msgspec.Struct, frozen=True, tag="status_request"):
    """Asks for `Status`; no `Hello` needed."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Asks the agent to end once its work is done, or (`now`) after the writes that are running; no `Hello` needed."""

    reason: str
    now: bool = False


ToAgent = Hello | Persist | Cancel | Event | Goodbye | StatusRequest | Stop


# ---- agent -> trainer (or command line) ----


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The trainer is known now. `pid` and `node` are the agent's."""

    pid: int
    node: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The trainer is not served; the connection ends."""

    reason: str


class Persisted(msgspec.Struct, frozen=True, tag="persisted"):
    """This rank's part is durable.

    Attributes:
        seq: the request.
        nbytes: bytes of the packs and extra files that were written; 0 if they were there already.
        seconds: how long the writing took.
        cpu_seconds: CPU time that the agent spent meanwhile (also on another rank's part, if one was being written).
    """

    seq: int
    nbytes: int
    seconds: float
    cpu_seconds: float


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """How a save ended. The agent does not read the arena for it any more.

    Attributes:
        seq: the request.
        committed: whether the checkpoint exists now.
        what: what went wrong; empty if nothing did.
        where: where.
        fix: what to do about it.
        stored_bytes: bytes that the save added to the storage; 0 if it failed.
        seconds: from the request's arrival to now.
    """

    seq: int
    committed: bool
    what: str = ""
    where: str = ""
    fix: str = ""
    stored_bytes: int = 0
    seconds: float = 0.0


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows of one rank's trainer.

    Attributes:
        run: id of the run.
        rank: rank in the world.
        local_rank: rank on the node.
        world: number of ranks.
        pid: process id of the trainer.
        alive: whether the process lives.
        connected: whether it is connected.
        arena: path of its arena.
        queued: requests that wait for a writer.
        writing: requests being written.
        committing: requests that are written and wait for the commit.
        done: saves that were committed.
        failed: saves that failed.
        bytes: bytes of the last part that was written.
        seconds: how long that took.
        error: what the last failure was; empty if there was none.
        steps: (step, seconds since 1970) of the newest snapshots that the trainer reported, the oldest first.
    """

    run: str
    rank: int
    local_rank: int
    world: int
    pid: int
    alive: bool
    connected: bool
    arena: str
    queued: int
    writing: int
    committing: int
    done: int
    failed: int
    bytes: int
    seconds: float
    error: str
    steps: list[tuple[int, float]]


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """What an agent is doing.

    Attributes:
        pid: its process id.
        node: the node.
        job: the job key.
        version: version of the package.
        uptime_s: seconds since its start.
        linger_s: seconds that it lives on without trainers and work.
        idle_s: seconds that it has been without both; None while it is not.
        stopping: why it takes no new trainers; empty if it does.
        rss: resident memory in bytes, mapped arenas included.
        fds: open file descriptors.
        ranks: the ranks, in order.
    """

    pid: int
    node: str
    job: str
    version: str
    uptime_s: float
    linger_s: float
    idle_s: float | None
    stopping: str
    rss: int
    fds: int
    ranks: list[RankStatus]


class Stopping(msgspec.Struct, frozen=True, tag="stopping"):
    """Answer to `Stop`: process id of the agent and the number of saves that it finishes first."""

    pid: int
    unfinished: int


ToClient = Welcome | Refused | Persisted | Outcome | Status | Stopping


class OtherProtocol(msgspec.Struct, frozen=True):
    """A `Hello` in another version of these messages."""

    protocol: int
    version: str


class _Head(msgspec.Struct, frozen=True):
    type: str
    protocol: int = 0
    version: str = ""


_encoder = msgspec.msgpack.Encoder()
_to_agent = msgspec.msgpack.Decoder(ToAgent)
_to_client = msgspec.msgpack.Decoder(ToClient)
_head = msgspec.msgpack.Decoder(_Head)


def encode(message: ToAgent | ToClient) -> bytes:
    """Returns the bytes of a message, length included.

    Raises:
        MessageError: if it is larger than `MAX_MESSAGE`.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise MessageError(f"a message of {len(body):,} bytes; at most {MAX_MESSAGE:,} are sent")
    return _LENGTH.pack(len(body)) + body


def decode_to_agent(body: bytes | bytearray | memoryview) -> ToAgent | OtherProtocol:
    """Reads a message to an agent. A `Hello` of another protocol version need not have our fields.

    Raises:
        MessageError: if it is none.
    """
    try:
        message = _to_agent.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        try:
            head = _head.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise MessageError(f"not a message: {error}") from None
        if head.type == "hello" and head.protocol != PROTOCOL:
            return OtherProtocol(head.protocol, head.version)
        raise MessageError(f"not a message: {error}") from None
    if isinstance(message, Hello) and message.protocol != PROTOCOL:
        return OtherProtocol(message.protocol, message.version)
    return message


def decode_to_client(body: bytes | bytearray | memoryview) -> ToClient:
    """Reads a message from an agent.

    Raises:
        MessageError: if it is none.
    """
    try:
        return _to_client.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"not a message: {error}") from None


def peer(sock: socket.socket) -> tuple[int, int]:
    """Returns (pid, uid) of the process at the other end of a Unix socket, as the kernel knows them."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


class Wire:
    """Frames and unframes messages on a non-blocking stream socket. Not thread-safe.

    Args:
        sock: the connected socket; the wire owns it.
        limit: bytes of the largest message that is taken; may be changed at any time.
    """

    def __init__(self, sock: socket.socket, limit: int = MAX_MESSAGE) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.limit = limit
        self.ended = False
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._unsent = 0

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self.sock.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._unsent

    def receive(self) -> list[bytes]:
        """Returns the bodies of the messages that have arrived whole, without waiting.

        At the end of the stream `ended` is set; a message that was cut off is dropped.

        Raises:
            MessageError: if a message is longer than `limit`.
        """
        for _ in range(_READS_AT_ONCE):
            try:
                data = self.sock.recv(_READ)
            except BlockingIOError:
                break
            except OSError:
                self.ended = True
                break
            if not data:
                self.ended = True
                break
            self._incoming += data
        bodies = []
        start = 0
        while len(self._incoming) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            if length > self.limit:
                raise MessageError(f"a message of {length:,} bytes; at most {self.limit:,} are taken")
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            bodies.append(bytes(self._incoming[start + _LENGTH.size : end]))
            start = end
        if start:
            del self._incoming[:start]
        return bodies

    def send(self, message: ToAgent | ToClient) -> None:
        """Queues a message and sends what the socket takes at once.

        Raises:
            MessageError: if the message is too large, or the other end has not read for too long.
        """
        data = encode(message)
        if self._unsent > _MAX_UNSENT:
            raise MessageError(f"the other end leaves {self._unsent:,} bytes unread")
        self._outgoing.append(memoryview(data))
        self._unsent += len(data)
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes, without waiting. A broken connection sets `ended`."""
        while self._outgoing:
            head = self._outgoing[0]
            try:
                count = self.sock.send(head)
            except BlockingIOError:
                return
            except OSError:
                self.ended = True
                self._outgoing.clear()
                self._unsent = 0
                return
            self._unsent -= count
            if count == len(head):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = head[count:]

    def close(self) -> None:
        """Closes the socket; unsent messages are lost."""
        self.sock.close()
