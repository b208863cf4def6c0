"""Partial checkpoints of one directory over runs that differ: world, parallelism, stage, K, selection, precision."""

from __future__ import annotations

from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.pec_tools import (
    DEADLINE,
    Cycles,
    Diary,
    build,
    everyone,
    manifest,
    tags,
    verified,
    versions,
    written,
)
from distributed.pool import Pool
from distributed.test_errors import assert_all_raised, untouched
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed


def row_of(stage: int, *ep: int, dtype: str = "bf16", experts: tuple[int, ...] = (4, 4), **more: Any) -> Row:
    """Layers of the given expert-parallel sizes, the second with two experts per token."""
    kinds = ({}, {"k": 2, "residual": True}, {})
    layers = tuple(Layer(experts=count, ep=size, **kind) for count, size, kind in zip(experts, ep, kinds, strict=False))
    return zoo.ROWS["z2_bf16"].with_model(stage=stage, layers=layers, dtype=dtype, **more)


def case_leg(
    ctx: Any, path: str, row: Row, k: Any, saves: int, number: int, plugin: dict[str, Any], load: dict[str, Any]
) -> dict[str, Any]:
    """One run: load the newest checkpoint and compare, then train and save with a partial checkpoint each step."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, k, seed=1 + number, storage={"keep_last": 0}, **plugin)
    out: dict[str, Any] = {"wrong": []}
    if number:
        harness.train(engine, 1, data_seed=90 + number)
        out["wrong"] += diary.load(engine, **load)
        out["plt"] = engine.moc.plt
        out["lost"] = [int(counts.sum()) for counts in engine.moc.ledger.lost]
    out["bodies"], out["log"] = [], []
    for _ in range(saves):
        harness.train(engine, 1)
        with harness.logged() as log:
            body = diary.save(engine)
        out["bodies"].append({"tag": body["tag"], "took": written(body), "versions": versions(body)})
        out["log"] += [text for level, text in log if level == "WARNING"]
        ctx.barrier()
        if ctx.rank == 0:
            out["wrong"] += verified(diary.path, body["tag"])
    return out


class Legs:
    """Runs one after the other on one directory; checked on the way."""

    def __init__(self, pool: Pool, path: str, experts: list[int]) -> None:
        self.pool, self.path, self.number = pool, path, 0
        self.cycles, self.waiting = Cycles(experts), dict.fromkeys(everyone(experts), 0)
        self.experts = experts
        self.plt: list[float] = []
        self.broken: list[str] = []

    def run(
        self, world: int, row: Row, k: Any, saves: int, load: dict[str, Any] | None = None, **plugin: Any
    ) -> list[dict[str, Any]]:
        """One run; returns its checkpoints, with the log's warnings in the first."""
        results = self.pool.run(
            world,
            case_leg,
            path=self.path,
            row=row,
            k=k,
            saves=saves,
            number=self.number,
            plugin=plugin,
            load=load or {},
            deadline=DEADLINE,
        )
        for rank, result in enumerate(results):
            assert result["wrong"] == [], f"run {self.number}, rank {rank}"
            assert result["bodies"] == results[0]["bodies"]
        self.plt += [results[0]["plt"]] if self.number else []
        self.number += 1
        bodies = results[0]["bodies"]
        for body in bodies:
            if plugin.get("selection", "sequential") == "sequential":
                self.broken += self.cycles.broken(body["took"], k or max(self.experts))
            for place in self.waiting:
                self.waiting[place] = 0 if place in body["took"] else self.waiting[place] + 1
        bodies[0]["log"] = results[0]["log"]
        return bodies


# ---------------------------------------------------------------------------------------------- resizing


RESIZES = [(2, (1, 2, 1)), (4, (0, 4, 2)), (2, (0, 1, 2)), (4, (2, 4, 4)), (4, (1, 2, 4))]
"""World, then ZeRO stage and expert-parallel sizes."""


