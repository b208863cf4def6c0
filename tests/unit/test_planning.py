"""Save plans."""

from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.plan.save_plan import DENSE, EXPERTS, lay_out, plan_save
from moc_ckpt.state.fragment import Fragment


def fragment(name, numel, kind="master"):
    return Fragment(name, kind, "float32", (numel,), 0, numel)


def test_plan_keeps_kinds_together_and_experts_apart():
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
    assert [entry.index for entry in packs[DENSE].fragments] == [0, 2, 4]
    assert [entry.index for entry in packs[EXPERTS].fragments] == [3, 1, 5]
    assert [entry.offset for entry in packs[DENSE].fragments] == [0, 64, 128]
    assert [entry.offset for entry in packs[EXPERTS].fragments] == [0, 4096, 4096 + 64]
    assert plan.nbytes == 4 * (3 + 5 + 1 + 2 + 3 + 5)


KINDS = ["exp_avg", "master", "weight", "exp_avg_sq"]
UNITS = ["dense/x", "dense/y", "expert/0/0", "expert/0/1", "expert/10/0", "expert/2/0"]


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(KINDS), st.sampled_from(UNITS)), max_size=30))
def test_places(specs):
    items = [(fragment(f"t{i}", size, kind), unit) for i, (size, kind, unit) in enumerate(specs)]
    plan = plan_save(items)
    assert sorted(entry.index for pack in plan.packs for entry in pack.fragments) == [
        i for i, (_, unit) in enumerate(items) if any(pack.name == unit_pack(unit) for pack in plan.packs)
    ]
    for pack in plan.packs:
        end = 0
        for entry in pack.fragments:
            assert (entry.fragment, entry.unit) == items[entry.index] and unit_pack(entry.unit) == pack.name
            assert end <= entry.offset and entry.offset % 64 == 0
            end = entry.offset + entry.fragment.nbytes
        assert end <= pack.nbytes < end + 64
        # Every slot, and all dense state as one, lies as `lay_out` says; slots begin at pages, in order of the experts.
        units = list(dict.fromkeys("dense" if pack.name == DENSE else entry.unit for entry in pack.fragments))
        assert units == [
            unit for unit in ["dense", "expert/0/0", "expert/0/1", "expert/2/0", "expert/10/0"] if unit in units
        ]
        begin = 0
        for unit in units:
            own = sorted(
                (entry for entry in pack.fragments if unit in ("dense", entry.unit)), key=lambda entry: entry.index
            )
            offsets, nbytes = lay_out([entry.fragment for entry in own])
            assert [entry.offset for entry in own] == [begin + offset for offset in offsets]
            last = begin + nbytes
            begin = -(-last // 4096) * 4096
        assert last == pack.nbytes


def unit_pack(unit):
    return EXPERTS if unit.startswith("expert/") else DENSE


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(KINDS)), max_size=12))
def test_kinds_are_neighbours_and_keep_their_order(specs):
    items = [fragment(f"t{i}", size, kind) for i, (size, kind) in enumerate(specs)]
    offsets, nbytes = lay_out(items)
    assert all(offset % 64 == 0 for offset in offsets) and nbytes % 64 == 0
    order = ["master", "exp_avg", "exp_avg_sq", "weight"]
    expected, end = {}, 0
    for kind in order:
        for i, item in enumerate(items):
            if item.kind == kind:
                expected[i] = end
                end = (end + item.nbytes + 63) // 64 * 64
    assert offsets == [expected[i] for i in range(len(items))] and nbytes == end


def test_nothing_to_save_gives_no_packs():
    assert plan_save([]).packs == ()
