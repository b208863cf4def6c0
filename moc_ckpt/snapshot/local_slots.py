"""The slots of one rank by unit and step: which versions are here, and which a persist still needs."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from moc_ckpt.snapshot.arena import Arena
from moc_ckpt.snapshot.records import page_rounded
from moc_ckpt.snapshot.slots import Slot, SlotState
from moc_ckpt.snapshot.sources import UnitSource
from moc_ckpt.snapshot.versions import freeable

__all__ = ["DENSE_UNIT", "EXTRA_UNIT", "LocalSlots", "Version"]

DENSE_UNIT = "dense"
EXTRA_UNIT = "extra"


class Version(NamedTuple):
    """A version of a unit in this rank's arena; `source` is None for the extra slot."""

    slot: Slot
    source: UnitSource | None


_IDLE = (SlotState.FILLED, SlotState.COMMITTED)
_NONE: dict[int, Version] = {}


class LocalSlots:
    """Keeps the slot table and the needs of snapshots and persists together. Thread-safe.

    Args:
        arena: this rank's arena.
        keep_committed: keep also the newest version that the last commit holds.
    """

    def __init__(self, arena: Arena, *, keep_committed: bool = False) -> None:
        self._arena = arena
        self._table = arena.table
        self._keep_committed = keep_committed
        self._lock = threading.RLock()
        self._versions: dict[str, dict[int, Version]] = {}
        self._needed: dict[tuple[str, int], int] = {}
        self._committed = -1
        self._confirmed = -1
        # Steps whose snapshot is not whole everywhere; their versions must never make an older one superfluous.
        self._bad: set[int] = set()
        self._expected: tuple[int, list[Slot]] | None = None

    def begin(self, sources: Sequence[UnitSource], *, attempt: int, step: int) -> list[Version] | None:
        """Takes slots for a snapshot, dense state first; None, and nothing taken, if there is no room."""
        with self._lock:
            found: list[Version] = []
            dense = [source for source in sources if source.unit == DENSE_UNIT]
            experts = [source for source in sources if source.unit != DENSE_UNIT]
            for pool, members in ((DENSE_UNIT, dense), ("experts", experts)):
                if not members:
                    continue
                items = [(source.unit, source.nbytes, source.descriptor) for source in members]
                slots = self._table.begin(pool, items, attempt=attempt, step=step)
                if slots is None:
                    self._table.abandon([version.slot for version in found])
                    return None
                found += [Version(slot, source) for slot, source in zip(slots, members, strict=True)]
            self._bad.discard(step)
            for version in found:
                self._versions.setdefault(version.slot.unit, {})[step] = version
            return found

    def add_extra(self, data: bytes, descriptor: bytes, *, attempt: int, step: int) -> Slot | None:
        """Writes what a snapshot holds beside tensors, whole on return; None if there is no room."""
        with self._lock:
            slots = self._table.begin(EXTRA_UNIT, [(EXTRA_UNIT, len(data), descriptor)], attempt=attempt, step=step)
        if slots is None:
            return None
        at = 0
        for offset, room in slots[0].extents:
            self._arena.write(offset, data[at : at + room])
            at += room
        with self._lock:
            self._table.filled(slots)
            before = self._versions.setdefault(EXTRA_UNIT, {}).get(step)
            slot = self._table.get(slots[0].index)
            # A second save at one step has its own; the first goes once its persist has let go of it.
            if before is not None and (EXTRA_UNIT, step) not in self._needed:
                self._table.free([self._table.get(before.slot.index)])
            self._versions[EXTRA_UNIT][step] = Version(slot, None)
        return slot

    def end(self, versions: Collection[Version], *, whole: bool) -> None:
        """Marks a snapshot's slots as filled, or gives them up."""
        with self._lock:
            slots = [version.slot for version in versions]
            if whole:
                self._table.filled(slots)
            else:
                self._table.abandon(slots)
                for slot in slots:
                    self._versions[slot.unit].pop(slot.step, None)

    def get(self, unit: str, step: int) -> Version | None:
        """Returns a version, with its slot as it is now; None if it is not here."""
        with self._lock:
            found = self._versions.get(unit, {}).get(step)
            return None if found is None else Version(self._table.get(found.slot.index), found.source)

    def need(self, versions: Iterable[tuple[str, int]]) -> None:
        """Keeps versions (unit, step) from being freed, whether they are filled yet or not."""
        with self._lock:
            for key in versions:
                self._needed[key] = self._needed.get(key, 0) + 1

    def pin(self, versions: Iterable[tuple[str, int]]) -> None:
        """Marks filled versions as being persisted; they must be needed."""
        with self._lock:
            self._table.pin([self._slot(key) for key in versions])

    def release(self, versions: Iterable[tuple[str, int]], *, pinned: bool, committed: bool) -> None:
        """Ends a need.

        Args:
            versions: (unit, step) as they were needed.
            pinned: they were marked as being persisted.
            committed: storage holds them now.
        """
        keys = list(versions)
        with self._lock:
            if pinned:
                self._table.unpin([self._slot(key) for key in keys], committed=committed)
            for key in keys:
                self._needed[key] -= 1
                if not self._needed[key]:
                    del self._needed[key]
                    if key[1] in self._bad and key[1] in self._versions.get(key[0], _NONE):
                        self._discard(*key)
            if committed and keys:
                self._committed = max(self._committed, *(step for _, step in keys))
            self._free(self._older({unit for unit, _ in keys}, self._confirmed))
            self._expected = None

    def confirm(self, step: int, units: Iterable[str]) -> None:
        """Takes in that a snapshot is whole on every rank: older versions of its units may go."""
        with self._lock:
            self._confirmed = max(self._confirmed, step)
            expected, self._expected = self._expected, None
            if expected is not None and expected[0] == self._confirmed:
                # Found when the room was reckoned; since then a persist may have begun to need some.
                found = [self._table.get(slot.index) for slot in expected[1]]
                self._free([slot for slot in found if slot.state in _IDLE and not self._is_needed(slot)])
            else:
                self._free(self._older([*units, DENSE_UNIT, EXTRA_UNIT], self._confirmed))

    def drop(self, step: int) -> None:
        """Gives up the versions of a snapshot that failed on some rank; those still needed go when released."""
        with self._lock:
            self._bad.add(step)
            for unit, steps in self._versions.items():
                if step in steps and (unit, step) not in self._needed:
                    self._discard(unit, step)
            self._expected = None

    def room_after(self, step: int, units: Iterable[str]) -> tuple[int, int]:
        """Returns (dense, experts) bytes that are free once the snapshot of `step`, of these units, is confirmed."""
        with self._lock:
            older = self._older([*units, DENSE_UNIT, EXTRA_UNIT], step)
            self._expected = (step, older)
            dense, experts = self._table.free_bytes("dense"), self._table.free_bytes("experts")
            for slot in older:
                if slot.unit == DENSE_UNIT:
                    dense += page_rounded(slot.nbytes)
                elif slot.unit != EXTRA_UNIT:
                    experts += page_rounded(slot.nbytes)
            return dense, experts

    def free_all(self) -> None:
        """Frees everything that no persist needs: the live state is becoming another one."""
        with self._lock:
            for unit, steps in self._versions.items():
                for step in [step for step in steps if (unit, step) not in self._needed]:
                    self._discard(unit, step)
            # What is still needed must not count as a version of the new state.
            self._bad |= {step for steps in self._versions.values() for step in steps}
            self._confirmed = self._committed = -1
            self._expected = None

    def _discard(self, unit: str, step: int) -> None:
        slot = self._table.get(self._versions[unit].pop(step).slot.index)
        if slot.state in _IDLE:
            self._table.free([slot])
        elif slot.state == SlotState.FILLING:
            self._table.abandon([slot])

    def _slot(self, key: tuple[str, int]) -> Slot:
        unit, step = key
        return self._table.get(self._versions[unit][step].slot.index)

    def _is_needed(self, slot: Slot) -> bool:
        return (slot.unit, slot.step) in self._needed

    def _older(self, units: Iterable[str], confirmed: int) -> list[Slot]:
        """Returns the slots of these units that are superseded, and needed by nobody, once a step is confirmed."""
        get, bad = self._table.get, self._bad
        slots = [
            get(version.slot.index)
            for unit in units
            if len(steps := self._versions.get(unit, _NONE)) > 1
            for step, version in steps.items()
            if step not in bad
        ]
        found = freeable(slots, confirmed=confirmed, committed=self._committed, keep_committed=self._keep_committed)
        return [slot for slot in found if not self._is_needed(slot)]

    def _free(self, slots: Sequence[Slot]) -> None:
        self._table.free(slots)
        for slot in slots:
            del self._versions[slot.unit][slot.step]
