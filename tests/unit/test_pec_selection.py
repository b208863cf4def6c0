"""Selectors: every expert in time, whatever the ownership, K, and changes of both."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError, FormatError
from moc_ckpt.pec.k_values import check_k, layer_k
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.rotation import Rotation, advance
from moc_ckpt.pec.selection import Held, choose_persist, fill, load_aware
from moc_ckpt.pec.selector import SaveHistory, select


@st.composite
def ownerships(draw, layers=3, experts=6, world=4):
    counts = draw(st.lists(st.integers(1, experts), min_size=1, max_size=layers))
    world = draw(st.integers(1, world))
    rows = [
        (layer, expert, draw(st.integers(0, world - 1)), draw(st.integers(1, 50)))
        for layer, count in enumerate(counts)
        for expert in range(count)
        for _ in range(draw(st.integers(1, 2)))
    ]
    return Ownership.from_rows(counts, world, rows, [draw(st.integers(0, 30)) for _ in range(world)])


def cycles(counts, k):
    return [math.ceil(count / each) for count, each in zip(counts, k, strict=True)]


@given(st.data())
@settings(deadline=None)
def test_rotation_takes_every_expert_once_per_cycle(data):
    ownership = data.draw(ownerships())
    k = [data.draw(st.integers(1, count)) for count in ownership.experts]
    rotation = Rotation()
    seen = [[] for _ in ownership.experts]
    for _ in range(2 * max(cycles(ownership.experts, k)) + 1):
        selected, rotation = advance(rotation, ownership, k)
        again, same = advance(Rotation(), ownership, k) if rotation.turns == 1 else (selected, rotation)
        assert (again, same) == (selected, rotation)  # a pure function of its arguments
        for layer, experts in enumerate(selected):
            assert 1 <= len(experts) <= k[layer]
            assert list(experts) == sorted(set(experts))
            seen[layer].append(experts)
        assert Rotation.from_data(rotation.to_data(), ownership.experts) == rotation
    for layer, (count, cycle) in enumerate(zip(ownership.experts, cycles(ownership.experts, k), strict=True)):
        for start in range(len(seen[layer]) - cycle + 1):
            window = [expert for experts in seen[layer][start : start + cycle] for expert in experts]
            assert sorted(window) == list(range(count))


@given(st.data())
@settings(deadline=None)
def test_changes_in_mid_cycle_skip_nobody(data):
    ownership = data.draw(ownerships())
    counts = ownership.experts
    rotation, waited = Rotation(), [[0] * count for count in counts]
    slowest = [0] * len(counts)
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):  # another world: other ranks own the same experts
            rows = [(layer, e, (layer + e) % 3, 7) for layer, count in enumerate(counts) for e in range(count)]
            ownership = Ownership.from_rows(counts, 3, rows)
        k = [data.draw(st.integers(1, count)) for count in counts]
        slowest = [max(old, cycle) for old, cycle in zip(slowest, cycles(counts, k), strict=True)]
        for _ in range(data.draw(st.integers(1, 4))):
            selected, rotation = advance(rotation, ownership, k)
            for layer, experts in enumerate(selected):
                waited[layer] = [0 if e in experts else n + 1 for e, n in enumerate(waited[layer])]
                # The rest of an old cycle and the next one: never more than two of the longest cycles so far.
                assert max(waited[layer]) < 2 * slowest[layer]


def test_k_of_all_takes_all_in_mid_cycle():
    ownership = Ownership.from_rows((4, 8), 1, [(layer, e, 0, 1) for layer, n in enumerate((4, 8)) for e in range(n)])
    _, rotation = advance(Rotation(), ownership, (1, 1))
    selected, rotation = advance(rotation, ownership, (4, 5))
    assert selected[0] == (0, 1, 2, 3)
    assert len(selected[1]) <= 5


def test_balanced_where_windows_side_by_side_are_not():
    """Two layers on two ranks: taking experts 0, 1 of both at once would leave rank 1 idle."""
    rows = [(layer, expert, expert // 2, 10) for layer in range(2) for expert in range(4)]
    ownership = Ownership.from_rows((4, 4), 2, rows)
    rotation = Rotation()
    for _ in range(4):
        selected, rotation = advance(rotation, ownership, (2, 2))
        units = [4 * layer + expert for layer, experts in enumerate(selected) for expert in experts]
        assert ownership.loads(units).tolist() == [20, 20]


@pytest.mark.parametrize(
    "change",
    [
        {"ahead": [[[0, 9]]]},
        {"ahead": [[[0], [0]]]},
        {"ahead": [[[0]], [[1]]]},
        {"k": None},
        {"turns": "x"},
    ],
)
def test_damaged_rotations_are_refused(change):
    data = Rotation((1,), "d", 1, (((1,), (2,)),)).to_data()
    with pytest.raises(FormatError):
        Rotation.from_data({**data, **change}, (4,))


@given(st.data())
@settings(deadline=None)
def test_load_aware_bounds_every_wait(data):
    experts = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, experts))
    cycle = math.ceil(experts / k)
    rates = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)))
    unsaved, ages = np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    for _ in range(5 * cycle):
        unsaved += rates
        (selected,) = load_aware([unsaved], [ages], [k])
        assert len(selected) == k
        ages += 1
        ages[list(selected)] = 0
        unsaved[list(selected)] = 0
        assert ages.max() < 2 * cycle


def test_load_aware_takes_the_most_unsaved_tokens():
    unsaved = np.array([5, 100, 7, 50, 0, 1])
    (selected,) = load_aware([unsaved], [np.zeros(6, dtype=np.int64)], [2])
    assert selected == (1, 3)
    hot = np.array([1000, 0, 0, 0])
    picks, ages, unsaved = [], np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64)
    for _ in range(16):
        unsaved += hot
        (selected,) = load_aware([unsaved], [ages], [1])
        ages += 1
        ages[list(selected)] = 0
        unsaved[list(selected)] = 0
        picks += selected
    assert picks.count(0) > picks.count(1) == picks.count(2) == picks.count(3) > 0  # busier more often, nobody never


def test_load_aware_spreads_equal_loads_over_ranks():
    zeros = [np.zeros(4, dtype=np.int64)] * 4
    assert load_aware(zeros, zeros, [1] * 4) == ((0,), (1,), (2,), (3,))


@given(st.data())
@settings(deadline=None)
def test_fill_costs_no_time_and_leaves_no_room_unused(data):
    ownership = data.draw(ownerships())
    total = ownership.offsets[-1]
    chosen = data.draw(st.sets(st.integers(0, total - 1)))
    order = data.draw(st.permutations(range(total)))
    found = fill(ownership, chosen, order)
    before, after = ownership.loads(chosen), ownership.loads(found)
    assert chosen <= set(found) and list(found) == sorted(set(found))
    assert after.max() == before.max()
    for unit in set(range(total)) - set(found):
        assert ownership.loads([*found, unit]).max() > before.max()
    added = [unit for unit in order if unit in set(found) - chosen]
    if added:  # the first that fits in the given order comes first
        fits = [u for u in order if u not in chosen and ownership.loads([*chosen, u]).max() <= before.max()]
        assert added[0] == fits[0]


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), st.booleans()), min_size=1, max_size=8
    ),
    st.integers(1, 8),
)
def test_persist_takes_the_stalest_and_what_storage_lacks(items, k):
    layer = [Held(expert, *item) for expert, item in enumerate(items)]
    found = choose_persist(layer, k)
    possible = {
        item.expert
        for item in layer
        if item.held_step is not None and (item.stored_step is None or item.held_step > item.stored_step)
    }
    absent = {item.expert for item in layer if item.expert in possible and item.stored_step is None}
    assert absent <= set(found) <= possible
    assert len(found) == min(max(k, len(absent)), len(possible))
    left = [item for item in layer if item.expert in possible - set(found)]
    taken = [item for item in layer if item.expert in set(found) - absent]
    for out in left:
        for item in taken:
            assert (not item.failed, item.stored_step) <= (not out.failed, out.stored_step)


def test_every_expert_is_persisted_within_its_cycle_from_memory():
    """K_snapshot 4, K_persist 2 of 8 experts: memory is refreshed by a rotation, storage by staleness."""
    stored = dict.fromkeys(range(8), 0)
    held = dict.fromkeys(range(8), 0)
    waited = dict.fromkeys(range(8), 0)
    for step in range(1, 40):
        for expert in range((step % 2) * 4, (step % 2) * 4 + 4):
            held[expert] = step
        for expert in choose_persist([Held(e, stored[e], held[e]) for e in range(8)], 2):
            stored[expert], waited[expert] = held[expert], -1
        waited = {expert: count + 1 for expert, count in waited.items()}
        assert max(waited.values()) <= 4


def test_select_counts_and_forces():
    ownership = Ownership.from_rows((4,), 1, [(0, e, 0, 1) for e in range(4)])
    history, learnt = SaveHistory.start((4,)), Ledger.start((4,), (1,)).add([[5, 6, 7, 8]], [26])
    first = select(history, learnt, ownership, "sequential", (1,), {(0, e) for e in range(4)})
    assert first.experts == ((0, 1, 2, 3),)
    assert first.after.rotation == Rotation()  # everybody is fresh: the rotation has not moved
    second = select(first.after, learnt, ownership, "sequential", (1,), {(0, 3)})
    assert set(second.experts[0]) == {3} | set(advance(Rotation(), ownership, (1,))[0][0])
    assert second.after.ages[0].tolist() == [0 if e in second.experts[0] else 1 for e in range(4)]
    assert select(second.after, learnt, ownership, "full", (1,)).experts == ((0, 1, 2, 3),)
    data = second.after.to_data()
    back = SaveHistory.from_data(data, (4,))
    assert back.to_data() == data
    for broken in (
        {**data, "ages": [[1, 2]]},
        {**data, "saved": None},
        {**data, "marks": [[1, 2]]},
        {"ages": [], "saved": []},
    ):
        with pytest.raises(FormatError):
            SaveHistory.from_data(broken, (4,))


def test_interval_is_the_mean_distance_of_the_directory():
    """A save every 1000 tokens and a best model 10 tokens later: a cycle of n saves is n / 2 times 1000 tokens long."""
    ownership = Ownership.from_rows((4,), 1, [(0, e, 0, 1) for e in range(4)])
    history, ledger = SaveHistory.start((4,)), Ledger.start((4,), (1,))
    assert history.interval == (0.0,)
    for number in range(41):
        ledger = ledger.add([[10 if number % 2 else 990, 0, 0, 0]], [10 if number % 2 else 990])
        history = select(history, ledger, ownership, "sequential", (1,)).after
        assert select(history, ledger, ownership, "sequential", (1,)).after.marks == history.marks
    assert history.interval == (500.0,)


def test_k_of_each_layer():
    assert layer_k(3, (2, 4, 8)) == (2, 3, 3)
    assert layer_k("auto", (2, 4, 8)) == (2, 4, 8)
    assert layer_k("auto", (2, 4, 8), most=3) == (2, 3, 3)
    assert layer_k(1, (2, 4, 8), floor=4) == (2, 4, 4)
    check_k(8, "auto", (2, 8, 4), where="here")
    with pytest.raises(ConfigError, match=r"k_persist is 9, but the largest MoE layer \(layer 1\) has 8 experts"):
        check_k("auto", 9, (2, 8, 4), where="here")
