"""Commits from what the parts say alone, how saves end, and the order of checkpoints when clocks jump."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import EXPERTS, TOPOLOGY, commit_info, make_store, save, tensor_values, write_rank

from moc_ckpt.errors import CorruptionError, CoverageError, StaleAttemptError, StorageError
from moc_ckpt.state.unit import Version
from moc_ckpt.storage import commit as commit_module
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import (
    STATE,
    Outcome,
    failure_key,
    latest_tag,
    list_checkpoints,
    list_tags,
    load_manifest,
    outcome_key,
    parts_status,
    read_extra,
    read_outcome,
    read_parts,
    write_failure,
    write_outcome,
)
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.manifest import CommitInfo, FragmentTable, Manifest, Part, decode_part, encode_part
from moc_ckpt.storage.merge import merge_parts, merge_state
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import verify

replace = msgspec.structs.replace


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    store = make_store("memory", tmp_path)
    return [write_rank(store, "tag", "save", rank, step=30, attempt=1) for rank in range(2)]


# ---- what the parts say ----


def test_a_part_round_trips_with_all_it_says(parts: list[Part]) -> None:
    info = commit_info(save_latest=False, ledger={"plt": 0.25}, selected=["expert/0/1"], state=bytes(range(256)))
    part = replace(parts[0], commit=info)
    assert decode_part(encode_part(part), "x") == part
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=Part) == part  # as it travels to the agent


def test_the_manifest_says_what_rank_0_said(parts: list[Part]) -> None:
    info = commit_info(save_latest=False, ledger={"plt": 0.25}, topology=replace(TOPOLOGY, world=99))
    manifest = merge_parts(
        [replace(parts[1], parameters=25), replace(parts[0], parameters=250, commit=info)], created=2.5
    )
    assert manifest.kept and manifest.ledger == {"plt": 0.25} and manifest.created == 2.5
    assert manifest.parameters == 275 and manifest.moe_layers == info.moe_layers
    assert manifest.topology == TOPOLOGY  # the world is that of the parts


def test_without_rank_0s_word_there_is_no_commit(parts: list[Part]) -> None:
    for bad in ([replace(parts[0], commit=None), parts[1]], [replace(parts[0], commit=None), with_info(parts[1])]):
        with pytest.raises(CoverageError, match="no part says what the save is of"):
            merge_parts(bad, created=0)


def with_info(part: Part) -> Part:
    return replace(part, commit=commit_info())


def test_state_is_merged(parts: list[Part]) -> None:
    """Decoded by msgpack alone: rank 0's entries as they were, distinct blobs in order of rank, shared streams."""
    state = {"engine": {"x": [1, None, 2.5], "y": b"\x00\xff"}, "underived": ["a"]}
    info = commit_info(state=msgspec.msgpack.encode(state))
    third = replace(parts[1], rank=2, rng={"python": "same", "torch": "x"}, optimizer=parts[0].optimizer)
    fourth = replace(parts[1], rank=3, optimizer=b"")
    first = replace(parts[0], commit=info, rng={**parts[0].rng, "only here": "1"})
    found = msgspec.msgpack.decode(merge_state([fourth, parts[1], third, first]))
    assert found == {**state, "optimizer": [parts[0].optimizer, parts[1].optimizer], "rng_shared": ["python"]}


def test_a_state_that_is_no_map_is_refused(parts: list[Part]) -> None:
    for state in (b"", b"\x93\x01\x02\x03", b"\xc1"):
        with pytest.raises(StorageError, match="is not a map"):
            merge_state([replace(parts[0], commit=commit_info(state=state)), parts[1]])


def test_commit_writes_the_merged_state(store: Store) -> None:
    manifest = save(store, "a", 10)
    data = read_extra(store, manifest.extra[STATE])
    assert manifest.extra[STATE].path == f"a/{manifest.save_id}/extra/state.msgpack"
    assert data == merge_state(read_parts(store, "a", manifest.save_id))
    assert set(manifest.extra) == {STATE, "rng/0", "rng/1"} and verify(store, "a").ok
    store.write(manifest.extra[STATE].path, data[:-1])
    assert not verify(store, "a").ok