@pytest.mark.parametrize(("k", "runs"), [(1, 5), (3, 2)])
def test_resize_in_the_middle_of_a_cycle(pool: Pool, ckpt_dir: str, k: int, runs: int) -> None:
    """World 4, 2 and 4 again, EP and ZeRO stage changing each time, always into one directory."""
    legs, other = Legs(pool, ckpt_dir, [4, 4]), {"scalars": False}
    first = legs.run(4, row_of(2, 2, 2), k, 3)
    assert first[0]["took"] == everyone([4, 4])
    for world, layout in RESIZES[:runs]:
        bodies = legs.run(world, row_of(*layout), k, 2, load=other)
        assert all(len(body["took"]) <= 2 * k for body in bodies), "nothing had to be saved anew"
        assert not bodies[0]["log"]
        steps = [step for body in bodies for _, step in body["versions"].values()]
        assert max(steps) - min(steps) <= 8
    assert legs.broken == []
    # The rest of this cycle and one more, and everything is from here.
    last = legs.run(4, row_of(2, 2, 2), k, 7, load=other)[-1]
    assert min(step for _, step in last["versions"].values()) > 3 + 2 * runs
    assert legs.broken == []
    assert all(0 < one < 1 for one in legs.plt)


def test_uneven_layers_resize(pool: Pool, ckpt_dir: str) -> None:
    """Layers of 2, 4 and 8 experts at K 3: one of them is saved whole, the others are not."""
    experts = (2, 4, 8)
    legs = Legs(pool, ckpt_dir, list(experts))
    legs.run(4, row_of(2, 2, 4, 4, experts=experts), 3, 3)
    legs.run(2, row_of(2, 1, 2, 2, experts=experts), 3, 2)
    last = legs.run(4, row_of(1, 2, 2, 1, experts=experts), 3, 4)[-1]
    assert legs.broken == []
    assert {place for place in last["took"] if place[0] == 0} == {(0, 0), (0, 1)}
    # First in the one cycle, last in the next one, which another world has planned.
    assert max(legs.waiting.values()) <= 2 * 3 - 1


# ------------------------------------------------------------------------------------ K, selection, on and off


def test_k_up_and_down_in_the_middle_of_a_cycle(pool: Pool, ckpt_dir: str) -> None:
    legs, row = Legs(pool, ckpt_dir, [8, 4]), row_of(2, 2, 4, experts=(8, 4))
    assert legs.run(4, row, 1, 3)[0]["took"] == everyone([8, 4])
    for k, saves in ((3, 2), (2, 1), (1, 2), (5, 3), (2, 5)):
        bodies = legs.run(4, row, k, saves)
        assert not bodies[0]["log"]
    assert legs.broken == []
    assert max(legs.waiting.values()) <= 2 * 4 - 1


def test_selection_changes_between_runs(pool: Pool, ckpt_dir: str) -> None:
    """Sequential, load-aware, full (off) and back; off means that every save is whole."""
    legs, row = Legs(pool, ckpt_dir, [4, 4]), row_of(1, 2, 2)
    legs.run(4, row, 1, 3)
    for k, saves, plugin in (
        (1, 3, {"selection": "load_aware"}),
        (1, 1, {"selection": "full"}),
        (1, 2, {}),
        (None, 1, {}),
        (2, 3, {"selection": "load_aware"}),
        (1, 4, {}),
    ):
        bodies = legs.run(4, row, k, saves, **plugin)
        off = k is None or plugin.get("selection") == "full"
        for body in bodies:
            assert len(body["took"]) == (8 if off else 2 * k), (k, plugin)
        # Within a cycle, twice that if load-aware; a change may cost what is left of the other.
        assert max(legs.waiting.values()) <= 7
    assert legs.broken == []


def case_experts(ctx: Any, path: str, row: Row, other: Row) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, 1)
    for _ in range(2):
        harness.train(engine, 1)
        diary.save(engine)
    engine = build(ctx, other, 1, seed=2)
    harness.train(engine, 1)
    ledger = [counts.tolist() for counts in engine.moc.ledger.processed]
    result = untouched(ctx, engine, lambda: engine.load_checkpoint(diary.path))
    result["ledger"] = ledger == [counts.tolist() for counts in engine.moc.ledger.processed]
    # What was refused is still there, and the new model may save beside it.
    engine.save_checkpoint(diary.path, tag="other")
    result["other"] = len(written(manifest(diary.path, "other")))
    engine = build(ctx, row, 1, seed=3)
    result["wrong"] = diary.load(engine, "global_step2") + verified(diary.path, "other")
    return result


