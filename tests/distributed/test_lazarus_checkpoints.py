"""Checkpoints of replicated experts: the same addresses as DeepSpeed's layer has, whatever the placement."""

from __future__ import annotations

from typing import Any

import pytest

from distributed import harness, oracle
from distributed import lazarus_tools as tools
from distributed.harness import ON
from distributed.lazarus_tools import Setting
from distributed.pool import Pool
from distributed.test_lazarus_engine import NATIVE, OURS

pytestmark = pytest.mark.distributed

WORLD = 4
BF16 = {"dtype": "bf16", "gas": 2, "buffers": True}


def case_save(ctx: Any, setting: Setting, path: str, ref: str, plugin: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves, keeps what the oracle saw, trains on."""
    import torch

    engine = tools.build(setting, plugin=plugin)
    tools.train(engine, 5)
    state, weights = tools.whole_state(engine, ctx), ctx.gather(tools.local_weights(engine))
    engine.save_checkpoint(path, tag="t", client_state={"epoch": 3})
    engine.moc.wait()
    if ctx.rank == 0:
        torch.save({"state": state, "weights": weights}, ref)
    losses, norms, _ = tools.train(engine, 4)
    return {"losses": losses, "norms": norms, "end": tools.whole_state(engine, ctx)}


def case_load(
    ctx: Any, setting: Setting, path: str, ref: str, again: str | None, plugin: dict[str, Any], tag: str | None = "t"
) -> dict[str, Any]:
    """Loads over an engine that has trained otherwise, compares tensor by tensor, saves again, trains on."""
    import torch

    engine = tools.build(setting, seed=2, plugin=plugin)
    tools.train(engine, 2, seed=99)
    before = tools.whole_state(engine, ctx)
    _, client = engine.load_checkpoint(path, tag=tag)
    kept = torch.load(ref, weights_only=False)
    mine = tools.whole_state(engine, ctx)
    wrong = oracle.global_differences(kept["state"], mine)
    if ctx.rank == 0:
        assert oracle.global_differences(before, mine), "nothing differed before, so the comparison proves nothing"
    held: dict[str, Any] = {}
    for weights in kept["weights"]:
        held = {**weights, **held}
    for name, tensor in tools.local_weights(engine).items():
        if not oracle.bits_equal(held[name], tensor):
            wrong.append(f"weight {name} of rank {ctx.rank}")
    if engine.lazarus is not None:
        tools.expert_state(engine, ctx)
    if again is not None:
        engine.save_checkpoint(again, tag="t", client_state=client)
        engine.moc.wait()
    losses, norms, _ = tools.train(engine, 4)
    end = tools.whole_state(engine, ctx)
    return {"client": client, "wrong": wrong, "losses": losses, "norms": norms, "end": end}


def _check(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["wrong"] == [], f"rank {rank}"
        assert result["client"] == {"epoch": 3}


def _check_continues(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for rank, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a["losses"] == b["losses"], f"rank {rank}"
        assert a["norms"] == b["norms"], f"rank {rank}"
    assert oracle.global_differences(one[0]["end"], two[0]["end"]) == []


@pytest.mark.parametrize(("state", "decay"), [("replicated", True), ("sharded", False)])
def test_from_deepspeeds_layer_and_back(pool: Pool, ckpt_dir: str, state: str, decay: bool) -> None:
    """Masters, moments, counts, options and weights; DeepSpeed's engine then goes on bit for bit."""
    native, ours = NATIVE.with_(**BF16, decay=decay), OURS.with_(**BF16, decay=decay, state=state)
    ref = f"{ckpt_dir}/ref.pt"
    source = pool.run(WORLD, case_save, setting=native, path=f"{ckpt_dir}/a", ref=ref, plugin=ON)
    there = pool.run(WORLD, case_load, setting=ours, path=f"{ckpt_dir}/a", ref=ref, again=f"{ckpt_dir}/b", plugin=ON)
    _check(there)
    back = pool.run(WORLD, case_load, setting=native, path=f"{ckpt_dir}/b", ref=ref, again=None, plugin=ON)
    _check(back)
    _check_continues(source, back)


@pytest.mark.parametrize(("first", "second"), [("replicated", "sharded"), ("sharded", "replicated")])
def test_between_placements_and_back(pool: Pool, ckpt_dir: str, first: str, second: str) -> None:
    """Also between replicated and sharded state; back in the first placement the run goes on bit for bit."""
    one = Setting(**BF16, state=first, noise="RSample")
    two = one.with_(placements=tools.OTHERS, state=second)
    ref = f"{ckpt_dir}/ref.pt"
    source = pool.run(WORLD, case_save, setting=one, path=f"{ckpt_dir}/a", ref=ref, plugin=ON)
    there = pool.run(WORLD, case_load, setting=two, path=f"{ckpt_dir}/a", ref=ref, again=f"{ckpt_dir}/b", plugin=ON)
    _check(there)
    back = pool.run(WORLD, case_load, setting=one, path=f"{ckpt_dir}/b", ref=ref, again=None, plugin=ON)
    _check(back)
    _check_continues(source, back)


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_continues_bit_for_bit(pool: Pool, ckpt_dir: str, stage: int) -> None:
    setting = Setting(dtype="fp32", stage=stage, noise="RSample", client=stage == 1)
    ref = f"{ckpt_dir}/ref.pt"
    source = pool.run(WORLD, case_save, setting=setting, path=f"{ckpt_dir}/a", ref=ref, plugin=ON)
    resumed = pool.run(WORLD, case_load, setting=setting, path=f"{ckpt_dir}/a", ref=ref, again=None, plugin=ON)
    _check(resumed)
    _check_continues(source, resumed)


def test_to_another_world(pool: Pool, ckpt_dir: str) -> None:
    """Four ranks' checkpoint in two ranks, and in one that holds every expert."""
    setting, ref = Setting(**BF16), f"{ckpt_dir}/ref.pt"
    pool.run(WORLD, case_save, setting=setting, path=f"{ckpt_dir}/a", ref=ref, plugin=ON)
    for placement in (((0, 1, 2, 3), (1, 2, 3, 4)), ((0, 1, 2, 3, 4),)):
        other = setting.with_(placements=(placement, placement))
        _check(pool.run(len(placement), case_load, setting=other, path=f"{ckpt_dir}/a", ref=ref, again=None, plugin=ON))


ASYNC = {
    "enabled": True,
    "save_mode": "async",
    "snapshot_interval": 1,
    "k_snapshot": 2,
    "k_persist": 1,
    "host": {"on_busy": "wait"},
}


@pytest.mark.parametrize("state", ["replicated", "sharded"])
def test_asynchronous_first_save_is_full_and_resumes(pool: Pool, ckpt_dir: str, state: str) -> None:
    """Through snapshots and the agent, with partial experts: a directory's first checkpoint has every expert."""
    setting, ref = Setting(**BF16, state=state), f"{ckpt_dir}/ref.pt"
    source = pool.run(WORLD, case_save, setting=setting, path=f"{ckpt_dir}/a", ref=ref, plugin=ASYNC)
    resumed = pool.run(WORLD, case_load, setting=setting, path=f"{ckpt_dir}/a", ref=ref, again=None, plugin=ASYNC)
    _check(resumed)
    _check_continues(source, resumed)


def case_partial(ctx: Any, setting: Setting, path: str, plugin: dict[str, Any]) -> dict[str, Any]:
    """Saves after every second step with K = 1, recounting tokens; then what a restore says."""
    import torch

    engine = tools.build(setting, plugin=plugin)
    counts = [torch.zeros(setting.experts, dtype=torch.int64) for _ in range(2)]

    def count(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            # By the gate's own choices, and not by what the layer says about them.
            counts[layer] += torch.bincount(output.experts.view(-1), minlength=setting.experts)

        return hook

    for layer, block in enumerate(engine.module.blocks):
        block.moe.deepspeed_moe.gate.register_forward_hook(count(layer))
    states = {}
    for number in range(3):
        tools.train(engine, 2)
        states[number] = tools.whole_state(engine, ctx)
        engine.save_checkpoint(path, tag=f"s{number}")
        engine.moc.wait()
    ledger = engine.moc.ledger
    everyone = ctx.gather([row.tolist() for row in counts])
    recount = [[sum(column) for column in zip(*layer, strict=True)] for layer in zip(*everyone, strict=True)]
    from moc_ckpt.storage.checkpoint import load_manifest
    from moc_ckpt.storage.store import open_store

    manifest = load_manifest(open_store(path), "s2")
    steps = {unit.name: unit.step for unit in manifest.units if unit.name.startswith("expert/")}
    harness.discard(engine)
    harness.reset()
    engine = tools.build(setting.with_(placements=tools.OTHERS), seed=2, plugin=plugin)
    engine.load_checkpoint(path)
    mine = tools.whole_state(engine, ctx)
    wrong = []
    if ctx.rank == 0:
        for name, entry in mine.items():
            expert = oracle.set_expert_of(name)
            step = 6
            if expert is not None:
                step = steps[f"expert/{name.split('.')[1]}/{expert[1]}"]
            saved = states[step // 2 - 1][name]
            wrong += [
                name for kind in ("master", "exp_avg", "exp_avg_sq") if not oracle.bits_equal(entry[kind], saved[kind])
            ]
    return {
        "counted": [list(map(int, row)) for row in ledger.processed],
        "recount": recount,
        "steps": steps,
        "wrong": wrong,
        "plt": engine.moc.plt,
    }


@pytest.mark.parametrize("mode", ["durable", "async"])
def test_partial_checkpoints_and_their_ledger(pool: Pool, ckpt_dir: str, mode: str) -> None:
    """K = 1 of 5 experts: the others' versions are older, each as it was at its step, and tokens are all counted."""
    plugin = {**ASYNC, "save_mode": mode, "snapshot_interval": 0, "k_snapshot": 1, "recovery": {"memory": False}}
    results = pool.run(WORLD, case_partial, setting=Setting(**BF16), path=ckpt_dir, plugin=plugin)
    first = results[0]
    assert first["wrong"] == []
    assert first["counted"] == first["recount"]
    assert sorted(set(first["steps"].values())) == [2, 4, 6]
    assert sum(step == 6 for step in first["steps"].values()) == 2  # one expert of each layer
    assert first["plt"] > 0
