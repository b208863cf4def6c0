"""Sharding of state that several ranks hold alike (DESIGN section 7). Pure.

Such state (stage 0, frozen parameters, buffers, `save_weights: "sharded"`, experts over their expert-data-parallel
replicas) is written once, split over the ranks that hold it. State that ZeRO partitioned is written by its owner and
only counts here as load. Every function is a pure function of its arguments, whatever the order of the items, so that
every rank finds the same; all may be called from any thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import CoverageError
from moc_ckpt.state.fragment import TensorKey
from moc_ckpt.state.unit import EXPERTS_MARK

__all__ = [
    "CUT_ELEMENTS",
    "MIN_PIECE_BYTES",
    "Loads",
    "Replicated",
    "Share",
    "plan_shares",
    "sharding_lower_bound",
    "share_loads",
]

_Ints = npt.NDArray[np.int64]
Loads = Mapping[int, int] | Sequence[int] | _Ints

# Tensors are cut at multiples of it. With the narrowest dtype that is 64 bytes: a cache line, and the alignment of
# fragments in packs, so a piece begins as aligned as a tensor does and no gap follows it.
CUT_ELEMENTS = 64

# No piece of a cut tensor is smaller. There is at most about one more piece per rank, so this only keeps out slivers. A
# piece costs 200 bytes in the manifest, 0.3 % of 64 KiB, and 10 us to issue its copy. A larger floor would cost balance
# where each rank writes a few MiB: an expert of 100 MB over 64 replicas.
MIN_PIECE_BYTES = 64 * 1024


class Replicated(NamedTuple):
    """A logical tensor that several ranks hold alike.

    Attributes:
        key: which tensor.
        nbytes: its size in bytes, all of it.
        holders: global ranks that hold it, ascending. Tensors of one group should share one tuple: a tuple of 10,000
            ranks takes 0.1 ms to compare.
        numel: its elements; needed to cut it (`plan_shares`).
    """

    key: TensorKey
    nbytes: int
    holders: tuple[int, ...]
    numel: int = 0


class Share(NamedTuple):
    """An interval of a logical tensor and who writes it.

    Attributes:
        start: first element in the row-major flattened tensor.
        stop: one past the last element.
        writer: global rank.
    """

    start: int
    stop: int
    writer: int


@dataclass(frozen=True, slots=True)
class _Problem:
    """Items in canonical order, their holder sets, and what ranks write anyway.

    Attributes:
        items: ascending by key.
        sets: the distinct holder sets, ascending by size, so that subsets come before supersets.
        group: [items] index of each item's holder set.
        load: [ranks] bytes, for all ranks that are a holder or have a load.
    """

    items: list[Replicated]
    sets: list[tuple[int, ...]]
    group: list[int]
    load: _Ints

    @property
    def members(self) -> list[list[int]]:
        """The items of each holder set, ascending."""
        found: list[list[int]] = [[] for _ in self.sets]
        for index, group in enumerate(self.group):
            found[group].append(index)
        return found

    @property
    def volumes(self) -> list[int]:
        """The bytes of each holder set's items."""
        return [sum(self.items[index].nbytes for index in members) for members in self.members]


# start, stop, writer of each piece of each item.
_Pieces = list[list[tuple[int, int, int]]]


