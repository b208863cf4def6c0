"""Which state in memory is whole: against every possibility, tried out."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import StorageError
from moc_ckpt.recovery import flush
from moc_ckpt.recovery.memory import MemoryChoice, MemoryVersions, choose, choose_newer

STEPS = st.frozensets(st.integers(1, 6), max_size=5)
UNITS = ("expert/0/0", "expert/0/1", "expert/1/0")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[int, MemoryVersions], int]:
    world = draw(st.integers(1, 4))
    present = draw(st.sets(st.integers(0, world - 1), min_size=max(0, world - 1)))
    ranks = {}
    for rank in sorted(present):
        owned = draw(st.sets(st.sampled_from(UNITS)))
        dense = draw(st.one_of(st.just(frozenset()), STEPS))
        ranks[rank] = MemoryVersions(dense, draw(STEPS), {unit: draw(STEPS) for unit in sorted(owned)})
    return ranks, world


def brute_force(ranks: dict[int, MemoryVersions], world: int) -> MemoryChoice | None:
    if sorted(ranks) != list(range(world)):
        return None
    for step in range(6, 0, -1):
        if all(step in rank.extra and (not rank.dense or step in rank.dense) for rank in ranks.values()):
            break
    else:
        return None
    experts = {}
    for unit in UNITS:
        owners = [rank.experts[unit] for rank in ranks.values() if unit in rank.experts]
        whole = [at for at in range(1, step + 1) if owners and all(at in steps for steps in owners)]
        if whole:
            experts[unit] = whole[-1]
    return MemoryChoice(step, experts)


@settings(max_examples=600, deadline=None)
@given(worlds())
def test_the_choice_is_the_newest_whole_state(case: tuple[dict[int, MemoryVersions], int]) -> None:
    ranks, world = case
    assert choose(ranks, world) == brute_force(ranks, world)


def test_a_rank_that_is_gone_takes_dense_state_along() -> None:
    held = MemoryVersions(frozenset({3}), frozenset({3}), {"expert/0/0": frozenset({1, 3})})
    assert choose({0: held, 1: held}, 2) == MemoryChoice(3, {"expert/0/0": 3})
    assert choose({0: held}, 2) is None


def test_half_an_expert_does_not_count() -> None:
    one = MemoryVersions(frozenset({4}), frozenset({4}), {"expert/0/0": frozenset({2, 4})})
    other = MemoryVersions(frozenset({4}), frozenset({4}), {"expert/0/0": frozenset({2, 3})})
    assert choose({0: one, 1: other}, 2) == MemoryChoice(4, {"expert/0/0": 2})


@st.composite
def remains(draw: st.DrawFn) -> tuple[dict[int, MemoryVersions], int, dict[str, set[int]], int, dict[str, int]]:
    """What is left of a world: its ranks, the world, who owned what, a commit's step, and what storage has."""
    world = draw(st.integers(1, 4))
    owners = {unit: draw(st.sets(st.integers(0, world - 1), min_size=1)) for unit in UNITS}
    here = draw(st.sets(st.integers(0, world - 1)))
    # A record may be lost, or from before there were owners in it.
    tells = draw(st.sets(st.sampled_from(sorted(here)))) if here else set()
    ranks = {}
    for rank in sorted(here):
        mine = [unit for unit in UNITS if rank in owners[unit]]
        # An arena may have lost all versions of an expert.
        held = {unit: steps for unit in mine if (steps := draw(STEPS)) or draw(st.booleans())}
        told = {unit: frozenset(owners[unit]) for unit in mine} if rank in tells else {}
        ranks[rank] = MemoryVersions(draw(STEPS), draw(STEPS), held, told)
    stored = {unit: draw(st.integers(0, 6)) for unit in draw(st.sets(st.sampled_from(UNITS)))}
    return ranks, world, owners, draw(st.integers(0, 7)), stored


@settings(max_examples=800, deadline=None)
@given(remains())
def test_experts_of_a_world_that_lost_ranks(
    case: tuple[dict[int, MemoryVersions], int, dict[str, set[int]], int, dict[str, int]],
) -> None:
    ranks, world, owners, step, stored = case
    found = choose_newer(ranks, world, step, stored)
    for unit in UNITS:
        told = any(unit in rank.owners for rank in ranks.values())
        if not told and len(ranks) == world:
            # All are here, so whoever has some of it are its owners.
            real = {number for number, rank in ranks.items() if unit in rank.experts}
        else:
            real = owners[unit] if told else {-1}
        promised = [
            at
            for at in range(step, stored.get(unit, -1), -1)
            if real and all(owner in ranks and at in ranks[owner].experts.get(unit, ()) for owner in real)
        ]
        assert found.get(unit) == (promised[0] if promised else None)


def test_owners_that_contradict_each_other_count_for_nothing() -> None:
    steps = {"expert/0/0": frozenset({3})}
    one = MemoryVersions(frozenset(), frozenset(), steps, {"expert/0/0": frozenset({0})})
    other = MemoryVersions(frozenset(), frozenset(), steps, {"expert/0/0": frozenset({0, 1})})
    assert choose_newer({0: one}, 3, 4, {}) == {"expert/0/0": 3}
    assert choose_newer({0: one, 1: other}, 3, 4, {}) == {}


class Answer:
    """An agent's answer, as far as it is looked at."""

    def __init__(self, **rank: Any) -> None:
        self.ranks = [
            SimpleNamespace(**{"rank": 3, "alive": False, "queued": 0, "writing": 0, "committing": 0, **rank})
        ]


def test_parts_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other trainers of a save are gone, so it stays uncommitted: a restart must not wait for that."""
    monkeypatch.setattr(flush, "Status", Answer)
    monkeypatch.setattr(flush, "_COMMIT_S", 0.5)
    said: list[list[int]] = []
    for answer, least in ((Answer(committing=1), 0.5), (Answer(), 0.0), (Answer(alive=True, writing=1), 0.0)):
        monkeypatch.setattr(flush, "ask_agent", lambda *_args, answer=answer: answer)
        begin = time.monotonic()
        flush.wait_for_agent(Path(), 60.0, said.append)
        assert least <= time.monotonic() - begin < 30
    assert said == []
    monkeypatch.setattr(flush, "ask_agent", lambda *_args: Answer(writing=1))
    with pytest.raises(StorageError, match=r"has not written the saves of ranks 3 after 0\.3 s"):
        flush.wait_for_agent(Path(), 0.3, said.append)
    assert said == [[3]]
