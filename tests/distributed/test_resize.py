"""A checkpoint of one world, expert parallelism, ZeRO stage or precision restores into another, bit by bit."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.harness import ON
from distributed.pool import Pool
from distributed.zoo import Layer

pytestmark = pytest.mark.distributed


def row_of(
    stage: int, layers: tuple[Layer, ...], *, dtype: str = "bf16", base: str = "z2_bf16", **more: Any
) -> zoo.Row:
    """A zoo row at another stage, expert parallelism or precision."""
    return zoo.ROWS[base].with_model(stage=stage, layers=layers, dtype=dtype, **more)


def uniform(ep: int) -> tuple[Layer, ...]:
    """Two MoE layers of one expert-parallel size."""
    return (Layer(ep=ep), Layer(ep=ep, k=2, residual=True))


def case_source(ctx: Any, row: zoo.Row, path: str, ref: str) -> float:
    """Train, save, keep what the oracle saw; the mean loss of the next 3 steps."""
    engine = harness.build(row, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 5)
    harness.keep(ctx, engine, ref)
    engine.save_checkpoint(path, tag="t", client_state={"epoch": 3})
    return harness.mean_loss(ctx, harness.train(engine, 3))


def case_target(
    ctx: Any, row: zoo.Row, path: str, ref: str, again: str | None, rounded: bool = False
) -> dict[str, Any]:
    """Load into another layout, compare with what the source's oracle saw, save again, train on."""
    engine = harness.build(row, world=ctx.world, seed=2, plugin=ON)
    harness.train(engine, 2, data_seed=99)
    _, client = engine.load_checkpoint(path)
    saved = harness.kept(ref)
    mine = oracle.local_state(engine)
    whole = oracle.global_state(engine, ctx)
    source = saved["locals"][0]
    out = oracle.global_differences(saved["global"], whole)
    out += oracle.weights_differ_from_masters(mine, saved["global"])
    out += _replicated_differences(mine, saved["locals"], rounded)
    for section in ("counters", "lr_scheduler"):
        if mine[section] != source[section]:
            out.append(f"{section}: {mine[section]} != {source[section]}")
    if again is not None:
        engine.save_checkpoint(again, tag="t", client_state=client)
    return {"client": client, "wrong": out[:12], "loss": harness.mean_loss(ctx, harness.train(engine, 3))}


OLD = tuple(int(part) for part in version("deepspeed").split(".")[:2]) < (0, 19)


def _replicated_differences(mine: dict[str, Any], sources: list[dict[str, Any]], rounded: bool) -> list[str]:
    """Frozen parameters and buffers: equal to what some rank of the source held under that name.

    They have no fp32 master, so on the way back from a bf16 engine they are `rounded` for good.
    """
    import torch

    out = []
    for section in ("weights", "buffers"):
        for name, tensor in mine[section].items():
            if section == "weights" and name not in mine["frozen"]:
                continue
            held = [rank[section][name] for rank in sources if name in rank[section]]
            # Older versions of DeepSpeed cast floating-point buffers to the engine's precision as well.
            if rounded and tensor.is_floating_point() and (section == "weights" or OLD):
                held = [value.to(torch.bfloat16) for value in held]
            same = [value for value in held if oracle.bits_equal(value.to(tensor.dtype), tensor)]
            if not same:
                out.append(f"{section} {name}: {tensor.flatten()[:3].tolist()} is no source rank's value")
    return out


def _check(results: list[dict[str, Any]], loss: float) -> None:
    for rank, result in enumerate(results):
        assert result["wrong"] == [], f"rank {rank}"
        assert result["client"] == {"epoch": 3}
        assert abs(result["loss"] - loss) < 0.4, f"rank {rank}: the loss went from {loss} to {result['loss']}"


SOURCE = (4, 2, 2)
TARGETS = [(4, 4, 2), (2, 1, 2), (2, 2, 1), (8, 4, 2), (1, 1, 0)]


@pytest.fixture(scope="module")
def source(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, float]:
    """One checkpoint of world 4, EP 2, ZeRO-2 for all of the matrix."""
    top = tmp_path_factory.mktemp("resize")
    path, ref = str(top / "ckpt"), str(top / "ref.pt")
    world, ep, stage = SOURCE
    losses = pool.run(world, case_source, row=row_of(stage, uniform(ep)), path=path, ref=ref)
    return path, ref, losses[0]


@pytest.mark.parametrize(("world", "ep", "stage"), TARGETS)
def test_resize_and_back(
    pool: Pool, source: tuple[str, str, float], ckpt_dir: str, world: int, ep: int, stage: int
) -> None:
    path, ref, loss = source
    there = f"{ckpt_dir}/there"
    _check(pool.run(world, case_target, row=row_of(stage, uniform(ep)), path=path, ref=ref, again=there), loss)
    back = row_of(SOURCE[2], uniform(SOURCE[1]))
    _check(pool.run(SOURCE[0], case_target, row=back, path=there, ref=ref, again=None), loss)


