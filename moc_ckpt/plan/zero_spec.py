"""What the layout model needs to know of a model and of DeepSpeed's settings. Pure.

Group order: `TensorSpec.group` only tells groups apart, so any numbering does. What counts is the order of the tensors
that one rank has in one group: it must be that of the rank's `param_groups[i]["params"]`, as given to the optimizer.
Where groups are filled from `model.named_parameters()`, that is the order of named_parameters, with all experts of a
layer, ascending, in place of those of one rank; `split_expert_groups` makes the groups of the experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moc_ckpt.errors import ConfigError, UnsupportedError
from moc_ckpt.state.fragment import EXP_AVG, EXP_AVG_SQ, MASTER, itemsize

__all__ = [
    "ADAM",
    "MAX_GROUP_SIZE",
    "FlatGroup",
    "Kinds",
    "TensorSpec",
    "ZeroSettings",
    "dtype_bytes",
    "split_expert_groups",
]

Kinds = tuple[tuple[str, str], ...]
"""Kinds of optimizer state, each with its dtype."""

ADAM: Kinds = ((MASTER, "float32"), (EXP_AVG, "float32"), (EXP_AVG_SQ, "float32"))
MAX_GROUP_SIZE = 178_956_971
"""Elements of one rank's experts above which DeepSpeed starts a new group (the default of its `max_group_size`)."""

