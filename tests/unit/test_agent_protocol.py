"""Messages, the rules of commit and queue, with fake clocks and without processes."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_tools import PATIENCE_S, arena_file, check_committed, hello, job_folder, make_request, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import make_store, write_rank

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.persist import agent_work, committer
from moc_ckpt.persist import protocol as p
from moc_ckpt.persist.agent_work import Work
from moc_ckpt.persist.committer import Flight, SaveKey, await_commit, discard, retain
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import LOCK, latest_tag, list_tags, load_manifest
from moc_ckpt.storage.commit import Outcome as Note
from moc_ckpt.storage.commit import parts_status, read_outcome, write_failure, write_outcome
from moc_ckpt.storage.store import Store, open_store

# ---- messages ----


def every_message(folder: Path) -> list[Any]:
    rank = p.RankStatus(
        run="r",
        rank=0,
        local_rank=0,
        world=2,
        pid=5,
        alive=True,
        connected=False,
        arena="/dev/shm/x",
        queued=0,
        writing=1,
        committing=0,
        done=3,
        failed=1,
        bytes=10,
        seconds=0.5,
        error="",
        steps=[(1, 2.5)],
    )
    told = p.Status(
        pid=1,
        node="n",
        job="j",
        version="1",
        uptime_s=1.0,
        linger_s=2.0,
        idle_s=None,
        stopping="",
        rss=1,
        fds=2,
        ranks=[rank],
    )
    to_agent = [
        hello(folder),
        make_request(folder, "/x", "tag", rank=0, world=2, retention=p.Retention(3, 10)),
        p.Cancel(4),
        p.Event("/x", "SNAPSHOTTED", 1, 2, None, {"bytes": 1, "plt": 0.5, "why": "x", "list": [1, 2], "map": {"a": 1}}),
        p.Goodbye(),
        p.StatusRequest(),
        p.Stop("why", now=True),
    ]
    to_client = [
        p.Welcome(1, "n"),
        p.Refused("no"),
        p.Persisted(1, 2, 3.0, 4.0),
        p.Outcome(1, False, "what", "where", "fix", 5, 6.0),
        told,
        p.Stopping(1, 2),
    ]
    return [(p.decode_to_agent, message) for message in to_agent] + [
        (p.decode_to_client, message) for message in to_client
    ]


def test_every_message_comes_back_as_it_was() -> None:
    with job_folder() as folder:
        for decode, message in every_message(folder):
            data = p.encode(message)
            assert struct.unpack(">I", data[:4])[0] == len(data) - 4
            assert decode(data[4:]) == message


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    for decode in (p.decode_to_agent, p.decode_to_client):
        try:
            decode(data)
        except p.MessageError:
            continue
        # Almost nothing is a message by chance; whatever is must be encoded as one.
        assert msgspec.msgpack.decode(data)["type"]


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_well_formed_msgpack_of_another_shape_is_refused(value: Any) -> None:
    try:
        data = msgspec.msgpack.encode(value)
    except OverflowError:
        return
    with pytest.raises(p.MessageError):
        p.decode_to_agent(data)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(p.MessageError):
        p.decode_to_agent(b"\x91" * 100_000 + b"\xc0")


@pytest.mark.parametrize(
    ("changes", "other"), [({}, False), ({"version": "0"}, False), ({"protocol": p.PROTOCOL + 1}, True)]
)
def test_another_protocol_is_told_from_nonsense(tmp_path: Path, changes: dict[str, Any], other: bool) -> None:
    message = p.decode_to_agent(p.encode(hello(tmp_path, **changes))[4:])
    assert isinstance(message, p.OtherProtocol if other else p.Hello)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_messages_arrive_whole_however_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    near, far = socket.socketpair()
    wire = p.Wire(far)
    try:
        stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
        found: list[bytes] = []
        for number in range(len(stream) + 1):
            count = cuts[number % len(cuts)]
            if not stream:
                break
            near.sendall(stream[:count])
            stream = stream[count:]
            found += wire.receive()
        assert found == bodies and not wire.ended
        near.sendall(struct.pack(">I", 10) + b"cut off")
        near.close()
        assert wire.receive() == [] and wire.ended
    finally:
        near.close()
        wire.close()


def test_too_long_a_message_is_refused_before_it_is_read() -> None:
    near, far = socket.socketpair()
    with near, far:
        wire = p.Wire(far, limit=100)
        near.sendall(struct.pack(">I", 101))
        with pytest.raises(p.MessageError, match="101 bytes; at most 100"):
            wire.receive()


def test_a_reader_that_is_slow_gets_everything_and_one_that_stopped_is_given_up() -> None:
    near, far = socket.socketpair()
    with near, far:
        wire = p.Wire(near)
        text = "x" * (1 << 20)
        count = 0
        with pytest.raises(p.MessageError, match="unread"):
            while count < 200:
                wire.send(p.Refused(text))
                count += 1
        assert 60 < count < 80
        reader = p.Wire(far)
        seen = 0
        while wire.unsent or seen < count:
            wire.flush()
            seen += len(reader.receive())
        assert seen == count
        far.close()
        for _ in range(3):
            wire.send(p.Goodbye())
        assert wire.ended


def test_peer_is_this_process() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert p.peer(far) == (os.getpid(), os.getuid())


# ---- commit ----


class FakeTime:
    """A clock that moves when somebody waits; `at` maps moments to what happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], object]] = {}

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        assert 0 < seconds <= 1.0
        self.now += seconds
        for moment in sorted(moment for moment in self.at if moment <= self.now):
            self.at.pop(moment)()


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made = make_store(request.param, tmp_path)
    open_attempt(made)
    return made


