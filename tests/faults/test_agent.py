"""The node's agent as real processes, which are killed, stopped, starved and lied to."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_tools import (
    arena_file,
    can_connect,
    check_committed,
    end_agent,
    environment,
    hello,
    is_committed,
    job_folder,
    log_of,
    make_request,
    running_agent,
    spawn_agent,
    state_of,
    wait_until,
)

from moc_ckpt.errors import StorageError
from moc_ckpt.events import read_events
from moc_ckpt.persist import agent as agent_process
from moc_ckpt.persist.client import AgentClient
from moc_ckpt.persist.protocol import (
    Event,
    Hello,
    Outcome,
    Refused,
    Retention,
    Status,
    StatusRequest,
    Stop,
    Stopping,
    Welcome,
    Wire,
    decode_to_client,
    encode,
)
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
from moc_ckpt.snapshot.places import agent_lock_path, socket_path
from moc_ckpt.snapshot.slots import SlotState
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import parts_status, read_outcome
from moc_ckpt.storage.store import open_store

pytestmark = pytest.mark.faults

WAIT_S = 90.0
BIG = 192 << 20
"""Bytes whose writing takes long enough to be interrupted."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with job_folder() as made:
        yield made


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    open_attempt(open_store(path, create=True))
    return path


@contextmanager
def connected(folder: Path, *, may_start: bool = False, margin_s: float = 60.0, **who: Any) -> Iterator[AgentClient]:
    client = AgentClient(folder, hello(folder, **who), may_start=may_start, connect_s=WAIT_S, margin_s=margin_s)
    client.start()
    try:
        yield client
    finally:
        client.close(0.0)


def outcome(future: Future[Outcome]) -> Outcome:
    return future.result(WAIT_S)