@pytest.mark.parametrize(("one", "other"), [((4, 4), (4, 8)), ((4, 8), (2, 8))])
def test_other_numbers_of_experts_are_refused(
    pool: Pool, ckpt_dir: str, one: tuple[int, int], other: tuple[int, int]
) -> None:
    rows = (row_of(2, 2, 2, experts=one), row_of(2, 2, 2, experts=other))
    results = pool.run(4, case_experts, path=ckpt_dir, row=rows[0], other=rows[1], deadline=DEADLINE)
    changed = next(at for at in range(2) if one[at] != other[at])
    assert_all_raised(results, f"{one[changed]}", f"{other[changed]}", f"blocks.{changed}", kind="ModelMismatchError")
    for result in results:
        assert result["ledger"]
        assert result["wrong"] == []
        assert result["other"] == sum(other)


# ------------------------------------------------------------------------------- what an expert consists of


def test_stored_weights_come_and_go(pool: Pool, ckpt_dir: str) -> None:
    legs, row = Legs(pool, ckpt_dir, [4, 4]), row_of(2, 2, 4)
    legs.run(4, row, 1, 2)
    bodies = legs.run(4, row, 1, 2, save_weights="sharded")
    # Experts without stored weights cannot stand for ones with them.
    assert bodies[0]["took"] == everyone([4, 4])
    assert any("anew" in text for text in bodies[0]["log"])
    assert len(bodies[1]["took"]) == 2
    bodies = legs.run(4, row, 1, 3)
    assert [len(body["took"]) for body in bodies] == [2, 2, 2], "one tensor too many does no harm"
    legs.run(4, row, 1, 1)
    assert legs.broken == []


@pytest.mark.parametrize("disturbed", [False, True], ids=["trained", "frozen too"])
def test_precision_changes(pool: Pool, ckpt_dir: str, disturbed: bool) -> None:
    """The masters are float32 in both; what is frozen is not, and is then saved anew."""
    legs = Legs(pool, ckpt_dir, [4, 4])
    rows = {dtype: row_of(2, 2, 2, dtype=dtype, frozen=disturbed) for dtype in ("bf16", "fp32")}
    other = {"cast": True, "scalars": False}
    legs.run(4, rows["bf16"], 1, 2)
    first = legs.run(4, rows["fp32"], 1, 2, load=other)
    second = legs.run(4, rows["bf16"], 1, 2, load=other)
    assert [len(body["took"]) for body in first + second] == ([8, 2, 8, 2] if disturbed else [2, 2, 2, 2])
    legs.run(4, rows["bf16"], 1, 1, load=other)