def plan_shares(
    items: Iterable[Replicated],
    loads: Loads,
    *,
    mode: Literal["adaptive", "equal"],
    min_piece_bytes: int = MIN_PIECE_BYTES,
) -> dict[TensorKey, tuple[Share, ...]]:
    """Splits replicated tensors over their holders.

    The shares of a tensor are not empty, ascend, and cover its elements exactly once; a tensor without elements has
    none. Tensors are cut at multiples of `CUT_ELEMENTS` elements; a tensor below twice `min_piece_bytes` stays whole.
    Below, F is `min_piece_bytes`, rounded up to whole multiples of `CUT_ELEMENTS` elements.

    `adaptive`: largest first onto the least loaded holder, and what does not fit below the level that the ranks of the
    set must reach anyway is cut. The most loaded rank is never above that of whole tensors dealt out in the same way,
    and no tensor is cut unless it is below. Where any two holder sets are disjoint or nested, as process groups are, it
    is less than 2 F above `sharding_lower_bound`, which is then the optimum with arbitrary cuts. A rank writes at most
    one piece of a tensor.

    `equal` (MoC-System, arXiv 2408.04307, section 4): each expert is split evenly over its holders, so that its
    replicas share it evenly whatever PEC selects; dense tensors are split evenly as one sequence per holder set.
    `loads` are ignored. A rank's pieces are a contiguous run of tensors in the order of their keys; n holders cut at
    most n - 1 times per expert, and for the dense tensors. Let G, below 2 F, be the largest distance between two
    neighbouring places where a tensor may be cut. Then, to one byte, a rank's part of a set's first sequence is within
    G of the even share, and what two ranks write of the whole set differs by at most 2 G: later sequences make up for
    the roundings of earlier ones.

    Args:
        items: the replicated tensors, each once, with `numel`.
        loads: bytes that each rank writes anyway (what ZeRO partitioned, what PEC put there); ranks that a mapping
            leaves out have 0.
        mode: as above.
        min_piece_bytes: the smallest piece of a cut tensor, in bytes.

    Returns:
        The shares of each tensor.

    Raises:
        CoverageError: if a tensor is named twice, so that it would be written twice.
        ValueError: for bad sizes, holders, loads or mode.
    """
    if mode not in ("adaptive", "equal"):
        raise ValueError(f"unknown sharding mode {mode!r}; choose adaptive or equal")
    if min_piece_bytes < 1:
        raise ValueError(f"min_piece_bytes is {min_piece_bytes}; it must be at least 1")
    problem = _problem(items, loads)
    for item in problem.items:
        if item.numel < 0 or bool(item.nbytes) != bool(item.numel) or item.nbytes % max(item.numel, 1):
            raise ValueError(f"{item.key.fqn} ({item.key.kind}): {item.nbytes} bytes in {item.numel} elements")
    if mode == "equal":
        pieces = _split_evenly(problem, min_piece_bytes)
    else:
        pieces, highest = _pour(problem, min_piece_bytes)
        writers, whole = _whole(problem)
        if whole <= highest:
            pieces = [[(0, item.numel, writer)] for item, writer in zip(problem.items, writers, strict=True)]
    return {item.key: _shares(found) for item, found in zip(problem.items, pieces, strict=True)}


def sharding_lower_bound(items: Iterable[Replicated], loads: Loads) -> int:
    """Returns bytes that the most loaded rank writes at least, however tensors are cut.

    Where any two holder sets are disjoint or nested, this is the optimum if every byte could be placed alone.

    Args:
        items: the replicated tensors.
        loads: bytes that each rank writes anyway.

    Raises:
        CoverageError: if a tensor is named twice.
        ValueError: for bad sizes, holders or loads.
    """
    problem = _problem(items, loads)
    # What lies in a set must be written there. If all its ranks stayed below the level at which water of that volume
    # stands over their loads, they could not have taken it all. So every set's level is a bound, and every union's.
    # Nested and disjoint sets: pour the innermost first; a larger set's own volume then either drowns the levels inside
    # it, so that all it contains stands at its level, or stays below one of them. The highest level is reached by a
    # plan, so no union has a higher one. Sets that overlap otherwise need unions: those of connected sets are taken.
    regions = list(zip(problem.sets, _inside(problem.volumes, _supersets(problem.sets)), strict=True))
    regions += _unions(problem.sets, problem.volumes)
    bound = int(problem.load.max(initial=0))
    for holders, volume in regions:
        if volume:
            bound = max(bound, _level(problem.load[list(holders)], volume))
    return bound


