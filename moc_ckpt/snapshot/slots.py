"""The slot table: which version of which unit lies where in an arena (DESIGN section 8).

The truth is in the mapping, so it outlives the process. The body of a record is only written while its state is
FREE, and the state is stored last; so whenever a process is killed, every record is either whole or FREE. Python
keeps a copy of the table and of the free space, so nothing here costs more than the slots it is asked about.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moc_ckpt.errors import CorruptionError
from moc_ckpt.snapshot.descriptors import Descriptors
from moc_ckpt.snapshot.extents import Extent, FreeSpace
from moc_ckpt.snapshot.records import (
    GRAIN,
    MAX_EXTENTS,
    POOLS,
    RECORD,
    RECORD_BYTES,
    UNIT_BYTES,
    Region,
    Slot,
    SlotState,
    decode,
    encode,
    page_rounded,
    seal,
)
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.local import raise_storage_error

__all__ = ["GRAIN", "MAX_EXTENTS", "POOLS", "RECORD_BYTES", "Region", "Slot", "SlotState", "SlotTable", "page_rounded"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
_LIVE = tuple(SlotState)[1:]


class SlotTable:
    """The slots of one arena. Thread-safe; one process at a time may change it, any may read it.

    Methods that change slots check all of them first, so they change either all or none.

    Args:
        memory: the whole file, uint8.
        records: where the records are.
        pools: where each pool's slots go.
        descriptors: where the descriptors go.
        clock_at: file offset of a word (8 bytes, aligned) that is odd while records change, so that other processes
            can tell a table that stood still while they read it.
        write: writes bytes at a file offset without touching the mapping, so that a full file system is an error
            and not a signal; None to read only.
        where: the file's name, for messages.

    Attributes:
        damaged: numbers of the records that were not FREE and not valid when the table was read. They count as FREE.
        refusal: why the last `begin` found no room.

    Raises:
        CorruptionError: if two slots overlap.
    """

    def __init__(
        self,
        memory: np.ndarray,
        records: Region,
        pools: Mapping[str, Region],
        descriptors: Region,
        *,
        clock_at: int,
        write: Callable[[int, bytes], None] | None,
        where: str = "",
    ) -> None:
        self._memory = memory
        self._rows = memory[records.start : records.start + records.nbytes].reshape(-1, RECORD_BYTES)
        self._states = self._rows.reshape(-1).view(RECORD)["state"]
        self._clock = memory[clock_at : clock_at + 8].view(np.uint64)
        self._pools = {name: pools[name] for name in POOLS}
        self._descriptor_region = descriptors
        self._write = write
        self._where = where
        self._lock = threading.Lock()
        self.refusal = ""
        self.damaged: tuple[int, ...] = ()
        self.reload()

    # ---- reading ----

    def reload(self) -> None:
        """Reads the table from the mapping again, e.g. to see what another process changed.

        Slots that are PERSISTING then count as pinned once.

        Raises:
            CorruptionError: if two slots overlap.
        """
        with self._lock:
            self._read()

    def get(self, index: int) -> Slot:
        """Returns the slot of a record.

        Raises:
            ValueError: if it is FREE.
        """
        slot = self._slots[index] if 0 <= index < len(self._slots) else None
        if slot is None:
            raise ValueError(f"slot {index} is FREE")
        return slot

    def live(self, units: Iterable[str] | None = None) -> list[Slot]:
        """Returns the slots that are not FREE, all or those of some units (then it costs only what it returns)."""
        with self._lock:
            if units is None:
                return [slot for slot in self._slots if slot is not None]
            indices = [index for unit in dict.fromkeys(units) for index in self._by_unit.get(unit, ())]
            return [slot for slot in map(self._slots.__getitem__, indices) if slot is not None]

    def descriptor(self, slot: Slot) -> bytes:
        """Returns the descriptor that was given for a slot.

        Raises:
            ValueError: if the slot has been freed.
            CorruptionError: if the descriptor is damaged.
        """
        with self._lock:
            (slot,) = self._current([slot], _LIVE, "read the descriptor of")
            at, nbytes = slot.meta
            data = self._memory[at : at + nbytes].tobytes()
            if crc32c(data) != int(self._rows[slot.index].view(RECORD)["meta_crc32c"][0]):
                raise CorruptionError(
                    f"the descriptor of {_name(slot)} in shared memory is damaged",
                    where=self._where,
                    fix="this copy cannot be used; an older version or the checkpoint on storage can",
                )
            return data

    def holes(self, pool: str) -> list[Extent]:
        """Returns the free extents (file offset, bytes) of a pool in order of address."""
        with self._lock:
            return self._space[pool].holes()

    def free_bytes(self, pool: str) -> int:
        """Returns the free bytes of a pool."""
        return self._space[pool].free

    def fits(self, pool: str, sizes: Sequence[int]) -> bool:
        """Tells whether `begin` would find room for units of these sizes (bytes), given room for the descriptors."""
        with self._lock:
            return self._plan(pool, sizes) is not None

    # ---- changing ----

    def begin(
        self, pool: str, items: Sequence[tuple[str, int, bytes]], *, attempt: int, step: int
    ) -> list[Slot] | None:
        """Takes slots for new versions of units, all or none. They are FILLING.

        The units of one call lie one after the other where there is room for it. A slot may have several extents,
        but those of the `extra` pool have one.

        Args:
            pool: `dense`, `experts` or `extra`.
            items: unit, size in bytes and descriptor (opaque bytes that say what the unit's bytes mean) of each.
            attempt: the attempt that the bytes are from.
            step: the step that they are from.

        Returns:
            The slots in the order of `items`; None if there is no room, see `refusal`.

        Raises:
            ValueError: if a name, size or pool makes no sense.
            StorageError: if the file cannot be written, other than for lack of room.
        """
        with self._lock:
            self._check_writable()
            sizes = [nbytes for _, nbytes, _ in items]
            names = [unit.encode() for unit, _, _ in items]
            for name, nbytes in zip(names, sizes, strict=True):
                if not 0 < len(name) <= UNIT_BYTES or b"\0" in name or nbytes < 0:
                    raise ValueError(f"unit {name!r} of {nbytes} bytes: names have 1 to {UNIT_BYTES} bytes, sizes >= 0")
            places = self._plan(pool, sizes)
            if places is None:
                return None
            indices = self._vacant[len(self._vacant) - len(items) :][::-1]
            rows = encode(names, sizes, places, attempt, step, POOLS.index(pool))
            metas = self._store([blob for _, _, blob in items])
            if metas is None:
                return None
            seal(rows, metas)
            self._space[pool].take(extent for extents in places for extent in extents)
            del self._vacant[len(self._vacant) - len(items) :]
            where = np.array(indices, dtype=np.intp)
            self._clock += 1
            self._rows[where] = rows  # their state is FREE in `rows` as well
            self._states[where] = SlotState.FILLING
            self._clock += 1
            slots = []
            filling = SlotState.FILLING
            for index, (unit, nbytes, _), extents, meta in zip(indices, items, places, metas, strict=True):
                slot = Slot(index, unit, attempt, step, filling, nbytes, extents, meta[:2])
                self._slots[index] = slot
                self._pool_of[index] = pool
                self._by_unit.setdefault(unit, []).append(index)
                slots.append(slot)
            return slots

    def filled(self, slots: Sequence[Slot]) -> list[Slot]:
        """FILLING -> FILLED: their bytes are whole. Returns them in their new state.

        Raises:
            ValueError: if a slot is in another state or is another version's by now.
        """
        with self._lock:
            self._check_writable()
            return self._move(self._current(slots, (SlotState.FILLING,), "mark as filled"), SlotState.FILLED)

    def abandon(self, slots: Sequence[Slot]) -> None:
        """FILLING -> FREE: their bytes will never be whole.

        Raises:
            ValueError: if a slot is in another state or is another version's by now.
        """
        with self._lock:
            self._check_writable()
            self._release(self._current(slots, (SlotState.FILLING,), "abandon"))

    def free(self, slots: Sequence[Slot]) -> None:
        """FILLED or COMMITTED -> FREE.

        Raises:
            ValueError: if a slot is in another state (e.g. pinned) or is another version's by now.
        """
        with self._lock:
            self._check_writable()
            self._release(self._current(slots, (SlotState.FILLED, SlotState.COMMITTED), "free"))

    def pin(self, slots: Sequence[Slot]) -> list[Slot]:
        """FILLED or COMMITTED -> PERSISTING: somebody reads them until `unpin`. Returns them in their new state.

        Pins are counted: a slot may be part of several saves at once.

        Raises:
            ValueError: if a slot is in another state or is another version's by now.
        """
        allowed = (SlotState.FILLED, SlotState.PERSISTING, SlotState.COMMITTED)
        with self._lock:
            self._check_writable()
            current = self._current(slots, allowed, "pin")
            for slot in current:
                self._pins[slot.index] = self._pins.get(slot.index, 0) + 1
                if slot.state == SlotState.COMMITTED:
                    self._committed.add(slot.index)
            return self._move(current, SlotState.PERSISTING)

    def unpin(self, slots: Sequence[Slot], *, committed: bool) -> list[Slot]:
        """Ends one pin; after the last one: PERSISTING -> COMMITTED or FILLED. Returns the slots as they are then.

        Args:
            slots: slots that were pinned.
            committed: a checkpoint on storage holds them now. What one save has committed stays so.

        Raises:
            ValueError: if a slot is not pinned or is another version's by now.
        """
        with self._lock:
            self._check_writable()
            current = self._current(slots, (SlotState.PERSISTING,), "unpin")
            for slot in current:
                self._pins[slot.index] -= 1
                if committed:
                    self._committed.add(slot.index)
            self._settle([slot for slot in current if not self._pins[slot.index]])
            return [self.get(slot.index) for slot in current]

    def drop_filling(self) -> int:
        """FILLING -> FREE for all, when whoever filled them is gone. Returns their number."""
        with self._lock:
            self._check_writable()
            slots = [slot for slot in self._slots if slot is not None and slot.state == SlotState.FILLING]
            self._release(slots)
            return len(slots)

    def drop_pins(self) -> int:
        """PERSISTING -> FILLED (COMMITTED if known) for all, when whoever read them is gone. Returns their number."""
        with self._lock:
            self._check_writable()
            slots = [slot for slot in self._slots if slot is not None and slot.state == SlotState.PERSISTING]
            self._settle(slots)
            return len(slots)

    # ---- inside ----

    def _check_writable(self) -> None:
        if self._write is None:
            raise ValueError("the arena was opened for reading only")

    def _plan(self, pool: str, sizes: Sequence[int]) -> list[tuple[Extent, ...]] | None:
        """Chooses places for units, or says in `refusal` why there are none."""
        if pool not in self._space:
            raise ValueError(f"there is no pool {pool!r}: the pools are {', '.join(POOLS)}")
        if len(sizes) > len(self._vacant):
            self.refusal = f"{len(sizes)} slots needed, {len(self._vacant)} of {len(self._slots)} are free"
            return None
        need = [page_rounded(nbytes) for nbytes in sizes]
        space = self._space[pool]
        # The extra region costs only what is written there, so it can be large enough to keep each slot in one run.
        places = space.plan(need, 1 if pool == "extra" else MAX_EXTENTS)
        if places is None:
            scattered = ", too scattered" if sum(need) <= space.free else ""
            self.refusal = f"{sum(need):,} bytes needed in the {pool} region, {space.free:,} free{scattered}"
        return places

    def _store(self, blobs: Sequence[bytes]) -> list[tuple[int, int, int]] | None:
        """Stores descriptors, or says in `refusal` why there is no room."""
        try:
            metas = self._descriptors.put(blobs)
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise_storage_error(exc, "writing descriptors to shared memory", self._where)
            self.refusal = f"shared memory is full: {sum(map(len, blobs)):,} bytes of descriptors have no room"
            return None
        if metas is None:
            self.refusal = f"the region of the descriptors has no room for {sum(map(len, blobs)):,} bytes"
        return metas

    def _current(self, slots: Sequence[Slot], allowed: Sequence[SlotState], verb: str) -> list[Slot]:
        """Returns the slots as they are now, if all may be changed so."""
        current = []
        for given in slots:
            slot = self._slots[given.index]
            if slot is None:
                raise ValueError(f"cannot {verb} {_name(given)}: the slot is FREE")
            if slot.extents is not given.extents and (
                (slot.unit, slot.attempt, slot.step, slot.extents)
                != (given.unit, given.attempt, given.step, given.extents)
            ):
                raise ValueError(f"cannot {verb} {_name(given)}: the slot holds {_name(slot)} by now")
            if slot.state not in allowed:
                names = " or ".join(state.name for state in allowed)
                raise ValueError(f"cannot {verb} {_name(slot)}: it is {slot.state.name}, not {names}")
            current.append(slot)
        if len({slot.index for slot in current}) != len(current):
            raise ValueError(f"cannot {verb} a slot twice at once")
        return current

    def _set(self, slots: Sequence[Slot], state: SlotState) -> None:
        self._clock += 1
        self._states[np.array([slot.index for slot in slots], dtype=np.intp)] = state
        self._clock += 1

    def _move(self, slots: Sequence[Slot], state: SlotState) -> list[Slot]:
        self._set(slots, state)
        moved = [
            Slot(slot.index, slot.unit, slot.attempt, slot.step, state, slot.nbytes, slot.extents, slot.meta)
            for slot in slots
        ]
        for slot in moved:
            self._slots[slot.index] = slot
        return moved

    def _settle(self, slots: Sequence[Slot]) -> None:
        """Ends all pins of slots that are PERSISTING."""
        self._move([slot for slot in slots if slot.index in self._committed], SlotState.COMMITTED)
        self._move([slot for slot in slots if slot.index not in self._committed], SlotState.FILLED)
        for slot in slots:
            self._pins.pop(slot.index)
            self._committed.discard(slot.index)

    def _release(self, slots: Sequence[Slot]) -> None:
        self._set(slots, SlotState.FREE)  # before anything can be placed there
        gone: dict[str, list[Extent]] = {}
        for slot in slots:
            index = slot.index
            self._slots[index] = None
            gone.setdefault(self._pool_of[index], []).extend(slot.extents)
            versions = self._by_unit[slot.unit]
            versions.remove(index)
            if not versions:
                del self._by_unit[slot.unit]
        for pool, extents in gone.items():
            self._space[pool].give(extents)
        self._descriptors.drop(slot.meta for slot in slots)
        self._vacant.extend(slot.index for slot in reversed(slots))

    def _read(self) -> None:
        rows = self._still_copy()
        count = len(rows)
        self._slots: list[Slot | None] = [None] * count
        self._pool_of = [""] * count
        self._by_unit: dict[str, list[int]] = {}
        self._pins: dict[int, int] = {}
        self._committed: set[int] = set()
        self._space = {name: FreeSpace(*region) for name, region in self._pools.items()}
        self._descriptors = Descriptors(self._descriptor_region, self._write or _refuse)
        damaged = []
        for index in np.flatnonzero(rows.reshape(-1).view(RECORD)["state"]).tolist():
            parsed = decode(index, rows[index], self._pools, self._descriptor_region)
            if parsed is None:
                damaged.append(index)
                continue
            slot, pool = parsed
            try:
                self._space[pool].take(slot.extents)
                self._descriptors.adopt(slot.meta)
            except ValueError as exc:
                raise CorruptionError(
                    f"two slots overlap in shared memory, one of them is {_name(slot)}: {exc}",
                    where=self._where,
                    fix="this arena cannot be trusted: remove the file; the checkpoints on storage are not affected",
                ) from exc
            self._slots[index], self._pool_of[index] = slot, pool
            self._by_unit.setdefault(slot.unit, []).append(index)
            if slot.state == SlotState.PERSISTING:
                self._pins[index] = 1
        self.damaged = tuple(damaged)
        if self._write is not None:
            self._states[damaged] = SlotState.FREE
            self._clock += self._clock & np.uint64(1)
        self._vacant = [index for index in reversed(range(count)) if self._slots[index] is None]

    def _still_copy(self) -> np.ndarray:
        """Copies the records at a moment when nobody was changing them.

        A writer that stands still in the middle of a change was killed or stopped, which harms no record.
        """
        patience = 0.05 if self._write is None else 0.0
        start = since = time.monotonic()
        seen = -1
        while True:
            before, now = int(self._clock[0]), time.monotonic()
            if before != seen:
                seen, since = before, now
            rows: np.ndarray = self._rows.copy()
            unchanged = int(self._clock[0]) == before
            stopped = before % 2 == 0 or now - since >= patience
            if (unchanged and stopped) or now - start > 1.0:
                return rows
            time.sleep(0.0005)


def _name(slot: Slot) -> str:
    return f"slot {slot.index} ({slot.unit} of attempt {slot.attempt}, step {slot.step})"


def _refuse(_at: int, _data: bytes) -> None:
    raise ValueError("the arena was opened for reading only")