def case_optimizer(ctx: Any, path: str, one: str, other: str) -> dict[str, Any]:
    """Another optimizer takes over the weights; its checkpoints hold its own state of every expert."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, one, 1)
    for _ in range(2):
        harness.train(engine, 1)
        diary.save(engine)
    engine = build(ctx, other, 1, seed=2)
    engine.load_checkpoint(diary.path, load_optimizer_states=False, load_lr_scheduler_states=False)
    out: dict[str, Any] = {"wrong": [], "took": []}
    for _ in range(3):
        harness.train(engine, 1)
        body = diary.save(engine)
        out["took"].append(len(written(body)))
        ctx.barrier()
        out["wrong"] += verified(diary.path, body["tag"])
    engine = build(ctx, other, 1, seed=3)
    out["wrong"] += diary.load(engine)
    return out


@pytest.mark.parametrize(
    ("one", "other"), [("z1_fp32", "z1_fp32_amsgrad"), ("z1_fp32_amsgrad", "z1_fp32"), ("z1_bf16", "z2_bf16_sgd")]
)
def test_optimizer_changes(pool: Pool, ckpt_dir: str, one: str, other: str) -> None:
    for result in pool.run(4, case_optimizer, path=ckpt_dir, one=one, other=other, deadline=DEADLINE):
        assert result == {"wrong": [], "took": [8, 2, 2]}


def only_dense(src: dict[str, Any], dst: Any) -> None:
    """A custom_load_fn that leaves the experts as they are."""
    import torch

    with torch.no_grad():
        for name, param in dst.named_parameters():
            if name in src and "deepspeed_experts" not in name:
                param.copy_(src[name].view(param.shape))


def case_taken_over(ctx: Any, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """A run begins with a part of a checkpoint: the rest of its experts' state was never in that directory."""
    row, diary = row_of(2, 2, 4), Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, 1)
    for _ in range(3):
        harness.train(engine, 1)
        diary.save(engine)
    engine = build(ctx, row, 1, seed=2)
    engine.load_checkpoint(diary.path, **options)
    harness.train(engine, 1)
    out: dict[str, Any] = {"took": [len(written(diary.save(engine, "new")))]}
    out["wrong"] = diary.load(build(ctx, row, 1, seed=3))
    engine = build(ctx, row, 1, seed=4)
    out["wrong"] += diary.load(engine)
    harness.train(engine, 1)
    out["took"].append(len(written(diary.save(engine, "newer"))))
    out["wrong"] += diary.load(build(ctx, row, 1, seed=5))
    return out


@pytest.mark.parametrize(
    "options",
    [{"custom_load_fn": only_dense}, {"load_optimizer_states": False}, {"load_module_only": True}],
    ids=lambda options: next(iter(options)),
)
def test_first_save_after_a_partial_load_is_full(pool: Pool, ckpt_dir: str, options: dict[str, Any]) -> None:
    """Older versions of the experts are not versions of what this run trains."""
    for result in pool.run(4, case_taken_over, path=ckpt_dir, options=options, deadline=DEADLINE):
        assert result == {"took": [8, 2], "wrong": []}


def case_aside(ctx: Any, path: str) -> dict[str, Any]:
    """Checkpoints set aside (save_latest=False) between the others, and one of them removed by hand."""
    import shutil
    from pathlib import Path

    row, diary = row_of(2, 2, 4), Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, 1, storage={"keep_last": 1})
    out: dict[str, Any] = {"wrong": []}
    for number in range(6):
        harness.train(engine, 1)
        diary.save(engine, f"aside{number}" if number % 2 else None, save_latest=number % 2 == 0)
        ctx.barrier()
        out["wrong"] += [line for tag in tags(diary.path) for line in verified(diary.path, tag)]
        ctx.barrier()
    out["tags"] = tags(diary.path)
    for tag in out["tags"]:
        out["wrong"] += diary.load(build(ctx, row, 1, seed=9), tag)
    ctx.barrier()
    if ctx.rank == 0:
        shutil.rmtree(Path(diary.path, "aside3"))
    ctx.barrier()
    out["without it"] = verified(diary.path, "global_step5")
    return out


