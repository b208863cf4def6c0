"""What the checkpoints of a configuration weigh, before anything runs: bytes in all, per rank, and what a fault costs.

Pure: shapes and topology are enough. The selection is the one that a run makes, by the same functions; the optimum
beside it is a bound that no schedule can pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import ConfigError
from moc_ckpt.pec.k_values import AUTO, K, check_k, layer_k
from moc_ckpt.pec.ledger import Ledger, expected_plt
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.schedule import CyclePlan, cycle_length, plan_cycle, schedule_bottleneck
from moc_ckpt.pec.selection import fill
from moc_ckpt.pec.selector import Method, SaveHistory, select
from moc_ckpt.plan.native import native_ownership
from moc_ckpt.plan.sharding import Replicated, plan_shares, sharding_lower_bound, share_loads
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import LayoutBytes, TensorSpec, ZeroSettings, owned_bytes
from moc_ckpt.state.fragment import TensorKey

__all__ = ["Forecast", "SaveForecast", "Setup", "contiguous_windows", "forecast"]

_Ints = npt.NDArray[np.int64]
_Windows = tuple[tuple[tuple[int, ...], ...], ...]
_Experts = tuple[tuple[int, ...], ...]

# Steps that are followed one by one: cycles of different lengths may meet again only after very many.
_MAX_STEPS = 512
# Ranks times steps for which the sharding of replicated state is planned in full.
_SHARED_CELLS = 16_000
# The same for the bound of it.
_BOUND_CELLS = 200_000
# Experts times steps that are looked at for filling up.
_FILL_VISITS = 20_000


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is trained and checkpointed.

    Attributes:
        parallel: the ranks.
        ep: expert-parallel size of every MoE layer.
        zero: what decides who owns which state.
        k_snapshot: experts per MoE layer in a snapshot.
        k_persist: experts per MoE layer that a checkpoint stores anew.
        selection: which experts a save takes.
        sharding: who writes what several ranks hold alike.
        fill: snapshots are filled up (`balance: "fill"`).
        interval: steps between two checkpoints; None if not known.
        total_steps: steps of the whole training; None if not known.
    """

    parallel: ParallelLayout
    ep: int
    zero: ZeroSettings
    k_snapshot: K = AUTO
    k_persist: K = AUTO
    selection: Method = "sequential"
    sharding: Literal["adaptive", "equal"] = "adaptive"
    fill: bool = True
    interval: int | None = None
    total_steps: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SaveForecast:
    """What saves of one K weigh. Bytes; of one save unless it says otherwise.

    Attributes:
        k: K of each MoE layer.
        cycle: saves until every expert of every layer was saved: the longest over the layers.
        total_bytes: of all ranks; the mean over the cycle where the saves of a cycle differ, rounded.
        bottleneck_bytes: of the most loaded rank in the most loaded save of a cycle.
        optimum_bytes: what no schedule that saves every expert once per cycle brings it below.
        optimum_proven: `optimum_bytes` is the least that a schedule reaches; else it is a lower bound.
        contiguous_bytes: the bottleneck with windows of neighbouring experts, one further on in each layer.
        baseline_bytes: the same windows, written by the ranks that DeepSpeed writes with (see `native_ownership`).
        mean_bytes: per rank.
        worst_bytes: what the most loaded rank can come to at most. Load-aware selection follows the tokens, so its
            `bottleneck_bytes` is that of equal loads; else the two are equal.
        peaks: [world] the largest save of each rank.
        expected_plt: expected proportion of lost tokens of one fault; None if interval or total steps are not known.
    """

    k: tuple[int, ...]
    cycle: int
    total_bytes: int
    bottleneck_bytes: int
    optimum_bytes: int
    optimum_proven: bool
    contiguous_bytes: int
    baseline_bytes: int
    mean_bytes: int
    worst_bytes: int
    peaks: _Ints
    expected_plt: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """What the checkpoints of a model weigh, in bytes.

    Attributes:
        experts: number of experts of each MoE layer.
        full_bytes: a checkpoint with all experts.
        native_bytes: what DeepSpeed's own save_checkpoint writes, without the overhead of its files.
        persist: checkpoints, with K_persist.
        snapshot: snapshots, with K_snapshot, filled up if the setup says so.
    """

    experts: tuple[int, ...]
    full_bytes: int
    native_bytes: int
    persist: SaveForecast
    snapshot: SaveForecast


