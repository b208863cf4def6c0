"""What goes into the files of a native DeepSpeed checkpoint, at a world and expert-parallel size of choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moc_ckpt.errors import ConfigError, FormatError, UnsupportedError
from moc_ckpt.integrations.deepspeed.load import stored_scalars
from moc_ckpt.integrations.deepspeed.native_record import WRAPPER, NativeRecord
from moc_ckpt.plan.native_groups import NativeGroup, expand_groups, split_name
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import flat_groups
from moc_ckpt.plan.zero_spec import FlatGroup, Kinds, TensorSpec, ZeroSettings
from moc_ckpt.recovery.resolver import StoredTensor
from moc_ckpt.recovery.restorer import index_manifest
from moc_ckpt.state.fragment import MASTER, WEIGHT, TensorKey, itemsize
from moc_ckpt.state.plain import encode_plain
from moc_ckpt.state.scalars import index_scalars
from moc_ckpt.state.unit import MoELayer
from moc_ckpt.storage.manifest import Manifest

__all__ = ["NativePlan", "plan_native"]

_EP = "name an expert-parallel size (--ep) that divides the number of ranks and the experts of every MoE layer"


@dataclass(frozen=True, slots=True, eq=False)
class NativePlan:
    """The layout of a native checkpoint.

    Attributes:
        tensors: where every logical tensor is stored.
        groups: the param groups as rank 0 has them.
        specs: every trained parameter, in group order.
        numels: their elements.
        kinds: kinds of optimizer state of each group, `master` first, with their dtypes.
        layers: the MoE layers.
        parallel: the ranks.
        ep: expert-parallel size; 1 without MoE layers.
        settings: of ZeRO.
        weights: dtype of every parameter's weight and of every buffer, by name.
        frozen: parameters that no group has: frozen and empty ones.
    """

    tensors: Mapping[TensorKey, StoredTensor]
    groups: tuple[NativeGroup, ...]
    specs: tuple[TensorSpec, ...]
    numels: tuple[int, ...]
    kinds: tuple[Kinds, ...]
    layers: tuple[MoELayer, ...]
    parallel: ParallelLayout
    ep: int
    settings: ZeroSettings
    weights: Mapping[str, str]
    frozen: tuple[str, ...]

    def flat(self, rank: int) -> list[FlatGroup]:
        """Returns the flat groups of a rank, one for each param group."""
        experts = [layer.num_experts for layer in self.layers]
        return flat_groups(self.specs, experts, [self.ep] * len(experts), self.parallel, self.settings, rank)

    def source(self, name: str) -> tuple[TensorKey, StoredTensor]:
        """Returns what the weight of a parameter or buffer is made of: a stored weight, else the master."""
        for kind in (WEIGHT, MASTER):
            found = self.tensors.get(TensorKey(name, kind))
            if found is not None:
                return TensorKey(name, kind), found
        raise KeyError(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter or buffer."""
        return self.source(name)[1].shape

    def dense(self) -> list[str]:
        """Returns the names of all weights outside experts, in order."""
        return [name for name in self.weights if split_name(name) is None]

    def of_expert(self, layer: MoELayer) -> list[list[str]]:
        """Returns the names of each expert's weights."""
        found: list[list[str]] = [[] for _ in range(layer.num_experts)]
        for name in self.weights:
            parts = split_name(name)
            if parts is not None and parts[0] == layer.prefix:
                found[parts[1]].append(name)
        return found

    def weight_bytes(self) -> int:
        """Returns the bytes of all weights."""
        return sum(math.prod(self.shape(name)) * itemsize(dtype) for name, dtype in self.weights.items())

    def rank_bytes(self) -> int:
        """Returns the bytes of one rank's optimizer state with padding, which are the same for all."""
        return sum(flat.size * sum(itemsize(dtype) for _, dtype in self.kinds[flat.group]) for flat in self.flat(0))

    def state_bytes(self) -> int:
        """Returns the bytes of all optimizer state, without padding."""
        widths = [sum(itemsize(dtype) for _, dtype in kinds) for kinds in self.kinds]
        return sum(
            numel * widths[spec.group]
            for spec, numel in zip(self.specs, self.numels, strict=True)
            if spec.group is not None
        )


