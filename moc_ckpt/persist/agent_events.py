"""Lines for the event logs of the directories that an agent writes to, off the paths that somebody waits for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from moc_ckpt.events import EventLog
from moc_ckpt.persist.protocol import Event
from moc_ckpt.storage.store import Store

__all__ = ["EventWriter"]

_MOST_EVENTS = 10_000

_log = logging.getLogger(__name__)


class EventWriter:
    """Writes events in their order, on a thread of its own. Thread-safe.

    Args:
        store_of: opens the checkpoint root of an address.
        node: name of this node, which the logs go by.
    """

    def __init__(self, store_of: Callable[[str], Store], node: str) -> None:
        self._store_of = store_of
        self._node = node
        self._logs: dict[str, EventLog] = {}
        self._queue: queue.Queue[Event | None] = queue.Queue(_MOST_EVENTS)
        self._thread = threading.Thread(target=self._run, name="moc-events", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Adds a line; dropped where storage is too slow for them all. Never waits and never raises."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            _log.warning("an event %s was dropped: storage does not take them fast enough", event.event)

    def close(self, timeout_s: float) -> None:
        """Writes what is there, for at most so many seconds."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                log = self._logs.get(event.url)
                if log is None:
                    log = self._logs[event.url] = EventLog(self._store_of(event.url), self._node)
                log.write(event.event, attempt=event.attempt, step=event.step, tag=event.tag, **event.fields)
            except Exception as error:  # a line less; the work goes on
                _log.warning("an event %s was not written: %s", event.event, error)
