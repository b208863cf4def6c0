"""A native DeepSpeed checkpoint, read as what it holds: which rank has which interval of which tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moc_ckpt.errors import CheckpointNotFoundError, ConfigError, CorruptionError, FormatError, UnsupportedError
from moc_ckpt.integrations.deepspeed.native_files import MODEL_FILE, expert_file, optimizer_file, read_file
from moc_ckpt.plan.native_groups import expert_name, split_name
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_spec import FlatGroup
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer

__all__ = ["NativeShard", "NativeSource"]

_EXPERT = re.compile(r"^layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt$")
_OTHER_STAGE = re.compile(r"^zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt$")
_MODEL = re.compile(r"^mp_rank_\d+_model_states\.pt$")
# What DeepSpeed puts into the model file; the rest of it is the caller's client_state.
_KNOWN = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "num_experts",
        "ds_autoep_layers",
        "autoep_layers",
        "universal_checkpoint_info",
    }
)
_ASK = "load it in a run of this package with the plugin switched off, then save with it switched on"


class NativeShard(NamedTuple):
    """Elements [start, stop) of a trained parameter, which lie from `at` on in a rank's partition of a group."""

    fqn: str
    group: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class _Group:
    """One param group: names as rank 0 has them, in flat order, with shapes and the gaps behind them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    gaps: tuple[int, ...]
    count: int
    moe: bool


class NativeSource:
    """Reads a native checkpoint of ZeRO stage 1 or 2. Tensors stay on disk until they are used.

    Args:
        folder: the directory of the tag.
        trust: unpickle whatever the files hold.

    Attributes:
        model: the model file.
        world: number of ranks.
        layers: the MoE layers.
        ep: their expert-parallel size; 1 without any.
        stage: ZeRO stage.
        bf16: the optimizer files are those of a bf16 run.
        aliases: further name -> first name of tied parameters.
        weights: dtype and shape of every parameter's weight and every buffer, by full name.
        config: the ds_config that was saved.

    Raises:
        CheckpointNotFoundError: if a file is missing.
        ConfigError: if a file needs trust.
        UnsupportedError: if the checkpoint is of a kind that is not known.
        CorruptionError: if a file cannot be read.
    """

    def __init__(self, folder: Path, *, trust: bool) -> None:
        self.folder, self._trust = folder, trust
        names = self._check_files()
        self.model: dict[str, Any] = read_file(folder / MODEL_FILE, trust=trust)
        self._check_model()
        self.world = int(self.model["dp_world_size"])
        config = self.model.get("ds_config")
        self.config: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
        self.bf16 = optimizer_file(0, bf16=True) in names
        for rank in range(self.world):
            file = optimizer_file(rank, bf16=self.bf16)
            if file not in names:
                raise CheckpointNotFoundError(
                    f"the optimizer state of rank {rank} of {self.world} is missing",
                    where=str(folder / file),
                    fix="import another tag, or restore the file",
                )
        self.layers, experts = self._find_layers(names)
        first = self.optimizer(0)
        self.stage = int(first["zero_stage"])
        self._groups = self._read_groups(first)
        self.ep = self._find_ep()
        first_data = bool(self.config.get("use_data_before_expert_parallelism", False))
        self.parallel = ParallelLayout(self.world, first_data)
        module = self.model["module"]
        shared = self.model.get("shared_params") or {}
        # Parameters without elements share an address, which is not what tying means.
        self.aliases = {alias: name for alias, name in shared.items() if name in module and module[name].numel()}
        self.weights: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (_dtype(value), tuple(value.shape))
            for name, value in module.items()
            if name not in self.aliases and isinstance(value, torch.Tensor)
        } | experts

    # ---- what is there ----

    def _check_files(self) -> set[str]:
        folder = self.folder
        if not folder.is_dir():
            raise CheckpointNotFoundError(
                f"there is no checkpoint {folder.name!r}", where=str(folder.parent), fix="name another tag with --tag"
            )
        names = {item.name for item in folder.iterdir()}
        if "manifest.json" in names:
            raise ConfigError(
                "this is a checkpoint of moc_ckpt already", where=str(folder), fix="load it as it is; nothing to import"
            )
        if any(_OTHER_STAGE.match(name) for name in names):
            raise UnsupportedError("the checkpoint is of ZeRO stage 3", where=str(folder), fix=_ASK)
        if len([name for name in names if _MODEL.match(name)]) > 1:
            raise UnsupportedError("the checkpoint is of tensor-parallel ranks", where=str(folder), fix=_ASK)
        if MODEL_FILE in names and not any(optimizer_file(0, bf16=bf16) in names for bf16 in (True, False)):
            raise UnsupportedError(
                "there is no optimizer state of ZeRO stage 1 or 2 in the checkpoint",
                where=str(folder / optimizer_file(0, bf16=False)),
                fix=_ASK,
            )
        return names

    def _check_model(self) -> None:
        model, where = self.model, str(self.folder / MODEL_FILE)
        if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
            raise UnsupportedError("the model file holds no module (pipeline parallelism?)", where=where, fix=_ASK)
        if not isinstance(model.get("param_shapes"), list) or "dp_world_size" not in model:
            raise UnsupportedError(
                "the model file does not say which parameters the optimizer has, as DeepSpeed's since 0.14 do",
                where=where,
                fix=_ASK,
            )
        if model.get("ds_autoep_layers"):
            raise UnsupportedError("the checkpoint has AutoEP layers", where=where, fix=_ASK)

    def _find_layers(self, names: set[str]) -> tuple[tuple[MoELayer, ...], dict[str, tuple[str, tuple[int, ...]]]]:
        """Returns the MoE layers, and dtype and shape of all experts' tensors."""
        found: dict[int, set[int]] = {}
        for name in names:
            match = _EXPERT.match(name)
            if match:
                found.setdefault(int(match[1]), set()).add(int(match[2]))
        said = self.model.get("num_experts", [])
        counts = [int(count) for count in said] if isinstance(said, list) else [-1]
        if [len(found.get(layer, ())) for layer in range(len(counts))] != counts or len(found) > len(counts):
            raise CheckpointNotFoundError(
                f"the model has {said} experts in its MoE layers, there are files of "
                f"{[len(found[layer]) for layer in sorted(found)]}",
                where=str(self.folder),
                fix="import another tag, or restore the files",
            )
        layers, tensors = [], {}
        for ordinal, count in enumerate(counts):
            prefix = ""
            for expert in range(count):
                for name, value in self.expert(ordinal, expert).items():
                    prefix = prefix or name.partition(EXPERTS_MARK)[0]
                    tensors[name] = (_dtype(value), tuple(value.shape))
            layers.append(MoELayer(ordinal, prefix, count))
        return tuple(layers), tensors

    def _read_groups(self, first: Mapping[str, Any]) -> tuple[_Group, ...]:
        where = str(self.folder / optimizer_file(0, bf16=self.bf16))
        shapes = self.model["param_shapes"]
        options = first["base_optimizer_state"]["param_groups"]
        counts = first["partition_count"]
        gaps = first.get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        if not len(shapes) == len(options) == len(counts) == len(gaps):
            raise FormatError("the files disagree about the number of param groups", where=where, fix=_ASK)
        groups = []
        for group, option, count, gap in zip(shapes, options, counts, gaps, strict=True):
            sizes = tuple(tuple(shape) for shape in group.values())
            groups.append(_Group(tuple(group), sizes, tuple(gap), int(count), bool(option.get("moe"))))
        return tuple(groups)

    def _find_ep(self) -> int:
        sizes = {self.world // group.count for group in self._groups if group.moe and group.names}
        if not self.layers:
            return 1
        if len(sizes) != 1:
            told = ", ".join(map(str, sorted(sizes))) or "none is trained"
            raise UnsupportedError(
                f"the MoE layers do not have one expert-parallel size ({told}): DeepSpeed orders the param groups of "
                "several sizes by chance",
                where=str(self.folder),
                fix=_ASK,
            )
        return sizes.pop()

    # ---- reading ----

    def optimizer(self, rank: int) -> dict[str, Any]:
        """Returns the optimizer state of a rank.

        Raises:
            UnsupportedError: if it is of a kind that is not known.
        """
        path = self.folder / optimizer_file(rank, bf16=self.bf16)
        data = read_file(path, trust=self._trust)
        state: dict[str, Any] = data.get("optimizer_state_dict") or {}
        if "single_partition_of_fp32_groups" not in state or int(state.get("zero_stage", 0)) not in (1, 2):
            raise UnsupportedError("the optimizer state is not that of ZeRO stage 1 or 2", where=str(path), fix=_ASK)
        if not isinstance(state["base_optimizer_state"], dict):
            raise UnsupportedError("the optimizer state was saved with elastic_checkpoint", where=str(path), fix=_ASK)
        return state

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Returns an expert's weights by full name."""
        found: dict[str, torch.Tensor] = read_file(self.folder / expert_file(layer, expert), trust=self._trust)
        return found

    def client_state(self) -> dict[str, Any]:
        """Returns what the caller had saved along."""
        return {name: value for name, value in self.model.items() if name not in _KNOWN}

    # ---- the layout ----

    def trained(self) -> dict[str, int]:
        """Returns the param group of every trained parameter of the model."""
        found = {}
        for index, group in enumerate(self._groups):
            for name in group.names:
                for position in range(self.ep if split_name(name) is not None else 1):
                    found[self._globalise(name, position)] = index
        return found

    def group_names(self, index: int) -> list[str]:
        """Returns the names of a group on rank 0 in the optimizer's order, which dealing round robin changes."""
        group = self._groups[index]
        if not self.round_robin:
            return list(group.names)
        order = sorted(range(len(group.names)), key=lambda place: (place % group.count, place))
        return [name for _, name in sorted(zip(order, group.names, strict=True))]

    @property
    def round_robin(self) -> bool:
        """Tells whether `round_robin_gradients` was on."""
        zero = self.config.get("zero_optimization")
        return bool(zero.get("round_robin_gradients")) if isinstance(zero, Mapping) else False

    @property
    def parameter_alignment(self) -> bool:
        """Tells whether `parameter_alignment` was on."""
        zero = self.config.get("zero_optimization")
        return bool(zero.get("parameter_alignment")) if isinstance(zero, Mapping) else False

    def shards(self, rank: int, state: Mapping[str, Any]) -> Iterator[NativeShard]:
        """Yields what a rank's partitions hold.

        Args:
            rank: the rank.
            state: its optimizer state.

        Raises:
            CorruptionError: if the partitions are not of the size that they must have.
        """
        for index, group in enumerate(self._groups):
            position = self.parallel.expert_position(self.ep, rank) if group.moe else 0
            place = self.parallel.replica_index(self.ep, rank) if group.moe else rank
            master = state["single_partition_of_fp32_groups"][index]
            padding = int(state["group_paddings"][index])
            offset, members = 0, []
            numels = [math.prod(shape) for shape in group.shapes]
            for member, (numel, gap) in enumerate(zip(numels, group.gaps, strict=True)):
                members.append((member, offset))
                offset += numel + gap
            flat = FlatGroup(index, master.numel() + padding, group.count, place, tuple(members))
            if flat.padding(numels) != padding or flat.size * flat.count < offset:
                raise CorruptionError(
                    f"the partition of param group {index} has {flat.size:,} elements, {padding:,} of them padding, "
                    f"which does not fit its {len(numels)} parameters of {offset:,} elements on {flat.count} ranks",
                    where=str(self.folder / optimizer_file(rank, bf16=self.bf16)),
                    fix="the files are not of one checkpoint: import another tag, or restore them",
                )
            for member, start, stop, at in flat.intervals(numels):
                yield NativeShard(self._globalise(group.names[member], position), index, start, stop, at)

    def members(self, rank: int) -> Iterator[tuple[int, list[str]]]:
        """Yields (group, names) of the parameters of which a rank is the first replica, group by group."""
        for index, group in enumerate(self._groups):
            if not group.names or (self.parallel.replica_index(self.ep, rank) if group.moe else rank):
                continue
            position = self.parallel.expert_position(self.ep, rank) if group.moe else 0
            yield index, [self._globalise(name, position) for name in group.names]

    def _globalise(self, name: str, position: int) -> str:
        parts = split_name(name)
        if parts is None:
            return name
        count = next((layer.num_experts for layer in self.layers if layer.prefix == parts[0]), None)
        if count is None:
            raise FormatError(f"{name} lies in an MoE layer of which there are no files", where=str(self.folder))
        return expert_name(parts[0], position * (count // self.ep) + parts[1], parts[2])


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
