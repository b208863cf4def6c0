"""Partial checkpoints and the directory: failed saves, several directories, rollbacks, retention, deleted tags."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distributed import harness
from distributed.pec_tools import (
    DEADLINE,
    Cycles,
    Diary,
    Waiting,
    build,
    everyone,
    manifest,
    row_experts,
    tags,
    verified,
    versions,
    written,
)
from distributed.pool import Pool
from distributed.test_errors import assert_all_raised, untouched

pytestmark = pytest.mark.distributed

ROW = "z1_bf16"
EXPERTS = row_experts(ROW)


# ------------------------------------------------------------------------------------------ failing saves


def case_failure(ctx: Any, path: str, victim: int, where: str, selection: str) -> dict[str, Any]:
    """The third save fails on one rank; everything after it is as in a run where nobody tried."""
    from moc_ckpt.errors import StorageError
    from moc_ckpt.integrations.deepspeed import directories, save
    from moc_ckpt.storage.local import LocalStore

    out: dict[str, Any] = {}
    for name, fails in (("good", False), ("bad", True)):
        diary = Diary(ctx, f"{path}/{name}", f"{path}/kept {name}")
        engine = build(ctx, ROW, 1, selection=selection)
        taken = []
        for number in range(4):
            harness.train(engine, 1)
            if fails and number == 2:
                place = {
                    "write": (save, "write_prepared"),
                    "commit": (directories, "commit"),
                    "latest": (LocalStore, "write"),
                }
                holder, attribute = place[where]
                original = getattr(holder, attribute)

                def refuse(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                    if where == "latest" and args[1] != "latest":
                        return original(*args, **kwargs)
                    if where == "write":  # after all is written but the part
                        original(*args, **kwargs)
                    raise StorageError("injected: no space left")

                if ctx.rank == victim:
                    setattr(holder, attribute, refuse)
                try:
                    before = harness.snapshot(ctx, engine)
                    failed = harness.attempt(engine.save_checkpoint, diary.path)
                finally:
                    setattr(holder, attribute, original)
                failed["changed"] = harness.differences(before, harness.snapshot(ctx, engine))
                failed["trains on"] = True
                out["failed"] = failed
                ctx.barrier()
                out["previous"] = verified(diary.path, "global_step2")
                ctx.barrier()
            taken.append(sorted(written(diary.save(engine))))
        out[name] = taken
        out[f"ledger {name}"] = [counts.tolist() for counts in engine.moc.ledger.processed]
        out[f"verify {name}"] = [line for tag in tags(diary.path) for line in verified(diary.path, tag)]
        engine = build(ctx, ROW, 1, seed=2, selection=selection)
        out[f"wrong {name}"] = diary.load(engine)
    return out


@pytest.mark.parametrize(
    ("where", "victim", "selection"),
    [("write", 2, "sequential"), ("write", 0, "load_aware"), ("commit", 0, "sequential"), ("latest", 0, "sequential")],
)
def test_failed_save_does_not_advance_anything(
    pool: Pool, ckpt_dir: str, where: str, victim: int, selection: str
) -> None:
    results = pool.run(
        4, case_failure, path=ckpt_dir, victim=victim, where=where, selection=selection, deadline=DEADLINE
    )
    assert_all_raised([result["failed"] for result in results], "injected", kind="StorageError")
    for result in results:
        assert result["previous"] == []
        assert result["bad"] == result["good"]
        assert result["ledger bad"] == result["ledger good"]
        assert result["verify good"] == result["verify bad"] == []
        assert result["wrong good"] == result["wrong bad"] == []


# ------------------------------------------------------------------------------------- several directories


def case_alternate(ctx: Any, path: str, rounds: int) -> dict[str, Any]:
    """Every step is saved, here or there or in both; each directory has its own cycle."""
    diaries = [Diary(ctx, f"{path}/{name}", f"{path}/kept {name}") for name in "ab"]
    cycles = [Cycles(EXPERTS) for _ in diaries]
    waiting = [Waiting(EXPERTS) for _ in diaries]
    engine = build(ctx, ROW, 1)
    out: dict[str, Any] = {"broken": [], "longest": 0, "first": [], "wrong": []}
    for number in range(rounds):
        harness.train(engine, 1)
        # In round 6 the first directory gets a second save of the same step.
        for at in (0, 1) if number % 3 else (0, 0) if number == 6 else (0,):
            took = waiting[at].saw(diaries[at].save(engine, f"round {number}, {len(waiting[at].taken)}"))
            if len(waiting[at].taken) == 1:
                out["first"].append(took == everyone(EXPERTS))
                continue
            out["broken"] += cycles[at].broken(took, 1)
            out["longest"] = max(out["longest"], *(waiting[at].longest(layer) for layer in range(len(EXPERTS))))
    for diary in diaries:
        engine = build(ctx, ROW, 1, seed=2)
        out["wrong"] += diary.load(engine)
        out["wrong"] += verified(diary.path, Path(diary.path, "latest").read_text())
        # From one directory into the other: nothing there belongs to this state.
        other = diaries[diary is diaries[0]]
        harness.train(engine, 1)
        out["first"].append(written(other.save(engine, f"from {diary.path[-1]}")) == everyone(EXPERTS))
    return out


def test_two_directories_alternately(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(4, case_alternate, path=ckpt_dir, rounds=10, deadline=DEADLINE):
        assert result == {"broken": [], "longest": 3, "first": [True] * 4, "wrong": []}


def case_same_tag(ctx: Any, path: str, saves: int, relaunch: bool) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    cycles, engine = Cycles(EXPERTS), build(ctx, ROW, 1)
    out: dict[str, Any] = {"broken": [], "wrong": [], "sizes": []}
    for number in range(saves):
        harness.train(engine, 1)
        took = written(diary.save(engine, "last"))
        out["broken"] += cycles.broken(took, 1) if number else [] if took == everyone(EXPERTS) else ["not full"]
        ctx.barrier()
        out["wrong"] += verified(diary.path, "last")
        out["sizes"].append(sum(file.stat().st_size for file in Path(diary.path).rglob("*.*") if file.is_file()))
        ctx.barrier()
        if relaunch or number == saves - 1:
            engine = build(ctx, ROW, 1, seed=3 + number)
            out["wrong"] += diary.load(engine)
    return out


@pytest.mark.parametrize("relaunch", [False, True], ids=["one run", "relaunched"])
def test_same_tag_again_and_again(pool: Pool, ckpt_dir: str, relaunch: bool) -> None:
    saves = 7 if relaunch else 12
    for result in pool.run(4, case_same_tag, path=ckpt_dir, saves=saves, relaunch=relaunch, deadline=DEADLINE):
        assert result["broken"] == result["wrong"] == []
        assert max(result["sizes"][5:]) < 1.4 * max(result["sizes"][1:5]), f"it grows: {result['sizes']}"


def case_retention(ctx: Any, path: str, saves: int, storage: dict[str, int], best: bool) -> dict[str, Any]:
    """Saves every step; with `best` every third save goes to one and the same tag."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, 1, storage=storage)
    out: dict[str, Any] = {"wrong": [], "sizes": [], "tags": [], "unneeded": []}
    for number in range(saves):
        harness.train(engine, 1)
        diary.save(engine, "best" if best and number % 3 == 1 else None)
        ctx.barrier()
        left = tags(diary.path)
        out["tags"].append(left)
        out["wrong"] += [line for tag in left for line in verified(diary.path, tag)]
        needed = {pack["path"] for tag in left for pack in manifest(diary.path, tag)["packs"]}
        there = {str(found.relative_to(diary.path)) for found in Path(diary.path).glob("*/*/packs/*")}
        out["unneeded"] += sorted(there - needed)
        out["sizes"].append(sum(file.stat().st_size for file in Path(diary.path).rglob("*") if file.is_file()))
        ctx.barrier()
    for tag in left:
        out["wrong"] += diary.load(build(ctx, ROW, 1, seed=9), tag)
    return out


