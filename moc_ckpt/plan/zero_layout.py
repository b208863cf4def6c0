"""Who owns which interval of the training state, from shapes and topology alone (DESIGN section 3). Pure.

What the catalog reads off a live engine, this computes: the order, padding and partitions of DeepSpeed's
DeepSpeedZeroOptimizer (runtime/zero/stage_1_and_2.py) and BF16_Optimizer (runtime/bf16_optimizer.py), and of its 16-bit
wrappers and plain optimizers, of whose state every rank holds all. tests/distributed/test_zero_layout.py compares the
two. `zero_spec` says how the model is described.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import ConfigError
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_spec import (
    ADAM,
    MAX_GROUP_SIZE,
    FlatGroup,
    Kinds,
    TensorSpec,
    ZeroSettings,
    dtype_bytes,
    split_expert_groups,
)
from moc_ckpt.state.fragment import WEIGHT, itemsize

__all__ = [
    "ADAM",
    "MAX_GROUP_SIZE",
    "FlatGroup",
    "Kinds",
    "LayoutBytes",
    "Owned",
    "ReplicatedBytes",
    "TensorSpec",
    "ZeroSettings",
    "flat_groups",
    "owned_bytes",
    "owned_intervals",
    "split_expert_groups",
]

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

# DeepSpeed's nccl_start_alignment_factor, in elements per rank, and the target of parameter_alignment, in bytes.
_RANK_ALIGNMENT = 2
_PARAMETER_ALIGNMENT = 16
_NOTHING = (np.zeros(0, dtype=np.int64),) * 3


class Owned(NamedTuple):
    """An interval of a logical tensor that a rank holds.

    Attributes:
        fqn: of the tensor.
        kind: state kind.
        dtype: of the interval's elements.
        start: first element in the row-major flattened tensor.
        stop: one past the last element; above start.
        holders: global ranks that hold the same bytes, ascending.
    """

    fqn: str
    kind: str
    dtype: str
    start: int
    stop: int
    holders: tuple[int, ...]


class ReplicatedBytes(NamedTuple):
    """A whole logical tensor that several ranks hold alike, so that one of them must be chosen to write it.

    Attributes:
        fqn: of the tensor.
        kind: state kind.
        nbytes: its bytes.
        holders: index of its ranks in `LayoutBytes.holders`.
        numel: its elements.
        layer: ordinal of its MoE layer; None outside experts.
        expert: global id of its expert; None outside experts.
    """

    fqn: str
    kind: str
    nbytes: int
    holders: int
    numel: int
    layer: int | None
    expert: int | None


@dataclass(frozen=True, slots=True, eq=False)
class LayoutBytes:
    """The bytes of a full checkpoint of the whole world, and who can write them.

    Attributes:
        ownership: everything that one rank alone holds: by expert, and for the rest by rank (`dense`).
        replicated: everything else, in the order of the tensors.
        holders: the sets of ranks that `replicated` refers to, each ascending: all ranks first, then by
            expert-parallel size and EP position.
    """

    ownership: Ownership
    replicated: tuple[ReplicatedBytes, ...]
    holders: tuple[tuple[int, ...], ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        single = int(self.ownership.nbytes.sum()) + int(self.ownership.dense.sum())
        return single + sum(item.nbytes for item in self.replicated)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Tensors as columns, in order; `ep` 0 stands for dense, which is one position with a replica on every rank."""

    index: _Ints
    numel: _Ints
    group: _Ints
    layer: _Ints
    local: _Ints
    itemsize: _Ints
    buffer: _Bools
    ep: _Ints
    position: _Ints
    degree: _Ints

    def take(self, rows: _Ints | _Bools) -> _Table:
        return _Table(*(getattr(self, field.name)[rows] for field in fields(self)))

    def has_state(self) -> _Bools:
        return (self.group >= 0) & (self.numel > 0)