def ask(folder: Path, *messages: Any) -> Any:
    """Sends messages over a connection of its own and returns the first answer; None if the agent hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(socket_path(folder)))
        for message in messages:
            sock.sendall(message if isinstance(message, bytes) else encode(message))
        return answer(sock)


def answer(sock: socket.socket) -> Any:
    head = take(sock, 4)
    return decode_to_client(take(sock, struct.unpack(">I", head)[0])) if head else None


def take(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            more = sock.recv(count - len(data))
        except ConnectionResetError:
            return b""
        if not more:
            return b""
        data += more
    return data


def status(folder: Path) -> Status:
    found = ask(folder, StatusRequest())
    assert isinstance(found, Status)
    return found


def being_written(save_dir: Path) -> list[Path]:
    return [path for path in below(save_dir) if path.parent.name == "c" and ".tmp-" in path.name]


def packs_of(save_dir: Path) -> list[Path]:
    return [path for path in below(save_dir) if path.parent.name == "packs"]


def below(folder: Path) -> list[Path]:
    """What a directory holds, also while it is being removed: rglob would raise."""
    return [Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)]


# ---- the ordinary life ----


def test_a_save_is_written_committed_and_logged(folder: Path, save_dir: Path) -> None:
    with connected(folder, may_start=True) as client:
        assert client.alive and client.agent_pid != os.getpid()
        done = outcome(client.submit(make_request(folder, save_dir, "step1", nbytes=5 << 20)))
        assert done.committed and done.stored_bytes > 5 << 20 and not done.what
        check_committed(save_dir, "step1", nbytes=5 << 20)
        client.event(Event(str(save_dir), "SNAPSHOTTED", 1, 2, None, {"bytes": 7}))
        events = wait_until(lambda: len(found := read_events(open_store(save_dir))) == 3 and found, "three events")
        by_kind = {event.event: event for event in events}
        assert by_kind["SNAPSHOTTED"].fields == {"bytes": 7}
        persisted = by_kind["PERSISTED"]
        assert (persisted.tag, persisted.step, persisted.fields["rank"]) == ("step1", 1, 0)
        assert persisted.fields["bytes"] >= 5 << 20 and persisted.fields["seconds"] > 0
        assert persisted.fields["cpu_seconds"] >= 0 and persisted.fields["gb_per_s"] > 0
        assert by_kind["COMMITTED"].fields["stored_bytes"] == done.stored_bytes
        rank = status(folder).ranks[0]
        assert (rank.done, rank.failed, rank.queued, rank.writing, rank.connected) == (1, 0, 0, 0, True)
        assert [step for step, _ in rank.steps] == [2]


def test_the_agent_is_nobodys_child_in_a_session_of_its_own_and_polite(folder: Path) -> None:
    with connected(folder, may_start=True) as client:
        pid = client.agent_pid
        assert pid is not None
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent, session, nice = int(fields[1]), int(fields[3]), int(fields[16])
        assert parent != os.getpid() and session == pid and nice >= 10
        assert os.readlink(f"/proc/{pid}/cwd") == "/"  # noqa: PTH115
        assert socket_path(folder).stat().st_mode & 0o777 == 0o600
        assert status(folder).rss < 100 << 20
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps and "tensorstore" not in maps


def test_all_ranks_of_a_node_save_at_once(folder: Path, save_dir: Path) -> None:
    world = 5
    with running_agent(folder):
        clients = [
            AgentClient(folder, hello(folder, rank=rank, world=world), may_start=False, connect_s=WAIT_S)
            for rank in range(world)
        ]
        try:
            for client in clients:
                client.start()
            for tag in ("a", "b"):
                futures = [
                    client.submit(
                        make_request(folder, save_dir, tag, save_id=f"r1-{tag}", rank=rank, world=world, nbytes=1 << 20)
                    )
                    for rank, client in reversed(list(enumerate(clients)))
                ]
                assert all(outcome(future).committed for future in futures)
                check_committed(save_dir, tag, world=world, nbytes=1 << 20)
        finally:
            for client in clients:
                client.close(0.0)


def test_a_second_agent_of_a_directory_leaves(folder: Path) -> None:
    with running_agent(folder) as first:
        second = subprocess.run(
            [sys.executable, "-m", "moc_ckpt.persist.agent", "--dir", str(folder), "--job", "test"],
            env=environment(),
            timeout=WAIT_S,
            check=False,
        )
        assert second.returncode == 0
        assert first.poll() is None and status(folder).pid == first.pid


def test_a_directory_that_is_open_to_others_is_refused(folder: Path) -> None:
    folder.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-m", "moc_ckpt.persist.agent", "--dir", str(folder), "--job", "test"],
        env=environment(),
        timeout=WAIT_S,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "not a private one" in run.stderr


def test_two_jobs_of_one_node_do_not_meet(tmp_path: Path) -> None:
    with job_folder("one") as first, job_folder("two") as second:
        for folder in (first, second):
            open_attempt(open_store(tmp_path / folder.name, create=True))
        with running_agent(first, job="one"), running_agent(second, job="two"):
            with connected(first, job="one") as a, connected(second, job="two") as b:
                done = [
                    client.submit(make_request(folder, tmp_path / folder.name, folder.name))
                    for client, folder in ((a, first), (b, second))
                ]
                assert all(outcome(future).committed for future in done)
            assert isinstance(ask(first, hello(first, job="two")), Refused)
        check_committed(tmp_path / "one", "one")
        check_committed(tmp_path / "two", "two")


def test_the_agent_leaves_when_nobody_has_come_back(folder: Path, save_dir: Path) -> None:
    with running_agent(folder, linger=1.0) as agent:
        with connected(folder) as client:
            assert outcome(client.submit(make_request(folder, save_dir, "a"))).committed
            time.sleep(1.5)
            assert agent.poll() is None, "a trainer is connected"
        assert agent.wait(WAIT_S) == 0
        assert not socket_path(folder).exists()
        assert not arena_file(folder, "r1", 0).exists(), "memory of a run that is over is given back"


def test_a_restarted_trainer_finds_the_living_agent(folder: Path, save_dir: Path) -> None:
    with running_agent(folder) as agent:
        for run in ("r1", "r2"):
            with connected(folder, run=run, may_start=True) as client:
                assert client.agent_pid == agent.pid
                assert outcome(client.submit(make_request(folder, save_dir, run, run=run))).committed


def test_stop_ends_it_after_its_work(folder: Path, save_dir: Path) -> None:
    with running_agent(folder) as agent, connected(folder) as client:
        future = client.submit(make_request(folder, save_dir, "a", nbytes=BIG))
        wait_until(lambda: being_written(save_dir), "the write to begin")
        stopping = ask(folder, Stop("test"))
        assert stopping == Stopping(agent.pid, 1)
        assert agent.wait(WAIT_S) == 0
        assert is_committed(save_dir, "a")
        assert outcome(future).committed
    check_committed(save_dir, "a", nbytes=BIG)


# ---- agents that die ----


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_agent_that_dies_in_the_middle_of_a_write_is_replaced(folder: Path, save_dir: Path, how: int) -> None:
    with connected(folder, may_start=True) as client:
        first = client.agent_pid
        assert first is not None
        future = client.submit(make_request(folder, save_dir, "big", nbytes=BIG))
        wait_until(lambda: being_written(save_dir), "the write to begin")
        os.kill(first, how)
        wait_until(lambda: state_of(first) in ("", "Z"), "the agent to end")
        store = open_store(save_dir)
        save_id = store.list_dirs("big")[0]
        assert parts_status(store, "big", save_id).done == (set() if how == signal.SIGKILL else {0})
        assert outcome(future).committed
        wait_until(lambda: client.agent_pid not in (None, first), "another agent")
        check_committed(save_dir, "big", nbytes=BIG)
        assert being_written(save_dir) == [], "what the dead agent left is gone"
        assert outcome(client.submit(make_request(folder, save_dir, "next"))).committed
        check_committed(save_dir, "next")


def test_agents_killed_at_random_moments_lose_nothing(folder: Path, save_dir: Path) -> None:
    moments = random.Random(5)
    with connected(folder, may_start=True) as client:
        for number in range(6):
            pid = wait_until(lambda: client.agent_pid, "an agent")
            future = client.submit(make_request(folder, save_dir, f"s{number}", step=number + 1, nbytes=32 << 20))
            time.sleep(moments.uniform(0, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert outcome(future).committed
            check_committed(save_dir, f"s{number}", nbytes=32 << 20)


def test_a_stale_socket_and_lock_file_are_no_obstacle(folder: Path, save_dir: Path) -> None:
    dead = spawn_agent(folder)
    dead.kill()
    dead.wait()
    assert socket_path(folder).exists() and agent_lock_path(folder).exists()
    assert not can_connect(folder)
    with connected(folder, may_start=True) as client:
        assert outcome(client.submit(make_request(folder, save_dir, "a"))).committed


def test_others_wait_for_the_agent_that_the_first_rank_starts(folder: Path, save_dir: Path) -> None:
    second = AgentClient(folder, hello(folder, rank=1, world=2), may_start=False, connect_s=0.3)
    with pytest.raises(StorageError, match=r"no agent answered within 0\.3 s"):
        second.start()
    future = second.submit(make_request(folder, save_dir, "a", save_id="r1-a", rank=1, world=2))
    with connected(folder, rank=0, world=2, may_start=True) as first:
        assert outcome(first.submit(make_request(folder, save_dir, "a", save_id="r1-a", world=2))).committed
        assert outcome(future).committed
    second.close(0.0)


def test_without_any_agent_a_request_fails_at_its_deadline(folder: Path, save_dir: Path) -> None:
    client = AgentClient(folder, hello(folder), may_start=False, connect_s=0.1, margin_s=0.5)
    with pytest.raises(StorageError):
        client.start()
    begun = time.monotonic()
    future = client.submit(make_request(folder, save_dir, "a", commit_s=0.5))
    with pytest.raises(StorageError, match=r"within 1 s how the save a ended.*not written"):
        future.result(WAIT_S)
    assert 0.9 < time.monotonic() - begun < 30
    client.close(0.0)
    with pytest.raises(StorageError, match="closed"):
        client.submit(make_request(folder, save_dir, "b")).result(1.0)


def test_a_hung_agent_fails_requests_at_the_deadline_and_reads_no_more(folder: Path, save_dir: Path) -> None:
    with running_agent(folder) as agent, connected(folder, margin_s=1.0) as client:
        request = make_request(folder, save_dir, "a", nbytes=BIG, commit_s=1.0)
        future = client.submit(request)
        wait_until(lambda: being_written(save_dir), "the write to begin")
        agent.send_signal(signal.SIGSTOP)
        with pytest.raises(StorageError, match="how the save a ended"):
            future.result(WAIT_S)
        agent.send_signal(signal.SIGCONT)
        wait_until(lambda: status(folder).ranks[0].failed, "the agent to give it up")
        assert not is_committed(save_dir, "a")
        assert outcome(client.submit(make_request(folder, save_dir, "b"))).committed


# ---- two nodes ----


def test_another_node_commits_when_the_first_agent_is_gone(save_dir: Path) -> None:
    """Rank 0's agent dies when all parts are there but nothing is committed; the other one finishes."""
    with job_folder("n0") as near, job_folder("n1") as far:
        with (
            running_agent(near, node="n0") as first,
            running_agent(far, node="n1", grace=1.0),
            connected(near, rank=0, world=2) as zero,
            connected(far, rank=1, world=2) as one,
        ):
            zero.submit(make_request(near, save_dir, "a", save_id="r1-a", world=2))
            store = open_store(save_dir)
            wait_until(lambda: parts_status(store, "a", "r1-a").done == {0}, "rank 0's part")
            first.send_signal(signal.SIGSTOP)
            future = one.submit(make_request(far, save_dir, "a", save_id="r1-a", rank=1, world=2))
            wait_until(lambda: parts_status(store, "a", "r1-a").done == {0, 1}, "all parts")
            assert not is_committed(save_dir, "a")
            first.kill()
            assert outcome(future).committed
            nodes = wait_until(
                lambda: [event.node for event in read_events(store) if event.event == "COMMITTED"], "the event"
            )
            assert nodes == ["n1"]
        check_committed(save_dir, "a", world=2)
        noted = read_outcome(store, "a", "r1-a")
        assert noted is not None and noted.committed


