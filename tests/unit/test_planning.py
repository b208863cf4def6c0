"""Sharding and save plans."""

import random
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.plan.save_plan import DENSE, EXPERTS, plan_save
from moc_ckpt.plan.sharding import Replicated, assign_writers
from moc_ckpt.state.fragment import Fragment, TensorKey


def item(number, nbytes, holders):
    return Replicated(TensorKey(f"t{number}", "weight"), nbytes, holders)


SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 3), st.lists(st.integers(0, 60), min_size=3, max_size=3), st.randoms())
def test_every_tensor_has_one_of_its_holders_whatever_the_order(sizes, world, loads, rng):
    holders = tuple(range(world))
    items = [item(i, size, holders) for i, size in enumerate(sizes)]
    load = dict(enumerate(loads[:world]))
    writers = assign_writers(items, load)
    assert set(writers) == {entry.key for entry in items}
    assert set(writers.values()) <= set(holders)
    shuffled = list(items)
    rng.shuffle(shuffled)
    assert assign_writers(shuffled, load) == writers


@given(SIZES, st.integers(1, 3))
def test_within_greedy_bound_of_the_optimum(sizes, world):
    items = [item(i, size, tuple(range(world))) for i, size in enumerate(sizes)]
    writers = assign_writers(items, {})
    found = max(sum(e.nbytes for e in items if writers[e.key] == rank) for rank in range(world))
    best = min(
        max(sum(size for size, rank in zip(sizes, choice, strict=True) if rank == r) for r in range(world))
        for choice in product(range(world), repeat=len(sizes))
    )
    # Largest first is within 4/3 - 1/(3m) of the optimum (Graham 1969).
    assert 3 * world * found <= (4 * world - 1) * best


def test_different_holder_sets_share_loads():
    items = [item(0, 100, (0, 1)), item(1, 90, (1, 2)), item(2, 80, (0, 1, 2))]
    writers = assign_writers(items, {})
    assert sorted(writers.values()) == [0, 1, 2]


def fragment(name, numel, kind="master"):
    return Fragment(name, kind, "float32", (numel,), 0, numel)


def test_plan_keeps_units_together_and_experts_apart():
    items = [
        (fragment("a", 3), "dense/a"),
        (fragment("e1", 5), "expert/0/1"),
        (fragment("b", 1), "dense/b"),
        (fragment("e0", 2), "expert/0/0"),
        (fragment("a", 3, "exp_avg"), "dense/a"),
        (fragment("e1", 5, "exp_avg"), "expert/0/1"),
    ]
    plan = plan_save(items)
    packs = {pack.name: pack for pack in plan.packs}
    assert [entry.index for entry in packs[DENSE].fragments] == [0, 4, 2]
    assert [entry.index for entry in packs[EXPERTS].fragments] == [3, 1, 5]
    assert plan.nbytes == 4 * (3 + 5 + 1 + 2 + 3 + 5)


@given(st.lists(st.integers(1, 300), max_size=20))
def test_fragments_do_not_overlap(sizes):
    rng = random.Random(0)
    items = [
        (fragment(f"t{i}", size), rng.choice(["dense/x", "dense/y", "expert/0/0"])) for i, size in enumerate(sizes)
    ]
    plan = plan_save(items)
    assert sorted(entry.index for pack in plan.packs for entry in pack.fragments) == list(range(len(items)))
    for pack in plan.packs:
        end = 0
        for entry in pack.fragments:
            assert entry.offset >= end
            assert entry.offset % 64 == 0
            end = entry.offset + entry.fragment.nbytes
        assert end <= pack.nbytes < end + 64


def test_nothing_to_save_gives_no_packs():
    assert plan_save([]).packs == ()
