"""Where `pretrain_gpt.py --lazarus` places experts: by a run's plan, else by loads."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from moc_ckpt.cli.placement_input import PlannedPlacements, read_planned
from moc_ckpt.errors import ConfigError, MocError
from moc_ckpt.events import EventKind, EventLog
from moc_ckpt.lazarus.types import Placement
from moc_ckpt.storage.store import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")

PLANS = [[[0, 0], [0, 1], [1, 2]], [[0, 1], [1, 2], [2, 2]]]


def plan(path: Path, node: str = "n", **fields: Any) -> None:
    data = {"worth_it": True, "placements": PLANS, "transfers": [], "ranks_per_node": 1, **fields}
    EventLog(open_store(str(path), create=True), node).write(EventKind.REBALANCE_PLANNED, step=7, **data)


def test_the_newest_plan_is_read(tmp_path: Path) -> None:
    assert read_planned(str(tmp_path)) is None
    plan(tmp_path, placements=PLANS[:1])
    EventLog(open_store(str(tmp_path)), "m").write(EventKind.SKIPPED, step=8)
    plan(tmp_path, "m", ranks_per_node=3)
    expected = tuple(Placement(3, tuple(map(tuple, slots))) for slots in PLANS)
    assert read_planned(str(tmp_path)) == PlannedPlacements(7, 3, expected)


@pytest.mark.parametrize("fields", [{"placements": [[]]}, {"placements": 5}, {"ranks_per_node": None}])
def test_a_plan_that_is_none_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    plan(tmp_path, **fields)
    with pytest.raises(ConfigError, match="REBALANCE_PLANNED of step 7 cannot be read"):
        read_planned(str(tmp_path))


def place(
    monkeypatch: pytest.MonkeyPatch, loads: Any, **changes: Any
) -> tuple[list[tuple[tuple[int, ...], ...]], list[str]]:
    """Placements of the script and what it says about them, as rank 0 of three."""
    import torch
    from gpt_moe import lazarus

    args = {"num_experts": 3, "lazarus_slots": 2, "lazarus_fault_threshold": 1, "lazarus_loads": str(loads), **changes}
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda found: None)
    monkeypatch.setattr(lazarus, "_loads", lambda args, layers: [[1.0] * args.num_experts] * layers)
    layers = changes.pop("layers", 2)
    settled = argparse.Namespace(**args)
    return [placement.slots for placement in lazarus.place_experts(settled, layers)], settled.lazarus_notes


@needs_megatron
def test_a_plan_is_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(tmp_path)
    placed, notes = place(monkeypatch, tmp_path)
    assert placed == [tuple(map(tuple, slots)) for slots in PLANS]
    assert notes == [f"the placement planned at step 7 in {tmp_path} is carried out"]


@needs_megatron
@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {"lazarus_slots": 3}),
        ({}, {"layers": 1}),
        ({}, {"num_experts": 4}),
        ({}, {"lazarus_fault_threshold": 2}),
        ({"ranks_per_node": 3}, {}),
        ({"placements": [slots[:2] for slots in PLANS]}, {}),
    ],
)
def test_a_plan_of_another_run_gives_way_to_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], changes: dict[str, Any]
) -> None:
    plan(tmp_path, **fields)
    placed, notes = place(monkeypatch, tmp_path, **changes)
    assert "is for another run" in notes[0]
    experts = changes.get("num_experts", 3)
    for slots in placed:
        counts = [sum(held.count(expert) for held in slots) for expert in range(experts)]
        assert sum(counts) == 3 * changes.get("lazarus_slots", 2)
        assert max(counts) - min(counts) <= 1


@needs_megatron
@pytest.mark.parametrize("made", [False, True])
def test_a_run_begins_with_its_own_directory(tmp_path: Path, made: bool) -> None:
    """The command of the first start is that of a restart; anybody else's directory has to have a checkpoint."""
    from gpt_moe.lazarus import _loads

    if made:
        (tmp_path / "c").mkdir()
    args = argparse.Namespace(num_experts=3, lazarus_loads=str(tmp_path / "c"), save=str(tmp_path / "c"), load=None)
    args.lazarus_notes = []
    assert _loads(args, 2) == [[1.0] * 3] * 2
    assert "has no checkpoint yet" in args.lazarus_notes[0]
    args.save = str(tmp_path)
    with pytest.raises(MocError):
        _loads(args, 2)


@needs_megatron
def test_without_a_plan_loads_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed, notes = place(monkeypatch, tmp_path)
    assert (len(placed), notes) == (2, [])
