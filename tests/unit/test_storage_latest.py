"""What `latest` stands for, in every state that a directory can be in."""

from __future__ import annotations

from pathlib import Path

import pytest
from storage_samples import flip, make_store, save

from moc_ckpt.errors import CheckpointNotFoundError, CorruptionError
from moc_ckpt.recovery.flush_plan import plan_flush
from moc_ckpt.recovery.memory import Inventory, MemoryVersions
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import load_manifest, manifest_key, pointer_key
from moc_ckpt.storage.latest import Latest, Manifests, find_latest, newest_of
from moc_ckpt.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store("local", tmp_path)
    for step in (10, 20):
        save(store, f"t{step}", step)
    save(store, "aside", 30, save_latest=False)
    return store


def look(store: Store) -> Latest:
    return find_latest(Manifests(store))


def tag(found: Latest) -> str | None:
    return found.manifest.tag if found.manifest is not None else None


def test_what_it_names(store: Store) -> None:
    found = look(store)
    assert (tag(found), found.named, found.damage, found.interrupted, found.newer) == ("t20", "t20", None, False, None)
    assert found.is_right and found.line == [(1, None)] and found.at_most == Version(1, 20)


def test_nothing_at_all(tmp_path: Path) -> None:
    found = look(make_store("local", tmp_path))
    assert found == Latest() and not found.is_right


def test_one_that_was_set_back_counts(store: Store) -> None:
    store.write("latest", b"t10")
    found = look(store)
    assert tag(found) == "t10" and found.is_right and found.newer is not None and found.newer.tag == "t20"


def test_one_that_a_crash_left_behind_does_not(store: Store) -> None:
    store.write("latest", b"t10")
    store.write(pointer_key("t20", load_manifest(store, "t20").save_id), b"")
    found = look(store)
    assert (tag(found), found.named, found.interrupted, found.is_right) == ("t20", "t10", True, False)


def test_another_timeline_is_not_newer(store: Store) -> None:
    """A run that went on from step 10 does not continue step 20."""
    attempt = open_attempt(store, 1, 10).attempt
    save(store, "fork", 12, attempt=attempt)
    store.write("latest", b"t20")
    found = look(store)
    assert tag(found) == "t20" and found.newer is None
    store.write("latest", b"t10")
    assert look(store).newer is not None


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"../t20"])
def test_a_file_that_is_lost_or_damaged(store: Store, content: bytes | None) -> None:
    store.delete("latest")
    if content is not None:
        store.write("latest", content)
    found = look(store)
    # What was saved aside is newer and has no part in it.
    assert tag(found) == "t20" and found.named is None and not found.is_right
    assert (found.damage is None) == (content is None)


def test_only_what_was_saved_aside(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    save(store, "aside", 30, save_latest=False)
    assert tag(look(store)) is None


def test_a_checkpoint_that_cannot_be_read(store: Store, tmp_path: Path) -> None:
    flip(next(tmp_path.rglob("t20/manifest.json")), 200)
    found = look(store)
    assert tag(found) is None and found.named == "t20" and isinstance(found.damage, CorruptionError)
    # Its parts say what it was, so nothing later comes in its place.
    assert found.at_most == Version(1, 20) and found.line == [(1, None)]


def test_a_checkpoint_that_is_not_there(store: Store) -> None:
    store.write("latest", b"t50")
    found = look(store)
    assert tag(found) is None and isinstance(found.damage, CheckpointNotFoundError)
    assert found.at_most is None and found.line == [(1, None)]


def test_many_checkpoints_are_not_all_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("latest", b"t10")
    monkeypatch.setattr("moc_ckpt.storage.latest._MOST_LOOKED_AT", 2)
    manifests = Manifests(store)
    assert find_latest(manifests).newer is None and list(manifests._found) == ["t10"]


def test_the_newest_of_a_timeline(store: Store) -> None:
    readable = Manifests(store).readable()
    assert newest_of(readable).tag == "t20"  # type: ignore[union-attr]
    assert newest_of(readable, [(1, 15)]).tag == "t10"  # type: ignore[union-attr]
    assert newest_of(readable, [(2, None)]) is None


def test_a_flush_sees_what_latest_may_stand_for(store: Store) -> None:
    """Memory holds the step that was saved aside: a restart would not find it there, so it is flushed beside it."""
    experts = {f"expert/{layer}/{expert}": frozenset({30}) for layer in range(2) for expert in range(4)}
    rank = MemoryVersions(frozenset({30}), frozenset({30}), experts)
    flush = plan_flush(Inventory("run", 1, store.url, 1, 0.0, {0: rank}), store)
    assert flush is not None and (flush.step, flush.stored_step, flush.tag) == (30, 20, "global_step30")
    assert flush.experts == {}, "what was saved aside has them"
    save(store, "global_step30", 30, save_latest=False)
    flush = plan_flush(Inventory("run", 1, store.url, 1, 0.0, {0: rank}), store)
    assert flush is not None and flush.tag == "global_step30_flushed"
    save(store, "t30", 30)
    assert plan_flush(Inventory("run", 1, store.url, 1, 0.0, {0: rank}), store) is None
    assert store.exists(manifest_key("t30"))