KEY = SaveKey("url", "t", "run-1", 1, 3, 2)


def write(store: Store, *ranks: int, save: SaveKey = KEY) -> None:
    for rank in ranks:
        write_rank(store, save.tag, save.save_id, rank, step=save.step, attempt=save.attempt, world=save.world)


def follow(store: Store, time_: FakeTime, *, leads: bool, save: SaveKey = KEY, **options: Any) -> committer.Ending:
    options = {"commit_s": 30.0, "grace_s": 10.0, **options}
    return await_commit(store, save, leads=lambda: leads, wait=time_.wait, clock=time_.clock, **options)


def test_rank_zeros_agent_commits_when_the_last_part_is_there(store: Store) -> None:
    time_ = FakeTime()
    write(store, 0)
    time_.at[5.0] = lambda: write(store, 1)
    ending = follow(store, time_, leads=True)
    assert ending.committed and ending.decided_here and 5.0 <= time_.now < 6.1
    assert latest_tag(store) == "t" and load_manifest(store, "t").save_id == KEY.save_id
    assert ending.stored_bytes == load_manifest(store, "t").stored_bytes
    note = read_outcome(store, "t", KEY.save_id)
    assert note is not None and (note.committed, note.attempt, note.step) == (True, 1, 3)


def test_the_others_learn_of_it_from_the_note(store: Store) -> None:
    time_ = FakeTime()
    write(store, 0, 1)
    time_.at[4.0] = lambda: follow(store, FakeTime(), leads=True)
    ending = follow(store, time_, leads=False)
    assert ending.committed and not ending.decided_here and 4.0 <= time_.now < 5.1


def test_without_the_note_they_commit_after_the_grace(store: Store) -> None:
    time_ = FakeTime()
    write(store, 1)
    time_.at[6.0] = lambda: write(store, 0)
    ending = follow(store, time_, leads=False)
    assert ending.committed and ending.decided_here
    assert 16.0 <= time_.now < 21.0
    assert follow(store, FakeTime(), leads=True).committed, "rank 0's agent comes back and finds it done"


def test_absent_ranks_are_named_when_time_is_up(store: Store) -> None:
    save = SaveKey("url", "t", "run-1", 1, 3, 40)
    write(store, *range(0, 30, 2), save=save)
    time_ = FakeTime()
    ending = follow(store, time_, leads=True, save=save)
    assert not ending.committed and 30.0 <= time_.now < 31.0
    assert ending.what.startswith("ranks 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 30, … of 40")
    assert "commit_s" in ending.fix and list_tags(store) == []
    note = read_outcome(store, "t", "run-1")
    assert note is not None and not note.committed and "ranks 1, 3" in note.error
    later = FakeTime()
    heard = follow(store, later, leads=False, save=save)
    assert "ranks 1, 3" in heard.what and later.now == 0.0


