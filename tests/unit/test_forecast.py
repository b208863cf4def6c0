"""Forecasts against counting by hand: intervals of every rank, schedules tried out one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError, MocError
from moc_ckpt.plan import forecast as module
from moc_ckpt.plan.forecast import Setup, contiguous_windows, forecast
from moc_ckpt.plan.models import PRESETS, GptMoe, build_model, tensor_specs
from moc_ckpt.plan.native import native_ownership
from moc_ckpt.plan.sharding import MIN_PIECE_BYTES
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import TensorSpec, ZeroSettings, owned_intervals
from moc_ckpt.state.fragment import itemsize


def small(experts: Sequence[int] = (4, 4), hidden: int = 6) -> GptMoe:
    return build_model(
        num_layers=len(experts),
        hidden_size=hidden,
        seq_length=4,
        num_experts=tuple(experts),
        vocab_size=16,
        make_vocab_size_divisible_by=1,
        expert_interval=1,
    )


def describe(model: GptMoe, ep: int, dtype: str = "bfloat16") -> tuple[tuple[TensorSpec, ...], tuple[int, ...]]:
    return tensor_specs(model, ep, dtype), tuple(layer.num_experts for layer in model.moe_layers)


def by_hand(
    specs: Sequence[TensorSpec], experts: Sequence[int], ep: int, world: int, zero: ZeroSettings
) -> tuple[list[int], dict[tuple[int, int], list[int]]]:
    """(dense bytes by rank, bytes by rank of each expert), from every rank's own intervals; nothing is replicated."""
    places = {spec.fqn: (spec.layer, spec.expert) for spec in specs}
    dense = [0] * world
    owned = {(layer, expert): [0] * world for layer, count in enumerate(experts) for expert in range(count)}
    for rank in range(world):
        for item in owned_intervals(specs, experts, [ep] * len(experts), ParallelLayout(world), zero, rank):
            assert item.holders == (rank,)
            layer, expert = places[item.fqn]
            nbytes = (item.stop - item.start) * itemsize(item.dtype)
            if layer is None or expert is None:
                dense[rank] += nbytes
            else:
                owned[layer, expert][rank] += nbytes
    return dense, owned