def test_a_selected_expert_must_be_in_the_parts(store: Store) -> None:
    save(store, "a", 10)
    for rank in range(2):
        part = write_rank(store, "b", "s", rank, step=20, attempt=1, experts=EXPERTS[1:], publish=False)
        if rank == 0:
            part = replace(part, commit=commit_info(selected=["expert/0/0", "expert/0/1"]))
        store.write(f"b/s/parts/rank_{rank:05d}.json", encode_part(part))
    with pytest.raises(CoverageError, match="no rank wrote expert/0/0, which the save selected"):
        commit(store, "b", "s", attempt=1)


# ---- experts of older versions in the parts ----


def test_experts_from_memory_may_be_older_than_the_save(store: Store) -> None:
    save(store, "a", 10)
    fork = open_attempt(store, parent=1, forked_at_step=10).attempt
    versions = {(0, 0): (1, 9), (0, 1): (fork, 15), (1, 2): (fork, 20)}
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=fork, experts=[(0, 0), (0, 1), (1, 2)], versions=versions)
    manifest = commit(store, "b", "s", attempt=fork)
    found = {(layer, expert): manifest.version_of(f"expert/{layer}/{expert}") for layer, expert in EXPERTS}
    assert found == {place: Version(*versions.get(place, (1, 10))) for place in EXPERTS}
    assert {unit.tokens for unit in manifest.units} == {None, 90, 100, 150, 200}
    for row in manifest.fragments:
        unit, tensor, pack = manifest.units[row.unit], manifest.tensors[row.tensor], manifest.packs[row.pack]
        whole = tensor_values(tensor.fqn, tensor.kind, tensor.shape, unit.attempt, unit.step).reshape(-1)
        data = whole[row.start : row.stop].tobytes()
        assert PackReader(store, pack.path, pack.nbytes).read(row.offset, len(data)).tobytes() == data
    assert verify(store, "b").ok


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ((1, 11), "expert/0/0 is from step 11 of attempt 1, which a restart has rolled back"),
        ((2, 21), "expert/0/0 is from step 21 of attempt 2, the save is of step 20"),
        ((3, 5), "expert/0/0 is from step 5 of attempt 3, the save is of step 20"),
    ],
)
def test_inadmissible_versions_are_refused(store: Store, version: tuple[int, int], message: str) -> None:
    save(store, "a", 10)
    fork = open_attempt(store, parent=1, forked_at_step=10).attempt
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=fork, experts=EXPERTS[:1], versions={(0, 0): version})
    with pytest.raises(CoverageError, match=message):
        commit(store, "b", "s", attempt=fork)
    assert not store.exists("b/manifest.json")


def test_versions_must_be_the_same_in_all_parts(store: Store) -> None:
    open_attempt(store)
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=1, versions={(1, 3): (1, 18 + rank)})
    with pytest.raises(CoverageError, match=r"ranks wrote different versions of expert/1/3: step 18 .* step 19"):
        commit(store, "b", "s", attempt=1)


def test_dense_state_of_another_attempt_is_refused(parts: list[Part]) -> None:
    def change(part: Part) -> Part:
        return replace(part, units=[replace(unit, attempt=2) if "dense" in unit.name else unit for unit in part.units])

    with pytest.raises(CoverageError, match=r"dense/h.0.attn is from step 30 of attempt 2, the save is of step 30"):
        merge_parts([change(part) for part in parts], created=0)


# ---- how saves end ----


