"""Where DeepSpeed's optimizers keep the state of each parameter, read off the live engine.

One function per optimizer class. The truth for flat partitions is a parameter's address inside its
flat group, not `_hp_mapping`, which is wrong for round-robin gradients and unlinked for experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.state.catalog import ParamShard, StateGroup, WeightTensor
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer

__all__ = [
    "HeldExperts",
    "ModelNames",
    "base_optimizer",
    "find_layers",
    "model_weights",
    "param_shards",
    "state_groups",
]


class HeldExperts(NamedTuple):
    """The experts of one MoE layer that this rank holds.

    Attributes:
        experts: global ids of its expert modules, in their order.
        holders: for each of them the ranks that hold the same expert, ascending.
        ep_size: the layer's expert-parallel size; None for a layer with replicas, which has none.
    """

    experts: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]
    ep_size: int | None


class ModelNames:
    """Full names with global expert ids, and the ranks that hold each parameter.

    Args:
        engine: a DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self.layers, self._locals = find_layers(engine)
        self._world = tuple(range(dist.get_world_size()))
        # Without tensor, pipeline and sequence parallelism (refused at start) every rank holds all dense state.
        self._names = {id(param): self.globalise(name) for name, param in engine.module.named_parameters()}

    def globalise(self, name: str) -> str:
        """Returns `name` with the local expert index replaced by the global expert id."""
        prefix, mark, rest = name.partition(EXPERTS_MARK)
        if not mark:
            return name
        index, _, tail = rest.partition(".")
        return f"{prefix}{mark}{self._locals[prefix].experts[int(index)]}.{tail}"

    def localise(self, fqn: str) -> str | None:
        """Returns the module's own name of a global one; None for an expert that only other ranks hold.

        Names of layers that this model does not have come back unchanged.
        """
        prefix, mark, rest = fqn.partition(EXPERTS_MARK)
        if not mark or prefix not in self._locals:
            return fqn
        expert, _, tail = rest.partition(".")
        experts = self._locals[prefix].experts
        return f"{prefix}{mark}{experts.index(int(expert))}.{tail}" if int(expert) in experts else None

    def expert_parallel(self) -> dict[str, int]:
        """Returns the expert-parallel size by prefix of the MoE layer, of those that have one."""
        return {prefix: held.ep_size for prefix, held in self._locals.items() if held.ep_size is not None}

    def of(self, param: torch.Tensor) -> str:
        """Returns the full name of a parameter of the model.

        Raises:
            UnsupportedError: if the model does not have it.
        """
        name = self._names.get(id(param))
        if name is None:
            raise UnsupportedError(
                f"the optimizer has a parameter of shape {tuple(param.shape)} that the model does not have",
                where="model_parameters of deepspeed.initialize",
                fix="make it a parameter of the module, so that it has a name",
            )
        return name

    def replicas(self, fqn: str) -> tuple[int, ...]:
        """Returns the global ranks that hold the whole tensor of this rank's model, ascending.

        Args:
            fqn: its full name with global expert id.
        """
        prefix, mark, rest = fqn.partition(EXPERTS_MARK)
        if not mark:
            return self._world
        held = self._locals[prefix]
        return held.holders[held.experts.index(int(rest.partition(".")[0]))]


def find_layers(engine: Any) -> tuple[tuple[MoELayer, ...], dict[str, HeldExperts]]:
    """Finds the MoE layers: DeepSpeed's, and those with replicas (LazarusMoE).

    Returns:
        The layers in named_modules order, and per layer prefix what this rank holds of it.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    from moc_ckpt.lazarus.layer import LazarusMoE

    layers: list[MoELayer] = []
    local: dict[str, HeldExperts] = {}
    for name, module in engine.module.named_modules():
        if isinstance(module, LazarusMoE):
            ids = tuple(module.expert_ids)
            local[name] = HeldExperts(ids, tuple(module.placement.holders(expert) for expert in ids), None)
        elif isinstance(module, MoE):
            # The group is asked for its ranks: strides differ with the order of data and expert parallelism.
            count = module.num_local_experts
            first = groups._get_expert_parallel_rank(module.expert_group_name) * count
            ranks = dist.get_process_group_ranks(groups._get_expert_data_parallel_group(module.expert_group_name))
            holders = tuple(sorted(ranks))
            local[name] = HeldExperts(
                tuple(range(first, first + count)), (holders,) * count, dist.get_world_size() // len(holders)
            )
        else:
            continue
        layers.append(MoELayer(len(layers), name, module.num_experts))
    return tuple(layers), local


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Returns the optimizer that does the update, below DeepSpeed's wrapper."""
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else wrapper


def state_groups(engine: Any) -> tuple[StateGroup, ...]:
    """Returns the param groups of the optimizers that do the update, live: DeepSpeed's, then that of replicas."""
    groups = list(base_optimizer(engine).param_groups)
    if engine.lazarus is not None:
        groups += engine.lazarus.replicas.optimizer.param_groups
    return tuple(StateGroup(group, tuple(group["params"])) for group in groups)


def param_shards(engine: Any, names: ModelNames) -> list[ParamShard]:
    """Returns every trainable parameter of this rank's model with the part of its state that this rank holds.

    Raises:
        UnsupportedError: if the optimizer wrapper is of an unknown class.
    """
    kind = type(engine.optimizer).__name__
    readers: dict[str, Callable[[Any, ModelNames], Iterator[ParamShard]]] = {
        "DeepSpeedZeroOptimizer": _zero,
        "BF16_Optimizer": _bf16,
        "FP16_Optimizer": _fused_16bit,
        "FP16_UnfusedOptimizer": _unfused_16bit,
    }
    reader = readers.get(kind)
    if reader is None:
        if not isinstance(engine.optimizer, torch.optim.Optimizer) or hasattr(engine.optimizer, "optimizer"):
            raise UnsupportedError(
                f"DeepSpeed uses {kind}, whose state layout is not known to moc_ckpt",
                where="engine.optimizer",
                fix=f"known: {', '.join(readers)} and plain torch optimizers",
            )
        reader = _raw
    return [*reader(engine, names), *_replicas(engine, names)]