def plan_native(
    manifest: Manifest,
    record: NativeRecord,
    state: Mapping[str, Any],
    where: str,
    *,
    world: int | None = None,
    expert_parallel: int | None = None,
) -> NativePlan:
    """Lays out a native checkpoint.

    Args:
        manifest: the checkpoint.
        record: what it noted of the engine.
        state: its state, decoded.
        where: its place, for messages.
        world: number of ranks that will load it; None for as many as saved it.
        expert_parallel: their expert-parallel size; None for that of the run that saved it.

    Raises:
        UnsupportedError: if the run was of a kind whose native files are not known.
        ConfigError: if world or expert-parallel size do not fit the model.
        FormatError: if the record and the checkpoint do not belong together.
    """
    _check_supported(manifest, record, state, where)
    layers = manifest.layers
    saved_ep = _saved_ep(manifest, where)
    world = manifest.topology.world if world is None else world
    ep = saved_ep if expert_parallel is None else expert_parallel
    if world < 1:
        raise ConfigError(f"--world {world} is no number of ranks", fix="name 1 or more")
    if not layers and ep != 1:
        raise ConfigError(f"--ep {ep}, but the model has no MoE layers", where=where, fix="leave out --ep")
    if ep < 1 or world % ep:
        raise ConfigError(
            f"expert-parallel size {ep} does not divide {world} ranks", where=f"--world {world}, --ep {ep}", fix=_EP
        )
    for layer in layers:
        if layer.num_experts % ep:
            raise ConfigError(
                f"expert-parallel size {ep} does not divide the {layer.num_experts} experts of {layer.prefix}",
                where=f"--ep {ep}",
                fix=_EP,
            )
    tensors = index_manifest(manifest)
    shapes = {key.fqn: tensor.shape for key, tensor in tensors.items() if key.kind == MASTER}
    precision = manifest.topology.precision
    odd = record.dtypes or {}
    weights = {
        key.fqn: odd.get(key.fqn, precision) if TensorKey(key.fqn, MASTER) in tensors else tensor.dtype
        for key, tensor in tensors.items()
        if key.kind in (MASTER, WEIGHT)
    }
    buffers = {*record.buffers, *_other_experts(record.buffers, layers, saved_ep)}
    frozen = tuple(name for name in weights if name not in shapes and name not in buffers)
    scalars = index_scalars(stored_scalars(state))
    groups, specs = expand_groups(
        [
            replace(group, training=encode_plain(scalars[group.names[0]]["options"], where))
            if group.names and group.names[0] in scalars
            else group
            for group in record.groups
        ],
        layers,
        shapes,
        {name: weights[name] for name in shapes},
        saved_ep=saved_ep,
        ep=ep,
        frozen_experts=any(split_name(name) is not None for name in frozen),
    )
    return NativePlan(
        tensors=tensors,
        groups=tuple(groups),
        specs=tuple(specs),
        numels=tuple(math.prod(spec.shape) for spec in specs),
        kinds=_kinds(groups, specs, tensors),
        layers=layers,
        parallel=ParallelLayout(world, record.data_first),
        ep=ep,
        settings=ZeroSettings(
            stage=manifest.topology.zero_stage,
            round_robin=record.round_robin,
            parameter_alignment=record.parameter_alignment,
        ),
        weights=dict(sorted(weights.items())),
        frozen=frozen,
    )


def _check_supported(manifest: Manifest, record: NativeRecord, state: Mapping[str, Any], where: str) -> None:
    stage = manifest.topology.zero_stage
    fix = "export with --to safetensors (weights only), or resume it in a run with ZeRO stage 1 or 2 and save there"
    if stage not in (1, 2):
        raise UnsupportedError(
            f"the checkpoint is of ZeRO stage {stage}; native checkpoints are written for stages 1 and 2",
            where=where,
            fix=fix,
        )
    if record.wrapper != WRAPPER:
        raise UnsupportedError(
            f"DeepSpeed kept the optimizer's state in a {record.wrapper}, whose native files are not written",
            where=where,
            fix=f"{fix} (with a {WRAPPER}, i.e. without fp32 gradient accumulation in bf16)",
        )
    if state["excluded_frozen"]:
        raise UnsupportedError(
            "the checkpoint was saved with exclude_frozen_parameters, and DeepSpeed loads no model that lacks some",
            where=where,
            fix="save it again without that",
        )
    inside = [name for name in (*(record.aliases or ()), *(record.dtypes or ())) if split_name(name) is not None]
    if inside:
        raise UnsupportedError(
            f"experts have tied parameters, or some of another precision than the model's: {inside[0]}",
            where=where,
            fix="export with --to safetensors (weights only)",
        )
    if record.scaler not in ("LossScaler", "DynamicLossScaler"):
        raise UnsupportedError(f"the loss scaler is a {record.scaler}, which is not known", where=where, fix=fix)


def _saved_ep(manifest: Manifest, where: str) -> int:
    sizes = sorted(set(manifest.topology.expert_parallel.values()))
    if len(sizes) > 1:
        raise UnsupportedError(
            f"the MoE layers have several expert-parallel sizes ({', '.join(map(str, sizes))}): DeepSpeed orders the "
            "param groups of several sizes by chance, differently from run to run",
            where=where,
            fix="resume it in a run with one ep_size for all layers and save there; that one can be exported",
        )
    return sizes[0] if sizes else 1


def _other_experts(names: tuple[str, ...], layers: tuple[MoELayer, ...], ep: int) -> list[str]:
    """Returns the names that other ranks' experts have for tensors of rank 0's."""
    counts = {layer.prefix: layer.num_experts for layer in layers}
    found = []
    for name in names:
        parts = split_name(name)
        if parts is not None and parts[0] in counts:
            head, count = name.partition(f".{parts[1]}.{parts[2]}")[0], counts[parts[0]]
            found += [f"{head}.{expert}.{parts[2]}" for expert in range(parts[1], count, count // ep)]
    return found


def _kinds(
    groups: list[NativeGroup], specs: list[TensorSpec], tensors: Mapping[TensorKey, StoredTensor]
) -> tuple[Kinds, ...]:
    """Returns what the optimizer keeps for each group."""
    of: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        if key.kind != WEIGHT:
            of.setdefault(key.fqn, {})[key.kind] = tensor.dtype
    found: list[Kinds | None] = [None] * len(groups)
    for spec in specs:
        assert spec.group is not None
        mine = of[spec.fqn]
        kinds = ((MASTER, mine[MASTER]), *sorted(item for item in mine.items() if item[0] != MASTER))
        if found[spec.group] not in (None, kinds):
            raise FormatError(
                f"{spec.fqn} has other optimizer state than the parameters before it in its group",
                fix="load the checkpoint and save it again",
            )
        found[spec.group] = kinds
    return tuple(kinds or () for kinds in found)
