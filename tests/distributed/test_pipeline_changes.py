"""The pipeline when things change under way: restores, K, directories, state beside updates, engines that end."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Diary, manifest, tags, verified
from distributed.pool import Pool
from distributed.test_pipeline import build, slow_down
from distributed.zoo import Layer

pytestmark = pytest.mark.distributed

#: Deadlines that end a test, not a morning.
SHORT = {"rendezvous_s": 15.0, "commit_s": 30.0}
WAIT = {"linger_s": 3.0, "on_busy": "wait"}
MANY = zoo.ROWS["w1"].with_model(layers=(Layer(experts=16, ep=1),))


def loaded(ctx: Any, diary: Diary, row: Any, *wanted: str) -> list[str]:
    """What is wrong with checkpoints, loaded into another engine."""
    other = build(ctx, row, None, seed=2, save_mode="durable")
    harness.train(other, 2, data_seed=99)
    return [problem for tag in wanted for problem in (*diary.load(other, tag), *verified(diary.path, tag))]


# ------------------------------------------------------------------------------------------ restores and K


def case_restore_keeps_k(ctx: Any, path: str) -> dict[str, Any]:
    """`auto` sizes the arena by what is free, of which its own arena is no part after a restore."""
    from moc_ckpt.integrations.deepspeed import host

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, "z2_bf16", None, k_persist=1, snapshot_interval=1, save_dir=diary.path)
    for _ in range(2):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
    engine.save_checkpoint(diary.path)
    engine.moc.wait()
    before = engine.moc.pipeline.host.max_k, engine.moc.pipeline.host.arena.path
    plain = host.shutil.disk_usage

    class Full:
        free = 4096 if ctx.rank == 1 else 1 << 20

    host.shutil.disk_usage = lambda _: Full
    try:
        engine.load_checkpoint(diary.path)
    finally:
        host.shutil.disk_usage = plain
    for _ in range(4):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
        engine.save_checkpoint(diary.path)
    engine.moc.wait()
    after = engine.moc.pipeline.host.max_k, engine.moc.pipeline.host.arena.path
    return {"same": before == after, "wrong": loaded(ctx, diary, "z2_bf16", *tags(diary.path)[-2:])}


def test_a_restore_keeps_k_auto_and_the_arena(pool: Pool, tmp_path: Path) -> None:
    for answer in pool.run(4, case_restore_keeps_k, path=str(tmp_path), deadline=DEADLINE):
        assert answer == {"same": True, "wrong": []}


def case_no_room_to_grow(ctx: Any, path: str, how: str) -> dict[str, Any]:
    """A restore raises K beyond what memory has room for: K stays where it fits, and checkpoints go on."""
    import time

    from moc_ckpt.errors import StorageError
    from moc_ckpt.integrations.deepspeed.host import Host

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    settings = {"dynamic_k": True, "max_plt": 0.0001, "k_snapshot": 1, "snapshot_interval": 1, "persist_interval": 1}
    engine = build(
        ctx, MANY, None, save_dir=diary.path, host=WAIT, storage={"keep_last": 0}, timeouts=SHORT, **settings
    )
    pipeline = engine.moc.pipeline
    for _ in range(6):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
    plain, need_of = Host._create, Host._affordable

    def refuse(self: Any, need: Any, **kwargs: Any) -> Any:
        raise StorageError("shared memory is too small", where="/dev/shm")

    if how == "memory":
        Host._create = refuse  # type: ignore[method-assign]
    else:
        Host._affordable = lambda self, k: None  # type: ignore[method-assign]
    try:
        wrong = diary.load(engine, "global_step5")
    finally:
        Host._create, Host._affordable = plain, need_of  # type: ignore[method-assign]
    begin = time.monotonic()
    for _ in range(6):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
    engine.moc.wait()
    seconds = time.monotonic() - begin
    wanted = engine.moc.pec.snapshot_k(1)
    k = engine.moc.pec.snapshot_k(pipeline.tuner.k, pipeline.host.max_k)
    broken = pipeline._broken
    newest = [f"global_step{step}" for step in range(8, 12)]
    return {
        "wrong": wrong + loaded(ctx, diary, MANY, *newest),
        "k": (max(wanted), max(k)),
        "broken": broken,
        "quick": seconds < 10,
    }


@pytest.mark.parametrize("how", ["memory", "budget"])
def test_k_stays_where_memory_has_no_room(pool: Pool, tmp_path: Path, how: str) -> None:
    (answer,) = pool.run(1, case_no_room_to_grow, path=str(tmp_path), how=how, deadline=DEADLINE)
    assert answer["wrong"] == []
    assert answer["k"][0] > 1, "Dynamic-K asked for nothing: the case proves nothing"
    assert answer["k"][1] < answer["k"][0]
    assert answer["broken"] is None and answer["quick"]


# ------------------------------------------------------------------------------------------ stored weights


def case_weights_become_derivable(ctx: Any, path: str) -> dict[str, Any]:
    """At stage 0 in 16 bit weights are stored at first; from the first save on they are not any more."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    row = MANY.with_model(stage=0, dtype="fp16", optimizer="torch_adamw")
    engine = build(
        ctx,
        row,
        None,
        k_snapshot=1,
        k_persist=1,
        balance="none",
        snapshot_interval=1,
        timeouts=SHORT,
        storage={"keep_last": 0},
    )
    stored = len(engine.moc.underived)
    for step in range(1, 13):
        harness.train(engine, 1)
        if step % 3 == 0:
            diary.note(engine, attempt=1)
            engine.save_checkpoint(diary.path)
            engine.moc.wait()
    return {"stored": stored, "wrong": loaded(ctx, diary, row, *tags(diary.path)), "tags": tags(diary.path)}