def forecast(tensors: Sequence[TensorSpec], experts: Sequence[int], setup: Setup, *, where: str = "") -> Forecast:
    """Computes what the checkpoints of a model weigh.

    Where ranks hold state alike (stage 0, `save_weights`) in a large world, sharding is planned in full only for those
    steps of a cycle that promise the highest loads; with `adaptive` sharding the others cannot pass them by more than
    two pieces of `MIN_PIECE_BYTES`.

    Args:
        tensors: the parameters and persistent buffers of the model, in group order.
        experts: number of experts of each MoE layer.
        setup: how it is trained and checkpointed.
        where: what K is written in, for messages.

    Raises:
        ConfigError: if K, expert parallelism or world do not fit the model or each other, naming layer and numbers.
    """
    _check(setup, experts, where)
    world = _World(tensors, tuple(experts), setup)
    full = setup.selection == "full"
    counts = tuple(experts)
    k_persist = counts if full else layer_k(setup.k_persist, experts, most=setup.k_snapshot)
    k_snapshot = counts if full else layer_k(setup.k_snapshot, experts)
    persist = world.save(k_persist)
    snapshot = persist if k_snapshot == k_persist else world.save(k_snapshot)
    if setup.fill:
        snapshot = world.filled(snapshot)
    return Forecast(
        experts=counts,
        full_bytes=world.layout.total_bytes,
        native_bytes=int(world.native.nbytes.sum()) + int(world.native.dense.sum()),
        persist=persist,
        snapshot=snapshot,
    )


def contiguous_windows(experts: Sequence[int], k: Sequence[int], *, shift: int = 1) -> _Windows:
    """Returns windows [layer][step] of neighbouring experts: what can be had without looking at who owns them.

    Args:
        experts: number of experts of each MoE layer.
        k: K of each layer.
        shift: a layer is so many windows ahead of the layer before it; 0 saves the same window in all layers.
    """
    found = []
    for layer, (count, size) in enumerate(zip(experts, k, strict=True)):
        windows = [tuple(range(first, min(first + size, count))) for first in range(0, count, size)]
        ahead = layer * shift % len(windows)
        found.append((*windows[ahead:], *windows[:ahead]))
    return tuple(found)