def model_weights(engine: Any, names: ModelNames) -> list[WeightTensor]:
    """Returns what no optimizer holds: frozen and empty parameters, and persistent buffers."""
    optimised = _optimised_ids(engine)
    found = [
        WeightTensor(names.globalise(name), param, False, names.replicas(names.globalise(name)))
        for name, param in engine.module.named_parameters()
        if id(param) not in optimised
    ]
    for prefix, module in engine.module.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                fqn = names.globalise(f"{prefix}.{name}" if prefix else name)
                found.append(WeightTensor(fqn, buffer, True, names.replicas(fqn)))
    return found


def _optimised_ids(engine: Any) -> set[int]:
    found = set() if engine.lazarus is None else {id(shard.param) for shard in engine.lazarus.replicas.shards()}
    return found | _deepspeed_ids(engine.optimizer)


def _deepspeed_ids(wrapper: Any) -> set[int]:
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(wrapper, attribute):
            # A frozen one that a wrapper lists (as older versions do) has a master, and weight decay changes it.
            return {id(param) for group in getattr(wrapper, attribute) for param in group if param.numel()}
    return {id(param) for group in wrapper.param_groups for param in group["params"] if _trains(param)}


def _trains(param: torch.Tensor) -> bool:
    """Tells whether a raw optimizer keeps state for a parameter: it steps over frozen and empty ones."""
    return param.requires_grad and param.numel() > 0


def _zero(engine: Any, names: ModelNames) -> Iterator[ParamShard]:
    wrapper = engine.optimizer
    yield from _flat_partitions(
        names,
        params=wrapper.bit16_groups,
        flats=wrapper.bit16_groups_flat,
        masters=wrapper.single_partition_of_fp32_groups,
        process_groups=wrapper.real_dp_process_group,
    )


def _bf16(engine: Any, names: ModelNames) -> Iterator[ParamShard]:
    wrapper = engine.optimizer
    yield from _flat_partitions(
        names,
        params=wrapper.bf16_groups,
        flats=wrapper.bf16_groups_flat,
        masters=wrapper.fp32_groups_flat_partition,
        process_groups=wrapper.real_dp_process_group,
    )


def _flat_partitions(
    names: ModelNames,
    *,
    params: Sequence[Sequence[torch.Tensor]],
    flats: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    process_groups: Sequence[Any],
) -> Iterator[ParamShard]:
    rank = dist.get_rank()
    for group, (members, flat, master) in enumerate(zip(params, flats, masters, strict=True)):
        size = master.numel()
        low = dist.get_rank(process_groups[group]) * size
        for param in members:
            if not param.numel():  # older versions keep them in the group
                continue
            offset = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
            # Clamped to the parameter: partitions before or after it hold nothing of it.
            start = min(max(low - offset, 0), param.numel())
            stop = min(max(low + size - offset, 0), param.numel())
            at = offset + start - low if stop > start else 0
            fqn = names.of(param)
            yield ParamShard(
                fqn=fqn,
                param=param,
                start=start,
                stop=stop,
                master=master.detach().narrow(0, at, stop - start),
                group=group,
                state_key=master,
                state_offset=at,
                holders=(rank,),
                replicas=names.replicas(fqn),
            )


def _fused_16bit(engine: Any, names: ModelNames) -> Iterator[ParamShard]:
    wrapper = engine.optimizer
    for group, members in enumerate(wrapper.fp16_groups):
        master = wrapper.fp32_groups_flat[group]
        flat = wrapper.fp16_groups_flat[group]
        for param in members:
            if not param.numel():
                continue
            offset = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
            yield _whole(names, param, master.detach().narrow(0, offset, param.numel()), group, master, offset)


def _unfused_16bit(engine: Any, names: ModelNames) -> Iterator[ParamShard]:
    wrapper = engine.optimizer
    for group, members in enumerate(wrapper.fp16_groups):
        for param, master in zip(members, wrapper.fp32_groups[group], strict=True):
            if not param.numel():
                continue
            yield _whole(names, param, _flat_view(names.of(param), master), group, master, 0)


def _raw(engine: Any, names: ModelNames) -> Iterator[ParamShard]:
    for group, options in enumerate(engine.optimizer.param_groups):
        for param in options["params"]:
            if _trains(param):
                yield _whole(names, param, _flat_view(names.of(param), param), group, param, 0)


def _replicas(engine: Any, names: ModelNames) -> Iterator[ParamShard]:
    if engine.lazarus is None:
        return
    first = len(base_optimizer(engine).param_groups)
    for shard in engine.lazarus.replicas.shards():
        fields = shard._asdict()
        yield ParamShard(fqn=names.of(shard.param), **{**fields, "group": first + shard.group})


def _whole(
    names: ModelNames, param: torch.Tensor, master: torch.Tensor, group: int, key: torch.Tensor, offset: int
) -> ParamShard:
    fqn = names.of(param)
    replicas = names.replicas(fqn)
    return ParamShard(fqn, param, 0, param.numel(), master, group, key, offset, replicas, replicas)


def _flat_view(fqn: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"{fqn} of shape {tuple(tensor.shape)} is not contiguous in memory (strides {tensor.stride()})",
            where="the model's parameters",
            fix="make it contiguous() before deepspeed.initialize, or use ZeRO, which does",
        )
    return tensor.detach().view(-1)