def schedules(count: int, k: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to save every expert of a layer once in ceil(count / k) saves of at most k."""
    cycle = -(-count // k)
    for slots in itertools.product(range(cycle), repeat=count):
        if max(slots.count(slot) for slot in range(cycle)) <= k:
            yield tuple(tuple(e for e in range(count) if slots[e] == slot) for slot in range(cycle))


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (6, 2)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_full_checkpoint_by_hand(world: int, ep: int, stage: int) -> None:
    model = small()
    specs, experts = describe(model, ep)
    zero = ZeroSettings(stage)
    dense, owned = by_hand(specs, experts, ep, world, zero)
    loads = [dense[rank] + sum(each[rank] for each in owned.values()) for rank in range(world)]
    found = forecast(specs, experts, Setup(ParallelLayout(world), ep, zero))
    assert found.full_bytes == found.persist.total_bytes == sum(loads) == 12 * model.parameters[0]
    assert found.persist.peaks.tolist() == loads
    assert found.persist.bottleneck_bytes == found.persist.optimum_bytes == max(loads)
    assert found.persist.optimum_proven and found.persist.cycle == 1
    assert found.snapshot is found.persist, "with K = N there is nothing to fill up"


@pytest.mark.parametrize(("world", "ep", "k"), [(2, 2, 1), (4, 2, 1), (4, 2, 2), (4, 4, 3), (3, 1, 2)])
def test_the_optimum_by_trying_all_schedules(world: int, ep: int, k: int) -> None:
    specs, experts = describe(small(), ep)
    zero = ZeroSettings(2)
    dense, owned = by_hand(specs, experts, ep, world, zero)
    best = None
    for first in schedules(experts[0], k):
        for second in schedules(experts[1], k):
            worst = max(
                dense[rank] + sum(owned[0, e][rank] for e in one) + sum(owned[1, e][rank] for e in two)
                for one, two in zip(first, second, strict=True)
                for rank in range(world)
            )
            best = worst if best is None else min(best, worst)
    save = forecast(specs, experts, Setup(ParallelLayout(world), ep, zero, k_snapshot=k, fill=False)).persist
    assert save.bottleneck_bytes == best
    assert save.optimum_bytes == best or not save.optimum_proven
    assert save.optimum_bytes <= best  # type: ignore[operator]
    assert save.cycle == -(-4 // k)
    everything = sum(sum(each) for each in owned.values())
    assert save.total_bytes == round(sum(dense) + everything / save.cycle)
    assert save.contiguous_bytes >= best  # type: ignore[operator]


def test_layers_of_different_sizes() -> None:
    """K above a layer's number of experts means all of them there; the cycle is that of the largest layer."""
    model = small((2, 4, 8))
    specs, experts = describe(model, 2)
    zero = ZeroSettings(2)
    dense, owned = by_hand(specs, experts, 2, 4, zero)
    save = forecast(specs, experts, Setup(ParallelLayout(4), 2, zero, k_persist=3)).persist
    assert save.k == (2, 3, 3) and save.cycle == 3
    size = [sum(sum(owned[layer, e]) for e in range(count)) for layer, count in enumerate(experts)]
    assert save.total_bytes == round(sum(dense) + size[0] + size[1] / 2 + size[2] / 3)


def test_gpt_350m_16e_meets_the_issue() -> None:
    """K = 1 is at most 16.7 % of DeepSpeed's own checkpoint, and every case of the paper reaches the optimum."""
    model = build_model(**PRESETS["gpt-350m-16e"])
    for world, ep in ((8, 8), (16, 16), (16, 8)):
        specs, experts = describe(model, ep)
        for k in (1, 2, 4, 8, 16):
            setup = Setup(ParallelLayout(world), ep, ZeroSettings(2), k_persist=k, fill=False)
            found = forecast(specs, experts, setup)
            assert found.native_bytes == 14 * model.parameters[0]
            assert found.persist.optimum_proven
            assert found.persist.bottleneck_bytes == found.persist.optimum_bytes
            assert found.persist.baseline_bytes > found.persist.bottleneck_bytes
            total, inside = model.parameters
            assert found.persist.total_bytes == 12 * (total - inside + inside * k // 16)
            if k == 1:
                assert found.persist.total_bytes <= 0.167 * found.native_bytes
            if (world, ep, k) == (16, 8, 4):
                assert found.persist.contiguous_bytes > 1.2 * found.persist.bottleneck_bytes


# --------------------------------------------------------------------------------------- properties


@st.composite
def cases(draw: st.DrawFn) -> tuple[GptMoe, int, Setup, str]:
    ep = draw(st.sampled_from([1, 2, 3]))
    world = ep * draw(st.integers(1, 4))
    experts = draw(st.lists(st.sampled_from([ep * n for n in (1, 2, 4) if ep * n > 1]), min_size=1, max_size=3))
    most = max(experts)
    k_snapshot = draw(st.one_of(st.just("auto"), st.integers(1, most)))
    top = most if k_snapshot == "auto" else k_snapshot
    k_persist = draw(st.one_of(st.just("auto"), st.integers(1, int(top))))
    zero = ZeroSettings(draw(st.sampled_from([0, 1, 2])), save_weights=draw(st.booleans()))
    setup = Setup(
        ParallelLayout(world, draw(st.booleans())),
        ep,
        zero,
        k_snapshot,
        k_persist,
        selection=draw(st.sampled_from(["sequential", "load_aware", "full"])),
        sharding=draw(st.sampled_from(["adaptive", "equal"])),
        fill=draw(st.booleans()),
        interval=draw(st.one_of(st.none(), st.integers(1, 9))),
        total_steps=100,
    )
    return small(experts, draw(st.sampled_from([4, 30]))), ep, setup, draw(st.sampled_from(["bfloat16", "float32"]))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_what_holds_for_every_configuration(case: tuple[GptMoe, int, Setup, str]) -> None:
    model, ep, setup, dtype = case
    specs, experts = describe(model, ep, dtype)
    world = setup.parallel.world
    found = forecast(specs, experts, setup)
    per_parameter = 12 + (itemsize(dtype) if setup.zero.save_weights else 0)
    total, inside = model.parameters
    assert found.full_bytes == per_parameter * total
    for save in (found.persist, found.snapshot):
        assert per_parameter * (total - inside) <= save.total_bytes <= found.full_bytes
        assert save.mean_bytes == pytest.approx(save.total_bytes / world, abs=1)
        assert save.optimum_bytes <= save.bottleneck_bytes <= save.worst_bytes
        assert len(save.peaks) == world and int(save.peaks.max()) == save.bottleneck_bytes
        assert save.cycle == max(-(-n // k) for n, k in zip(experts, save.k, strict=True))
        assert all(1 <= k <= n for n, k in zip(experts, save.k, strict=True))
        if save.k == experts:
            assert save.total_bytes == found.full_bytes
        if setup.selection != "load_aware":
            # The most loaded save is at least the mean one.
            assert world * save.bottleneck_bytes >= save.total_bytes - 1
        if setup.interval is None:
            assert save.expected_plt is None
        else:
            cycles = [-(-n // k) for n, k in zip(experts, save.k, strict=True)]
            stale = sum((cycle - 1) / 2 for cycle in cycles) / len(cycles)
            assert save.expected_plt == pytest.approx(stale * setup.interval / 100)
    assert all(p <= s for p, s in zip(found.persist.k, found.snapshot.k, strict=True))
    assert found.persist.total_bytes <= found.snapshot.total_bytes
    if setup.selection == "full":
        assert found.persist.k == experts
    if found.persist.k != experts and setup.selection == "sequential":
        cycles = [-(-n // k) for n, k in zip(experts, found.persist.k, strict=True)]
        each = per_parameter * inside // sum(experts)
        expected = per_parameter * (total - inside) + sum(each * n / c for n, c in zip(experts, cycles, strict=True))
        assert found.persist.total_bytes == round(expected)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_filling_up_costs_no_time(case: tuple[GptMoe, int, Setup, str]) -> None:
    model, ep, setup, dtype = case
    specs, experts = describe(model, ep, dtype)
    fields = {name: getattr(setup, name) for name in Setup.__dataclass_fields__}
    plain = forecast(specs, experts, Setup(**{**fields, "fill": False})).snapshot
    filled = forecast(specs, experts, Setup(**{**fields, "fill": True})).snapshot
    assert filled.total_bytes >= plain.total_bytes
    if setup.zero.stage and not setup.zero.save_weights:
        assert filled.bottleneck_bytes == plain.bottleneck_bytes
    assert np.all(filled.peaks >= plain.peaks)


def test_filling_up_takes_the_stalest_where_there_is_room() -> None:
    """2 ranks, 1 expert each of 3 layers, K 1: rank 1 writes 1 more than rank 0 in the second save, or 0 fills up."""
    model = small((2, 2, 2))
    specs, experts = describe(model, 2)
    zero = ZeroSettings(2)
    dense, owned = by_hand(specs, experts, 2, 2, zero)
    size = max(owned[0, 0])
    assert dense[0] == dense[1]
    setup = Setup(ParallelLayout(2), 2, zero, k_snapshot=1)
    plain = forecast(specs, experts, Setup(ParallelLayout(2), 2, zero, k_snapshot=1, fill=False)).snapshot
    filled = forecast(specs, experts, setup).snapshot
    # 3 experts per save on 2 ranks: one rank has 2, the other 1 and room for one more.
    assert plain.bottleneck_bytes == dense[0] + 2 * size == filled.bottleneck_bytes
    assert plain.total_bytes == sum(dense) + 3 * size
    assert filled.total_bytes == sum(dense) + 4 * size


def test_sampled_steps_are_close_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large world sharding is planned for the steps that promise the most only."""
    model = build_model(
        num_layers=3, hidden_size=128, seq_length=32, num_experts=(4,), vocab_size=2048, expert_interval=1
    )
    specs, experts = describe(model, 4)
    for sharding in ("adaptive", "equal"):
        for zero in (ZeroSettings(0), ZeroSettings(2, save_weights=True)):
            setup = Setup(ParallelLayout(8), 4, zero, k_persist=1, sharding=sharding)  # type: ignore[arg-type]
            exact = forecast(specs, experts, setup).persist
            with monkeypatch.context() as patch:
                patch.setattr(module, "_SHARED_CELLS", 8)
                sampled = forecast(specs, experts, setup).persist
            assert sampled.bottleneck_bytes <= exact.bottleneck_bytes <= sampled.bottleneck_bytes + 2 * MIN_PIECE_BYTES
            assert exact.bottleneck_bytes < exact.total_bytes / 3


def test_expected_plt_is_the_mean_over_layers() -> None:
    specs, experts = describe(small((2, 4, 8)), 2)
    setup = Setup(ParallelLayout(2), 2, ZeroSettings(2), k_persist=3, interval=10, total_steps=1000)
    save = forecast(specs, experts, setup).persist
    # Cycles of 1, 2 and 3 saves: versions are 0, 1/2 and 1 intervals old in the mean.
    assert save.k == (2, 3, 3) and save.expected_plt == pytest.approx((0 + 1 / 2 + 1) / 3 * 10 / 1000)


def test_contiguous_windows() -> None:
    assert contiguous_windows((4, 3), (2, 2), shift=0) == (((0, 1), (2, 3)), ((0, 1), (2,)))
    assert contiguous_windows((4, 4, 4), (2, 2, 2)) == (
        ((0, 1), (2, 3)),
        ((2, 3), (0, 1)),
        ((0, 1), (2, 3)),
    )


def test_a_model_without_experts() -> None:
    model = build_model(num_layers=2, hidden_size=8, seq_length=4, num_experts=(1,), vocab_size=9)
    specs = tensor_specs(model, 1, "bfloat16")
    found = forecast(specs, (), Setup(ParallelLayout(2), 1, ZeroSettings(2), interval=1, total_steps=10))
    assert found.full_bytes == found.persist.total_bytes == 12 * model.parameters[0]
    assert found.native_bytes == 14 * model.parameters[0]
    assert (found.persist.cycle, found.persist.expected_plt) == (1, 0)


# -------------------------------------------------------------------------------------------- native


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("stage", [1, 2])
def test_native_bytes_by_rank_with_zero(stage: int, dtype: str, width: int) -> None:
    model, world, ep = small(), 6, 2
    specs, experts = describe(model, ep, dtype)
    zero = ZeroSettings(stage, save_weights=True)
    dense, owned = by_hand(specs, experts, ep, world, ZeroSettings(stage))
    expected = [dense[rank] + sum(each[rank] for each in owned.values()) for rank in range(world)]
    total, inside = model.parameters
    expected[0] += width * (total - inside)
    for rank in range(ep):  # expert-data-parallel rank 0 of both positions
        expected[rank] += width * inside // 2
    native = native_ownership(specs, experts, ep, ParallelLayout(world), zero)
    assert native.loads(range(8)).tolist() == expected
    assert sum(expected) == (12 + width) * total


def test_native_bytes_by_rank_without_zero() -> None:
    """As measured on 4 ranks with EP 2: ranks 0 and 1 write all they hold, rank 0 once more into the model's file."""
    model, world, ep = small(), 4, 2
    total, inside = model.parameters
    dense = total - inside
    for dtype, width, state in (("bfloat16", 2, 12), ("float32", 4, 8)):
        specs, experts = describe(model, ep, dtype)
        native = native_ownership(specs, experts, ep, ParallelLayout(world), ZeroSettings(0))
        one = state * (dense + inside // 2)
        assert native.loads(range(8)).tolist() == [
            2 * one + width * (dense + inside // 2),
            one + width * inside // 2,
            0,
            0,
        ]
    first = native_ownership(specs, experts, ep, ParallelLayout(world, True), ZeroSettings(0)).loads(range(8))
    assert np.flatnonzero(first).tolist() == [0, 2], "with data before expert parallelism the replicas are neighbours"


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k_snapshot": 9}, ["k_snapshot is 9", "layer 1", "8 experts"]),
        ({"k_persist": 9}, ["k_persist is 9", "layer 1", "8 experts"]),
        ({"k_persist": 0}, ["k_persist is 0", "layer 1", "8 experts"]),
        ({"k_snapshot": -2}, ["k_snapshot is -2"]),
        ({"k_persist": 3, "k_snapshot": 2}, ["k_persist is 3", "k_snapshot 2", "8 experts"]),
        ({"interval": 0}, ["interval is 0"]),
        ({"total_steps": -1}, ["total_steps is -1"]),
        ({"parallel": ParallelLayout(5)}, ["2", "5"]),
        ({"ep": 3, "parallel": ParallelLayout(6)}, ["4 experts of MoE layer 0", "3 expert-parallel"]),
        ({"ep": 8, "parallel": ParallelLayout(8)}, ["4 experts of MoE layer 0", "8 expert-parallel"]),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    model = small((4, 8))
    specs, experts = describe(model, 2)
    arguments = {"parallel": ParallelLayout(4), "ep": 2, "zero": ZeroSettings(2), **changes}
    with pytest.raises(ConfigError) as caught:
        forecast(specs, experts, Setup(**arguments), where="here")
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, MocError)


def test_cycles_that_rarely_meet() -> None:
    """7 x 8 x 9 x 10 x 11 saves until the layers meet again: followed as far as is reasonable, quickly."""
    experts = (7, 8, 9, 10, 11)
    model = small(experts)
    specs, _ = describe(model, 1)
    save = forecast(specs, experts, Setup(ParallelLayout(3), 1, ZeroSettings(2), k_persist=1)).persist
    assert math.lcm(*experts) > 512 and save.cycle == 11
    assert save.optimum_bytes <= save.bottleneck_bytes
    assert int(save.peaks.max()) <= save.bottleneck_bytes