def test_absent_ranks_are_named_at_the_deadline_on_every_node(save_dir: Path) -> None:
    with job_folder("n0") as near, job_folder("n1") as far:
        with (
            running_agent(near, node="n0"),
            running_agent(far, node="n1"),
            connected(near, rank=0, world=4) as zero,
            connected(far, rank=2, world=4) as two,
        ):
            begun = time.monotonic()
            futures = [
                zero.submit(make_request(near, save_dir, "a", save_id="r1-a", world=4, commit_s=2.0)),
                two.submit(make_request(far, save_dir, "a", save_id="r1-a", rank=2, world=4, commit_s=2.0)),
            ]
            for future in futures:
                done = outcome(future)
                assert not done.committed
                assert "ranks 1, 3 of 4 had not written their parts" in done.what
            assert time.monotonic() - begun > 1.9
        wait_until(lambda: [e for e in read_events(open_store(save_dir)) if e.event == "FAILED"], "the event")


def test_one_ranks_failure_fails_the_save_at_once_everywhere(save_dir: Path) -> None:
    with (
        job_folder("n0") as near,
        job_folder("n1") as far,
        running_agent(near, node="n0"),
        running_agent(far, node="n1"),
        connected(near, rank=0, world=2) as zero,
        connected(far, rank=1, world=2) as one,
    ):
        begun = time.monotonic()
        first = zero.submit(make_request(near, save_dir, "a", save_id="r1-a", world=2, commit_s=600.0))
        broken = make_request(far, save_dir, "a", save_id="r1-a", rank=1, world=2, commit_s=600.0)
        os.truncate(broken.arena, 4096)
        own, others = outcome(one.submit(broken)), outcome(first)
        assert not own.committed and "the arena has 4,096 bytes" in own.what
        assert not others.committed and "rank 1 could not write its part" in others.what
        assert "the arena has 4,096 bytes" in others.what
        assert time.monotonic() - begun < WAIT_S
        wait_until(lambda: not packs_of(save_dir), "what rank 0 wrote to go")


