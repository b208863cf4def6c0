"""Several nodes on one machine: what is left where one is lost with its memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from agent_tools import state_of
from distributed import harness
from distributed.pec_tools import Diary, Place, everyone, manifest, row_experts, tags, verified, versions
from distributed.pool import CaseHang, Pool
from distributed.test_pipeline import build

from faults.network import Network, network, wait_for, why_not
from faults.nodes_script import ROW
from faults.test_flush import counted_reads, section, victims, warnings_of  # noqa: F401 (a fixture)
from moc_ckpt.errors import StorageError
from moc_ckpt.snapshot.arena import Arena
from moc_ckpt.snapshot.places import find_arenas, job_dir, job_key
from moc_ckpt.storage.checkpoint import LOCK
from moc_ckpt.storage.store import open_store

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

WORLD = 2
COMMITS = (4, 8)
LAST = 11


def on_node(name: str) -> None:
    os.environ["MOC_NODE"] = name


def folder_of(path: Path, node: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as there:
        there.setenv("MOC_NODE", node)
        return job_dir(job_key(path / "c"), create=False)


def case_train(ctx: Any, path: str, keep: bool) -> None:
    """Every rank on a node of its own, killed after `LAST` steps."""
    on_node("ab"[ctx.rank])
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    host = {"linger_s": 120.0, "on_busy": "wait", "keep_committed": keep}
    engine = build(ctx, ROW, 1, **section(diary.path, host=host))
    for step in range(1, LAST + 1):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
        if step in COMMITS:
            engine.moc.wait()
    engine.moc.pipeline.host.votes.idle(30)
    Path(path, f"agent{ctx.rank}").write_text(str(engine.moc.pipeline.host._folder))
    Path(path, f"died{ctx.rank}").write_text("")
    ctx.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def case_restart(ctx: Any, path: str) -> dict[str, Any]:
    """Starts the run again: rank 1 on another node, since its own is lost."""
    on_node("ac"[ctx.rank])
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    with warnings_of("moc_ckpt") as said:
        engine = build(ctx, ROW, 1, seed=3, **section(diary.path))
    body = manifest(diary.path)
    with counted_reads() as read:
        wrong = diary.load(engine)
    out = {"found": engine.global_steps, "plt": engine.moc.pec.ledger.plt, "said": said, "read": sum(read)}
    # The next saves build on it, and what they leave loads as well.
    for _ in range(4):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
    engine.moc.wait()
    other = build(ctx, ROW, None, seed=4, save_mode="durable")
    for tag in tags(diary.path):
        wrong += diary.load(other, tag)
    return {**out, "wrong": wrong, "body": body}


def steps_in(folder: Path) -> dict[Place, set[int]]:
    """The steps of every expert that the arenas of a node hold whole."""
    found: dict[Place, set[int]] = {}
    for path in find_arenas(folder):
        with Arena.open(path) as arena:
            for slot in arena.table.live():
                kind, *place = slot.unit.split("/")
                if kind == "expert" and slot.state.name in ("FILLED", "PERSISTING", "COMMITTED"):
                    found.setdefault((int(place[0]), int(place[1])), set()).add(slot.step)
    return found


def promise(body: dict[str, Any], left: dict[Place, set[int]]) -> dict[Place, int]:
    """The step at which each expert comes back, by a checkpoint and what memory is left, whole."""
    stored = {place: step for place, (_, step) in versions(body).items()}
    return {
        place: max([step, *(at for at in left.get(place, ()) if at <= body["step"])]) for place, step in stored.items()
    }


@pytest.fixture(autouse=True)
def their_memory(victims: Pool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("MOC_SHM_DIR", str(victims._shared))


@pytest.mark.parametrize("keep", [True, False], ids=["keep_committed", "plain"])
def test_experts_of_the_nodes_that_are_left(
    victims: Pool,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
) -> None:
    with pytest.raises(CaseHang):
        victims.run(WORLD, case_train, path=str(tmp_path), keep=keep, deadline=90.0, fresh_after=True)
    assert (tmp_path / "died0").exists() and (tmp_path / "died1").exists(), "the case failed before its end"
    nodes = [folder_of(tmp_path, name, monkeypatch) for name in "ab"]
    assert [Path(tmp_path, f"agent{rank}").read_text() for rank in range(WORLD)] == list(map(str, nodes))
    left, lost = (steps_in(node) for node in nodes)
    experts = everyone(row_experts(ROW))
    assert left.keys() | lost.keys() == experts and not left.keys() & lost.keys()
    for arena in nodes[1].glob("*.arena"):
        arena.unlink()

    before = manifest(str(tmp_path / "c"))
    assert before["step"] == COMMITS[-1]
    stored = {place: step for place, (_, step) in versions(before).items()}
    promised = promise(before, left)
    newer = {place for place in experts if promised[place] > stored[place]}
    if keep:
        # K is 1 of 4, so in the four steps up to the commit every expert was copied once.
        assert all(promised[place] > before["step"] - 4 for place in left)
        assert len(newer) >= len(left) - 2, "what the commit took itself cannot be newer"
    assert newer, "nothing to find out"

    answers = victims.run(WORLD, case_restart, path=str(tmp_path), fresh_after=True)
    body = answers[0]["body"]
    assert (body["tag"], body["step"]) == (before["tag"], before["step"])
    assert {place: step for place, (_, step) in versions(body).items()} == promised, answers[0]["said"]
    for answer in answers:
        assert answer["wrong"] == []
        assert answer["found"] == before["step"], answer["said"]
        assert answer["plt"] == pytest.approx(recounted_plt(body))
        assert answer["plt"] < recounted_plt(before)
    assert any("the memory of ranks 1 of 2 is not here" in line for line in answers[0]["said"]), answers[0]["said"]
    assert [line for tag in tags(str(tmp_path / "c")) for line in verified(str(tmp_path / "c"), tag)] == []


def recounted_plt(body: dict[str, Any]) -> float:
    """Equation 7 from a manifest's JSON: what earlier recoveries lost, and what a restore of it loses."""
    ledger = body["ledger"]
    lost = [sum(item["lost"][layer] for item in ledger["recoveries"]) for layer in range(len(ledger["routed"]))]
    for unit in body["units"]:
        kind, *place = unit["name"].split("/")
        if kind == "expert" and (unit["attempt"], unit["step"]) != (body["attempt"], body["step"]):
            layer, expert = map(int, place)
            learnt = ledger["processed"][layer][expert] - ledger["lost"][layer][expert]
            lost[layer] += max(0, learnt - (unit["tokens"] or 0))
    return sum(gone / total for gone, total in zip(lost, ledger["routed"], strict=True)) / len(lost)


