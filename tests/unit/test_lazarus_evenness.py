"""Even work: the same node sets in other hands, never more work for the busiest place."""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.allocation import allocate
from moc_ckpt.lazarus.evenness import even_out, imbalance, reassigned
from moc_ckpt.lazarus.placement import mro
from moc_ckpt.lazarus.probability import count_recoverable
from moc_ckpt.lazarus.ranks import split
from moc_ckpt.lazarus.types import Placement


@st.composite
def placed(draw: st.DrawFn) -> tuple[Placement, list[int]]:
    """A placement of any kind, MRO or not, and loads that it need not fit."""
    experts, nodes = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    if draw(st.booleans()):
        slots = draw(st.integers(-(-experts // nodes), 5 + experts // nodes))
        return mro(allocate(loads, nodes, slots, 1).replicas, nodes, slots), loads
    held = [[expert] for expert in range(experts)]
    held += draw(st.lists(st.lists(st.integers(0, experts - 1), max_size=4), max_size=4))
    return Placement(experts, tuple(map(tuple, held))), loads


def node_sets(placement: Placement) -> Counter[tuple[int, ...]]:
    """How many experts have which nodes, one entry per slot."""
    return Counter(
        tuple(place for place, held in enumerate(placement.slots) for other in held if other == expert)
        for expert in range(placement.num_experts)
    )


def optimum(placement: Placement, loads: list[int]) -> float:
    """The most loaded place's work over the mean, the best of all ways to change places; by enumeration."""
    kinds: dict[int, list[int]] = {}
    for expert, number in enumerate(placement.replicas()):
        kinds.setdefault(number, []).append(expert)
    found = []
    for orders in product(*(permutations(kind) for kind in kinds.values())):
        to = {
            old: new
            for kind, order in zip(kinds.values(), orders, strict=True)
            for old, new in zip(kind, order, strict=True)
        }
        slots = tuple(tuple(to[expert] for expert in held) for held in placement.slots)
        found.append(imbalance(Placement(placement.num_experts, slots), loads))
    return min(found)


@settings(deadline=None, max_examples=300)
@given(placed())
def test_the_node_sets_stay_and_the_busiest_place_has_no_more_to_do(case: tuple[Placement, list[int]]) -> None:
    before, loads = case
    after = even_out(before, loads)
    assert after.replicas() == before.replicas()
    assert list(map(len, after.slots)) == list(map(len, before.slots))
    assert node_sets(after) == node_sets(before)
    assert count_recoverable(after) == count_recoverable(before)
    assert imbalance(after, loads) <= imbalance(before, loads) * (1 + 1e-9)
    assert even_out(before, loads) == after, "ranks plan for themselves and must come to the same plan"
    if sum(loads) and len(before.slots) > 1:
        doubled = even_out(before, [2 * load for load in loads])
        assert imbalance(doubled, loads) == pytest.approx(imbalance(after, loads))


def test_beside_the_best_of_all_ways() -> None:
    """A local search: of 6,000 cases like these, 3 were more than 0.5 % off the enumerated optimum, 12 % at most."""
    rng = random.Random(7)
    off = []
    for _ in range(600):
        experts, nodes = rng.randint(1, 6), rng.randint(1, 5)
        loads = [rng.randint(0, 1000) for _ in range(experts)]
        slots = rng.randint(-(-experts // nodes), 5 + experts // nodes)
        before = mro(allocate(loads, nodes, slots, 1).replicas, nodes, slots)
        off.append(imbalance(even_out(before, loads), loads) / optimum(before, loads))
    assert min(off) > 1 - 1e-9
    assert max(off) < 1.15 and sum(one > 1.006 for one in off) <= 6


def test_the_paper_puts_the_same_kind_together() -> None:
    """Four pairs of experts, of which one of each has twice the work: MRO alone puts the busy ones onto one node."""
    before = Placement(4, ((0, 1), (0, 1), (2, 3), (2, 3)))
    loads = [30, 30, 10, 10]
    assert imbalance(before, loads) == 1.5
    after = even_out(before, loads)
    assert imbalance(after, loads) == 1.0
    assert node_sets(after) == node_sets(before)


def test_many_nodes_become_even() -> None:
    loads = [round(1e6 * 4 ** (-expert / 63)) for expert in range(64)]
    before = mro(allocate(loads, 16, 8, 2).replicas, 16, 8)
    assert imbalance(before, loads) > 1.5
    assert imbalance(even_out(before, loads), loads) < 1.02


def test_no_load_and_no_choice() -> None:
    before = Placement(3, ((0, 1), (2,), ()))
    assert even_out(before, [0, 0, 0]) == before
    assert even_out(Placement(1, ((0, 0),)), [5]) == Placement(1, ((0, 0),))
    assert reassigned([], [], 2) == []


def test_loads_of_other_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="loads of 2 experts for a placement of 3"):
        even_out(Placement(3, ((0, 1, 2),)), [1, 2])


@settings(deadline=None, max_examples=150)
@given(placed(), st.integers(1, 4), st.integers(0, 1))
def test_ranks_of_a_node_get_about_the_same_work(case: tuple[Placement, list[int]], ranks: int, spare: int) -> None:
    nodes, loads = case
    room = -(-max(map(len, nodes.slots)) // ranks) + spare
    if not room:
        return
    plain, even = split(nodes, ranks, room), split(nodes, ranks, room, loads)
    for at in range(0, len(plain.slots), ranks):
        one, other = plain.slots[at : at + ranks], even.slots[at : at + ranks]
        assert sorted(sum(one, ())) == sorted(sum(other, ())), "a node's slots stay on it"
        assert list(map(len, one)) == list(map(len, other))
        assert sum(len(set(held)) for held in other) <= sum(len(set(held)) for held in one), "more local copies"
    assert imbalance(even, loads) <= imbalance(plain, loads) * (1 + 1e-9)


def test_ranks_become_even() -> None:
    """One node, two ranks of two slots: both busy experts were on the first."""
    node = Placement(4, ((0, 1, 2, 3),))
    assert split(node, 2).slots == ((0, 1), (2, 3))
    assert imbalance(split(node, 2, loads=[9, 9, 1, 1]), [9, 9, 1, 1]) == 1.0
