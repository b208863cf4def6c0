"""The directory lock: live writers are refused, dead ones followed, and no two clocks are compared."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from storage_samples import make_store

from moc_ckpt.errors import StorageError
from moc_ckpt.persist import heartbeat
from moc_ckpt.persist.heartbeat import HEARTBEAT, DirectoryLock, LockIdentity, LockRecord
from moc_ckpt.persist.process import is_alive, place, start_ticks
from moc_ckpt.storage.store import Store, open_store


class FakeTime:
    """A clock that moves when somebody sleeps; `during` runs at every sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.during: Callable[[], object] = lambda: None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.during()


def make_lock(store: Store, run: str, time_: FakeTime | None = None, pid: int | None = None) -> DirectoryLock:
    time_ = time_ or FakeTime()
    identity = LockIdentity(run, "hostA", os.getpid() if pid is None else pid, "job")
    return DirectoryLock(store, identity, clock=time_.clock, sleep=time_.sleep, renew=False)


def foreign(
    store: Store, *, counter: int = 7, run: str = "other", where: str = "another boot", pid: int = 4242
) -> None:
    """Writes the lock of a run on another machine."""
    record = LockRecord(
        run=run, host="hostB", pid=pid, job="job", place=where, started=1, counter=counter, period_s=5.0
    )
    store.write(HEARTBEAT, msgspec.json.encode(record))


def content(store: Store) -> LockRecord:
    return msgspec.json.decode(store.read(HEARTBEAT) or b"", type=LockRecord)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


def test_a_free_directory_is_taken_and_given_back(store: Store) -> None:
    time_ = FakeTime()
    lock = make_lock(store, "mine", time_)
    lock.acquire()
    assert lock.held and time_.now == 1000.0
    record = content(store)
    assert (record.run, record.pid, record.counter, record.place) == ("mine", os.getpid(), 0, place())
    assert lock.renew_once() and lock.renew_once()
    assert content(store).counter == 2
    lock.release()
    assert store.read(HEARTBEAT) is None and not lock.held
    lock.release()


def test_a_live_writer_elsewhere_is_refused_with_its_name_and_age(store: Store) -> None:
    foreign(store, counter=720)
    time_ = FakeTime()
    steps = iter(range(721, 800))
    time_.during = lambda: foreign(store, counter=next(steps)) if time_.now > 1004 else None
    lock = make_lock(store, "mine", time_)
    with pytest.raises(StorageError, match=r"other.*4242 on hostB.*3,60[05] s") as raised:
        lock.acquire()
    assert "save_dir" in raised.value.fix
    assert not lock.held and content(store).run == "other"
    assert time_.now < 1006, "it is refused as soon as the counter moves"


def test_a_silent_writer_elsewhere_is_followed_after_two_and_a_half_periods(store: Store) -> None:
    foreign(store)
    time_ = FakeTime()
    lock = make_lock(store, "mine", time_)
    lock.acquire()
    assert content(store).run == "mine"
    assert time_.now == pytest.approx(1012.5)


def test_a_slower_writer_is_watched_by_its_own_period(store: Store) -> None:
    record = LockRecord(
        run="other", host="hostB", pid=1, job="j", place="elsewhere", started=None, counter=0, period_s=20.0
    )
    store.write(HEARTBEAT, msgspec.json.encode(record))
    time_ = FakeTime()
    make_lock(store, "mine", time_).acquire()
    assert time_.now == pytest.approx(1050.0)


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_jumps_of_the_wall_clock_change_nothing(store: Store, jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + jump)
    foreign(store)
    time_ = FakeTime()
    time_.during = lambda: foreign(store, counter=8)
    with pytest.raises(StorageError, match="hostB"):
        make_lock(store, "mine", time_).acquire()
    time_.during = lambda: None
    make_lock(store, "mine", time_).acquire()
    assert content(store).run == "mine"


