"""Loops that count a step after `engine.step` has returned: `hold_boundaries` and `boundary`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed import harness
from distributed.pec_tools import DEADLINE
from distributed.pool import Pool
from distributed.test_pipeline import build

pytestmark = pytest.mark.distributed


def case_counters(ctx: Any, path: str, held: bool) -> dict[str, Any]:
    import torch

    host = {"linger_s": 3.0, "on_busy": "wait"}
    engine = build(ctx, "w2_ep1", None, snapshot_interval=1, persist_interval=1, save_dir=path, host=host)
    counters = {"steps": 0}
    engine.moc.register_state(lambda: dict(counters))
    if held:
        engine.moc.hold_boundaries()
    for _ in range(3):
        harness.train(engine, 1)
        counters["steps"] += 1
        torch.manual_seed(100 + counters["steps"])  # as an evaluation leaves it
        if held:
            engine.moc.boundary()
            engine.moc.boundary()  # nothing happens twice
    state = torch.get_rng_state()
    torch.rand(1)
    engine.moc.wait()
    other = build(ctx, "w2_ep1", None, seed=5, save_mode="durable")
    _, client_state = other.load_checkpoint(path)
    return {
        "step": other.global_steps,
        "client_state": client_state,
        "same": torch.equal(torch.get_rng_state(), state),
    }


@pytest.mark.parametrize("held", [True, False])
def test_a_snapshot_has_what_belongs_to_its_step(pool: Pool, tmp_path: Path, held: bool) -> None:
    for answer in pool.run(2, case_counters, path=str(tmp_path / "c"), held=held, deadline=DEADLINE):
        assert answer["step"] == 3
        assert answer["client_state"] == {"steps": 3 if held else 2}
        assert answer["same"] is held