# ---- trainers that die ----


TRAINER = """
import os, signal, socket, sys, time
from pathlib import Path
from agent_tools import arena_file, content, hello, make_request
import msgspec
from moc_ckpt.persist.protocol import encode
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
from moc_ckpt.snapshot.places import socket_path
folder, save_dir = Path(sys.argv[1]), sys.argv[2]
nbytes = 8 << 20
who = Identity(job="test", run="r1", rank=0, world=1, pid=os.getpid(), node="node0", url=None, attempt=1, created=0.0)
arena = Arena.create(arena_file(folder, "r1", 0), ArenaSpec(16 << 20, 1 << 20, 4096, 16), who)
(dense,) = arena.table.begin("dense", [("dense", nbytes, b"")], attempt=1, step=1)
(at, size), = dense.extents
arena.array[at : at + nbytes] = content("a", 0, nbytes)
arena.table.pin(arena.table.filled([dense]))
(extra,) = arena.table.begin("extra", [("extra", 9, b"")], attempt=1, step=1)
arena.write_slot(extra, bytes(9))
arena.table.filled([extra])
arena.table.begin("experts", [("expert/0/0", 4096, b"")], attempt=1, step=2)
request = make_request(folder, save_dir, "a", nbytes=nbytes, at=at, fill=False)
request = msgspec.structs.replace(
    request, seq=1, extras=[msgspec.structs.replace(request.extras[0], offset=extra.extents[0][0])]
)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(str(socket_path(folder)))
sock.sendall(encode(hello(folder)) + encode(request)[: {cut}])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("cut", [None, -1])
def test_a_trainer_that_dies_right_after_its_request(folder: Path, save_dir: Path, cut: int | None) -> None:
    """Complete: it is written and committed. Cut off: it never was. The half-filled slot is dropped either way."""
    with running_agent(folder):
        script = TRAINER.replace("{cut}", repr(cut))
        trainer = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(save_dir)], env=environment(), timeout=WAIT_S, check=False
        )
        assert trainer.returncode == -signal.SIGKILL
        if cut is None:
            wait_until(lambda: is_committed(save_dir, "a"), "the commit")
            check_committed(save_dir, "a", nbytes=8 << 20)
        wait_until(lambda: "half-filled slots" in log_of(folder), "the agent to tidy up")
        assert status(folder).ranks == []
        with Arena.open(arena_file(folder, "r1", 0)) as arena:
            assert sorted((slot.unit, slot.state) for slot in arena.table.live()) == [
                ("dense", SlotState.FILLED),
                ("extra", SlotState.FILLED),
            ]
        assert is_committed(save_dir, "a") == (cut is None)


def test_slots_of_a_living_trainer_are_left_alone(folder: Path) -> None:
    """Its connection breaks, but the process lives: it fills its slots itself."""
    with running_agent(folder):
        keeper = subprocess.Popen(
            [
                sys.executable,
                "-c",
                TRAINER.replace("[: {cut}])\nos.kill(os.getpid(), signal.SIGKILL)", "[:-1])\nsock.close()\ninput()"),
                str(folder),
                str(folder),
            ],
            env=environment(),
            stdin=subprocess.PIPE,
        )
        try:
            wait_until(lambda: "is not connected any more" in log_of(folder), "the trainer to hang up")
            time.sleep(1.5)
            with Arena.open(arena_file(folder, "r1", 0)) as arena:
                assert SlotState.FILLING in [slot.state for slot in arena.table.live()]
            (rank,) = status(folder).ranks
            assert rank.alive and not rank.connected
        finally:
            keeper.communicate(b"\n")
        wait_until(lambda: not status(folder).ranks, "the agent to see it dead")
        with Arena.open(arena_file(folder, "r1", 0)) as arena:
            assert SlotState.FILLING not in [slot.state for slot in arena.table.live()]


# ---- storage that fails ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = (
        mount
        and not subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    )
    if not made:
        pytest.skip("mounting a tmpfs takes root")
    try:
        open_attempt(open_store(place))
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_the_save_and_a_freed_one_takes_the_next(folder: Path, small_disk: Path) -> None:
    with running_agent(folder), connected(folder) as client:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(7 << 20))
        begun = time.monotonic()
        done = outcome(client.submit(make_request(folder, small_disk, "a", nbytes=2 << 20, commit_s=600.0)))
        assert not done.committed and "No space left" in done.what and "free space" in done.fix
        assert time.monotonic() - begun < WAIT_S
        wait_until(lambda: [e for e in read_events(open_store(small_disk)) if e.event == "FAILED"], "the event")
        assert packs_of(small_disk) == [], "the next save gets the room"
        filler.unlink()
        assert outcome(client.submit(make_request(folder, small_disk, "b", step=2, nbytes=2 << 20))).committed
        check_committed(small_disk, "b", nbytes=2 << 20)
        rank = status(folder).ranks[0]
        assert (rank.done, rank.failed) == (1, 1) and "No space left" in rank.error


def test_a_read_only_directory_fails_the_save_until_it_is_writable(folder: Path, small_disk: Path) -> None:
    with running_agent(folder), connected(folder) as client:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        done = outcome(client.submit(make_request(folder, small_disk, "a", commit_s=600.0)))
        assert not done.committed and "ead-only file system" in done.what and "remount" in done.fix
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        assert outcome(client.submit(make_request(folder, small_disk, "b", step=2))).committed
        check_committed(small_disk, "b")


# ---- strangers ----


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff" + bytes(100),
        struct.pack(">I", 1 << 20) + bytes(100),  # longer than a Hello may be
        struct.pack(">I", 5) + b"\x80\x04\x95\x00N",  # a pickle
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        encode(Event("/tmp", "COMMITTED")),  # before any Hello
    ],
    ids=["http", "huge", "long", "pickle", "garbage", "no hello"],
)
def test_what_is_no_message_ends_the_connection_only(folder: Path, save_dir: Path, sent: bytes) -> None:
    with running_agent(folder) as agent, connected(folder) as client:
        assert ask(folder, sent) is None
        assert "is refused" in log_of(folder)
        assert agent.poll() is None and client.alive
        assert outcome(client.submit(make_request(folder, save_dir, "a"))).committed


def test_an_oversized_message_of_a_trainer_ends_its_connection_only(folder: Path) -> None:
    with running_agent(folder) as agent, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(socket_path(folder)))
        sock.sendall(encode(hello(folder)))
        assert isinstance(answer(sock), Welcome)
        sock.sendall(struct.pack(">I", (256 << 20) + 1))
        assert sock.recv(1) == b""
        assert status(folder).pid == agent.pid


def test_requests_that_make_no_sense_are_refused_before_anything_is_touched(folder: Path, save_dir: Path) -> None:
    with running_agent(folder), connected(folder) as client:
        good = make_request(folder, save_dir, "a")
        change = msgspec.structs.replace
        pack = good.packs[0]
        bad = {
            "part of rank 1": change(good, part=change(good.part, rank=1)),
            "not in the job's directory": change(good, arena="/etc/passwd"),
            "not those of the part": change(good, packs=[]),
            "leaves the pack": change(good, packs=[change(pack, spans=[(0, 4096, 1 << 30)])]),
            "not a save id": change(good, part=change(good.part, save_id="../up")),
            "cannot be the name": change(good, part=change(good.part, tag="latest")),
            "must be positive": change(good, commit_s=0.0),
            "one process only": change(good, url="memory://x"),
        }
        for text, request in bad.items():
            done = outcome(client.submit(request))
            assert not done.committed and text in done.what, (text, done.what)
        assert open_store(save_dir).list_dirs() == ["attempts"]
        beyond = change(good, packs=[change(pack, spans=[(0, 1 << 40, 4096)])])
        assert "reads up to byte" in outcome(client.submit(beyond)).what


def test_another_user_is_refused(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("taking another user's place takes root")
    with running_agent(folder) as agent:
        # The directory alone keeps others out; here it is opened, so that the second barrier shows.
        for path, mode in ((folder.parent, 0o711), (folder, 0o711), (socket_path(folder), 0o666)):
            path.chmod(mode)
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect(sys.argv[1]);"
            "s.sendall(bytes.fromhex(sys.argv[2])); sys.stdout.write(repr(s.recv(100)))"
        )
        run = subprocess.run(
            ["/usr/bin/env", "python3", "-c", code, str(socket_path(folder)), encode(StatusRequest()).hex()],
            user=65534,
            group=65534,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            cwd="/",
        )
        assert run.stdout == "b''" or "ConnectionReset" in run.stderr or "BrokenPipe" in run.stderr, run
        assert "it is of user 65534" in log_of(folder)
        assert agent.poll() is None and status(folder).pid == agent.pid


@pytest.mark.parametrize("changes", [{"version": "0.0.0"}, {"protocol": 999, "version": "9.9"}])
def test_the_agent_makes_room_for_another_version(folder: Path, save_dir: Path, changes: dict[str, Any]) -> None:
    with running_agent(folder) as agent:
        with connected(folder) as client:
            refused = ask(folder, hello(folder, run="new", **changes))
            assert isinstance(refused, Refused) and "serves 1 trainers" in refused.reason
            assert outcome(client.submit(make_request(folder, save_dir, "a"))).committed
        wait_until(lambda: not status(folder).ranks, "the old trainer to leave")
        refused = ask(folder, hello(folder, run="new", **changes))
        assert isinstance(refused, Refused) and "makes room" in refused.reason
        assert agent.wait(WAIT_S) == 0
    with running_agent(folder) as successor:
        assert status(folder).pid == successor.pid


def test_a_hello_of_a_protocol_with_other_fields_is_understood_as_one(folder: Path) -> None:
    body = msgspec.msgpack.encode({"type": "hello", "protocol": 2, "version": "2.0", "who": "somebody"})
    with running_agent(folder) as agent:
        assert isinstance(ask(folder, struct.pack(">I", len(body)) + body), Refused)
        assert agent.wait(WAIT_S) == 0


# ---- what is left of a job ----

UNNAMED_JOB = "any.0123456789"


@contextmanager
def unnamed(**who: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The directory of a job without a name, and what its trainers say in their hello."""
    with job_folder(UNNAMED_JOB) as folder:
        yield folder, {"job": UNNAMED_JOB, **who}


