"""Checkpoints with some of the experts only (PEC): what they take from older tags, and what happens without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import DENSE, EXPERT_SHAPE, EXPERTS, KINDS, expert_name, flip, make_store, save, tensor_values
from typer.testing import CliRunner

from moc_ckpt.cli.main import app
from moc_ckpt.errors import CorruptionError, CoverageError
from moc_ckpt.recovery.resolver import resolve
from moc_ckpt.recovery.restorer import index_manifest, stage
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.state.unit import expert_unit
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import list_tags, load_manifest
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import verify

Place = tuple[int, int]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


@pytest.fixture
def chain(store: Store) -> Store:
    """global_step30 takes experts of global_step10 and global_step20."""
    save(store, "global_step10", 10)
    save(store, "global_step20", 20, experts=[(0, 0), (1, 1)])
    save(store, "global_step30", 30, experts=[(0, 1), (1, 1)])
    return store


OLD = {  # what global_step30 of the chain needs of older checkpoints
    "global_step10": {expert_unit(*place) for place in EXPERTS} - {"expert/0/0", "expert/0/1", "expert/1/1"},
    "global_step20": {"expert/0/0"},
}


def by_hand(store: Store, tag: str) -> None:
    """rm -r DIR/TAG"""
    if store.local_path is not None:
        shutil.rmtree(store.local_path / tag)
    else:
        store.delete_prefix(tag)


def versions(manifest: Manifest) -> dict[Place, tuple[int, int]]:
    return {place: tuple(manifest.version_of(expert_unit(*place))) for place in EXPERTS}  # type: ignore[misc]


def assert_values(store: Store, manifest: Manifest, expected: dict[Place, tuple[int, int]]) -> None:
    """Reads every fragment from its pack and compares it with what was to be saved at the expected version."""
    names = {DENSE[0]: (manifest.attempt, manifest.step)} | {expert_name(*place): at for place, at in expected.items()}
    shapes = {DENSE[0]: DENSE[1]} | {expert_name(*place): EXPERT_SHAPE for place in EXPERTS}
    found = {
        (name, kind): np.full(int(np.prod(shape)), np.nan, np.float32)
        for name, shape in shapes.items()
        for kind in KINDS
    }
    for row in manifest.fragments:
        tensor, pack = manifest.tensors[row.tensor], manifest.packs[row.pack]
        data = PackReader(store, pack.path, pack.nbytes).read(row.offset, 4 * (row.stop - row.start))
        found[tensor.fqn, tensor.kind][row.start : row.stop] = data.view(np.float32)
    for (name, kind), values in found.items():
        np.testing.assert_array_equal(values, tensor_values(name, kind, shapes[name], *names[name]).reshape(-1))


def packs_of(store: Store) -> set[str]:
    return {"/".join(key.split("/")[:4]) for key in store.list() if "/packs/" in key}


# ---- retention ----


def test_the_last_checkpoint_keeps_what_it_needs(chain: Store) -> None:
    before = {key: chain.read(key) for key in chain.list()}
    manifest = load_manifest(chain, "global_step30")
    report = apply_retention(chain, keep_last=1)
    assert report.dropped == ("global_step10", "global_step20") and list_tags(chain) == ["global_step30"]
    assert manifest.pack_paths == packs_of(chain)
    left = {(path.split("/")[0], path.split(".")[-1]) for path in packs_of(chain)}
    assert left == {(f"global_step{step}", "experts") for step in (10, 20, 30)} | {("global_step30", "dense")}
    # What was kept was not touched.
    for path in manifest.pack_paths:
        assert chain.list(path) and all(chain.read(key) == before[key] for key in chain.list(path))
    report = verify(chain, "global_step30")
    assert report.ok and report.packs == len(manifest.packs) and report.fragments == len(manifest.fragments)
    assert report.nbytes == sum(pack.nbytes for pack in manifest.packs)
    expected = dict.fromkeys(EXPERTS, (1, 10)) | {(0, 0): (1, 20), (0, 1): (1, 30), (1, 1): (1, 30)}
    assert_values(chain, manifest, expected)


def test_an_older_pack_goes_with_the_last_checkpoint_that_needs_it(chain: Store) -> None:
    save(chain, "global_step40", 40, experts=[place for place in EXPERTS if place not in [(0, 1), (1, 1)]])
    apply_retention(chain, keep_last=1)
    # Of global_step10 and 20 nothing is needed any more, of global_step30 two experts are.
    assert {path.split("/")[0] for path in packs_of(chain)} == {"global_step30", "global_step40"}
    assert chain.list_dirs() == ["attempts", "global_step30", "global_step40"]
    assert verify(chain, "global_step40").ok


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.lists(st.sets(st.sampled_from(EXPERTS), min_size=1, max_size=4), min_size=1, max_size=5),
    keep_last=st.integers(1, 3),
    often=st.booleans(),
    reuse=st.booleans(),
)
def test_whatever_is_selected_every_kept_checkpoint_stays_whole(
    chosen: list[set[Place]], keep_last: int, often: bool, reuse: bool
) -> None:
    """Any selection, retention after every save or at the end, tags that are new or come again."""
    store = open_store("memory://older-packs-property")
    for name in store.list():
        store.delete(name)
    newest = dict.fromkeys(EXPERTS, (1, 10))
    kept: dict[str, dict[Place, tuple[int, int]]] = {"t0": dict(newest)}
    save(store, "t0", 10)
    for number, experts in enumerate(chosen, 1):
        step = 10 + 10 * number
        tag = f"t{number % 2}" if reuse else f"t{number}"
        save(store, tag, step, experts=experts)
        newest |= dict.fromkeys(experts, (1, step))
        kept.pop(tag, None)
        kept[tag] = dict(newest)
        if often or number == len(chosen):
            apply_retention(store, keep_last=keep_last)
            kept = dict(list(kept.items())[-keep_last:])
        assert set(list_tags(store)) == set(kept)
    for tag, expected in kept.items():
        manifest = load_manifest(store, tag)
        assert versions(manifest) == expected
        assert verify(store, tag).ok
        assert_values(store, manifest, expected)
    assert packs_of(store) == {path for tag in kept for path in load_manifest(store, tag).pack_paths}


# ---- the same tag again ----


def test_a_tag_that_is_saved_again_takes_experts_from_its_own_earlier_save(store: Store) -> None:
    first = save(store, "global_step10", 10)
    second = save(store, "global_step10", 12, experts=[(0, 0), (1, 3)])
    assert second.save_id != first.save_id
    expected = dict.fromkeys(EXPERTS, (1, 10)) | {(0, 0): (1, 12), (1, 3): (1, 12)}
    assert versions(second) == expected
    saves = {path.split("/")[1] for path in second.pack_paths}
    assert saves == {first.save_id, second.save_id}
    apply_retention(store, keep_last=1)
    assert packs_of(store) == second.pack_paths
    assert not any(".dense" in path for path in packs_of(store) if first.save_id in path)
    assert verify(store, "global_step10").ok
    assert_values(store, second, expected)
    # A third one needs both.
    third = save(store, "global_step10", 14, experts=[(0, 1)])
    apply_retention(store, keep_last=1)
    assert {path.split("/")[1] for path in third.pack_paths} == {first.save_id, second.save_id, third.save_id}
    assert verify(store, "global_step10").ok
    assert_values(store, third, expected | {(0, 1): (1, 14)})
    # Without the first save's packs the report names that save, not another checkpoint.
    by_hand(store, f"global_step10/{first.save_id}")
    report = verify(store, "global_step10")
    assert len(report.problems) == 2
    for problem in report.problems:
        assert f"needs packs of an earlier save of it ({first.save_id}), which are gone" in problem.what
        assert "expert/0/0" not in problem.units and "expert/1/0" in problem.units


# ---- a tag that is gone ----


def test_verify_names_a_tag_that_was_deleted_by_hand(chain: Store) -> None:
    by_hand(chain, "global_step10")
    report = verify(chain, "global_step30")
    manifest = load_manifest(chain, "global_step30")
    # One problem per pack, which is one per rank.
    assert len(report.problems) == 2
    for rank, problem in enumerate(report.problems):
        assert problem.what == "checkpoint global_step30 needs packs of checkpoint global_step10, which is gone"
        assert f"global_step10/{manifest_save(manifest, 'global_step10')}/packs/rank_{rank:05d}.experts" in problem.file
        assert set(problem.units) == OLD["global_step10"]
        assert problem.unit == "expert/0/2-3; expert/1/0,2-3"
        assert chain.locate("global_step10") in problem.fix and "back from a copy" in problem.fix
        assert "no other checkpoint here does without it" in problem.fix
    assert report.fragments == len(manifest.fragments)
    assert [problem.units for problem in verify(chain, "global_step20").problems] != []


def manifest_save(manifest: Manifest, tag: str) -> str:
    return next(path.split("/")[1] for path in manifest.pack_paths if path.startswith(f"{tag}/"))


def test_verify_says_which_checkpoints_do_not_need_the_one_that_is_gone(chain: Store) -> None:
    save(chain, "global_step40", 40)
    save(chain, "global_step50", 50, experts=[(0, 0)])
    chain.write("broken/manifest.json", b"{")
    by_hand(chain, "global_step20")
    (problem, _) = verify(chain, "global_step30").problems
    assert "global_step20, which is gone" in problem.what and problem.units == ("expert/0/0",)
    assert problem.fix.endswith("checkpoints that do not need it: global_step50, global_step40, global_step10")
    assert verify(chain, "global_step40").ok and verify(chain, "global_step50").ok


def test_a_pack_or_a_save_that_is_gone_is_told_from_a_tag_that_is_gone(chain: Store) -> None:
    manifest = load_manifest(chain, "global_step30")
    save_id = manifest_save(manifest, "global_step10")
    chain.delete_prefix(f"global_step10/{save_id}/packs/rank_00001.experts")
    (problem,) = verify(chain, "global_step30").problems
    assert problem.what == (
        "checkpoint global_step30 needs packs of checkpoint global_step10, which has lost the pack rank_00001.experts"
    )
    assert set(problem.units) == OLD["global_step10"]
    by_hand(chain, f"global_step10/{save_id}")
    save(chain, "global_step10", 40)
    for problem in verify(chain, "global_step30").problems:
        assert "needs packs of checkpoint global_step10, which are gone" in problem.what
        assert chain.locate(f"global_step10/{save_id}") in problem.fix


def test_verify_names_the_tag_of_a_damaged_pack(chain: Store) -> None:
    manifest = load_manifest(chain, "global_step30")
    key = f"global_step10/{manifest_save(manifest, 'global_step10')}/packs/rank_00000.experts/c/0"
    data = bytearray(chain.read(key) or b"")
    data[0] ^= 1
    chain.write(key, bytes(data))
    report = verify(chain, "global_step30")
    assert {problem.unit for problem in report.problems} == OLD["global_step10"]
    assert len(report.problems) == len(KINDS) * len(OLD["global_step10"])
    for problem in report.problems:
        assert (
            "global_step30 needs packs of checkpoint global_step10, one of which is damaged: checksum" in problem.what
        )
        assert chain.locate(key) in problem.file and problem.tensor and problem.units == (problem.unit,)
    chain.delete(key)
    (problem,) = verify(chain, "global_step30").problems
    assert problem.what.endswith("one of which is damaged: a file of a pack is missing")
    assert set(problem.units) == OLD["global_step10"]
    # Its own damage is its own.
    assert not any("needs packs" in problem.what for problem in verify(chain, "global_step10").problems)


def test_the_command_line_names_it_with_status_1(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    save(store, "global_step10", 10)
    save(store, "global_step20", 20, experts=[(0, 0), (1, 1)])
    save(store, "global_step30", 30, experts=[(0, 1), (1, 1)])
    assert CliRunner().invoke(app, ["verify", store.url]).exit_code == 0
    by_hand(store, "global_step10")
    result = CliRunner().invoke(app, ["verify", store.url])
    assert result.exit_code == 1 and "2 problems" in result.stdout
    assert "checkpoint global_step30 needs packs of checkpoint global_step10, which is gone" in result.stdout
    assert "expert/0/2-3; expert/1/0,2-3" in result.stdout and "what to do" in result.stdout
    assert len(result.stdout.splitlines()) < 15
    result = CliRunner().invoke(app, ["verify", store.url, "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 1 and not data["ok"]
    assert set(data["problems"][0]["units"]) == OLD["global_step10"] and data["problems"][0]["fix"]


def test_no_commit_refers_to_packs_that_are_gone(chain: Store) -> None:
    by_hand(chain, "global_step10")
    with pytest.raises(CorruptionError) as info:
        save(chain, "global_step40", 40, experts=[(0, 0)])
    assert "global_step10/" in info.value.where and "global_step40" not in list_tags(chain)
    assert chain.read("latest") == b"global_step30"
    # A save that has the lost experts itself needs nothing of it.
    lost = [place for place in EXPERTS if expert_unit(*place) in OLD["global_step10"]]
    save(chain, "global_step40", 40, experts=lost)
    assert verify(chain, "global_step40").ok


# ---- loading ----


def read_all(store: Store, tag: str, experts: Collection[Place] = tuple(EXPERTS)) -> dict[str, np.ndarray]:
    """What a rank does that holds the dense state and some experts whole."""
    manifest = load_manifest(store, tag)
    names = {DENSE[0]: (DENSE[1], "dense/h.0.attn")}
    names |= {expert_name(*place): (EXPERT_SHAPE, expert_unit(*place)) for place in experts}
    needs = [Fragment(name, "master", "float32", shape, 0, int(np.prod(shape))) for name, (shape, _) in names.items()]
    plan = resolve(index_manifest(manifest), needs)
    values = stage(store, manifest, plan, needs, [unit for _, unit in names.values()])
    return {need.fqn: value.numpy() for need, value in zip(needs, values, strict=True)}


def test_a_load_names_the_tag_that_is_gone(chain: Store) -> None:
    whole = read_all(chain, "global_step30")
    np.testing.assert_array_equal(
        whole[expert_name(0, 0)], tensor_values(expert_name(0, 0), "master", EXPERT_SHAPE, 1, 20).reshape(-1)
    )
    by_hand(chain, "global_step10")
    with pytest.raises(CorruptionError) as info:
        read_all(chain, "global_step30")
    assert info.value.what == (
        "checkpoint global_step30 needs packs of checkpoint global_step10, which is gone; this rank reads units "
        "expert/0/2-3; expert/1/0,2-3 from it"
    )
    assert "global_step10/" in info.value.where
    assert "back from a copy" in info.value.fix and "a checkpoint that does not need it" in info.value.fix
    # A rank that needs none of its experts still reads.
    kept = read_all(chain, "global_step30", [(0, 0), (0, 1), (1, 1)])
    for name, values in kept.items():
        np.testing.assert_array_equal(values, whole[name])


def test_a_load_names_the_tag_of_a_damaged_pack(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    save(store, "global_step10", 10)
    save(store, "global_step30", 30, experts=[(0, 1)])
    assert store.local_path is not None
    victim = next(store.local_path.glob("global_step10/*/packs/rank_00001.experts/c/0"))
    flip(victim, 0)
    with pytest.raises(CorruptionError, match="checksum mismatch") as info:
        read_all(store, "global_step30")
    assert (
        "checkpoint global_step30 needs packs of checkpoint global_step10, one of which is damaged" in info.value.what
    )
    assert "expert/0/0,2-3; expert/1/0-3" in info.value.what and str(victim) in info.value.where
    own = next(store.local_path.glob("global_step30/*/packs/rank_00000.dense/c/0"))
    flip(own, 0)
    with pytest.raises(CorruptionError, match="checksum mismatch") as info:
        read_all(store, "global_step30", [(0, 1)])
    assert "needs packs" not in info.value.what and "dense/h.0.attn" in info.value.what and info.value.fix


# ---- timelines ----


def test_a_rolled_back_timeline_gives_no_experts(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20, experts=[(0, 0), (0, 1)])
    save(store, "t30", 30, experts=[(1, 0)])
    # The run goes on from step 10: nothing of steps 20 and 30 of attempt 1 happened.
    second = open_attempt(store, parent=1, forked_at_step=10)
    manifest = save(store, "t40", 40, experts=[(0, 1)], attempt=second.attempt)
    expected = dict.fromkeys(EXPERTS, (1, 10)) | {(0, 1): (2, 40)}
    assert versions(manifest) == expected
    assert {path.split("/")[0] for path in manifest.pack_paths} == {"t10", "t40"}
    assert_values(store, manifest, expected)
    # And after retention, which drops what only the given-up timeline had.
    apply_retention(store, keep_last=1, attempt=second.attempt)
    assert {path.split("/")[0] for path in packs_of(store)} == {"t10", "t40"}
    assert verify(store, "t40").ok
    # A third attempt forks where t40 stands and sees its version.
    third = open_attempt(store, parent=second.attempt, forked_at_step=40)
    manifest = save(store, "t50", 50, experts=[(1, 1)], attempt=third.attempt)
    assert versions(manifest) == expected | {(1, 1): (3, 50)}


def test_without_an_admissible_version_nothing_is_committed(store: Store) -> None:
    save(store, "t10", 10, experts=EXPERTS)
    second = open_attempt(store)  # from scratch: nothing in this directory is in its past
    with pytest.raises(CoverageError, match="expert"):
        save(store, "t20", 20, experts=[(0, 0)], attempt=second.attempt)
    assert list_tags(store) == ["t10"]
    # The first checkpoint of a timeline is full, and then the next need not be.
    save(store, "t30", 30, attempt=second.attempt)
    manifest = save(store, "t40", 40, experts=[(0, 0)], attempt=second.attempt)
    assert set(versions(manifest).values()) == {(2, 30), (2, 40)}


def test_an_older_step_does_not_take_newer_experts(store: Store) -> None:
    """A fork at step 10 that then saves step 15: t20 of the parent is newer than the fork although t10 is older."""
    save(store, "t10", 10)
    save(store, "t20", 20)
    save(store, "t25", 25)
    second = open_attempt(store, parent=1, forked_at_step=20)
    manifest = save(store, "t22", 22, experts=[(0, 0)], attempt=second.attempt)
    assert versions(manifest) == dict.fromkeys(EXPERTS, (1, 20)) | {(0, 0): (2, 22)}
