"""Saving again, relaunching and rolling back: what loads is always one save, whole, and the right one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distributed import harness
from distributed.harness import ON
from distributed.pool import Pool

pytestmark = pytest.mark.distributed

ROW = "z1_bf16"


def fresh(ctx: Any, seed: int, plugin: dict[str, Any] | None = None) -> Any:
    """A new engine, as after a relaunch."""
    harness.reset()
    return harness.build(ROW, world=ctx.world, seed=seed, plugin=plugin or ON)


def loaded(ctx: Any, path: str, tag: str | None, want: dict[str, Any]) -> list[str]:
    """Load into a new engine that has trained on other data and compare."""
    engine = fresh(ctx, seed=77)
    harness.train(engine, 1, data_seed=55)
    where, _ = engine.load_checkpoint(path, tag=tag)
    assert where is not None
    return harness.differences(want, harness.snapshot(ctx, engine))


def case_same_tag_twice(ctx: Any, path: str, relaunch: bool) -> dict[str, Any]:
    engine = fresh(ctx, seed=1)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="t")
    first = _save_id(path, "t")
    if relaunch:
        engine = fresh(ctx, seed=2)
    harness.train(engine, 3, data_seed=8)
    engine.save_checkpoint(path, tag="t")
    want = harness.snapshot(ctx, engine)
    return {"same save_id": first == _save_id(path, "t"), "wrong": loaded(ctx, path, "t", want)}


def _save_id(path: str, tag: str) -> str:
    """The save_id that a manifest names, wherever it says so."""
    text = Path(path, tag, "manifest.json").read_text()
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("save_id"), str):
                found.append(value["save_id"])
            for inner in value.values():
                look(inner)

    look(json.loads(text))
    assert found, "the manifest names no save_id"
    return found[0]


@pytest.mark.parametrize("relaunch", [False, True], ids=["same run", "relaunched"])
def test_same_tag_twice(pool: Pool, ckpt_dir: str, relaunch: bool) -> None:
    for result in pool.run(4, case_same_tag_twice, path=ckpt_dir, relaunch=relaunch):
        assert result == {"same save_id": False, "wrong": []}


def case_half_written(ctx: Any, path: str) -> dict[str, Any]:
    """A relaunch finds a tag without manifest, with the parts and packs of the save that never committed."""
    engine = fresh(ctx, seed=1)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="good")
    good = harness.snapshot(ctx, engine)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="t")
    ctx.barrier()
    if ctx.rank == 0:
        Path(path, "t", "manifest.json").unlink()
        Path(path, "latest").write_text("good")
        (parts,) = Path(path, "t").glob("*/parts")
        # As if one more rank had been slow: a part of that save is missing.
        next(iter(sorted(parts.iterdir()))).unlink()
    ctx.barrier()
    engine = fresh(ctx, seed=3)
    gone = harness.attempt(engine.load_checkpoint, path, tag="t")
    engine.load_checkpoint(path)
    resumed = harness.differences(good, harness.snapshot(ctx, engine))
    harness.train(engine, 2, data_seed=9)
    engine.save_checkpoint(path, tag="t")
    want = harness.snapshot(ctx, engine)
    return {
        "gone": gone["moc"],
        "resumed": resumed,
        "wrong": loaded(ctx, path, "t", want),
        "latest": loaded(ctx, path, None, want),
    }


def test_relaunch_into_a_half_written_tag(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(4, case_half_written, path=ckpt_dir):
        assert result == {"gone": True, "resumed": [], "wrong": [], "latest": []}


def case_roll_back(ctx: Any, path: str) -> dict[str, Any]:
    """Steps 2, 4 and 6 are saved; the next run goes back to 2 and saves its own 4 over the old one."""
    engine = fresh(ctx, seed=1)
    old = {}
    for step in (2, 4, 6):
        harness.train(engine, 2)
        engine.save_checkpoint(path)
        old[step] = harness.snapshot(ctx, engine)
    engine = fresh(ctx, seed=2)
    engine.load_checkpoint(path, tag="global_step2")
    back = harness.differences(old[2], harness.snapshot(ctx, engine))
    harness.train(engine, 2, data_seed=31)
    engine.save_checkpoint(path)
    new = harness.snapshot(ctx, engine)
    latest = Path(path, "latest").read_text()
    tags = sorted(p.parent.name for p in Path(path).glob("*/manifest.json"))
    return {
        "back": back,
        "really other": bool(harness.differences(old[4], new)) or ctx.rank > 0,
        "latest": latest,
        "by latest": loaded(ctx, path, None, new),
        "by tag": loaded(ctx, path, "global_step4", new),
        "old start": loaded(ctx, path, "global_step2", old[2]),
        "old end": loaded(ctx, path, "global_step6", old[6]) if "global_step6" in tags else [],
    }


def test_roll_back_and_save_the_same_tags(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(4, case_roll_back, path=ckpt_dir):
        assert result == {
            "back": [],
            "really other": True,
            "latest": "global_step4",
            "by latest": [],
            "by tag": [],
            "old start": [],
            "old end": [],
        }


def case_retention(ctx: Any, path: str, storage: dict[str, int], steps: int) -> dict[str, Any]:
    engine = fresh(ctx, seed=1, plugin={**ON, "storage": storage})
    wants, sizes = {}, []
    for _ in range(steps):
        harness.train(engine, 1)
        engine.save_checkpoint(path)
        wants[f"global_step{engine.global_steps}"] = harness.snapshot(ctx, engine)
        ctx.barrier()
        sizes.append(sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file()))
        ctx.barrier()
    tags = sorted(p.parent.name for p in Path(path).glob("*/manifest.json"))
    directories = sorted(p.name for p in Path(path).glob("global_step*"))
    wrong = {tag: found for tag in tags if (found := loaded(ctx, path, tag, wants[tag]))}
    return {"tags": tags, "directories": directories, "wrong": wrong, "sizes": sizes}


@pytest.mark.parametrize(
    ("storage", "left"),
    [
        ({"keep_last": 2, "keep_every": 3}, [3, 6, 7]),
        ({"keep_last": 1}, [7]),
        ({}, [5, 6, 7]),
    ],
    ids=["last2 every3", "last1", "default"],
)
def test_retention(pool: Pool, ckpt_dir: str, storage: dict[str, int], left: list[int]) -> None:
    want = [f"global_step{step}" for step in left]
    for result in pool.run(4, case_retention, path=ckpt_dir, storage=storage, steps=7):
        assert result["tags"] == want
        assert result["directories"] == want
        assert result["wrong"] == {}
        if storage == {"keep_last": 1}:
            assert result["sizes"][-1] < 1.5 * result["sizes"][1], f"the directory grows: {result['sizes']}"


def case_stale_save(ctx: Any, path: str) -> dict[str, Any]:
    """The run that was rolled back behind its back comes back to life and saves: it may not publish."""
    engine = fresh(ctx, seed=1)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="one")
    zombie = engine
    harness._ENGINES.remove(zombie)  # `reset` would end it
    second = harness.build(ROW, world=ctx.world, seed=2, plugin=ON)
    second.load_checkpoint(path, tag="one")
    harness.train(second, 1, data_seed=5)
    second.save_checkpoint(path, tag="two")
    want = harness.snapshot(ctx, second)
    late = harness.attempt(zombie.save_checkpoint, path, tag="two")
    harness.discard(zombie)
    return {"raised": late["raised"], "text": late["text"], "wrong": loaded(ctx, path, None, want)}


def test_a_superseded_run_may_not_publish(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(4, case_stale_save, path=ckpt_dir):
        assert result["raised"] == "StaleAttemptError", result
        assert result["wrong"] == []


def test_directory_can_be_moved(pool: Pool, ckpt_dir: str) -> None:
    """Checkpoints hold no absolute paths."""
    pool.run(4, case_save_kept, path=f"{ckpt_dir}/a", ref=f"{ckpt_dir}/ref.pt")
    shutil.move(f"{ckpt_dir}/a", f"{ckpt_dir}/b")
    assert pool.run(4, case_load_kept, path=f"{ckpt_dir}/b", ref=f"{ckpt_dir}/ref.pt") == [[]] * 4


def case_save_kept(ctx: Any, path: str, ref: str) -> None:
    engine = fresh(ctx, seed=1)
    harness.train(engine, 2)
    engine.save_checkpoint(path)
    harness.keep(ctx, engine, ref)


def case_load_kept(ctx: Any, path: str, ref: str) -> list[str]:
    engine = fresh(ctx, seed=9)
    engine.load_checkpoint(path)
    return harness.differences_from_kept(ctx, engine, ref)
