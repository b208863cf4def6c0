"""The pure layout model: by hand, against an element-by-element simulation, and at scale."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError, UnsupportedError
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import (
    ADAM,
    LayoutBytes,
    Owned,
    TensorSpec,
    ZeroSettings,
    owned_bytes,
    owned_intervals,
    split_expert_groups,
)
from moc_ckpt.state.fragment import itemsize

# ---------------------------------------------------------------------------------------------- topology


def test_groups_of_deepspeeds_own_example() -> None:
    """The docstring of `_create_expert_and_data_parallel`: 16 ranks, expert-parallel size 2."""
    near = ParallelLayout(16)
    assert near.expert_replicas(2, 0) == (0, 2, 4, 6, 8, 10, 12, 14)
    assert near.expert_replicas(2, 1) == (1, 3, 5, 7, 9, 11, 13, 15)
    data_first = ParallelLayout(16, data_before_expert=True)
    assert data_first.expert_replicas(2, 1) == tuple(range(8, 16))
    assert data_first.expert_replicas(8, 3) == (6, 7)


@given(st.data(), st.integers(1, 6), st.integers(1, 8), st.booleans())
@settings(deadline=None)
def test_positions_and_replicas_name_each_rank_once(data: Any, ep: int, replicas: int, data_first: bool) -> None:
    parallel = ParallelLayout(ep * replicas, data_first)
    ranks = np.arange(parallel.world)
    position, replica = parallel.expert_position(ep, ranks), parallel.replica_index(ep, ranks)
    assert (parallel.rank_of(ep, position, replica) == ranks).all()
    one = data.draw(st.integers(0, parallel.world - 1))
    assert parallel.expert_position(ep, one) == position[one]
    assert parallel.expert_replicas(ep, int(position[one]))[replica[one]] == one
    assert [parallel.expert_replicas(ep, at) for at in range(ep)] == [
        tuple(ranks[position == at].tolist()) for at in range(ep)
    ]


def test_impossible_topologies_are_refused() -> None:
    with pytest.raises(ConfigError, match="a world of 0 ranks"):
        ParallelLayout(0)
    with pytest.raises(ConfigError, match="size 3 does not divide the world of 8 ranks"):
        ParallelLayout(8).replicas(3)
    with pytest.raises(ConfigError, match="position 2 does not exist"):
        ParallelLayout(8).expert_replicas(2, 2)


# ------------------------------------------------------------------------------------------------ by hand


def _shares(layout: LayoutBytes) -> list[tuple[int, int, int]]:
    owner = layout.ownership
    return list(zip(owner.unit.tolist(), owner.rank.tolist(), owner.nbytes.tolist(), strict=True))


def test_an_example_by_hand() -> None:
    """Four ranks, expert-parallel size 2: ranks 0 and 2 hold experts 0 and 1, ranks 1 and 3 experts 2 and 3."""
    tensors = [
        TensorSpec("a", (5,), 0, dtype="bfloat16"),
        TensorSpec("gain", (3,), None, dtype="bfloat16", frozen=True),
        TensorSpec("b", (2, 3), 0, dtype="bfloat16"),
        *(TensorSpec(f"e{expert}.w", (5,), 1, 0, expert, "bfloat16") for expert in range(4)),
        TensorSpec("e3.seen", (2,), None, 0, 3, "int64", is_buffer=True),
        TensorSpec("e2.gain", (1,), None, 0, 2, "bfloat16", frozen=True),
        TensorSpec("nothing", (0, 4), 0, dtype="bfloat16"),
    ]
    arguments = (tensors, [4], [2], ParallelLayout(4), ZeroSettings(stage=2, kinds=ADAM[:1]))
    # 11 dense elements, padded to 16: 4 per rank. 10 elements of two experts, padded to 12: 6 per rank.
    state = {
        0: [("a", 0, 4), ("e0.w", 0, 5), ("e1.w", 0, 1)],
        1: [("a", 4, 5), ("b", 0, 3), ("e2.w", 0, 5), ("e3.w", 0, 1)],
        2: [("b", 3, 6), ("e1.w", 1, 5)],
        3: [("e3.w", 1, 5)],
    }
    for rank, expected in state.items():
        found = owned_intervals(*arguments, rank)
        masters = [(owned.fqn, owned.start, owned.stop) for owned in found if owned.kind == "master"]
        assert masters == expected
        assert {owned.holders for owned in found if owned.kind == "master"} == {(rank,)}
        weights = [owned for owned in found if owned.kind == "weight"]
        assert weights[0] == Owned("gain", "weight", "bfloat16", 0, 3, (0, 1, 2, 3))
        mine = [Owned("e3.seen", "weight", "int64", 0, 2, (1,)), Owned("e2.gain", "weight", "bfloat16", 0, 1, (1, 3))]
        assert weights[1:] == (mine if rank % 2 else [])

    layout = owned_bytes(tensors, [4], [2], ParallelLayout(4), ZeroSettings(stage=2))  # 12 bytes per element
    assert layout.ownership.dense.tolist() == [48, 48, 36, 0]
    assert _shares(layout) == [(0, 0, 60), (1, 0, 12), (1, 2, 48), (2, 1, 60), (3, 1, 12 + 16), (3, 3, 48)]
    assert layout.holders == ((0, 1, 2, 3), (0, 2), (1, 3))
    assert [tuple(item) for item in layout.replicated] == [
        ("gain", "weight", 6, 0, 3, None, None),
        ("e2.gain", "weight", 2, 2, 1, 0, 2),
    ]
    assert layout.total_bytes == 12 * (11 + 20) + 16 + 6 + 2


def test_order_and_gaps_by_hand() -> None:
    def starts(settings: ZeroSettings, *sizes: int, dtype: str = "bfloat16") -> list[list[tuple[str, int, int]]]:
        tensors = [TensorSpec(f"t{i}", (size,), 0, dtype=dtype) for i, size in enumerate(sizes)]
        both = (owned_intervals(tensors, [], [], ParallelLayout(2), settings, rank) for rank in (0, 1))
        return [[(owned.fqn, owned.start, owned.stop) for owned in found] for found in both]

    one = ZeroSettings(stage=1, kinds=ADAM[:1])
    # Ten elements, padded to 12.
    assert starts(one, 1, 2, 3, 4) == [[("t0", 0, 1), ("t1", 0, 2), ("t2", 0, 3)], [("t3", 0, 4)]]
    # Laid out as t0, t2, t1, t3: even places first.
    dealt = [[("t0", 0, 1), ("t1", 0, 2), ("t2", 0, 3)], [("t3", 0, 4)]]
    assert starts(replace(one, round_robin=True), 1, 2, 3, 4) == dealt
    assert starts(replace(one, round_robin=True), 1, 4, 3, 2) == [
        [("t0", 0, 1), ("t1", 0, 2), ("t2", 0, 3)],
        [("t1", 2, 4), ("t3", 0, 2)],
    ]
    # A parameter without elements takes the second place, if it is counted.
    assert starts(replace(one, round_robin=True, empty_in_groups=True), 1, 0, 3, 2) == [
        [("t0", 0, 1), ("t2", 0, 3)],
        [("t3", 0, 2)],
    ]
    assert starts(replace(one, round_robin=True), 1, 0, 3, 2) == [
        [("t0", 0, 1), ("t2", 0, 1), ("t3", 0, 2)],
        [("t2", 1, 3)],
    ]
    # 16 bytes are 8 elements of 2 bytes or 4 of 4: t1 begins at 8 or 4; 13 or 9 elements make 16 or 12.
    aligned = replace(one, parameter_alignment=True)
    assert starts(aligned, 3, 5) == [[("t0", 0, 3)], [("t1", 0, 5)]]
    assert starts(aligned, 3, 5, dtype="float32") == [[("t0", 0, 3), ("t1", 0, 2)], [("t1", 2, 5)]]
    # BF16_Optimizer knows neither.
    plain = starts(one, 3, 4, 6)
    everything = replace(one, parameter_alignment=True, round_robin=True)
    assert starts(everything, 3, 4, 6) != plain
    assert starts(replace(everything, bf16_optimizer=True), 3, 4, 6) == plain


# --------------------------------------------------------------------------- against a plain simulation


@st.composite
def _models(draw: st.DrawFn) -> tuple[list[TensorSpec], list[int], list[int], ParallelLayout]:
    world = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    divisors = [ep for ep in range(1, world + 1) if world % ep == 0]
    eps = draw(st.lists(st.sampled_from(divisors), max_size=3))
    experts = [ep * draw(st.integers(1, 3)) for ep in eps]
    shapes = st.lists(st.integers(0, 6), max_size=2).map(tuple)
    dtypes = st.sampled_from(["bfloat16", "float32"])
    tensors = []

    def add(name: str, shape: Any, group: int, dtype: str, what: int, *where: int) -> None:
        layer, expert = where or (None, None)
        tensors.append(TensorSpec(name, shape, None if what else group, layer, expert, dtype, what == 9, what == 8))

    whats = st.sampled_from([0] * 8 + [8, 9])  # 8: frozen, 9: a buffer
    for i in range(draw(st.integers(0, 6))):
        add(f"d{i}", draw(shapes), draw(st.integers(0, 1)), draw(dtypes), draw(whats))
    for layer, (count, ep) in enumerate(zip(experts, eps, strict=True)):
        for part in range(draw(st.integers(0, 3))):
            shape, dtype, what = draw(shapes), draw(dtypes), draw(whats)
            group = 10 * ep + draw(st.integers(0, 1))
            for expert in range(count):
                add(f"e{layer}.{expert}.{part}", shape, group, dtype, what, layer, expert)
            if draw(st.booleans()):  # one expert that is not like the others
                odd = tensors.pop(-draw(st.integers(1, count)))
                changes = (
                    {"group": None, "frozen": not odd.is_buffer},
                    {"shape": draw(shapes)},
                    {"dtype": draw(dtypes)},
                )
                tensors.append(replace(odd, **draw(st.sampled_from(changes))))
    tensors = draw(st.permutations(tensors)) if draw(st.booleans()) else tensors
    return list(tensors), experts, eps, ParallelLayout(world, draw(st.booleans()))


_SETTINGS = st.builds(
    ZeroSettings,
    stage=st.sampled_from([0, 1, 2]),
    bf16_optimizer=st.booleans(),
    round_robin=st.booleans(),
    parameter_alignment=st.booleans(),
    kinds=st.sampled_from([ADAM, ADAM[:1], (("master", "float32"), ("exp_avg", "bfloat16"))]),
    group_kinds=st.sampled_from([(), ((0, ADAM[:2]),)]),
    save_weights=st.booleans(),
    empty_in_groups=st.booleans(),
)


def _simulated(
    tensors: list[TensorSpec], experts: list[int], eps: list[int], parallel: ParallelLayout, zero: ZeroSettings
) -> list[Counter[tuple[str, str, int]]]:
    """(fqn, kind, element) on each rank, where that is the only or first holder; with lists, one element at a time."""
    owned: list[Counter[tuple[str, str, int]]] = [Counter() for _ in range(parallel.world)]

    def ranks_of(spec: TensorSpec) -> list[int]:
        if spec.layer is None or spec.expert is None:
            return list(range(parallel.world))
        ep = eps[spec.layer]
        position = spec.expert * ep // experts[spec.layer]
        if parallel.data_before_expert:
            size = parallel.world // ep
            return list(range(position * size, (position + 1) * size))
        return list(range(position, parallel.world, ep))

    flats: dict[tuple[Any, ...], list[TensorSpec]] = {}
    for spec in tensors:
        numel = math.prod(spec.shape)
        first = ranks_of(spec)[0]
        if spec.group is None or zero.save_weights:
            owned[first].update((spec.fqn, "weight", i) for i in range(numel))
        if spec.group is None or not (numel or zero.empty_in_groups):
            continue
        if zero.stage or zero.bf16_optimizer:
            flats.setdefault((spec.group, *ranks_of(spec)), []).append(spec)
        else:
            kinds = dict(zero.group_kinds).get(spec.group, zero.kinds)
            owned[first].update((spec.fqn, kind, i) for kind, _ in kinds for i in range(numel))
    for (group, *ranks), members in flats.items():
        gap = 16 // itemsize(members[0].dtype) if zero.parameter_alignment and not zero.bf16_optimizer else 1
        if zero.round_robin and not zero.bf16_optimizer:
            members = [spec for hand in range(len(ranks)) for spec in members[hand :: len(ranks)]]
        flat: list[tuple[str, int] | None] = []
        for spec in members:
            while len(flat) % gap:
                flat.append(None)
            flat += [(spec.fqn, i) for i in range(math.prod(spec.shape))]
        while len(flat) % (2 * len(ranks)):
            flat.append(None)
        size = len(flat) // len(ranks)
        for place, element in enumerate(flat):
            if element is not None:
                for kind, _ in dict(zero.group_kinds).get(group, zero.kinds):
                    owned[ranks[place // size]][element[0], kind, element[1]] += 1
    return owned


@given(_models(), _SETTINGS)
@settings(deadline=None, max_examples=300)
def test_intervals_equal_the_simulation(model: Any, zero: ZeroSettings) -> None:
    tensors = model[0]
    covered: Counter[tuple[str, str, int]] = Counter()
    for rank, expected in enumerate(_simulated(*model, zero)):
        found = owned_intervals(*model, zero, rank)
        assert all(owned.start < owned.stop for owned in found)
        mine = [owned for owned in found if owned.holders[0] == rank]
        elements = Counter((o.fqn, o.kind, i) for o in mine for i in range(o.start, o.stop))
        assert elements == expected
        covered += elements
    # Every element of every tensor is covered exactly once.
    everything = Counter()
    for spec in tensors:
        kinds = [] if spec.group is None else [kind for kind, _ in zero.kinds_of(spec.group)]
        kinds += ["weight"] if spec.group is None or zero.save_weights else []
        everything.update((spec.fqn, kind, i) for kind in kinds for i in range(math.prod(spec.shape)))
    assert covered == everything


@given(_models(), _SETTINGS)
@settings(deadline=None, max_examples=300)
def test_bytes_equal_the_sum_of_the_intervals(model: Any, zero: ZeroSettings) -> None:
    tensors, experts, _, parallel = model
    layout = owned_bytes(*model, zero)
    specs = {spec.fqn: spec for spec in tensors}
    offsets = [sum(experts[:layer]) for layer in range(len(experts))]
    dense, shares, alike = [0] * parallel.world, Counter(), {}
    for rank in range(parallel.world):
        for owned in owned_intervals(*model, zero, rank):
            spec, nbytes = specs[owned.fqn], (owned.stop - owned.start) * itemsize(owned.dtype)
            if len(owned.holders) > 1:
                assert rank in owned.holders
                alike[owned.fqn, owned.kind] = (nbytes, owned.holders, owned.stop, spec.layer, spec.expert)
            elif owned.holders == (rank,) and spec.layer is None:
                dense[rank] += nbytes
            elif owned.holders == (rank,):
                shares[offsets[spec.layer] + (spec.expert or 0), rank] += nbytes
    assert layout.ownership.dense.tolist() == dense
    assert _shares(layout) == [(unit, rank, nbytes) for (unit, rank), nbytes in sorted(shares.items())]
    assert {
        (item.fqn, item.kind): (item.nbytes, layout.holders[item.holders], item.numel, item.layer, item.expert)
        for item in layout.replicated
    } == alike
    assert len(layout.replicated) == len(alike)
    assert layout.total_bytes == sum(dense) + sum(shares.values()) + sum(item[0] for item in alike.values())


@given(_models(), _SETTINGS, st.randoms())
@settings(deadline=None, max_examples=50)
def test_group_numbers_and_other_groups_order_do_not_matter(model: Any, zero: ZeroSettings, random: Any) -> None:
    """Only the order inside a group counts."""
    tensors, *rest = model
    zero = replace(zero, group_kinds=())
    groups = sorted({spec.group for spec in tensors if spec.group is not None})
    numbers = dict(zip(groups, random.sample(range(1000), len(groups)), strict=True))
    renamed = [replace(spec, group=None if spec.group is None else numbers[spec.group]) for spec in tensors]
    moved = sorted(renamed, key=lambda spec: -1 if spec.group is None else spec.group)
    for rank in range(model[3].world):
        assert sorted(owned_intervals(moved, *rest, zero, rank)) == sorted(owned_intervals(*model, zero, rank))


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({"dtype": "int64"}, [(1, 1, 24)]),
        ({"shape": (7,)}, [(1, 1, 28)]),
        ({"is_buffer": False, "group": 5}, [(1, 1, 24), (1, 3, 12)]),
        ({"is_buffer": False, "frozen": True}, []),
        ({"layer": 1, "expert": 0}, []),
    ],
)
def test_positions_need_not_be_alike(change: dict[str, Any], shares: list[tuple[int, int, int]]) -> None:
    """Two layers of two experts on two pairs of ranks; each tensor is a buffer of an expert, and one is changed."""
    tensors = [TensorSpec(f"{i}", (3,), None, i // 2, i % 2, is_buffer=True) for i in range(4)]
    tensors[1] = replace(tensors[1], **change)
    layout = owned_bytes(tensors, [2, 2], [2, 2], ParallelLayout(4), ZeroSettings(stage=1))
    assert _shares(layout) == [(0, 0, 12), *shares, (2, 0, 24 if "expert" in change else 12), (3, 1, 12)]
    assert [layout.holders[item.holders] for item in layout.replicated] == [(1, 3)] * ("frozen" in change)


# ------------------------------------------------------------------------------------- groups of experts


def test_experts_get_groups_of_their_own() -> None:
    def expert(number: int) -> list[TensorSpec]:
        parts = (("up", (4,), 0, False), ("gain", (2,), 1, True), ("bias", (1,), 1, False))
        return [TensorSpec(f"e{number}.{n}", shape, g, 0, number, frozen=f) for n, shape, g, f in parts]

    tensors = [TensorSpec("d", (3,), 0), *(spec for number in range(10) for spec in expert(number))]
    split = split_expert_groups(tensors, [10], [2], max_group_size=9)
    # Per position five experts: 4 + 4 | 4 + 4 | 4 of one group, 2 + 1 + 2 + 1 + 2 + 1 | 2 + 1 + 2 + 1 of the other.
    groups = {spec.fqn: spec.group for spec in split}
    assert groups.pop("d") == 0
    assert [groups[f"e{number}.up"] for number in range(10)] == [2, 2, 3, 3, 4] * 2
    assert [groups[f"e{number}.bias"] for number in range(10)] == [5, 5, 5, 6, 6] * 2
    assert {groups[f"e{number}.gain"] for number in range(10)} == {None}
    # One name, one group, in the order of the user's groups.
    one = [s for s in split_expert_groups(tensors, [10], [2], names=["x", "x"]) if s.expert == 0]
    assert [(s.fqn, s.group) for s in one] == [("e0.up", 2), ("e0.gain", None), ("e0.bias", 2)]


# ------------------------------------------------------------------------------------------------ settings


def test_settings_from_a_ds_config() -> None:
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert ZeroSettings.from_config({}) == ZeroSettings(stage=0)
    assert ZeroSettings.from_config({"zero_optimization": True}).stage == 1
    first = ZeroSettings.from_config({**bf16, "zero_optimization": {"stage": 1}})
    assert first.bf16_optimizer and first.partitioned
    for other in (
        {**bf16, "zero_optimization": {"stage": 2}},
        {**bf16, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
    ):
        assert not ZeroSettings.from_config(other).bf16_optimizer
    zero = {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True}
    assert ZeroSettings.from_config(
        {"zero_optimization": zero, "moc_checkpoint": {"enabled": True, "save_weights": "sharded"}}
    ) == ZeroSettings(stage=2, round_robin=True, parameter_alignment=True, save_weights=True)


def test_dtypes_from_a_ds_config() -> None:
    def widths(config: dict[str, Any]) -> list[str]:
        return [dtype for _, dtype in ZeroSettings.from_config(config).kinds]

    low = {"enabled": True, "bf16_master_weights_and_grads": True}
    narrow = {"type": "AdamW", "params": {"fp32_optimizer_states": False}}
    assert widths({"bf16": {"enabled": True}}) == ["float32"] * 3
    assert widths({"bf16": low}) == ["bfloat16", "float32", "float32"]
    assert widths({"bf16": {**low, "bf16_optimizer_states": True}}) == ["bfloat16"] * 3
    assert widths({"bf16": low, "optimizer": narrow}) == ["bfloat16"] * 3
    assert widths({"fp16": {"fp16_master_weights_and_grads": True}}) == ["float16", "float32", "float32"]
    with pytest.raises(ConfigError, match="'Lion' is not known"):
        ZeroSettings.from_config({"optimizer": {"type": "Lion"}})
    lion = ADAM[:2]
    assert ZeroSettings.from_config({"optimizer": {"type": "Lion"}}, lion).kinds == lion


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tensors", "experts", "eps", "words"),
    [
        ([TensorSpec("a", (1,), 0), TensorSpec("a", (2,), 0)], [], [], "described twice"),
        ([TensorSpec("a", (-1, -2), 0)], [], [], "negative"),
        ([TensorSpec("a", (1,), -1)], [], [], "negative"),
        ([TensorSpec("a", (1,), 0, layer=0)], [2], [1], "no expert"),
        ([TensorSpec("a", (1,), 0, expert=0)], [2], [1], "no layer"),
        ([TensorSpec("a", (1,), 0, 1, 0)], [2], [1], "layer does not exist: there are 1"),
        ([TensorSpec("a", (1,), 0, 0, 2)], [2], [1], "expert does not exist"),
        ([TensorSpec("a", (1,), 0, is_buffer=True)], [], [], "a buffer is in a param group"),
        ([TensorSpec("a", (1,), 0, dtype="int3")], [], [], "unknown dtype 'int3'"),
        ([TensorSpec("a", (1,), 0), TensorSpec("b", (1,), 0, 0, 0)], [2], [2], "mixes dense tensors and experts"),
        ([TensorSpec("a", (1,), 0, 0, 0), TensorSpec("b", (1,), 0, 1, 0)], [2, 2], [1, 2], "several expert-parallel"),
        ([], [3], [2], "2 does not divide the 3 experts of MoE layer 0"),
        ([], [3, 3], [1, 3], "3 does not divide the world of 8 ranks"),
        ([], [2, 2], [2], "2 MoE layers have experts, 1 have"),
    ],
)
def test_contradictions_are_refused(tensors: list[TensorSpec], experts: list[int], eps: list[int], words: str) -> None:
    for call in (owned_bytes, lambda *arguments: owned_intervals(*arguments, 0)):
        with pytest.raises(ConfigError, match=words) as error:
            call(tensors, experts, eps, ParallelLayout(8), ZeroSettings(stage=1))
        assert not tensors or tensors[-1].fqn in str(error.value) or "dtype" in words


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="ZeRO stage 3"):
        ZeroSettings(stage=3)
    with pytest.raises(ConfigError, match="unknown dtype"):
        ZeroSettings(stage=1, group_kinds=((0, (("master", "float12"),)),))
    with pytest.raises(ConfigError, match="no master"):
        ZeroSettings(stage=1, kinds=ADAM[1:])
    with pytest.raises(ConfigError, match="rank 2 does not exist"):
        owned_intervals([], [], [], ParallelLayout(2), ZeroSettings(stage=1), 2)


def test_unpartitioned_state_may_share_groups() -> None:
    """At stage 0 nothing is flattened over ranks, so DeepSpeed asks for no groups of experts."""
    tensors = [TensorSpec("a", (1,), 0), TensorSpec("b", (1,), 0, 0, 0), TensorSpec("c", (1,), 0, 0, 1)]
    layout = owned_bytes(tensors, [2], [2], ParallelLayout(2), ZeroSettings(stage=0))
    assert _shares(layout) == [(0, 0, 12), (1, 1, 12)]
    assert [(item.fqn, item.nbytes) for item in layout.replicated] == [("a", 4)] * 3


# ---------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize(("layers", "experts", "limit"), [(12, 16, 0.3), (60, 256, 1.0)])
def test_ten_thousand_ranks(layers: int, experts: int, limit: float) -> None:
    shapes = (("fc1.weight", (4096, 1024)), ("fc1.bias", (4096,)), ("fc2.weight", (1024, 4096)), ("fc2.bias", (1024,)))
    tensors = [TensorSpec("embedding", (50304, 1024), 0, dtype="bfloat16")]
    for layer in range(layers):
        for expert in range(experts):
            for name, shape in shapes:
                group = 0 if len(shape) > 1 else 1
                tensors.append(TensorSpec(f"{layer}.{expert}.{name}", shape, group, layer, expert, "bfloat16"))
    counts, eps = [experts] * layers, [16] * layers
    split = split_expert_groups(tensors, counts, eps)
    parallel, zero = ParallelLayout(10_000), ZeroSettings(stage=2)
    spent = []
    for _ in range(3):
        begin = time.process_time()
        layout = owned_bytes(split, counts, eps, parallel, zero)
        spent.append(time.process_time() - begin)
    assert min(spent) < limit
    elements = sum(math.prod(spec.shape) for spec in tensors)
    assert layout.total_bytes == 12 * elements
    assert (layout.ownership.unit_bytes == 12 * sum(math.prod(shape) for _, shape in shapes)).all()
    # The bytes of some ranks, one by one.
    for rank in (0, 1, 4321, 9_999):
        mine = layout.ownership.rank == rank
        found = owned_intervals(split, counts, eps, parallel, zero, rank)
        assert sum(o.stop - o.start for o in found) * 4 == (
            layout.ownership.nbytes[mine].sum() + layout.ownership.dense[rank]
        )
