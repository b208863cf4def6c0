"""The asynchronous pipeline: snapshots beside training, persisted and committed by the node agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Diary, everyone, manifest, row_experts, tags, verified, versions, written
from distributed.pool import Pool

pytestmark = pytest.mark.distributed

#: An agent must not outlive the tests for long.
ASYNC: dict[str, Any] = {"save_mode": "async", "host": {"linger_s": 3.0}}


def build(ctx: Any, row: Any, k: Any = None, *, seed: int = 1, **plugin: Any) -> Any:
    from distributed.pec_tools import build as build_engine

    section = {**ASYNC, **plugin}
    return build_engine(ctx, row, k, seed=seed, **section)


def case_explicit(ctx: Any, path: str, row: str, saves: int, k: int | None, plugin: dict[str, Any]) -> dict[str, Any]:
    """Save after every step and go on training at once; then load the newest and one from the middle elsewhere."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    plugin = {"k_snapshot": k or "auto", "storage": {"keep_last": 0}, **plugin}
    engine = build(ctx, row, k, **plugin)
    out: dict[str, Any] = {"wrong": []}
    for _ in range(saves):
        harness.train(engine, 1)
        assert engine.save_checkpoint(diary.path) is True
        diary.note(engine, attempt=1)
    # The last save is under way while its state is being overwritten.
    harness.train(engine, 3)
    engine.moc.wait()
    out["tags"] = tags(diary.path)
    out["sizes"] = [len(written(manifest(diary.path, tag))) for tag in out["tags"]]
    if ctx.rank == 0:
        out["wrong"] += [problem for tag in out["tags"] for problem in verified(diary.path, tag)]
    engine = build(ctx, row, k, seed=2, **plugin)
    harness.train(engine, 2, data_seed=99)
    out["wrong"] += diary.load(engine)
    out["wrong"] += diary.load(engine, f"global_step{saves // 2 + 1}")
    return out


EXPLICIT = [
    ("z2_bf16", None, {}),
    ("z2_bf16", 1, {}),
]


@pytest.mark.parametrize(("row", "k", "plugin"), EXPLICIT, ids=[f"{row}-{k}" for row, k, _ in EXPLICIT])
def test_saves_beside_training(pool: Pool, tmp_path: Path, row: str, k: int | None, plugin: dict[str, Any]) -> None:
    saves = 5
    answers = pool.run(
        4, case_explicit, path=str(tmp_path), row=row, saves=saves, k=k, plugin=plugin, deadline=DEADLINE
    )
    assert [problem for answer in answers for problem in answer["wrong"]] == []
    assert answers[0]["tags"] == [f"global_step{step + 1}" for step in range(saves)]
    experts = row_experts(zoo.ROWS[row])
    assert answers[0]["sizes"][0] == len(everyone(experts))
    if k is not None:
        assert answers[0]["sizes"][1:] == [sum(min(k, count) for count in experts)] * (saves - 1)


def slow_down(seconds: float) -> Any:
    """Let every snapshot's copies begin late, so that the next update comes first unless it waits; how to undo it.

    On a device it is the device that is late: the host issues copies and update at once.
    """
    import time

    import torch

    from moc_ckpt.snapshot.stager import Stager

    plain = Stager._run

    def run(self: Any, job: Any) -> None:
        if self._copier is None:
            time.sleep(seconds)
        else:
            with torch.cuda.stream(self._copier.streams[0]):
                torch.cuda._sleep(int(seconds * 1.5e9))  # cycles
        plain(self, job)

    Stager._run = run  # type: ignore[method-assign]
    return lambda: setattr(Stager, "_run", plain)