def test_parts_status(store: Store) -> None:
    assert parts_status(store, "a", "s") == (set(), {})
    write_rank(store, "a", "s", 0, step=10, attempt=1)
    write_failure(store, "a", "s", 1, StorageError("disk full", where="/x", fix="free space"))
    write_failure(store, "a", "s", 123456, ValueError("odd"))
    write_failure(store, "a", "s", 7, "gone")
    status = parts_status(store, "a", "s")
    assert status.done == {0}
    assert status.failed == {
        1: "disk full\n  where: /x\n  what to do: free space",
        7: "gone",
        123456: "ValueError: odd",
    }
    store.write(failure_key("a", "s", 7), b"{")
    assert "cannot be read" in parts_status(store, "a", "s").failed[7]
    assert [part.rank for part in read_parts(store, "a", "s")] == [0]


def test_a_commit_names_the_rank_that_failed_and_why(store: Store) -> None:
    open_attempt(store)
    write_rank(store, "a", "s", 0, step=10, attempt=1)
    write_failure(store, "a", "s", 1, StorageError("disk full"))
    with pytest.raises(CoverageError, match=r"1 of 2 ranks have not finished their part: 1 \(rank 1: disk full\)"):
        commit(store, "a", "s", attempt=1)
    with pytest.raises(StorageError, match=r"was not finished: 1 rank wrote a part.*; rank 1 failed: disk full"):
        load_manifest(store, "a")
    # A rank that wrote its part after all has not failed.
    write_rank(store, "a", "s", 1, step=10, attempt=1)
    assert commit(store, "a", "s", attempt=1).step == 10


def test_outcomes(store: Store) -> None:
    assert read_outcome(store, "a", "s") is None
    for outcome in (
        Outcome(committed=False, error="the disk is full", attempt=2, step=7),
        Outcome(committed=True, attempt=2, step=7, stored_bytes=1 << 50),
    ):
        write_outcome(store, "a", "s", outcome)
        assert read_outcome(store, "a", "s") == outcome
    assert outcome_key("a", "s") == "a/s/outcome.json"
    store.write("a/s/outcome.json", (store.read("a/s/outcome.json") or b"")[:-1])
    with pytest.raises(CorruptionError, match="truncated"):
        read_outcome(store, "a", "s")


def test_notes_about_saves_do_not_make_them_foreign(store: Store) -> None:
    """Retention removes them with their saves, and the rest of the package does not mind them."""
    first = save(store, "a", 10)
    write_outcome(store, "a", first.save_id, Outcome(committed=True))
    write_failure(store, "a", first.save_id, 1, "late")
    assert verify(store, "a").ok and list_tags(store) == ["a"]
    second = save(store, "b", 20, experts=EXPERTS[:1])
    write_outcome(store, "b", second.save_id, Outcome(committed=True))
    apply_retention(store, keep_last=1)
    left = store.list("a")
    assert left and all(".experts/" in key for key in left)  # what b needs, and nothing else
    save(store, "c", 30)
    apply_retention(store, keep_last=1)
    assert store.list_dirs() == ["attempts", "c"]


def test_a_save_that_a_rank_gave_up_goes_unless_it_is_in_flight(store: Store) -> None:
    save(store, "a", 10)
    write_rank(store, "b", "run1-0", 0, step=20, attempt=1)
    write_rank(store, "c", "run1-1", 0, step=30, attempt=1)
    write_failure(store, "c", "run1-1", 1, "the disk is full")
    write_failure(store, "d", "run1-2", 0, "the disk is full")
    write_failure(store, "b", "run1-0", 0, "it wrote its part after all")
    asked = []

    def flying(save_id: str) -> bool:
        asked.append(save_id)
        return save_id.startswith("run1-")

    assert apply_retention(store, keep_last=3, in_flight=flying).saves == []
    assert set(asked) >= {"run1-0", "run1-1", "run1-2"}
    assert apply_retention(store, keep_last=3, in_flight=lambda save_id: False).saves == ["c/run1-1", "d/run1-2"]
    assert store.list_dirs() == ["a", "attempts", "b"]


# ---- order, when clocks jump ----


