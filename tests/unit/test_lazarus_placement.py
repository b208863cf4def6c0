"""Placements: valid, optimal where all others can be enumerated, and counted exactly."""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "experiments"))

from _placement_oracle import allocations, cases, survivals

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus import _build, _improve
from moc_ckpt.lazarus.allocation import allocate
from moc_ckpt.lazarus.domains import count_recoverable_domains, spread_over_domains
from moc_ckpt.lazarus.placement import PLACEMENTS, closed_form_mro, compact, mro, mro_paper, spread
from moc_ckpt.lazarus.probability import (
    TooManyStatesError,
    closed_form,
    count_recoverable,
    count_sets,
    probabilities,
    recoverable_bound,
)
from moc_ckpt.lazarus.ranks import split
from moc_ckpt.lazarus.types import Placement


def by_definition(*placements: Placement) -> tuple[int, ...]:
    """Tries every set of failed nodes."""
    nodes = len(placements[0].slots)
    counts = [0] * (nodes + 1)
    for size in range(nodes + 1):
        for failed in itertools.combinations(range(nodes), size):
            counts[size] += all(
                set(range(item.num_experts))
                == {e for n, held in enumerate(item.slots) if n not in failed for e in held}
                for item in placements
            )
    return tuple(counts)


@st.composite
def problems(draw: st.DrawFn, nodes: int = 9, slots: int = 6, experts: int = 20) -> tuple[list[int], int, int]:
    count, room = draw(st.integers(1, nodes)), draw(st.integers(1, slots))
    number = draw(st.integers(1, min(experts, count * room)))
    replicas = [1] * number
    for expert in draw(st.lists(st.integers(0, number - 1), max_size=count * room - number)):
        replicas[expert] += 1
    return replicas, count, room


# ----------------------------------------------------------------------------------------------- valid


