"""Rebalancing: the decision beside training, its plan and its event."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distributed import harness
from distributed import lazarus_tools as tools
from distributed.lazarus_tools import Setting
from distributed.pool import TIME_SCALE, Pool

pytestmark = pytest.mark.distributed

WORLD = 4
EXPERTS = 6
INTERVAL = 4
#: Every expert has two replicas, so that even loads are even work.
EVEN = ((0, 1, 2), (3, 4, 5), (0, 1, 2), (3, 4, 5))
TOKENS = tools.BATCH * tools.SEQ
ROUTES = {
    "even": [token % EXPERTS for token in range(TOKENS)],
    "skewed": [0] * (TOKENS - EXPERTS + 1) + list(range(1, EXPERTS)),
}
#: What counting these routes by hand gives, over all ranks and a step.
LOADS = {name: [WORLD * routes.count(expert) for expert in range(EXPERTS)] for name, routes in ROUTES.items()}
MODEL = Setting(placements=(EVEN, EVEN), experts=EXPERTS)


def route(engine: Any, names: tuple[str, str]) -> None:
    """From now on the two layers' gates choose as named."""
    import torch

    for block, name in zip(engine.module.blocks, names, strict=True):
        chosen = torch.tensor(ROUTES[name]).view(-1, 1)
        block.moe.deepspeed_moe.gate._choose = lambda logits, probabilities, chosen=chosen: chosen


def setting(**section: Any) -> Setting:
    return MODEL.with_(config=(("lazarus", {"rebalance_interval": INTERVAL, "restart_s": 0.0, **section}),))


