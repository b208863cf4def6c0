"""Slots and their records: 512 bytes of shared memory that say what a slot holds (pure).

A record is a body with its own checksum, and beside it the state, one aligned word that is stored by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from moc_ckpt.snapshot.extents import Extent
from moc_ckpt.storage.checksum import crc32c

__all__ = [
    "DESCRIPTOR_GRAIN",
    "GRAIN",
    "MAX_EXTENTS",
    "POOLS",
    "RECORD",
    "RECORD_BYTES",
    "UNIT_BYTES",
    "Region",
    "Slot",
    "SlotState",
    "decode",
    "encode",
    "page_rounded",
    "rounded",
    "seal",
]

GRAIN = 4096
"""Slots begin at and occupy multiples of this many bytes, so that O_DIRECT can write them as they are."""

POOLS = ("dense", "experts", "extra")
RECORD_BYTES = 512
MAX_EXTENTS = 48

UNIT_BYTES = 64
DESCRIPTOR_GRAIN = 64
RECORD = np.dtype(
    {
        "names": [
            *("state", "crc32c", "attempt", "step", "nbytes", "meta_at", "meta_nbytes", "meta_crc32c"),
            *("pool", "extents", "unit_nbytes", "unit", "pages"),
        ],
        "formats": [
            *("<u4", "<u4", "<i8", "<i8", "<i8", "<i8", "<u4", "<u4"),
            *("u1", "u1", "u1", f"S{UNIT_BYTES}", ("<u4", (MAX_EXTENTS, 2))),
        ],
        "offsets": [0, 4, 8, 16, 24, 32, 40, 44, 48, 49, 50, 64, 128],
        "itemsize": RECORD_BYTES,
    }
)
_BODY = 8  # behind the state and the checksum: what the checksum covers


class SlotState(IntEnum):
    """What a slot's bytes are: nothing, being copied, whole, being written to storage, or stored by a commit."""

    FREE = 0
    FILLING = 1
    FILLED = 2
    PERSISTING = 3
    COMMITTED = 4


class Region(NamedTuple):
    """A byte range of the arena's file."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One version of one unit, as it was when the table was asked.

    Attributes:
        index: number of its record; it is used again after the slot is freed.
        unit: name of the unit (`dense`, `extra` or an expert unit).
        attempt: which timeline of the process the bytes are from: 0, then one more with every restore. Which attempt
            that is depends on the directory; the arena's identity says it for the one that was opened last.
        step: the step they are from.
        state: what the bytes are.
        nbytes: size of the unit in bytes.
        extents: (file offset, bytes), multiples of 4096, in the order of the unit's bytes; together they have
            `nbytes` rounded up.
        meta: (file offset, bytes) of the descriptor; (0, 0) for an empty one.
    """

    index: int
    unit: str
    attempt: int
    step: int
    state: SlotState
    nbytes: int
    extents: tuple[Extent, ...]
    meta: Extent


def rounded(nbytes: int, grain: int) -> int:
    """Returns the smallest multiple of `grain` that is not below `nbytes`."""
    return -(-nbytes // grain) * grain


def page_rounded(nbytes: int) -> int:
    """Returns the bytes that a slot for `nbytes` bytes occupies."""
    return rounded(nbytes, GRAIN)


def encode(
    names: Sequence[bytes],
    sizes: Sequence[int],
    places: Sequence[tuple[Extent, ...]],
    attempt: int,
    step: int,
    pool: int,
) -> np.ndarray:
    """Returns the records of new slots but for what `seal` adds."""
    rows = np.zeros((len(names), RECORD_BYTES), dtype=np.uint8)
    records = rows.reshape(-1).view(RECORD)
    records["attempt"], records["step"], records["pool"] = attempt, step, pool
    records["nbytes"], records["unit"] = sizes, names
    records["unit_nbytes"] = [len(name) for name in names]
    records["extents"] = [len(extents) for extents in places]
    first = [extents[0] if extents else (0, 0) for extents in places]
    records["pages"][:, 0] = np.array(first, dtype=np.int64).reshape(-1, 2) // GRAIN
    for row, extents in enumerate(places):
        if len(extents) > 1:
            records["pages"][row, : len(extents)] = np.array(extents, dtype=np.int64) // GRAIN
    return rows


def seal(rows: np.ndarray, metas: Sequence[tuple[int, int, int]]) -> None:
    """Completes the records of new slots.

    Args:
        rows: what `encode` returned.
        metas: (file offset, bytes, crc32c) of each slot's descriptor.
    """
    records = rows.reshape(-1).view(RECORD)
    fields = np.array(metas, dtype=np.int64).reshape(-1, 3)
    records["meta_at"], records["meta_nbytes"], records["meta_crc32c"] = fields.T
    body = rows[:, _BODY:].tobytes()
    size = RECORD_BYTES - _BODY
    records["crc32c"] = [crc32c(body[at : at + size]) for at in range(0, len(body), size)]


def decode(index: int, row: np.ndarray, pools: Mapping[str, Region], descriptors: Region) -> tuple[Slot, str] | None:
    """Returns a record's slot and pool; None if the record is not valid."""
    record = row.view(RECORD)[0]
    if int(record["crc32c"]) != crc32c(row[_BODY:].tobytes()):
        return None
    count, pool, nbytes = int(record["extents"]), int(record["pool"]), int(record["nbytes"])
    if not 1 <= record["state"] <= max(SlotState) or pool >= len(POOLS) or count > MAX_EXTENTS or nbytes < 0:
        return None
    extents = tuple((at * GRAIN, size * GRAIN) for at, size in record["pages"][:count].tolist())
    meta = (int(record["meta_at"]), int(record["meta_nbytes"]))
    inside = all(_within((at, size), pools[POOLS[pool]]) for at, size in extents)
    if not inside or sum(size for _, size in extents) != page_rounded(nbytes):
        return None
    if meta[1] and not _within((meta[0], rounded(meta[1], DESCRIPTOR_GRAIN)), descriptors):
        return None
    slot = Slot(
        index=index,
        unit=record["unit"][: record["unit_nbytes"]].decode(),
        attempt=int(record["attempt"]),
        step=int(record["step"]),
        state=SlotState(int(record["state"])),
        nbytes=nbytes,
        extents=extents,
        meta=meta,
    )
    return slot, POOLS[pool]


def _within(extent: Extent, region: Region) -> bool:
    return region.start <= extent[0] and extent[1] > 0 and sum(extent) <= region.start + region.nbytes
