"""Checkpoints of a run that differs from this one: other parameters trained, other layers, another optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from distributed import harness, oracle
from distributed.harness import ON
from distributed.pool import Pool
from distributed.test_errors import DEADLINE, assert_all_raised, untouched
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed

BASE = Row("surgery", world=2, layers=(Layer(experts=2, ep=2), Layer(experts=2, ep=2)), rank_buffers=False)
EXPERTS0 = "blocks.0.moe.deepspeed_moe.experts"


def save_source(ctx: Any, row: Row, path: str, **save: Any) -> Any:
    engine = harness.build(row, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="t", **save)
    return engine


def target(ctx: Any, row: Row, seed: int = 2) -> Any:
    """A new engine in the place of those before, trained on other data."""
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=seed, plugin=ON)
    harness.train(engine, 1, data_seed=99)
    return engine


# --------------------------------------------------------------------- loads that are and are not refused


def case_pair(ctx: Any, path: str, source: Row, into: Row, loads: list[dict[str, Any]]) -> dict[str, Any]:
    """Save one model; load into another with the default arguments, which is refused, then with others."""
    from moc_ckpt.storage.checkpoint import load_manifest
    from moc_ckpt.storage.store import open_store

    saved = harness.snapshot(ctx, save_source(ctx, source, path))
    manifest = load_manifest(open_store(path), "t")
    engine = target(ctx, into)
    out = {"saved": saved, "refused": untouched(ctx, engine, lambda: engine.load_checkpoint(path)), "done": []}
    for load in loads:
        harness.train(engine, 1, data_seed=98)
        before = harness.snapshot(ctx, engine)
        done = harness.attempt(engine.load_checkpoint, path, **load)
        done.pop("value", None)
        after = harness.snapshot(ctx, engine)
        losses = [float.fromhex(x) for x in harness.train(engine, 1)]
        out["done"].append({**done, "before": before, "after": after, "finite": all(x == x for x in losses)})
    out["kinds"] = {(record.fqn, record.kind) for record in manifest.tensors}
    return out


def weights_of(snapshot: dict[str, Any]) -> dict[str, Any]:
    return snapshot["local"]["weights"]


def assert_same_weights(results: list[dict[str, Any]]) -> None:
    """Every load succeeded and gave the weights that were saved; masters follow them."""
    for result in results:
        for done in result["done"]:
            assert done["raised"] is None, done["text"]
            assert done["finite"]
            before, after = weights_of(done["before"]), weights_of(done["after"])
            saved = weights_of(result["saved"])
            assert after.keys() == saved.keys()
            assert [n for n in saved if not oracle.bits_equal(saved[n], after[n])] == []
            assert [n for n in saved if not oracle.bits_equal(saved[n], before[n])], "nothing was to be loaded"
            whole = done["after"]["global"]
            if whole is not None:
                assert oracle.weights_differ_from_masters(_known(done["after"]["local"], whole), whole) == []


def _known(local: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    return {**local, "weights": {name: value for name, value in local["weights"].items() if name in whole}}


FROZEN_EXPERTS = BASE.with_model(freeze=(EXPERTS0,))
WITHOUT_OPTIMIZER = [{"load_module_only": True}, {"load_optimizer_states": False}]


@pytest.mark.parametrize("reverse", [False, True], ids=["trained to frozen", "frozen to trained"])
@pytest.mark.parametrize("stage", [0, 2])
def test_warm_start(pool: Pool, ckpt_dir: str, stage: int, reverse: bool) -> None:
    """Weights are taken whether they were trained or not; optimizer states cannot be."""
    rows = [BASE.with_model(stage=stage), FROZEN_EXPERTS.with_model(stage=stage)]
    source, into = reversed(rows) if reverse else rows
    results = pool.run(2, case_pair, path=ckpt_dir, source=source, into=into, loads=WITHOUT_OPTIMIZER)
    words = ["frozen in the checkpoint", "trained in the model"]
    if not reverse:
        words = ["trained in the checkpoint", "frozen in the model"]
    refused = [result["refused"] for result in results]
    assert_all_raised(refused, *words, "deepspeed_experts", "load_optimizer_states=False", kind="ModelMismatchError")
    assert_same_weights(results)
    name = f"{EXPERTS0}.deepspeed_experts.1.up.weight"
    assert (name, "weight" if reverse else "master") in results[0]["kinds"]


def test_checkpoint_without_a_scheduler(pool: Pool, ckpt_dir: str) -> None:
    """Refused before masters are touched; said in words how to load it."""
    loads = [{"load_lr_scheduler_states": False}]
    results = pool.run(2, case_pair, path=ckpt_dir, source=BASE.with_model(scheduler="none"), into=BASE, loads=loads)
    assert_all_raised(
        [result["refused"] for result in results],
        "scheduler",
        "load_lr_scheduler_states=False",
        kind="ModelMismatchError",
    )
    assert_same_weights(results)
    for result in results:
        (done,) = result["done"]
        assert oracle.global_differences(result["saved"]["global"], done["after"]["global"], skip=("hyper",)) == []
        assert done["before"]["local"]["lr_scheduler"] == done["after"]["local"]["lr_scheduler"]


AMSGRAD = BASE.with_model(stage=1, dtype="fp32", optimizer="client_amsgrad", scheduler="none")
ADAM = AMSGRAD.with_model(optimizer="client_adamw")


@pytest.mark.parametrize(("source", "into"), [(AMSGRAD, ADAM), (ADAM, AMSGRAD)], ids=["to Adam", "to AMSGrad"])
def test_optimizers_that_keep_other_moments(pool: Pool, ckpt_dir: str, source: Row, into: Row) -> None:
    loads = [{"load_optimizer_states": False}]
    results = pool.run(2, case_pair, path=ckpt_dir, source=source, into=into, loads=loads)
    assert_all_raised(
        [result["refused"] for result in results],
        "max_exp_avg_sq",
        "also has" if source is AMSGRAD else "lacks",
        "load_optimizer_states=False",
        kind="ModelMismatchError",
    )
    assert_same_weights(results)


# ------------------------------------------------------------------------------ exclude_frozen_parameters


def case_exclude(ctx: Any, path: str, row: Row) -> dict[str, Any]:
    from moc_ckpt.storage.checkpoint import load_manifest
    from moc_ckpt.storage.store import open_store

    engine = save_source(ctx, row, path, exclude_frozen_parameters=True)
    saved = harness.snapshot(ctx, engine)
    stored = {record.fqn for record in load_manifest(open_store(path), "t").tensors}
    engine = target(ctx, row)
    strict = untouched(ctx, engine, lambda: engine.load_checkpoint(path))
    before = oracle.local_state(engine)
    loose = harness.attempt(engine.load_checkpoint, path, load_module_strict=False)
    loose.pop("value", None)
    return {
        "saved": saved,
        "stored": stored,
        "strict": strict,
        "before": before,
        "loose": loose,
        "after": harness.snapshot(ctx, engine),
    }


def test_frozen_experts_are_stored_although_frozen_parameters_are_excluded(pool: Pool, ckpt_dir: str) -> None:
    """As DeepSpeed, which writes experts in any case."""
    row = BASE.with_model(freeze=(EXPERTS0, "blocks.1.dense"))
    results = pool.run(2, case_exclude, path=ckpt_dir, row=row, deadline=DEADLINE)
    assert_all_raised(
        [result["strict"] for result in results],
        "exclude_frozen_parameters",
        "blocks.1.dense.weight",
        kind="ModelMismatchError",
    )
    left_out = {"frozen", "blocks.1.dense.weight", "blocks.1.dense.bias"}
    for result in results:
        assert result["loose"]["raised"] is None, result["loose"]["text"]
        saved, after = result["saved"]["local"], result["after"]["local"]
        assert left_out < saved["frozen"]
        assert not left_out & result["stored"]
        experts = {name for name in saved["frozen"] if oracle.set_expert_of(name)}
        assert {name for name in experts if name.startswith(EXPERTS0) and name.endswith("up.weight")}
        assert experts <= result["stored"]
        assert oracle.global_differences(result["saved"]["global"], result["after"]["global"]) == []
        for name, value in after["weights"].items():
            want = result["before"] if name in left_out else saved
            assert oracle.bits_equal(value, want["weights"][name]), name


# --------------------------------------------------------------------------------------- custom_load_fn


def case_surgery(ctx: Any, path: str, source: Row, into: list[Row]) -> dict[str, Any]:
    """A fn that renames, reshapes and leaves things out; what it was given, and what became of it."""
    engine = save_source(ctx, source, path)
    given = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    wrong: list[str] = []
    for row in into:
        engine = target(ctx, row)
        for load in WITHOUT_OPTIMIZER:
            label = f"stage {row.stage} {row.dtype} {load}"
            wrong += [f"{label}: {text}" for text in _operate(ctx, engine, path, load, given)]
            harness.train(engine, 1, data_seed=97)
    return {"wrong": wrong}


def _operate(ctx: Any, engine: Any, path: str, load: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    import torch

    calls: list[int] = []
    seen: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    before = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}

    @torch.no_grad()
    def operate(src: Any, dst: Any) -> None:
        calls.append(1)
        assert dst is engine.module
        seen.update({name: value.detach().clone() for name, value in src.items()})
        own = dst.state_dict()
        for name, value in src.items():
            renamed = name.replace(".dense.", ".mixer.")
            if name == "odd":
                own[name][:3].copy_(value)
            elif renamed in own and "norm" not in name:
                own[renamed].copy_(value)
        expected.update({name: value.detach().clone() for name, value in own.items()})

    done = harness.attempt(engine.load_checkpoint, path, custom_load_fn=operate, **load)
    if done["raised"] or calls != [1]:
        yield f"{len(calls)} calls, {done['raised']}: {done['text']}"
        return
    yield from (f"{name} was not given" for name in given.keys() - seen.keys())
    yield from (f"{name} was given" for name in seen.keys() - given.keys())
    for name in given.keys() & seen.keys():
        if not oracle.bits_equal(given[name], seen[name]):
            yield f"{name}: given {seen[name].dtype} {tuple(seen[name].shape)}, or other values"
    after = engine.module.state_dict()
    for name, value in after.items():
        if not oracle.bits_equal(value, expected[name]):
            yield f"{name} is not what the function left"
        if ("norm" in name or "extra_dense" in name) and not oracle.bits_equal(value, before[name]):
            yield f"{name} was left alone by the function, but changed"
        if name.startswith("blocks.0.mixer") and not torch.equal(
            value.float(), given[name.replace("mixer", "dense")].float()
        ):
            yield f"{name} did not get its values"
    whole = oracle.global_state(engine, ctx)
    if whole is not None:
        yield from oracle.weights_differ_from_masters(_known(oracle.local_state(engine), whole), whole)


CHANGED = BASE.with_model(dense_name="mixer", odd=5, extra_layer=True)


@pytest.mark.parametrize(
    "into",
    [
        pytest.param(CHANGED, id="z2_bf16"),
        pytest.param(CHANGED.with_model(stage=1, dtype="fp32"), id="z1_fp32"),
        pytest.param(CHANGED.with_model(stage=0), id="z0_bf16"),
        pytest.param(CHANGED.with_model(stage=0, dtype="fp32"), id="z0_fp32"),
        pytest.param(CHANGED.with_model(freeze=("blocks.1.norm",)), id="frozen now"),
    ],
)
def test_custom_load_fn_operates_on_another_model(pool: Pool, ckpt_dir: str, into: Row) -> None:
    for result in pool.run(2, case_surgery, path=ckpt_dir, source=BASE, into=[into], deadline=DEADLINE):
        assert result["wrong"] == []


def test_custom_load_fn_of_a_smaller_model(pool: Pool, ckpt_dir: str) -> None:
    """Weights of layers that the model lacks are given too: all their experts, under their global names."""
    results = pool.run(2, case_lost_layer, path=ckpt_dir, deadline=DEADLINE)
    for rank, result in enumerate(results):
        assert result["error"] is None
        names = result["names"]
        stem = "deepspeed_moe.experts.deepspeed_experts"
        assert [f"blocks.0.moe.{stem}.{e}.up.weight" in names for e in (0, 1)] == [True, False], rank
        assert [f"blocks.1.moe.{stem}.{e}.up.weight" in names for e in (0, 1)] == [True, True], rank
        assert "blocks.1.dense.bias" in names
        assert result["local expert"]


def case_lost_layer(ctx: Any, path: str) -> dict[str, Any]:
    engine = save_source(ctx, BASE, path)
    own = f"{EXPERTS0}.deepspeed_experts.0.up.weight"
    want = engine.module.state_dict()[own].clone()
    engine = target(ctx, BASE.with_model(layers=BASE.layers[:1]))
    seen: dict[str, Any] = {}
    done = harness.attempt(
        engine.load_checkpoint,
        path,
        load_module_only=True,
        custom_load_fn=lambda src, dst: seen.update({name: value.clone() for name, value in src.items()}),
    )
    return {
        "error": done["raised"] and done["text"],
        "names": set(seen),
        "local expert": own in seen and oracle.bits_equal(seen[own], want),
    }
