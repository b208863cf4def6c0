"""Save plans."""

import random

from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.plan.save_plan import DENSE, EXPERTS, plan_save
from moc_ckpt.state.fragment import Fragment


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
