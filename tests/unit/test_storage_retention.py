from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import EXPERTS, TOPOLOGY, make_store, save, write_rank

from moc_ckpt.errors import StaleAttemptError, StorageError
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import list_tags, load_manifest
from moc_ckpt.storage.manifest import FragmentTable, Manifest, PackRecord
from moc_ckpt.storage.retention import apply_retention, plan_retention
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import verify


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


def fake(tag: str, step: int, packs: set[int], attempt: int = 1, created: float = 0.0) -> Manifest:
    return Manifest(
        tag=tag,
        save_id="s",
        attempt=attempt,
        step=step,
        created=created,
        topology=TOPOLOGY,
        moe_layers=[],
        parameters=0,
        units=[],
        tensors=[],
        packs=[PackRecord(f"p{pack}", 1, 1) for pack in packs],
        fragments=FragmentTable(),
    )


# ---- the plan ----


@given(
    checkpoints=st.lists(st.tuples(st.integers(0, 20), st.sets(st.integers(0, 6))), max_size=7),
    keep_last=st.integers(0, 4),
    keep_every=st.sampled_from([0, 1, 3, 10]),
    protect=st.sets(st.integers(0, 6)),
)
def test_plan_agrees_with_a_plain_reading_of_the_rules(
    checkpoints: list[tuple[int, set[int]]], keep_last: int, keep_every: int, protect: set[int]
) -> None:
    manifests = [fake(f"t{i}", step, packs, created=i) for i, (step, packs) in enumerate(checkpoints)]
    plan = plan_retention(
        manifests[::-1], keep_last=keep_last, keep_every=keep_every, protect={f"t{i}" for i in protect}
    )
    keep, count = set(), len(checkpoints)
    order = sorted(range(count), key=lambda i: (checkpoints[i][0], i))
    for i, (step, _) in enumerate(checkpoints):
        if (
            keep_last == 0
            or count - order.index(i) <= keep_last
            or (keep_every and step % keep_every == 0)
            or i in protect
        ):
            keep.add(i)
    assert set(plan.keep) == {f"t{i}" for i in keep}
    assert plan.drop == tuple(f"t{i}" for i in order if i not in keep)
    assert plan.keep == tuple(f"t{i}" for i in reversed(order) if i in keep)
    for pack in range(7):
        users = {i for i, (_, packs) in enumerate(checkpoints) if pack in packs}
        assert (f"p{pack}" in plan.needed) == bool(users & keep)
        assert (f"p{pack}" in plan.removable) == bool(users and not users & keep)
    if manifests:
        assert f"t{order[-1]}" in plan.keep


def test_newest_means_the_last_step_of_the_newest_attempt_whatever_the_clock_says() -> None:
    manifests = [
        fake("a", 50, set(), attempt=1, created=9.0),
        fake("b", 20, set(), attempt=2, created=8.0),
        fake("c", 30, set(), attempt=2, created=5.0),
    ]
    assert plan_retention(manifests, keep_last=1).keep == ("c",)
    assert plan_retention(manifests, keep_last=2).keep == ("c", "b")
    with pytest.raises(ValueError):
        plan_retention(manifests, keep_last=-1)


# ---- applying it ----


def test_only_what_nobody_needs_goes(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20, experts=[(0, 0)])
    save(store, "t30", 30, experts=[(0, 1), (1, 0)])
    report = apply_retention(store, keep_last=1)
    assert report.kept == ("t30",) and report.dropped == ("t10", "t20") and not report.blocked
    assert list_tags(store) == ["t30"]
    left = {key.split("/")[0] + "/" + key.split("/")[3] for key in store.list() if "/packs/" in key}
    # t30 still needs experts of t10 and t20, but the dense state of neither.
    assert left == {f"t{n}/rank_0000{r}.experts" for n in (10, 20) for r in (0, 1)} | {
        f"t30/rank_0000{r}.{which}" for r in (0, 1) for which in ("dense", "experts")
    }
    assert not [key for key in store.list("t10") + store.list("t20") if "/parts/" in key or "/extra/" in key]
    assert verify(store, "t30").ok
    assert apply_retention(store, keep_last=1).packs == []
    # Once nothing refers to them any more the rest goes as well, directories included.
    save(store, "t40", 40)
    apply_retention(store, keep_last=1)
    assert store.list_dirs() == ["attempts", "t40"]
    assert verify(store, "t40").ok


def test_keep_every_and_latest_and_protected_tags_stay(store: Store) -> None:
    for step in (10, 15, 20, 25, 30):
        save(store, f"t{step}", step)
    store.write("latest", b"t15")
    report = apply_retention(store, keep_last=1, keep_every=20, protect=["t25"])
    assert set(report.kept) == {"t15", "t20", "t25", "t30"}
    assert list_tags(store) == ["t15", "t20", "t25", "t30"]


def test_checkpoints_saved_aside_stay_and_do_not_count(store: Store) -> None:
    for step in (10, 15, 20, 25, 30):
        save(store, f"t{step}", step, save_latest=step not in (10, 30))
    assert set(apply_retention(store, keep_last=2).kept) == {"t10", "t20", "t25", "t30"}
    assert list_tags(store) == ["t10", "t20", "t25", "t30"]


