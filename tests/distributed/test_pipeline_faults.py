"""What the pipeline does when something goes wrong: training goes on, what is committed stays, people are told."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Diary, manifest, row_experts, tags, verified, versions, written
from distributed.pool import Pool
from distributed.test_pipeline import build

pytestmark = pytest.mark.distributed

ROW = "z2_bf16"


def events(path: str) -> list[dict[str, Any]]:
    lines = [line for file in Path(path, "events").glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines if line), key=lambda event: event["time"])


def agent_of(ctx: Any, engine: Any) -> int:
    """Process id of the node's agent, which all ranks of the case share."""
    (pid,) = set(ctx.gather(engine.moc.pipeline.host.agent.agent_pid))
    return int(pid)


def automatic(path: str, every: int, **plugin: Any) -> dict[str, Any]:
    return {
        "k_snapshot": 1,
        "snapshot_interval": 1,
        "persist_interval": every,
        "save_dir": path,
        "storage": {"keep_last": 0},
        **plugin,
    }


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ the agent


def case_agent_killed(ctx: Any, path: str, when: str) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    expected = harness.train(build(ctx, ROW, None, save_mode="durable"), 10)
    engine = build(ctx, ROW, None, **automatic(diary.path, 2, host={"linger_s": 3.0, "on_busy": "wait"}))
    losses: list[str] = []
    first = agent_of(ctx, engine)
    for step in range(1, 11):
        if step == 4 and when == "between":
            engine.moc.wait()
        losses += harness.train(engine, 1)
        diary.note(engine, attempt=1)
        if step == 4 and ctx.rank == 0:
            os.kill(first, signal.SIGKILL)
    engine.moc.wait()
    second = agent_of(ctx, engine)
    wrong = []
    other = build(ctx, ROW, None, seed=2, save_mode="durable")
    for tag in tags(diary.path):
        wrong += diary.load(other, tag)
    return {"same": losses == expected, "tags": tags(diary.path), "wrong": wrong, "agents": (first, second)}


@pytest.mark.parametrize("when", ["between", "during"])
def test_a_killed_agent_is_replaced(pool: Pool, tmp_path: Path, when: str) -> None:
    for answer in pool.run(4, case_agent_killed, path=str(tmp_path), when=when, deadline=DEADLINE):
        assert answer["same"]
        assert answer["wrong"] == []
        assert answer["tags"] == sorted(f"global_step{step}" for step in (2, 4, 6, 8, 10))
        assert answer["agents"][0] != answer["agents"][1]