class Clock:
    """Stands in for `time` in the commit."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(commit_module, "time", clock)
    return clock


def test_a_clock_that_jumps_back_does_not_make_an_older_checkpoint_the_newest(store: Store, clock: Clock) -> None:
    save(store, "a", 10)
    clock.now -= 3600
    newer = save(store, "b", 20)
    assert newer.created == 1e9 - 3600
    assert [item.tag for item in list_checkpoints(store)] == ["b", "a"]
    assert latest_tag(store) == "b"
    # A commit that is done again moves `latest` neither back nor away.
    commit(store, "a", load_manifest(store, "a").save_id, attempt=1)
    assert latest_tag(store) == "b"
    store.delete("latest")
    report = apply_retention(store, keep_last=1)
    assert report.kept == ("b",) and report.dropped == ("a",)


def test_partial_saves_build_on_the_newest_step_whatever_the_clock_says(store: Store, clock: Clock) -> None:
    save(store, "a", 10)
    clock.now -= 3600
    save(store, "b", 20)
    manifest = save(store, "c", 30, experts=EXPERTS[:1])
    assert {manifest.version_of(f"expert/{a}/{b}").step for a, b in EXPERTS[1:]} == {20}


@given(order=st.permutations(range(6)), clocks=st.lists(st.floats(0, 1e9), min_size=6, max_size=6))
def test_order_is_attempt_then_step_then_time(order: list[int], clocks: list[float]) -> None:
    places = list(itertools.product((1, 2), (5, 6, 7)))
    manifests = [
        Manifest(
            tag=f"t{i}",
            save_id="s",
            attempt=places[i][0],
            step=places[i][1],
            created=clocks[i],
            topology=TOPOLOGY,
            moe_layers=[],
            parameters=0,
            units=[],
            tensors=[],
            packs=[],
            fragments=FragmentTable(),
        )
        for i in order
    ]
    assert [item.tag for item in sorted(manifests, key=lambda item: item.order)] == [f"t{i}" for i in range(6)]
    same = [replace(item, attempt=1, step=1) for item in manifests]
    random.Random(0).shuffle(same)
    assert [item.created for item in sorted(same, key=lambda item: item.order)] == sorted(clocks)


def test_a_save_that_commits_late_does_not_take_latest_back(store: Store) -> None:
    open_attempt(store)
    for rank in range(2):
        write_rank(store, "slow", "s", rank, step=10, attempt=1)
    save(store, "fast", 20)
    commit(store, "slow", "s", attempt=1)
    assert latest_tag(store) == "fast" and set(list_tags(store)) == {"fast", "slow"}
    # Under the same tag it would replace the newer one.
    for rank in range(2):
        write_rank(store, "fast", "s2", rank, step=15, attempt=1)
    with pytest.raises(StaleAttemptError, match="checkpoint fast is of step 20 already, this save is of step 15"):
        commit(store, "fast", "s2", attempt=1)
    assert load_manifest(store, "fast").step == 20


def test_latest_of_a_rolled_back_timeline_is_taken_over(store: Store) -> None:
    save(store, "a", 10)
    save(store, "b", 20)
    fork = open_attempt(store, parent=1, forked_at_step=10).attempt
    save(store, "c", 15, attempt=fork)
    assert latest_tag(store) == "c"
    save(store, "b", 16, attempt=fork)
    assert latest_tag(store) == "b" and load_manifest(store, "b").version == Version(fork, 16)


def test_a_save_that_the_next_attempt_finishes_takes_latest_from_what_was_rolled_back(store: Store) -> None:
    open_attempt(store)
    for rank in range(2):
        write_rank(store, "unfinished", "s", rank, step=10, attempt=1)
    save(store, "rolled back", 20)
    fork = open_attempt(store, parent=1, forked_at_step=10).attempt
    commit(store, "unfinished", "s", attempt=fork)
    assert latest_tag(store) == "unfinished"


def test_an_info_without_state_is_an_empty_map() -> None:
    assert msgspec.msgpack.decode(CommitInfo(topology=TOPOLOGY, moe_layers=[]).state) == {}
