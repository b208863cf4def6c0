"""The choice of checkpoint and versions against brute force."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import EXPERTS, make_store, save

from moc_ckpt.recovery.versions import Holding, StoredCheckpoint, UnitSource, plan_versions, stored_checkpoint
from moc_ckpt.state.unit import Version, expert_unit
from moc_ckpt.storage.checkpoint import load_manifest

EXPERT_UNITS = [expert_unit(layer, expert) for layer in range(2) for expert in range(2)]
DENSE_UNITS = ["dense/a", "dense/b"]
LINE = [(3, None), (1, 4)]
"""Attempt 3 continues attempt 1 at step 4; attempt 2 was given up."""


@st.composite
def directories(draw: Any) -> list[StoredCheckpoint]:
    """Checkpoints of any attempt and step; units of any earlier version, in one or two packs."""
    found = []
    for number in range(draw(st.integers(1, 5))):
        version = Version(draw(st.integers(1, 3)), draw(st.integers(1, 6)))
        units = {}
        for unit in DENSE_UNITS:
            units[unit] = Holding(version, frozenset({f"t{number}/dense{draw(st.integers(0, 1))}"}))
        for unit in EXPERT_UNITS:
            then = Version(draw(st.integers(1, version.attempt)), draw(st.integers(1, version.step)))
            packs = {f"{then.attempt}-{then.step}/{unit}/{part}" for part in range(draw(st.integers(1, 2)))}
            packs |= {f"t{number}/experts"} if draw(st.integers(0, 3)) == 0 else set()
            content = draw(st.sampled_from(["same", "same", "same", "other"]))
            units[unit] = Holding(then, frozenset(packs), then.attempt * 1000 + then.step * 10, content)
        learnt = dict.fromkeys(EXPERT_UNITS, version.attempt * 1000 + version.step * 10)
        found.append(StoredCheckpoint(f"t{number}", version, draw(st.floats(0, 9)), units, learnt))
    return found


def admitted(version: Version, line: Any) -> bool:
    return line is None or any(version[0] == attempt and (last is None or version[1] <= last) for attempt, last in line)


def oracle(
    checkpoints: list[StoredCheckpoint],
    bad: set[tuple[str, str]],
    unusable: set[str],
    line: Any,
    tag: str | None,
    at_most: Version | None,
) -> tuple[str, dict[str, Version | None]] | None:
    """What must come out, by looking at every possibility."""

    def intact(item: StoredCheckpoint, unit: str) -> bool:
        return {(pack, unit) for pack in item.units[unit].packs}.isdisjoint(bad)

    targets = [
        item
        for item in checkpoints
        if (item.tag == tag if tag else admitted(item.version, line) and (at_most is None or item.version <= at_most))
        and item.tag not in unusable
        and all(intact(item, unit) for unit in DENSE_UNITS)
    ]
    if not targets:
        return None
    target = max(targets, key=lambda item: (item.version, item.created))
    best: dict[str, Version | None] = {}
    for unit in EXPERT_UNITS:
        want = target.units[unit]
        versions = [
            item.units[unit].version
            for item in checkpoints
            if intact(item, unit)
            and item.units[unit].content == want.content
            and (admitted(item.units[unit].version, line) or item.units[unit].version == want.version)
            and item.units[unit].version <= target.version
            and item.units[unit].version.step <= target.version.step
        ]
        best[unit] = max(versions, default=None)
    return target.tag, best


@settings(max_examples=400, deadline=None)
@given(st.data(), directories(), st.sampled_from([LINE, None]))
def test_against_every_possibility(data: Any, checkpoints: list[StoredCheckpoint], line: Any) -> None:
    pairs = sorted({(pack, unit) for item in checkpoints for unit, held in item.units.items() for pack in held.packs})
    bad = data.draw(st.sets(st.sampled_from(pairs)))
    unusable = data.draw(st.sets(st.sampled_from([item.tag for item in checkpoints]), max_size=1))
    tag = data.draw(st.sampled_from([None, "t0"]))
    at_most = data.draw(st.sampled_from([None, Version(3, 3), Version(1, 4)]))
    plan = plan_versions(checkpoints, damaged=bad, unusable=unusable, line=line, tag=tag, at_most=at_most)
    expected = oracle(checkpoints, bad, unusable, line, tag, at_most)
    if expected is None:
        assert plan is None
        return
    assert plan is not None
    by_tag = {item.tag: item for item in checkpoints}
    # Created at the same moment and of the same version: either is right.
    assert (plan.version, by_tag[plan.tag].created) == (by_tag[expected[0]].version, by_tag[expected[0]].created)
    if plan.tag != expected[0]:
        return
    assert {unit for unit, version in expected[1].items() if version is None} == set(plan.hopeless)
    assert {unit: source.version for unit, source in plan.sources.items()} == {
        unit: version for unit, version in expected[1].items() if version is not None
    }
    for unit, source in plan.sources.items():
        held = by_tag[source.tag].units[unit]
        # One manifest says where all of it is, none of it damaged: never half and half.
        assert held.version == source.version
        assert not {(pack, unit) for pack in held.packs} & bad
        assert source.wanted == by_tag[plan.tag].units[unit].version
        now = by_tag[plan.tag].learnt[unit]
        assert source.lost == (0 if source.version == plan.version else max(now - (held.tokens or 0), 0))
    for name in plan.passed_over:
        assert by_tag[name].version >= plan.version


@settings(max_examples=100, deadline=None)
@given(directories())
def test_nothing_damaged_nothing_moved(checkpoints: list[StoredCheckpoint]) -> None:
    """An expert moves only if another manifest has a newer version of it."""
    plan = plan_versions(checkpoints, tag="t0")
    assert plan is not None and plan.tag == "t0" and not plan.hopeless and not plan.passed_over
    assert all(source.version > source.wanted for source in plan.replaced)


def test_the_preferred_of_equals() -> None:
    one, two = (
        StoredCheckpoint(name, Version(1, 2), created, {"dense/a": Holding(Version(1, 2), frozenset({name}))})
        for name, created in (("one", 1.0), ("two", 2.0))
    )
    assert plan_versions([one, two]).tag == "two"  # type: ignore[union-attr]
    assert plan_versions([one, two], prefer="one").tag == "one"  # type: ignore[union-attr]
    plan = plan_versions([one, two], prefer="one", damaged={("one", "dense/a")})
    assert plan is not None and (plan.tag, plan.passed_over) == ("two", ("one",))


def test_real_manifests(tmp_path: Any) -> None:
    store = make_store("local", tmp_path)
    save(store, "a", 10)
    save(store, "b", 20, experts=[(0, 0), (1, 1)])
    save(store, "c", 30, experts=[(0, 1), (0, 0)])
    manifests = [load_manifest(store, tag) for tag in "abc"]
    checkpoints = [stored_checkpoint(manifest) for manifest in manifests]
    own = manifests[2].save_id
    plan = plan_versions(checkpoints, line=[(1, None)])
    assert plan is not None and plan.replaced == () and len(plan.sources) == len(EXPERTS)
    damaged = {(f"c/{own}/packs/rank_00001.experts", unit) for unit in ("expert/0/0", "expert/0/1")}
    plan = plan_versions(checkpoints, damaged=damaged, line=[(1, None)])
    assert plan is not None
    assert plan.replaced == (
        UnitSource("expert/0/0", "b", Version(1, 20), Version(1, 30), 0),
        UnitSource("expert/0/1", "a", Version(1, 10), Version(1, 30), 0),
    )
    plan = plan_versions(checkpoints, damaged={(f"c/{own}/packs/rank_00000.dense", "dense/h.0.attn")})
    assert plan is not None and (plan.tag, plan.passed_over) == ("b", ("c",))
    assert plan.sources["expert/1/1"].version == (1, 20)
