"""The pure layout model against the catalogs of real engines, rank by rank and byte by byte.

The model is described by what its user knows: names, shapes, dtypes and param groups, gathered over the ranks. Nothing
is read from flat buffers or partitions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.pool import Pool
from distributed.zoo import Layer
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import (
    ADAM,
    LayoutBytes,
    TensorSpec,
    ZeroSettings,
    owned_bytes,
    owned_intervals,
    split_expert_groups,
)
from moc_ckpt.state.unit import expert_unit

pytestmark = pytest.mark.distributed

KINDS = {
    "client_amsgrad": (*ADAM, ("max_exp_avg_sq", "float32")),
    "client_sgd": (("master", "float32"), ("momentum_buffer", "float32")),
}


# ------------------------------------------------------------------------------------ what the user knows


@contextlib.contextmanager
def _split_by(**options: Any) -> Iterator[None]:
    """Let DeepSpeed split expert groups with other options; `never=True` leaves the user's groups as they are."""
    from deepspeed.moe import utils

    original = utils.split_params_into_different_moe_groups_for_optimizer
    never = options.pop("never", False)
    changed = (lambda groups: groups) if never else functools.partial(original, **options)
    utils.split_params_into_different_moe_groups_for_optimizer = changed
    try:
        yield
    finally:
        utils.split_params_into_different_moe_groups_for_optimizer = original


@contextlib.contextmanager
def _plain_without_momentum() -> Iterator[None]:
    original = zoo.param_groups

    def changed(row: zoo.Row, net: Any) -> list[dict[str, Any]]:
        return [{**g, "momentum": 0.0} if g["name"] == "plain" else g for g in original(row, net)]

    zoo.param_groups = changed
    try:
        yield
    finally:
        zoo.param_groups = original


@contextlib.contextmanager
def _flat_16bit_wrapper() -> Iterator[None]:
    """Let DeepSpeed wrap torch's AdamW as it wraps FusedAdam, in FP16_Optimizer, which saves compiling FusedAdam."""
    import torch
    from deepspeed.runtime import engine

    original, engine.FusedAdam = engine.FusedAdam, torch.optim.AdamW
    try:
        yield
    finally:
        engine.FusedAdam = original


def _mine(row: zoo.Row, module: Any, *, split: bool) -> list[TensorSpec]:
    """This rank's tensors in group order; with `split` in the groups that DeepSpeed made, else in the user's."""
    with contextlib.nullcontext() if split else _split_by(never=True):
        groups = zoo.param_groups(row, module)
    full, layers = oracle.global_names(module), {}
    for number, _ in enumerate(row.layers):
        layers[f"blocks.{number}.moe.deepspeed_moe.experts.deepspeed_experts."] = number

    def spec(name: str, tensor: Any, group: int | None, is_buffer: bool) -> TensorSpec:
        expert = oracle._EXPERT.match(full[name])
        return TensorSpec(
            fqn=full[name],
            shape=tuple(tensor.shape),
            group=group,
            layer=layers[expert[1]] if expert else None,
            expert=int(expert[2]) if expert else None,
            dtype=str(tensor.dtype).removeprefix("torch."),
            is_buffer=is_buffer,
            frozen=not is_buffer and not tensor.requires_grad,
        )

    names = {id(param): name for name, param in module.named_parameters()}
    found = []
    for index, group in enumerate(groups):
        for param in group["params"]:
            leave = split and not param.requires_grad and not _keeps_frozen(row)
            found.append(spec(names.pop(id(param)), param, None if leave else index, False))
    assert not names
    persistent = module.state_dict().keys()
    return found + [spec(name, tensor, None, True) for name, tensor in module.named_buffers() if name in persistent]


def _old_deepspeed() -> bool:
    from deepspeed.runtime import utils

    return not hasattr(utils, "is_optimized_parameter")


def _keeps_frozen(row: zoo.Row) -> bool:
    """DeepSpeed 0.17's 16-bit wrapper at stage 0 keeps a master of frozen parameters too."""
    return _old_deepspeed() and row.stage == 0 and row.dtype == "fp16"


