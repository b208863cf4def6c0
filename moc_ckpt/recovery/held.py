"""Memory of a run that is over, kept until the run after it has restored: the nearest place that holds a version.

What a checkpoint refers to is found here by its address (unit, version, fragment), whatever pack holds it in storage.
Bytes are handed out as views, and only after their checksum was compared with the manifest's.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from moc_ckpt.errors import MocError
from moc_ckpt.recovery.memory import RankMemory, open_memory
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.state.unit import Version, parse_expert_unit
from moc_ckpt.storage.checksum import crc32c

__all__ = ["HeldMemory"]

logger = logging.getLogger("moc_ckpt")

_DENSE = "dense"
_Place = tuple[RankMemory, Sequence[tuple[int, int]]]
# Unit, or "dense" for all dense ones, and step.
_SlotKey = tuple[str, int]


class HeldMemory:
    """The arenas of a run that is over, mapped for reading. Not thread-safe, but for the arrays that it hands out.

    The mapping keeps the memory even where the files are removed; a process that dies lets go of it.

    What it hands out may not be written to.

    Args:
        stack: closes the arenas.
        url: the directory that the run saved into.
        attempt: its attempt there.
        ranks: the arenas.
    """

    def __init__(self, stack: ExitStack, url: str, attempt: int, ranks: Sequence[RankMemory]) -> None:
        self._stack = stack
        self._attempt = attempt
        self._ranks = list(ranks)
        # Mapped for writing, although nobody writes: devices refuse to pin what is not.
        self._arrays = {id(rank): _map(rank.arena.path) for rank in self._ranks}
        self._places: dict[_SlotKey, dict[Fragment, _Place]] = {}
        self._checksums: dict[_SlotKey, Mapping[Fragment, int]] = {}
        self.url = url

    @classmethod
    def open(cls, folder: Path, only: Container[Path] | None = None) -> HeldMemory | None:
        """Maps the arenas of a job's newest run on this node.

        Args:
            folder: the job's directory in shared memory.
            only: look at these arenas alone; None for all.

        Returns:
            The memory; None if there is none that belongs to a checkpoint directory.
        """
        with ExitStack() as stack:
            memory = stack.enter_context(open_memory(folder, only))
            if memory is None:
                return None
            url, attempt = memory.inventory.url, memory.inventory.attempt
            if url is None or attempt is None:
                return None
            return cls(stack.pop_all(), url, attempt, list(memory.ranks.values()))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the run that is over whose memory this is."""
        return tuple(rank.rank for rank in self._ranks)

    @property
    def world(self) -> int:
        """Number of ranks of the run that is over."""
        return self._ranks[0].arena.identity.world if self._ranks else 0

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that it keeps, of all ranks of the node together."""
        return sum(rank.arena.spec.reserved for rank in self._ranks)

    def find(self, unit: str, version: Version, fragment: Fragment) -> list[np.ndarray] | None:
        """Returns a stored fragment's bytes, in order; None if they are not here.

        Args:
            unit: the unit that it belongs to.
            version: attempt and step that its bytes are from.
            fragment: as it was saved, with the dtype that it has there.
        """
        if version.attempt != self._attempt:
            return None
        slot = _slot_of(unit, version)
        places = self._places.get(slot)
        if places is None:
            places = self._places[slot] = self._index(slot)
        found = places.get(fragment)
        if found is None:
            return None
        rank, spans = found
        return [self._arrays[id(rank)][at : at + count] for at, count in spans]

    def checksum(self, unit: str, version: Version, fragment: Fragment) -> int | None:
        """Returns the checksum that `digest` computed of what `find` finds; None if it did not."""
        known = self._checksums.get(_slot_of(unit, version))
        return known.get(fragment) if known is not None else None

    def newest(self, rank: int) -> list[_SlotKey]:
        """Returns the slots of one rank that a load most likely wants: the newest of each unit, dense ones first."""
        steps: dict[str, int] = {}
        for held in self._ranks:
            for unit, step in held.slots if held.rank == rank else ():
                if unit == _DENSE or parse_expert_unit(unit) is not None:
                    steps[unit] = max(step, steps.get(unit, step))
        return sorted(steps.items(), key=lambda item: (item[0] != _DENSE, item[0]))

    def views(self, rank: int, slot: _SlotKey) -> list[np.ndarray]:
        """Returns the memory of a slot of one rank, in order."""
        return [
            self._arrays[id(held)][start : start + room]
            for held in self._ranks
            if held.rank == rank
            for start, room in held.slots[slot].extents
        ]

    def digest(self, rank: int, slot: _SlotKey) -> None:
        """Computes the checksums of a slot of one rank ahead of a load. May run beside all other methods but `close`.

        Raises:
            CorruptionError: if its descriptor cannot be read.
        """
        for held in self._ranks:
            if held.rank != rank:
                continue
            content, memory = held.unit(*slot), self._arrays[id(held)]
            found = {}
            for (_, fragment), offset in zip(content.fragments, content.offsets, strict=True):
                value = 0
                for start, count in cut_extents(content.extents, offset, fragment.nbytes):
                    value = crc32c(memory[start : start + count], value)
                found[fragment] = value
            # Another rank may hold another part of the same unit; what it has is computed when it is wanted.
            self._checksums[slot] = {**self._checksums.get(slot, {}), **found}

    def close(self) -> None:
        """Lets go of the memory, which is freed once nobody has a view. Doing it again changes nothing."""
        self._ranks, self._places, self._arrays = [], {}, {}
        self._stack.close()

    def _index(self, slot: _SlotKey) -> dict[Fragment, _Place]:
        found: dict[Fragment, _Place] = {}
        for rank in self._ranks:
            if slot not in rank.slots:
                continue
            try:
                content = rank.unit(*slot)
            except MocError as error:
                logger.warning("%s; storage has it", error.what)
                continue
            for (_, fragment), offset in zip(content.fragments, content.offsets, strict=True):
                found[fragment] = rank, cut_extents(content.extents, offset, fragment.nbytes)
        return found


def _slot_of(unit: str, version: Version) -> _SlotKey:
    return (unit if parse_expert_unit(unit) is not None else _DENSE, version.step)


def _map(path: Path) -> np.ndarray:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return np.frombuffer(mmap.mmap(handle, 0), dtype=np.uint8)
    finally:
        os.close(handle)


def cut_extents(extents: Sequence[tuple[int, int]], offset: int, nbytes: int) -> list[tuple[int, int]]:
    """Returns where bytes [offset, offset + nbytes) of a slot lie: (first byte in the file, bytes), in order. Pure."""
    found: list[tuple[int, int]] = []
    for start, room in extents:
        if nbytes == 0:
            break
        if offset < room:
            count = min(room - offset, nbytes)
            found.append((start + offset, count))
            nbytes -= count
        offset = max(offset - room, 0)
    return found
