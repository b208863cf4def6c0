"""The param groups of a native DeepSpeed checkpoint, for all ranks, out of those that one rank has. Pure.

A checkpoint records the groups as rank 0 has them, which holds the first experts of every MoE layer. What the other
ranks have follows: the same names with their own experts. With another expert-parallel size each rank holds more or
fewer experts, and DeepSpeed splits the groups anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moc_ckpt.errors import FormatError, UnsupportedError
from moc_ckpt.plan.zero_spec import MAX_GROUP_SIZE, TensorSpec
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer

__all__ = ["NativeGroup", "expand_groups", "expert_name", "split_name"]

_KEEP = "keep the expert-parallel size that the checkpoint was saved with (leave out --ep)"


@dataclass(frozen=True, slots=True)
class NativeGroup:
    """One param group as rank 0 has it.

    Attributes:
        names: its parameters, in the group's order.
        options: options that are not training state: name, moe, foreach and the like.
        training: the others, encoded: groups that differ in them were never one.
    """

    names: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    training: bytes = b""

    @property
    def moe(self) -> bool:
        """Tells whether it holds experts."""
        return bool(self.options.get("moe"))


def split_name(name: str) -> tuple[str, int, str] | None:
    """Returns (prefix of the MoE layer, expert, rest of the name); None for a dense tensor."""
    prefix, mark, rest = name.partition(EXPERTS_MARK)
    if not mark:
        return None
    expert, _, tail = rest.partition(".")
    return prefix, int(expert), tail


def expert_name(prefix: str, expert: int, tail: str) -> str:
    """Returns the full name of an expert's tensor; the inverse of `split_name`."""
    return f"{prefix}{EXPERTS_MARK}{expert}.{tail}"


def expand_groups(
    groups: Sequence[NativeGroup],
    layers: Sequence[MoELayer],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    saved_ep: int,
    ep: int,
    frozen_experts: bool = False,
) -> tuple[list[NativeGroup], list[TensorSpec]]:
    """Returns the groups as rank 0 has them at an expert-parallel size, and all tensors in them, of all ranks.

    Args:
        groups: as rank 0 had them at `saved_ep`.
        layers: the MoE layers.
        shapes: of every trained parameter.
        dtypes: of every trained parameter's weight.
        saved_ep: expert-parallel size of all layers when the groups were recorded.
        ep: the size that is wanted.
        frozen_experts: experts have frozen parameters, which count where DeepSpeed splits groups.

    Returns:
        The groups, and the tensors in group order as `zero_spec` describes it.

    Raises:
        FormatError: if the groups do not name exactly the parameters that there are.
        UnsupportedError: if it cannot be told how DeepSpeed would group the parameters at `ep`.
    """
    ordinals = {layer.prefix: layer for layer in layers}
    if ep != saved_ep:
        groups = _regroup(groups, ordinals, shapes, saved_ep, ep, frozen_experts)
    specs: list[TensorSpec] = []
    for index, group in enumerate(groups):
        for name in group.names:
            parts = split_name(name)
            if parts is None:
                specs.append(TensorSpec(name, _of(shapes, name), index, dtype=_of(dtypes, name)))
                continue
            layer = ordinals.get(parts[0])
            if layer is None:
                raise FormatError(f"the recorded groups name {name}, whose MoE layer the checkpoint does not have")
            local = layer.num_experts // ep
            for expert in range(parts[1], layer.num_experts, local):
                fqn = expert_name(parts[0], expert, parts[2])
                specs.append(TensorSpec(fqn, _of(shapes, fqn), index, layer.ordinal, expert, _of(dtypes, fqn)))
    if len({spec.fqn for spec in specs}) != len(specs) or len(specs) != len(shapes):
        raise FormatError(
            f"the recorded groups name {len(specs)} parameters, the checkpoint has {len(shapes)} trained ones",
            fix="load the checkpoint and save it again",
        )
    return list(groups), specs


def _of(table: Mapping[str, Any], name: str) -> Any:
    try:
        return table[name]
    except KeyError:
        raise FormatError(
            f"the recorded groups name {name}, which the checkpoint does not have as a trained parameter",
            fix="load the checkpoint and save it again",
        ) from None


def _regroup(
    groups: Sequence[NativeGroup],
    layers: Mapping[str, MoELayer],
    shapes: Mapping[str, tuple[int, ...]],
    saved_ep: int,
    ep: int,
    frozen_experts: bool,
) -> list[NativeGroup]:
    """Groups the experts of rank 0 as `split_params_into_different_moe_groups_for_optimizer` does."""

    def size(names: Sequence[str]) -> int:
        return sum(math.prod(_of(shapes, name)) for name in names)

    whole: list[NativeGroup] = []
    before: NativeGroup | None = None
    for group in groups:
        # DeepSpeed begins a new group where the next parameter does not fit: such neighbours are one group cut up.
        alike = before is not None and (before.options, before.training) == (group.options, group.training)
        if group.moe and alike and before and size(before.names) + size(group.names[:1]) > MAX_GROUP_SIZE:
            whole[-1] = replace(group, names=(*whole[-1].names, *group.names))
        else:
            whole.append(group)
        before = group
    found: list[NativeGroup] = []
    for group in whole:
        if not group.moe:
            found.append(group)
            continue
        options = {**group.options, "name": f"ep_size_{ep}"}
        names = _widen(group.names, layers, saved_ep, ep)
        if frozen_experts and max(size(names), size(group.names)) > MAX_GROUP_SIZE // 2:
            raise UnsupportedError(
                "experts with frozen parameters are in a param group so large that DeepSpeed may split it, and nobody "
                "knows where",
                where=names[0],
                fix=_KEEP,
            )
        chunk: list[str] = []
        room = MAX_GROUP_SIZE
        for name in names:
            numel = size([name])
            if chunk and numel > room:
                found.append(NativeGroup(tuple(chunk), options))
                chunk, room = [], MAX_GROUP_SIZE
            chunk.append(name)
            room -= numel
        found.append(NativeGroup(tuple(chunk), options))
    return found


def _widen(names: Sequence[str], layers: Mapping[str, MoELayer], saved_ep: int, ep: int) -> list[str]:
    """Replaces the experts of each layer by those that rank 0 holds at another expert-parallel size."""
    found: list[str] = []
    at = 0
    while at < len(names):
        parts = split_name(names[at])
        layer = layers.get(parts[0]) if parts is not None else None
        if parts is None or layer is None:
            raise FormatError(f"the recorded groups have {names[at]} among experts, which it is not one of")
        run = [item for item in map(split_name, names[at:]) if item is not None]
        run = run[: next((i for i, item in enumerate(run) if item[0] != parts[0]), len(run))]
        local = layer.num_experts // saved_ep
        tails = [tail for _, expert, tail in run if expert == 0]
        if [(expert, tail) for _, expert, tail in run] != [(i, tail) for i in range(local) for tail in tails]:
            raise UnsupportedError(
                "the experts of a param group are not in the order of the model, so how another expert-parallel size "
                "would group them is not known",
                where=parts[0],
                fix=_KEEP,
            )
        found += [expert_name(parts[0], i, tail) for i in range(layer.num_experts // ep) for tail in tails]
        at += len(run)
    return found