def case_slow_storage(ctx: Any, path: str) -> dict[str, Any]:
    """The agent stands still for a while: checkpoints are skipped, snapshots and training go on."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, **automatic(diary.path, 2))
    for _ in range(2):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
    engine.moc.wait()
    agent = agent_of(ctx, engine)
    ctx.barrier()
    if ctx.rank == 0:
        os.kill(agent, signal.SIGSTOP)
    ctx.barrier()
    try:
        for _ in range(12):
            harness.train(engine, 1)
            diary.note(engine, attempt=1)
        late = harness.attempt(engine.moc.wait, 0.5)
        skipped = engine.moc.pipeline.tuner.skipped
        confirmed = engine.moc.pipeline._memory.confirmed
    finally:
        ctx.barrier()
        if ctx.rank == 0:
            os.kill(agent, signal.SIGCONT)
    engine.moc.wait()
    before = tags(diary.path)
    for _ in range(4):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
        engine.moc.wait()
    after = tags(diary.path)
    # Memory has let go of what storage had pinned.
    harness.train(engine, 2)
    live = engine.moc.pipeline.host.arena.table.live()
    wrong = []
    other = build(ctx, ROW, None, seed=2, save_mode="durable")
    for tag in after[after.index("global_step4") :] if "global_step4" in after else []:
        wrong += diary.load(other, tag)
    return {
        "late": late,
        "skipped": skipped,
        "confirmed": confirmed,
        "before": before,
        "after": after,
        "states": sorted({slot.state.name for slot in live}),
        "steps": max(slot.step for slot in live) - min(slot.step for slot in live if slot.unit == "dense"),
        "wrong": wrong,
    }


def test_slow_storage_skips_checkpoints_and_nothing_else(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(4, case_slow_storage, path=str(tmp_path), deadline=DEADLINE)
    for answer in answers:
        assert answer["late"]["raised"] == "RendezvousTimeoutError"
        assert "global_step4" in answer["late"]["text"]
        assert answer["skipped"] == 5, "steps 6, 8, 10, 12, 14"
        assert answer["confirmed"] >= 12, "snapshots go on"
        assert answer["before"] == ["global_step2", "global_step4"]
        assert answer["after"] == sorted(["global_step2", "global_step4", "global_step16", "global_step18"])
        assert answer["steps"] <= 3
        assert "PERSISTING" not in answer["states"]
        assert answer["wrong"] == []
    found = [event for event in events(f"{tmp_path}/c") if event["event"] == "SKIPPED"]
    assert [event["step"] for event in found] == [6, 8, 10, 12, 14]
    assert all("still being written" in event["reason"] for event in found)


# ------------------------------------------------------------------------------------------------ storage


def case_blocked(ctx: Any, path: str) -> dict[str, Any]:
    """A file is where a checkpoint's directory must go; once it has gone, saving works again."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, **automatic(diary.path, 2, host={"linger_s": 3.0, "on_busy": "wait"}))
    obstacle = Path(diary.path, "global_step4")
    if ctx.rank == 0:
        obstacle.parent.mkdir(exist_ok=True)
        obstacle.write_text("in the way")
    ctx.barrier()
    for step in range(1, 9):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
        if step == 5:
            told = harness.attempt(engine.moc.wait)
            ctx.barrier()
            if ctx.rank == 0:
                obstacle.unlink()
    engine.moc.wait()
    again = harness.attempt(engine.moc.wait)
    wrong = []
    other = build(ctx, ROW, None, seed=2, save_mode="durable")
    for tag in tags(diary.path):
        wrong += diary.load(other, tag)
    return {"told": told, "again": again, "tags": tags(diary.path), "wrong": wrong}


def test_a_failed_checkpoint_is_told_and_the_next_one_works(pool: Pool, tmp_path: Path) -> None:
    for answer in pool.run(4, case_blocked, path=str(tmp_path), deadline=DEADLINE):
        assert answer["told"]["moc"]
        assert "global_step4" in answer["told"]["text"]
        assert answer["again"]["raised"] is None
        assert answer["tags"] == ["global_step2", "global_step6", "global_step8"]
        assert answer["wrong"] == []
    assert any(event["event"] == "FAILED" and event["tag"] == "global_step4" for event in events(f"{tmp_path}/c"))


# ------------------------------------------------------------------------------------------------ arguments


def case_other_arguments(ctx: Any, path: str, what: str) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, k_snapshot=2)
    harness.train(engine, 1)
    engine.save_checkpoint(diary.path)
    engine.moc.wait()
    harness.train(engine, 1)
    if what == "tag":
        engine.save_checkpoint(diary.path, tag=f"mine{ctx.rank // 3}")
    else:
        engine.save_checkpoint(diary.path, client_state={"bad": object()} if ctx.rank == 0 else {})
    told = harness.attempt(engine.moc.wait)
    harness.train(engine, 1)
    diary.note(engine, attempt=1)
    engine.save_checkpoint(diary.path, client_state={"epoch": 3})
    engine.moc.wait()
    other = build(ctx, ROW, None, seed=2, save_mode="durable")
    where, state = other.load_checkpoint(diary.path)
    return {"told": told, "tags": tags(diary.path), "state": state, "where": where}


@pytest.mark.parametrize("what", ["tag", "client_state"])
def test_a_wrong_save_fails_alone(pool: Pool, tmp_path: Path, what: str) -> None:
    for answer in pool.run(4, case_other_arguments, path=str(tmp_path), what=what, deadline=DEADLINE):
        assert answer["told"]["moc"], answer["told"]
        assert ("other arguments" if what == "tag" else "client_state") in answer["told"]["text"]
        assert answer["tags"] == ["global_step1", "global_step3"]
        assert answer["state"] == {"epoch": 3}


