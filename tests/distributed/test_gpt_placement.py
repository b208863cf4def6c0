"""`pretrain_gpt.py --lazarus`: the first rank reads the loads and places experts, the others learn what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from distributed.harness import attempt

pytest.importorskip("megatron.core")

pytestmark = pytest.mark.distributed

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def case_place(ctx: Any, **given: Any) -> Any:
    import os
    import sys

    sys.path.insert(0, str(SCRIPTS))
    try:
        from gpt_moe.lazarus import place_experts
    finally:
        sys.path.remove(str(SCRIPTS))
    # Nodes with different numbers of ranks: by itself the last rank would plan for another cluster.
    os.environ["LOCAL_WORLD_SIZE"] = "2" if ctx.rank < 2 else "4"
    args = {"num_experts": 3, "lazarus_slots": 2, "lazarus_fault_threshold": 1, "load": None, "save": None} | given
    try:
        found = attempt(place_experts, argparse.Namespace(**args), 2)
    except SystemExit as error:
        return str(error)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    return found


def test_all_ranks_place_alike(pool: Any, tmp_path: Path) -> None:
    own = str(tmp_path / "runs")
    found = pool.run(4, case_place, lazarus_loads=own, load=own)
    assert all(item == found[0] for item in found), "also on the first start of a run that reads its own loads"
    assert "Placement" in str(found[0])


@pytest.mark.parametrize("loads", ["/nowhere/loads.json", "1,2", "1,2,nan"])
def test_loads_that_cannot_be_used_end_all_ranks(pool: Any, loads: str) -> None:
    found = pool.run(4, case_place, lazarus_loads=loads, deadline=60.0)
    assert all(isinstance(item, str) and item == found[0] for item in found), found
    assert "nowhere" in found[0] or "not those of this model" in found[0] or "load of expert 2 is nan" in found[0]


def test_errors_that_nobody_thought_of_end_all_ranks_too(pool: Any, tmp_path: Path) -> None:
    (tmp_path / "loads.json").write_text("[1, 2, 1" + "0" * 400 + "]")
    found = pool.run(4, case_place, lazarus_loads=str(tmp_path / "loads.json"), deadline=60.0)
    assert all(isinstance(item, str) and item == found[0] for item in found), found
    assert "OverflowError" in found[0] or "load of expert 2" in found[0]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_plan_is_found_by_path_and_by_url(pool: Any, tmp_path: Path, scheme: str) -> None:
    from moc_ckpt.events import EventKind, EventLog
    from moc_ckpt.storage.store import open_store

    slots = [[0, 0], [0, 1], [1, 2], [0, 2]]
    log = EventLog(open_store(str(tmp_path)), "n")
    # Ranks per node as rank 0 sees them, which plans for all.
    log.write(EventKind.REBALANCE_PLANNED, step=7, placements=[slots] * 2, ranks_per_node=2)
    found = pool.run(4, case_place, lazarus_loads=f"{scheme}{tmp_path}")
    assert all(item == found[0] for item in found)
    for held in slots:
        assert str(tuple(held)) in str(found[0])
