"""What the arenas of a job hold, and which of it makes one consistent state (DESIGN sections 4 and 11)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moc_ckpt.errors import CorruptionError, MocError, StorageError
from moc_ckpt.persist.slot_packs import SlotUnit
from moc_ckpt.persist.snapshot_record import RECORD, SnapshotRecord, decode_record, unpack_learnt
from moc_ckpt.snapshot.arena import Arena
from moc_ckpt.snapshot.places import find_arenas
from moc_ckpt.snapshot.slots import Slot, SlotState
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.state.unit import parse_expert_unit

__all__ = [
    "Inventory",
    "JobMemory",
    "MemoryChoice",
    "MemoryVersions",
    "RankMemory",
    "choose",
    "choose_newer",
    "join",
    "open_memory",
]

_WHOLE = (SlotState.FILLED, SlotState.PERSISTING, SlotState.COMMITTED)
_DENSE = "dense"
_EXTRA = "extra"


@dataclass(frozen=True, slots=True)
class MemoryVersions:
    """The steps of which one rank's memory holds something whole; all of one timeline.

    Attributes:
        dense: of its dense state; empty if it has none to write.
        extra: of the state beside tensors. It is written last, so a snapshot without it is not whole on this rank.
        experts: of each expert unit of which the rank holds a part.
        owners: all ranks that hold a part of each of these; empty where that is not known.
    """

    dense: frozenset[int]
    extra: frozenset[int]
    experts: Mapping[str, frozenset[int]]
    owners: Mapping[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """One consistent state in memory.

    Attributes:
        step: of all dense and scalar state (invariant I3).
        experts: expert unit -> step of its newest version that is whole on every rank that holds a part of it, not
            after `step`.
    """

    step: int
    experts: Mapping[str, int]


def choose(ranks: Mapping[int, MemoryVersions], world: int) -> MemoryChoice | None:
    """Finds the newest consistent state in memory. Pure.

    Args:
        ranks: what the memory of each reachable rank holds.
        world: number of ranks of the run.

    Returns:
        The state; None if there is no step of which every rank of the world holds all of its dense state: dense state
        is sharded, so that one rank that is gone takes a part of it along.
    """
    if set(ranks) != set(range(world)):
        return None
    common: frozenset[int] | None = None
    for rank in ranks.values():
        own = rank.extra & rank.dense if rank.dense else rank.extra
        common = own if common is None else common & own
    if not common:
        return None
    step = max(common)
    shared: dict[str, frozenset[int]] = {}
    for rank in ranks.values():
        for unit, steps in rank.experts.items():
            shared[unit] = shared[unit] & steps if unit in shared else steps
    found = {unit: max((at for at in steps if at <= step), default=None) for unit, steps in shared.items()}
    return MemoryChoice(step, {unit: at for unit, at in sorted(found.items()) if at is not None})


def choose_newer(
    ranks: Mapping[int, MemoryVersions], world: int, step: int, stored: Mapping[str, int]
) -> dict[str, int]:
    """Finds the experts that memory has newer than a checkpoint, where memory's own dense state is not whole. Pure.

    Args:
        ranks: what the memory of each reachable rank holds; others may be lost.
        world: number of ranks of the run.
        step: of the checkpoint's dense state (invariant I3).
        stored: expert unit -> step of the newest version on storage.

    Returns:
        Expert unit -> step of its newest version not after `step` that is whole: every owner of a part of it is here
        and has that version. Experts whose owners nobody knows count only if no rank is lost.
    """
    complete = set(ranks) == set(range(world))
    found: dict[str, int] = {}
    for unit in sorted({unit for rank in ranks.values() for unit in rank.experts}):
        holders = {number for number, rank in ranks.items() if unit in rank.experts}
        told = {rank.owners[unit] for rank in ranks.values() if unit in rank.owners}
        if len(told) > 1 or not (told or complete):
            continue
        owners = next(iter(told), frozenset(holders))
        if not owners <= holders:
            continue
        steps = frozenset.intersection(*(ranks[owner].experts[unit] for owner in owners))
        newest = max((at for at in steps if at <= step), default=None)
        if newest is not None and newest > stored.get(unit, -1):
            found[unit] = newest
    return found


@dataclass(frozen=True, slots=True)
class Inventory:
    """What memory holds of a run, on one node or on several; small, and fit to be sent to other ranks.

    Attributes:
        run: id of the run.
        world: number of its ranks.
        url: the directory that it saved into last; None if none is open.
        attempt: its attempt there.
        created: when it began, in seconds since 1970.
        ranks: what the memory of each rank holds.
    """

    run: str
    world: int
    url: str | None
    attempt: int | None
    created: float
    ranks: Mapping[int, MemoryVersions]

    @property
    def absent(self) -> Sequence[int]:
        """Ranks whose memory is not known."""
        return sorted(set(range(self.world)) - set(self.ranks))

    def choose(self) -> MemoryChoice | None:
        """Returns the newest consistent state; None if there is none."""
        return choose(self.ranks, self.world)


def join(inventories: Iterable[Inventory]) -> Inventory | None:
    """Joins what several nodes hold of the newest run of which any holds something. Pure.

    Args:
        inventories: one per node, or per rank; what is of older runs is left out.

    Returns:
        All of it; None if there is none. Without a directory where they do not agree on one: a rank that was
        killed while a directory was opened does not have it yet.
    """
    known = list(inventories)
    if not known:
        return None
    newest = max(known, key=lambda item: (item.created, item.run))
    same = [item for item in known if item.run == newest.run]
    ranks = {rank: versions for item in same for rank, versions in sorted(item.ranks.items())}
    agreed = len({(item.url, item.attempt) for item in same}) == 1
    url, attempt = (newest.url, newest.attempt) if agreed else (None, None)
    return Inventory(newest.run, newest.world, url, attempt, newest.created, ranks)


@dataclass(slots=True)
class RankMemory:
    """One rank's arena, open for reading. Not thread-safe.

    Attributes:
        arena: the arena.
        rank: the rank.
        slots: (unit, step) -> its whole slot, of the newest timeline.
    """

    arena: Arena
    rank: int
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    _records: dict[int, SnapshotRecord] = field(default_factory=dict)

    @property
    def versions(self) -> MemoryVersions:
        """What it holds, with owners where the newest snapshot tells of them."""
        experts: dict[str, set[int]] = {}
        for unit, step in self.slots:
            if parse_expert_unit(unit) is not None:
                experts.setdefault(unit, set()).add(step)
        return MemoryVersions(
            frozenset(step for unit, step in self.slots if unit == _DENSE),
            frozenset(step for unit, step in self.slots if unit == _EXTRA),
            {unit: frozenset(steps) for unit, steps in experts.items()},
            self._owners(),
        )

    def _owners(self) -> dict[str, frozenset[int]]:
        newest = max((step for unit, step in self.slots if unit == _EXTRA), default=None)
        if newest is None:
            return {}
        try:
            return {unit: frozenset(ranks) for unit, ranks in self.record(newest).owners.items()}
        except MocError:  # whoever needs the record will say so
            return {}

    def learnt(self, unit: str, step: int) -> int | None:
        """Returns the tokens that a version of an expert has learnt, from any snapshot that tells; None if none does.

        Records name the versions that count at their step; one that is kept for a commit is in that commit's.
        """
        place = parse_expert_unit(unit)
        for at in sorted({at for name, at in self.slots if name == _EXTRA and at >= step}) if place else ():
            try:
                record = self.record(at)
                counts = [layer.num_experts for layer in record.moe_layers]
                packed = {key: data for key, data in record.learnt.items() if key == step}
                if packed and place is not None:
                    return int(unpack_learnt(packed, counts)[step][place[0]][place[1]])
            except (MocError, IndexError):
                continue
        return None

    def unit(self, unit: str, step: int) -> SlotUnit:
        """Returns what a slot holds.

        Raises:
            CorruptionError: if its descriptor cannot be read.
        """
        slot = self.slots[unit, step]
        try:
            rows = msgspec.msgpack.decode(
                self.arena.table.descriptor(slot),
                type=list[tuple[str, str, str, str, tuple[int, ...], int, int, int]],
            )
        except msgspec.MsgspecError as error:
            raise self._damaged(slot, error) from error
        fragments = [(name, Fragment(*address)) for name, *address, _ in rows]  # type: ignore[arg-type]
        return SlotUnit(fragments, [row[-1] for row in rows], slot.nbytes, slot.extents)

    def files(self, step: int) -> dict[str, bytes]:
        """Returns the files of a snapshot's extra slot by name.

        Raises:
            CorruptionError: if they cannot be read.
        """
        slot = self.slots[_EXTRA, step]
        try:
            places = msgspec.msgpack.decode(self.arena.table.descriptor(slot), type=list[tuple[str, int, int]])
        except msgspec.MsgspecError as error:
            raise self._damaged(slot, error) from error
        data = self.arena.read_slot(slot)
        return {name: data[at : at + nbytes] for name, at, nbytes in places}

    def record(self, step: int) -> SnapshotRecord:
        """Returns the record of a snapshot.

        Raises:
            StorageError: if it has none, or it cannot be read.
        """
        if step not in self._records:
            data = self.files(step).get(RECORD)
            if data is None:
                raise StorageError(
                    "the snapshot has no record of its run",
                    where=str(self.arena.path),
                    fix="it was made by an older moc_ckpt; recover with that version",
                )
            self._records[step] = decode_record(data, str(self.arena.path))
        return self._records[step]

    def _damaged(self, slot: Slot, error: Exception) -> CorruptionError:
        return CorruptionError(
            f"the descriptor of {slot.unit} of step {slot.step} is damaged: {error}",
            where=str(self.arena.path),
            fix="recover from storage: moc-ckpt recover DIR --no-memory",
        )


@dataclass(frozen=True, slots=True)
class JobMemory:
    """The arenas of a job's newest run on this node.

    Attributes:
        inventory: what they hold.
        ranks: the arenas that could be read.
        unreadable: why others could not, by path.
    """

    inventory: Inventory
    ranks: Mapping[int, RankMemory]
    unreadable: Mapping[Path, str]


@contextmanager
def open_memory(folder: Path, only: Container[Path] | None = None) -> Iterator[JobMemory | None]:
    """Opens the arenas of a job's newest run for reading; yields None if it has none.

    Of a rank that restored while it ran, only what came after the last restore counts: what was rolled back is gone.

    Args:
        folder: the job's directory in shared memory (`places.job_dir`).
        only: look at these arenas alone; None for all.
    """
    with ExitStack() as stack:
        runs: dict[str, list[Arena]] = {}
        unreadable: dict[Path, str] = {}
        for path in find_arenas(folder):
            if only is not None and path not in only:
                continue
            try:
                arena = stack.enter_context(Arena.open(path))
                runs.setdefault(arena.identity.run, []).append(arena)
            except MocError as error:
                unreadable[path] = error.what
        if not runs:
            yield None
            return
        run, arenas = max(runs.items(), key=lambda item: max(arena.identity.created for arena in item[1]))
        live = {arena.identity.rank: (arena, arena.table.live()) for arena in arenas}
        timeline = max((slot.attempt for _, slots in live.values() for slot in slots), default=0)
        ranks = {}
        for rank, (arena, slots) in sorted(live.items()):
            whole = [slot for slot in slots if slot.state in _WHOLE and slot.attempt == timeline]
            ranks[rank] = RankMemory(arena, rank, {(slot.unit, slot.step): slot for slot in whole})
        inventory = join(
            Inventory(
                run,
                arena.identity.world,
                arena.identity.url,
                arena.identity.attempt,
                arena.identity.created,
                {rank: ranks[rank].versions},
            )
            for rank, (arena, _) in sorted(live.items())
        )
        assert inventory is not None
        yield JobMemory(inventory, ranks, unreadable)