def owned_intervals(
    tensors: Sequence[TensorSpec],
    experts_per_layer: Sequence[int],
    expert_parallel_per_layer: Sequence[int],
    parallel: ParallelLayout,
    settings: ZeroSettings,
    rank: int,
) -> list[Owned]:
    """Returns what one rank holds of a full checkpoint, equal to the entries of its catalog.

    Args:
        tensors: all logical tensors of the model, in group order (see the module's text).
        experts_per_layer: number of experts of each MoE layer, by ordinal.
        expert_parallel_per_layer: expert-parallel size of each MoE layer.
        parallel: the ranks.
        settings: what else decides the layout.
        rank: a global rank.

    Returns:
        The intervals in the order of `tensors`, of replicated and partitioned state alike. As in the catalog every
        replica has a buffer, with the first of them as its only holder, because the logical value is the first's.

    Raises:
        ConfigError: if the arguments contradict each other.
    """
    if not 0 <= rank < parallel.world:
        raise ConfigError(f"rank {rank} does not exist: the world has {parallel.world} ranks")
    table = _read(tensors, experts_per_layer, expert_parallel_per_layer, parallel, settings)
    here, replica = _places_of(table, parallel, rank)
    holders = {(0, 0): tuple(range(parallel.world))}
    for ep in sorted(set(expert_parallel_per_layer)):
        position = parallel.expert_position(ep, rank)
        holders[ep, position] = parallel.expert_replicas(ep, position)
    replica, table = replica[table.position == here], table.take(table.position == here)

    state = table.has_state()
    start, stop = np.zeros_like(table.numel), table.numel.copy()
    if settings.partitioned:
        members = _members(table, settings)
        offset, size = _flat_places(table.take(members), settings)
        low = replica[members] * size - offset
        start[members] = np.clip(low, 0, table.numel[members])
        stop[members] = np.clip(low + size, 0, table.numel[members])

    kinds = {group: settings.kinds_of(group) for group in np.unique(table.group).tolist()}
    found: list[Owned] = []
    for row, index in enumerate(table.index.tolist()):
        spec = tensors[index]
        everyone = holders[int(table.ep[row]), int(table.position[row])]
        if state[row]:
            begin, end = int(start[row]), int(stop[row])
            ranks = (rank,) if settings.partitioned else everyone
            if end > begin:
                each = kinds[int(table.group[row])]
                found += [Owned(spec.fqn, kind, dtype, begin, end, ranks) for kind, dtype in each]
        count = int(table.numel[row])
        if count and (settings.save_weights or not state[row]):
            ranks = everyone[:1] if spec.is_buffer else everyone
            found.append(Owned(spec.fqn, WEIGHT, spec.dtype, 0, count, ranks))
    return found


def flat_groups(
    tensors: Sequence[TensorSpec],
    experts_per_layer: Sequence[int],
    expert_parallel_per_layer: Sequence[int],
    parallel: ParallelLayout,
    settings: ZeroSettings,
    rank: int,
) -> list[FlatGroup]:
    """Returns the flattened param groups of one rank, by ascending group; arguments and errors as `owned_intervals`."""
    table = _read(tensors, experts_per_layer, expert_parallel_per_layer, parallel, settings)
    here, replica = _places_of(table, parallel, rank)
    chosen = (table.position == here) & _members(table, settings)
    replica, table = replica[chosen], table.take(chosen)
    offset, size = _flat_places(table, settings)
    found = []
    for group in np.unique(table.group).tolist():
        rows = np.flatnonzero(table.group == group)
        rows = rows[np.argsort(offset[rows], kind="stable")]
        members = tuple(zip(table.index[rows].tolist(), offset[rows].tolist(), strict=True))
        first = int(rows[0])
        found.append(FlatGroup(group, int(size[first]), int(table.degree[first]), int(replica[first]), members))
    return found


def _places_of(table: _Table, parallel: ParallelLayout, rank: int) -> tuple[_Ints, _Ints]:
    """Returns, by tensor, the expert-parallel position that a rank has for it, and which replica there it is."""
    here, replica = np.zeros_like(table.index), np.full_like(table.index, rank)
    for ep in np.unique(table.ep[table.ep > 0]).tolist():
        rows = table.ep == ep
        here[rows], replica[rows] = parallel.expert_position(ep, rank), parallel.replica_index(ep, rank)
    return here, replica