def test_an_unnamed_jobs_directory_goes_with_its_agent(save_dir: Path) -> None:
    """Also if its trainer died: once the agent has removed the arena. What anybody else put there stays."""
    for step, leaves in enumerate(("nothing", "an arena", "a file"), start=1):
        with unnamed() as (folder, who), running_agent(folder, job=UNNAMED_JOB, linger=0.0) as agent:
            with connected(folder, **who) as client:
                assert outcome(client.submit(make_request(folder, save_dir, f"t{step}", step=step))).committed
                for arena in folder.glob("*.arena"):
                    arena.unlink()
                if leaves != "nothing":
                    (folder / ("r2.rank_00000.arena" if leaves == "an arena" else "mine")).touch()
            assert agent.wait(WAIT_S) == 0
            left = {item.name for item in folder.iterdir()} if folder.exists() else None
            assert left == ({"mine", "agent.log", "agent.lock"} if leaves == "a file" else None)


def test_a_named_jobs_directory_stays(folder: Path) -> None:
    """And the agent does not go before its trainer, although it need not linger."""
    with running_agent(folder, linger=0.0) as agent:
        with connected(folder):
            assert [rank.connected for rank in status(folder).ranks] == [True]
        assert agent.wait(WAIT_S) == 0 and "ending" in log_of(folder)


