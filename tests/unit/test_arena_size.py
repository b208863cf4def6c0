from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError
from moc_ckpt.plan.arena_size import apply_budget, arena_need, largest_selection
from moc_ckpt.snapshot.arena_format import ArenaSpec

PAGE = 4096
MIB = 1 << 20
EXPERTS = {f"expert/{layer}/{expert}": 10 * MIB for layer in range(2) for expert in range(8)}


def spec_of(need) -> ArenaSpec:
    return ArenaSpec(dense=need.dense, experts=need.experts, extra=1 << 40, slots=need.slots)


def test_formula_of_the_design() -> None:
    need = arena_need(EXPERTS, 40 * MIB, 7 * MIB)
    assert need.experts == (160 + 2 * 40) * MIB
    assert need.dense == 3 * 7 * MIB
    assert need.total == spec_of(need).reserved
    assert need.total < 1.01 * (need.experts + need.dense)
    assert need.formula == "experts 160.00 MiB (N) + 2 x 40.00 MiB (K), dense 3 x 7.00 MiB: 261.05 MiB"


def test_pins_and_committed_copies_come_on_top() -> None:
    need = arena_need(EXPERTS, 40 * MIB, 7 * MIB, pins_bytes=20 * MIB, pinned_dense=1, keep_committed=True)
    assert need.experts == (2 * 160 + 2 * 40 + 20) * MIB
    assert need.dense == 5 * 7 * MIB
    assert "20.00 MiB (persist) + 160.00 MiB (committed), dense 5 x" in need.formula


def test_a_rank_without_experts_and_one_without_anything() -> None:
    need = arena_need({}, 0, 5)
    assert (need.experts, need.dense) == (0, 3 * PAGE)
    need = arena_need({}, 0, 0)
    assert (need.experts, need.dense, need.total) == (0, 0, spec_of(need).reserved)


@given(
    st.dictionaries(st.integers(0, 40).map("expert/0/{}".format), st.integers(0, 10**6), max_size=12),
    st.integers(0, 10**8),
    st.integers(0, 10**7),
    st.booleans(),
    st.data(),
)
def test_windows_never_count_more_than_everything(sizes, window, dense, keep, data) -> None:
    need = arena_need(sizes, window, dense, pins_bytes=window, keep_committed=keep)
    everything = sum(-(-size // PAGE) * PAGE for size in sizes.values())
    assert need.window_bytes == need.pins_bytes == min(-(-window // PAGE) * PAGE, everything)
    assert need.experts % PAGE == need.dense % PAGE == 0
    assert need.total == spec_of(need).reserved
    copies = 3 + keep
    assert need.slots >= copies * len(sizes) + 2 * copies
    units = data.draw(st.lists(st.sampled_from(sorted(sizes)), unique=True) if sizes else st.just([]))
    assert largest_selection(sizes, [units, []]) == sum(-(-sizes[unit] // PAGE) * PAGE for unit in units)


def test_largest_selection_counts_only_what_the_rank_owns() -> None:
    sizes = {"expert/0/0": 1, "expert/0/1": PAGE + 1, "expert/0/2": 0}
    assert largest_selection(sizes, [["expert/0/0", "expert/9/9"], ["expert/0/1", "expert/0/2"]]) == 2 * PAGE
    assert largest_selection(sizes, []) == 0


@pytest.mark.parametrize("bad", [{"window_bytes": -1}, {"dense_bytes": -1}, {"pins_bytes": -1}, {"pinned_dense": -1}])
def test_negative_sizes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        arena_need(EXPERTS, **{"window_bytes": 0, "dense_bytes": 0} | bad)
    with pytest.raises(ValueError, match="negative"):
        arena_need({"expert/0/0": -1}, 0, 0)


def test_the_budget_gives_up_committed_copies_first() -> None:
    need = arena_need(EXPERTS, 40 * MIB, 7 * MIB, keep_committed=True)
    assert apply_budget(need, None) is need
    assert apply_budget(need, need.total) is need
    least = arena_need(EXPERTS, 40 * MIB, 7 * MIB)
    assert apply_budget(need, need.total - 1) == least
    assert apply_budget(need, least.total) == least
    with pytest.raises(ConfigError, match=r"need 261\.\d\d MiB .* budget is 261\.\d\d MiB") as info:
        apply_budget(need, least.total - 1)
    assert "memory_budget_gib" in info.value.where and least.formula in info.value.where
    assert "k_snapshot" in info.value.fix
