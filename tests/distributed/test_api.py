"""The arguments and return values of save_checkpoint and load_checkpoint mean what they mean in DeepSpeed.

Where DeepSpeed can do it, the same calls run natively in the same test and the engines are compared.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.harness import ON
from distributed.pool import Pool, worker_env

pytestmark = pytest.mark.distributed

#: Buffers alike on all ranks and no frozen expert parameters: native checkpoints get those wrong.
FAIR = {"rank_buffers": False, "frozen": False, "empty": False}


def case_load(
    ctx: Any, path: str, plugin: dict[str, Any] | None, stage: int, load: dict[str, Any], target: dict[str, Any]
) -> dict[str, Any]:
    """Save in one engine, load with the given arguments in another that has trained; what it became."""
    row = zoo.ROWS["z1_bf16"].with_model(stage=stage, **FAIR)
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, 4)
    engine.save_checkpoint(path, client_state={"mine": 5})
    saved = harness.snapshot(ctx, engine)
    harness.discard(engine)
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=2, plugin=plugin, model=target)
    harness.train(engine, 2, data_seed=99)
    before = harness.snapshot(ctx, engine)
    done = harness.attempt(engine.load_checkpoint, path, **load)
    after = harness.snapshot(ctx, engine)
    client = done.get("value", (None, None))[1]
    return {
        "raised": done["raised"] is not None,
        "error": done,
        "client": None if client is None else client.get("mine"),
        "saved": saved,
        "before": before,
        "after": after,
        "loss": harness.train(engine, 1),
    }


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "load",
    [
        {},
        {"load_module_only": True},
        {"load_optimizer_states": False},
        {"load_lr_scheduler_states": False},
        {"load_optimizer_states": False, "load_lr_scheduler_states": False},
        {"load_module_strict": False},
    ],
    ids=lambda load: ",".join(load) or "defaults",
)
def test_load_arguments_as_native(pool: Pool, ckpt_dir: str, stage: int, load: dict[str, Any]) -> None:
    common = {"stage": stage, "load": load, "target": {}}
    native = pool.run(4, case_load, path=f"{ckpt_dir}/native", plugin=None, **common)
    ours = pool.run(4, case_load, path=f"{ckpt_dir}/moc", plugin=ON, **common)
    for rank, (one, two) in enumerate(zip(native, ours, strict=True)):
        assert not one["raised"], one["error"]["text"]
        assert not two["raised"], two["error"]["text"]
        assert harness.differences(one["saved"], two["saved"]) == [], "the runs differed before the save"
        # Native load restores neither generators nor micro_steps; the plugin does both unless load_module_only.
        assert _without_micro_steps(one["after"], two["after"]) == [], f"rank {rank}"
        assert two["client"] == one["client"]


def _without_micro_steps(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    out = harness.differences(one, two, skip=("rng", "counters"))
    for name in ("global_steps", "global_samples", "skipped_steps"):
        a, b = one["local"]["counters"][name], two["local"]["counters"][name]
        if a != b:
            out.append(f"{name}: native {a}, ours {b}")
    return out


def test_module_only_touches_nothing_else(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(4, case_load, path=ckpt_dir, plugin=ON, stage=2, load={"load_module_only": True}, target={})
    for result in results:
        before, after, saved = (result[key]["local"] for key in ("before", "after", "saved"))
        assert oracle.local_differences(saved, after, skip=("rng", "counters", "lr_scheduler", "param_groups")) == []
        assert oracle.local_differences(before, after, skip=("weights", "buffers")) == []


# ------------------------------------------------------------------------------------ another model


@pytest.mark.parametrize("plugin", [None, ON], ids=["native", "moc"])
def test_strict_refuses_a_changed_model(pool: Pool, ckpt_dir: str, plugin: dict[str, Any] | None) -> None:
    changed = {"extra_layer": True}
    results = pool.run(
        4, case_load, path=ckpt_dir, plugin=plugin, stage=1, load={"load_module_only": True}, target=changed
    )
    for result in results:
        assert result["raised"]
        assert "extra_dense" in result["error"]["text"]
        if plugin:
            assert harness.differences(result["before"], result["after"]) == [], "a refused load changed the engine"


@pytest.mark.parametrize("plugin", [None, ON], ids=["native", "moc"])
def test_not_strict_loads_what_both_have(pool: Pool, ckpt_dir: str, plugin: dict[str, Any] | None) -> None:
    load = {"load_module_only": True, "load_module_strict": False}
    for result in pool.run(
        4, case_load, path=ckpt_dir, plugin=plugin, stage=1, load=load, target={"extra_layer": True}
    ):
        assert not result["raised"], result["error"]["text"]
        saved, before, after = (result[key]["local"]["weights"] for key in ("saved", "before", "after"))
        for name, value in after.items():
            want = before[name] if name.startswith("extra_dense") else saved[name]
            assert oracle.bits_equal(want, value), name
        assert all(float.fromhex(x) < 10 for x in result["loss"])


# ----------------------------------------------------------------------------------- custom_load_fn


def case_custom(ctx: Any, path: str, plugin: dict[str, Any] | None) -> dict[str, Any]:
    row = zoo.ROWS["z1_bf16"].with_model(**FAIR)
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, 2)
    engine.save_checkpoint(path)
    saved = oracle.local_state(engine)["weights"]
    harness.discard(engine)
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=2, plugin=plugin)
    before = oracle.local_state(engine)["weights"]
    seen: dict[str, Any] = {}

    def load_some(src: Any, dst: Any) -> None:
        seen.update({name: (tuple(t.shape), str(t.dtype)) for name, t in src.items()})
        own = dst.state_dict()
        own["embed.weight"].copy_(src["embed.weight"])
        for name in src:
            if "deepspeed_experts.0.up.weight" in name:
                own[name].copy_(src[name])

    engine.load_checkpoint(path, load_module_only=True, custom_load_fn=load_some)
    return {"seen": seen, "saved": saved, "before": before, "after": oracle.local_state(engine)["weights"]}


def test_custom_load_fn(pool: Pool, ckpt_dir: str) -> None:
    native = pool.run(4, case_custom, path=f"{ckpt_dir}/native", plugin=None)
    ours = pool.run(4, case_custom, path=f"{ckpt_dir}/moc", plugin=ON)
    for one, two in zip(native, ours, strict=True):
        assert two["seen"] == one["seen"]
        assert oracle.bits_equal(two["after"]["embed.weight"], two["saved"]["embed.weight"])
        assert oracle.bits_equal(two["after"]["odd"], two["before"]["odd"])
        for name, value in one["after"].items():
            assert oracle.bits_equal(value, two["after"][name]), name


# ------------------------------------------------------------------------------- frozen parameters


def case_frozen(ctx: Any, path: str, plugin: dict[str, Any] | None, exclude: bool, strict: bool) -> dict[str, Any]:
    row = zoo.ROWS["z1_bf16"].with_model(rank_buffers=False)
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, 2)
    engine.save_checkpoint(path, exclude_frozen_parameters=exclude)
    saved = harness.snapshot(ctx, engine)
    harness.discard(engine)
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=2, plugin=plugin)
    before = oracle.local_state(engine)
    done = harness.attempt(engine.load_checkpoint, path, load_module_strict=strict)
    return {"saved": saved, "before": before, "after": harness.snapshot(ctx, engine), "done": done}


@pytest.mark.parametrize("plugin", [None, ON], ids=["native", "moc"])
def test_exclude_frozen_parameters(pool: Pool, ckpt_dir: str, plugin: dict[str, Any] | None) -> None:
    results = pool.run(4, case_frozen, path=ckpt_dir, plugin=plugin, exclude=True, strict=False)
    for result in results:
        assert result["done"]["raised"] is None, result["done"]["text"]
        before, after, saved = result["before"], result["after"], result["saved"]
        assert oracle.bits_equal(after["local"]["weights"]["frozen"], before["weights"]["frozen"])
        assert oracle.global_differences(saved["global"], after["global"]) == []
        for name, value in after["local"]["weights"].items():
            if name not in after["local"]["frozen"]:
                assert oracle.bits_equal(value, saved["local"]["weights"][name]), name


def test_strict_load_without_frozen_is_as_native(pool: Pool, ckpt_dir: str) -> None:
    def raised(plugin: dict[str, Any] | None) -> set[bool]:
        path = f"{ckpt_dir}/{'moc' if plugin else 'native'}"
        results = pool.run(4, case_frozen, path=path, plugin=plugin, exclude=True, strict=True)
        return {result["done"]["raised"] is not None for result in results}

    assert raised(ON) == raised(None)


# ------------------------------------------------------------------------------------- client_state


def case_client(ctx: Any, path: str, plugin: dict[str, Any] | None) -> dict[str, Any]:
    import torch

    engine = harness.build("z1_bf16", world=ctx.world, seed=1, plugin=plugin, model=FAIR)
    state = {
        "int": 3,
        "float": 0.1,
        "text": "ä\n",
        "none": None,
        "bytes": b"\x00\xff",
        "flag": True,
        "tuple": (1, (2.5, "x"), []),
        "nested": {"list": [1, {"deep": torch.arange(6, dtype=torch.int16).view(2, 3)}], 7: "int key", (1, 2): "pair"},
        "bf16": torch.full((3,), 0.1, dtype=torch.bfloat16),
        "empty": {},
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "set": {1, 2},
        "who": ctx.rank,
        "huge": 2**70,
    }
    returned = engine.save_checkpoint(path, client_state=state)
    _, client = engine.load_checkpoint(path)
    got = {name: client.get(name, "missing") for name in state}
    wrong = [name for name in state if name != "who" and not _same(state[name], got[name])]
    engine.save_checkpoint(path, tag="plain")
    _, plain = engine.load_checkpoint(path, tag="plain")
    return {
        "returned": returned,
        "wrong": {name: repr(got[name]) for name in wrong},
        "who": got["who"],
        "leak": sorted(set(plain) & set(state)),
    }


def _same(a: Any, b: Any) -> bool:
    import torch

    if torch.is_tensor(a):
        return torch.is_tensor(b) and oracle.bits_equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("plugin", [None, ON], ids=["native", "moc"])
def test_client_state_round_trip(pool: Pool, ckpt_dir: str, plugin: dict[str, Any] | None) -> None:
    for result in pool.run(4, case_client, path=ckpt_dir, plugin=plugin):
        assert result == {"returned": True, "wrong": {}, "who": 0, "leak": []}


# --------------------------------------------------------------------------------- tags and paths


def case_tags(ctx: Any, path: str, plugin: dict[str, Any] | None) -> dict[str, Any]:
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin=plugin, model=FAIR)
    top = Path(path)
    latest = top / "latest"
    out: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        ctx.barrier()
        out[name] = value

    out["empty dir"] = harness.attempt(engine.save_checkpoint, "")["raised"]
    harness.train(engine, 1)
    engine.save_checkpoint(path, save_latest=False, tag="quiet")
    note("no latest", latest.exists())
    note("load without latest", engine.load_checkpoint(path) == (None, None))
    engine.save_checkpoint(path)
    note("default tag", latest.read_text())
    harness.train(engine, 1)
    at2 = harness.snapshot(ctx, engine)
    engine.save_checkpoint(top, 42)  # a Path, and a tag that is not a string
    note("number tag", latest.read_text())
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="other", save_latest=False)
    note("latest unmoved", latest.read_text())
    where, _ = engine.load_checkpoint(path)
    note("steps by latest", engine.global_steps)
    note("state by latest", harness.differences(at2, harness.snapshot(ctx, engine), skip=("rng", "counters")))
    note("path exists", Path(where).exists())
    note("path inside tag", (top / "42") in [Path(where), *Path(where).parents])
    engine.load_checkpoint(path, tag="other")
    note("steps by tag", engine.global_steps)
    engine.load_checkpoint(top, "quiet")
    note("steps by quiet", engine.global_steps)
    note("latest after loads", latest.read_text())
    missing = harness.attempt(engine.load_checkpoint, path, tag="never saved")
    note("missing tag", missing["raised"] is not None)
    note("steps after missing", engine.global_steps)
    return out


def test_tags_and_paths_as_native(pool: Pool, ckpt_dir: str) -> None:
    native = pool.run(2, case_tags, path=f"{ckpt_dir}/native", plugin=None)
    ours = pool.run(2, case_tags, path=f"{ckpt_dir}/moc", plugin={**ON, "storage": {"keep_last": 0}})
    assert native[0]["default tag"] == "global_step1"
    for one, two in zip(native, ours, strict=True):
        assert two == one


# --------------------------------------------------------------------------------- nothing to load


def case_nothing(ctx: Any, path: str, plugin: dict[str, Any] | None) -> dict[str, Any]:
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, 1)
    before = harness.snapshot(ctx, engine)
    done = [harness.attempt(engine.load_checkpoint, f"{path}/{name}") for name in ("", "never/made")]
    after = harness.snapshot(ctx, engine)
    return {"done": done, "changed": harness.differences(before, after), "made": Path(path, "never").exists()}


@pytest.mark.parametrize("plugin", [None, ON], ids=["native", "moc"])
def test_nothing_saved_returns_none(pool: Pool, ckpt_dir: str, plugin: dict[str, Any] | None) -> None:
    for result in pool.run(2, case_nothing, path=ckpt_dir, plugin=plugin):
        assert [done["raised"] for done in result["done"]] == [None, None]
        assert [done["value"] for done in result["done"]] == [(None, None)] * 2
        assert result["changed"] == []
        assert not result["made"]


def test_nothing_saved_raises_with_require_resume(pool: Pool, ckpt_dir: str) -> None:
    section = {**ON, "recovery": {"require_resume": True}}
    for result in pool.run(2, case_nothing, path=ckpt_dir, plugin=section):
        for done in result["done"]:
            assert "CheckpointNotFoundError" in done["mro"], done
            assert ckpt_dir in done["text"]
        assert result["changed"] == []


# ---------------------------------------------------------------------------------- engine.moc, import


def case_object(ctx: Any) -> dict[str, Any]:
    section = {**ON, "save_weights": "sharded", "storage": {"keep_last": 5}, "timeouts": {"rendezvous_s": 33}}
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin=section)
    config = engine.moc.config
    return {
        "config": (
            config.save_weights,
            config.storage.keep_last,
            config.storage.checksum,
            config.timeouts.rendezvous_s,
        ),
        "catalog": engine.moc.catalog() is not None,
    }


def test_engine_moc(pool: Pool) -> None:
    for result in pool.run(2, case_object):
        assert result == {"config": ("sharded", 5, "crc32c", 33), "catalog": True}


PROGRAM = """
import os, socket, sys
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
import moc_ckpt
assert "torch" not in sys.modules and "deepspeed" not in sys.modules, "import moc_ckpt must stay light"
import torch
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
net = torch.nn.Linear(3, 2)
config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
          "zero_optimization": {"stage": 1}, "moc_checkpoint": {"enabled": True}}
engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
engine.backward(engine(torch.ones(1, 3)).sum())
engine.step()
assert engine.save_checkpoint(sys.argv[1], client_state={"a": 1}) is True
weight = net.weight.detach().clone()
with torch.no_grad():
    net.weight.zero_()
path, client = engine.load_checkpoint(sys.argv[1])
assert torch.equal(weight, net.weight) and client["a"] == 1, (net.weight, client)
print("WELL DONE", engine.global_steps)
os._exit(0)
"""


def test_import_before_deepspeed_and_a_model_without_experts(ckpt_dir: str) -> None:
    """The other order of imports than the pool's, in a process of its own; a dense model works too."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{ckpt_dir}/c"],
        env=worker_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip().endswith("WELL DONE 1"), done.stdout[-2000:] + done.stderr[-3000:]
    assert Path(ckpt_dir, "c", "global_step1", "manifest.json").exists()
