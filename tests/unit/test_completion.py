"""A checkpoint that gets newer versions of some experts after a node was lost: planning, merging, publishing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import DENSE, EXPERTS, expert_name, make_store, save, tensor_values, write_rank

from moc_ckpt.errors import CorruptionError, CoverageError, StaleAttemptError, StorageError
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.selector import SaveHistory
from moc_ckpt.recovery.flush import commit_flush, with_tokens
from moc_ckpt.recovery.flush_plan import Flush, plan_completion, plan_restart
from moc_ckpt.recovery.memory import Inventory, MemoryVersions
from moc_ckpt.state.unit import Version, expert_unit
from moc_ckpt.storage import commit as committing
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import (
    latest_tag,
    list_tags,
    load_manifest,
    new_save_id,
    pointer_key,
    read_extra,
)
from moc_ckpt.storage.commit import commit_experts, is_interrupted
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import verify

Place = tuple[int, int]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


def bring(
    store: Store, base: Manifest, newer: Mapping[Place, Version], ranks: Collection[int] = (0, 1), save_id: str = ""
) -> str:
    """Writes the parts of these ranks, with these versions of experts alone."""
    save_id = save_id or new_save_id()
    for rank in ranks:
        write_rank(
            store,
            base.tag,
            save_id,
            rank,
            step=base.step,
            attempt=base.attempt,
            experts=list(newer),
            versions=newer,
            dense=False,
        )
    return save_id


def wrong(store: Store, tag: str, promised: Mapping[Place, Version]) -> list[str]:
    """How a checkpoint differs from what was promised, byte for byte."""
    manifest = load_manifest(store, tag)
    found = [str(problem) for problem in verify(store, tag).problems]
    values = {tensor.key: np.full(int(np.prod(tensor.shape)), np.nan, np.float32) for tensor in manifest.tensors}
    for row in manifest.fragments:
        pack, tensor = manifest.packs[row.pack], manifest.tensors[row.tensor]
        reader = PackReader(store, pack.path, pack.nbytes)
        reader.read_into(values[tensor.key][row.start : row.stop].view(np.uint8), row.offset)
    sources = {expert_name(*place): version for place, version in promised.items()}
    for tensor in manifest.tensors:
        version = sources.get(tensor.fqn, manifest.version) if tensor.fqn != DENSE[0] else manifest.version
        right = tensor_values(tensor.fqn, tensor.kind, tensor.shape, *version).reshape(-1)
        if not np.array_equal(values[tensor.key], right):
            found.append(f"{tensor.fqn} ({tensor.kind}) is not of {version}")
    names = {unit.name: unit.version for unit in manifest.units}
    found += [
        f"{place}: {names[expert_unit(*place)]}" for place in promised if names[expert_unit(*place)] != promised[place]
    ]
    return found


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(EXPERTS), st.integers(11, 30), min_size=1), st.booleans())
def test_the_checkpoint_holds_the_newer_versions(newer: dict[Place, int], clean: bool) -> None:
    store = make_store("memory", Path())
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    brought = {place: Version(1, step) for place, step in newer.items() if place != (0, 0)}
    if not brought:
        return
    before = {place: Version(1, 30 if place == (0, 0) else 10) for place in EXPERTS}
    save_id = bring(store, base, brought)
    done = commit_experts(store, base, save_id, attempt=1, ledger={"a": 1})
    assert (done.tag, done.save_id, done.step, done.ledger) == (base.tag, save_id, 30, {"a": 1})
    assert latest_tag(store) == "global_step30" and list_tags(store) == ["global_step10", "global_step30"]
    if clean:  # what the replaced save leaves goes, but for what is needed of it
        report = apply_retention(store, keep_last=1, attempt=1)
        assert not report.blocked and report.kept == ("global_step30",)
    assert wrong(store, "global_step30", {**before, **brought}) == []
    for name, record in load_manifest(store, "global_step30").extra.items():
        assert read_extra(store, record) == read_extra(store, done.extra[name])
    assert set(done.extra) == set(base.extra)
    # Again is the same; and a save after it refers to these versions.
    assert commit_experts(store, base, save_id, attempt=1, ledger=None) == done
    after = save(store, "global_step40", 40, experts=[(1, 3)])
    assert after.version_of("expert/1/3") == (1, 40)
    assert all(after.version_of(expert_unit(*place)) == brought[place] for place in brought if place != (1, 3))


def refused(store: Store, base: Manifest, save_id: str, error: type[Exception], match: str, attempt: int = 1) -> None:
    with pytest.raises(error, match=match):
        commit_experts(store, base, save_id, attempt=attempt, ledger=None)
    assert load_manifest(store, base.tag).save_id == base.save_id, "the checkpoint is another one"


def test_what_does_not_make_whole_experts_changes_nothing(store: Store) -> None:
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    newer = {(0, 1): Version(1, 20)}
    refused(store, base, new_save_id(), CoverageError, "no rank has finished")
    half = bring(store, base, newer, ranks=[0])
    refused(store, base, half, CoverageError, "h.0.mlp")
    torn = bring(store, base, newer, ranks=[0])
    bring(store, base, {(0, 1): Version(1, 21)}, ranks=[1], save_id=torn)
    refused(store, base, torn, CoverageError, "different versions of expert/0/1")
    later = bring(store, base, {(0, 1): Version(1, 31)})
    refused(store, base, later, CoverageError, "expert/0/1 is from step 31")
    older = bring(store, base, {(0, 1): Version(1, 9)})
    refused(store, base, older, CoverageError, "older than the checkpoint's")
    dense = new_save_id()
    for rank in range(2):
        write_rank(store, base.tag, dense, rank, step=30, attempt=1, experts=[(0, 1)])
    refused(store, base, dense, CoverageError, "do not belong to checkpoint global_step30 of step 30: it has no expert")
    other = new_save_id()
    for rank in range(2):
        write_rank(store, base.tag, other, rank, step=29, attempt=1, experts=[(0, 1)], dense=False)
    refused(store, base, other, CoverageError, "do not belong")
    assert wrong(store, base.tag, {(0, 0): Version(1, 30), (0, 1): Version(1, 10)} | _rest(10)) == []


def _rest(step: int) -> dict[Place, Version]:
    return {place: Version(1, step) for place in EXPERTS if place not in ((0, 0), (0, 1))}


def test_versions_of_a_timeline_that_was_left_are_refused(store: Store) -> None:
    save(store, "global_step10", 10)
    open_attempt(store, 1, 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    assert base.attempt == 2
    save_id = bring(store, base, {(0, 1): Version(1, 20)})
    refused(store, base, save_id, CoverageError, "which a restart has rolled back", attempt=2)
    refused(store, base, save_id, StaleAttemptError, "attempt 1 may not publish", attempt=1)


def test_a_tag_that_was_saved_again_meanwhile_stays(store: Store) -> None:
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    save_id = bring(store, base, {(0, 1): Version(1, 20)})
    again = save(store, "global_step30", 30)
    with pytest.raises(StaleAttemptError, match="saved again meanwhile"):
        commit_experts(store, base, save_id, attempt=1, ledger=None)
    assert load_manifest(store, "global_step30") == again


@pytest.mark.parametrize("what", ["pack", "extra"])
def test_what_the_checkpoint_has_lost_is_found(store: Store, what: str) -> None:
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    save_id = bring(store, base, {(0, 1): Version(1, 20)})
    if what == "pack":
        store.delete_prefix(next(pack.path for pack in base.packs if ".dense" in pack.path))
    else:
        store.delete(base.extra["rng/1"].path)
    refused(store, base, save_id, CorruptionError, "missing")


def test_a_crash_before_it_is_published_leaves_the_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    save_id = bring(store, base, {(0, 1): Version(1, 20)})
    with monkeypatch.context() as crash, pytest.raises(KeyboardInterrupt):
        crash.setattr(committing, "_check_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        commit_experts(store, base, save_id, attempt=1, ledger=None)
    assert wrong(store, "global_step30", {(0, 0): Version(1, 30), (0, 1): Version(1, 10)} | _rest(10)) == []
    apply_retention(store, keep_last=0, attempt=1)
    assert wrong(store, "global_step30", {(0, 0): Version(1, 30), (0, 1): Version(1, 10)} | _rest(10)) == []


def test_an_interrupted_commit_is_finished(store: Store) -> None:
    """A crash between manifest and `latest` must not be forgotten because the save id is another one now."""
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    store.write("latest", b"global_step10")
    store.write(pointer_key(base.tag, base.save_id), b"")
    done = commit_experts(store, base, bring(store, base, {(0, 1): Version(1, 20)}), attempt=1, ledger=None)
    assert latest_tag(store) == "global_step30" and not is_interrupted(store, done)
    # Without such a crash somebody set it back on purpose.
    store.write("latest", b"global_step10")
    base = load_manifest(store, "global_step30")
    commit_experts(store, base, bring(store, base, {(0, 2): Version(1, 20)}), attempt=1, ledger=None)
    assert latest_tag(store) == "global_step10"


# ---- planning ----


def left(url: str, *, attempt: int = 1, world: int = 2, **steps: Collection[int]) -> Inventory:
    """Rank 0's memory, which has experts e01 = (0, 1) and so on for itself; rank 1 is lost."""
    experts = {f"expert/{name[1]}/{name[2]}": frozenset(found) for name, found in steps.items()}
    owners = {unit: frozenset({0}) for unit in experts}
    dense = frozenset({29, 30, 33})
    return Inventory("run", world, url, attempt, 1.0, {0: MemoryVersions(dense, dense, experts, owners)})