@pytest.mark.parametrize("name", PLACEMENTS)
@settings(deadline=None, max_examples=150)
@given(problem=problems(nodes=14, slots=8, experts=40))
def test_every_expert_gets_its_slots_and_no_node_too_many(name: str, problem: tuple[list[int], int, int]) -> None:
    replicas, nodes, slots = problem
    placement = PLACEMENTS[name](replicas, nodes, slots)
    assert placement.replicas() == tuple(replicas)
    assert len(placement.slots) == nodes and max(map(len, placement.slots)) <= slots
    assert placement == PLACEMENTS[name](replicas, nodes, slots)


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_compact_uses_as_few_nodes_as_possible_for_the_largest_expert(problem: tuple[list[int], int, int]) -> None:
    replicas, nodes, slots = problem
    largest = max(range(len(replicas)), key=lambda expert: (replicas[expert], -expert))
    assert len(compact(replicas, nodes, slots).holders(largest)) == -(-replicas[largest] // slots)


def test_spread_deals_out_round_robin() -> None:
    assert spread([2, 3, 3], 4, 2).slots == ((0, 1), (0, 2), (1, 2), (1, 2))
    assert spread([5, 1, 2], 4, 2).slots == ((0, 0), (0, 1), (0, 2), (0, 2))


# --------------------------------------------------------------------------------------------- optimal


def check_optimal(replicas: tuple[int, ...], nodes: int, slots: int) -> bool:
    """Compares with all placements; returns whether the published construction is worse."""
    found = survivals(replicas, nodes, slots)
    ours = count_recoverable(mro(replicas, nodes, slots))
    peak = tuple(map(max, zip(*found, strict=True)))
    assert ours in found
    if peak in found:
        assert ours == peak, (replicas, nodes, slots)
    assert not any(other != ours and all(a >= b for a, b in zip(other, ours, strict=True)) for other in found)
    assert all(most <= bound for most, bound in zip(peak, recoverable_bound(replicas, nodes, slots), strict=True))
    return count_recoverable(mro_paper(replicas, nodes, slots)) != ours


def test_mro_is_the_optimum_of_all_placements_of_small_cases() -> None:
    # The rest, to N = 5, c = 3, E = 5, takes minutes: scripts/experiments/lazarus_optimality.py, and the sample below.
    count = worse = 0
    for nodes, slots, experts in cases(5, 3, 5):
        if ((nodes, slots) == (5, 3) and experts > 3) or (nodes, slots, experts) == (4, 3, 5):
            continue
        for replicas in allocations(nodes, slots, experts):
            count += 1
            worse += check_optimal(replicas, nodes, slots)
    assert (count, worse) == (695, 17)


def test_mro_is_the_optimum_of_samples_of_larger_cases() -> None:
    rng = random.Random(20240705)
    larger = [(*case, r) for case in ((5, 3, 4), (5, 3, 5), (4, 3, 5)) for r in allocations(*case)]
    irregular = [(n, c, e, r) for n, c, e, r in larger if sum(r[::c]) > n]
    for nodes, slots, _, replicas in [*rng.sample(irregular, 12), *rng.sample(larger, 12)]:
        check_optimal(replicas, nodes, slots)


@pytest.mark.parametrize(
    ("replicas", "nodes", "slots", "failed", "published", "best"),
    [([3, 3, 3, 3], 4, 3, 1, 3 / 4, 1), ([2, 3, 3], 4, 2, 2, 4 / 6, 5 / 6), ([2, 2, 2], 3, 2, 1, 2 / 3, 1)],
)
def test_the_published_construction_leaves_experts_underspread(
    replicas: list[int], nodes: int, slots: int, failed: int, published: float, best: float
) -> None:
    assert probabilities(count_recoverable(mro_paper(replicas, nodes, slots)))[failed] == published
    assert probabilities(count_recoverable(mro(replicas, nodes, slots)))[failed] == best


@settings(deadline=None, max_examples=200)
@given(problem=problems())
def test_mro_is_never_worse_than_what_it_is_compared_with(problem: tuple[list[int], int, int]) -> None:
    replicas, nodes, slots = problem
    ours = count_recoverable(mro(replicas, nodes, slots))
    for name in ("mro_paper", "spread", "compact"):
        # In the order of its choice: fewest failed nodes first.
        assert ours >= count_recoverable(PLACEMENTS[name](replicas, nodes, slots)), name
    assert all(a <= b for a, b in zip(ours, recoverable_bound(replicas, nodes, slots), strict=True))


def test_larger_clusters_get_the_better_of_both_plans() -> None:
    # Two groups of 8 take 6 nodes each; the last 4 experts find 3, and have 6 replicas.
    replicas = [6] * 20
    ours = probabilities(count_recoverable(mro(replicas, 15, 8)))
    published = probabilities(count_recoverable(mro_paper(replicas, 15, 8)))
    assert all(a >= b for a, b in zip(ours, published, strict=True))
    assert ours[:6] == (1,) * 6 and published[3] < 1
    assert ours[8] > 0.97 and published[8] < 0.87


def test_the_local_search_goes_on_where_the_variants_end() -> None:
    # None of the variants survives more than 99 and 27 failures of 7 and 8 nodes.
    assert count_recoverable(mro([4, 6, 8, 8, 14], 10, 4))[6:9] >= (195, 100, 28)


# ---------------------------------------------------------------------------------- the paper's examples


def test_the_local_search_is_bounded_also_with_many_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of it has some 400,000 changes here."""
    replicas = sorted(allocate([1e6 / (expert + 1) ** 0.3 for expert in range(512)], 10, 96).replicas)
    assert not _build.regular(replicas, 10, 96)
    scored: list[int] = []
    table_score = _improve._table_score

    def counted(count: int) -> Any:
        score = table_score(count)

        def one(masks: Any) -> Any:
            scored.append(1)
            return score(masks)

        return one

    monkeypatch.setattr(_improve, "_table_score", counted)
    _improve.improved(replicas, 10, 96)
    assert len(scored) <= _improve._STARTS * (_improve._MAX_TRIALS + 2) + 20


def test_figure_4() -> None:
    # Plan A survives 3 failures on the live pairs that the text lists. Replicas (2, 3, 3, 4) give it.
    plan_a = Placement(4, ((0, 2, 3), (0, 1, 3), (1, 3), (1, 2), (2, 3)))
    alive = [
        (i, j) for i, j in itertools.combinations(range(5), 2) if {*plan_a.slots[i], *plan_a.slots[j]} == {0, 1, 2, 3}
    ]
    assert alive == [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4)]
    assert probabilities(count_recoverable(plan_a))[3] == 5 / 10
    for place in (mro, mro_paper):
        assert probabilities(count_recoverable(place(plan_a.replicas(), 5, 4)))[3] == 7 / 10


def test_figure_5() -> None:
    # Failure patterns of 3 nodes that lose an expert: 4 of 10 with MRO, 7 of 10 in case II.
    for place in (mro, mro_paper):
        best = place((2, 2, 3, 3), 5, 2)
        assert math.comb(5, 3) - count_recoverable(best)[3] == 4
    case_2 = Placement(4, ((0, 1), (0, 3), (1, 2), (2, 3), (2, 3)))
    assert case_2.replicas() == (2, 2, 3, 3)
    assert math.comb(5, 3) - count_recoverable(case_2)[3] == 7
    # Case III: experts of both groups exchanged.
    case_3 = Placement(4, ((0, 2), (0, 2), (1, 3), (1, 3), (2, 3)))
    assert math.comb(5, 3) - count_recoverable(case_3)[3] > 4
    assert recoverable_bound((2, 2, 3, 3), 5, 2)[3] == 6


# ------------------------------------------------------------------------------------------- counting


@st.composite
def any_placements(draw: st.DrawFn) -> Placement:
    experts, nodes = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    held = st.lists(st.integers(0, experts - 1), max_size=4).map(tuple)
    return Placement(experts, tuple(draw(st.lists(held, min_size=nodes, max_size=nodes))))


@settings(deadline=None, max_examples=300)
@given(placement=any_placements())
def test_counts_are_those_of_the_definition(placement: Placement) -> None:
    assert count_recoverable(placement) == by_definition(placement)


@settings(deadline=None, max_examples=50)
@given(problem=problems(nodes=6), other=st.randoms(use_true_random=False))
def test_layers_are_counted_together(problem: tuple[list[int], int, int], other: random.Random) -> None:
    replicas, nodes, slots = problem
    first = mro(replicas, nodes, slots)
    shuffled = list(spread(replicas, nodes, slots).slots)
    other.shuffle(shuffled)
    second = Placement(len(replicas), tuple(shuffled))
    assert count_recoverable(first, second) == by_definition(first, second)


@settings(deadline=None, max_examples=200)
@given(problem=problems(nodes=40, slots=10, experts=60))
def test_closed_form(problem: tuple[list[int], int, int]) -> None:
    replicas, nodes, slots = problem
    found = closed_form_mro(replicas, nodes, slots)
    if found is not None:
        assert (
            found
            == count_recoverable(mro(replicas, nodes, slots))
            == count_recoverable(mro_paper(replicas, nodes, slots))
        )


def test_closed_form_is_inclusion_and_exclusion() -> None:
    sizes, nodes = (2, 3, 3), 10
    expected = [
        sum(
            (-1) ** len(some) * math.comb(nodes - sum(some), k - sum(some)) if sum(some) <= k else 0
            for number in range(4)
            for some in itertools.combinations(sizes, number)
        )
        for k in range(nodes + 1)
    ]
    assert list(closed_form(sizes, nodes)) == expected


def test_counting_says_when_it_is_too_much() -> None:
    rng = random.Random(3)
    masks = [sum(1 << node for node in rng.sample(range(60), 3)) for _ in range(80)]
    with pytest.raises(TooManyStatesError, match="states"):
        count_sets(masks, 60, max_states=50)


def test_an_expert_without_a_copy_never_survives() -> None:
    assert count_recoverable(Placement(2, ((0,), (0,)))) == (0, 0, 0)


# ------------------------------------------------------------------------------------- failure domains


def best_order(placement: Placement, domains: tuple[int, ...]) -> tuple[int, ...]:
    return max(
        count_recoverable_domains(Placement(placement.num_experts, order), domains)
        for order in set(itertools.permutations(placement.slots))
    )


@pytest.mark.parametrize("domains", [(0, 0, 1, 1, 2, 2), (0, 1, 2, 2, 2, 2), (0, 0, 0, 1, 1, 1), (0, 1, 1, 2, 2, 3)])
@pytest.mark.parametrize(
    ("replicas", "slots"), [((2, 2, 4, 4), 2), ((2, 3, 3, 4, 6), 3), ((2, 2, 2, 2, 2, 2), 2), ((2, 4, 6), 3)]
)
def test_no_other_order_of_the_nodes_survives_more_racks(
    replicas: tuple[int, ...], slots: int, domains: tuple[int, ...]
) -> None:
    plan = mro(replicas, 6, slots)
    found = spread_over_domains(plan, domains)
    assert sorted(found.slots) == sorted(plan.slots)
    assert count_recoverable_domains(found, domains) == best_order(plan, domains)


@settings(deadline=None, max_examples=100)
@given(problem=problems(), data=st.data())
def test_racks_are_counted_as_by_definition(problem: tuple[list[int], int, int], data: st.DataObject) -> None:
    replicas, nodes, slots = problem
    raw = data.draw(st.lists(st.integers(0, 3), min_size=nodes, max_size=nodes))
    domains = [sorted(set(raw)).index(item) for item in raw]
    placement = spread_over_domains(mro(replicas, nodes, slots), domains)
    count = max(domains) + 1
    expected = [0] * (count + 1)
    for size in range(count + 1):
        for failed in itertools.combinations(range(count), size):
            live = {e for node, held in enumerate(placement.slots) if domains[node] not in failed for e in held}
            expected[size] += live == set(range(len(replicas)))
    assert list(count_recoverable_domains(placement, domains)) == expected
    assert count_recoverable(placement) == count_recoverable(mro(replicas, nodes, slots))


def test_domains_of_another_cluster_are_refused() -> None:
    plan = mro([2, 2], 2, 2)
    with pytest.raises(ConfigError, match="3 nodes have a failure domain"):
        spread_over_domains(plan, [0, 1, 2])
    with pytest.raises(ConfigError, match="numbered"):
        count_recoverable_domains(plan, [0, 2])


# ----------------------------------------------------------------------------------------------- ranks


@settings(deadline=None, max_examples=200)
@given(problem=problems(), ranks=st.integers(1, 5))
def test_ranks_share_the_slots_of_their_node(problem: tuple[list[int], int, int], ranks: int) -> None:
    replicas, nodes, slots = problem
    plan = mro(replicas, nodes, slots)
    found = split(plan, ranks)
    assert len(found.slots) == nodes * ranks
    for node, held in enumerate(plan.slots):
        own = found.slots[node * ranks : (node + 1) * ranks]
        assert sorted(expert for experts in own for expert in experts) == list(held)
    assert max(map(len, found.slots)) <= -(-max(map(len, plan.slots)) // ranks)


def test_slots_of_one_expert_stay_on_one_rank() -> None:
    assert split(Placement(4, ((0, 0, 0, 0, 1, 1, 2, 3),)), 4).slots == ((0, 0), (0, 0), (1, 1), (2, 3))
    assert split(Placement(3, ((0, 0, 0, 1, 1, 2),)), 2).slots == ((0, 0, 0), (1, 1, 2))
    with pytest.raises(ConfigError, match="2 ranks of 2 slots do not hold the 6 slots"):
        split(Placement(3, ((0, 0, 0, 1, 1, 2),)), 2, slots_per_rank=2)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize(
    ("replicas", "nodes", "slots", "message"),
    [
        ([2, 0, 1], 2, 2, r"expert 1 is to have 0 replicas\n.*MoE layer 7"),
        ([2, 1.5], 2, 2, r"expert 1 is to have 1\.5 replicas"),
        ([2, 2, 1], 2, 2, r"5 replicas are to be placed: expert 2 does not fit\n.*MoE layer 7"),
        ([], 2, 2, "no experts"),
        ([1], 0, 2, "nodes is 0"),
        ([1], 1, 0, "slots is 0"),
    ],
)
def test_what_cannot_be_placed_is_refused(name: str, replicas: list[int], nodes: int, slots: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLACEMENTS[name](replicas, nodes, slots, layer=7)
