"""What an agent says and what arenas hold, read from outside; disturbs neither. No torch."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.persist.protocol import (
    MAX_MESSAGE,
    MessageError,
    StatusRequest,
    Stop,
    ToClient,
    decode_to_client,
    encode,
    peer,
)
from moc_ckpt.snapshot.arena import Arena, writer_pid
from moc_ckpt.snapshot.places import agent_log_path, parse_arena_path, socket_path
from moc_ckpt.snapshot.slots import SlotState
from moc_ckpt.state.unit import parse_expert_unit

__all__ = ["Holdings", "ask_agent", "read_holdings"]

_ANSWER_S = 10.0
_DENSE, _EXTRA = "dense", "extra"
_WHOLE = (SlotState.FILLED, SlotState.PERSISTING, SlotState.COMMITTED)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank's arena holds.

    Attributes:
        path: the file.
        run: id of the run that made it.
        rank: its rank.
        pid: the process that writes it, else the one that made it.
        alive: whether a process writes it.
        nbytes: bytes that are reserved.
        states: number of slots by state; those that are free too.
        dense: steps of the dense states that are whole, the newest first.
        experts: number of experts that have a whole version.
        versions: number of their versions.
        oldest: step of the expert whose newest version is the oldest; None if there is none.
        newest: step of the newest expert; likewise.
        error: why it cannot be read; the rest is empty then.
        restorable: those of `dense` that have the small state that belongs to them.
    """

    path: Path
    run: str
    rank: int
    pid: int
    alive: bool
    nbytes: int = 0
    states: dict[str, int] | None = None
    dense: tuple[int, ...] = ()
    experts: int = 0
    versions: int = 0
    oldest: int | None = None
    newest: int | None = None
    error: str = ""
    restorable: tuple[int, ...] = ()


def read_holdings(path: Path) -> Holdings:
    """Reads what an arena holds, without disturbing its trainer. Never raises for what is wrong with the file."""
    run, rank = parse_arena_path(path) or (path.stem, -1)
    try:
        writer = writer_pid(path)
        with Arena.open(path) as arena:
            slots = arena.table.live()
            total, nbytes, maker = arena.spec.slots, arena.spec.reserved, arena.identity.pid
    except MocError as error:
        return Holdings(path, run, rank, 0, False, error=error.what)
    whole = [slot for slot in slots if slot.state in _WHOLE]
    states = {state.name: sum(slot.state == state for slot in slots) for state in SlotState}
    states["FREE"] = total - len(slots)
    newest: dict[str, int] = {}
    experts = [slot for slot in whole if parse_expert_unit(slot.unit) is not None]
    for slot in experts:
        newest[slot.unit] = max(slot.step, newest.get(slot.unit, slot.step))
    # The small state is written last: without it nothing can be restored at that step.
    complete = {slot.step for slot in whole if slot.unit == _EXTRA}
    dense = sorted({slot.step for slot in whole if slot.unit == _DENSE}, reverse=True)
    return Holdings(
        path,
        run,
        rank,
        writer or maker,
        writer is not None,
        nbytes,
        states,
        tuple(dense),
        len(newest),
        len(experts),
        min(newest.values(), default=None),
        max(newest.values(), default=None),
        restorable=tuple(step for step in dense if step in complete),
    )


def ask_agent(folder: Path, message: StatusRequest | Stop) -> ToClient:
    """Asks an agent and returns its answer.

    Raises:
        StorageError: if no agent answers.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER_S)
            sock.connect(str(socket_path(folder)))
            if peer(sock)[1] != os.getuid():
                raise StorageError("the agent is another user's", where=str(folder), fix="look who made the directory")
            sock.sendall(encode(message))
            (length,) = struct.unpack(">I", _take(sock, 4))
            if length > MAX_MESSAGE:
                raise MessageError(f"an answer of {length:,} bytes")
            return decode_to_client(_take(sock, length))
    except (FileNotFoundError, ConnectionRefusedError):
        raise StorageError("no agent lives here", where=str(folder), fix="a run starts one when it needs it") from None
    except (OSError, MessageError) as error:
        raise StorageError(
            f"the agent does not answer: {error}", where=str(folder), fix=f"look at {agent_log_path(folder)}"
        ) from error


def _take(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(min(count - len(data), 1 << 20))
        if not more:
            raise MessageError("it hung up")
        data += more
    return data
