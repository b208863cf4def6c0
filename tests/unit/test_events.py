from __future__ import annotations

import json
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from storage_samples import make_store

from moc_ckpt.errors import StorageError
from moc_ckpt.events import EventKind, EventLog, event_key, read_events
from moc_ckpt.storage import remote
from moc_ckpt.storage.store import Store, open_store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


def test_what_is_written_is_read(store: Store) -> None:
    log = EventLog(store, "node-1")
    before = time.time()
    log.write(EventKind.SNAPSHOTTED, attempt=2, step=10, bytes=5_000_000_000, seconds=0.25)
    log.write("COMMITTED", attempt=2, step=10, tag="global_step10", plt=0.0125, k=[1, 2], lost={"0": [3, 4]})
    log.write(EventKind.SKIPPED, reason='no free slot\nof "two"')
    after = time.time()
    first, second, third = read_events(store)
    assert [event.event for event in (first, second, third)] == ["SNAPSHOTTED", "COMMITTED", "SKIPPED"]
    assert before <= first.time <= second.time <= third.time <= after
    assert (first.attempt, first.step, first.tag, first.node) == (2, 10, None, "node-1")
    assert first.fields == {"bytes": 5_000_000_000, "seconds": 0.25}
    assert second.tag == "global_step10" and second.fields == {"plt": 0.0125, "k": [1, 2], "lost": {"0": [3, 4]}}
    assert (third.attempt, third.step) == (None, None) and third.fields == {"reason": 'no free slot\nof "two"'}
    # Any program can read it: one JSON object a line.
    lines = (store.read("events/node-1.jsonl") or b"").decode().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["SNAPSHOTTED", "COMMITTED", "SKIPPED"]
    assert json.loads(lines[1]) == {
        "time": second.time,
        "event": "COMMITTED",
        "attempt": 2,
        "step": 10,
        "tag": "global_step10",
        "plt": 0.0125,
        "k": [1, 2],
        "lost": {"0": [3, 4]},
    }


def test_all_kinds_are_there_under_their_names() -> None:
    assert {kind.name for kind in EventKind} == {kind.value for kind in EventKind}
    assert sorted(kind.value for kind in EventKind) == [
        "COMMITTED",
        "FAILED",
        "PERSISTED",
        "REBALANCE_PLANNED",
        "RECOVERED",
        "SKIPPED",
        "SNAPSHOTTED",
    ]


def test_values_that_json_does_not_have(store: Store) -> None:
    log = EventLog(store, "n")
    log.write(
        EventKind.FAILED,
        step=np.int64(7),
        a=np.float32(0.5),
        b=np.arange(3),
        c=Path("/x"),
        d=StorageError("what"),
        e=(),
    )
    (event,) = read_events(store)
    assert event.step == 7
    assert event.fields == {"a": 0.5, "b": [0, 1, 2], "c": "/x", "d": "what", "e": []}


def test_fields_may_have_the_names_of_attributes(store: Store) -> None:
    EventLog(store, "n").write(EventKind.FAILED, node="other", fields=[1], self=2)
    (event,) = read_events(store)
    assert event.node == "n" and event.fields == {"node": "other", "fields": [1], "self": 2}


def test_nodes_are_merged_by_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [EventLog(store, f"node{number}") for number in range(3)]
    order = [2, 0, 1, 1, 0, 2, 2]
    for position, number in enumerate(order):
        monkeypatch.setattr(time, "time", lambda position=position: 1000.0 + position)
        logs[number].write(EventKind.PERSISTED, step=position)
    assert [(event.step, event.node) for event in read_events(store)] == [
        (position, f"node{number}") for position, number in enumerate(order)
    ]
    assert store.list("events") == [f"events/node{number}.jsonl" for number in range(3)]


def test_other_files_are_no_logs(store: Store) -> None:
    store.write("events/README", b"{}")
    store.write("events/old/n.jsonl", b'{"time":1,"event":"COMMITTED"}\n')
    assert read_events(store) == []
    assert read_events(open_store("memory://nothing-is-here")) == []


# ---- torn lines ----


def is_event(line: bytes) -> bool:
    try:
        value = json.loads(line.decode())
    except ValueError:
        return False
    return isinstance(value, dict) and {"time", "event", "step"} <= set(value)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200), data=st.binary(max_size=20))
@example(cut=1, data=b" ")
@example(cut=2, data=b"}")
def test_a_crash_costs_the_torn_line_only(cut: int, data: bytes) -> None:
    store = open_store(f"memory://torn-{cut}-{data.hex()}")
    store.delete("events/n.jsonl")
    log = EventLog(store, "n")
    for step in (1, 2, 3):
        log.write(EventKind.PERSISTED, step=step, tag="ü")
    whole = store.read("events/n.jsonl") or b""
    kept = whole[: max(len(whole) - cut, 0)]
    store.write("events/n.jsonl", kept + data.replace(b"\n", b"{"))
    complete = sum(line.endswith(b"\n") for line in kept.splitlines(keepends=True))
    # A line whose end of line alone is missing is whole, and so is one that rubbish happens to complete.
    complete += is_event((kept + data.replace(b"\n", b"{")).rpartition(b"\n")[2])
    assert [event.step for event in read_events(store)] == list(range(1, complete + 1))
    # What the next process writes is not swallowed by it.
    EventLog(store, "n").write(EventKind.RECOVERED, step=99)
    assert [event.step for event in read_events(store)] == [*range(1, complete + 1), 99]


@pytest.mark.parametrize(
    "line",
    [b"[]", b"3", b"null", b'{"event":"COMMITTED"}', b'{"time":"late","event":"COMMITTED"}', b"\xff\xfe", b"\0" * 40],
)
def test_lines_that_are_no_events(store: Store, line: bytes) -> None:
    store.write("events/n.jsonl", line + b'\n{"time":1,"event":"NEW_KIND","step":4}\n\n')
    assert [(event.event, event.step) for event in read_events(store)] == [("NEW_KIND", 4)]