def case_every_step(
    ctx: Any, path: str, row: Any, k: int | None, steps: int, every: int, slow: float, plugin: dict[str, Any]
) -> dict[str, Any]:
    """Snapshots at every step and persists at some, without a call in the training loop; each is loaded elsewhere."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    plain = build(ctx, row, None, save_mode="durable")
    expected = harness.train(plain, steps)
    section = {
        "k_snapshot": k or "auto",
        "snapshot_interval": 1,
        "persist_interval": every,
        "save_dir": diary.path,
        "host": {"linger_s": 3.0, "on_busy": "wait"},
        "storage": {"keep_last": 0},
        **plugin,
    }
    engine = build(ctx, row, None, **section)
    out: dict[str, Any] = {"wrong": [], "losses": []}
    undo = slow_down(slow) if slow else (lambda: None)
    try:
        for _ in range(steps):
            out["losses"] += harness.train(engine, 1)
            diary.note(engine, attempt=1)
        engine.moc.wait()
    finally:
        undo()
    out["expected"], out["overflows"] = expected, engine.skipped_steps
    out["skipped"] = engine.moc.pipeline.tuner.skipped
    out["tags"] = tags(diary.path)
    out["versions"] = [len(set(versions(manifest(diary.path, tag)).values())) for tag in out["tags"]]
    if ctx.rank == 0:
        out["wrong"] += [problem for tag in out["tags"] for problem in verified(diary.path, tag)]
    engine = build(ctx, row, None, seed=2, save_mode="durable")
    harness.train(engine, 2, data_seed=99)
    for tag in out["tags"]:
        out["wrong"] += diary.load(engine, tag)
    return out


EVERY_STEP = [
    ("z2_bf16", 1, 3, 0.0, {}),
    ("z2_bf16", 1, 1, 0.4, {}),
    ("z2_bf16", None, 2, 0.4, {"balance": "none"}),
    ("z0_fp32", 2, 3, 0.4, {}),
    ("z0_bf16", 1, 3, 0.0, {"save_weights": "sharded"}),
    ("z1_bf16_fp32acc", 1, 2, 0.4, {"selection": "load_aware"}),
    ("z2_bf16_cpu_adam", 1, 2, 0.4, {"sharding": "equal"}),
    ("z2_fp16", 1, 1, 0.0, {}),
    ("z1_bf16", 2, 4, 0.0, {"host": {"linger_s": 3.0, "on_busy": "wait", "keep_committed": True}}),
]


@pytest.mark.parametrize(
    ("row", "k", "every", "slow", "plugin"),
    EVERY_STEP,
    ids=[f"{row}-{k}-{every}{'-slow' * bool(slow)}" for row, k, every, slow, _ in EVERY_STEP],
)
def test_a_snapshot_at_every_step(
    pool: Pool, tmp_path: Path, row: str, k: int | None, every: int, slow: float, plugin: dict[str, Any]
) -> None:
    steps = 8
    answers = pool.run(
        4,
        case_every_step,
        path=str(tmp_path),
        row=row,
        k=k,
        steps=steps,
        every=every,
        slow=slow,
        plugin=plugin,
        deadline=DEADLINE,
    )
    for answer in answers:
        assert answer["losses"] == answer["expected"]
    assert [problem for answer in answers for problem in answer["wrong"]] == []
    assert answers[0]["skipped"] == 0
    assert answers[0]["tags"] == [f"global_step{step}" for step in range(1, steps + 1) if step % every == 0]
    if k == 1:
        assert max(answers[0]["versions"]) > 1


def case_auto(ctx: Any, path: str, steps: int) -> dict[str, Any]:
    """Everything `auto`: what is decided from measurements is equal on all ranks, and what is saved is exact."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    section = {
        "k_snapshot": "auto",
        "snapshot_interval": "auto",
        "persist_interval": "auto",
        "mtbf_s": 3600.0,
        "save_dir": diary.path,
        "storage": {"keep_last": 0},
    }
    engine = build(ctx, "z2_bf16", None, **section)
    decided = []
    with harness.logged() as log:
        for _ in range(steps):
            harness.train(engine, 1)
            diary.note(engine, attempt=1)
            tuner = engine.moc.pipeline.tuner
            decided.append((tuner.k, tuner.snapshot_interval, tuner.persist_interval))
        engine.moc.wait()
    wrong = []
    other = build(ctx, "z2_bf16", None, seed=2, save_mode="durable")
    for tag in tags(diary.path)[-2:]:
        wrong += diary.load(other, tag)
    return {
        "decided": decided,
        "wrong": wrong,
        "tags": tags(diary.path),
        "log": [text for _, text in log],
    }


def test_auto_decides_alike_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(4, case_auto, path=str(tmp_path), steps=40, deadline=DEADLINE)
    assert all(answer["decided"] == answers[0]["decided"] for answer in answers)
    assert [problem for answer in answers for problem in answer["wrong"]] == []
    assert answers[0]["decided"][0] == ("auto", 1, 10)
    assert answers[0]["decided"][-1][0] != "auto", "nothing was decided"
    assert answers[0]["tags"]
    assert any("auto" in line for line in answers[0]["log"])


def case_dynamic_k(ctx: Any, path: str) -> dict[str, Any]:
    """A restore doubles K: the arena was made for less."""
    from distributed.pec_tools import build as build_engine

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    section = {
        **ASYNC,
        "dynamic_k": True,
        "max_plt": 0.001,
        "k_snapshot": 1,
        "snapshot_interval": 1,
        "persist_interval": 1,
        "save_dir": diary.path,
        "host": {"linger_s": 3.0, "on_busy": "wait"},
        "storage": {"keep_last": 0},
    }
    engine = build_engine(ctx, "z2_bf16", None, **section)
    for _ in range(6):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
    before = engine.moc.pipeline.host.arena.spec.experts
    wrong = diary.load(engine, "global_step5")
    raised = engine.moc.pipeline._moc.pec.snapshot_k(1)
    for _ in range(6):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
    engine.moc.wait()
    after = engine.moc.pipeline.host.arena.spec.experts
    skipped = engine.moc.pipeline.tuner.skipped
    other = build(ctx, "z2_bf16", None, seed=2, save_mode="durable")
    for tag in tags(diary.path)[-3:]:
        wrong += diary.load(other, tag)
    return {"wrong": wrong, "arena": (before, after), "k": raised, "skipped": skipped, "tags": tags(diary.path)}


def test_dynamic_k_makes_room(pool: Pool, tmp_path: Path) -> None:
    for answer in pool.run(4, case_dynamic_k, path=str(tmp_path), deadline=DEADLINE):
        assert answer["wrong"] == []
        assert max(answer["k"]) > 1
        assert answer["arena"][1] > answer["arena"][0]
        assert answer["skipped"] == 0


def case_engines(ctx: Any, path: str) -> list[int]:
    """Engines one after the other; how many process groups there are after each of them."""
    import torch.distributed as dist

    counts = []
    for number in range(3):
        engine = build(ctx, "z2_bf16", seed=number, snapshot_interval=1)
        harness.train(engine, 2)
        assert engine.save_checkpoint(f"{path}/{number}")
        engine.moc.wait()
        harness.discard(engine)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_an_engine_that_ends_takes_its_process_groups_with_it(pool: Pool, tmp_path: Path) -> None:
    """DeepSpeed keeps its own for the next engine; ours have threads and sockets."""
    for counts in pool.run(4, case_engines, path=str(tmp_path), deadline=DEADLINE):
        assert counts[1:] == counts[:1] * 2