def test_keep_last_0_keeps_all_but_cleans_up(store: Store) -> None:
    first = save(store, "t10", 10)
    save(store, "t10", 11)
    save(store, "t20", 20)
    report = apply_retention(store, keep_last=0)
    assert report.dropped == () and report.saves == [f"t10/{first.save_id}"]
    assert not store.list(f"t10/{first.save_id}") and verify(store, "t10").ok


def test_dry_run_removes_nothing(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20)
    before = store.list()
    report = apply_retention(store, keep_last=1, dry_run=True)
    assert report.dropped == ("t10",) and len(report.packs) == 4
    assert [key for key in store.list() if key != "commit.lock"] == [key for key in before if key != "commit.lock"]
    assert apply_retention(store, keep_last=1).packs == report.packs


def test_a_replaced_save_goes_unless_something_needs_its_packs(store: Store) -> None:
    first = save(store, "a", 10)
    save(store, "b", 20, experts=[(0, 0)])
    save(store, "a", 25)
    apply_retention(store, keep_last=0)
    left = {key.split("/")[3] for key in store.list(f"a/{first.save_id}")}
    assert left == {"rank_00000.experts", "rank_00001.experts"}
    assert verify(store, "a").ok and verify(store, "b").ok


def test_unfinished_saves_go_after_a_newer_commit_only(store: Store) -> None:
    save(store, "a", 10)
    write_rank(store, "b", "finishable", 0, step=20, attempt=1)
    write_rank(store, "c", "inflight", 0, step=5, attempt=1)
    write_rank(store, "d", "nopart", 0, step=5, attempt=1, publish=False)
    report = apply_retention(store, keep_last=3, in_flight=["inflight"])
    assert report.saves == ["d/nopart"]
    assert store.list("b/finishable") and store.list("c/inflight") and not store.list("d")
    save(store, "e", 30)
    report = apply_retention(store, keep_last=3)
    assert report.saves == ["b/finishable", "c/inflight"]
    assert store.list_dirs() == ["a", "attempts", "e"]


def test_nothing_is_removed_before_a_commit(store: Store) -> None:
    write_rank(store, "b", "s", 0, step=20, attempt=1)
    report = apply_retention(store, keep_last=1)
    assert "before a commit" in report.blocked and store.list("b/s")


def test_an_unreadable_manifest_blocks_removal(store: Store) -> None:
    for step in (10, 20, 30):
        save(store, f"t{step}", step)
    store.write("t20/manifest.json", (store.read("t20/manifest.json") or b"")[:-1])
    before = store.list()
    report = apply_retention(store, keep_last=1)
    assert "t20/manifest.json" in report.blocked and report.dropped == ()
    assert [key for key in store.list() if key != "commit.lock"] == [key for key in before if key != "commit.lock"]


def test_an_older_attempt_may_not_remove(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20)
    open_attempt(store, parent=1, forked_at_step=20)
    with pytest.raises(StaleAttemptError):
        apply_retention(store, keep_last=1, attempt=1)
    assert list_tags(store) == ["t10", "t20"]
    assert apply_retention(store, keep_last=1, attempt=2).dropped == ("t10",)


def test_other_peoples_files_are_not_touched(store: Store) -> None:
    foreign = [
        "global_step5/mp_rank_00_model_states.pt",
        "project/data/extra/notes.txt",
        "project/data/packs/box/x",
        "project/src/parts/list.json",
        "project/mixed/packs/rank_00000.dense/c/0",
        "project/mixed/other/x",
        "runs/tb/events.out",
        "events/node0.jsonl",
        "t10/README",
        "lock",
    ]
    for key in foreign:
        store.write(key, b"mine")
    save(store, "t10", 10)
    save(store, "t20", 20)
    apply_retention(store, keep_last=1)
    assert list_tags(store) == ["t20"]
    assert [key for key in foreign if not store.exists(key)] == []


class Crash(Exception):
    pass


def crash_at(patch: pytest.MonkeyPatch, store: Store, deadline: int) -> None:
    """Lets removal number `deadline` (from 0) fail as if the process had died."""
    calls = iter(range(1000))
    for name in ("delete", "delete_prefix"):

        def removing(self: Store, key: str, real: Callable[[Store, str], None] = getattr(type(store), name)) -> None:
            if next(calls) == deadline:
                raise Crash
            real(self, key)

        patch.setattr(type(store), name, removing)


def test_a_crash_at_any_removal_leaves_whole_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    crashes = 0
    for deadline in range(30):
        store = open_store(f"memory://crash{deadline}")
        save(store, "t10", 10)
        save(store, "t20", 20, experts=EXPERTS[:1])
        save(store, "t30", 30, experts=EXPERTS[1:3])
        with monkeypatch.context() as patch:
            crash_at(patch, store, deadline)
            try:
                apply_retention(store, keep_last=1)
            except Crash:
                crashes += 1
        assert "t30" in list_tags(store)
        assert all(verify(store, tag).ok for tag in list_tags(store)), deadline
        # The next collection finishes the work.
        apply_retention(store, keep_last=1)
        left = store.list("t10") + store.list("t20")
        assert left and all(".experts/" in key for key in left), deadline
        if crashes <= deadline:
            break
    assert crashes == 10  # two manifests; two dense packs, extra and parts of each of two saves


def test_retention_waits_for_the_commit_lock(store: Store) -> None:
    save(store, "t10", 10)
    with store.lock("commit.lock"), pytest.raises(StorageError, match="held the lock"):
        apply_retention(store, keep_last=1, timeout_s=0.05)
    assert load_manifest(store, "t10").step == 10