def test_resize_before_any_training(pool: Pool, source: tuple[str, str, float]) -> None:
    """Into a fresh engine that has no moments yet."""
    path, ref, _ = source
    assert pool.run(2, case_fresh, row=row_of(2, uniform(2)), path=path, ref=ref) == [[], []]


def case_fresh(ctx: Any, row: zoo.Row, path: str, ref: str) -> list[str]:
    engine = harness.build(row, world=ctx.world, seed=2, plugin=ON)
    engine.load_checkpoint(path)
    return oracle.global_differences(harness.kept(ref)["global"], oracle.global_state(engine, ctx))


def test_mixed_expert_parallelism(pool: Pool, ckpt_dir: str) -> None:
    """Layers of EP 1, 2 and 4 become layers of EP 2, 1 and 2 on two ranks, and come back."""
    many = (Layer(ep=2), Layer(ep=4, k=2), Layer(ep=1, residual=True))
    few = (Layer(ep=1), Layer(ep=2, k=2), Layer(ep=2, residual=True))
    ref = f"{ckpt_dir}/ref.pt"
    loss = pool.run(4, case_source, row=row_of(2, many), path=f"{ckpt_dir}/a", ref=ref)[0]
    _check(pool.run(2, case_target, row=row_of(1, few), path=f"{ckpt_dir}/a", ref=ref, again=f"{ckpt_dir}/b"), loss)
    _check(pool.run(4, case_target, row=row_of(2, many), path=f"{ckpt_dir}/b", ref=ref, again=None), loss)


def test_stages_2_1_0_2(pool: Pool, ckpt_dir: str) -> None:
    ref = f"{ckpt_dir}/ref.pt"
    loss = pool.run(4, case_source, row=row_of(2, uniform(2)), path=f"{ckpt_dir}/2", ref=ref)[0]
    old = f"{ckpt_dir}/2"
    for number, stage in enumerate((1, 0, 2)):
        new = f"{ckpt_dir}/hop{number}"
        _check(pool.run(4, case_target, row=row_of(stage, uniform(2)), path=old, ref=ref, again=new), loss)
        old = new


ACCUMULATE_FP32 = (("data_types", {"grad_accum_dtype": "fp32"}),)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"stage": 1, "config": ACCUMULATE_FP32}, {"stage": 2}),
        ({"stage": 0}, {"stage": 1, "config": ACCUMULATE_FP32}),
        ({"stage": 2, "dtype": "fp32"}, {"stage": 2}),
        ({"stage": 0, "dtype": "fp32"}, {"stage": 1}),
        (
            {"stage": 2, "zero": (("round_robin_gradients", True),)},
            {"stage": 2, "zero": (("parameter_alignment", True),)},
        ),
    ],
    ids=["z1fp32acc-z2", "z0-z1fp32acc", "fp32-bf16", "z0fp32-z1bf16", "round_robin-aligned"],
)
def test_precision_and_layout(pool: Pool, ckpt_dir: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    """There and back; masters are fp32 on both sides, so nothing may change."""
    ref = f"{ckpt_dir}/ref.pt"
    rows = [zoo.ROWS["z2_bf16"].with_model(layers=uniform(2), **what) for what in (one, two)]
    loss = pool.run(4, case_source, row=rows[0], path=f"{ckpt_dir}/a", ref=ref)[0]
    _check(pool.run(4, case_target, row=rows[1], path=f"{ckpt_dir}/a", ref=ref, again=f"{ckpt_dir}/b"), loss)
    rounded = rows[0].dtype == "fp32"
    _check(pool.run(4, case_target, row=rows[0], path=f"{ckpt_dir}/b", ref=ref, again=None, rounded=rounded), loss)


def test_offload_to_device_and_back(pool: Pool, ckpt_dir: str) -> None:
    zoo.skip_unless_possible("z2_bf16_cpu_adam")
    ref = f"{ckpt_dir}/ref.pt"
    offloaded = zoo.ROWS["z2_bf16_cpu_adam"]
    plain = zoo.ROWS["z2_bf16"].with_model(layers=offloaded.layers)
    loss = pool.run(4, case_source, row=offloaded, path=f"{ckpt_dir}/a", ref=ref)[0]
    results = pool.run(2, case_compare_tensors, row=plain, path=f"{ckpt_dir}/a", ref=ref)
    for result in results:
        assert result["wrong"] == []
        assert abs(result["loss"] - loss) < 0.4


def case_compare_tensors(ctx: Any, row: zoo.Row, path: str, ref: str) -> dict[str, Any]:
    """As `case_target`, but the optimizer classes (so their hyperparameters' names) differ."""
    engine = harness.build(row, world=ctx.world, seed=2, plugin=ON)
    engine.load_checkpoint(path)
    saved = harness.kept(ref)
    wrong = oracle.global_differences(saved["global"], oracle.global_state(engine, ctx), skip=("hyper",))
    return {"wrong": wrong[:12], "loss": harness.mean_loss(ctx, harness.train(engine, 3))}
