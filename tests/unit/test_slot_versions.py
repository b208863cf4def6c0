from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.snapshot.slots import Slot, SlotState
from moc_ckpt.snapshot.versions import freeable, rolled_back

FILLING, FILLED, PERSISTING, COMMITTED = SlotState.FILLING, SlotState.FILLED, SlotState.PERSISTING, SlotState.COMMITTED


def slots(*items: tuple) -> list[Slot]:
    """(unit, step, state) or (unit, step, state, attempt) each."""
    return [
        Slot(index, unit, (*rest, 1)[0], step, state, 4096, ((index * 4096, 4096),), (0, 0))
        for index, (unit, step, state, *rest) in enumerate(items)
    ]


def steps(found: list[Slot]) -> list[tuple[str, int]]:
    return sorted((slot.unit, slot.step) for slot in found)


def test_the_newest_confirmed_version_stays_and_so_do_newer_ones() -> None:
    table = slots(("a", 1, FILLED), ("a", 3, COMMITTED), ("a", 5, FILLED), ("a", 7, FILLED), ("b", 1, FILLED))
    assert steps(freeable(table, confirmed=5)) == [("a", 1), ("a", 3)]
    assert steps(freeable(table, confirmed=6)) == [("a", 1), ("a", 3)]
    assert steps(freeable(table, confirmed=7)) == [("a", 1), ("a", 3), ("a", 5)]
    assert freeable(table, confirmed=0) == []


def test_what_is_in_use_stays_but_counts() -> None:
    table = slots(("a", 1, FILLED), ("a", 2, PERSISTING), ("a", 3, PERSISTING), ("a", 4, FILLING))
    assert steps(freeable(table, confirmed=3)) == [("a", 1)]
    assert steps(freeable(table, confirmed=4)) == [("a", 1)]  # a version being filled replaces nothing


def test_the_newest_committed_version_is_kept_on_request() -> None:
    table = slots(("a", 1, COMMITTED), ("a", 2, COMMITTED), ("a", 4, FILLED), ("b", 3, FILLED), ("b", 4, FILLED))
    assert steps(freeable(table, confirmed=4, committed=3)) == [("a", 1), ("a", 2), ("b", 3)]
    assert steps(freeable(table, confirmed=4, committed=3, keep_committed=True)) == [("a", 1)]
    assert steps(freeable(table, confirmed=4, committed=None, keep_committed=True)) == [("a", 1), ("a", 2), ("b", 3)]
    assert steps(freeable(table, confirmed=4, committed=0, keep_committed=True)) == [("a", 1), ("a", 2), ("b", 3)]


def test_of_two_copies_of_a_version_the_one_in_use_stays() -> None:
    table = slots(("a", 2, PERSISTING), ("a", 2, FILLED), ("a", 1, FILLED))
    assert [slot.index for slot in freeable(table, confirmed=2)] == [2, 1]
    assert [slot.index for slot in freeable(slots(("a", 2, FILLED), ("a", 2, COMMITTED)), confirmed=2)] == [0]


def test_attempts_come_before_steps() -> None:
    table = slots(("a", 5, FILLED, 1), ("a", 4, FILLED, 2))
    assert [slot.attempt for slot in freeable(table, confirmed=6)] == [1]


def test_rolled_back_timelines() -> None:
    table = slots(("a", 4, FILLED, 1), ("a", 6, COMMITTED, 1), ("b", 7, PERSISTING, 1), ("a", 6, FILLED, 2))
    assert [(slot.attempt, slot.step) for slot in rolled_back(table, attempt=2, forked_at=4)] == [(1, 6)]
    assert rolled_back(table, attempt=1, forked_at=0) == []


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.sampled_from([FILLING, FILLED, PERSISTING, COMMITTED])),
        max_size=20,
    ),
    st.integers(0, 10),
    st.none() | st.integers(0, 10),
    st.booleans(),
)
def test_what_stays_is_just_what_is_needed(items, confirmed, committed, keep) -> None:
    table = slots(*items)
    gone = {slot.index for slot in freeable(table, confirmed=confirmed, committed=committed, keep_committed=keep)}
    for unit in "abc":
        whole = [s for s in table if s.unit == unit and s.state != FILLING]
        stays = [s for s in whole if s.index not in gone]

        def newest(some: list[Slot], limit: int) -> int | None:
            return max((s.step for s in some if s.step <= limit), default=None)

        assert newest(whole, confirmed) == newest(stays, confirmed)
        assert {s.step for s in whole if s.step > confirmed} == {s.step for s in stays if s.step > confirmed}
        needed = {newest(whole, confirmed)}
        if keep and committed is not None:
            limit = min(committed, confirmed)
            assert newest(whole, limit) == newest(stays, limit)
            needed.add(newest(whole, limit))
        idle = [s for s in stays if s.state in (FILLED, COMMITTED) and s.step <= confirmed]
        assert {s.step for s in idle} <= needed and len(idle) <= len(needed)
    assert all(slot.state in (FILLED, COMMITTED) for slot in table if slot.index in gone)
