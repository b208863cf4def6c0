"""Trainers that die or end while a snapshot or a persist is under way (invariants I2, I4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import harness
from distributed.pec_tools import Diary, tags, verified
from distributed.pool import CaseHang, Pool, free_port, worker_env
from distributed.test_pipeline import build, slow_down

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROW = "w2_ep1"
WORLD = 2


@pytest.fixture(scope="module")
def victims() -> Iterator[Pool]:
    """Processes of their own: these die."""
    with Pool() as own:
        yield own


def section(path: str) -> dict[str, Any]:
    return {
        "k_snapshot": 1,
        "snapshot_interval": 1,
        "persist_interval": 2,
        "save_dir": path,
        "storage": {"keep_last": 0},
        "host": {"linger_s": 5.0},
    }


def case_killed(ctx: Any, path: str, when: str, victim: int) -> None:
    """Dies while step 4 is being copied, or while it waits for the agent."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, **section(diary.path))
    for _ in range(3):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
    engine.moc.wait()
    engine.moc.pipeline.quiesce()  # that the save has ended is known to all, so the next one is not skipped
    agent = engine.moc.pipeline.host.agent.agent_pid
    ctx.barrier()
    if when == "copy" and ctx.rank == victim:
        slow_down(30.0)
    if when == "persist" and ctx.rank == 0:
        os.kill(agent, signal.SIGSTOP)
    ctx.barrier()
    harness.train(engine, 1)
    diary.note(engine, attempt=1)
    if when == "persist":
        while any(not save.submitted for save in engine.moc.pipeline._saves):
            time.sleep(0.01)
        time.sleep(0.5)
        if ctx.rank == 0:
            Path(path, "agent").write_text(str(agent))
    Path(path, f"died{ctx.rank}").write_text("")
    ctx.barrier()
    if when == "persist" or ctx.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def case_recover(ctx: Any, path: str) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, seed=3, **section(diary.path))
    harness.train(engine, 1, data_seed=5)
    wrong = diary.load(engine)
    found = engine.global_steps
    for _ in range(4):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
        engine.moc.wait()
    other = build(ctx, ROW, None, seed=4, save_mode="durable")
    for tag in tags(diary.path):
        wrong += diary.load(other, tag)
    return {"wrong": wrong, "found": found, "tags": tags(diary.path)}


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(("when", "victim"), [("copy", 0), ("copy", 1), ("persist", 0)])
def test_a_trainer_is_killed(victims: Pool, pool: Pool, tmp_path: Path, when: str, victim: int) -> None:
    with pytest.raises(CaseHang):
        victims.run(WORLD, case_killed, path=str(tmp_path), when=when, victim=victim, deadline=45.0)
    assert (tmp_path / "died0").exists() and (tmp_path / "died1").exists(), "the case failed before its end"
    ckpt = tmp_path / "c"
    if when == "persist":
        os.kill(int((tmp_path / "agent").read_text()), signal.SIGCONT)
        # The trainers are gone; their agent finishes what it was given.
        assert wait_for((ckpt / "global_step4" / "manifest.json").exists, 60)
        assert wait_for(lambda: (ckpt / "latest").read_text() == "global_step4", 10)
    else:
        assert not (ckpt / "global_step4" / "manifest.json").exists(), "a half-copied snapshot was committed"
    for answer in pool.run(WORLD, case_recover, path=str(tmp_path)):
        assert answer["wrong"] == []
        assert answer["found"] == (4 if when == "persist" else 2)
        assert answer["tags"][0] == "global_step2"
    assert [line for tag in tags(str(ckpt)) for line in verified(str(ckpt), tag)] == []


@pytest.mark.parametrize("how", ["end", "destroy", "error", "exception"])
def test_the_end_of_a_process_waits_for_its_saves(pool: Pool, tmp_path: Path, how: str) -> None:
    path, kept = tmp_path / "c", tmp_path / "kept.pt"
    port = str(free_port())
    script = Path(__file__).with_name("exit_script.py")
    processes = []
    for rank in range(WORLD):
        env = worker_env(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        command = [sys.executable, str(script), str(path), str(kept), how]
        with (tmp_path / f"log{rank}").open("wb") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(WORLD)]
    assert codes == [{"error": 3, "exception": 1}.get(how, 0)] * WORLD, logs
    assert (path / "latest").read_text() == "global_step2", logs
    assert "FAILED" not in "".join(logs)
    for answer in pool.run(WORLD, case_compare, path=str(path), kept=str(kept)):
        assert answer == []


def case_compare(ctx: Any, path: str, kept: str) -> list[str]:
    harness.reset()
    engine = harness.build(ROW, world=ctx.world, seed=9, plugin={"enabled": True})
    harness.train(engine, 1, data_seed=3)
    engine.load_checkpoint(path)
    return harness.differences_from_kept(ctx, engine, kept)
