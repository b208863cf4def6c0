"""The writer's lock on a checkpoint directory: kept alive by a counter, so that no two clocks are ever compared."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from moc_ckpt.errors import StorageError
from moc_ckpt.persist.process import place, start_ticks
from moc_ckpt.storage.checkpoint import LOCK
from moc_ckpt.storage.store import Store

__all__ = ["HEARTBEAT", "DirectoryLock", "LockIdentity", "LockRecord", "live_writer"]

HEARTBEAT = "lock"
"""Key of the lock below the checkpoint root."""
_PERIOD_S = 5.0
_PERIODS_TO_WATCH = 2.5
_LOOKS_PER_PERIOD = 5
_LONGEST_PERIOD_S = 60.0

_log = logging.getLogger(__name__)


class LockIdentity(msgspec.Struct, frozen=True):
    """Who writes into a directory.

    Attributes:
        run: id of the run, unique per start of the trainers.
        host: name of its node, for people.
        pid: process id.
        job: the job key.
    """

    run: str
    host: str
    pid: int
    job: str


class LockRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The lock's file.

    Attributes:
        run: see `LockIdentity`.
        host: name of its node.
        pid: process id.
        job: the job key.
        place: boot and pid namespace that the pid belongs to (`process.place`).
        started: when the process began, in ticks since the boot; None if unknown.
        counter: number of renewals; grows by one every `period_s`.
        period_s: seconds between renewals.
    """

    run: str
    host: str
    pid: int
    job: str
    place: str
    started: int | None
    counter: int
    period_s: float

    def held_s(self) -> float:
        """Seconds that the holder has had it, by the holder's own count."""
        return self.counter * self.period_s


