"""The event log: one JSON-lines file per node below the checkpoint root (DESIGN sections 2 and 9). No torch."""

from __future__ import annotations

import logging
import re
import threading
import time
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from moc_ckpt.snapshot.places import node_name
from moc_ckpt.storage.checkpoint import EVENTS
from moc_ckpt.storage.store import Store

__all__ = ["Event", "EventKind", "EventLog", "event_key", "read_events"]

_log = logging.getLogger(__name__)

_SUFFIX = ".jsonl"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_NAME = 128
_COLUMNS = frozenset({"time", "event", "attempt", "step", "tag"})


class EventKind(str, Enum):
    """What happened to a snapshot, a save or a run."""

    SNAPSHOTTED = "SNAPSHOTTED"
    """State was copied from the device to host memory."""
    PERSISTED = "PERSISTED"
    """A rank's or node's part of a save is durable in storage."""
    COMMITTED = "COMMITTED"
    """A checkpoint became visible."""
    SKIPPED = "SKIPPED"
    """A snapshot or save did not begin, on purpose."""
    FAILED = "FAILED"
    """A snapshot or save did not end well."""
    RECOVERED = "RECOVERED"
    """A run was restored."""
    REBALANCE_PLANNED = "REBALANCE_PLANNED"
    """Experts with replicas should be placed otherwise at the next start, or no longer should."""


class Event(msgspec.Struct, frozen=True):
    """One line of a log.

    Attributes:
        time: seconds since 1970, by the clock of the node.
        event: an `EventKind` value; other text if a newer version wrote the line.
        attempt: the attempt that was running; None if it does not matter.
        step: engine.global_steps; None if it does not matter.
        tag: the checkpoint; None if there is none.
        node: the node whose log the line is from.
        fields: everything else, e.g. `bytes`, `seconds`, `plt`, `k`, `reason`.
    """

    time: float
    event: str
    attempt: int | None = None
    step: int | None = None
    tag: str | None = None
    node: str = ""
    fields: dict[str, Any] = {}


def event_key(node: str) -> str:
    """Returns the key of a node's log; what cannot be in a file name becomes `_`."""
    name = _NOT_IN_NAMES.sub("_", node).lstrip(".")[:_MAX_NAME]
    return f"{EVENTS}/{name or 'node'}{_SUFFIX}"


class EventLog:
    """Adds events to the log of this node.

    Thread-safe. On a file system several processes of the node may write at once; in an object store one process per
    node should (see `Store.append`).

    Args:
        store: the checkpoint root.
        node: name of the node; None for that of this one (`places.node_name`).
    """

    def __init__(self, store: Store, node: str | None = None) -> None:
        self._store = store
        self.node = node or node_name()
        self.key = event_key(self.node)
        self._lock = threading.Lock()
        self._torn: bool | None = None  # whether the file may end within a line; None: not known yet
        self._warned = False

    def write(
        self,
        event: EventKind | str,
        /,
        *,
        attempt: int | None = None,
        step: int | None = None,
        tag: str | None = None,
        **fields: Any,
    ) -> None:
        """Adds one event, with the time of the call.

        When it returns the line outlives this process; a machine that goes down may lose the last lines. Never
        raises: training goes on without a log, and the first failure is a warning.

        Args:
            event: what happened.
            attempt: the attempt that is running.
            step: engine.global_steps.
            tag: the checkpoint concerned.
            **fields: anything else that JSON can hold (numpy scalars and arrays too; other objects become their
                text); not `time` or `event`.
        """
        try:
            if clash := _COLUMNS & fields.keys():
                raise ValueError(f"{', '.join(sorted(clash))} cannot be names of fields")
            own = {
                "time": time.time(),
                "event": EventKind(event).value,
                "attempt": attempt,
                "step": step,
                "tag": tag,
            }
            line = msgspec.json.encode({**own, **fields}, enc_hook=_plain)
            with self._lock:
                self._append(line)
        except Exception as exc:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "the event log %s cannot be written, training goes on without it: %s",
                    self._store.locate(self.key),
                    exc,
                )

    def _append(self, line: bytes) -> None:
        if self._torn is None:
            self._torn = self._store.exists(self.key)
        # A line that a crash cut off must not swallow this one; readers skip empty lines.
        start = b"\n" if self._torn else b""
        self._torn = True
        self._store.append(self.key, start + line + b"\n")
        self._torn = False


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def read_events(store: Store) -> list[Event]:
    """Returns the events of all nodes by time.

    Lines that a crash cut off or that are no events are left out. Clocks of different nodes may differ.

    Args:
        store: the checkpoint root.

    Raises:
        StorageError: if a log cannot be read.
    """
    events: list[Event] = []
    for key in store.list(EVENTS):
        name = key.removeprefix(f"{EVENTS}/")
        if "/" in name or not name.endswith(_SUFFIX):
            continue
        node = name.removesuffix(_SUFFIX)
        lines = (store.read(key) or b"").split(b"\n")
        events += [event for line in lines if (event := _decode(line, node)) is not None]
    return sorted(events, key=lambda event: event.time)


def _decode(line: bytes, node: str) -> Event | None:
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
        own = {name: record.pop(name) for name in _COLUMNS & record.keys()}
        return msgspec.convert({**own, "node": node, "fields": record}, Event)
    except ValueError:  # no JSON, no UTF-8, or not the types of an event
        return None
