"""Which attempt a save belongs to, what copied directories mean, and what retention keeps of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distributed import harness
from distributed.harness import ON
from distributed.pool import Pool
from distributed.test_errors import DEADLINE
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed

ROW = Row("attempts", world=2, layers=(Layer(experts=2, ep=2),))


def build(ctx: Any, **storage: Any) -> Any:
    harness.reset()
    return harness.build(ROW, world=ctx.world, seed=1, plugin={**ON, "storage": storage})


def records(path: str) -> dict[int, tuple[int | None, int | None]]:
    """Attempt -> (parent, forked_at_step)."""
    from moc_ckpt.storage.attempts import list_attempts
    from moc_ckpt.storage.store import open_store

    return {item.attempt: (item.parent, item.forked_at_step) for item in list_attempts(open_store(path))}


def versions(path: str) -> dict[str, tuple[int, int]]:
    """Tag -> (attempt, step)."""
    from moc_ckpt.storage.checkpoint import list_checkpoints
    from moc_ckpt.storage.store import open_store

    return {item.tag: (item.attempt, item.step) for item in list_checkpoints(open_store(path)) if not item.error}


def files(path: str) -> set[str]:
    """The files of checkpoints; not the lock."""
    return {
        str(file.relative_to(path))
        for file in Path(path).rglob("*")
        if file.is_file() and file.name != "commit.lock" and "attempts" not in file.parts
    }


# ------------------------------------------------------------------------------- one run, two directories


def case_two_directories(ctx: Any, a: str, b: str) -> dict[str, Any]:
    """One run saves into both, and goes back now by one, now by the other."""
    engine = build(ctx, keep_last=0)

    def step_and_save(path: str, tag: str) -> None:
        harness.train(engine, 1, data_seed=len(tags))
        tags.append(tag)
        engine.save_checkpoint(path, tag=tag)

    tags: list[str] = []
    step_and_save(a, "a1")  # step 1
    step_and_save(b, "b2")  # step 2
    step_and_save(b, "b3")
    engine.load_checkpoint(a, tag="a1")
    step_and_save(b, "after a")  # step 2 again, another one
    engine.load_checkpoint(b, tag="b3")
    step_and_save(b, "fork")
    step_and_save(b, "fork again")
    step_and_save(a, "after b")
    engine.load_checkpoint(a, tag="a1", load_module_only=True)
    step_and_save(a, "module only")
    step_and_save(b, "after module only")
    ctx.barrier()
    return {"a": versions(a), "b": versions(b), "a attempts": records(a), "b attempts": records(b)}


def test_saves_after_a_load_open_a_new_attempt_everywhere(pool: Pool, ckpt_dir: str) -> None:
    """No two states of one directory have the same (attempt, step)."""
    for result in pool.run(2, case_two_directories, a=f"{ckpt_dir}/a", b=f"{ckpt_dir}/b", deadline=DEADLINE):
        assert result["b"] == {
            "b2": (1, 2),
            "b3": (1, 3),
            "after a": (2, 2),
            "fork": (3, 4),
            "fork again": (3, 5),
            "after module only": (4, 8),
        }
        assert result["b attempts"] == {1: (None, None), 2: (None, None), 3: (1, 3), 4: (None, None)}
        assert result["a"] == {"a1": (1, 1), "after b": (2, 6), "module only": (3, 7)}
        assert result["a attempts"] == {1: (None, None), 2: (None, None), 3: (None, None)}


# ---------------------------------------------------------------------------------------- copied checkpoints


def case_copied(ctx: Any, path: str, copy: str) -> dict[str, Any]:
    """Tag directories and `latest` of attempt 2 are copied; `attempts/` stays behind."""
    engine = build(ctx, keep_last=0)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="old")
    engine.load_checkpoint(path)
    for tag in ("x", "y"):
        harness.train(engine, 1)
        engine.save_checkpoint(path, tag=tag)
    want = harness.snapshot(ctx, engine)
    if ctx.rank == 0:
        for name in ("x", "y"):
            shutil.copytree(Path(path, name), Path(copy, name))
        shutil.copy(Path(path, "latest"), copy)
    ctx.barrier()
    engine = build(ctx, keep_last=2)
    harness.train(engine, 1, data_seed=5)
    engine.load_checkpoint(copy)
    out: dict[str, Any] = {"loaded": harness.differences(want, harness.snapshot(ctx, engine)), "tags": []}
    with harness.logged() as log:
        for tag in ("n1", "n2", "n3"):
            harness.train(engine, 1)
            engine.save_checkpoint(copy, tag=tag)
            ctx.barrier()
            out["tags"].append(sorted(versions(copy)))
            ctx.barrier()
    engine.load_checkpoint(copy, tag="n2")
    harness.train(engine, 1)
    engine.save_checkpoint(copy, tag="back")
    ctx.barrier()
    log = [text for level, text in log if level == "WARNING"]
    return {**out, "log": log, "copied": versions(path)["y"], "now": versions(copy), "attempts": records(copy)}


def test_copied_checkpoints_are_older_than_what_is_saved_beside_them(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, case_copied, path=f"{ckpt_dir}/p", copy=f"{ckpt_dir}/c", deadline=DEADLINE)
    for result in results:
        assert result["loaded"] == []
        assert result["copied"] == (2, 3)
        assert result["tags"] == [["n1", "y"], ["n1", "n2"], ["n2", "n3"]]
        assert result["now"] == {"n3": (3, 6), "back": (4, 6)}
        assert result["attempts"] == {3: (None, None), 4: (3, 5)}
    assert [text for text in results[0]["log"] if "attempt 2" in text and "copied" in text], results[0]["log"]


# ---------------------------------------------------------------------------------------------- retention


def case_aside_and_damaged(ctx: Any, aside: str, damaged: str, single: str) -> dict[str, Any]:
    out: dict[str, Any] = {"aside": [], "log": []}
    engine = build(ctx, keep_last=2)

    def save(path: str, tag: str, **kwargs: Any) -> list[str]:
        harness.train(engine, 1)
        engine.save_checkpoint(path, tag=tag, **kwargs)
        ctx.barrier()
        found = sorted(p.parent.name for p in Path(path).glob("*/manifest.json"))
        ctx.barrier()
        return found

    with harness.logged() as log:
        out["aside"] += [save(aside, "g1"), save(aside, "g2"), save(aside, "best", save_latest=False)]
        quiet = [text for _, text in log if "removed" in text]
        out["aside"] += [save(aside, "g4"), save(aside, "best", save_latest=False), save(aside, "g6")]
    out["quiet"], out["removed"] = quiet, [text for _, text in log if "removed" in text]
    harness.train(engine, 1)

    save(damaged, "d1")
    save(damaged, "d2")
    whole = Path(damaged, "d1", "manifest.json").read_bytes() if ctx.rank == 0 else b""
    before = files(damaged)
    if ctx.rank == 0:
        Path(damaged, "d1", "manifest.json").write_bytes(whole[: len(whole) // 2])
    ctx.barrier()
    with harness.logged() as log:
        save(damaged, "d3")
        save(damaged, "d4")
        out["warned"] = [text for level, text in log if level == "WARNING"]
        out["lost"] = sorted(before - files(damaged))
        ctx.barrier()
        if ctx.rank == 0:
            Path(damaged, "d1", "manifest.json").write_bytes(whole)
        ctx.barrier()
        out["repaired"] = save(damaged, "d5")

    engine = build(ctx, keep_last=1)
    engine_saves = [("g1", True), ("best", False), ("g2", True), ("g3", True), ("g4", True)]
    out["single"] = [save(single, tag, save_latest=latest) for tag, latest in engine_saves][-1]
    out["reloads"] = engine.load_checkpoint(single, tag="best")[0] is not None and engine.global_steps
    return out


def test_what_retention_keeps(pool: Pool, ckpt_dir: str) -> None:
    """Commits saved aside stay and do not count; a manifest that cannot be read blocks it, with a warning."""
    paths = {name: f"{ckpt_dir}/{name}" for name in ("aside", "damaged", "single")}
    results = pool.run(2, case_aside_and_damaged, deadline=DEADLINE, **paths)
    for result in results:
        assert result["aside"] == [
            ["g1"],
            ["g1", "g2"],
            ["best", "g1", "g2"],
            ["best", "g2", "g4"],
            ["best", "g2", "g4"],
            ["best", "g4", "g6"],
        ]
        assert result["single"] == ["best", "g4"]
        assert result["reloads"] == 2
        assert result["lost"] == []
        assert result["repaired"] == ["d4", "d5"]
    first = results[0]
    assert first["quiet"] == []
    assert ["g1" in text for text in first["removed"]] == [True, False]
    assert "g2" in first["removed"][1]
    assert len(first["warned"]) == 2
    assert all("retention" in text and "d1" in text for text in first["warned"]), first["warned"]


# ------------------------------------------------------------------------------------------------- latest


def case_latest(ctx: Any, path: str) -> dict[str, Any]:
    engine = build(ctx)
    for tag in ("one", "two"):
        harness.train(engine, 1)
        engine.save_checkpoint(path, tag=tag)
    harness.train(engine, 1)
    ctx.barrier()
    if ctx.rank == 0:
        Path(path, "latest").write_text(" \n")
    ctx.barrier()
    where, _ = engine.load_checkpoint(path)
    steps = engine.global_steps
    engine.load_checkpoint(path, tag="one")
    return {"where": where, "steps": (steps, engine.global_steps)}


def test_empty_latest_is_never_a_silent_start_from_scratch(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, case_latest, path=ckpt_dir, deadline=DEADLINE)
    # It goes by the manifests then, and says so.
    assert [Path(result["where"]).name for result in results] == ["two", "two"]
    assert [result["steps"] for result in results] == [(2, 1), (2, 1)]
