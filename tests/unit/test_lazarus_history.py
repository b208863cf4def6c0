"""The history of loads, and whether moving to another placement pays."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.domains import count_recoverable_domains
from moc_ckpt.lazarus.evenness import imbalance
from moc_ckpt.lazarus.history import Costs, LoadHistory, layer_seconds, plan_rebalance
from moc_ckpt.lazarus.placement import mro
from moc_ckpt.lazarus.ranks import join, split
from moc_ckpt.lazarus.types import Placement

COSTS = Costs(layer_s=0.01, expert_bytes=1e9, bandwidth=1e10, fixed_s=5)


def test_loads_are_those_of_the_window() -> None:
    history = LoadHistory.start([2, 3], window=2)
    assert history.loads == ((0, 0), (0, 0, 0)) and history.steps == 0
    for step, scale in ((10, 1), (20, 3), (30, 6), (40, 10)):
        history = history.observe(step, [[scale, 2 * scale], [0, scale, scale * scale]])
    assert (history.loads, history.steps) == (((7, 14), (0, 7, 91)), 20)
    assert len(history.samples) == 3


def test_the_first_observation_counts_from_the_beginning() -> None:
    assert LoadHistory.start([2]).observe(5, [[4, 1]]).loads == ((4, 1),)


def test_a_restore_begins_anew() -> None:
    history = LoadHistory.start([2]).observe(10, [[5, 5]]).observe(20, [[9, 9]])
    assert history.observe(15, [[7, 7]]).samples == ((15, ((7, 7),)),)
    assert history.observe(30, [[9, 8]]).loads == ((0, 0),)
    assert history.observe(20, [[9, 10]]).loads == ((9, 10),)  # the same step again replaces


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[3\] experts for layers of \[2\]"):
        LoadHistory.start([2]).observe(1, [[1, 1, 1]])
    with pytest.raises(ConfigError, match="0 observations"):
        LoadHistory.start([2], window=0)


def test_imbalance_is_the_most_loaded_place_over_the_mean() -> None:
    placement = Placement(3, ((0, 0), (0, 1), (1, 2)))
    # Shares per slot: 3, 2, 1; places 6, 5, 3 of 14.
    assert imbalance(placement, [9, 4, 1]) == pytest.approx(6 * 3 / 14)
    assert imbalance(placement, [0, 0, 0]) == 1


def test_a_large_gain_pays_and_a_small_one_does_not() -> None:
    old = [mro([1, 5, 3, 3], 4, 3), mro([3, 3, 3, 3], 4, 3)]
    loads = [[90, 10, 10, 10], [10, 10, 10, 10]]
    found = plan_rebalance(old, loads, slots=3, fault_threshold=1, steps=10_000, costs=COSTS)
    assert found.worth_it
    assert found.allocations[1] is None and found.migration.layers[1].placement == old[1]
    assert found.allocations[0] is not None
    assert found.after[0] < found.before[0] and found.after[1] == found.before[1]
    gain = 0.01 * 10_000 * (found.before[0] - found.after[0])
    busiest = max(*found.migration.sent.values(), *found.migration.received.values())
    assert (found.gain_s, found.cost_s) == (pytest.approx(gain), pytest.approx(busiest * 0.1 + 5))
    assert "rebalance pays" in found.text and "1 of 2 MoE layers" in found.text
    small = plan_rebalance(old, loads, slots=3, fault_threshold=1, steps=10, costs=COSTS)
    assert not small.worth_it and "does not pay" in small.text
    assert small.migration == found.migration
    data = json.loads(json.dumps(found.to_data()))
    assert data["placements"] == [[list(held) for held in item.placement.slots] for item in found.migration.layers]
    assert len(data["transfers"]) == len(found.migration.transfers) > 0


@settings(deadline=None, max_examples=100)
@given(
    layers=st.lists(st.lists(st.integers(0, 1000), min_size=6, max_size=6), min_size=1, max_size=3),
    steps=st.integers(0, 10_000),
)
def test_no_layer_gets_worse(layers: list[list[int]], steps: int) -> None:
    old = [mro([3] * 6, 6, 3)] * len(layers)
    found = plan_rebalance(old, layers, slots=3, fault_threshold=2, steps=steps, costs=COSTS)
    assert all(new <= before for new, before in zip(found.after, found.before, strict=True))
    assert found.worth_it == (found.gain_s > found.cost_s)
    if all(item is None for item in found.allocations):
        assert found.migration.transfers == () and found.cost_s == 0 and not found.worth_it


def test_a_lost_fault_threshold_is_put_right_whatever_it_costs() -> None:
    """Four nodes of two slots: expert 0 is on one node alone, and all places have the same work."""
    old = Placement(4, ((0, 0), (1, 2), (2, 3), (3, 1)))
    loads = [[10, 10, 10, 10]]
    dear = Costs(layer_s=0.0, expert_bytes=1e12, bandwidth=1.0, fixed_s=1e6)
    kept = plan_rebalance([old], loads, slots=2, fault_threshold=1, steps=10, costs=dear)
    assert not kept.worth_it and kept.repaired == () and kept.placements == (old,)
    found = plan_rebalance([old], loads, slots=2, fault_threshold=2, steps=10, costs=dear)
    assert found.worth_it and found.repaired == (0,) and found.gain_s <= 0 < found.cost_s
    assert all(len(found.placements[0].holders(expert)) == 2 for expert in range(4))
    assert "is needed" in found.text and "1 of them below the fault threshold" in found.text
    assert found.to_data()["repaired_layers"] == [0]
    # What the slots do not hold is not asked for again and again.
    again = plan_rebalance(found.placements, loads, slots=2, fault_threshold=3, steps=10, costs=dear)
    assert again.repaired == () and not again.worth_it


def test_a_repair_does_not_take_along_what_does_not_pay() -> None:
    """One layer has lost its threshold; the others would gain next to nothing, and something where steps are long."""
    lost = Placement(4, ((0, 0), (1, 2), (2, 3), (3, 1)))
    uneven = Placement(4, ((0, 1), (0, 1), (2, 3), (2, 3)))
    current, loads = [lost, *[uneven] * 5], [[10] * 4, *[[12, 12, 10, 10]] * 5]
    short = Costs(layer_s=1e-9, expert_bytes=1e9, bandwidth=1e9, fixed_s=5.0)
    found = plan_rebalance(current, loads, slots=2, fault_threshold=2, steps=100, costs=short)
    assert found.worth_it and found.repaired == (0,)
    assert [item is not None for item in found.allocations] == [True, *[False] * 5]
    assert found.placements[1:] == (uneven,) * 5
    assert {item.layer for item in found.migration.transfers} == {0}
    long = Costs(layer_s=10.0, expert_bytes=1e9, bandwidth=1e9, fixed_s=5.0)
    found = plan_rebalance(current, loads, slots=2, fault_threshold=2, steps=100, costs=long)
    assert found.repaired == (0,) and all(item is not None for item in found.allocations)
    assert found.after[1:] == pytest.approx([1.0] * 5)


def test_places_with_different_numbers_of_slots_are_refused() -> None:
    """A plan for as many slots as the fullest place has could not be carried out."""
    odd = Placement(3, ((0, 1, 2), (1,)))
    with pytest.raises(ConfigError, match=r"(?s)places have 1, 3 slots.*MoE layer 0"):
        plan_rebalance([odd], [[5, 1, 1]], slots=None, fault_threshold=1, steps=1, costs=COSTS)


def test_racks_are_kept_apart() -> None:
    racks = (0, 0, 1, 1, 2, 2)
    found = plan_rebalance(
        [mro([3] * 6, 6, 3)],
        [[100, 1, 1, 1, 1, 1]],
        slots=3,
        fault_threshold=2,
        steps=1000,
        costs=COSTS,
        domains=racks,
    )
    assert count_recoverable_domains(found.migration.layers[0].placement, racks)[1] == 3


def test_ranks_of_nodes_get_the_plan() -> None:
    """The plan spreads replicas over nodes; work is compared rank by rank, and only nodes send."""
    old = split(mro([3] * 4, 3, 4), 2)
    kept = split(mro([3] * 4, 3, 4), 2)
    loads = [[90, 10, 10, 10], [5, 5, 5, 5]]
    found = plan_rebalance(
        [old, kept], loads, slots=None, fault_threshold=2, steps=10_000, costs=COSTS, ranks_per_node=2
    )
    first, second = found.placements
    assert second == kept and found.allocations[1] is None
    assert [len(held) for held in first.slots] == [2] * 6
    nodes = [{*first.slots[2 * node], *first.slots[2 * node + 1]} for node in range(3)]
    assert all(sum(expert in node for node in nodes) >= 2 for expert in range(4))
    assert found.before[0] == pytest.approx(imbalance(old, loads[0]))
    assert found.after[0] == pytest.approx(imbalance(first, loads[0])) and found.after[0] < found.before[0]
    olds = [{*old.slots[2 * node], *old.slots[2 * node + 1]} for node in range(3)]
    arrived = {(node, expert) for node in range(3) for expert in nodes[node] - olds[node]}
    assert {(item.destination, item.expert) for item in found.migration.transfers} == arrived
    assert found.to_data()["placements"] == [[list(held) for held in item.slots] for item in (first, kept)]


def test_ranks_are_joined_to_nodes() -> None:
    ranks = Placement(3, ((0, 2), (0, 1), (1, 1), (2, 0)))
    assert join(ranks, 2) == Placement(3, ((0, 0, 1, 2), (0, 1, 1, 2)))
    assert join(ranks, 1) == ranks
    with pytest.raises(ConfigError, match="4 ranks are no whole number of nodes of 3"):
        join(ranks, 3)


def test_seconds_of_a_layer_are_its_share_of_what_a_token_passes() -> None:
    # 600 dense parameters, 100 of each layer's experts; the uneven one takes twice its share: 900 in all.
    assert layer_seconds(9.0, 600, 100, [1.0, 2.0]) == pytest.approx(1.0)
    assert layer_seconds(9.0, 0, 0, [1.0]) == 0.0


@pytest.mark.parametrize(
    ("loads", "costs", "message"),
    [
        ([[1, 1]], COSTS, r"loads of 2 experts for a placement of 3\n.*MoE layer 0"),
        ([], COSTS, "loads of 0 MoE layers for placements of 1"),
        ([[1, 1, 1]], Costs(-1, 1, 1), "costs are negative"),
        ([[1, 1, 1]], Costs(1, 1, 0), "bandwidth is not positive"),
    ],
)
def test_bad_input(loads: list[list[int]], costs: Costs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_rebalance([mro([2, 2, 2], 3, 2)], loads, slots=2, fault_threshold=1, steps=1, costs=costs)