def test_experts_complete_the_newest_checkpoint(store: Store) -> None:
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    memory = left(store.url, e00=[30, 32], e01=[12, 25, 31], e02=[10, 33], e10=[31])
    plan = plan_restart(memory, store)
    assert plan == Flush(store.url, 1, 30, 30, {"expert/0/1": 25}, 2, base, dense=False)
    assert plan is not None and plan.tag == "global_step30"
    # Nothing newer: as if there were no memory, and it is said which is missing.
    for nothing in (left(store.url, e01=[31]), left(store.url)):
        assert plan_completion(nothing, store) is None
        with pytest.raises(StorageError, match="memory of ranks 1 of 2 is not here"):
            plan_restart(nothing, store)


def test_saves_aside_and_later_runs_are_left_alone(store: Store) -> None:
    save(store, "global_step10", 10)
    save(store, "global_step20", 20, experts=[(0, 0)])
    save(store, "best", 30, experts=[(0, 0)], save_latest=False)
    plan = plan_restart(left(store.url, e01=[15, 25]), store)
    assert plan is not None and (plan.tag, plan.step, plan.experts) == ("global_step20", 20, {"expert/0/1": 15})
    open_attempt(store, 1, 10)
    for attempt in (1, 2):  # of attempt 2 nothing is committed
        memory = left(store.url, attempt=attempt, e01=[15, 25])
        with pytest.raises((StaleAttemptError, StorageError)):
            plan_restart(memory, store)
    with pytest.raises(StorageError, match="belongs to"):
        plan_restart(left("/elsewhere", e01=[15]), store)