def test_without_rank_zeros_agent_the_others_give_up_themselves(store: Store) -> None:
    write(store, 1)
    time_ = FakeTime()
    ending = follow(store, time_, leads=False)
    assert not ending.committed and "rank 0 of 2 had not" in ending.what
    assert 40.0 <= time_.now < 41.0


def test_a_failure_note_ends_the_save_at_once(store: Store) -> None:
    write(store, 0)
    write_failure(store, "t", KEY.save_id, 1, StorageError("the disk is full", where="/x", fix="free space"))
    time_ = FakeTime()
    ending = follow(store, time_, leads=True)
    assert time_.now == 0.0 and not ending.committed
    assert "rank 1 could not write its part: the disk is full" in ending.what and "free space" in ending.what


def test_a_failure_that_was_mended_does_not_count(store: Store) -> None:
    write_failure(store, "t", KEY.save_id, 1, "the agent died")
    write(store, 0, 1)
    assert follow(store, FakeTime(), leads=True).committed


def test_a_failure_on_this_node_needs_no_storage(tmp_path: Path) -> None:
    broken = open_store(tmp_path / "nowhere")
    time_ = FakeTime()
    cause = StorageError("no room", where="/w", fix="f")
    ending = follow(broken, time_, leads=False, local_failure=lambda: cause)
    assert (ending.what, ending.where, ending.fix, time_.now) == ("no room", "/w", "f", 0.0)


def test_an_older_attempt_may_not_commit(store: Store) -> None:
    write(store, 0, 1)
    open_attempt(store)
    ending = follow(store, FakeTime(), leads=True)
    assert not ending.committed and "attempt 1 may not publish" in ending.what
    assert list_tags(store) == []


def test_parts_that_are_no_whole_checkpoint_fail_it(store: Store) -> None:
    write_rank(store, "t", KEY.save_id, 0, step=3, attempt=1, experts=[(0, 0)])
    write_rank(store, "t", KEY.save_id, 1, step=3, attempt=1, experts=[(0, 0)])
    ending = follow(store, FakeTime(), leads=True)
    assert not ending.committed and ending.what and ending.decided_here


def test_a_bug_in_the_commit_is_told_to_the_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, 0, 1)
    monkeypatch.setattr(committer, "commit", lambda *_, **__: 1 / 0)
    ending = follow(store, FakeTime(), leads=True)
    assert not ending.committed and "ZeroDivisionError" in ending.what
    assert "ZeroDivisionError" in follow(store, FakeTime(), leads=False).what


def test_storage_that_fails_for_a_while_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, 0, 1)
    time_ = FakeTime()
    real = committer.parts_status

    def flaky(*args: Any) -> Any:
        if time_.now < 7.0:
            raise StorageError("stale file handle", where="/nfs", fix="remount")
        return real(*args)

    monkeypatch.setattr(committer, "parts_status", flaky)
    assert follow(store, time_, leads=True).committed
    assert 7.0 <= time_.now < 8.1


def test_storage_that_fails_for_good_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise StorageError("stale file handle", where="/nfs", fix="remount")

    monkeypatch.setattr(committer, "parts_status", fail)
    time_ = FakeTime()
    ending = follow(store, time_, leads=True)
    assert "stale file handle" in ending.what and ending.fix == "remount" and 30 <= time_.now < 32