@pytest.mark.parametrize(
    ("storage", "best", "left"),
    [
        ({"keep_last": 1}, False, ["global_step10"]),
        ({"keep_last": 2, "keep_every": 4}, True, ["best", "global_step10", "global_step4", "global_step9"]),
    ],
    ids=["last 1", "last 2 every 4"],
)
def test_retention_keeps_what_is_needed_and_no_more(
    pool: Pool, ckpt_dir: str, storage: dict[str, int], best: bool, left: list[str]
) -> None:
    for result in pool.run(4, case_retention, path=ckpt_dir, saves=10, storage=storage, best=best, deadline=DEADLINE):
        assert result["wrong"] == []
        assert result["unneeded"] == []
        assert result["tags"][-1] == left
        if storage == {"keep_last": 1}:
            assert max(result["sizes"][5:]) < 1.3 * max(result["sizes"][:5]), f"it grows: {result['sizes']}"


# ---------------------------------------------------------------------------------------------- going back


def case_rollback(ctx: Any, path: str, same_engine: bool) -> dict[str, Any]:
    """Steps 2, 4, 6, 8; back to 4, on to another 6 and 8; then the old 8 after all, and the new one again."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, 1, storage={"keep_last": 0})
    out: dict[str, Any] = {"wrong": [], "versions": {}}
    for _ in range(4):
        harness.train(engine, 2)
        diary.save(engine)

    def again(seed: int, tag: str | None) -> None:
        nonlocal engine
        if not same_engine:
            engine = build(ctx, ROW, 1, seed=seed, storage={"keep_last": 0})
        out["wrong"] += diary.load(engine, tag)

    again(2, "global_step4")
    for _ in range(2):
        harness.train(engine, 2, data_seed=31)
        body = diary.save(engine, f"new{engine.global_steps}" if engine.global_steps == 8 else None)
        out["versions"][f"second {body['step']}"] = versions(body)
    again(3, "global_step8")
    harness.train(engine, 2, data_seed=32)
    out["versions"]["third 10"] = versions(diary.save(engine))
    again(4, "new8")
    harness.train(engine, 2, data_seed=33)
    out["versions"]["fourth 10"] = versions(diary.save(engine, "fourth"))
    for tag in tags(diary.path):
        out["wrong"] += verified(diary.path, tag)
        out["wrong"] += diary.load(build(ctx, ROW, 1, seed=9), tag)
    return out


@pytest.mark.parametrize("same_engine", [False, True], ids=["relaunched", "same engine"])
def test_rolled_back_versions_never_come_back(pool: Pool, ckpt_dir: str, same_engine: bool) -> None:
    results = pool.run(4, case_rollback, path=ckpt_dir, same_engine=same_engine, deadline=DEADLINE)
    for result in results:
        assert result["wrong"] == []
        lines = {"second 6": {1: 4, 2: 6}, "second 8": {1: 4, 2: 8}, "third 10": {1: 8, 3: 10}}
        lines["fourth 10"] = {1: 4, 2: 8, 4: 10}
        for name, line in lines.items():
            for place, (attempt, step) in result["versions"][name].items():
                assert attempt in line and step <= line[attempt], (name, place, attempt, step)
            assert len(set(result["versions"][name].values())) > 2


def case_relaunch(ctx: Any, path: str, k: int, saves: int, selection: str) -> dict[str, Any]:
    """A new engine after every save."""
    diary, cycles, waiting = Diary(ctx, f"{path}/c", f"{path}/kept"), Cycles(EXPERTS), Waiting(EXPERTS)
    out: dict[str, Any] = {"broken": [], "wrong": [], "longest": 0}
    for number in range(saves):
        engine = build(ctx, ROW, k, seed=1 + number, selection=selection)
        out["wrong"] += diary.load(engine) if number else []
        harness.train(engine, 1)
        took = waiting.saw(diary.save(engine))
        out["broken"] += cycles.broken(took, k) if number and selection == "sequential" else []
        out["longest"] = max(out["longest"], *(waiting.longest(layer) for layer in range(len(EXPERTS))))
    out["first"] = waiting.taken[0] == everyone(EXPERTS)
    return out


@pytest.mark.parametrize(
    ("k", "selection", "longest"), [(1, "sequential", 3), (3, "sequential", 1), (1, "load_aware", 7)]
)
def test_relaunch_after_every_save_goes_on_in_the_cycle(
    pool: Pool, ckpt_dir: str, k: int, selection: str, longest: int
) -> None:
    saves = 4 if k == 3 else 6
    results = pool.run(4, case_relaunch, path=ckpt_dir, k=k, saves=saves, selection=selection, deadline=2 * DEADLINE)
    for result in results:
        assert result["broken"] == result["wrong"] == []
        assert result["first"]
        assert result["longest"] <= longest


# ------------------------------------------------------------------------------------------- deleted by hand


def case_deleted(ctx: Any, path: str, relaunch: bool, what: str) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, 1, storage={"keep_last": 0})
    for _ in range(3):
        harness.train(engine, 1)
        diary.save(engine)
    needs = sorted(place for place, version in versions(manifest(diary.path)).items() if version[1] == 1)
    ctx.barrier()
    if ctx.rank == 0:
        victim = Path(diary.path, "global_step1")
        if what == "tag":
            shutil.rmtree(victim)
        else:  # one file of one pack
            files = sorted(file for file in victim.glob("*/packs/rank_00002.experts/**/*") if file.is_file())
            files[-1].unlink()
    ctx.barrier()
    out: dict[str, Any] = {"needs": needs, "wrong": []}
    if relaunch:
        engine = build(ctx, ROW, 1, seed=2, storage={"keep_last": 0})
    else:
        harness.train(engine, 1)
    out["load"] = untouched(ctx, engine, lambda: engine.load_checkpoint(diary.path))
    out["named"] = [line for line in verified(diary.path, "global_step3") if "global_step1" in line]
    if not relaunch:
        with harness.logged() as log:
            body = diary.save(engine)
        out["log"] = [text for level, text in log if level == "WARNING"]
        out["took"] = sorted(written(body))
        out["wrong"] += verified(diary.path, body["tag"])
        harness.train(engine, 1)
        out["then"] = sorted(written(diary.save(engine)))
        out["wrong"] += diary.load(build(ctx, ROW, 1, seed=3))
    return out


@pytest.mark.parametrize(("relaunch", "what"), [(False, "tag"), (False, "file"), (True, "tag")])
def test_tag_deleted_by_hand(pool: Pool, ckpt_dir: str, relaunch: bool, what: str) -> None:
    results = pool.run(4, case_deleted, path=ckpt_dir, relaunch=relaunch, what=what, deadline=DEADLINE)
    assert_all_raised([result["load"] for result in results], "global_step1", "expert/", kind="CorruptionError")
    for result in results:
        assert result["named"]
        assert result["wrong"] == []
        assert len(result["needs"]) == sum(EXPERTS) - 2 * len(EXPERTS)
        if relaunch:
            continue
        assert len(result["then"]) == len(EXPERTS)
        if what == "tag":
            assert set(result["needs"]) <= set(map(tuple, result["took"]))
    if not relaunch:
        assert any("anew" in text and "expert/" in text for text in results[0]["log"]), results[0]["log"]
