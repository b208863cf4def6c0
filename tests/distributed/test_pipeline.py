"""The asynchronous pipeline: snapshots beside training, persisted and committed by the node agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Diary, everyone, manifest, row_experts, tags, verified, versions, written
from distributed.pool import Pool

pytestmark = pytest.mark.distributed

#: An agent must not outlive the tests for long.
ASYNC: dict[str, Any] = {"save_mode": "async", "host": {"linger_s": 3.0}}


def build(ctx: Any, row: Any, k: Any = None, *, seed: int = 1, **plugin: Any) -> Any:
    from distributed.pec_tools import build as build_engine

    section = {**ASYNC, **plugin}
    return build_engine(ctx, row, k, seed=seed, **section)


def case_explicit(ctx: Any, path: str, row: str, saves: int, k: int | None, plugin: dict[str, Any]) -> dict[str, Any]:
    """Save after every step and go on training at once; then load the newest and one from the middle elsewhere."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    plugin = {"k_snapshot": k or "auto", "storage": {"keep_last": 0}, **plugin}
    engine = build(ctx, row, k, **plugin)
    out: dict[str, Any] = {"wrong": []}
    for _ in range(saves):
        harness.train(engine, 1)
        assert engine.save_checkpoint(diary.path) is True
        diary.note(engine, attempt=1)
    # The last save is under way while its state is being overwritten.
    harness.train(engine, 3)
    engine.moc.wait()
    out["tags"] = tags(diary.path)
    out["sizes"] = [len(written(manifest(diary.path, tag))) for tag in out["tags"]]
    if ctx.rank == 0:
        out["wrong"] += [problem for tag in out["tags"] for problem in verified(diary.path, tag)]
    engine = build(ctx, row, k, seed=2, **plugin)
    harness.train(engine, 2, data_seed=99)
    out["wrong"] += diary.load(engine)
    out["wrong"] += diary.load(engine, f"global_step{saves // 2 + 1}")
    return out


EXPLICIT = [
    ("z2_bf16", None, {}),
    ("z2_bf16", 1, {}),
]


@pytest.mark.parametrize(("row", "k", "plugin"), EXPLICIT, ids=[f"{row}-{k}" for row, k, _ in EXPLICIT])
def test_saves_beside_training(pool: Pool, tmp_path: Path, row: str, k: int | None, plugin: dict[str, Any]) -> None:
    saves = 5
    answers = pool.run(4, case_explicit, path=str(tmp_path), row=row, saves=saves, k=k, plugin=plugin, deadline=DEADLINE)
    assert [problem for answer in answers for problem in answer["wrong"]] == []
    assert answers[0]["tags"] == [f"global_step{step + 1}" for step in range(saves)]
    experts = row_experts(zoo.ROWS[row])
    assert answers[0]["sizes"][0] == len(everyone(experts))
    if k is not None:
        assert answers[0]["sizes"][1:] == [sum(min(k, count) for count in experts)] * (saves - 1)