def test_a_dead_process_of_this_machine_is_followed_at_once(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    foreign(store, where=place(), pid=child.pid)
    time_ = FakeTime()
    make_lock(store, "mine", time_).acquire()
    assert time_.now == 1000.0 and content(store).run == "mine"


def test_a_process_that_nobody_waited_for_is_dead(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 60
    while is_alive(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, 0)  # it is still there, as a zombie
    foreign(store, where=place(), pid=child.pid)
    time_ = FakeTime()
    make_lock(store, "mine", time_).acquire()
    assert time_.now == 1000.0
    child.wait()


def test_a_live_process_of_this_machine_is_watched(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = LockRecord(
            run="other",
            host="x",
            pid=child.pid,
            job="j",
            place=place(),
            started=start_ticks(child.pid),
            counter=1,
            period_s=5.0,
        )
        store.write(HEARTBEAT, msgspec.json.encode(record))
        time_ = FakeTime()
        time_.during = lambda: store.write(HEARTBEAT, msgspec.json.encode(msgspec.structs.replace(record, counter=2)))
        with pytest.raises(StorageError, match="another run writes"):
            make_lock(store, "mine", time_).acquire()
        # The same number, but another process than the one that wrote the lock.
        store.write(HEARTBEAT, msgspec.json.encode(msgspec.structs.replace(record, started=record.started - 1)))
        time_ = FakeTime()
        make_lock(store, "mine", time_).acquire()
        assert time_.now == 1000.0
    finally:
        child.communicate(b"\n")


def test_the_same_run_or_process_gets_it_again_at_once(store: Store) -> None:
    first = make_lock(store, "mine")
    first.acquire()
    time_ = FakeTime()
    make_lock(store, "mine", time_).acquire()  # same run
    make_lock(store, "next", time_).acquire()  # same process, e.g. a second engine
    assert time_.now == 1000.0 and content(store).run == "next"
    assert not first.renew_once()
    assert isinstance(first.lost, StorageError) and "next" in first.lost.what


def test_a_stopped_writer_notices_that_it_was_replaced(store: Store) -> None:
    lock = make_lock(store, "mine")
    lock.acquire()
    foreign(store)
    assert not lock.renew_once()
    assert lock.lost is not None and not lock.held
    lock.release()
    assert content(store).run == "other", "the other's lock is not removed"


def test_somebody_who_comes_first_wins(store: Store) -> None:
    """Two watch the same dead lock; the one that is later finds the other's, and is refused."""
    foreign(store)
    time_ = FakeTime()
    late = make_lock(store, "late", time_)

    def overtake() -> None:
        if time_.now >= 1012.5:
            foreign(store, run="winner", counter=0)

    time_.during = overtake
    with pytest.raises(StorageError, match="winner"):
        late.acquire()
    assert content(store).run == "winner"


def test_of_many_that_start_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real time and threads; each pretends to be on a machine of its own."""
    store = open_store(tmp_path)
    locks = []
    for index in range(6):
        monkeypatch.setattr(heartbeat, "place", lambda index=index: f"machine {index}")
        locks.append(DirectoryLock(store, LockIdentity(f"run{index}", "h", 1, "j"), period_s=0.2))
    refused: list[StorageError] = []

    def go(lock: DirectoryLock) -> None:
        try:
            lock.acquire()
        except StorageError as error:
            refused.append(error)

    threads = [threading.Thread(target=go, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        assert sum(lock.held for lock in locks) == 1
        assert len(refused) == 5
        holder = next(lock for lock in locks if lock.held)
        before = content(store).counter
        deadline = time.monotonic() + 30
        while content(store).counter == before:
            assert time.monotonic() < deadline, "the lock is not renewed"
            time.sleep(0.05)
        assert holder.lost is None
    finally:
        for lock in locks:
            lock.release()
    assert store.read(HEARTBEAT) is None


def test_a_damaged_lock_is_watched_like_any_other(store: Store) -> None:
    store.write(HEARTBEAT, b"{ not json")
    time_ = FakeTime()
    make_lock(store, "mine", time_).acquire()
    assert time_.now == pytest.approx(1012.5)
    assert content(store).run == "mine"


def test_a_lock_that_was_removed_comes_back(store: Store) -> None:
    lock = make_lock(store, "mine")
    lock.acquire()
    store.delete(HEARTBEAT)
    assert lock.renew_once()
    assert content(store).run == "mine"


def test_a_write_that_fails_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    lock = make_lock(store, "mine")
    lock.acquire()
    real = store.write

    def write(key: str, data: bytes) -> None:
        real(key, data)
        raise StorageError("the disk is full")

    monkeypatch.setattr(store, "write", write)
    for _ in range(2):
        with pytest.raises(StorageError, match="full"):
            lock.renew_once()
    monkeypatch.setattr(store, "write", real)
    assert lock.renew_once() and lock.lost is None
    lock.release()
    assert store.read(HEARTBEAT) is None
