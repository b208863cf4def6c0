"""Damage costs an expert's recent past, never the checkpoint: older versions, older checkpoints, and the save after."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distributed import harness, pec_tools
from distributed.pec_tools import DEADLINE, Diary, Place, build, manifest, row_experts, verified, versions, written
from distributed.pool import Pool
from distributed.test_errors import assert_all_raised, untouched

pytestmark = pytest.mark.distributed

ROW = "z1_bf16"
EXPERTS = row_experts(ROW)


def flip(files: list[Path]) -> None:
    """Change one byte in the middle of each file."""
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x40
        file.write_bytes(data)


def payload(path: str, tag: str, pack: str) -> list[Path]:
    """The payload files of the packs of a tag's own save that match."""
    return sorted(file for file in Path(path, tag).glob(f"*/packs/{pack}/c/*") if file.is_file())


def hit(body: dict[str, Any], pack: str) -> set[Place]:
    """The experts that have bytes in the packs of a manifest whose path ends like this."""
    table, out = body["fragments"], set()
    for unit, number in zip(table["unit"], table["pack"], strict=True):
        if body["packs"][number]["path"].endswith(pack):
            _, layer, expert = body["units"][unit]["name"].split("/")
            out.add((int(layer), int(expert)))
    return out


def older(path: str, tags: list[str], place: Place, bad: list[tuple[int, int]]) -> tuple[int, int]:
    """The newest version of an expert in some manifests that is none of the damaged ones."""
    return max(v for v in (versions(manifest(path, tag))[place] for tag in tags) if v not in bad)


def promised(body: dict[str, Any], instead: dict[Place, tuple[int, int]]) -> dict[str, Any]:
    """A manifest's body with other versions of some experts."""
    units = []
    for unit in body["units"]:
        parts = unit["name"].split("/")
        place = (int(parts[1]), int(parts[2])) if parts[0] == "expert" else None
        attempt, step = instead.get(place, (unit["attempt"], unit["step"])) if place else (0, 0)
        units.append({**unit, "attempt": attempt, "step": step} if place else unit)
    return {**body, "units": units}


def four_saves(ctx: Any, path: str, **plugin: Any) -> Diary:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, 1, storage={"keep_last": 0}, **plugin)
    for _ in range(4):
        harness.train(engine, 1)
        diary.save(engine)
    ctx.barrier()
    return diary


def case_experts(ctx: Any, path: str, twice: bool, mode: str, tag: str | None) -> dict[str, Any]:
    """Rank 1's experts of the last save are damaged (and those of the one before); load, train, save, load again."""
    diary = four_saves(ctx, path)
    body = manifest(diary.path)
    tags = [f"global_step{step}" for step in (1, 2, 3, 4)]
    hurt = tags[2:] if twice else tags[3:]
    now, bad = versions(body), {(1, int(name.removeprefix("global_step"))) for name in hurt}
    own = {place for place in hit(body, "rank_00001.experts") if now[place] in bad}
    instead = {place: older(diary.path, tags, place, sorted(bad)) for place in own}
    if ctx.rank == 0:
        flip([file for name in hurt for file in payload(diary.path, name, "rank_00001.experts")])
    ctx.barrier()
    engine = build(ctx, ROW, 1, seed=2, storage={"keep_last": 0}, save_mode=mode)
    before = harness.snapshot(ctx, engine)
    with harness.logged() as log:
        where, _ = engine.load_checkpoint(diary.path, tag=tag)
    with mock.patch.object(pec_tools, "manifest", lambda *_: promised(body, instead)):
        wrong = diary.wrong(engine)
    from moc_ckpt.events import read_events
    from moc_ckpt.storage.store import open_store

    events = [event for event in read_events(open_store(diary.path)) if event.event == "RECOVERED"]
    ledger = engine.moc.ledger
    out = {
        "own": sorted(own),
        "where": where,
        "changed": bool(harness.differences(before, harness.snapshot(ctx, engine))),
        "wrong": wrong,
        "log": [text for level, text in log if level == "WARNING"],
        "event": events[-1].fields,
        "lost": [counts.tolist() for counts in ledger.lost],
        "plt": ledger.plt,
    }
    harness.train(engine, 1)
    if mode == "async":
        engine.save_checkpoint(diary.path)
        engine.moc.wait(60)
        ctx.barrier()
        body = manifest(diary.path, "global_step5")
    else:
        body = diary.save(engine)
    out["took"] = sorted(written(body))
    out["verify"] = verified(diary.path, "global_step5")
    ctx.barrier()
    if mode != "async":
        harness.train(engine, 1)
        out["then"] = sorted(written(diary.save(engine)))
        out["wrong"] += diary.load(build(ctx, ROW, 1, seed=3))
    return out


