"""Sharding of replicated state: who writes which part of what."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import CoverageError
from moc_ckpt.plan.sharding import (
    CUT_ELEMENTS,
    MIN_PIECE_BYTES,
    Replicated,
    Share,
    plan_shares,
    sharding_lower_bound,
    share_loads,
)
from moc_ckpt.state.fragment import TensorKey
from moc_ckpt.state.unit import EXPERTS_MARK

WORLD = 8
MODES = ["adaptive", "equal"]


def tensor(name: object, numel: int, holders: Iterable[int], itemsize: int = 4) -> Replicated:
    return Replicated(TensorKey(f"{name}", "master"), numel * itemsize, tuple(holders), numel)


# Which holder sets a problem may have. Permuted ranks: groups are rarely neighbours.
SHUFFLED = st.permutations(range(WORLD))
EQUAL = SHUFFLED.map(lambda ranks: [ranks[:5]])
DISJOINT = SHUFFLED.map(lambda ranks: [ranks[:1], ranks[1:3], ranks[3:]])
NESTED = SHUFFLED.map(lambda ranks: [ranks, ranks[:4], ranks[4:], ranks[:2], ranks[6:], ranks[:1]])
OVERLAPPING = st.lists(st.sets(st.integers(0, WORLD - 1), min_size=1), min_size=2, max_size=5)
LAMINAR = st.one_of(EQUAL, DISJOINT, NESTED)
NUMEL = st.one_of(st.sampled_from([0, 1, 63, 64, 65]), st.integers(0, 500), st.integers(1000, 20000))
LOADS = st.one_of(
    st.just([0] * WORLD), st.lists(st.sampled_from([0, 10, 5000, 60000, 61000]), min_size=WORLD, max_size=WORLD)
)
FLOORS = st.sampled_from([1, 300, 2048, 10000])


def problems(sets: st.SearchStrategy[list]) -> st.SearchStrategy[list[Replicated]]:
    def build(families: list) -> st.SearchStrategy[list[Replicated]]:
        holders = st.sampled_from([tuple(sorted(ranks)) for ranks in families])
        names = st.sampled_from(["a", "b", f"moe{EXPERTS_MARK}0", f"moe{EXPERTS_MARK}1", f"moe{EXPERTS_MARK}10"])
        row = st.tuples(names, NUMEL, holders, st.sampled_from([1, 2, 4, 8]))
        return st.lists(row, max_size=12).map(
            lambda rows: [tensor(f"{row[0]}.t{number}", *row[1:]) for number, row in enumerate(rows)]
        )

    return sets.flatmap(build)


def floor_bytes(item: Replicated, floor: int) -> int:
    """Returns the smallest piece of a cut tensor: the floor in whole multiples of the cut unit."""
    grain = item.nbytes // item.numel * CUT_ELEMENTS
    return -(-floor // grain) * grain


def max_load(shares: Mapping, items: Sequence[Replicated], loads: Sequence[int]) -> int:
    total = list(loads)
    for item in items:
        for share in shares[item.key]:
            total[share.writer] += (share.stop - share.start) * (item.nbytes // item.numel)
    return max(total)


def greedy_max(items: Sequence[Replicated], loads: Sequence[int]) -> int:
    total = list(loads)
    for item in sorted(items, key=lambda item: (-item.nbytes, item.key)):
        total[min(item.holders, key=lambda rank: (total[rank], rank))] += item.nbytes
    return max(total)


def fractional_optimum(items: Sequence[Replicated], loads: Sequence[int]) -> int:
    """Returns the least possible highest load if bytes could be placed one by one.

    By max-flow min-cut: some set of ranks cannot pass on what only they hold, and their mean load decides.
    """
    best = 0
    for size in range(1, len(loads) + 1):
        for ranks in combinations(range(len(loads)), size):
            held = sum(item.nbytes for item in items if set(item.holders) <= set(ranks))
            best = max(best, -(-(held + sum(loads[rank] for rank in ranks)) // size) if held else 0)
    return max(best, *loads)


@given(problems(st.one_of(LAMINAR, OVERLAPPING)), LOADS, FLOORS, st.sampled_from(MODES), st.randoms())
def test_every_element_is_written_once_by_a_holder(items, loads, floor, mode, rng) -> None:
    shares = plan_shares(items, loads, mode=mode, min_piece_bytes=floor)
    assert set(shares) == {item.key for item in items}
    for item in items:
        parts = shares[item.key]
        assert [start for start, _, _ in parts] == [0, *(stop for _, stop, _ in parts)][: len(parts)]
        assert all(start < stop for start, stop, _ in parts)
        assert (parts[-1].stop if parts else 0) == item.numel
        assert all(part.start % CUT_ELEMENTS == 0 for part in parts)
        writers = [part.writer for part in parts]
        assert set(writers) <= set(item.holders)
        assert len(set(writers)) == len(writers), "a rank needs no second piece of a tensor"
        if len(parts) > 1:
            itemsize = item.nbytes // item.numel
            assert min(stop - start for start, stop, _ in parts) * itemsize >= floor
    shuffled = list(items)
    rng.shuffle(shuffled)
    assert plan_shares(shuffled, loads, mode=mode, min_piece_bytes=floor) == shares
    mapping = {rank: load for rank, load in enumerate(loads) if load}
    assert plan_shares(shuffled, mapping, mode=mode, min_piece_bytes=floor) == shares


@given(problems(LAMINAR), LOADS, FLOORS)
def test_adaptive_is_within_two_pieces_of_the_optimum(items, loads, floor) -> None:
    bound = sharding_lower_bound(items, loads)
    assert bound == fractional_optimum(items, loads)
    found = max_load(plan_shares(items, loads, mode="adaptive", min_piece_bytes=floor), items, loads)
    # Never two floors: a tensor of that size or more is cut.
    slack = max((min(item.nbytes, 2 * floor_bytes(item, floor)) - 1 for item in items if item.nbytes), default=0)
    assert bound <= found <= bound + slack


@given(problems(st.one_of(LAMINAR, OVERLAPPING)), LOADS, FLOORS)
def test_adaptive_cuts_only_to_beat_whole_tensors(items, loads, floor) -> None:
    shares = plan_shares(items, loads, mode="adaptive", min_piece_bytes=floor)
    found, whole = max_load(shares, items, loads), greedy_max(items, loads)
    assert found <= whole
    assert found < whole or all(len(parts) <= 1 for parts in shares.values())
    assert sharding_lower_bound(items, loads) <= fractional_optimum(items, loads) <= found


@given(problems(st.one_of(LAMINAR, OVERLAPPING)), LOADS, FLOORS)
def test_equal_ignores_loads_and_is_even_in_each_set(items, loads, floor) -> None:
    shares = plan_shares(items, loads, mode="equal", min_piece_bytes=floor)
    assert plan_shares(items, {}, mode="equal", min_piece_bytes=floor) == shares
    for holders in {item.holders for item in items}:
        mine = [item for item in items if item.holders == holders]
        written = share_loads({item.key: shares[item.key] for item in mine}, mine, WORLD)[list(holders)]
        granule = max((min(item.nbytes, 2 * floor_bytes(item, floor)) for item in mine if item.nbytes), default=0)
        assert int(written.max() - written.min()) <= 2 * granule + 1


@given(problems(LAMINAR), FLOORS)
def test_equal_gives_each_rank_a_run_of_neighbours(items, floor) -> None:
    items = [item for item in items if EXPERTS_MARK not in item.key.fqn]
    shares = plan_shares(items, {}, mode="equal", min_piece_bytes=floor)
    for holders in {item.holders for item in items}:
        mine = sorted((item for item in items if item.holders == holders), key=lambda item: item.key)
        writers = [share.writer for item in mine for share in shares[item.key]]
        assert writers == sorted(writers)
        total = sum(item.nbytes for item in mine)
        written = share_loads({item.key: shares[item.key] for item in mine}, mine, WORLD)[list(holders)]
        granule = max((min(item.nbytes, 2 * floor_bytes(item, floor)) for item in mine if item.nbytes), default=0)
        assert max(abs(float(n) - total / len(holders)) for n in written) <= granule + 1


@given(st.integers(2, 12), st.integers(1, 4000), st.sampled_from([1, 2, 4]), st.integers(0, 63))
def test_equal_splits_one_large_tensor_to_one_cut_unit(ranks, units, itemsize, rest) -> None:
    item = tensor("t", (units + 10 * ranks) * CUT_ELEMENTS + rest, range(ranks), itemsize)
    shares = plan_shares([item], {}, mode="equal", min_piece_bytes=4 * CUT_ELEMENTS * itemsize)
    written = share_loads(shares, [item], ranks)
    # The last rank has the odd end besides.
    assert written.max() - written.min() <= CUT_ELEMENTS * itemsize * (2 if rest else 1)


def test_equal_splits_every_expert_over_its_replicas() -> None:
    numel = 1 << 20
    items = [
        tensor(f"l{layer}.moe{EXPERTS_MARK}{expert}.{name}", numel, (expert % 4, expert % 4 + 4))
        for layer, expert, name in product(range(3), range(8), ("fc1", "fc2"))
    ]
    shares = plan_shares(items, {}, mode="equal")
    for first, second in zip(items[::2], items[1::2], strict=True):
        expert = {key: shares[key] for key in (first.key, second.key)}
        assert sorted(share_loads(expert, items, 8))[-2:] == [first.nbytes, first.nbytes]


def test_equal_small_experts_take_turns() -> None:
    # None can be cut: whole experts, but not all to the same replica.
    items = [tensor(f"moe{EXPERTS_MARK}{expert}.fc", 100, range(4)) for expert in range(16)]
    assert share_loads(plan_shares(items, {}, mode="equal"), items, 4).tolist() == [1600] * 4


def placements(units: Sequence[tuple[int, tuple[int, ...]]], loads: Sequence[int]) -> int:
    """Returns the least highest load over all ways to give each unit to one of its holders."""
    found = {tuple(loads)}
    for size, holders in units:
        found = {
            tuple(load + size * (rank == r) for r, load in enumerate(state)) for state in found for rank in holders
        }
    return min(max(state) for state in found)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([(0, 1, 2), (0, 1), (2,)])), min_size=1, max_size=4),
    st.lists(st.integers(0, 6), min_size=3, max_size=3),
)
def test_adaptive_beside_every_way_to_cut(sizes, load_units) -> None:
    items = [tensor(number, units * CUT_ELEMENTS, holders, 1) for number, (units, holders) in enumerate(sizes)]
    loads = [units * CUT_ELEMENTS for units in load_units]
    best = placements([(CUT_ELEMENTS, holders) for units, holders in sizes for _ in range(units)], loads)
    shares = plan_shares(items, loads, mode="adaptive", min_piece_bytes=1)
    assert sharding_lower_bound(items, loads) <= best <= max_load(shares, items, loads) < best + 2 * CUT_ELEMENTS


@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([(0, 1, 2), (0, 1), (1, 2), (0, 2), (1,)])), max_size=5),
    st.lists(st.integers(0, 60), min_size=3, max_size=3),
)
def test_lower_bound_holds_for_overlapping_sets(sizes, loads) -> None:
    items = [tensor(number, size, holders, 1) for number, (size, holders) in enumerate(sizes)]
    assert sharding_lower_bound(items, loads) <= fractional_optimum(items, loads)
    assert sharding_lower_bound(items, loads) <= placements([(item.nbytes, item.holders) for item in items], loads)


def test_lower_bound_sees_that_overlapping_sets_share_ranks() -> None:
    items = [tensor(0, 90, (0, 1), 1), tensor(1, 90, (1, 2), 1), tensor(2, 90, (0, 2), 1)]
    assert sharding_lower_bound(items, {}) == 90
    assert sharding_lower_bound(items, {3: 1000}) == 1000
    assert sharding_lower_bound([], {}) == 0


def test_experts_first_then_dense_state_fills_up() -> None:
    """Stage 0, world 16, EP 8: one expert of each of 12 layers over 2 replicas, dense state over all."""
    world, layers = 16, 12
    experts = [
        Replicated(
            TensorKey(f"l{layer}.moe{EXPERTS_MARK}{layer}.{name}", kind), 4 * numel, (layer % 8, layer % 8 + 8), numel
        )
        for layer, kind in product(range(layers), ("master", "exp_avg", "exp_avg_sq"))
        for name, numel in (("fc1.weight", 1 << 22), ("fc1.bias", 4096), ("fc2.weight", 1 << 22), ("fc2.bias", 1024))
    ]
    dense = [
        tensor(f"d{number}", numel, range(world))
        for number, numel in enumerate([50304 * 1024, 2048 * 1024] + [3 << 20, 1 << 20, 4 << 22, 1024] * 24)
    ]
    items = [*experts, *dense]
    mean = sum(item.nbytes for item in items) / world
    bound = sharding_lower_bound(items, {})
    assert bound == int(np.ceil(mean)), "the most loaded expert group is below the mean, so all can be even"
    shares = plan_shares(items, {}, mode="adaptive")
    found = share_loads(shares, items, world)
    assert found.max() < bound + 2 * MIN_PIECE_BYTES
    assert found.min() > mean - world * 2 * MIN_PIECE_BYTES
    assert greedy_max(items, [0] * world) > 1.05 * mean
    assert sum(len(parts) for parts in shares.values()) <= len(items) + world + 8
    # Four groups write two experts and four write one: equal sharding cannot even that out.
    equal = share_loads(plan_shares(items, {}, mode="equal"), items, world)
    uneven = 3 * 4 * ((2 << 22) + 4096 + 1024) / 2
    assert abs(int(equal.max() - equal.min()) - uneven) <= 4 * MIN_PIECE_BYTES


def test_loads_are_filled_up() -> None:
    loads = [0, 16 << 20, 10 << 20, 17 << 20]
    item = tensor("t", 5 << 20, range(4))
    shares = plan_shares([item], loads, mode="adaptive")
    assert share_loads(shares, [item], 4).tolist() == [15 << 20, 0, 5 << 20, 0]
    assert plan_shares([item], np.array(loads), mode="adaptive") == shares
    # Nothing is gained by cutting once another rank writes more anyway.
    assert plan_shares([item], [*loads[:3], 90 << 20], mode="adaptive")[item.key] == (Share(0, item.numel, 0),)


def test_pieces_that_meet_on_one_rank_are_joined() -> None:
    # Rank 1 is filled; of the 128 bytes left, rank 2 takes 64, and is still the least loaded for the last 64.
    item = tensor("t", 320, range(3), 1)
    shares = plan_shares([item], [345, 187, 278], mode="adaptive", min_piece_bytes=1)
    assert shares[item.key] == (Share(0, 192, 1), Share(192, 320, 2))


def test_subsets_are_not_cut_to_stand_below_what_all_must_reach() -> None:
    expert, dense = tensor("e", 10 << 20, (0, 1)), tensor("d", 400 << 20, range(4))
    shares = plan_shares([expert, dense], {}, mode="adaptive")
    assert len(shares[expert.key]) == 1
    assert len(shares[dense.key]) == 4


def test_small_tensors_stay_whole() -> None:
    item = tensor("t", 2 * MIN_PIECE_BYTES // 4 - 1, range(8))
    for mode in ("adaptive", "equal"):
        assert len(plan_shares([item], {}, mode=mode)[item.key]) == 1
    larger = tensor("t", 2 * MIN_PIECE_BYTES // 4, range(8))
    assert [part.stop - part.start for part in plan_shares([larger], {}, mode="adaptive")[larger.key]] == [16384] * 2


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_ranks(mode) -> None:
    rng = random.Random(0)
    world = tuple(range(10_000))
    items = [tensor(f"d{number}", rng.choice([1024, 1 << 20, 1 << 24]), world) for number in range(3000)]
    items += [tensor(f"moe{EXPERTS_MARK}{rank}.fc", 1 << 20, (rank, rank + 5000)) for rank in range(5000)]
    loads = {rank: rng.randrange(1 << 24) for rank in world} if mode == "adaptive" else {}
    begin = time.process_time()
    shares = plan_shares(items, loads, mode=mode)
    bound = sharding_lower_bound(items, loads)
    found = share_loads(shares, items, len(world))
    spent = time.process_time() - begin
    assert found.sum() == sum(item.nbytes for item in items)
    total = found + np.array([loads.get(rank, 0) for rank in world])
    assert bound <= total.max() < bound + 4 * MIN_PIECE_BYTES
    # Anything that loops over ranks for every tensor takes many times as long.
    assert spent < 3, f"{spent:.1f} s of CPU time"


@pytest.mark.parametrize(
    ("items", "loads", "error", "message"),
    [
        ([tensor("t", 4, (0, 1)), tensor("t", 4, (2, 3))], {}, CoverageError, r"t \(master\) is to be shared twice"),
        ([tensor("t", 4, ())], {}, ValueError, "not ascending"),
        ([tensor("t", 4, (1, 0))], {}, ValueError, "not ascending"),
        ([tensor("t", 4, (1, 1))], {}, ValueError, "not ascending"),
        ([tensor("t", 4, (-1, 1))], {}, ValueError, "not ascending"),
        ([tensor("t", -4, (0, 1))], {}, ValueError, "-16 bytes"),
        ([tensor("t", 4, (0, 3))], [0, 0, 0], ValueError, "loads of 3 ranks, but rank 3"),
        ([tensor("t", 4, (0, 1))], [0, -5], ValueError, "rank 1 has a load of -5"),
        ([tensor("t", 4, (0, 1))], {-1: 5}, ValueError, "no rank -1"),
    ],
)
def test_bad_input_is_refused(items, loads, error, message) -> None:
    for call in (lambda: plan_shares(items, loads, mode="equal"), lambda: sharding_lower_bound(items, loads)):
        with pytest.raises(error, match=message):
            call()


def test_bad_sizes_and_options_are_refused() -> None:
    key = TensorKey("t", "master")
    for nbytes, numel in ((16, 0), (0, 4), (15, 4), (16, -4)):
        with pytest.raises(ValueError, match=f"{nbytes} bytes in {numel} elements"):
            plan_shares([Replicated(key, nbytes, (0, 1), numel)], {}, mode="adaptive")
    with pytest.raises(ValueError, match="choose adaptive or equal"):
        plan_shares([], {}, mode="even")
    with pytest.raises(ValueError, match="min_piece_bytes"):
        plan_shares([], {}, mode="equal", min_piece_bytes=0)


def test_share_loads_counts_bytes_and_checks() -> None:
    items = [tensor("a", 100, (0, 2)), tensor("b", 10, (0, 1), 2)]
    shares = {items[0].key: (Share(0, 64, 0), Share(64, 100, 2)), items[1].key: (Share(0, 10, 0),)}
    found = share_loads(shares, items, 4)
    assert found.tolist() == [276, 0, 144, 0]
    assert found.dtype == np.int64
    assert share_loads({}, items, 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match="the world has 2 ranks"):
        share_loads(shares, items, 2)
    with pytest.raises(ValueError, match="not among the items"):
        share_loads(shares, items[:1], 4)