def test_after_a_failed_write_the_next_line_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store("local", tmp_path)
    log = EventLog(store, "n")
    log.write(EventKind.PERSISTED, step=1)
    real = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(fd, data[:-10])

    monkeypatch.setattr(os, "write", half)
    with caplog.at_level(logging.WARNING):
        log.write(EventKind.PERSISTED, step=2)
    assert "No space left" in caplog.text and "n.jsonl" in caplog.text
    monkeypatch.undo()
    log.write(EventKind.PERSISTED, step=3)
    assert [event.step for event in read_events(store)] == [1, 3]


# ---- never in the way of training ----


def test_failures_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    log = EventLog(open_store(tmp_path / "file" / "ckpt"), "n")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.write(EventKind.COMMITTED, step=step)
        log.write("NO_SUCH_EVENT")
        log.write(EventKind.FAILED, bad={(1, 2): 3})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "training goes on" in record.getMessage()


def test_wrong_calls_do_not_raise_either(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(store, "n")
    with caplog.at_level(logging.WARNING):
        log.write("NO_SUCH_EVENT", step=1)
        log.write(EventKind.FAILED, **{"time": 3})
    assert len(caplog.records) == 1 and "NO_SUCH_EVENT" in caplog.text
    log.write(EventKind.FAILED, step=2)
    assert [event.step for event in read_events(store)] == [2]


# ---- threads and processes ----


def test_threads(store: Store) -> None:
    log = EventLog(store, "n")
    count = 20 if store.local_path is None else 200

    def work(number: int) -> None:
        for index in range(count):
            log.write(EventKind.PERSISTED, attempt=number, step=index, text="x" * 100)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read_events(store)
    assert sorted((event.attempt, event.step) for event in events) == [(n, i) for n in range(6) for i in range(count)]
    for number in range(6):
        assert [event.step for event in events if event.attempt == number] == list(range(count))


def test_processes_of_one_node(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    script = (
        "import sys\nfrom moc_ckpt.events import EventLog\nfrom moc_ckpt.storage.store import open_store\n"
        "log = EventLog(open_store(sys.argv[1]), 'n')\n"
        "for step in range(300):\n    log.write('PERSISTED', attempt=int(sys.argv[2]), step=step, text='x' * 3000)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", script, store.url, str(number)]) for number in range(3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    events = read_events(store)
    assert sorted((event.attempt, event.step) for event in events) == [(n, i) for n in range(3) for i in range(300)]
    assert all(event.fields == {"text": "x" * 3000} for event in events)


def test_needs_no_torch() -> None:
    script = "import sys, moc_ckpt.events; sys.exit(bool({'torch', 'deepspeed', 'tensorstore'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


# ---- names ----


def test_node_names_become_file_names(store: Store) -> None:
    assert EventLog(store).key == event_key(socket.gethostname())
    assert event_key("node-3.rack_1") == "events/node-3.rack_1.jsonl"
    for node in ("../../etc/passwd", "a/b", "a\\b\0", "..", ".hidden", "", "ä ö", "x" * 300):
        key = event_key(node)
        assert key.count("/") == 1 and not Path(key).name.startswith(".") and len(Path(key).name) < 200
        log = EventLog(store, node)
        log.write(EventKind.COMMITTED, text=node)
        assert store.exists(log.key)
    assert len(read_events(store)) == 8


# ---- Store.append ----


def test_append(store: Store) -> None:
    for data in (b"one\n", b"", b"two\n"):
        store.append("a/b/log", data)
    assert store.read("a/b/log") == b"one\ntwo\n" and store.list() == ["a/b/log"]
    store.write("a/b/log", b"new")
    store.append("a/b/log", b"er")
    assert store.read("a/b/log") == b"newer"
    with pytest.raises(StorageError, match="not a key"):
        store.append("../x", b"")


def test_append_makes_files_like_any_other(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    assert store.local_path is not None
    for mask in (0o022, 0o027, 0o077):
        before = os.umask(mask)
        try:
            store.write(f"{mask}/written/x", b"")
            store.append(f"{mask}/appended/x", b"")
            store.append(f"{mask}/appended/y", b"")
        finally:
            os.umask(before)
        top = store.local_path / str(mask)
        for one, other in [("written", "appended"), ("written/x", "appended/x"), ("written/x", "appended/y")]:
            assert stat.S_IMODE((top / one).stat().st_mode) == stat.S_IMODE((top / other).stat().st_mode)


def test_append_is_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    calls: list[int] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(len(data)) or real(fd, data))
    store.append("log", b"x" * 100_000)
    assert calls == [100_000]


def test_append_to_an_object_store_loses_nothing_to_another_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("memory", tmp_path)
    store.append("log", b"a")
    real = type(store)._swap
    meddle = [b"b", b"c"]

    def swap(self: Store, key: str, data: bytes, generation: bytes) -> bool:
        if meddle:
            self.write(key, (self.read(key) or b"") + meddle.pop(0))
        return real(self, key, data, generation)

    monkeypatch.setattr(type(store), "_swap", swap)
    store.append("log", b"d")
    assert store.read("log") == b"abcd"
    monkeypatch.setattr(type(store), "_swap", lambda *args: False)
    with pytest.raises(StorageError, match=f"{remote.APPEND_TRIES} times"):
        store.append("log", b"e")


def test_append_errors_name_the_file(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    store.write("file", b"")
    with pytest.raises(StorageError, match="appending failed") as info:
        store.append("file/log", b"x")
    assert str(tmp_path) in info.value.where and info.value.fix