def test_checkpoints_set_aside(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(4, case_aside, path=ckpt_dir, deadline=DEADLINE):
        assert result["wrong"] == []
        assert result["tags"] == ["aside1", "aside3", "aside5", "global_step5"]
        # Later ones may need it like any other.
        assert result["without it"]
        assert all("aside3" in line for line in result["without it"])


def case_small_print(ctx: Any, path: str, row: Row, k: int, saves: list[dict[str, Any]]) -> dict[str, Any]:
    """Saves before the first step and twice at one step, without frozen parameters, and after them restores."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, None, k_snapshot=k, storage={"keep_last": 0})
    out: dict[str, Any] = {"wrong": [], "took": [], "plt": []}
    for number, options in enumerate(saves):
        body = diary.save(engine, f"n{number}", **options)
        out["took"].append(len(written(body)))
        ctx.barrier()
        out["wrong"] += verified(diary.path, body["tag"])
        if number:
            harness.train(engine, 1)
    for number, options in enumerate(saves):
        engine = build(ctx, row, None, seed=2, k_snapshot=k)
        if options.get("exclude_frozen_parameters"):
            engine.load_checkpoint(diary.path, tag=f"n{number}", load_module_strict=False)
            left_out = ("weights frozen:", "weights blocks.1.moe.mlp.gain:")
            wrong = diary.wrong(engine, f"n{number}")
            out["wrong"] += [line for line in wrong if not line.startswith(left_out)]
        else:
            out["wrong"] += diary.load(engine, f"n{number}")
        out["plt"].append(engine.moc.plt)
    return out


@pytest.mark.parametrize("world", [4, 1])
def test_step_zero_and_excluded_parameters(pool: Pool, ckpt_dir: str, world: int) -> None:
    """K comes from k_snapshot here, which `auto` takes over."""
    row = row_of(2, 2, 4) if world == 4 else row_of(2, 1, 1)
    saves: list[dict[str, Any]] = [{}, {}, {"exclude_frozen_parameters": True}, {}, {}]
    for result in pool.run(world, case_small_print, path=ckpt_dir, row=row, k=2, saves=saves, deadline=DEADLINE):
        assert result["wrong"] == []
        assert result["took"] == [8, 4, 4, 4, 4]
        assert result["plt"][:2] == [0, 0]
        assert result["plt"][-1] > 0


def test_model_without_experts(pool: Pool, ckpt_dir: str) -> None:
    """K is for MoE layers; without any there is nothing to leave out, and nothing to refuse."""
    row = row_of(1).with_model(layers=(), groups=2)
    for result in pool.run(2, case_small_print, path=ckpt_dir, row=row, k=3, saves=[{}, {}, {}], deadline=DEADLINE):
        assert result == {"wrong": [], "took": [0, 0, 0], "plt": [0, 0, 0]}


def spoil(engine: Any, place: tuple[int, int]) -> None:
    """Give one expert's weights a value that is not its masters' cast, on all its replicas."""
    import torch

    names = oracle.global_names(engine.module)
    with torch.no_grad():
        for name, param in engine.module.named_parameters():
            found = oracle.set_expert_of(names[name])
            if found == (f"blocks.{place[0]}.moe.deepspeed_moe.experts.deepspeed_experts.", place[1]):
                param.add_(0.25)


def case_underived(ctx: Any, path: str, row: Row, full: bool) -> dict[str, Any]:
    """Weights that differ from their masters at one version, which later checkpoints refer to."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, 1, storage={"keep_last": 0})
    harness.train(engine, 1)
    diary.save(engine, "first")
    # Weights are compared with their masters when an engine is built and after a load.
    engine.load_checkpoint(diary.path)
    spoil(engine, (0, 2))
    spoil(engine, (1, 1))
    body = diary.save(engine, "spoilt", full=full)
    out: dict[str, Any] = {"wrong": [], "took": [written(body)]}
    out["wrong"] += diary.load(build(ctx, row, 1, seed=2), "spoilt") if full else []
    if not full:
        # Those that were not selected are as they were before.
        out["wrong"] += [
            line for line in diary.load(build(ctx, row, 1, seed=2), "spoilt") if "deepspeed_experts" not in line
        ]
    engine = build(ctx, row, 1, seed=3, storage={"keep_last": 0})
    out["wrong"] += diary.load(engine, "spoilt") if full else []
    for _ in range(6):
        harness.train(engine, 1)
        body = diary.save(engine)
        out["took"].append(written(body))
        ctx.barrier()
        out["wrong"] += verified(diary.path, body["tag"])
    for tag in tags(diary.path):
        if full or tag.startswith("global"):
            out["wrong"] += diary.load(build(ctx, row, 1, seed=9), tag)
    return out


@pytest.mark.parametrize("stage", [2, 0])
def test_weights_that_are_not_their_masters_cast(pool: Pool, ckpt_dir: str, stage: int) -> None:
    row = row_of(stage, 2, 4)
    for result in pool.run(4, case_underived, path=ckpt_dir, row=row, full=True, deadline=2 * DEADLINE):
        assert result["wrong"] == []
        assert [len(took) for took in result["took"]] == [8] + [2] * 6
