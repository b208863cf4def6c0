from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import EXPERTS, make_store, save, tensor_values, write_rank

from moc_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    CoverageError,
    FormatError,
    StaleAttemptError,
    StorageError,
    UnsupportedError,
)
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.attempts import (
    Attempt,
    admissible,
    ancestry,
    current_attempt,
    list_attempts,
    open_attempt,
)
from moc_ckpt.storage.checkpoint import (
    check_tag,
    extra_key,
    latest_tag,
    list_checkpoints,
    load_manifest,
    manifest_key,
    pack_key,
    part_key,
    read_extra,
    write_extra,
)
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.envelope import seal_envelope
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.store import Store, open_store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return make_store("local", tmp_path)


def restore(store: Store, manifest: Manifest) -> dict[tuple[str, str], np.ndarray]:
    """Reads every tensor of a checkpoint."""
    out = {tensor.key: np.empty(int(np.prod(tensor.shape)), np.float32) for tensor in manifest.tensors}
    for row in manifest.fragments:
        pack, tensor = manifest.packs[row.pack], manifest.tensors[row.tensor]
        dst = out[tensor.key][row.start : row.stop]
        PackReader(store, pack.path, pack.nbytes).read_into(dst.view(np.uint8), row.offset)
    return out


# ---- keys ----


def test_keys() -> None:
    assert manifest_key("t") == "t/manifest.json"
    assert part_key("t", "s", 3) == "t/s/parts/rank_00003.json"
    assert pack_key("t", "s", 3, "experts") == "t/s/packs/rank_00003.experts"
    assert extra_key("t", "s", "rng/3") == "t/s/extra/rng/3"
    with pytest.raises(ValueError):
        pack_key("t", "s", 3, "else")
    with pytest.raises(StorageError):
        part_key("t", "../s", 3)


@pytest.mark.parametrize("tag", ["", "a/b", ".hidden", "..", "latest", "attempts", "events", "commit.lock", "a\0"])
def test_tags_that_cannot_be(tag: str) -> None:
    with pytest.raises(StorageError, match="cannot be the name"):
        check_tag(tag)


def test_extra_files(store: Store) -> None:
    record = write_extra(store, "t", "s", "rng/0", b"state")
    assert read_extra(store, record) == b"state"
    store.write(record.path, b"stats")
    with pytest.raises(CorruptionError, match="checksum mismatch"):
        read_extra(store, record)
    store.write(record.path, b"stat")
    with pytest.raises(CorruptionError, match="4 bytes instead of 5"):
        read_extra(store, record)
    store.delete(record.path)
    with pytest.raises(CorruptionError, match="missing"):
        read_extra(store, record)


# ---- commit ----


def test_a_committed_checkpoint_reads_back(store: Store) -> None:
    committed = save(store, "global_step10", 10)
    assert store.read("latest") == b"global_step10"
    manifest = load_manifest(store, "global_step10")
    assert manifest == committed
    for (fqn, kind), value in restore(store, manifest).items():
        shape = next(tensor.shape for tensor in manifest.tensors if tensor.key == (fqn, kind))
        np.testing.assert_array_equal(value, tensor_values(fqn, kind, shape, 1, 10).reshape(-1))


def test_experts_of_older_tags_read_back(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20, experts=[(0, 0), (1, 0)])
    manifest = save(store, "t30", 30, experts=[(0, 1), (1, 0)])
    steps = {(0, 0): 20, (0, 1): 30, (1, 0): 30}
    for layer, expert in EXPERTS:
        assert manifest.version_of(f"expert/{layer}/{expert}").step == steps.get((layer, expert), 10)
    values = restore(store, manifest)
    for unit in manifest.units:
        for row in manifest.fragments:
            if manifest.units[row.unit] == unit:
                tensor = manifest.tensors[row.tensor]
                whole = tensor_values(tensor.fqn, tensor.kind, tensor.shape, unit.attempt, unit.step).reshape(-1)
                np.testing.assert_array_equal(values[tensor.key], whole)


