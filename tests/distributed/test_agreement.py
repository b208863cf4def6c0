"""Ranks that do not agree (on a directory, on the call, on the error), and what is refused at start."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, test_errors
from distributed.harness import ON
from distributed.pool import Pool
from distributed.test_errors import DEADLINE, assert_all_raised, untouched
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed

ROW = Row("agreement", world=2, layers=(Layer(experts=2, ep=2),))
SINGLE = Row("single", world=1, layers=(Layer(experts=2, ep=1),))


# -------------------------------------------------------------------------------------- the save directory


def case_node_local_directory(ctx: Any, path: str) -> dict[str, Any]:
    """Under the same path rank 1 sees a directory of its own, as on a node where nothing is mounted."""
    from moc_ckpt.integrations.deepspeed import directories

    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="shared")
    original = directories.open_store
    other = Path(path).parent / "node1"
    other.mkdir(exist_ok=True)
    if ctx.rank == 1:
        directories.open_store = lambda url, **kwargs: original(str(other) if str(url) == path else url, **kwargs)
    try:
        result = untouched(ctx, engine, lambda: engine.save_checkpoint(path, tag="split"))
    finally:
        directories.open_store = original
    result["files"] = sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if "split" in p.parts)
    result["strays"] = [str(p) for p in other.rglob("*")]
    result["latest"] = Path(path, "latest").read_text()
    ctx.barrier()
    engine.save_checkpoint(path, tag="split")
    return {**result, "again": Path(path, "split", "manifest.json").exists()}


def test_a_rank_without_the_save_directory_stops_the_save(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, case_node_local_directory, path=f"{ckpt_dir}/c", deadline=DEADLINE)
    assert_all_raised(results, socket.gethostname(), f"{ckpt_dir}/c", kind="StorageError")
    assert {result["raised"] for result in results} == {"StorageError"}
    assert "rank 1" in results[0]["text"]
    for result in results:
        assert (result["files"], result["strays"], result["latest"], result["again"]) == ([], [], "shared", True)


# -------------------------------------------------------------------------------------------- other calls


def case_other_calls(ctx: Any, path: str) -> dict[str, Any]:
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="one")
    harness.train(engine, 1)
    out = []
    for loader in (0, 1):

        def call(loader: int = loader) -> Any:
            if ctx.rank == loader:
                return engine.load_checkpoint(path)
            return engine.save_checkpoint(path, tag="two")

        began = time.monotonic()
        result = untouched(ctx, engine, call)
        out.append({**result, "seconds": time.monotonic() - began})
    committed = Path(path, "two", "manifest.json").exists()
    ctx.barrier()
    engine.save_checkpoint(path, tag="two")
    steps = engine.global_steps
    engine.load_checkpoint(path)
    return {"out": out, "committed": committed, "works": engine.global_steps == steps}


def test_one_rank_saves_while_the_other_loads(pool: Pool, ckpt_dir: str) -> None:
    """Told at once, not after the deadline of a rendezvous (120 s)."""
    results = pool.run(2, case_other_calls, path=ckpt_dir, deadline=DEADLINE)
    for turn in (0, 1):
        both = [result["out"][turn] for result in results]
        assert_all_raised(
            both,
            "'preparing the checkpoint'",
            "'comparing the arguments of load_checkpoint'",
            "save_checkpoint",
            "load_checkpoint",
            kind="RankError",
        )
        assert all(one["seconds"] < 10 for one in both), both
    assert [(result["committed"], result["works"]) for result in results] == [(False, True)] * 2


# ---------------------------------------------------------------------------------------- other arguments


def case_other_arguments(ctx: Any, path: str) -> dict[str, Any]:
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin={**ON, "k_persist": 1})
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="one")
    first = ctx.rank == 0
    calls = {
        "full": lambda: engine.moc.save(path, "two", full=first),
        "save_latest": lambda: engine.save_checkpoint(path, "two", save_latest=first),
        "exclude_frozen": lambda: engine.save_checkpoint(path, "two", exclude_frozen_parameters=first),
        "load_optimizer_states": lambda: engine.load_checkpoint(path, load_optimizer_states=first),
        "custom_load_fn": lambda: engine.load_checkpoint(
            path, custom_load_fn=(lambda src, dst: None) if first else None
        ),
        "tag": lambda: engine.load_checkpoint(path, tag="one" if first else None),
    }
    out = {name: untouched(ctx, engine, call) for name, call in calls.items()}
    ctx.barrier()
    committed = Path(path, "two", "manifest.json").exists()
    # And the next ones work.
    engine.save_checkpoint(path, tag="three")
    engine.load_checkpoint(path)
    return {"out": out, "committed": committed}


def test_ranks_give_different_arguments(pool: Pool, ckpt_dir: str) -> None:
    """Refused by name: going on, ranks would select different experts, or wait for each other for ever."""
    results = pool.run(2, case_other_arguments, path=ckpt_dir, deadline=DEADLINE)
    for name in results[0]["out"]:
        assert_all_raised([result["out"][name] for result in results], name, "disagree", kind="ConfigError")
    assert not results[0]["committed"]


def case_failed_restore(ctx: Any, path: str) -> dict[str, Any]:
    """A restore that fails after live state was overwritten leaves nothing that a later save could build on."""

    def fail(src: Any, dst: Any) -> None:
        raise RuntimeError("injected: no such layer")

    engine = harness.build(ROW, world=ctx.world, seed=1, plugin={**ON, "k_persist": 1})
    for _ in range(2):
        harness.train(engine, 1)
        engine.save_checkpoint(path)
    partial = len(_own_experts(path))
    raised = harness.attempt(engine.load_checkpoint, path, custom_load_fn=fail)["raised"]
    harness.train(engine, 1)
    engine.save_checkpoint(path)
    return {"partial": partial, "raised": raised, "after": len(_own_experts(path)), "plt": engine.moc.plt}


def _own_experts(path: str) -> set[str]:
    """Experts that the newest checkpoint wrote itself."""
    body = json.loads(Path(path, Path(path, "latest").read_text(), "manifest.json").read_text())["body"]
    return {
        unit["name"]
        for unit in body["units"]
        if unit["name"].startswith("expert/") and (unit["attempt"], unit["step"]) == (body["attempt"], body["step"])
    }


def test_after_a_failed_restore_everything_is_saved(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(2, case_failed_restore, path=ckpt_dir, deadline=DEADLINE):
        assert (result["partial"], result["after"]) == (1, sum(layer.experts for layer in ROW.layers))
        assert result["raised"] is not None and result["plt"] == 0


# ------------------------------------------------------------------------------------ one class of error


def test_client_state_error_is_one_on_the_ranks_that_did_not_fail(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, test_errors.case_client_state, path=ckpt_dir, state="lambda", only=0, trust=False)
    assert [result["raised"] for result in results] == ["ClientStateError"] * 2
    assert_all_raised(results, "client_state['outer']['list'][1]['inner']")
    assert not results[0]["exists"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("key", ["moc_chekpoint", "mocCheckpoint"])
def test_almost_the_name_of_the_section_is_refused(pool: Pool, key: str) -> None:
    (result,) = pool.run(1, test_errors.case_build, plugin=None, config={key: {"enabled": True}}, row=SINGLE)
    assert result["raised"] == "ConfigError", result
    assert key in result["text"]
    assert "'moc_checkpoint'" in result["text"]


def test_other_keys_of_a_ds_config_are_no_concern(pool: Pool) -> None:
    config = {"checkpoint": {"tag_validation": "Warn"}, "my_experiment": {"name": "x"}}
    for plugin in (None, ON):
        (result,) = pool.run(1, test_errors.case_build, plugin=plugin, config=config, row=SINGLE)
        assert result["raised"] is None, result


def test_node_local_storage_is_refused_by_name(pool: Pool) -> None:
    config = {"checkpoint": {"use_node_local_storage": True}}
    (result,) = pool.run(1, test_errors.case_build, plugin=ON, config=config, row=SINGLE)
    assert result["raised"] == "UnsupportedError", result
    assert "checkpoint.use_node_local_storage" in result["text"]


def case_foreign_parameter(ctx: Any) -> dict[str, Any]:
    import deepspeed
    import torch

    net = torch.nn.Linear(3, 2)
    foreign = torch.nn.Parameter(torch.zeros(5, 7))
    done = harness.attempt(
        deepspeed.initialize,
        model=net,
        optimizer=torch.optim.SGD([*net.parameters(), foreign], lr=0.1),
        config={"train_micro_batch_size_per_gpu": 1, "moc_checkpoint": ON},
        dist_init_required=False,
    )
    done.pop("value", None)
    return done


def test_parameter_that_the_module_lacks(pool: Pool) -> None:
    """Under no ZeRO and in fp32 DeepSpeed hands out the user's own optimizer, with whatever it holds."""
    (result,) = pool.run(1, case_foreign_parameter)
    assert result["raised"] == "UnsupportedError", result
    assert "(5, 7)" in result["text"]
