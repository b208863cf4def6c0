"""`moc-ckpt agent`: what a person sees of agents and arenas, as text and as JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_tools import (
    PATIENCE_S,
    arena_file,
    content,
    end_agent,
    environment,
    hello,
    is_committed,
    make_request,
    running_agent,
    wait_until,
)
from typer.testing import CliRunner

from moc_ckpt.cli.main import app
from moc_ckpt.persist.client import AgentClient
from moc_ckpt.persist.protocol import Event
from moc_ckpt.persist.survey import read_holdings
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
from moc_ckpt.snapshot.places import agent_lock_path, job_dir, job_key
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.store import open_store

MIB = 1 << 20


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    import shutil
    import uuid

    base = Path("/dev/shm") / f"mct-{uuid.uuid4().hex[:8]}"
    base.mkdir(mode=0o700)
    monkeypatch.setenv("MOC_SHM_DIR", str(base))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MOC_JOB_ID", raising=False)
    try:
        yield base
    finally:
        for lock in base.rglob("agent.lock"):
            if text := lock.read_text().strip():
                end_agent(int(text), lock.parent)
        shutil.rmtree(base)


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt"
    open_attempt(open_store(path, create=True))
    return path


def call(*words: str) -> Any:
    return CliRunner().invoke(app, ["agent", *words])


def as_json(*words: str, code: int = 0) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def make_arena(folder: Path, rank: int = 0, *, keep: bool = False) -> Arena:
    """Holds dense steps 90 (committed) and 100, experts 0-3 of step 90, 2-5 of step 100, and something half-filled."""
    who = Identity(job="job", run="r1", rank=rank, world=2, pid=os.getpid(), node="n", url=None, attempt=1, created=0.0)
    arena = Arena.create(arena_file(folder, "r1", rank), ArenaSpec(4 * MIB, 4 * MIB, MIB, 32), who)
    table = arena.table
    for step, first in ((90, 0), (100, 2)):
        dense = table.filled(table.begin("dense", [("dense", MIB, b"")], attempt=1, step=step) or [])
        names = [(f"expert/0/{expert}", 65536, b"") for expert in range(first, first + 4)]
        table.filled(table.begin("experts", names, attempt=1, step=step) or [])
        if step == 100:
            table.filled(table.begin("extra", [("extra", 4096, b"")], attempt=1, step=step) or [])
        if step == 90:
            table.unpin(table.pin(dense), committed=True)
    table.begin("dense", [("dense", MIB, b"")], attempt=1, step=110)
    return arena


def client_of(folder: Path, rank: int = 0, *, world: int = 1, may_start: bool = False) -> AgentClient:
    client = AgentClient(
        folder, hello(folder, rank=rank, world=world, job="job"), may_start=may_start, connect_s=PATIENCE_S
    )
    client.start()
    return client


def test_nothing_there_is_said_and_is_exit_status_1() -> None:
    result = call("status")
    assert result.exit_code == 1 and "no job of this user" in result.output
    assert as_json("status", code=1)["jobs"] == []
    result = call("stop")
    assert result.exit_code == 2 and "no agent lives" in result.output


def test_what_an_arena_holds_is_read_without_disturbing_it(shared_memory: Path) -> None:
    folder = job_dir("job", create=True)
    arena = make_arena(folder)
    before = arena.array.tobytes()
    code = (
        "import sys; from pathlib import Path; from moc_ckpt.persist.survey import read_holdings as r;"
        "h = r(Path(sys.argv[1])); print(h.alive, h.pid)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code, str(arena.path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert seen.stdout.split() == ["True", str(os.getpid())]
    held = read_holdings(arena.path)
    assert held.states == {"FREE": 20, "FILLING": 1, "FILLED": 10, "PERSISTING": 0, "COMMITTED": 1}
    assert (held.dense, held.experts, held.versions, held.oldest, held.newest) == ((100, 90), 6, 8, 90, 100)
    assert held.restorable == (100,)
    assert (held.run, held.rank, held.error) == ("r1", 0, "")
    assert arena.array.tobytes() == before
    arena.close()
    assert not read_holdings(arena.path).alive
    os.truncate(arena.path, 5000)
    broken = read_holdings(arena.path)
    assert "damaged or truncated" in broken.error and broken.states is None


def test_memory_whose_agent_and_trainer_are_gone_is_shown(shared_memory: Path) -> None:
    folder = job_dir("job", create=True)
    make_arena(folder).close()
    make_arena(folder, 1).close()
    broken = folder / "r0.rank_00007.arena"
    broken.touch(0o600)
    broken.write_bytes(b"no arena")
    result = call("status")
    assert result.exit_code == 1
    text = result.output
    assert "job job" in text and "no agent lives here" in text and text.count("gone") == 3
    assert "100, 90" not in text and "6 at 90 to 100" in text and "1 filling, 10 filled, 1 committed" in text
    assert "20 of 32 free" in text and "rank 7, r0.rank_00007.arena: the arena was not finished" in text
    (job,) = as_json("status", code=1)["jobs"]
    assert job["agent"] is None and job["problem"] == "no agent lives here" and job["newest_step"] == 100
    assert [rank["rank"] for rank in job["ranks"]] == [0, 1, 7]
    memory = job["ranks"][0]["memory"]
    assert (memory["oldest_expert_age_steps"], memory["dense_age_steps"]) == (10, 0)
    assert memory["dense_steps"] == [100, 90] and memory["restorable_steps"] == [100]
    assert memory["oldest_expert_age_s"] is None


def test_a_working_agent_is_shown_with_its_ranks(shared_memory: Path, save_dir: Path) -> None:
    folder = job_dir("job", create=True)
    arena = make_arena(folder)
    newest = next(slot for slot in arena.table.live() if slot.unit == "dense" and slot.step == 100)
    at = newest.extents[0][0]
    arena.array[at : at + MIB] = content("s100", 0, MIB)
    with running_agent(folder, job="job", node="node7") as agent:
        client = client_of(folder)
        for step in (90, 100):
            client.event(Event(str(save_dir), "SNAPSHOTTED", 1, step, None, {}))
        request = make_request(folder, save_dir, "s100", step=100, nbytes=MIB, at=at, fill=False)
        request = msgspec.structs.replace(request, extras=[])
        assert client.submit(request).result(PATIENCE_S).committed
        bad = make_request(folder, save_dir, "s110", step=110, nbytes=MIB, at=1 << 40, fill=False)
        assert not client.submit(bad).result(PATIENCE_S).committed
        result = call("status")
        assert result.exit_code == 0, result.output
        text = result.output
        assert f"agent {agent.pid} on node7" in text and "1 done, 1 failed" in text and "GB/s" in text
        assert "rank 0, last failure: the arena has" in text
        assert re.search(r"oldest: 10 steps, \d+ s ago", text) and "gone" not in text
        (job,) = as_json("status", "--job", "job")["jobs"]
        assert job["agent"]["pid"] == agent.pid and job["agent"]["node"] == "node7"
        assert 0 < job["agent"]["rss"] < 200 * MIB and job["agent"]["fds"] > 0
        (rank,) = job["ranks"]
        assert rank["pid"] == os.getpid() and rank["alive"] and rank["connected"]
        saves = rank["saves"]
        assert (saves["done"], saves["failed"], saves["queued"]) == (1, 1, 0)
        assert saves["last_bytes"] > MIB and saves["last_gb_per_s"] > 0 and "request reads" in saves["error"]
        assert 0 <= rank["memory"]["dense_age_s"] <= rank["memory"]["oldest_expert_age_s"] + 1 < 120
        client.close(0.0)
    arena.close()


def test_the_job_can_be_named_in_three_ways(shared_memory: Path, save_dir: Path) -> None:
    folder = job_dir(job_key(str(save_dir)), create=True)
    other = job_dir("other", create=True)
    with running_agent(folder, job=folder.name) as agent, running_agent(other, job="other"):
        for words in ([str(save_dir)], ["--job", folder.name], ["--dir", str(folder)]):
            (job,) = as_json("status", *words)["jobs"]
            assert job["agent"]["pid"] == agent.pid and job["directory"] == str(folder)
        assert len(as_json("status")["jobs"]) == 2
        twice = call("status", str(save_dir), "--job", "other")
        assert twice.exit_code == 2 and "named twice" in twice.output
        several = call("stop")
        assert several.exit_code == 2 and "name one with --job" in several.output
        assert agent.poll() is None
    for words in (["/no/such/run"], ["--job", "nobody"], ["--job", "../up"]):
        assert call("status", *words).exit_code == 2
        assert "error" in as_json("stop", *words, code=2)


def test_stop_waits_for_the_end(shared_memory: Path, save_dir: Path) -> None:
    folder = job_dir("job", create=True)
    with running_agent(folder, job="job") as agent:
        client = client_of(folder)
        future = client.submit(make_request(folder, save_dir, "a", nbytes=64 * MIB))
        wait_until(lambda: future.done() or list(save_dir.rglob("*.tmp-*")), "the write")
        told = as_json("stop", "--job", "job")
        assert told["pid"] == agent.pid and told["trainers"] == 1
        assert agent.wait(PATIENCE_S) == 0 and is_committed(save_dir, "a")
        client.close(0.0)
    assert as_json("status", code=1)["jobs"][0]["agent"] is None


def test_stop_now_cuts_the_write_off_and_the_next_agent_does_it_again(shared_memory: Path, save_dir: Path) -> None:
    folder = job_dir("job", create=True)
    client = client_of(folder, may_start=True)
    first = client.agent_pid
    future = client.submit(make_request(folder, save_dir, "a", nbytes=192 * MIB))
    wait_until(lambda: list(save_dir.rglob("*.tmp-*")), "the write")
    result = call("stop", "--now")
    assert result.exit_code == 0 and f"ended agent {first}" in result.output
    assert "1 rank of its run is still training" in result.output
    assert future.result(PATIENCE_S).committed
    assert client.agent_pid != first
    client.close(0.0)
    assert int(agent_lock_path(folder).read_text()) != first


def test_an_agent_that_does_not_end_is_reported(shared_memory: Path) -> None:
    folder = job_dir("job", create=True)
    with running_agent(folder, job="job") as agent:
        client = client_of(folder, world=2)
        client.submit(make_request(folder, folder / "nowhere", "a", world=2, commit_s=600.0))
        wait_until(lambda: as_json("status")["jobs"][0]["ranks"][0]["saves"]["committing"], "the part")
        result = call("stop", "--wait", "0.3")
        assert result.exit_code == 1 and "has not ended within 0.3 s" in result.output
        assert agent.poll() is None
        assert "ending: moc-ckpt agent stop" in call("status").output
        client.close(0.0)


def test_watch_shows_it_anew_until_it_is_interrupted(shared_memory: Path) -> None:
    folder = job_dir("job", create=True)
    make_arena(folder).close()
    leader, follower = pty.openpty()
    # Where the tests run in the background, interrupts may be ignored, which children inherit.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "moc_ckpt.cli.main", "agent", "status", "--watch"],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            env=environment(COLUMNS="150", LINES="40", TERM="xterm"),
        )
    finally:
        signal.signal(signal.SIGINT, inherited)
    os.close(follower)
    seen = b""
    end = time.monotonic() + PATIENCE_S
    try:
        while len(set(re.findall(rb"\d\d:\d\d:\d\d", seen))) < 3:
            assert time.monotonic() < end, seen
            if select.select([leader], [], [], 0.5)[0]:
                seen += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        while process.poll() is None and time.monotonic() < end:
            if select.select([leader], [], [], 0.1)[0]:
                try:
                    os.read(leader, 65536)
                except OSError:
                    break
        _, problems = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, problems
        assert b"Traceback" not in problems
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(leader)
    assert b"20 of 32 free" in seen and b"Ctrl-C ends" in seen
    assert call("status", "--watch", "--json").exit_code == 2
