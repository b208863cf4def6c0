"""The catalog: the fragments of one rank, with views on its live tensors (DESIGN section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.state.fragment import MASTER, WEIGHT, Fragment, TensorKey
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer, UnitMap

__all__ = ["Catalog", "Entry", "ParamShard", "StateGroup", "WeightTensor", "build_catalog", "dtype_name"]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the dtype's name without its `torch.` prefix."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class StateGroup:
    """One param group of the optimizer that does the update.

    Attributes:
        options: the live param_group dict (`lr`, `betas`, …; its `params` are `keys` below).
        keys: tensors under which the optimizer keeps its state: one flat partition, or one per parameter.
    """

    options: dict[str, Any]
    keys: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class ParamShard:
    """The part of one trainable parameter whose optimizer state this rank holds.

    Attributes:
        fqn: full name with global expert id.
        param: the model's parameter, whole, on its device and in its own dtype.
        start: first element of the part in the row-major flattened parameter; `start == stop` where this rank
            holds nothing of it.
        stop: one past the last element.
        master: 1-D view of the master copy of the part, `stop - start` elements.
        group: index into the optimizer's param groups.
        state_key: tensor under which the optimizer keeps the state that covers the part.
        state_offset: first element of the part in the flattened state tensors of `state_key`.
        holders: global ranks that hold identical bytes of this part, ascending.
        replicas: global ranks that hold the whole parameter in the model, ascending.
    """

    fqn: str
    param: torch.Tensor
    start: int
    stop: int
    master: torch.Tensor
    group: int
    state_key: torch.Tensor
    state_offset: int
    holders: tuple[int, ...]
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightTensor:
    """State that no optimizer holds: a frozen or empty parameter, or a persistent buffer.

    Attributes:
        fqn: full name with global expert id.
        tensor: the live tensor.
        is_buffer: buffers may differ between ranks and change in forward; parameters do neither.
        replicas: global ranks that hold it, ascending.
    """

    fqn: str
    tensor: torch.Tensor
    is_buffer: bool
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A fragment and the live tensor that holds it.

    Attributes:
        fragment: the layout-free address.
        unit: the unit it belongs to.
        tensor: 1-D contiguous live view of exactly the fragment, or, for a whole tensor that is not
            contiguous in memory, the live tensor itself.
        holders: global ranks that hold identical bytes, ascending. One of them writes them.
        frozen: a dense parameter without gradient, which `exclude_frozen_parameters` leaves out. DeepSpeed always
            writes experts.
    """

    fragment: Fragment
    unit: str
    tensor: torch.Tensor
    holders: tuple[int, ...]
    frozen: bool = False

    def flat(self) -> torch.Tensor:
        """Returns the bytes as a 1-D contiguous tensor: a view where memory allows, else a copy."""
        return self.tensor.detach().reshape(-1)

    def load(self, values: torch.Tensor) -> None:
        """Overwrites the live tensor with 1-D `values`, cast to its dtype."""
        with torch.no_grad():
            self.tensor.copy_(values.view(self.tensor.shape))


@dataclass(frozen=True)
class Catalog:
    """All fragments that one rank holds.

    Attributes:
        rank: this rank.
        entries: the fragments, each with its live tensor.
        shards: where the optimizer state of each trainable parameter lies.
        weights: frozen parameters and buffers.
        groups: the optimizer's param groups.
        layers: the model's MoE layers.
        declared: logical tensors that this rank vouches a complete checkpoint must hold: those of which it is
            the first replica. Over all ranks each logical tensor is declared once.
        moment_kinds: kinds of elementwise optimizer state with their dtypes, per param group.
    """

    rank: int
    entries: tuple[Entry, ...]
    shards: tuple[ParamShard, ...]
    weights: tuple[WeightTensor, ...]
    groups: tuple[StateGroup, ...]
    layers: tuple[MoELayer, ...]
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]]
    moment_kinds: tuple[Mapping[str, str], ...]

    def buffers(self) -> list[WeightTensor]:
        """Returns the persistent buffers."""
        return [item for item in self.weights if item.is_buffer]