def case_reference(ctx: Any, path: str, tag: str, steps: int) -> list[str]:
    """The losses from a checkpoint, read from storage alone."""
    engine = build(ctx, ROW, 1, seed=7, save_mode="durable")
    engine.load_checkpoint(path, tag=tag)
    return harness.train(engine, steps)


def plugin_of(net: Network, **host: Any) -> dict[str, Any]:
    more = {"on_busy": "wait", "keep_committed": True, "linger_s": 120.0, **host}
    timeouts = {"rendezvous_s": 30.0, "commit_s": 60.0, "exit_s": 30.0}
    return {"save_mode": "async", **section(str(net.folder / "c"), host=more, timeouts=timeouts)}


def started(net: Network, life: int, names: str, plugin: dict[str, Any], *more: str) -> None:
    for rank, name in enumerate(names):
        net.nodes[name].start(life, rank, net.nodes[names[0]], len(names), plugin, *more)


def alive(net: Network, life: int, names: str) -> None:
    for name in names:
        launcher = net.nodes[name].launcher
        assert launcher is not None and launcher.poll() is None, net.logs(life)


def trained(net: Network, step: int, committed: int) -> None:
    """Waits until a step is done everywhere and a checkpoint is there."""

    def there() -> bool:
        alive(net, 1, "ab")
        done = all(step_of(net, rank) >= step for rank in range(WORLD))
        return done and (net.folder / "c" / f"global_step{committed}" / "manifest.json").exists()

    wait_for(there, f"step {step} and a commit of step {committed}", 120)


def ended(net: Network, life: int, names: str) -> None:
    """Waits until the launchers have ended well."""
    for name in names:
        launcher = net.nodes[name].launcher
        assert launcher is not None and launcher.wait(120) == 0, net.logs(life)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network(tmp_path, "abc") as made:
        yield made


STEPS = 3


@pytest.mark.parametrize("how", ["killed", "partitioned"])
def test_a_node_is_lost(net: Network, pool: Pool, how: str) -> None:
    """Trainers, agent and memory of one node are gone; in `partitioned` its link first, so that nobody hears of it."""
    a, b, plugin = net.nodes["a"], net.nodes["b"], plugin_of(net)
    path = net.folder / "c"
    started(net, 1, "ab", plugin)
    trained(net, 9, COMMITS[-1])
    assert len(a.agents()) == len(b.agents()) == 1
    if how == "partitioned":
        b.link("down")
    b.kill()
    if how == "partitioned":
        # No reset reaches the other one: its trainer waits in a collective until an operator ends it.
        assert a.launcher is not None and a.launcher.poll() is None
        trainer = net.read("pid", 1, 0)
        assert state_of(trainer) not in ("", "Z"), a.log(1)
        b.link("up")
        a.kill(but=a.agents())
    else:
        assert a.launcher is not None and a.launcher.wait(60) != 0, a.log(1)
        a.kill(but=a.agents())
    assert len(a.agents()) == 1, "the agent of the node that is left lives on"
    left = steps_in(next(a.memory.iterdir()))
    b.wipe()
    before = manifest(str(path))
    promised = promise(before, left)
    assert any(promised[place] > step for place, (_, step) in versions(before).items()), "nothing to find out"

    started(net, 2, "ab", plugin, str(STEPS))
    ended(net, 2, "ab")
    for rank in range(WORLD):
        found = net.read("found", 2, rank)
        assert found["step"] == before["step"]
        assert found["wrong"] == []
        assert {place: step for place, (_, step) in versions(found["body"]).items()} == promised, found["said"]
    assert {file.name for file in (path / "events").iterdir()} == {"a.jsonl", "b.jsonl"}
    losses = [net.read("end", 2, rank)["losses"] for rank in range(WORLD)]
    assert losses == pool.run(WORLD, case_reference, path=str(path), tag=before["tag"], steps=STEPS)
    assert [line for tag in tags(str(path)) for line in verified(str(path), tag)] == []