def events(path: str, number: int) -> list[dict[str, Any]]:
    """The events about placements, once there are so many."""
    deadline = time.monotonic() + 30 * TIME_SCALE
    while True:
        lines = [line for file in Path(path, "events").glob("*.jsonl") for line in file.read_text().splitlines()]
        found = [event for event in map(json.loads, filter(None, lines)) if event["event"] == "REBALANCE_PLANNED"]
        if len(found) >= number or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def case_rebalance(ctx: Any, path: str, plugin: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """Trains evenly, then with a skewed second layer, then evenly again."""
    engine = tools.build(setting(**section), plugin={"enabled": True, **plugin})
    out: dict[str, Any] = {"plans": []}
    with harness.logged() as logged:
        for names in (("even", "even"), ("even", "skewed"), ("even", "even")):
            route(engine, names)
            # The history's window is 4 decisions, and counts come one snapshot late.
            for _ in range(6 * INTERVAL):
                tools.train(engine, 1)
                counted = plugin["save_mode"] == "durable" and engine.global_steps % INTERVAL == INTERVAL - 1
                if counted or engine.global_steps == 1:
                    engine.save_checkpoint(path)
            assert engine.lazarus.wait(60 * TIME_SCALE)
            plan = engine.lazarus.rebalance
            out["plans"].append(None if plan is None else plan.to_data())
    engine.moc.wait()
    ctx.barrier()
    out["lines"] = [text for _, text in logged if "rebalance" in text]
    out["events"] = events(path, len(out["lines"])) if ctx.rank == 0 else []
    ctx.barrier()
    return out


PLUGINS: dict[str, dict[str, Any]] = {
    "snapshots": {"save_mode": "async", "snapshot_interval": 1, "host": {"on_busy": "wait", "linger_s": 3.0}},
    "saves": {"save_mode": "durable"},
}


@pytest.mark.parametrize("kind", sorted(PLUGINS))
def test_skew_leads_to_one_plan_everywhere_and_even_routing_to_none(pool: Pool, ckpt_dir: str, kind: str) -> None:
    """It is written as an event, and withdrawn by another one when routing is even again."""
    results = pool.run(WORLD, case_rebalance, path=ckpt_dir, plugin=PLUGINS[kind], section={}, deadline=120)
    first = results[0]
    assert all(result["plans"] == first["plans"] for result in results)
    even, plan, again = first["plans"]
    assert even is None and again is None
    assert plan["worth_it"] and plan["gain_s"] > plan["cost_s"] >= 0
    # By hand: the busiest rank has half of expert 0 and two halves of others, of a mean of a quarter of all.
    skewed = LOADS["skewed"]
    assert plan["imbalance_before"] == pytest.approx([1.0, (skewed[0] / 2 + skewed[1]) * WORLD / sum(skewed)])
    assert plan["imbalance_after"][0] == 1.0 and plan["imbalance_after"][1] < 1.5
    assert plan["placements"][0] == [list(held) for held in EVEN]
    assert all(len(held) == 3 for held in plan["placements"][1])
    assert min(sum(expert in held for held in plan["placements"][1]) for expert in range(EXPERTS)) >= 1
    missing = {
        (1, expert, rank)
        for rank, (held, old) in enumerate(zip(plan["placements"][1], EVEN, strict=True))
        for expert in set(held) - set(old)
    }
    assert {(item["layer"], item["expert"], item["destination"]) for item in plan["transfers"]} == missing
    assert all(item["expert"] in EVEN[item["source"]] for item in plan["transfers"])
    assert len(first["events"]) >= 2
    planned, withdrawn = first["events"][-2:]
    assert planned["worth_it"] and planned["placements"] == plan["placements"]
    assert planned["transfers"] == plan["transfers"] and planned["ranks_per_node"] == 1
    assert planned["step"] % INTERVAL == 0 and 6 * INTERVAL < planned["step"] < withdrawn["step"]
    assert not withdrawn["worth_it"] and withdrawn["placements"] == [[list(held) for held in EVEN]] * 2
    assert len(first["lines"]) == len(first["events"]) and all(not result["lines"] for result in results[1:])
    assert "rebalance pays" in first["lines"][0] and "1 of 2 MoE layers" in first["lines"][0]


def test_what_costs_more_than_it_gains_is_not_planned(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(
        WORLD,
        case_rebalance,
        path=ckpt_dir,
        plugin=PLUGINS["saves"],
        section={"restart_s": 1e6},
        deadline=120,
    )
    for result in results:
        assert (result["plans"], result["events"], result["lines"]) == ([None] * 3, [], [])


def case_restored(ctx: Any, path: str) -> dict[str, Any]:
    """Saves after skewed routing, restores into another engine, and routes evenly there."""
    engine = tools.build(setting(), plugin={"enabled": True})
    route(engine, ("skewed", "skewed"))
    tools.train(engine, INTERVAL - 2)
    engine.save_checkpoint(path)
    harness.discard(engine)
    harness.reset()
    engine = tools.build(setting(), plugin={"enabled": True})
    engine.load_checkpoint(path)
    counted = [sum(map(int, layer)) for layer in engine.moc.ledger.processed]
    plans = []
    for names, intervals in ((("even", "even"), 2), (("skewed", "even"), 5)):
        route(engine, names)
        for _ in range(intervals * INTERVAL):
            tools.train(engine, 1)
            # At the first decision the ledger is as restored, and a step has been timed.
            if engine.global_steps > INTERVAL and engine.global_steps % INTERVAL == INTERVAL - 1:
                engine.save_checkpoint(path)
            assert engine.lazarus.wait(60 * TIME_SCALE)
            plan = engine.lazarus.rebalance
            plans.append(None if plan is None else plan.to_data()["imbalance_before"])
    return {"counted": counted, "plans": plans}


def test_after_a_restore_older_tokens_do_not_count(pool: Pool, ckpt_dir: str) -> None:
    """What a restored ledger has counted may be from other placements; the history begins at the restore."""
    results = pool.run(WORLD, case_restored, path=ckpt_dir, deadline=120)
    assert all(result == results[0] for result in results)
    assert results[0]["counted"] == [(INTERVAL - 2) * WORLD * TOKENS] * 2
    plans = results[0]["plans"]
    assert plans[: 2 * INTERVAL] == [None] * (2 * INTERVAL)
    assert plans[-1] is not None and plans[-1][0] > 1 and plans[-1][1] == 1


def case_nodes(ctx: Any, path: str, names: str, threshold: int) -> dict[str, Any]:
    """A skewed layer, on nodes that MOC_NODE names."""
    import os

    os.environ["MOC_NODE"] = names[ctx.rank]
    try:
        engine = tools.build(setting(fault_threshold=threshold), plugin={"enabled": True})
        route(engine, ("skewed", "skewed"))
        tools.train(engine, INTERVAL - 1)
        engine.save_checkpoint(path)
        tools.train(engine, 1)
        assert engine.lazarus.wait(60 * TIME_SCALE)
    finally:
        del os.environ["MOC_NODE"]
    return {"plan": engine.lazarus.rebalance.to_data(), "ranks": events(path, 1)[0]["ranks_per_node"]}


def test_the_plan_is_one_of_nodes(pool: Pool, ckpt_dir: str) -> None:
    """Two nodes of two ranks; transfers are between nodes, and placements those of ranks."""
    results = pool.run(WORLD, case_nodes, path=ckpt_dir, names="aabb", threshold=1, deadline=120)
    assert all(result == results[0] for result in results)
    plan = results[0]["plan"]
    assert results[0]["ranks"] == 2
    assert all([len(held) for held in slots] == [3] * WORLD for slots in plan["placements"])
    assert {item["destination"] for item in plan["transfers"]} <= {0, 1}


def case_too_few_nodes(ctx: Any) -> dict[str, Any]:
    import os

    os.environ["MOC_NODE"] = "aabb"[ctx.rank]
    try:
        return harness.attempt(tools.build, setting(fault_threshold=3), plugin={"enabled": True})
    finally:
        del os.environ["MOC_NODE"]


def test_a_threshold_above_the_number_of_nodes_is_refused(pool: Pool) -> None:
    for result in pool.run(WORLD, case_too_few_nodes):
        assert result["raised"] == "ConfigError"
        assert "lazarus.fault_threshold is 3, and there are 2 nodes" in result["text"]


def case_stale(ctx: Any, path: str) -> dict[str, Any]:
    """A directory has a plan of an earlier run; this one trains evenly, in another placement, then once more."""
    from moc_ckpt.events import EventKind, EventLog
    from moc_ckpt.storage.store import open_store

    if ctx.rank == 0:
        old = [[[0, 1, 2], [0, 3, 4], [1, 3, 5], [2, 4, 5]]] * 2
        EventLog(open_store(path), "earlier").write(
            EventKind.REBALANCE_PLANNED, step=1, placements=old, ranks_per_node=1
        )
    ctx.barrier()
    seen = []
    for _ in range(2):
        engine = tools.build(setting(), plugin={"enabled": True})
        route(engine, ("even", "even"))
        for _ in range(2 * INTERVAL):
            tools.train(engine, 1)
            if engine.global_steps % INTERVAL == INTERVAL - 1:
                engine.save_checkpoint(path)
            assert engine.lazarus.wait(60 * TIME_SCALE)
        harness.discard(engine)
        harness.reset()
        ctx.barrier()
        seen.append([item["placements"] for item in events(path, 1)] if ctx.rank == 0 else [])
        ctx.barrier()
    return {"seen": seen, "plan": None}


def test_a_plan_of_an_earlier_run_that_is_not_in_force_is_withdrawn_once(pool: Pool, ckpt_dir: str) -> None:
    """Else a restart would go back to it, however long ago it was wanted."""
    first, second = pool.run(WORLD, case_stale, path=ckpt_dir, deadline=120)[0]["seen"]
    assert len(first) == 2 and first[-1] == [[list(held) for held in EVEN]] * 2
    assert second == first


def case_odd_slots(ctx: Any) -> dict[str, Any]:
    odd = ((0, 1, 2), (3, 4, 5), (0, 1), (2, 3))
    return harness.attempt(tools.build, setting().with_(placements=(EVEN, odd)), plugin={"enabled": True})


def test_ranks_with_different_numbers_of_slots_are_not_planned_for(pool: Pool) -> None:
    for result in pool.run(WORLD, case_odd_slots):
        assert result["raised"] == "ConfigError"
        assert "places have 2, 3 slots" in result["text"] and "MoE layer 1" in result["text"]