def _merged(ranks: list[list[TensorSpec]]) -> list[TensorSpec]:
    """Everybody's tensors, each once; ranks only differ in their experts."""
    known: dict[str, TensorSpec] = {}
    for mine in ranks:
        for spec in mine:
            assert known.setdefault(spec.fqn, spec) == spec
    return list(known.values())


# ------------------------------------------------------------------------------------------- the comparison


def case_layout(
    ctx: Any,
    row: zoo.Row,
    config: dict[str, Any],
    max_group_size: int | None,
    save_weights: bool,
    freeze_on_even: tuple[str, ...],
    mixed_momentum: bool,
    flat_16bit: bool,
) -> list[str]:
    """What differs between this rank's catalog and the model; [] is right."""
    from moc_ckpt.integrations.deepspeed.view import EngineView

    if ctx.rank % 2 == 0:
        row = dataclasses.replace(row, freeze=freeze_on_even)
    options = {} if max_group_size is None else {"max_group_size": max_group_size}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_split_by(**options))
        if mixed_momentum:
            stack.enter_context(_plain_without_momentum())
        if flat_16bit:
            stack.enter_context(_flat_16bit_wrapper())
        engine = harness.build(row, world=ctx.world, config=config)
        assert (type(engine.optimizer).__name__ == "FP16_Optimizer") == flat_16bit
        split = _merged(ctx.gather(_mine(row, engine.module, split=True)))
        names = [group["name"] for group in zoo.param_groups(row, engine.module)]
    whole = _merged(ctx.gather(_mine(row, engine.module, split=False)))
    view = EngineView(engine)
    real = view.catalog(ctx.rank, view.trainable() if save_weights else ()).entries
    assert real

    experts, eps = [layer.experts for layer in row.layers], [layer.ep for layer in row.layers]
    ds_config = harness._merge(zoo.ds_config(row, ctx.world), config)
    ds_config["moc_checkpoint"] = {"save_weights": "sharded" if save_weights else "derive"}
    settings = ZeroSettings.from_config(ds_config, KINDS.get(row.optimizer))
    if mixed_momentum:
        settings = dataclasses.replace(settings, group_kinds=((names.index("plain"), settings.kinds[:1]),))
    if _old_deepspeed():
        partitions = settings.bf16_optimizer or (row.stage == 0 and row.dtype == "bf16")
        settings = dataclasses.replace(settings, empty_in_groups=True, bf16_optimizer=partitions)
    parallel = ParallelLayout(ctx.world, bool(ds_config.get("use_data_before_expert_parallelism")))

    catalog = Counter(
        (e.fragment.fqn, e.fragment.kind, e.fragment.dtype, e.fragment.start, e.fragment.stop, e.holders) for e in real
    )
    out = []
    described = {"DeepSpeed's groups": split}
    if not mixed_momentum and not _keeps_frozen(row):
        described["groups split here"] = split_expert_groups(whole, experts, eps, **options)
    for how, tensors in described.items():
        arguments = (tensors, experts, eps, parallel, settings)
        model = Counter(tuple(owned) for owned in owned_intervals(*arguments, ctx.rank))
        out += [f"{how}: only in the catalog: {one}" for one in list((catalog - model).elements())[:4]]
        out += [f"{how}: only in the model: {one}" for one in list((model - catalog).elements())[:4]]
        out += [f"{how}: {line}" for line in _byte_differences(ctx, real, owned_bytes(*arguments))]
    return out