@pytest.mark.parametrize("leads", [True, False])
def test_nothing_is_committed_long_after_the_deadline(
    store: Store, monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    """The file system hangs in the very look that finds all parts: the trainers have given the save up by then."""
    write(store, 0, 1)
    time_ = FakeTime()
    real = committer.parts_status

    def slow(*args: Any) -> Any:
        found = real(*args)
        time_.now += 300.0
        return found

    monkeypatch.setattr(committer, "parts_status", slow)
    ending = follow(store, time_, leads=leads)
    assert not ending.committed and list_tags(store) == []


def test_waiting_is_cheap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[float] = []
    lists: list[float] = []
    time_ = FakeTime()
    read, listing = store.read, store.list
    monkeypatch.setattr(store, "read", lambda key: (reads.append(time_.now), read(key))[1])
    monkeypatch.setattr(store, "list", lambda prefix="": (lists.append(time_.now), listing(prefix))[1])
    follow(store, time_, leads=False, commit_s=300.0)
    assert len(reads) < 330 and len(lists) < 130
    assert min(b - a for a, b in pairwise(reads[:-1])) >= 0.05


@pytest.mark.parametrize("repeat", range(5))
def test_of_several_that_commit_at_once_all_succeed(tmp_path: Path, repeat: int) -> None:
    store = make_store("local", tmp_path)
    open_attempt(store)
    write(store, 0, 1)
    endings: list[committer.Ending] = []
    threads = [
        threading.Thread(
            target=lambda leads: endings.append(
                await_commit(store, KEY, leads=lambda: leads, commit_s=30.0, grace_s=0.0)
            ),
            args=(number == 0,),
        )
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [ending.committed for ending in endings] == [True] * 4
    assert load_manifest(store, "t").save_id == KEY.save_id


def test_bad_names_are_refused() -> None:
    for tag, save_id in (("a/b", "x"), ("latest", "x"), ("ok", "../x"), ("ok", "")):
        with pytest.raises(StorageError):
            SaveKey("url", tag, save_id, 1, 1, 1)


def test_what_a_failed_save_wrote_is_removed_but_never_a_committed_one(store: Store) -> None:
    other = SaveKey("url", "u", "run-2", 1, 4, 2)
    write(store, 0, 1)
    write(store, 0, 1, save=other)
    assert follow(store, FakeTime(), leads=True, save=other).committed
    before = store.list("u")
    discard(store, other, [0, 1], leads=True)
    assert store.list("u") == before
    discard(store, KEY, [1], leads=False)
    assert parts_status(store, "t", KEY.save_id).done == {0}
    assert {key.split("/")[3].split(".")[0] for key in store.list("t") if "/packs/" in key} == {"rank_00000"}
    discard(store, KEY, [0], leads=True)
    assert not [key for key in store.list("t") if "/packs/" in key or "/extra/" in key or "/parts/" in key]


def test_discarding_waits_for_a_commit_and_never_raises(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, 0)
    monkeypatch.setattr(committer, "_LOCK_S", 0.2)
    with store.lock(LOCK, 5.0):
        discard(store, KEY, [0], leads=True)
    assert parts_status(store, "t", KEY.save_id).done == {0}


# ---- retention ----


def test_a_new_agent_learns_which_saves_of_the_run_have_ended(store: Store) -> None:
    write_outcome(store, "a", "run-1", Note(committed=True))
    write_outcome(store, "b", "run-2", Note(committed=False, error="x"))
    write_outcome(store, "c", "else-3", Note(committed=True))
    write(store, 0, save=SaveKey("url", "d", "run-4", 1, 3, 2))
    flight = Flight()
    assert flight.contains("run-1", ("run-",)) and not flight.contains("run-1", ())
    flight.learn(store, ("run-",))
    told = {name: flight.contains(name, ("run-",)) for name in ("run-1", "run-2", "run-4", "run-5", "else-3")}
    assert told == {"run-1": False, "run-2": False, "run-4": True, "run-5": True, "else-3": False}


def test_what_flight_remembers_is_bounded() -> None:
    flight = Flight()
    for number in range(10_000):
        flight.finish(f"run-{number}")
    assert not flight.contains("run-9999", ("run-",)) and len(flight._finished) <= 1024


def test_retention_that_fails_is_no_failure_of_the_save(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, 0, 1)
    follow(store, FakeTime(), leads=True)

    def fail(*_: Any, **__: Any) -> Any:
        raise StorageError("cannot list")

    monkeypatch.setattr(committer, "apply_retention", fail)
    assert retain(store, keep_last=1, keep_every=0, attempt=1, flight=Flight(), prefixes=("run-",)) is None


# ---- the queue ----


class Desk:
    """A `Work` whose writes stop at a gate, and everything it answered."""

    def __init__(self, folder: Path, save_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.save_dir = folder, save_dir
        self.gate = threading.Event()
        self.running: list[str] = []
        self.most = 0
        self.arenas_at_once: list[list[str]] = []
        self.answers: list[tuple[int, Any]] = []
        self._lock = threading.Lock()
        real = agent_work.write_prepared

        def gated(store: Store, part: Any, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.running.append(f"{part.rank}")
                self.arenas_at_once.append(list(self.running))
            try:
                assert self.gate.wait(PATIENCE_S)
                return real(store, part, *args, **kwargs)
            finally:
                with self._lock:
                    self.running.remove(f"{part.rank}")

        monkeypatch.setattr(agent_work, "write_prepared", gated)
        self.work = Work(folder, "node", grace_s=1.0, changed=lambda: None)

    def submit(self, tag: str, rank: int = 0, *, world: int = 1, again: bool = False, seq: int = 0, **more: Any) -> int:
        request = make_request(self.folder, self.save_dir, tag, save_id=f"r1-{tag}", rank=rank, world=world, **more)
        seq = seq or len(self.answers) * 1000 + sum(map(ord, tag)) + rank
        self.work.submit(
            ("r1", rank),
            msgspec.structs.replace(request, seq=seq, again=again),
            lambda message: self.answers.append((rank, message)),
        )
        return seq

    def outcomes(self, seq: int) -> list[p.Outcome]:
        return [message for _, message in self.answers if isinstance(message, p.Outcome) and message.seq == seq]

    def await_outcome(self, seq: int) -> p.Outcome:
        return wait_until(lambda: self.outcomes(seq), f"the outcome of {seq}")[0]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    save_dir = tmp_path / "ckpt"
    open_attempt(open_store(save_dir, create=True))
    with job_folder() as folder:
        made = Desk(folder, save_dir, monkeypatch)
        try:
            yield made
        finally:
            made.gate.set()
            made.work.close(PATIENCE_S)


def test_one_request_of_a_rank_waits_and_the_next_is_refused_as_busy(desk: Desk) -> None:
    first = desk.submit("a")
    wait_until(lambda: desk.running, "the first write")
    second, third = desk.submit("b", step=2), desk.submit("c", step=3)
    refused = desk.await_outcome(third)
    assert not refused.committed and refused.what.startswith("busy") and refused.fix
    assert not desk.outcomes(first) and not desk.outcomes(second)
    assert desk.work.counts(("r1", 0)).queued == 1 and desk.work.counts(("r1", 0)).writing == 1
    resent = desk.submit("d", step=4, again=True)
    assert not desk.outcomes(resent), "what an agent had accepted before is not refused"
    desk.gate.set()
    assert all(desk.await_outcome(seq).committed for seq in (first, second, resent))


def test_two_ranks_are_written_at_once_and_never_two_saves_of_one(desk: Desk) -> None:
    seqs = [desk.submit("a", rank, world=4) for rank in range(4)]
    wait_until(lambda: len(desk.running) == 2, "two writers")
    seqs += [desk.submit("b", rank, world=4, step=2, again=True) for rank in range(4)]
    time.sleep(0.2)
    assert len(desk.running) == 2
    desk.gate.set()
    assert all(desk.await_outcome(seq).committed for seq in seqs)
    assert max(map(len, desk.arenas_at_once)) == 2
    assert all(len(set(now)) == len(now) for now in desk.arenas_at_once)


def test_a_request_that_comes_again_joins_the_first(desk: Desk) -> None:
    seq = desk.submit("a", seq=7)
    wait_until(lambda: desk.running, "the write")
    assert desk.submit("a", again=True, seq=8) == 8
    desk.gate.set()
    assert desk.await_outcome(8).committed
    assert not desk.outcomes(seq), "only the newest connection is answered"
    desk.submit("a", again=True, seq=9)
    assert desk.await_outcome(9).committed
    kinds = [type(message).__name__ for _, message in desk.answers]
    assert kinds == ["Persisted", "Outcome", "Persisted", "Outcome"]
    assert len(desk.arenas_at_once) == 1, "it was written once"


def test_a_part_that_is_in_storage_is_not_written_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.gate.set()
    desk.submit("a", world=2)
    wait_until(lambda: desk.answers, "the part")
    fresh = Work(desk.folder, "node", grace_s=1.0, changed=lambda: None)
    try:
        monkeypatch.setattr(agent_work, "write_prepared", lambda *_, **__: 1 / 0)
        answers: list[Any] = []
        request = make_request(desk.folder, desk.save_dir, "a", save_id="r1-a", world=2, commit_s=0.5)
        fresh.submit(("r1", 0), msgspec.structs.replace(request, again=True, seq=1), answers.append)
        wait_until(lambda: len(answers) == 2, "both answers")
        assert isinstance(answers[0], p.Persisted) and answers[0].nbytes == 0
        assert "rank 1 of 2" in answers[1].what
    finally:
        fresh.close(1.0)


def test_a_cancelled_request_is_not_published(desk: Desk) -> None:
    first = desk.submit("a", nbytes=1 << 20)
    wait_until(lambda: desk.running, "the write")
    desk.work.cancel(("r1", 0), first)
    desk.gate.set()
    done = desk.await_outcome(first)
    assert not done.committed and "no longer waits" in done.what
    store = open_store(desk.save_dir)
    assert parts_status(store, "a", "r1-a").done == set() and list_tags(store) == []


def test_a_failed_save_does_not_write_what_is_still_queued(desk: Desk) -> None:
    """Rank 1's arena is gone: rank 2 of the same save need not be written."""
    seqs = [desk.submit("a", rank, world=3, commit_s=60.0) for rank in (0, 1)]
    wait_until(lambda: len(desk.running) == 2, "two writers")
    seqs.append(desk.submit("a", 2, world=3, commit_s=60.0))
    desk.work.cancel(("r1", 1), seqs[1])
    desk.gate.set()
    endings = [desk.await_outcome(seq) for seq in seqs]
    assert not any(ending.committed for ending in endings)
    assert parts_status(open_store(desk.save_dir), "a", "r1-a").done <= {0, 2}


def test_an_unexpected_error_is_an_outcome_and_the_agent_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.gate.set()
    real = agent_work.write_prepared

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(agent_work, "write_prepared", broken)
    done = desk.await_outcome(desk.submit("a"))
    assert not done.committed and "ZeroDivisionError: a bug" in done.what
    monkeypatch.setattr(agent_work, "write_prepared", real)
    assert desk.await_outcome(desk.submit("b", step=2)).committed
    counts = desk.work.counts(("r1", 0))
    assert (counts.done, counts.failed) == (1, 1)


def test_an_arena_made_anew_under_the_same_name_is_read_anew(desk: Desk) -> None:
    desk.gate.set()
    assert desk.await_outcome(desk.submit("a")).committed
    arena_file(desk.folder, "r1", 0).unlink()
    assert desk.await_outcome(desk.submit("b", step=2)).committed
    check_committed(desk.save_dir, "b")


def test_work_that_was_dropped_at_the_end_is_not_answered(desk: Desk) -> None:
    """The trainer's next agent does it."""
    first = desk.submit("a")
    wait_until(lambda: desk.running, "the write")
    second = desk.submit("b", step=2)
    closer = threading.Thread(target=desk.work.close, args=(PATIENCE_S,))
    closer.start()
    desk.gate.set()
    closer.join(PATIENCE_S)
    assert desk.await_outcome(first).committed and not desk.outcomes(second)
    late = desk.submit("c", step=3)
    assert "ending" in desk.await_outcome(late).what


def test_a_store_without_a_url_is_named_by_its_specification(desk: Desk) -> None:
    desk.gate.set()
    place = {"driver": "file", "path": f"{desk.save_dir.parent}/by_spec/"}
    store = open_store(place)
    open_attempt(store)
    request = make_request(desk.folder, json.dumps(place), "a", save_id="r1-a")
    desk.work.submit(
        ("r1", 0), msgspec.structs.replace(request, seq=5), lambda message: desk.answers.append((0, message))
    )
    done = desk.await_outcome(5)
    assert done.committed, done.what
    check_committed(store, "a")


def test_events_never_raise(desk: Desk, tmp_path: Path) -> None:
    desk.work.event(p.Event(str(tmp_path / "file" / "x"), "COMMITTED"))
    desk.work.event(p.Event("bad://x", "COMMITTED"))
    desk.work.event(p.Event(str(desk.save_dir), "NO SUCH KIND"))
    desk.work.event(p.Event(str(desk.save_dir), "SKIPPED", 1, 2, None, {"time": 3}))
    desk.gate.set()
    assert desk.await_outcome(desk.submit("a")).committed


def test_errors_of_other_kinds_keep_their_advice() -> None:
    ending = committer.Ending.of(MocError("w", where="x", fix="f"))
    assert (ending.committed, ending.what, ending.where, ending.fix) == (False, "w", "x", "f")
