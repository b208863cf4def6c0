"""`moc-ckpt recover` says what `load_checkpoint` then does: the checkpoint, and the version of every expert."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from distributed import harness, pec_tools
from distributed.pec_tools import DEADLINE, Diary, Place, build, manifest, versions
from distributed.pool import CaseError, Pool
from distributed.test_damage import flip, payload, promised
from moc_ckpt.cli.main import app

pytestmark = pytest.mark.distributed

ROW = "z1_bf16"
LAST = "global_step6"
BEFORE = "global_step5"


def case_saves(ctx: Any, path: str) -> dict[Place, tuple[int, int]]:
    """Three saves of one attempt and three of the next, one expert per layer each but the first."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    for attempt in (1, 2):
        engine = build(ctx, ROW, 1, seed=attempt, storage={"keep_last": 0})
        if attempt == 2:
            assert diary.load(engine) == []
        for _ in range(3):
            harness.train(engine, 1)
            diary.save(engine)
    ctx.barrier()
    return versions(manifest(diary.path))


def case_load(ctx: Any, path: str, beside: str, tag: str | None, said: dict[str, Any]) -> dict[str, Any]:
    """Loads, and compares every element with the oracle's state of the version that `recover` named."""
    from moc_ckpt.events import read_events
    from moc_ckpt.storage.store import open_store

    diary = Diary(ctx, path, beside)
    engine = build(ctx, ROW, 1, seed=7, storage={"keep_last": 0})
    where, _ = engine.load_checkpoint(path, tag=tag)
    body = manifest(path, said["tag"])
    # What is not listed is of the checkpoint's own version.
    every = dict.fromkeys(versions(body), (body["attempt"], body["step"]))
    for item in said["experts"]:
        _, layer, expert = item["unit"].split("/")
        every[int(layer), int(expert)] = (item["attempt"], item["step"])
    with mock.patch.object(pec_tools, "manifest", lambda *_: promised(body, every)):
        wrong = diary.wrong(engine)
    ctx.barrier()
    event = [event for event in read_events(open_store(path)) if event.event == "RECOVERED"][-1]
    return {
        "where": Path(where).name,
        "step": engine.global_steps,
        "wrong": wrong,
        "event": event.fields,
        "plt": engine.moc.ledger.plt,
    }


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory of six checkpoints of two attempts, with the oracle's states of all of them beside it."""
    path = str(tmp_path_factory.mktemp("saved"))
    for found in pool.run(2, case_saves, path=path, deadline=DEADLINE):
        assert {attempt for attempt, _ in found.values()} == {1, 2}, "experts of both attempts are wanted"
    return path


def remove(files: list[Path]) -> None:
    """Remove files; there must be some."""
    assert files
    for file in files:
        file.unlink()


def cut(files: list[Path]) -> None:
    """Cut files to half their length."""
    assert files
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])


def experts_deleted(path: str) -> None:
    for pack in Path(path, LAST).glob("*/packs/rank_00001.experts"):
        shutil.rmtree(pack)


def experts_of_all_but_the_first_deleted(path: str) -> None:
    for tag in pec_tools.tags(path):
        if tag != "global_step1":
            for pack in Path(path, tag).glob("*/packs/*.experts"):
                shutil.rmtree(pack)


def experts_truncated(path: str) -> None:
    cut(payload(path, LAST, "rank_00000.experts"))


def experts_flipped(path: str) -> None:
    flip(payload(path, LAST, "rank_00001.experts"))


def experts_of_three_saves_flipped(path: str) -> None:
    for tag in (LAST, BEFORE, "global_step4"):
        flip(payload(path, tag, "*.experts"))


def dense_deleted(path: str) -> None:
    remove(payload(path, LAST, "rank_00001.dense"))


def dense_flipped(path: str) -> None:
    flip(payload(path, LAST, "rank_00000.dense"))


def dense_and_experts_before(path: str) -> None:
    """The checkpoint before is restored with an expert of the one before that."""
    dense_flipped(path)
    flip(payload(path, BEFORE, "*.experts"))


def small_state_deleted(path: str) -> None:
    remove(sorted(Path(path, LAST).glob("*/extra/rank_00001.msgpack")))


def manifest_truncated(path: str) -> None:
    cut([Path(path, LAST, "manifest.json")])


def manifest_truncated_and_experts_before(path: str) -> None:
    manifest_truncated(path)
    remove(payload(path, BEFORE, "*.experts"))


def older_manifest_truncated(path: str) -> None:
    """Nothing needs it, until an expert does."""
    cut([Path(path, BEFORE, "manifest.json")])
    remove(payload(path, LAST, "*.experts"))


def latest_dangling(path: str) -> None:
    Path(path, "latest").write_text("global_step9")


def latest_lost(path: str) -> None:
    Path(path, "latest").unlink()


def latest_of_no_text(path: str) -> None:
    Path(path, "latest").write_bytes(b"\xff\xfe")