def test_an_arena_that_is_written_keeps_the_directory() -> None:
    with unnamed() as (folder, _):
        who = Identity(
            job=UNNAMED_JOB, run="r1", rank=0, world=1, pid=os.getpid(), node="n", url=None, attempt=1, created=0.0
        )
        arena = Arena.create(arena_file(folder, "r1", 0), ArenaSpec(1 << 20, 1 << 20, 4096, 16), who)
        try:
            with running_agent(folder, job=UNNAMED_JOB) as agent:
                assert isinstance(ask(folder, Stop(reason="test")), Stopping)
                assert agent.wait(WAIT_S) == 0
            assert arena.path.exists() and "ending: test" in log_of(folder)
        finally:
            arena.close()


def test_the_log_of_an_agent_that_failed_stays(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import wrapt\n"
        "def spoil(module):\n"
        "    module.AgentServer.run = lambda self: 1 / 0\n"
        "wrapt.register_post_import_hook(spoil, 'moc_ckpt.persist.agent_server')\n"
    )
    search = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    with unnamed() as (folder, _), running_agent(folder, job=UNNAMED_JOB, PYTHONPATH=search) as agent:
        assert agent.wait(WAIT_S) == 1
        assert "ZeroDivisionError" in log_of(folder)


def test_a_trainer_that_arrives_as_an_agent_ends(save_dir: Path) -> None:
    """Its arena is there first: either it finds no directory to put it into, or it gets an agent."""
    chance = random.Random(5)
    served = 0
    for number in range(12):
        run = f"r{number}"
        with unnamed(run=run) as (folder, who), running_agent(folder, job=UNNAMED_JOB) as agent:
            arena, wait_s = arena_file(folder, run, 0), chance.random() * 0.02
            stop = threading.Timer(chance.random() * 0.01, ask, (folder, Stop(reason="test")))
            stop.start()
            time.sleep(wait_s)
            try:
                arena.touch(exist_ok=False)
            except FileNotFoundError:
                continue
            finally:
                stop.join()
            request = make_request(folder, save_dir, f"late{number}", run=run, step=number + 1)
            with connected(folder, may_start=True, **who) as client:
                assert outcome(client.submit(request)).committed
            served += 1
            assert agent.wait(WAIT_S) == 0
            for pid in {client.agent_pid} - {None, agent.pid}:
                wait_until(lambda pid=pid: state_of(pid) in ("", "Z"), "the second agent to end")
    print(f"{served} of 12 trainers came in time")
    assert served