def build_catalog(
    *,
    rank: int,
    shards: Sequence[ParamShard],
    weights: Sequence[WeightTensor],
    groups: Sequence[StateGroup],
    state_of: Callable[[torch.Tensor], Mapping[str, Any]],
    layers: Sequence[MoELayer],
    stored_weights: Iterable[str] = (),
) -> Catalog:
    """Builds the catalog of this rank. Not collective.

    Args:
        rank: this rank.
        shards: the trainable parameters of this rank's model.
        weights: its other parameters and its persistent buffers.
        groups: the optimizer's param groups.
        state_of: returns the optimizer's (materialised) state under a key.
        layers: the MoE layers.
        stored_weights: fqns of trainable parameters whose weights are stored too, because they cannot be derived
            from the master or because the configuration asks for it. Equal on all ranks.

    Raises:
        UnsupportedError: if the optimizer keeps state that is neither scalar nor elementwise.
    """
    units = UnitMap(layers)
    moment_kinds = tuple(_moment_kinds(group, state_of) for group in groups)
    stored = set(stored_weights)
    entries: list[Entry] = []
    declared: dict[TensorKey, tuple[str, tuple[int, ...]]] = {}

    def declare(fqn: str, kind: str, dtype: str, shape: tuple[int, ...], replicas: tuple[int, ...]) -> None:
        if replicas[0] == rank:
            declared[TensorKey(fqn, kind)] = (dtype, shape)

    for shard in shards:
        shape = tuple(shard.param.shape)
        unit = units.unit_of(shard.fqn)
        kinds = moment_kinds[shard.group]
        master_dtype = dtype_name(shard.master.dtype)
        declare(shard.fqn, MASTER, master_dtype, shape, shard.replicas)
        for kind, dtype in kinds.items():
            declare(shard.fqn, kind, dtype, shape, shard.replicas)
        if shard.fqn in stored:
            dtype = dtype_name(shard.param.dtype)
            declare(shard.fqn, WEIGHT, dtype, shape, shard.replicas)
            whole = Fragment(shard.fqn, WEIGHT, dtype, shape, 0, shard.param.numel())
            entries.append(Entry(whole, unit, _live(shard.param), shard.replicas))
        if shard.start == shard.stop:
            continue
        fragment = Fragment(shard.fqn, MASTER, master_dtype, shape, shard.start, shard.stop)
        entries.append(Entry(fragment, unit, shard.master, shard.holders))
        state = state_of(shard.state_key)
        for kind, dtype in kinds.items():
            fragment = Fragment(shard.fqn, kind, dtype, shape, shard.start, shard.stop)
            view = state[kind].detach().view(-1).narrow(0, shard.state_offset, shard.stop - shard.start)
            entries.append(Entry(fragment, unit, view, shard.holders))

    for item in weights:
        shape, dtype = tuple(item.tensor.shape), dtype_name(item.tensor.dtype)
        declare(item.fqn, WEIGHT, dtype, shape, item.replicas)
        if item.tensor.numel():
            fragment = Fragment(item.fqn, WEIGHT, dtype, shape, 0, item.tensor.numel())
            # Buffers may differ between replicas; the logical value is the first replica's, as in DeepSpeed.
            holders = item.replicas[:1] if item.is_buffer else item.replicas
            dense = EXPERTS_MARK not in item.fqn
            frozen = dense and not item.is_buffer and not item.tensor.requires_grad
            entries.append(Entry(fragment, units.unit_of(item.fqn), _live(item.tensor), holders, frozen))

    return Catalog(
        rank=rank,
        entries=tuple(entries),
        shards=tuple(shards),
        weights=tuple(weights),
        groups=tuple(groups),
        layers=tuple(layers),
        declared=declared,
        moment_kinds=moment_kinds,
    )


def _live(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def _moment_kinds(group: StateGroup, state_of: Callable[[torch.Tensor], Mapping[str, Any]]) -> dict[str, str]:
    """Returns the elementwise state kinds of a group and their dtypes; scalars are handled in scalars.py."""
    kinds: dict[str, str] = {}
    for key in group.keys:
        for name, value in state_of(key).items():
            if not isinstance(value, torch.Tensor) or value.numel() <= 1 < key.numel() or value.dim() == 0:
                continue
            if value.numel() != key.numel():
                raise UnsupportedError(
                    f"the optimizer keeps {name!r} of shape {tuple(value.shape)} for a tensor of "
                    f"{key.numel()} elements; only scalar and elementwise state can be saved layout-free",
                    fix="use an optimizer with elementwise state, such as AdamW",
                )
            kinds[name] = dtype_name(value.dtype)
    return dict(sorted(kinds.items()))