_FLOAT32 = ("fp32", "float32", "float", "torch.float32", "torch.float")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical parameter or persistent buffer.

    Attributes:
        fqn: name with global expert id. Tied parameters appear once, under the first name.
        shape: of the whole tensor, in elements.
        group: the optimizer's param group (see the module's text); None where the optimizer keeps no state: a
            frozen parameter, a buffer. An empty parameter may have one.
        layer: ordinal of its MoE layer; None outside experts.
        expert: GLOBAL id of its expert; None outside experts.
        dtype: of the weight itself, as DeepSpeed casts it.
        is_buffer: a persistent buffer.
        frozen: a parameter without gradient. With a group it has state all the same (DeepSpeed 0.17, fp16, stage 0).
    """

    fqn: str
    shape: tuple[int, ...]
    group: int | None
    layer: int | None = None
    expert: int | None = None
    dtype: str = "float32"
    is_buffer: bool = False
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """What else decides the layout.

    Attributes:
        stage: ZeRO stage: 0, 1 or 2.
        bf16_optimizer: BF16_Optimizer holds the state (stage 1, bf16, fp32 gradient accumulation, no offload; in
            DeepSpeed 0.17 also stage 0 with bf16). It knows neither of the next two.
        round_robin: `round_robin_gradients`.
        parameter_alignment: `zero_optimization.parameter_alignment`.
        kinds: state kinds with their dtypes, `master` included.
        group_kinds: (group, kinds) of groups whose optimizer keeps other kinds, e.g. SGD without momentum.
        save_weights: all weights are saved too (`"save_weights": "sharded"`).
        empty_in_groups: round robin counts parameters without elements, as DeepSpeed 0.17 does.

    Raises:
        UnsupportedError: if the stage is another one.
        ConfigError: if a dtype is not known, or there is no master.
    """

    stage: int
    bf16_optimizer: bool = False
    round_robin: bool = False
    parameter_alignment: bool = False
    kinds: Kinds = ADAM
    group_kinds: tuple[tuple[int, Kinds], ...] = ()
    save_weights: bool = False
    empty_in_groups: bool = False

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2):
            raise UnsupportedError(
                f"the layout of ZeRO stage {self.stage} is not known to moc_ckpt", fix="known: stages 0, 1 and 2"
            )
        for kinds in (self.kinds, *(kinds for _, kinds in self.group_kinds)):
            if MASTER not in dict(kinds):
                raise ConfigError(f"no master among the state kinds {[kind for kind, _ in kinds]}")
            for kind, dtype in kinds:
                dtype_bytes(dtype, kind)

    @property
    def partitioned(self) -> bool:
        """Tells whether each rank holds a part of the optimizer's state rather than all of it."""
        return self.stage > 0 or self.bf16_optimizer

    def kinds_of(self, group: int) -> Kinds:
        """Returns the state kinds of a param group."""
        return dict(self.group_kinds).get(group, self.kinds)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], kinds: Kinds | None = None) -> ZeroSettings:
        """Reads a ds_config, as DeepSpeed does when it chooses the optimizer's wrapper.

        Args:
            config: the ds_config, with the `moc_checkpoint` section if there is one.
            kinds: what the optimizer keeps. None means Adam's, in the dtypes that the configuration asks for.

        Raises:
            UnsupportedError: if the stage is not 0, 1 or 2.
            ConfigError: if `kinds` is None and the configuration names an optimizer other than Adam.
        """
        zero, bf16 = _section(config, "zero_optimization"), _section(config, "bf16") or _section(config, "bfloat16")
        # `"zero_optimization": true` is an old way to say stage 1.
        stage = int(zero.get("stage", config.get("zero_optimization") is True))
        offload = bool(zero.get("cpu_offload")) or _section(zero, "offload_optimizer").get("device") == "cpu"
        wide = str(_section(config, "data_types").get("grad_accum_dtype")) in _FLOAT32
        return cls(
            stage=stage,
            bf16_optimizer=bool(bf16.get("enabled")) and wide and stage == 1 and not offload,
            round_robin=bool(zero.get("round_robin_gradients")),
            parameter_alignment=bool(zero.get("parameter_alignment")),
            kinds=_adam_kinds(config, bf16) if kinds is None else kinds,
            save_weights=_section(config, "moc_checkpoint").get("save_weights") == "sharded",
        )


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """One param group as one rank has it: a flat tensor, of which the ranks that share it own equal partitions.

    Attributes:
        group: the param group.
        size: elements of one partition.
        count: number of partitions.
        index: the partition that the rank owns.
        members: (position of a tensor in the sequence that was given, its first element in the flat tensor), ascending.
    """

    group: int
    size: int
    count: int
    index: int
    members: tuple[tuple[int, int], ...]

    def intervals(self, numels: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Returns what the rank owns: (member, first element, one past the last, where it begins in the partition).

        Args:
            numels: elements of every tensor in the sequence that was given.
        """
        low, high = self.index * self.size, (self.index + 1) * self.size
        found = []
        for member, offset in self.members:
            start, stop = max(low, offset), min(high, offset + numels[member])
            if start < stop:
                found.append((member, start - offset, stop - offset, start - low))
        return found

    def padding(self, numels: Sequence[int]) -> int:
        """Returns the elements at the end of the rank's partition that belong to no tensor."""
        member, offset = self.members[-1]
        return min(max((self.index + 1) * self.size - offset - numels[member], 0), self.size)

    def gaps(self, numels: Sequence[int]) -> list[int]:
        """Returns the elements of alignment behind each member; there are none behind the last."""
        ends = [offset + numels[member] for member, offset in self.members]
        starts = [offset for _, offset in self.members[1:]]
        return [start - end for end, start in zip(ends, starts, strict=False)] + [0]


def split_expert_groups(
    tensors: Sequence[TensorSpec],
    experts_per_layer: Sequence[int],
    expert_parallel_per_layer: Sequence[int],
    *,
    names: Sequence[str] = (),
    max_group_size: int | None = MAX_GROUP_SIZE,
) -> tuple[TensorSpec, ...]:
    """Moves experts to groups of their own, as DeepSpeed's `split_params_into_different_moe_groups_for_optimizer`.

    Args:
        tensors: the tensors, with the group that the user put each parameter in, frozen ones included (they count
            towards the size); in group order.
        experts_per_layer: number of experts of each MoE layer, by ordinal.
        expert_parallel_per_layer: expert-parallel size of each MoE layer.
        names: names of the user's groups; DeepSpeed puts the experts of groups of one name together. Empty: all differ.
        max_group_size: elements on one rank above which a new group begins; None: never.

    Returns:
        The tensors in the order and with the groups that `owned_intervals` wants; frozen ones without a group.
    """
    last = max((spec.group for spec in tensors if spec.group is not None), default=-1)
    filled: dict[tuple[object, int, int], tuple[int, int]] = {}
    groups: dict[tuple[object, int, int], int] = {}
    found = []
    for spec in sorted(tensors, key=lambda spec: last + 1 if spec.group is None else spec.group):
        group = spec.group
        if group is not None and spec.layer is not None and spec.expert is not None:
            ep = expert_parallel_per_layer[spec.layer]
            user = names[group] if names else group
            place = (user, ep, spec.expert // (experts_per_layer[spec.layer] // ep))
            chunk, size = filled.get(place, (0, 0))
            numel = math.prod(spec.shape)
            if max_group_size is not None and size + numel > max_group_size:
                chunk, size = chunk + 1, 0
            filled[place] = (chunk, size + numel)
            group = groups.setdefault((user, ep, chunk), last + 1 + len(groups))
        group = None if spec.frozen else group
        found.append(
            TensorSpec(spec.fqn, spec.shape, group, spec.layer, spec.expert, spec.dtype, spec.is_buffer, spec.frozen)
        )
    return tuple(found)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _adam_kinds(config: Mapping[str, Any], bf16: Mapping[str, Any]) -> Kinds:
    optimizer = _section(config, "optimizer")
    if str(optimizer.get("type", "adam")).lower() not in ("adam", "adamw"):
        raise ConfigError(
            f"the state of optimizer {optimizer['type']!r} is not known to moc_ckpt",
            where="ds_config, optimizer.type",
            fix="pass the kinds of state that it keeps",
        )
    master = moments = "float32"
    if bf16.get("bf16_master_weights_and_grads"):
        master = "bfloat16"
    elif _section(config, "fp16").get("fp16_master_weights_and_grads"):
        master = "float16"
    if bf16.get("bf16_optimizer_states") or _section(optimizer, "params").get("fp32_optimizer_states") is False:
        moments = master
    return ((MASTER, master), (EXP_AVG, moments), (EXP_AVG_SQ, moments))


def dtype_bytes(dtype: str, where: str) -> int:
    """Returns the bytes of one element; ConfigError, with `where`, if the dtype is not known."""
    try:
        return itemsize(dtype)
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None