def test_saves_after_weights_became_derivable(pool: Pool, tmp_path: Path) -> None:
    (answer,) = pool.run(1, case_weights_become_derivable, path=str(tmp_path), deadline=DEADLINE)
    assert answer["stored"], "every weight was derived from the start: the case proves nothing"
    assert answer["wrong"] == []
    assert len(answer["tags"]) == 4


# ------------------------------------------------------------------------------------------ twice at one step


def case_forward_after_snapshot(ctx: Any, path: str) -> list[str]:
    """An automatic snapshot, forward passes that move buffers, then a save at the same step: it has what is live."""
    import torch

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, "w1", None, snapshot_interval=1, save_dir=diary.path)
    harness.train(engine, 3)
    before = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for micro in range(3):
        tokens, target = zoo.batch(engine.zoo_row, step=3, micro=micro, rank=0, world=1, seed=7)
        with torch.no_grad():
            engine(tokens, target)
    assert any(not torch.equal(before[name], buffer) for name, buffer in engine.module.named_buffers())
    with torch.no_grad():
        engine.module.frozen.fill_(7.0)
    engine.save_checkpoint(diary.path)
    diary.note(engine, attempt=1)
    engine.moc.wait()
    return loaded(ctx, diary, "w1", "global_step3")


def test_a_save_after_the_steps_snapshot_has_what_is_live(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(1, case_forward_after_snapshot, path=str(tmp_path), deadline=DEADLINE) == [[]]


# ------------------------------------------------------------------------------------------ directories


def case_lower_attempt(ctx: Any, path: str) -> dict[str, Any]:
    """First a directory with many attempts, then one without: what is newer in memory is decided by the step."""
    diary, other = Diary(ctx, f"{path}/a", f"{path}/kept"), f"{path}/b"
    for _ in range(3):
        engine = build(ctx, "w1", None, save_mode="durable")
        harness.train(engine, 1)
        engine.save_checkpoint(other)
    settings = {"k_snapshot": 1, "balance": "none", "snapshot_interval": 1, "persist_interval": 6}
    engine = build(ctx, "w1", None, save_dir=diary.path, host=WAIT, storage={"keep_last": 0}, **settings)
    for step in range(1, 25):
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
        if step == 2:
            engine.save_checkpoint(other)
    engine.moc.wait()
    return {"wrong": loaded(ctx, diary, "w1", *tags(diary.path)), "tags": sorted(tags(diary.path))}


def test_a_directory_with_a_lower_attempt(pool: Pool, tmp_path: Path) -> None:
    (answer,) = pool.run(1, case_lower_attempt, path=str(tmp_path), deadline=DEADLINE)
    assert answer == {"wrong": [], "tags": sorted(f"global_step{step}" for step in (6, 12, 18, 24))}


def case_two_spellings(ctx: Any, path: str) -> dict[str, Any]:
    """One directory, named in two ways, is one."""
    engine = build(ctx, "w1", None, snapshot_interval=1, persist_interval=2, save_dir=f"{path}/c", host=WAIT)
    harness.train(engine, 3)
    engine.save_checkpoint(f"{path}/./c/")
    harness.train(engine, 3)
    engine.moc.wait()
    return {"directories": len(engine.moc.pipeline._directories), "attempt": manifest(f"{path}/c")["attempt"]}


def test_one_directory_in_two_spellings(pool: Pool, tmp_path: Path) -> None:
    (answer,) = pool.run(1, case_two_spellings, path=str(tmp_path), deadline=DEADLINE)
    assert answer == {"directories": 1, "attempt": 1}


# ------------------------------------------------------------------------------------------ measurements


def case_measured(ctx: Any, path: str) -> dict[str, Any]:
    """The storage's rate is measured, and a stall is counted once."""
    import time

    engine = build(ctx, "w1", None, snapshot_interval=1, persist_interval=1, save_dir=f"{path}/c", host=WAIT)
    harness.train(engine, 2)
    engine.moc.wait()
    pipeline = engine.moc.pipeline
    tuner, plain, spent = pipeline.tuner, pipeline.step_done, [0.0]
    tuner.take_stall()
    tuner.take_stall = lambda: 0.0

    def timed() -> None:
        begin = time.perf_counter()
        plain()
        spent[0] += time.perf_counter() - begin

    pipeline.step_done = timed
    harness.train(engine, 10)
    return {"rate": tuner.rates()["persist_rate"], "stall": tuner.stall_s / spent[0]}


def test_rates_and_stalls_are_measured(pool: Pool, tmp_path: Path) -> None:
    (answer,) = pool.run(1, case_measured, path=str(tmp_path), deadline=DEADLINE)
    assert answer["rate"] > 0
    # Copies that the update had to wait for come on top of what step_done took.
    assert 0.5 < answer["stall"] < 1.6


# ------------------------------------------------------------------------------------------ slow copies


def case_slow_copies(ctx: Any, path: str) -> dict[str, Any]:
    """Snapshots and explicit saves in turn, each while the copy before is under way: what is superseded goes."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    settings = {"k_snapshot": 2, "balance": "none", "snapshot_interval": 2, "storage": {"keep_last": 0}}
    engine = build(ctx, MANY, 1, save_dir=diary.path, timeouts=SHORT, **settings)
    undo = slow_down(0.1)
    try:
        for _ in range(24):
            harness.train(engine, 1)
            diary.note(engine, attempt=1)
            if engine.global_steps % 2 and engine.global_steps > 4:
                engine.save_checkpoint(diary.path)
        engine.moc.wait()
    finally:
        undo()
    return {"wrong": loaded(ctx, diary, MANY, *tags(diary.path)[-3:]), "saves": len(tags(diary.path))}


def test_slow_copies_do_not_fill_the_arena(pool: Pool, tmp_path: Path) -> None:
    (answer,) = pool.run(1, case_slow_copies, path=str(tmp_path), deadline=DEADLINE)
    assert answer == {"wrong": [], "saves": 10}


# ------------------------------------------------------------------------------------------ beginnings and ends


def case_a_late_vote(ctx: Any, path: str) -> dict[str, Any]:
    """A vote that broke off ends snapshots, but not saves: they block from then on."""
    from moc_ckpt.errors import RendezvousTimeoutError

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, "z2_bf16", None, snapshot_interval=1)
    harness.train(engine, 2)
    pipeline = engine.moc.pipeline
    pipeline._break(RendezvousTimeoutError("injected: ranks 1 did not take part"))
    harness.train(engine, 1)
    diary.note(engine, attempt=1)
    assert engine.save_checkpoint(diary.path) is True
    return {"wrong": loaded(ctx, diary, "z2_bf16", "global_step3")}


def test_saves_go_on_when_snapshots_have_ended(pool: Pool, tmp_path: Path) -> None:
    for answer in pool.run(4, case_a_late_vote, path=str(tmp_path), deadline=DEADLINE):
        assert answer == {"wrong": []}


def case_destroyed(ctx: Any, path: str) -> dict[str, Any]:
    """An engine that is destroyed is freed, and its unnamed job leaves nothing in shared memory."""
    shared = Path(os.environ.get("MOC_SHM_DIR") or "/dev/shm") / f"moc_ckpt-{os.getuid()}"
    before = set(shared.glob("any.*/*.arena"))
    engine = harness.build("w1", world=1, plugin={"enabled": True, "save_mode": "async", "host": {"linger_s": 3.0}})
    harness._ENGINES.clear()
    harness.train(engine, 1)
    engine.save_checkpoint(path)
    made = set(shared.glob("any.*/*.arena")) - before
    alive = weakref.ref(engine), weakref.ref(engine.module)
    engine.destroy()
    engine.moc.close()
    del engine
    gc.collect()
    return {
        "made": len(made),
        "alive": [one() is not None for one in alive],
        "left": len(set(shared.glob("any.*/*.arena")) - before),
        "committed": Path(path, "latest").exists(),
    }


def test_a_destroyed_engine_is_freed(pool: Pool, tmp_path: Path) -> None:
    (answer,) = pool.run(1, case_destroyed, path=str(tmp_path), deadline=DEADLINE)
    assert answer == {"made": 1, "alive": [False, False], "left": 0, "committed": True}


def case_failed_start(ctx: Any) -> dict[str, Any]:
    """One rank's arena does not fit: no rank leaves one behind."""
    from moc_ckpt.errors import StorageError
    from moc_ckpt.integrations.deepspeed.host import Host

    shared = Path(os.environ.get("MOC_SHM_DIR") or "/dev/shm") / f"moc_ckpt-{os.getuid()}"
    before = set(shared.glob("any.*/*.arena"))
    plain = Host._create

    def refuse(self: Any, need: Any, **kwargs: Any) -> Any:
        raise StorageError("injected: shared memory is too small")

    if ctx.rank == 1:
        Host._create = refuse  # type: ignore[method-assign]
    try:
        failed = harness.attempt(build, ctx, "w2_ep1", None)
    finally:
        Host._create = plain  # type: ignore[method-assign]
    ctx.barrier()
    return {"error": failed["text"], "left": len(set(shared.glob("any.*/*.arena")) - before)}


def test_a_failed_start_leaves_no_arena(pool: Pool) -> None:
    for answer in pool.run(2, case_failed_start, deadline=DEADLINE):
        assert "too small" in answer["error"]
        assert answer["left"] == 0


def case_rounds(ctx: Any) -> list[int]:
    """What is kept of past snapshots, after some and after many."""
    from moc_ckpt.integrations.deepspeed.background import Round

    engine = build(ctx, "w1", None, snapshot_interval=1)
    found = []
    for steps in (5, 40):
        harness.train(engine, steps)
        engine.moc.pipeline.host.votes.idle(60)
        gc.collect()
        found.append(sum(isinstance(one, Round) for one in gc.get_objects()))
    return found


def test_past_snapshots_are_forgotten(pool: Pool) -> None:
    ((few, many),) = pool.run(1, case_rounds, deadline=DEADLINE)
    assert 0 < many <= few + 1