def _check(setup: Setup, experts: Sequence[int], where: str) -> None:
    for name, value in (("interval", setup.interval), ("total_steps", setup.total_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1", where=where)
    setup.parallel.replicas(setup.ep)
    for layer, count in enumerate(experts):
        if setup.ep < 1 or count % setup.ep:
            raise ConfigError(
                f"the {count} experts of MoE layer {layer} do not divide over {setup.ep} expert-parallel ranks",
                where=where,
                fix="choose an expert-parallel size that divides the number of experts of every layer",
            )
    largest = max(range(len(experts)), key=lambda layer: experts[layer], default=0)
    layer_size = f"MoE layer {largest} has {experts[largest]} experts" if experts else "there is no MoE layer"
    for name, k in (("k_snapshot", setup.k_snapshot), ("k_persist", setup.k_persist)):
        if k != AUTO and k < 1:
            raise ConfigError(f"{name} is {k}, but it must be at least 1 ({layer_size})", where=where)
    if setup.k_snapshot != AUTO and setup.k_persist != AUTO and setup.k_persist > setup.k_snapshot:
        raise ConfigError(
            f"k_persist is {setup.k_persist}, above k_snapshot {setup.k_snapshot} ({layer_size}): what is persisted is "
            "snapshotted first",
            where=where,
            fix=f"set k_persist to at most {setup.k_snapshot}, or raise k_snapshot",
        )
    check_k(setup.k_snapshot, setup.k_persist, experts, where=where)


class _World:
    """Who owns what, prepared for forecasts of several K's.

    Attributes:
        layout: who owns what.
        even: all bytes by rank, replicated state spread evenly over its holders. Schedules are made for it.
        native: who writes what in DeepSpeed's own checkpoint.
    """

    def __init__(self, tensors: Sequence[TensorSpec], experts: tuple[int, ...], setup: Setup) -> None:
        eps = (setup.ep,) * len(experts)
        self._setup, self._experts = setup, experts
        self.layout: LayoutBytes = owned_bytes(tensors, experts, eps, setup.parallel, setup.zero)
        self._sole = self.layout.ownership
        self.native = native_ownership(tensors, experts, setup.ep, setup.parallel, setup.zero)
        self._dense: list[Replicated] = []
        self._shared: dict[int, list[Replicated]] = {}
        for item in self.layout.replicated:
            entry = Replicated(
                TensorKey(item.fqn, item.kind), item.nbytes, self.layout.holders[item.holders], item.numel
            )
            if item.layer is None or item.expert is None:
                self._dense.append(entry)
            else:
                self._shared.setdefault(self._sole.offsets[item.layer] + item.expert, []).append(entry)
        self.even = _spread(self.layout) if self.layout.replicated else self._sole
        self._plans: dict[tuple[int, ...], CyclePlan] = {}

    def _plan(self, k: tuple[int, ...]) -> CyclePlan:
        if k not in self._plans:
            self._plans[k] = plan_cycle(self.even, k)
        return self._plans[k]

    def save(self, k: tuple[int, ...]) -> SaveForecast:
        """Forecasts saves of this K, not filled up."""
        setup, experts = self._setup, self._experts
        partial = k != experts
        plan = self._plan(k)
        cycle = max((cycle_length(count, size) for count, size in zip(experts, k, strict=True)), default=1)
        if partial and setup.selection == "load_aware":
            steps: Sequence[_Ints] = list(self._load_aware(k, cycle))
            total = sum(self._bytes(units) for units in steps) / len(steps)
        else:
            steps = _steps(plan.windows, self._sole.offsets)
            total = self._mean_bytes([cycle_length(count, size) for count, size in zip(experts, k, strict=True)])
        peaks = self._peaks(steps)
        bottleneck, optimum, proven = int(peaks.max()), plan.lower_bound_bytes, plan.proven
        if self.layout.replicated:
            optimum = self._shared_bound(k)
            proven = bottleneck == optimum
        elif setup.selection != "load_aware":
            # More steps than are followed one by one may be in a cycle; the schedule knows them all.
            bottleneck = plan.bottleneck_bytes
        windows = contiguous_windows(experts, k)
        contiguous = (
            int(self._peaks(_steps(windows, self._sole.offsets)).max())
            if self.layout.replicated
            else schedule_bottleneck(self._sole, windows)
        )
        plt = None
        if setup.interval is not None and setup.total_steps is not None:
            plt = expected_plt(experts, max(k, default=1), setup.interval, setup.total_steps)
        return SaveForecast(
            k=k,
            cycle=cycle,
            total_bytes=round(total),
            bottleneck_bytes=bottleneck,
            optimum_bytes=optimum,
            optimum_proven=proven,
            contiguous_bytes=contiguous,
            baseline_bytes=schedule_bottleneck(self.native, windows),
            mean_bytes=round(total / setup.parallel.world),
            worst_bytes=max(bottleneck, self._worst(k) if partial and setup.selection == "load_aware" else 0),
            peaks=peaks,
            expected_plt=plt,
        )

    def filled(self, plain: SaveForecast) -> SaveForecast:
        """Forecasts the same saves, each filled up to its most loaded rank, the stalest experts first.

        The mean is over a cycle after the first one, or over as many saves as a bounded amount of work allows.
        """
        if plain.k == self._experts:
            return plain
        wanted: Sequence[_Ints] = _steps(self._plan(plain.k).windows, self._sole.offsets)
        if self._setup.selection == "load_aware":
            wanted = list(self._load_aware(plain.k, plain.cycle))
        count = self._sole.offsets[-1]
        most = max(2, _FILL_VISITS // count)
        warm = min(len(wanted), most // 2)
        measured = min(len(wanted), most - warm)
        ages = np.zeros(count, dtype=np.int64)
        steps = []
        for number in range(warm + measured):
            chosen = wanted[number % len(wanted)].tolist()
            limit = int(self.even.loads(chosen).max())
            if self.layout.replicated:  # sharding brings it below that of even shares
                limit = min(limit, plain.bottleneck_bytes)
            order = np.argsort(-ages, kind="stable").tolist()
            units = np.array(fill(self.even, chosen, order, limit), dtype=np.int64)
            ages += 1
            ages[units] = 0
            if number >= warm:
                steps.append(units)
        total = sum(self._bytes(units) for units in steps) / len(steps)
        peaks = np.maximum(self._peaks(steps), plain.peaks)
        return replace(
            plain,
            total_bytes=round(total),
            bottleneck_bytes=max(plain.bottleneck_bytes, int(peaks.max())),
            worst_bytes=max(plain.worst_bytes, int(peaks.max())),
            mean_bytes=round(total / self._setup.parallel.world),
            peaks=peaks,
        )

    def _bytes(self, units: _Ints) -> int:
        """Returns the bytes of a save of these experts, over all ranks."""
        return int(self.even.unit_bytes[units].sum()) + int(self.even.dense.sum())

    def _mean_bytes(self, cycles: Sequence[int]) -> float:
        """Returns the bytes of a save, over all ranks, in the mean over a cycle."""
        by_unit, offsets = self.even.unit_bytes, self._sole.offsets
        mean = float(self.even.dense.sum())
        for layer, cycle in enumerate(cycles):
            mean += int(by_unit[offsets[layer] : offsets[layer + 1]].sum()) / cycle
        return mean

    def _load_aware(self, k: tuple[int, ...], cycle: int) -> Iterator[_Ints]:
        """Yields the experts of the saves of one cycle, after a first one, if all experts get equal loads."""
        offsets = np.array(self._sole.offsets[:-1])
        history, ledger = SaveHistory.start(self._experts), Ledger.start(self._experts, [1] * len(self._experts))
        each = [np.ones(count, dtype=np.int64) for count in self._experts]
        cycle = min(cycle, _MAX_STEPS)
        for number in range(1, 2 * cycle + 1):
            ledger = ledger.add(each, self._experts)
            chosen = select(history, ledger, self.even, "load_aware", k)
            history = chosen.after
            if number > cycle:
                yield np.array([offsets[layer] + expert for layer, expert in chosen.places], dtype=np.int64)

    def _worst(self, k: tuple[int, ...]) -> int:
        """Returns the most that a rank can come to with K experts of each layer, replicas shared evenly."""
        loads = self.even.dense.copy()
        offsets = self.even.offsets
        for layer, size in enumerate(k):
            inside = (self.even.unit >= offsets[layer]) & (self.even.unit < offsets[layer + 1])
            rank, nbytes = self.even.rank[inside], self.even.nbytes[inside]
            order = np.lexsort((-nbytes, rank))
            rank, nbytes = rank[order], nbytes[order]
            first = np.searchsorted(rank, rank)
            kept = np.arange(len(rank)) - first < size
            np.add.at(loads, rank[kept], nbytes[kept])
        return int(loads.max())

    def _items(self, units: Sequence[int]) -> list[Replicated]:
        return [*self._dense, *(item for unit in units for item in self._shared.get(unit, ()))]

    def _peaks(self, steps: Sequence[_Ints]) -> _Ints:
        """Returns the largest load [world] of each rank over the steps."""
        world = self._setup.parallel.world
        peaks = np.zeros(world, dtype=np.int64)
        if not self.layout.replicated:
            for units in steps:
                np.maximum(peaks, self._sole.loads(units.tolist()), out=peaks)
            return peaks
        most = max(1, _SHARED_CELLS // world)
        if len(steps) > most:
            by_water = self._setup.sharding == "adaptive" and len(steps) * world <= _BOUND_CELLS

            def promise(units: _Ints) -> int:
                chosen = units.tolist()
                if by_water:
                    return sharding_lower_bound(self._items(chosen), self._sole.loads(chosen))
                return int(self.even.loads(chosen).max())

            steps = sorted(steps, key=promise, reverse=True)[:most]
        for units in steps:
            chosen = units.tolist()
            items, loads = self._items(chosen), self._sole.loads(chosen)
            shares = plan_shares(items, loads, mode=self._setup.sharding)
            np.maximum(peaks, loads + share_loads(shares, items, world), out=peaks)
        return peaks

    def _shared_bound(self, k: tuple[int, ...]) -> int:
        """Returns what the most loaded rank writes at least, whatever the schedule and the sharding.

        Over a cycle each expert is written once, so in the mean over the steps ranks write the dense state and of each
        expert 1/cycle, and no step's most loaded rank can always stay below what that demands.
        """
        cycles = [cycle_length(count, size) for count, size in zip(self._experts, k, strict=True)]
        per_unit = np.repeat(np.array(cycles, dtype=np.int64), self._experts)
        loads = self._sole.dense.copy()
        part = np.zeros(len(loads))
        np.add.at(part, self._sole.rank, self._sole.nbytes / per_unit[self._sole.unit])
        loads += np.floor(part).astype(np.int64)
        volumes: dict[int, tuple[tuple[int, ...], float]] = {}
        for item in self._dense:
            volumes[id(item.holders)] = (item.holders, volumes.get(id(item.holders), ((), 0.0))[1] + item.nbytes)
        for unit, items in self._shared.items():
            for item in items:
                before = volumes.get(id(item.holders), ((), 0.0))[1]
                volumes[id(item.holders)] = (item.holders, before + item.nbytes / int(per_unit[unit]))
        mean = [
            Replicated(TensorKey(str(number), ""), math.floor(volume), holders)
            for number, (holders, volume) in enumerate(volumes.values())
        ]
        alone = plan_cycle(self._sole, k).lower_bound_bytes if len(self._sole.unit) else 0
        return max(sharding_lower_bound(mean, loads), alone)


def _spread(layout: LayoutBytes) -> Ownership:
    """Returns the ownership if every expert, and the dense state, were spread evenly over those who hold it alike."""
    sole = layout.ownership
    dense = sole.dense.copy()
    shared_dense: dict[int, int] = {}
    shared: dict[tuple[int, int], int] = {}
    for item in layout.replicated:
        if item.layer is None or item.expert is None:
            shared_dense[item.holders] = shared_dense.get(item.holders, 0) + item.nbytes
        else:
            place = (sole.offsets[item.layer] + item.expert, item.holders)
            shared[place] = shared.get(place, 0) + item.nbytes
    holders = [np.array(ranks, dtype=np.int64) for ranks in layout.holders]
    for which, nbytes in shared_dense.items():
        dense[holders[which]] += _evenly(nbytes, len(holders[which]))
    units = [sole.unit, *(np.full(len(holders[which]), unit) for unit, which in shared)]
    ranks = [sole.rank, *(holders[which] for _, which in shared)]
    sizes = [sole.nbytes, *(_evenly(total, len(holders[which])) for (_, which), total in shared.items())]
    unit = np.concatenate(units)
    offsets = np.array(sole.offsets)
    layer = np.searchsorted(offsets, unit, side="right") - 1
    columns = layer, unit - offsets[layer], np.concatenate(ranks), np.concatenate(sizes)
    return Ownership.from_arrays(sole.experts, sole.world, *columns, dense)


def _evenly(nbytes: int, count: int) -> _Ints:
    share, rest = divmod(nbytes, count)
    return share + (np.arange(count) < rest).astype(np.int64)


def _steps(windows: _Windows, offsets: Sequence[int]) -> list[_Ints]:
    """Returns the units of each step, until the layers meet again or `_MAX_STEPS`."""
    period = min(math.lcm(*(len(layer) for layer in windows)), _MAX_STEPS)
    return [
        np.array(
            [offsets[layer] + expert for layer, each in enumerate(windows) for expert in each[step % len(each)]],
            dtype=np.int64,
        )
        for step in range(period)
    ]