class DirectoryLock:
    """Keeps a second run out of a checkpoint directory while this one lives. One process per run holds it (rank 0).

    The file is renewed by a daemon thread. A holder counts as alive while its counter moves, watched for 2.5 periods
    of this process's monotonic clock. One that can be seen to be dead (same boot and pid namespace) is followed at
    once, so an ordinary restart does not wait. Taking over happens under the directory's commit lock, so of several
    contenders exactly one succeeds. This is a courtesy to people; what protects the data is the attempt's fence.

    Thread-safe.

    Args:
        store: the checkpoint root, of any kind.
        identity: who takes it.
        period_s: seconds between renewals.
        clock: monotonic seconds; for tests.
        sleep: waits for so many seconds; for tests.
        renew: start the renewing thread; tests may call `renew_once` instead.
    """

    def __init__(
        self,
        store: Store,
        identity: LockIdentity,
        *,
        period_s: float = _PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        renew: bool = True,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._renew = renew
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._written: tuple[bytes, ...] = ()  # what the file may hold while it is ours
        self._complained = False
        self._record = LockRecord(
            run=identity.run,
            host=identity.host,
            pid=identity.pid,
            job=identity.job,
            place=place(),
            started=start_ticks(identity.pid),
            counter=0,
            period_s=period_s,
        )
        self.lost: StorageError | None = None
        """Set when another run took the lock over: this process was stopped for too long."""

    @property
    def held(self) -> bool:
        """Whether this process has the lock."""
        return bool(self._written) and self.lost is None

    def acquire(self, timeout_s: float = 60.0) -> None:
        """Takes the lock; returns at once unless there is a holder that must be watched first.

        Args:
            timeout_s: seconds to wait for a commit in progress, which holds the directory.

        Raises:
            StorageError: if another run is writing here (naming its host, pid and age), or the store fails.
        """
        with self._mutex:
            if self.held:
                return
            found = self._store.read(HEARTBEAT)
            if found is not None and not self._may_follow(found):
                self._watch(found)
            data = msgspec.json.encode(self._record)
            with self._store.lock(LOCK, timeout_s):
                now = self._store.read(HEARTBEAT)
                if now != found and now is not None and not self._may_follow(now):
                    raise self._taken(now, "took the directory just now")
                self._store.write(HEARTBEAT, data)
            self._written, self.lost = (data,), None
            self._ended.clear()
            if self._renew:
                self._thread = threading.Thread(target=self._keep, name="moc-heartbeat", daemon=True)
                self._thread.start()

    def release(self) -> None:
        """Gives the lock back; nothing to do if it is not held. Never raises for a store that fails."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)
        with self._mutex:
            written, self._written, self._thread = self._written, (), None
            if not written or self.lost is not None:
                return
            try:
                if self._store.read(HEARTBEAT) in written:
                    self._store.delete(HEARTBEAT)
            except StorageError as error:
                _log.warning("the lock %s was left behind: %s", self._store.locate(HEARTBEAT), error.what)

    def renew_once(self) -> bool:
        """Moves the counter on.

        Returns:
            False if the lock is not this process's any more (see `lost`).
        """
        with self._mutex:
            if not self.held:
                return False
            now = self._store.read(HEARTBEAT)
            if now is not None and now not in self._written:
                self.lost = self._taken(now, "took the directory over while this process did not renew its lock")
                _log.error("%s", self.lost)
                return False
            self._record = msgspec.structs.replace(self._record, counter=self._record.counter + 1)
            data = msgspec.json.encode(self._record)
            # A write that fails may have reached the file all the same.
            self._written = (*self._written, data)
            self._store.write(HEARTBEAT, data)
            self._written = (data,)
            return True

    def _keep(self) -> None:
        while not self._ended.wait(self._record.period_s):
            try:
                if not self.renew_once():
                    return
                self._complained = False
            except Exception as error:
                if not self._complained:  # once per disturbance: a full disk lasts for many periods
                    self._complained = True
                    _log.warning("the lock %s cannot be renewed: %s", self._store.locate(HEARTBEAT), error)

    def _may_follow(self, data: bytes) -> bool:
        """Tells whether the holder is this run, this process, or seen to be dead."""
        record = _decode(data)
        if record is None:
            return False
        mine = self._record
        if record.run == mine.run:
            return True
        if record.place != mine.place:
            return False
        started = start_ticks(record.pid)
        if started is None or (record.started is not None and started != record.started):
            return True
        return record.pid == mine.pid

    def _watch(self, first: bytes) -> None:
        """Waits until the holder has been silent for long enough.

        Raises:
            StorageError: if it is alive.
        """
        record = _decode(first)
        period = self._record.period_s
        if record is not None:
            period = max(period, min(record.period_s, _LONGEST_PERIOD_S))
        end = self._clock() + _PERIODS_TO_WATCH * period
        _log.warning(
            "%s holds %s; watching for %.1f s whether it is alive",
            _name(record),
            self._store.locate(HEARTBEAT),
            _PERIODS_TO_WATCH * period,
        )
        while True:
            left = end - self._clock()
            if left <= 0:
                return
            self._sleep(min(left, period / _LOOKS_PER_PERIOD))
            now = self._store.read(HEARTBEAT)
            if now is None:
                return
            if now != first:
                if self._may_follow(now):
                    return
                raise self._taken(now, "renews its lock")

    def _taken(self, data: bytes, how: str) -> StorageError:
        record = _decode(data)
        age = f"; it has held it for {record.held_s():,.0f} s" if record is not None else ""
        return StorageError(
            f"another run writes into this directory: {_name(record)} {how}{age}",
            where=self._store.locate(HEARTBEAT),
            fix="stop that run, or give this one another save_dir; remove the file only if nobody renews it",
        )


def live_writer(
    store: Store, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Tells whether a run has the lock of a directory and lives, without taking it.

    Returns at once unless the holder is on another machine and must be watched (for 2.5 of its periods at most).

    Args:
        store: the checkpoint root.
        clock: monotonic seconds.
        sleep: waits for so many seconds.

    Returns:
        The run, its process and its host, for people; empty if nobody has the lock, or nobody renews it.

    Raises:
        StorageError: if the store cannot be read.
    """
    first = now = store.read(HEARTBEAT)
    if first is None:
        return ""
    record = _decode(first)
    if record is not None and record.place == place():
        started = start_ticks(record.pid)
        alive = started is not None and record.started in (None, started)
        return _name(record) if alive else ""
    period = _PERIOD_S if record is None else max(0.0, min(record.period_s, _LONGEST_PERIOD_S))
    end = clock() + _PERIODS_TO_WATCH * period
    while now == first and clock() < end:
        sleep(max(min(end - clock(), period / _LOOKS_PER_PERIOD), 0.01))
        now = store.read(HEARTBEAT)
    return "" if now in (None, first) else _name(_decode(now))


def _decode(data: bytes) -> LockRecord | None:
    try:
        return msgspec.json.decode(data, type=LockRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _name(record: LockRecord | None) -> str:
    if record is None:
        return "somebody (the file is not readable)"
    return f"run {record.run} (job {record.job}, process {record.pid} on {record.host})"