@pytest.mark.parametrize(
    ("twice", "mode", "tag"),
    [(False, "durable", None), (True, "durable", "global_step4"), (False, "async", None)],
    ids=["last save", "last two, by tag", "beside training"],
)
def test_damaged_experts_go_back_and_are_saved_first(
    pool: Pool, ckpt_dir: str, twice: bool, mode: str, tag: str | None
) -> None:
    results = pool.run(2, case_experts, path=ckpt_dir, twice=twice, mode=mode, tag=tag, deadline=DEADLINE)
    for result in results:
        assert result["own"], "nothing was damaged that the checkpoint needs"
        assert result["where"].endswith("global_step4")
        assert result["wrong"] == []
        assert result["verify"] == []
        assert set(result["own"]) <= set(result["took"])
        assert len(result.get("then", [])) <= len(EXPERTS)
        fields = result["event"]
        assert sorted(item["unit"] for item in fields["damaged"]) == [f"expert/{a}/{b}" for a, b in result["own"]]
        for item in fields["damaged"]:
            _, layer, expert = item["unit"].split("/")
            assert item["lost"] == result["lost"][int(layer)][int(expert)]
            assert item["to"] < item["from"]
        assert 0 < fields["damage_plt"] <= result["plt"]
    text = "\n".join(results[0]["log"])
    assert "DAMAGED" in text and "rank_00001.experts" in text and "PLT" in text
    assert all(f"expert/{a}/{b}" in text for a, b in results[0]["own"])


def case_whole_checkpoint(ctx: Any, path: str, what: str) -> dict[str, Any]:
    """The last checkpoint's dense state, small state or manifest is damaged."""
    diary = four_saves(ctx, path)
    ctx.barrier()
    if ctx.rank == 0:
        last = Path(diary.path, "global_step4")
        if what == "latest":
            Path(diary.path, "latest").unlink()
        elif what == "gone":
            (last / "manifest.json").unlink()
        else:
            found = {
                "dense": payload(diary.path, "global_step4", "rank_00000.dense"),
                "extra": sorted(last.glob("*/extra/rank_00001.msgpack")),
                "manifest": [last / "manifest.json"],
            }
            assert found[what]
            flip(found[what])
    ctx.barrier()
    engine = build(ctx, ROW, 1, seed=2, storage={"keep_last": 0})
    out: dict[str, Any] = {}
    if what != "latest":
        out["by tag"] = untouched(ctx, engine, lambda: engine.load_checkpoint(diary.path, tag="global_step4"))
    with harness.logged() as log:
        where, _ = engine.load_checkpoint(diary.path)
    out["where"] = Path(where).name
    out["wrong"] = diary.wrong(engine, out["where"])
    out["log"] = "\n".join(text for level, text in log if level == "WARNING")
    # What comes after must not refer to what was given up.
    harness.train(engine, 1, data_seed=9)
    body = diary.save(engine)
    ctx.barrier()
    out["wrong"] += verified(diary.path, body["tag"])
    out["wrong"] += diary.load(build(ctx, ROW, 1, seed=3), body["tag"])
    out["latest"] = Path(diary.path, "latest").read_text()
    return out


@pytest.mark.parametrize("what", ["dense", "extra", "manifest", "gone", "latest"])
def test_the_checkpoint_before(pool: Pool, ckpt_dir: str, what: str) -> None:
    results = pool.run(2, case_whole_checkpoint, path=ckpt_dir, what=what, deadline=DEADLINE)
    if what != "latest":
        assert_all_raised([result["by tag"] for result in results], "global_step4", kind="StorageError")
    step = 4 if what == "latest" else 3
    for result in results:
        assert result["where"] == f"global_step{step}"
        assert result["wrong"] == []
        assert result["latest"] == f"global_step{step + 1}"
    assert "DAMAGED" in results[0]["log"] and ("latest" if what == "latest" else "global_step4") in results[0]["log"]