def step_of(net: Network, rank: int) -> int:
    return int((net.read("step", 1, rank) or [0])[0])


def stopped_idle(net: Network, name: str) -> int:
    """Stops a node's agent while nothing is being written; its pid. It is the agent of rank 0."""
    (agent,) = net.nodes[name].agents()
    store = open_store(str(net.folder / "c"))
    for _ in range(30):
        wait_for(lambda: alive(net, 1, "ab") or net.read("step", 1, 0)[1] == 0, "a moment without a save", 120)
        os.kill(agent, signal.SIGSTOP)
        before = step_of(net, 0)
        wait_for(lambda before=before: alive(net, 1, "ab") or step_of(net, 0) > before, "another step", 120)
        with suppress(StorageError):
            if net.read("step", 1, 0)[1] == 0:
                with store.lock(LOCK, 1.0):  # it must not be held by a process that stands still
                    return agent
        os.kill(agent, signal.SIGCONT)
    raise AssertionError("the agent is never idle")


def uncommitted(net: Network, rank: int) -> list[Path]:
    """The parts of a rank whose saves are not committed."""
    found = (net.folder / "c").glob(f"global_step*/*/parts/rank_{rank:05d}.json")
    committed = {manifest(str(net.folder / "c"), tag)["save_id"] for tag in tags(str(net.folder / "c"))}
    return [part for part in found if part.parts[-3] not in committed]


def test_a_node_that_comes_back_late_commits_nothing(net: Network) -> None:
    """Rank 0's node freezes, cut off; the run goes on without it; then it wakes up with a whole save to commit."""
    a, b, path = net.nodes["a"], net.nodes["b"], net.folder / "c"
    plugin = plugin_of(net, on_busy="skip")
    started(net, 1, "ab", plugin)
    trained(net, 4, 4)
    # Its agent first: the next save then waits for nothing but rank 0's part.
    late = stopped_idle(net, "a")
    wait_for(lambda: alive(net, 1, "ab") or uncommitted(net, 1), "the second rank's part", 120)
    (part,) = uncommitted(net, 1)
    step = json.loads(part.read_text())["body"]["step"]
    wait_for(lambda: alive(net, 1, "ab") or step_of(net, 0) > step, "the first rank to have handed its part over", 120)
    a.signal(signal.SIGSTOP)
    a.link("down")
    b.kill(but=b.agents())
    assert not uncommitted(net, 0)
    before = manifest(str(path))
    assert 4 <= before["step"] < step

    started(net, 2, "bc", plugin, "10")
    wait_for(lambda: (path / "attempts" / "000002.json").exists() or alive(net, 2, "bc"), "the second attempt", 120)
    a.signal(signal.SIGCONT)
    log = path / "events" / "a.jsonl"

    def told_of_it() -> dict[str, dict[str, Any]]:
        found = [json.loads(line) for line in log.read_text().splitlines() if line]
        return {event["event"]: event for event in found if event["step"] == step}

    wait_for(lambda: "FAILED" in told_of_it(), "the late commit to be refused", 90)
    told = told_of_it()
    assert "attempt 1 may not publish here: the directory belongs to attempt 2" in told["FAILED"]["reason"]
    assert "PERSISTED" in told and "COMMITTED" not in told, "its part was all that was missing"
    ended(net, 2, "bc")
    assert a.agents() == [late] and state_of(net.read("pid", 1, 0)) not in ("", "Z"), "they live all the time"
    for rank in range(WORLD):
        found = net.read("found", 2, rank)
        assert (found["step"], found["wrong"]) == (before["step"], [])
    bodies = [manifest(str(path), tag) for tag in tags(str(path))]
    assert all(body["attempt"] == 2 for body in bodies if body["step"] > before["step"])
    assert not any(part.parts[-3] in json.dumps(body) for body in bodies), "a checkpoint refers to the refused save"
    assert manifest(str(path))["attempt"] == 2
    assert [line for tag in tags(str(path)) for line in verified(str(path), tag)] == []