def share_loads(shares: Mapping[TensorKey, Sequence[Share]], items: Iterable[Replicated], world: int) -> _Ints:
    """Returns the bytes [world], int64, that each rank writes of the shares.

    Args:
        shares: from `plan_shares`.
        items: the tensors they are shares of, at least.
        world: number of ranks.

    Raises:
        ValueError: if a share's tensor is not among the items, or its writer not below `world`.
    """
    itemsize = {item.key: item.nbytes // max(item.numel, 1) for item in items}
    rows = []
    for key, parts in shares.items():
        if key not in itemsize:
            raise ValueError(f"{key.fqn} ({key.kind}) has shares but is not among the items")
        size = itemsize[key]
        rows += [(part.writer, (part.stop - part.start) * size) for part in parts]
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    writers = table[:, 0]
    if len(writers) and not 0 <= writers.min() <= writers.max() < world:
        raise ValueError(f"writers are ranks {writers.min()} to {writers.max()}, but the world has {world} ranks")
    found = np.zeros(world, dtype=np.int64)
    np.add.at(found, writers, table[:, 1])
    return found


def _problem(items: Iterable[Replicated], loads: Loads) -> _Problem:
    ordered = sorted(items, key=lambda item: item.key)
    for before, after in pairwise(ordered):
        if before.key == after.key:
            raise CoverageError(
                f"{after.key.fqn} ({after.key.kind}) is to be shared twice",
                where=f"holders {_span(before.holders)} and {_span(after.holders)}",
                fix="one rank must offer it, for all that hold it; nothing was written",
            )
    # Equal tuples are looked up by identity first: hashing a world of ranks for every tensor would take longest of all.
    by_identity: dict[int, int] = {}
    known: dict[tuple[int, ...], int] = {}
    found = []
    for item in ordered:
        index = by_identity.get(id(item.holders))
        if index is None:
            index = by_identity[id(item.holders)] = known.setdefault(item.holders, len(known))
        found.append(index)
        if item.nbytes < 0:
            raise ValueError(f"{item.key.fqn} ({item.key.kind}) has {item.nbytes} bytes")
    for holders in known:
        if not holders or holders[0] < 0 or any(a >= b for a, b in pairwise(holders)):
            raise ValueError(f"holders {_span(holders)} are not ascending ranks")
    sets = sorted(known, key=lambda holders: (len(holders), holders))
    place = {known[holders]: number for number, holders in enumerate(sets)}
    ranks = max((holders[-1] + 1 for holders in sets), default=0)
    return _Problem(ordered, sets, [place[index] for index in found], _load_of(loads, ranks))


def _load_of(loads: Loads, ranks: int) -> _Ints:
    if isinstance(loads, Mapping):
        if loads and min(loads) < 0:
            raise ValueError(f"there is no rank {min(loads)}")
        load = np.zeros(max(ranks, max(loads, default=-1) + 1), dtype=np.int64)
        load[np.fromiter(loads.keys(), np.int64, len(loads))] = np.fromiter(loads.values(), np.int64, len(loads))
    else:
        if len(loads) < ranks:
            raise ValueError(f"loads of {len(loads)} ranks, but rank {ranks - 1} holds a tensor")
        load = np.array(loads, dtype=np.int64)
    if load.min(initial=0) < 0:
        raise ValueError(f"rank {int(load.argmin())} has a load of {load.min()} bytes")
    return load


def _span(holders: tuple[int, ...]) -> str:
    return str(list(holders)) if len(holders) <= 8 else f"[{holders[0]}, …, {holders[-1]}] ({len(holders)} ranks)"


def _level(load: _Ints, volume: int) -> int:
    """Returns the least integer h with sum(max(0, h - load)) >= volume: where water poured over the loads stands."""
    ordered = np.sort(load)
    below = np.cumsum(ordered)
    count = int(np.searchsorted(ordered * np.arange(1, len(ordered) + 1) - below, volume, side="right"))
    return -(-(volume + int(below[count - 1])) // count)


def _supersets(sets: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Returns for each holder set the others that contain it."""
    firsts = {holders[0] for holders in sets}
    containing: dict[int, list[int]] = {}
    for index, holders in enumerate(sets):
        for rank in firsts.intersection(holders):
            containing.setdefault(rank, []).append(index)
    masks = [_mask(holders) for holders in sets]
    return [
        [other for other in containing[holders[0]] if other != index and masks[index] & ~masks[other] == 0]
        for index, holders in enumerate(sets)
    ]


def _inside(volumes: Sequence[int], supersets: Sequence[Sequence[int]]) -> list[int]:
    """Returns for each holder set the bytes of all sets that it contains, itself included."""
    inside = list(volumes)
    for volume, others in zip(volumes, supersets, strict=True):
        for other in others:
            inside[other] += volume
    return inside


def _mask(holders: tuple[int, ...]) -> int:
    flags = np.zeros(holders[-1] + 1, dtype=bool)
    flags[list(holders)] = True
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _unions(sets: Sequence[tuple[int, ...]], volumes: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
    """Returns the ranks and the volume of each connected family of holder sets that is not one of the sets."""
    parent = list(range(len(sets)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    owner: dict[int, int] = {}
    for index, holders in enumerate(sets):
        for other in {owner.setdefault(rank, index) for rank in holders}:
            parent[root(other)] = root(index)
    families: dict[int, list[int]] = {}
    for index in range(len(sets)):
        families.setdefault(root(index), []).append(index)
    unions = []
    for family in families.values():
        ranks = set().union(*(sets[index] for index in family))
        if len(ranks) > max(len(sets[index]) for index in family):
            unions.append((tuple(sorted(ranks)), sum(volumes[index] for index in family)))
    return unions


def _whole(problem: _Problem) -> tuple[list[int], int]:
    """Returns a writer per item, largest first onto the least loaded holder, and the highest load."""
    items, load = problem.items, problem.load.tolist()
    # A heap per holder set, with loads refreshed when they are looked at.
    heaps: list[list[tuple[int, int]] | None] = [None] * len(problem.sets)
    writers = [0] * len(items)
    for index in sorted(range(len(items)), key=lambda index: -items[index].nbytes):
        group = problem.group[index]
        heap = heaps[group]
        if heap is None:
            heap = heaps[group] = [(load[rank], rank) for rank in problem.sets[group]]
            heapq.heapify(heap)
        while heap[0][0] != load[heap[0][1]]:
            rank = heap[0][1]
            heapq.heapreplace(heap, (load[rank], rank))
        rank = heap[0][1]
        writers[index] = rank
        load[rank] += items[index].nbytes
        heapq.heapreplace(heap, (load[rank], rank))
    return writers, max(load, default=0)


def _pour(problem: _Problem, floor: int) -> tuple[_Pieces, int]:
    """Returns the pieces of each item, largest first with cuts, and the highest load."""
    load = problem.load.copy()
    pieces: _Pieces = [[] for _ in problem.items]
    members, volumes = problem.members, problem.volumes
    supersets = _supersets(problem.sets)
    inside = _inside(volumes, supersets)
    ranks = [np.array(holders, dtype=np.int64) for holders in problem.sets]
    # Where a superset will stand anyway, its subsets need no cuts to stand lower.
    levels = [_level(load[ranks[index]], volume) for index, volume in enumerate(inside)]
    # Subsets first: what has fewer ranks to go to must find room there.
    for group, holders in enumerate(problem.sets):
        if not volumes[group]:
            continue
        level = max([_level(load[ranks[group]], volumes[group]), *(levels[other] for other in supersets[group])])
        heap = list(zip(load[ranks[group]].tolist(), holders, strict=True))
        heapq.heapify(heap)
        _pour_set(problem.items, members[group], heap, level, floor, pieces)
        for value, rank in heap:
            load[rank] = value
    return pieces, int(load.max(initial=0))


def _pour_set(
    items: Sequence[Replicated],
    members: Iterable[int],
    heap: list[tuple[int, int]],
    level: int,
    floor: int,
    pieces: _Pieces,
) -> None:
    """Places one holder set's items on its ranks, given as a heap of (load, rank) with room for them below `level`."""
    # The room left is never less than the bytes left, because a piece takes no more room than its bytes. So there is
    # always a rank below the level, and one that was filled to it is not chosen again. Whatever passes the level is
    # smaller than two floors: a tensor or the last piece of one that may not be cut, or a piece of one floor.
    queue = [(-items[index].nbytes, index, 0) for index in members if items[index].nbytes]
    heapq.heapify(queue)
    while queue:
        negative, index, start = heapq.heappop(queue)
        left = -negative
        load, rank = heap[0]
        room = level - load
        itemsize = items[index].nbytes // items[index].numel
        grain = itemsize * CUT_ELEMENTS
        least = -(-floor // grain) * grain
        if left <= room or left < 2 * least:
            take = left
        else:
            take = min(max(-(-room // grain) * grain, least), (left - least) // grain * grain)
            heapq.heappush(queue, (take - left, index, start + take // itemsize))
        pieces[index].append((start, start + take // itemsize, rank))
        heapq.heapreplace(heap, (load + take, rank))


def _split_evenly(problem: _Problem, floor: int) -> _Pieces:
    pieces: _Pieces = [[] for _ in problem.items]
    for holders, members in zip(problem.sets, problem.members, strict=True):
        # Each expert apart, dense tensors together and last: they even out what the experts' roundings left.
        runs: dict[str, list[int]] = {}
        for index in members:
            if problem.items[index].nbytes:
                runs.setdefault(_expert_of(problem.items[index].key.fqn), []).append(index)
        written = np.zeros(len(holders), dtype=np.int64)
        for name in sorted(runs, key=lambda name: (not name, name)):
            written += _split_run(problem.items, runs[name], holders, written, floor, pieces)
    return pieces


def _expert_of(fqn: str) -> str:
    prefix, mark, rest = fqn.partition(EXPERTS_MARK)
    return prefix + mark + rest.partition(".")[0] if mark else ""


def _split_run(
    items: Sequence[Replicated],
    run: Sequence[int],
    holders: tuple[int, ...],
    written: _Ints,
    floor: int,
    pieces: _Pieces,
) -> _Ints:
    """Splits a sequence of tensors in one run of bytes per holder and returns the bytes [holders] of each.

    `written` are the bytes of the sequences before it: where roundings gave a holder more, it gets less now.
    """
    sizes = np.array([items[index].nbytes for index in run], dtype=np.int64)
    itemsize = sizes // np.array([items[index].numel for index in run], dtype=np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    # To the level that all would have, less a byte for the first few, since the level is rounded up.
    level = _level(written, total)
    wanted = np.maximum(level - written, 0)
    wanted[np.flatnonzero(wanted)[: int(wanted.sum()) - total]] -= 1
    ideal = np.cumsum(wanted)[:-1]
    # Each boundary goes to the nearest place where the tensor under it may be cut, ties to the lower one. Where
    # boundaries lie close, those places are as far apart as the smallest piece is long.
    which = np.searchsorted(ends, ideal, side="right").clip(max=len(run) - 1)
    size, grain = sizes[which], itemsize[which] * CUT_ELEMENTS
    first = ends[which] - size
    offset = ideal - first
    least = -(-floor // grain) * grain
    step = np.where(wanted[wanted > 0].min() < 2 * least, least, grain)
    inner = np.clip((offset + step // 2) // step * step, least, (size - least) // step * step)
    inner = np.where(size >= 2 * least, inner, 0)
    nearest = np.where(abs(offset - inner) < offset, inner, 0)
    nearest = np.where(size - offset < abs(offset - nearest), size, nearest)
    bounds = np.concatenate([[0], first + nearest, [total]])
    # Between two neighbouring points of these there is one tensor and one writer.
    points = np.unique(np.concatenate([bounds, ends]))
    starts, stops = points[:-1], points[1:]
    tensor = np.searchsorted(ends, starts, side="right")
    writer = np.asarray(holders)[np.searchsorted(bounds, starts, side="right") - 1]
    base = ends[tensor] - sizes[tensor]
    rows = (tensor, (starts - base) // itemsize[tensor], (stops - base) // itemsize[tensor], writer)
    for place, start, stop, rank in zip(*(row.tolist() for row in rows), strict=True):
        pieces[run[place]].append((start, stop, rank))
    return np.diff(bounds)


def _shares(pieces: list[tuple[int, int, int]]) -> tuple[Share, ...]:
    """Puts an item's pieces in order, joins neighbours of one writer and leaves out empty ones."""
    joined: list[Share] = []
    for start, stop, writer in sorted(pieces):
        if start == stop:
            continue
        if joined and joined[-1].writer == writer and joined[-1].stop == start:
            joined[-1] = joined[-1]._replace(stop=stop)
        else:
            joined.append(Share(start, stop, writer))
    return tuple(joined)