#: How it is damaged, whether only reading every byte finds that, and the step that is left.
CASES = [
    (experts_deleted, False, 6),
    (experts_of_all_but_the_first_deleted, False, 6),
    (experts_truncated, False, 6),
    (experts_flipped, True, 6),
    (experts_of_three_saves_flipped, True, 6),
    (dense_deleted, False, 5),
    (dense_flipped, True, 5),
    (dense_and_experts_before, True, 5),
    (small_state_deleted, False, 5),
    (manifest_truncated, False, 5),
    (manifest_truncated_and_experts_before, False, 5),
    (older_manifest_truncated, False, 6),
    (latest_dangling, False, 6),
    (latest_lost, False, 6),
    (latest_of_no_text, False, 6),
]


def recover(path: str, *options: str) -> tuple[int, dict[str, Any]]:
    """What the command says."""
    result = CliRunner().invoke(app, ["recover", path, "--no-memory", "--json", *options])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, json.loads(result.stdout)


def agree(said: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """What a load did is what was said."""
    for result in results:
        assert result["wrong"] == []
        assert (result["where"], result["step"]) == (said["tag"], said["step"])
        assert result["plt"] == pytest.approx(said["plt"], abs=1e-12)
        fields = result["event"]
        assert [(item["unit"], item["to"], item["lost"]) for item in fields["damaged"]] == [
            (item["unit"], item["step"], item["tokens_lost"]) for item in said["fallback"]
        ]
        assert fields["damage_plt"] == pytest.approx(said["damage_plt"], abs=1e-12)
        assert fields["passed_over"] == said["passed_over"]
        assert fields["lost"] == [layer["tokens_lost"] for layer in said["layers"]]


@pytest.mark.parametrize(("damage", "whole_read", "step"), CASES, ids=[case[0].__name__ for case in CASES])
def test_recover_says_what_a_load_does(
    pool: Pool, saved: str, ckpt_dir: str, damage: Any, whole_read: bool, step: int
) -> None:
    path = f"{ckpt_dir}/c"
    shutil.copytree(f"{saved}/c", path)
    plain = recover(path, "--dry-run")[1]
    assert plain["damaged"] == [] and plain["fallback"] == [] and plain["damage_plt"] == 0
    damage(path)
    options = ["--verify"] if whole_read else []
    if whole_read:
        assert recover(path, "--dry-run")[1] == plain, "a damaged byte was noticed without reading it"
    status, said = recover(path, "--dry-run", *options)
    assert status == (0 if damage in (latest_dangling, latest_lost, latest_of_no_text) else 1)
    assert said["step"] == step
    told = {item["unit"] for item in said["fallback"]}
    assert bool(told) == ("experts" in damage.__name__ or "older" in damage.__name__)
    assert told <= {unit for item in said["damaged"] for unit in item["units"]}
    # What it says it would do and what it does are the same.
    mended = f"{ckpt_dir}/mended"
    shutil.copytree(path, mended)
    done = recover(mended, *options)[1]
    assert {**done, "directory": path, "damaged": []} == {**said, "dry_run": False, "damaged": []}
    if step == 6:
        by_tag = recover(path, "--dry-run", "--tag", LAST, *options)[1]
        assert [by_tag[key] for key in ("tag", "experts", "plt")] == [said[key] for key in ("tag", "experts", "plt")]
    beside = f"{saved}/kept"
    agree(said, pool.run(2, case_load, path=path, beside=beside, tag=None, said=said, deadline=DEADLINE))
    if said["latest_repaired_to"]:
        # What `latest` named is forgotten then, and not passed over any more.
        said = {**said, "passed_over": []}
        agree(said, pool.run(2, case_load, path=mended, beside=beside, tag=None, said=said, deadline=DEADLINE))


def test_on_other_ranks(pool: Pool, saved: str, ckpt_dir: str) -> None:
    path = f"{ckpt_dir}/c"
    shutil.copytree(f"{saved}/c", path)
    experts_deleted(path)
    said = recover(path)[1]
    assert said["fallback"]
    agree(said, pool.run(4, case_load, path=path, beside=f"{saved}/kept", tag=None, said=said, deadline=DEADLINE))


def test_both_refuse(pool: Pool, saved: str, ckpt_dir: str) -> None:
    """No version of some experts is left at all."""
    path = f"{ckpt_dir}/c"
    shutil.copytree(f"{saved}/c", path)
    for pack in Path(path).glob("*/*/packs/rank_00001.experts"):
        shutil.rmtree(pack)
    status, said = recover(path)
    assert status == 2 and "no other version of expert/" in said["error"]["what"]
    with pytest.raises(CaseError, match="no other version of expert/"):
        pool.run(2, case_load, path=path, beside=f"{saved}/kept", tag=None, said={}, deadline=DEADLINE)


def test_by_tag_both_refuse(pool: Pool, saved: str, ckpt_dir: str) -> None:
    path = f"{ckpt_dir}/c"
    shutil.copytree(f"{saved}/c", path)
    dense_deleted(path)
    status, said = recover(path, "--tag", LAST)
    assert status == 2 and "rank_00001.dense" in said["error"]["what"]
    with pytest.raises(CaseError, match=r"rank_00001\.dense"):
        pool.run(2, case_load, path=path, beside=f"{saved}/kept", tag=LAST, said={}, deadline=DEADLINE)