def case_first_client_state(ctx: Any, path: str) -> dict[str, Any]:
    engine = build(ctx, ROW, None)
    harness.train(engine, 1)
    bad = harness.attempt(engine.save_checkpoint, path, client_state={"bad": object()} if ctx.rank == 0 else {})
    slash = harness.attempt(engine.save_checkpoint, path, tag="a/b")
    engine.save_checkpoint(path)
    engine.moc.wait()
    return {"bad": bad, "slash": slash, "tags": tags(path)}


def test_the_first_save_raises_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    for answer in pool.run(4, case_first_client_state, path=str(tmp_path / "c"), deadline=DEADLINE):
        assert answer["bad"]["raised"] == "ClientStateError"
        assert answer["slash"]["raised"] == "StorageError"
        assert answer["tags"] == ["global_step1"]


def case_budget(ctx: Any) -> dict[str, Any]:
    return harness.attempt(build, ctx, ROW, None, host={"memory_budget_gib": 1e-5}, k_snapshot=1)


def test_too_little_memory_is_refused_at_start(pool: Pool) -> None:
    for answer in pool.run(4, case_budget, deadline=DEADLINE, fresh_after=True):
        assert answer["raised"] == "ConfigError"
        assert "memory_budget_gib" in answer["text"]


# ------------------------------------------------------------------------------------------------ other calls


def case_mixed_calls(ctx: Any, path: str) -> dict[str, Any]:
    """Saves that block, saves at one step, two directories, and a restore in the middle of a run."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    beside = Diary(ctx, f"{path}/d", f"{path}/kept")
    engine = build(ctx, ROW, 1, k_snapshot=1, storage={"keep_last": 0})
    out: dict[str, Any] = {"wrong": []}

    def step(attempt: int = 1, **options: Any) -> None:
        harness.train(engine, 1, **options)
        diary.note(engine, attempt=attempt)

    step()
    engine.save_checkpoint(diary.path)
    engine.save_checkpoint(diary.path, tag="again")
    engine.save_checkpoint(beside.path)
    step()
    engine.moc.save(diary.path, full=True)
    step()
    engine.save_checkpoint(diary.path)
    step()
    engine.save_checkpoint(diary.path, exclude_frozen_parameters=True)
    step()
    engine.save_checkpoint(diary.path)
    engine.save_checkpoint(beside.path)
    step()
    out["full"] = len(written(manifest(diary.path, "global_step2")))
    # Back to step 3, and on with other data: nothing of steps 4 to 6 may come back.
    out["wrong"] += diary.load(engine, "global_step3")
    step(2, data_seed=8)
    engine.save_checkpoint(diary.path, tag="new4")
    step(2, data_seed=8)
    engine.save_checkpoint(diary.path, tag="new5")
    engine.moc.wait()
    out["new"] = sorted(set(versions(manifest(diary.path, "new5")).values()))
    out["tags"] = (tags(diary.path), tags(beside.path))
    if ctx.rank == 0:
        out["wrong"] += [problem for tag in tags(diary.path) for problem in verified(diary.path, tag)]
    other = build(ctx, ROW, None, seed=2, save_mode="durable")
    for tag in tags(diary.path):
        if tag != "global_step4":  # lacks what the model has
            out["wrong"] += [f"{tag}: {line}" for line in diary.load(other, tag)]
    for tag in tags(beside.path):
        out["wrong"] += [f"beside {tag}: {line}" for line in beside.load(other, tag)]
    return out


def test_other_saves_and_restores_in_between(pool: Pool, tmp_path: Path) -> None:
    for answer in pool.run(4, case_mixed_calls, path=str(tmp_path), deadline=2 * DEADLINE):
        assert answer["wrong"] == []
        assert answer["full"] == sum(row_experts(zoo.ROWS[ROW]))
        assert answer["tags"] == (
            ["again", "global_step1", "global_step2", "global_step3", "global_step4", "global_step5", "new4", "new5"],
            ["global_step1", "global_step5"],
        )
        assert all(version <= (1, 3) or version[0] == 2 for version in answer["new"])
