"""A real SIGKILL in the middle of a save: afterwards the old checkpoint or the new one loads, whole (I4).

The victim counts its own file-system operations during the save and kills itself before the n-th. A dry
run records the operations first, so that the kill points spread over all of them whatever they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import harness, oracle
from distributed.harness import ON
from distributed.pool import CaseHang, Pool

from faults.operations import Operations

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROW = "w2_ep1"
WORLD = 2


def case_save(ctx: Any, path: str, refs: str, victim: int, fatal: int | None, tag: str) -> list[str]:
    """Save "old", train on, save `tag` while the victim counts or dies; its operations."""
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="old")
    harness.keep(ctx, engine, f"{refs}/old.pt")
    harness.train(engine, 2)
    harness.keep(ctx, engine, f"{refs}/new.pt")
    if ctx.rank != victim:
        engine.save_checkpoint(path, tag=tag)
        return []
    with Operations(fatal) as operations:
        engine.save_checkpoint(path, tag=tag)
    return operations.names


def case_recover(ctx: Any, path: str, refs: str, tag: str) -> dict[str, Any]:
    """What a relaunched job finds."""
    committed = Path(path, tag, "manifest.json").exists()
    engine = harness.build(ROW, world=ctx.world, seed=7, plugin=ON)
    harness.train(engine, 1, data_seed=3)

    def differs(name: str) -> list[str]:
        return harness.differences_from_kept(ctx, engine, f"{refs}/{name}.pt")

    out: dict[str, Any] = {"committed": committed}
    where, _ = engine.load_checkpoint(path)
    out["found"] = where is not None
    steps = engine.global_steps
    out["latest is"] = {2: "old", 4: "new"}.get(steps, f"step {steps}")
    out["latest"] = differs(out["latest is"])
    if tag != "old":
        engine.load_checkpoint(path, tag="old")
        out["old"] = differs("old")
    if committed:
        engine.load_checkpoint(path, tag=tag)
        out["by tag"] = differs("new" if engine.global_steps == 4 else "old")
    else:
        out["by tag"] = (
            [] if harness.attempt(engine.load_checkpoint, path, tag=tag)["moc"] else ["loaded without manifest"]
        )
    engine.load_checkpoint(path)
    harness.train(engine, 1)
    before = harness.snapshot(ctx, engine)
    engine.save_checkpoint(path, tag=tag)
    engine.load_checkpoint(path)
    out["saved again"] = harness.differences(before, harness.snapshot(ctx, engine))
    return out


@pytest.fixture(scope="module")
def victims() -> Iterator[Pool]:
    """Processes of their own: these die."""
    with Pool() as own:
        yield own


@pytest.fixture(scope="module")
def operations(victims: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """The writing calls of each rank during one save, from a dry run."""
    out = {}
    for rank in range(WORLD):
        top = tmp_path_factory.mktemp(f"dry{rank}")
        out[rank] = victims.run(
            WORLD, case_save, path=str(top / "ckpt"), refs=str(top), victim=rank, fatal=None, tag="new"
        )[rank]
        assert out[rank], f"rank {rank} wrote nothing during a save"
    return out


#: (rank, where in its operations: 0 the first, 1 the last, tag). "old": the tag is saved a second time.
POINTS = [
    (0, 0.0, "new"),
    (0, 0.3, "new"),
    (0, 0.6, "new"),
    (0, 0.8, "new"),
    (0, 0.9, "new"),
    (0, 0.95, "new"),
    (0, 1.0, "new"),
    (1, 0.1, "new"),
    (1, 0.5, "new"),
    (1, 1.0, "new"),
    (0, 0.7, "old"),
    (0, 0.97, "old"),
    (1, 0.8, "old"),
]


@pytest.mark.parametrize(("victim", "where", "tag"), POINTS)
def test_killed_in_the_middle_of_a_save(
    victims: Pool, operations: dict[int, list[str]], ckpt_dir: str, victim: int, where: float, tag: str
) -> None:
    fatal = round(where * (len(operations[victim]) - 1))
    path = f"{ckpt_dir}/ckpt"
    with pytest.raises(CaseHang, match=rf"rank {victim} died \(exit -9\)"):
        victims.run(WORLD, case_save, path=path, refs=ckpt_dir, victim=victim, fatal=fatal, tag=tag)
    results = victims.run(WORLD, case_recover, path=path, refs=ckpt_dir, tag=tag)
    for rank, result in enumerate(results):
        label = (
            f"rank {rank}, killed before about {operations[victim][fatal]} (call {fatal} of {len(operations[victim])})"
        )
        assert result["found"], label
        assert result["latest is"] in ("old", "new"), label
        if not result["committed"]:
            assert result["latest is"] == "old", label
        for name in ("latest", "old", "by tag", "saved again"):
            assert result.get(name, []) == [], f"{label}: {name}"


def test_oracle_sees_a_difference(victims: Pool, ckpt_dir: str) -> None:
    """The comparisons above can fail: old and new really differ."""
    victims.run(WORLD, case_save, path=f"{ckpt_dir}/c", refs=ckpt_dir, victim=0, fatal=None, tag="new")
    old, new = (harness.kept(f"{ckpt_dir}/{name}.pt") for name in ("old", "new"))
    assert oracle.global_differences(old["global"], new["global"])