def test_an_arena_that_comes_at_the_last_moment_keeps_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    with unnamed() as (folder, _):
        for name in ("agent.log", "agent.log.1", "agent.lock"):
            (folder / name).touch()
        real = Path.rmdir

        def arrive(path: Path) -> None:
            arena_file(folder, "late", 0).touch()
            real(path)

        monkeypatch.setattr(Path, "rmdir", arrive)
        agent_process._remove_folder(folder)
        assert [item.name for item in folder.iterdir()] == ["late.rank_00000.arena"]


def test_a_lock_that_was_removed_keeps_nobody_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another agent ends, and removes its lock, between our opening of it and our locking it."""
    real, path = fcntl.flock, agent_lock_path(folder)

    def ends(fd: int, kind: int) -> None:
        if path.exists() and not gone:
            gone.append(path.unlink())
        real(fd, kind)

    gone: list[None] = []
    monkeypatch.setattr(fcntl, "flock", ends)
    lock = agent_process._take_lock(folder)
    assert lock is not None and gone
    try:
        assert os.path.samestat(os.fstat(lock), path.lstat())
        monkeypatch.setattr(agent_process, "_LOCK_TRIES_S", 0.1)
        assert agent_process._take_lock(folder) is None
    finally:
        os.close(lock)


# ---- what comes after a commit ----


def test_retention_spares_what_is_in_flight(folder: Path, save_dir: Path) -> None:
    """A save of the same run that nobody has finished yet stays, also for an agent that has just been started."""
    keep = Retention(keep_last=1)
    store = open_store(save_dir)
    with connected(folder, may_start=True) as client:
        # Written by "another node" and not finished: world 2, one part only.
        with job_folder("n1") as far, running_agent(far, node="n1"), connected(far, rank=1, world=2) as other:
            other.submit(make_request(far, save_dir, "slow", save_id="r1-slow", rank=1, world=2, commit_s=600.0))
            wait_until(lambda: parts_status(store, "slow", "r1-slow").done == {1}, "the part")
        for number in (1, 2, 3):
            request = make_request(folder, save_dir, f"s{number}", step=number + 1, retention=keep)
            assert outcome(client.submit(request)).committed
            there = ["attempts", "events", f"s{number}", "slow"]
            wait_until(lambda there=there: store.list_dirs() == there, "retention")
            if number == 2:
                os.kill(wait_until(lambda: client.agent_pid, "an agent"), signal.SIGKILL)
        assert parts_status(store, "slow", "r1-slow").done == {1}
    # Once the run is over, the next one's retention takes it away.
    with connected(folder, run="r2", may_start=True) as client:
        assert outcome(client.submit(make_request(folder, save_dir, "s9", step=9, run="r2", retention=keep))).committed
        wait_until(lambda: store.list_dirs() == ["attempts", "events", "s9"], "retention")


def test_hundreds_of_saves_leave_no_trace_in_the_agent(folder: Path, save_dir: Path) -> None:
    keep = Retention(keep_last=2)
    with running_agent(folder), connected(folder) as client:
        seen = []
        for number in range(300):
            request = make_request(folder, save_dir, f"s{number}", step=number + 1, nbytes=8192, retention=keep)
            assert outcome(client.submit(request)).committed
            if number in (99, 299):
                looks = []
                for _ in range(20):  # retention goes on for a moment, with files and threads of its own
                    time.sleep(0.05)
                    now = status(folder)
                    looks.append((now.rss, now.fds, len(list(Path(f"/proc/{now.pid}/task").iterdir()))))
                seen.append([min(values) for values in zip(*looks, strict=True)])
        (rss, fds, threads), (rss_after, fds_after, threads_after) = seen
        print(f"200 saves: rss {rss / 2**20:.1f} -> {rss_after / 2**20:.1f} MiB, fds {fds} -> {fds_after}")
        assert fds_after <= fds and threads_after <= threads
        assert rss_after - rss < 4 << 20


def test_the_started_agents_are_gone(folder: Path) -> None:
    """The tests' own clean-up works: no agent outlives its directory."""
    with job_folder() as made:
        with connected(made, may_start=True) as client:
            pid = client.agent_pid
        assert pid is not None and state_of(pid) not in ("", "Z")
    wait_until(lambda: state_of(pid) in ("", "Z"), "the agent to be ended")
    end_agent(pid, folder)


def test_a_hello_names_its_process(folder: Path) -> None:
    """The number that counts is the kernel's, not the one in the message."""
    with running_agent(folder), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(socket_path(folder)))
        wire = Wire(sock)
        wire.send(hello(folder, pid=1))
        sock.setblocking(True)
        assert isinstance(answer(sock), Welcome)
        assert [rank.pid for rank in status(folder).ranks] == [os.getpid()]


def test_hello_is_the_first_message_only(folder: Path) -> None:
    with running_agent(folder), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(socket_path(folder)))
        greeting: Hello = hello(folder)
        sock.sendall(encode(greeting))
        assert isinstance(answer(sock), Welcome)
        sock.sendall(encode(greeting))
        assert sock.recv(1) == b""