def owned_bytes(
    tensors: Sequence[TensorSpec],
    experts_per_layer: Sequence[int],
    expert_parallel_per_layer: Sequence[int],
    parallel: ParallelLayout,
    settings: ZeroSettings,
) -> LayoutBytes:
    """Returns the bytes of a full checkpoint over all ranks; arguments and errors as `owned_intervals`."""
    table = _read(tensors, experts_per_layer, expert_parallel_per_layer, parallel, settings)
    width = _state_bytes(table, settings)
    dense = np.zeros(parallel.world, dtype=np.int64)
    blocks: dict[int, tuple[_Ints, _Ints, _Ints]] = {}
    offsets = np.concatenate([[0], np.cumsum(np.array(experts_per_layer, dtype=np.int64))])
    for ep in np.unique(table.ep).tolist():
        rows = np.flatnonzero(table.ep == ep)
        if ep == 0:
            _, replica, nbytes = _pieces(table.take(rows), width[rows], settings)
            np.add.at(dense, replica, nbytes)
            continue
        # Every EP position has the same tensors in almost any model: then one of them stands for all.
        alike = _one_position(table.take(rows), ep)
        rows = rows if alike is None else rows[alike]
        part = table.take(rows)
        row, replica, nbytes = _pieces(part, width[rows], settings)
        columns = _summed(part.layer[row], part.position[row], part.local[row], replica, nbytes)
        positions = np.arange(ep if alike is not None else 1, dtype=np.int64)[:, None]
        layers, position, local, replica, nbytes = columns
        for layer in np.unique(layers).tolist():
            begin, end = np.searchsorted(layers, [layer, layer + 1]).tolist()
            at = position[begin:end] + positions
            unit = offsets[layer] + at * (experts_per_layer[layer] // ep) + local[begin:end]
            ranks = parallel.rank_of(ep, at, np.broadcast_to(replica[begin:end], at.shape))
            blocks[layer] = (unit.ravel(), ranks.ravel(), np.broadcast_to(nbytes[begin:end], at.shape).ravel())
    ordered = [blocks[layer] for layer in sorted(blocks)]
    # Sorted by (unit, rank) already: by layer, then position, local expert and replica.
    unit, ranks, nbytes = (np.concatenate([block[column] for block in [_NOTHING, *ordered]]) for column in range(3))
    ownership = Ownership(tuple(map(int, experts_per_layer)), parallel.world, unit, ranks, nbytes, dense)
    replicated = _replicated(tensors, table, settings, expert_parallel_per_layer)
    return LayoutBytes(ownership, replicated, _holders(parallel, expert_parallel_per_layer) if replicated else ())


def _read(
    tensors: Sequence[TensorSpec],
    experts: Sequence[int],
    eps: Sequence[int],
    parallel: ParallelLayout,
    settings: ZeroSettings,
) -> _Table:
    """Turns the tensors into columns and refuses what contradicts itself."""
    if len(experts) != len(eps):
        raise ConfigError(f"{len(experts)} MoE layers have experts, {len(eps)} have an expert-parallel size")
    for layer, (count, ep) in enumerate(zip(experts, eps, strict=True)):
        parallel.replicas(ep)
        if count < 1 or count % ep:
            raise ConfigError(
                f"expert-parallel size {ep} does not divide the {count} experts of MoE layer {layer}",
                fix="choose an expert-parallel size that divides the number of experts of every layer",
            )
    sizes = {dtype: dtype_bytes(dtype, "the dtype of a tensor") for dtype in {spec.dtype for spec in tensors}}

    def column(values: Iterable[int | None]) -> _Ints:
        # None is -1, and what is negative and must not be, -2.
        return np.array([-1 if value is None else value if value >= 0 else -2 for value in values], dtype=np.int64)

    numel = column(math.prod(spec.shape) if min(spec.shape, default=0) >= 0 else -2 for spec in tensors)
    group = column(spec.group for spec in tensors)
    layer_of = column(spec.layer for spec in tensors)
    expert = column(spec.expert for spec in tensors)
    buffer = np.array([spec.is_buffer for spec in tensors], dtype=bool)

    def refuse(bad: _Bools, what: str) -> None:
        if bad.any():
            names = [tensors[int(row)].fqn for row in np.flatnonzero(bad)[:3]]
            raise ConfigError(what, where=", ".join(names), fix="correct the description of the model")

    if len({spec.fqn for spec in tensors}) != len(tensors):
        _, first = np.unique([spec.fqn for spec in tensors], return_index=True)
        refuse(~np.isin(np.arange(len(tensors)), first), "a tensor is described twice")
    refuse(np.minimum.reduce([numel, group, layer_of, expert]) == -2, "a size, group, layer or expert is negative")
    refuse(buffer & (group >= 0), "a buffer is in a param group")
    refuse((layer_of < 0) != (expert < 0), "a tensor has an MoE layer but no expert, or an expert but no layer")
    refuse(layer_of >= len(experts), f"the MoE layer does not exist: there are {len(experts)}")
    # Dense is one more layer, with one expert on every rank.
    counts, parallels = column([*experts, 1]), column([*eps, 1])
    inside = layer_of >= 0
    refuse(inside & (expert >= counts[layer_of]), "the expert does not exist in its MoE layer")
    local = counts[layer_of] // parallels[layer_of]
    table = _Table(
        index=np.arange(len(tensors), dtype=np.int64),
        numel=numel,
        group=group,
        layer=layer_of,
        local=np.where(inside, expert % local, 0),
        itemsize=column([sizes[spec.dtype] for spec in tensors]),
        buffer=buffer,
        ep=np.where(inside, parallels[layer_of], 0),
        position=np.where(inside, expert // local, 0),
        degree=parallel.world // parallels[layer_of],
    )
    if settings.partitioned:
        # In pairs of (group, expert-parallel size) no group occurs twice.
        base = int(max(eps, default=0)) + 1
        known = np.unique(group[group >= 0] * base + table.ep[group >= 0]) // base
        mixed = np.isin(group, known[1:][known[1:] == known[:-1]])
        refuse(mixed, "a param group mixes dense tensors and experts, or experts of several expert-parallel sizes")
    return table


def _members(table: _Table, settings: ZeroSettings) -> _Bools:
    return (table.group >= 0) if settings.empty_in_groups else table.has_state()


def _flat_places(table: _Table, settings: ZeroSettings) -> tuple[_Ints, _Ints]:
    """Returns where each tensor begins in its flattened group, and the size of a partition of that group, in elements.

    Args:
        table: the tensors that lie in flat groups; one group at one position makes one flat tensor.
        settings: what else decides the layout.
    """
    offset, size = np.zeros_like(table.numel), np.zeros_like(table.numel)
    if not len(offset):
        return offset, size
    order = np.lexsort((table.position, table.group))
    group, position = table.group[order], table.position[order]
    begins = np.concatenate([[True], (group[1:] != group[:-1]) | (position[1:] != position[:-1])])
    first = np.flatnonzero(begins)
    flat = np.cumsum(begins) - 1
    degree = table.degree[order][first]
    # DeepSpeed takes the element size of the group's first parameter.
    unit = np.ones_like(first)
    if settings.parameter_alignment and not settings.bf16_optimizer:
        unit = _PARAMETER_ALIGNMENT // np.gcd(_PARAMETER_ALIGNMENT, table.itemsize[order][first])
    if settings.round_robin and not settings.bf16_optimizer:
        place = np.arange(len(order)) - first[flat]
        order = order[np.lexsort((place, place % degree[flat], flat))]
    numel = table.numel[order]
    padded = -(-numel // unit[flat]) * unit[flat]
    before = np.cumsum(padded) - padded
    begin = before - before[first][flat]
    final = np.append(first[1:], len(order)) - 1
    # The last tensor has no gap of its own; then the whole is padded so that it splits evenly.
    chunk = degree * _RANK_ALIGNMENT
    total = -(-(begin[final] + numel[final]) // chunk) * chunk
    offset[order], size[order] = begin, (total // degree)[flat]
    return offset, size


def _state_bytes(table: _Table, settings: ZeroSettings) -> _Ints:
    """Returns the bytes of optimizer state per element of each tensor; 0 where there is none."""
    known, place = np.unique(table.group, return_inverse=True)
    each = [
        sum(itemsize(dtype) for _, dtype in settings.kinds_of(group)) if group >= 0 else 0 for group in known.tolist()
    ]
    return np.array(each, dtype=np.int64)[place] if each else np.zeros(0, dtype=np.int64)


def _alone(table: _Table) -> _Bools:
    """Tells which tensors one rank writes even if they are not partitioned: the first replica of them."""
    return table.buffer | (table.degree == 1)


def _pieces(table: _Table, width: _Ints, settings: ZeroSettings) -> tuple[_Ints, _Ints, _Ints]:
    """Returns (row, replica index, bytes) of everything that one rank alone holds."""
    state = table.has_state()
    weighs = ~state | settings.save_weights
    whole = np.where(_alone(table) & weighs, table.numel * table.itemsize, 0)
    if not settings.partitioned:
        whole += np.where(_alone(table) & state, table.numel * width, 0)
    single = np.flatnonzero(whole)
    found = [(single, np.zeros_like(single), whole[single])]
    if settings.partitioned:
        members = np.flatnonzero(_members(table, settings))
        offset, size = _flat_places(table.take(members), settings)
        filled = table.numel[members] > 0
        members, offset, size = members[filled], offset[filled], size[filled]
        end = offset + table.numel[members]
        first = offset // size
        count = (end - 1) // size - first + 1
        which = np.repeat(np.arange(len(members)), count)
        replica = np.arange(len(which)) - np.repeat(np.cumsum(count) - count - first, count)
        low = replica * size[which]
        numel = np.minimum(end[which], low + size[which]) - np.maximum(offset[which], low)
        found.append((members[which], replica, numel * width[members][which]))
    row, replica, nbytes = (np.concatenate([part[i] for part in found]) for i in range(3))
    return row, replica, nbytes


def _one_position(table: _Table, ep: int) -> _Ints | None:
    """Returns the rows of EP position 0 if all positions have the same tensors, else None."""
    count, rest = divmod(len(table.numel), ep)
    order = np.argsort(table.position, kind="stable")
    if rest or not np.array_equal(table.position[order], np.repeat(np.arange(ep), count)):
        return None
    for column in (table.numel, table.group, table.layer, table.local, table.itemsize, table.buffer):
        rows = column[order].reshape(ep, count)
        if not (rows == rows[0]).all():
            return None
    return order[:count]


def _summed(
    layer: _Ints, position: _Ints, local: _Ints, replica: _Ints, nbytes: _Ints
) -> tuple[_Ints, _Ints, _Ints, _Ints, _Ints]:
    """Adds up the bytes of equal (layer, position, local, replica); returns the columns sorted by them."""
    shape = tuple(int(column.max(initial=0)) + 1 for column in (layer, position, local, replica))
    keys = np.ravel_multi_index((layer, position, local, replica), shape)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    sums = np.add.reduceat(nbytes[order], first) if len(first) else nbytes[:0]
    columns = np.unravel_index(keys[first], shape)
    return columns[0], columns[1], columns[2], columns[3], sums


def _replicated(
    tensors: Sequence[TensorSpec], table: _Table, settings: ZeroSettings, eps: Sequence[int]
) -> tuple[ReplicatedBytes, ...]:
    starts, begin = {0: 0}, 1
    for ep in sorted(set(eps)):
        starts[ep], begin = begin, begin + ep
    state = table.has_state()
    stated = state & (not settings.partitioned)
    weighs = ~state | settings.save_weights
    rows = np.flatnonzero(~_alone(table) & (table.numel > 0) & (stated | weighs))
    kinds = {group: settings.kinds_of(group) for group in np.unique(table.group).tolist()}
    widths = {group: [(kind, itemsize(dtype)) for kind, dtype in each] for group, each in kinds.items()}
    columns = (rows, stated[rows], weighs[rows], *(getattr(table, name)[rows] for name in _REPLICATED))
    found: list[ReplicatedBytes] = []
    for row, has_state, weighed, numel, group, size, ep, position in zip(*(c.tolist() for c in columns), strict=True):
        spec, at = tensors[row], starts[ep] + position
        if has_state:
            for kind, width in widths[group]:
                found.append(ReplicatedBytes(spec.fqn, kind, numel * width, at, numel, spec.layer, spec.expert))
        if weighed:
            found.append(ReplicatedBytes(spec.fqn, WEIGHT, numel * size, at, numel, spec.layer, spec.expert))
    return tuple(found)


_REPLICATED = ("numel", "group", "itemsize", "ep", "position")


def _holders(parallel: ParallelLayout, eps: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    experts = (parallel.expert_replicas(ep, position) for ep in sorted(set(eps)) for position in range(ep))
    return (tuple(range(parallel.world)), *experts)