def _byte_differences(ctx: Any, real: Any, layout: LayoutBytes) -> list[str]:
    """The catalogs' bytes per (unit, rank) and replicated tensors against the model's; `real` of this rank."""
    alone: Counter[str] = Counter()
    alike = set()
    for entry in real:
        if len(entry.holders) == 1:
            unit = entry.unit if entry.unit.startswith("expert/") else "dense"
            alone[unit] += entry.fragment.nbytes if entry.holders[0] == ctx.rank else 0
        else:
            alike.add((entry.fragment.fqn, entry.fragment.kind, entry.fragment.nbytes, entry.holders))
    everyone = ctx.gather((dict(alone), alike))
    shares = {(unit, rank): n for rank, (mine, _) in enumerate(everyone) for unit, n in mine.items() if n}
    owner, offsets = layout.ownership, layout.ownership.offsets
    assert list(zip(owner.unit, owner.rank, strict=True)) == sorted(set(zip(owner.unit, owner.rank, strict=True)))
    modelled: dict[tuple[str, int], int] = {("dense", r): int(n) for r, n in enumerate(owner.dense) if n}
    for unit, rank, nbytes in zip(owner.unit.tolist(), owner.rank.tolist(), owner.nbytes.tolist(), strict=True):
        layer = sum(begin <= unit for begin in offsets) - 1
        modelled[expert_unit(layer, unit - offsets[layer]), rank] = nbytes
    replicated = {(item.fqn, item.kind, item.nbytes, layout.holders[item.holders]) for item in layout.replicated}
    assert len(replicated) == len(layout.replicated)
    total = sum(shares.values()) + sum(item[2] for item in set().union(*(theirs for _, theirs in everyone)))
    out = [] if total == layout.total_bytes else [f"{layout.total_bytes} bytes, {total} in the catalogs"]
    if shares != modelled:
        out.append(f"bytes per rank: {sorted(shares.items() ^ modelled.items())[:6]}")
    if set().union(*(theirs for _, theirs in everyone)) != replicated:
        out.append("replicated tensors differ")
    return out


def _check(pool: Pool, row: zoo.Row, **options: Any) -> None:
    arguments = {
        "config": {},
        "max_group_size": None,
        "save_weights": False,
        "freeze_on_even": row.freeze,
        "mixed_momentum": False,
        "flat_16bit": False,
        **options,
    }
    assert pool.run(row.world, case_layout, row=row, deadline=240.0, **arguments) == [[]] * row.world


@pytest.mark.parametrize("row", sorted(zoo.ROWS))
def test_model_equals_catalog(pool: Pool, row: str) -> None:
    zoo.skip_unless_possible(row)
    _check(pool, zoo.ROWS[row])


W8 = (Layer(experts=8, ep=2), Layer(experts=8, ep=4, k=2), Layer(experts=16, ep=8))
W6 = (Layer(experts=6, ep=2), Layer(experts=12, ep=3, k=2), Layer(experts=6, ep=6), Layer(experts=3, ep=1))
EP2 = (Layer(ep=2), Layer(ep=2, k=2))
DATA_FIRST = (("use_data_before_expert_parallelism", True),)
ALIGNED = (("round_robin_gradients", True), ("parameter_alignment", True))
FP32_SUMS = (("data_types", {"grad_accum_dtype": "fp32"}),)
_EXPERT_0 = "blocks.0.moe.deepspeed_moe.experts.deepspeed_experts.0."

MORE = {
    "w8": (zoo.Row("", world=8, layers=W8), {}),
    "w8_data_first": (zoo.Row("", world=8, layers=W8, config=DATA_FIRST, zero=ALIGNED), {}),
    "w8_stage0": (zoo.Row("", world=8, layers=W8, stage=0), {}),
    "w6_odd": (zoo.Row("", world=6, layers=W6, hidden=13, ffn=5), {}),
    "w6_data_first_fp32": (zoo.Row("", world=6, layers=W6, dtype="fp32", config=DATA_FIRST), {}),
    "w1_aligned": (zoo.Row("", world=1, layers=(Layer(ep=1),), zero=ALIGNED, odd=1), {}),
    "w1_stage0": (zoo.Row("", world=1, layers=(Layer(ep=1),), stage=0), {"save_weights": True}),
    "aligned_fp32": (zoo.Row("", zero=ALIGNED, dtype="fp32", odd=5), {}),
    "aligned_w2": (zoo.Row("", world=2, zero=ALIGNED[1:], layers=(Layer(ep=1), Layer(experts=2, ep=2, k=2))), {}),
    "round_robin_stage1": (zoo.Row("", stage=1, zero=ALIGNED[:1], groups=1, layers=EP2), {}),
    "bf16_optimizer_ignores_order": (zoo.Row("", stage=1, zero=ALIGNED, config=FP32_SUMS), {}),
    "fp32_sums_stage2": (zoo.Row("", stage=2, zero=ALIGNED, config=FP32_SUMS), {}),
    "split_experts": (zoo.Row("", layers=EP2), {"max_group_size": 180}),
    "split_below_one_tensor": (zoo.Row("", layers=EP2, zero=ALIGNED[:1]), {"max_group_size": 60}),
    "split_bf16_optimizer": (zoo.Row("", stage=1, config=FP32_SUMS), {"max_group_size": 180}),
    "weights": (zoo.Row("", layers=(Layer(ep=2), Layer(ep=4))), {"save_weights": True}),
    "weights_stage0": (zoo.Row("", stage=0, dtype="fp32"), {"save_weights": True}),
    "experts_differ": (zoo.Row("", zero=ALIGNED[:1]), {"freeze_on_even": (_EXPERT_0,)}),
    "experts_differ_stage0": (zoo.Row("", stage=0), {"freeze_on_even": (_EXPERT_0,)}),
    "flat_16bit": (zoo.Row("", stage=0), {"flat_16bit": True}),
    "flat_16bit_fp16": (zoo.Row("", stage=0, dtype="fp16", layers=EP2), {"flat_16bit": True}),
    "some_without_momentum": (zoo.Row("", optimizer="client_sgd", layers=EP2), {"mixed_momentum": True}),
    "bf16_states": (
        zoo.Row("", layers=EP2),
        {"config": {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}},
    ),
}