def test_an_older_whole_state_in_memory_completes_the_newer_checkpoint(store: Store) -> None:
    """All ranks are here, but what memory holds whole is before the commit: of use are its experts alone."""
    save(store, "global_step10", 10)
    save(store, "global_step30", 30, experts=[(0, 0)])
    dense = frozenset({29})
    ranks = {
        rank: MemoryVersions(dense, dense, {"expert/0/1": frozenset({25}), "expert/0/0": frozenset({28})})
        for rank in range(2)
    }
    plan = plan_restart(Inventory("run", 2, store.url, 1, 1.0, ranks), store)
    assert plan is not None and not plan.dense and plan.experts == {"expert/0/1": 25}


def test_versions_without_a_count_are_not_taken(store: Store) -> None:
    """They would be charged as if they had learnt nothing, where there is a ledger."""
    save(store, "global_step10", 10)
    base = save(store, "global_step30", 30, experts=[(0, 0)])
    plan = Flush(store.url, 1, 30, 30, {"expert/0/1": 25, "expert/0/2": 25}, 2, base, dense=False)
    assert with_tokens(plan, {}) == plan
    history = SaveHistory.start([4, 4]).with_saved({(0, 1): 7, (0, 2): 7})
    counted = msgspec.structs.replace(base, ledger={"processed": [[9] * 4] * 2, "history": history.to_data()})
    plan = Flush(store.url, 1, 30, 30, plan.experts, 2, counted, dense=False)
    plan = with_tokens(plan, {"expert/0/2": 8})
    assert plan.experts == {"expert/0/2": 25}
    done = commit_flush(store, plan, bring(store, base, {(0, 2): Version(1, 25)}), {"expert/0/2": 8})
    assert done.ledger is not None and done.ledger["processed"] == [[9] * 4] * 2
    assert done.ledger["history"]["saved"] == [[0, 7, 8, 0], [0, 0, 0, 0]]
    assert {**done.ledger["history"], "saved": None} == {**history.to_data(), "saved": None}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 3), st.integers(0, 5)), max_size=30))
def test_every_owner_knows_the_others(rows: list[tuple[int, int, int, int]]) -> None:
    ownership = Ownership.from_rows([3, 3], 4, rows)
    owners = {
        (layer, expert): sorted({row[2] for row in rows if row[:2] == (layer, expert) and row[3]})
        for layer in range(2)
        for expert in range(3)
    }
    for rank in range(4):
        told = ownership.owners_beside(rank)
        assert told == {place: tuple(ranks) for place, ranks in owners.items() if rank in ranks}