def test_rolled_back_versions_are_not_referred_to(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20)
    fork = open_attempt(store, parent=1, forked_at_step=10)
    manifest = save(store, "t30", 30, experts=[(0, 0)], attempt=fork.attempt)
    assert manifest.version_of("expert/0/0") == Version(2, 30)
    assert {manifest.version_of(f"expert/{a}/{b}") for a, b in EXPERTS[1:]} == {Version(1, 10)}


def test_latest_is_left_alone_on_request(store: Store) -> None:
    save(store, "a", 10)
    save(store, "b", 20, save_latest=False)
    assert latest_tag(store) == "a"
    assert [item.tag for item in list_checkpoints(store)] == ["b", "a"]


@pytest.mark.parametrize("data", [b"", b" \n\t", b"a\xff\xfe", b"\xef\xbf"], ids=["empty", "blank", "not text", "cut"])
def test_damaged_latest_is_refused_and_names_the_tags(store: Store, data: bytes) -> None:
    """None would mean a start from scratch."""
    assert latest_tag(store) is None
    store.write("latest", data)
    with pytest.raises(CorruptionError, match="there is none"):
        latest_tag(store)
    save(store, "t10", 10)
    save(store, "t20", 20)
    assert latest_tag(store) == "t20"
    store.write("latest", data)
    with pytest.raises(CorruptionError, match="latest") as caught:
        latest_tag(store)
    assert "t10, t20" in caught.value.fix
    store.write("latest", b"t10\n")
    assert latest_tag(store) == "t10"


def test_commit_of_an_incomplete_save_changes_nothing(store: Store) -> None:
    save(store, "a", 10)
    write_rank(store, "b", "s2", 0, step=20, attempt=1)
    before = store.list()
    with pytest.raises(CoverageError, match="have not finished their part: 1"):
        commit(store, "b", "s2", attempt=1)
    with pytest.raises(CoverageError, match="no rank has finished"):
        commit(store, "c", "s3", attempt=1)
    assert [key for key in store.list() if key != "commit.lock"] == [key for key in before if key != "commit.lock"]
    assert latest_tag(store) == "a"


@pytest.mark.parametrize("victim", ["packs/rank_00001.dense/c/0", "packs/rank_00000.experts/zarr.json", "extra/rng/1"])
def test_commit_needs_every_file(store: Store, victim: str) -> None:
    open_attempt(store)
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=1)
    store.delete(f"b/s/{victim}")
    with pytest.raises(StorageError) as info:
        commit(store, "b", "s", attempt=1)
    assert store.locate(f"b/s/{victim}") in info.value.where
    assert not store.exists("b/manifest.json") and latest_tag(store) is None


def test_commit_needs_files_of_the_right_size(store: Store) -> None:
    open_attempt(store)
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=1)
    key = "b/s/packs/rank_00001.dense/c/0"
    store.write(key, (store.read(key) or b"")[:-1])
    with pytest.raises(CorruptionError, match="truncated"):
        commit(store, "b", "s", attempt=1)
    assert not store.exists("b/manifest.json")


def test_an_older_attempt_cannot_commit(store: Store) -> None:
    save(store, "a", 10)
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=1)
    open_attempt(store, parent=1, forked_at_step=10)
    with pytest.raises(StaleAttemptError, match="attempt 1 may not publish here: the directory belongs to attempt 2"):
        commit(store, "b", "s", attempt=1)
    assert latest_tag(store) == "a" and not store.exists("b/manifest.json")


def test_a_later_attempt_commits_only_what_it_continues(store: Store) -> None:
    save(store, "a", 10)
    for rank in range(2):
        write_rank(store, "b", "s", rank, step=20, attempt=1)
    open_attempt(store, parent=1, forked_at_step=15)
    with pytest.raises(StaleAttemptError, match="step 20 of attempt 1, which is not in the past of attempt 2"):
        commit(store, "b", "s", attempt=2)
    assert latest_tag(store) == "a"
    open_attempt(store, parent=1, forked_at_step=20)
    assert commit(store, "b", "s", attempt=3).version == Version(1, 20)


def test_commit_without_any_attempt_is_refused(store: Store) -> None:
    with pytest.raises(StaleAttemptError, match="no attempt at all"):
        commit(store, "b", "s", attempt=1)