@pytest.mark.parametrize("name", sorted(MORE))
def test_model_equals_catalog_in_corners(pool: Pool, name: str) -> None:
    row, options = MORE[name]
    _check(pool, dataclasses.replace(row, name=name), **options)


# ---------------------------------------------------------------------------------------------- expert groups


@pytest.mark.parametrize("seed", range(40))
def test_groups_are_split_as_deepspeed_does(seed: int) -> None:
    """The same parameters through DeepSpeed's function on every EP position, and through the pure one."""
    import torch
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    chance = random.Random(seed)
    eps = [chance.choice((1, 2, 4)) for _ in range(3)]
    experts = [ep * chance.randint(1, 3) for ep in eps]
    names = [chance.choice(("a", "b", "c")) for _ in range(3)]
    limit = chance.choice((None, 1, 5, 12, 40))
    specs = [TensorSpec(f"d{i}", (chance.randint(0, 6),), chance.randrange(3)) for i in range(5)]
    shapes = {(layer, part): chance.randint(0, 9) for layer in range(3) for part in range(3)}
    groups = {key: chance.randrange(3) for key in shapes}
    frozen = {key: chance.random() < 0.2 for key in shapes}
    for layer, count in enumerate(experts):
        for expert in range(count):
            for part in range(3):
                key = (layer, part)
                specs.append(
                    TensorSpec(
                        f"e{layer}.{expert}.{part}", (shapes[key],), groups[key], layer, expert, frozen=frozen[key]
                    )
                )
    pure: dict[int | None, list[str]] = {}
    for spec in split_expert_groups(specs, experts, eps, names=names, max_group_size=limit):
        pure.setdefault(spec.group, []).append(spec.fqn)
    pure.pop(None, None)
    for place in range(4):  # a rank whose position is `place % ep`, whatever the layer's ep
        users: list[dict[str, Any]] = [{"params": [], "name": name} for name in names]
        fqns = {}
        trains = set()
        for spec in specs:
            if spec.layer is not None and spec.expert is not None:
                ep = eps[spec.layer]
                if spec.expert // (experts[spec.layer] // ep) != place % ep:
                    continue
            param = torch.nn.Parameter(torch.zeros(spec.shape), requires_grad=not spec.frozen)
            if spec.layer is not None:
                param.allreduce, param.group_name = False, f"ep_size_{eps[spec.layer]}"
            fqns[id(param)] = spec.fqn
            trains |= set() if spec.frozen else {spec.fqn}
            users[spec.group]["params"].append(param)  # type: ignore[index]
        real = [[fqns[id(p)] for p in group["params"]] for group in split(users, max_group_size=limit)]
        here = [[fqn for fqn in members if fqn in trains] for members in real]
        found = [[fqn for fqn in members if fqn in trains] for members in pure.values()]
        assert sorted(filter(None, here)) == sorted(filter(None, found)), f"position {place}"
