"""Save, load in another engine, go on: every loss, tensor and generator equal to the uninterrupted run (I9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.harness import ON
from distributed.pool import Pool

pytestmark = pytest.mark.distributed

BEFORE, AFTER = 5, 10


def case_exact(ctx: Any, row: str, path: str, plugin: dict[str, Any]) -> dict[str, Any]:
    """One row: with the plugin, restored with the plugin, and without the plugin."""
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    first = harness.train(engine, BEFORE)
    before = harness.snapshot(ctx, engine)
    returned = engine.save_checkpoint(path, tag="t", client_state={"pos": 17})
    disturbed = harness.differences(before, harness.snapshot(ctx, engine))
    losses = harness.train(engine, AFTER)
    end = harness.snapshot(ctx, engine)
    harness.discard(engine)
    harness.reset()

    engine = harness.build(row, world=ctx.world, seed=2, plugin=plugin)
    harness.train(engine, 2, data_seed=99)
    other = harness.differences(before, harness.snapshot(ctx, engine))
    _, client = engine.load_checkpoint(path)
    restored = harness.snapshot(ctx, engine)
    again = harness.train(engine, AFTER)
    result = {
        "returned": returned,
        "disturbed": disturbed,
        "other": bool(other),
        "client": client,
        "restored": harness.differences(before, restored),
        "first wrong loss": _first_difference(losses, again),
        "end": harness.differences(end, harness.snapshot(ctx, engine)),
    }
    harness.discard(engine)
    harness.reset()

    engine = harness.build(row, world=ctx.world, seed=1)
    result["without plugin"] = _first_difference(first + losses, harness.train(engine, BEFORE + AFTER))
    return result


def _first_difference(a: list[str], b: list[str]) -> str:
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            return f"micro-step {index}: {x} != {y}"
    return ""


def _assert_exact(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["other"], "the restored engine was not different before, so the test proves nothing"
        assert result == {
            "returned": True,
            "disturbed": [],
            "other": True,
            "client": {"pos": 17},
            "restored": [],
            "first wrong loss": "",
            "end": [],
            "without plugin": "",
        }, f"rank {rank}"


@pytest.mark.parametrize("row", sorted(zoo.ROWS))
def test_restored_run_equals_uninterrupted_run(pool: Pool, ckpt_dir: str, row: str) -> None:
    zoo.skip_unless_possible(row)
    _assert_exact(pool.run(zoo.ROWS[row].world, case_exact, row=row, path=ckpt_dir, plugin=ON))


@pytest.mark.parametrize(
    ("row", "section"),
    [
        ("z2_bf16", {"save_weights": "sharded"}),
        ("z0_bf16", {"save_weights": "sharded"}),
        ("z0_fp32", {"save_weights": "sharded"}),
    ],
)
def test_stored_weights_do_not_matter(pool: Pool, ckpt_dir: str, row: str, section: dict[str, Any]) -> None:
    _assert_exact(pool.run(4, case_exact, row=row, path=ckpt_dir, plugin={**ON, **section}))


# ------------------------------------------------------------------------- before the first step, and in place


def case_step_zero(ctx: Any, row: str, path: str) -> dict[str, Any]:
    """A checkpoint from before the first step, loaded over an engine that has trained."""
    engine = harness.build(row, world=ctx.world, seed=1, plugin=ON)
    engine.save_checkpoint(path)
    losses = harness.train(engine, 4)
    end = harness.snapshot(ctx, engine)
    harness.discard(engine)
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=1)
    native = harness.train(engine, 4)
    native_end = harness.snapshot(ctx, engine)
    harness.discard(engine)
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=2, plugin=ON)
    harness.train(engine, 3, data_seed=99)
    engine.load_checkpoint(path)
    again = harness.train(engine, 4)
    return {
        "saving disturbed": _first_difference(native, losses),
        "saving left": harness.differences(native_end, end),
        "losses": _first_difference(losses, again),
        "end": harness.differences(end, harness.snapshot(ctx, engine)),
    }


@pytest.mark.parametrize("row", ["z2_bf16", "z1_bf16_fp32acc", "z0_bf16", "z0_fp32", "z2_bf16_sgd"])
def test_checkpoint_from_before_the_first_step(pool: Pool, ckpt_dir: str, row: str) -> None:
    for rank, result in enumerate(pool.run(4, case_step_zero, row=row, path=ckpt_dir)):
        assert result == {"saving disturbed": "", "saving left": [], "losses": "", "end": []}, f"rank {rank}"


def case_roll_back(ctx: Any, row: str, path: str) -> dict[str, Any]:
    """The same engine goes back to its own checkpoint, twice, also from the middle of an accumulation."""
    engine = harness.build(row, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 3)
    engine.save_checkpoint(path, tag="t")
    at3 = harness.snapshot(ctx, engine)
    losses = harness.train(engine, 4)
    end = harness.snapshot(ctx, engine)
    out: dict[str, Any] = {"losses": [], "restored": [], "end": []}
    for _ in range(2):
        engine.load_checkpoint(path, tag="t")
        out["restored"] += harness.differences(at3, harness.snapshot(ctx, engine))
        out["losses"] += filter(None, [_first_difference(losses, harness.train(engine, 4))])
        out["end"] += harness.differences(end, harness.snapshot(ctx, engine))
    return out


@pytest.mark.parametrize("row", ["z2_bf16", "z1_bf16_fp32acc", "z0_bf16", "z0_fp32", "z2_bf16_cpu_adam"])
def test_roll_back_in_the_same_engine(pool: Pool, ckpt_dir: str, row: str) -> None:
    zoo.skip_unless_possible(row)
    for rank, result in enumerate(pool.run(4, case_roll_back, row=row, path=ckpt_dir)):
        assert result == {"losses": [], "restored": [], "end": []}, f"rank {rank}"


# --------------------------------------------------------------------------------------------- switched off


def case_native(ctx: Any, path: str, plugin: dict[str, Any] | None) -> dict[str, Any]:
    """With the plugin off, DeepSpeed's own files appear and its own loader reads them."""
    engine = harness.build("z1_bf16", world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, 2)
    returned = engine.save_checkpoint(path, client_state={"a": 1})
    whole = oracle.global_state(engine, ctx)
    harness.discard(engine)
    harness.reset()
    engine = harness.build("z1_bf16", world=ctx.world, seed=2, plugin=plugin)
    load_path, client = engine.load_checkpoint(path)
    return {
        "returned": returned,
        "moc": getattr(engine, "moc", None) is None,
        "files": sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file()),
        "load_path": str(load_path),
        "client": client["a"],
        "state": oracle.global_differences(whole, oracle.global_state(engine, ctx)),
    }


def test_off_and_absent_are_native(pool: Pool, ckpt_dir: str) -> None:
    absent = pool.run(4, case_native, path=f"{ckpt_dir}/absent", plugin=None)
    off = pool.run(4, case_native, path=f"{ckpt_dir}/off", plugin={"enabled": False})
    for one, two in zip(absent, off, strict=True):
        assert one["files"] == two["files"]
        assert not [name for name in two["files"] if "manifest" in name]
        assert any(name.endswith("mp_rank_00_model_states.pt") for name in two["files"])
        for result in (one, two):
            assert result["returned"] is True
            assert result["moc"]
            assert result["load_path"].endswith("mp_rank_00_model_states.pt")
            assert (result["client"], result["state"]) == (1, [])