def test_commit_twice_is_one_commit(store: Store) -> None:
    first = save(store, "a", 10)
    assert commit(store, "a", first.save_id, attempt=1) == first
    # A crash between manifest and latest is repaired by whoever commits again.
    store.delete("latest")
    commit(store, "a", first.save_id, attempt=1)
    assert latest_tag(store) == "a"
    save(store, "b", 20)
    commit(store, "a", first.save_id, attempt=1)
    assert latest_tag(store) == "b"


def test_saving_a_tag_again_replaces_it(store: Store) -> None:
    first = save(store, "a", 10)
    second = save(store, "a", 12)
    assert load_manifest(store, "a") == second and first.save_id != second.save_id


def test_commits_at_once_agree(store: Store) -> None:
    open_attempt(store)
    for rank in range(2):
        write_rank(store, "a", "s", rank, step=10, attempt=1)
    results: list[Manifest] = []
    threads = [threading.Thread(target=lambda: results.append(commit(store, "a", "s", attempt=1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)


def test_manifest_comes_before_latest_and_after_the_checks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = type(store).write

    def spy(self: Store, key: str, data: bytes) -> None:
        written.append(key)
        real(self, key, data)

    monkeypatch.setattr(type(store), "write", spy)
    save(store, "a", 10)
    assert written[-2:] == ["a/manifest.json", "latest"]


# ---- reading what exists ----


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="directory does not exist"):
        load_manifest(open_store(tmp_path / "nowhere"), "a")
    assert list_checkpoints(open_store(tmp_path / "nowhere")) == []


def test_missing_tag_lists_what_there_is(store: Store) -> None:
    save(store, "a", 10)
    save(store, "b", 20)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint 'c'") as info:
        load_manifest(store, "c")
    assert info.value.fix == "there are: a, b"


def test_unfinished_tag_is_called_that(store: Store) -> None:
    write_rank(store, "b", "s", 0, step=20, attempt=1)
    with pytest.raises(CheckpointNotFoundError, match="was not finished: 1 rank wrote a part") as info:
        load_manifest(store, "b")
    assert "use another one" in info.value.fix
    write_rank(store, "c", "s", 0, step=20, attempt=1, publish=False)
    with pytest.raises(CheckpointNotFoundError, match="0 ranks wrote a part"):
        load_manifest(store, "c")


@pytest.mark.parametrize(
    "name",
    ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "layer_0_expert_1_model_states.pt"],
)
def test_deepspeeds_own_checkpoint_is_recognised(store: Store, name: str) -> None:
    store.write(f"global_step5/{name}", b"zip")
    with pytest.raises(UnsupportedError, match="written by DeepSpeed itself"):
        load_manifest(store, "global_step5")


def test_a_renamed_tag_is_refused(local: Store) -> None:
    save(local, "a", 10)
    assert local.local_path is not None
    (local.local_path / "a").rename(local.local_path / "b")
    with pytest.raises(FormatError, match="is of checkpoint 'a', not 'b'"):
        load_manifest(local, "b")


def test_damaged_tags_are_listed_last(store: Store) -> None:
    save(store, "a", 10)
    save(store, "b", 20)
    data = store.read("b/manifest.json") or b""
    store.write("b/manifest.json", data[:-1])
    items = list_checkpoints(store)
    assert [item.tag for item in items] == ["a", "b"]
    assert not items[0].error and "truncated" in items[1].error
    with pytest.raises(CorruptionError) as info:
        load_manifest(store, "b")
    assert info.value.where == store.locate("b/manifest.json")


def test_damaged_latest_is_explained(store: Store) -> None:
    assert latest_tag(store) is None
    store.write("latest", b"\xff\xfe")
    with pytest.raises(CorruptionError, match="`latest` is damaged"):
        latest_tag(store)
    store.write("latest", b"tag\n")
    assert latest_tag(store) == "tag"


def test_summaries_count_own_files_only(store: Store) -> None:
    first = save(store, "a", 10)
    save(store, "b", 20, experts=[(0, 0)])
    new, old = list_checkpoints(store)
    assert (new.tag, new.step, new.attempt, new.parameters) == ("b", 20, 1, 275)
    assert new.nbytes == old.nbytes == first.nbytes
    assert old.stored_bytes == first.stored_bytes > new.stored_bytes


# ---- attempts ----


def test_attempts_count_up(store: Store) -> None:
    assert current_attempt(store) is None
    one = open_attempt(store, info={"host": "n1"})
    two = open_attempt(store, parent=1, forked_at_step=7)
    assert (one.attempt, one.parent, one.info) == (1, None, {"host": "n1"})
    assert (two.attempt, two.parent, two.forked_at_step) == (2, 1, 7)
    assert current_attempt(store) == two and list_attempts(store) == [one, two]
    assert one.id != two.id
    with pytest.raises(ValueError):
        open_attempt(store, parent=1)
    with pytest.raises(StorageError, match="no attempt 9"):
        open_attempt(store, parent=9, forked_at_step=1)


def test_attempts_opened_at_once_are_distinct(store: Store) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(open_attempt(store).attempt)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def test_an_attempt_waits_for_a_commit_in_progress(store: Store) -> None:
    with store.lock("commit.lock"), pytest.raises(StorageError, match="held the lock"):
        open_attempt(store, timeout_s=0.05)
    assert current_attempt(store) is None


def test_ancestry_narrows_at_every_fork(store: Store) -> None:
    open_attempt(store)
    open_attempt(store, parent=1, forked_at_step=30)
    open_attempt(store, parent=2, forked_at_step=20)  # back before the first fork
    open_attempt(store)
    assert ancestry(store, 3) == [(3, None), (2, 20), (1, 20)]
    assert ancestry(store, 2) == [(2, None), (1, 30)]
    assert ancestry(store, 4) == [(4, None)]


def test_damaged_attempts_are_explained(store: Store) -> None:
    open_attempt(store)
    open_attempt(store, parent=1, forked_at_step=3)
    good = store.read("attempts/000001.json") or b""
    store.write("attempts/000001.json", good[:-3])
    with pytest.raises(CorruptionError, match="truncated"):
        ancestry(store, 2)
    store.delete("attempts/000001.json")
    with pytest.raises(CorruptionError, match="attempt 1 is missing"):
        ancestry(store, 2)
    store.write("attempts/000001.json", seal_envelope(Attempt(1, "x", 2, 3, 0.0)))
    with pytest.raises(CorruptionError, match="which is not older"):
        ancestry(store, 2)


@given(
    forks=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=4),
    version=st.tuples(st.integers(1, 5), st.integers(0, 10)),
)
def test_admissible_agrees_with_replaying_the_history(forks: list[tuple[int, int]], version: tuple[int, int]) -> None:
    store = open_store("memory://history")
    store.delete_prefix("attempts")
    # What each attempt's timeline holds: all versions of its own, and its parent's up to the fork.
    inherited: dict[int, set[tuple[int, int]]] = {}
    for number, (parent, step) in enumerate([(0, 0), *forks], start=1):
        parent = min(parent, number - 1)
        record = open_attempt(store, parent or None, step if parent else None)
        assert record.attempt == number
        own = {(number, own_step) for own_step in range(11)}
        past = {item for item in inherited[parent] if item[1] <= step} if parent else set()
        inherited[number] = own | past
    for number, expected in inherited.items():
        assert admissible(version, ancestry(store, number)) == (version in expected)


def test_a_crash_between_manifest_and_latest_is_told_from_a_change_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moc_ckpt.storage import commit as module

    store = make_store("local", tmp_path)
    save(store, "global_step10", 10)

    def crash(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_move_latest", crash)
        with pytest.raises(KeyboardInterrupt):
            save(store, "global_step20", 20)
    assert latest_tag(store) == "global_step10"
    cut_off = load_manifest(store, "global_step20")
    assert module.is_interrupted(store, cut_off)
    assert not module.is_interrupted(store, load_manifest(store, "global_step10"))
    module.finish_pointer(store, cut_off)
    assert latest_tag(store) == "global_step20" and not module.is_interrupted(store, cut_off)
    # Somebody rolls back: nothing was interrupted.
    store.write("latest", b"global_step10")
    assert not module.is_interrupted(store, cut_off)
    save(store, "global_step30", 30)
    assert not list(tmp_path.rglob("latest.pending"))
