"""What of a recovery plan memory can serve: every stored fragment whose version lies in an arena of this node."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.recovery.resolver import Piece, Read, RecoveryPlan
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentRow, Manifest

__all__ = ["MemoryPiece", "split_plan"]

logger = logging.getLogger("moc_ckpt")

_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class MemoryPiece:
    """An interval of a needed fragment, and its bytes in memory.

    Attributes:
        piece: the interval.
        views: its bytes, in order.
    """

    piece: Piece
    views: Sequence[np.ndarray]


def split_plan(held: HeldMemory, manifest: Manifest, plan: RecoveryPlan) -> tuple[list[MemoryPiece], RecoveryPlan]:
    """Finds what memory holds of what a plan reads, and checks it against the manifest's checksums.

    What does not agree is left to storage; a warning says so.

    Args:
        held: memory of the run that is over.
        manifest: the manifest that the plan was made from.
        plan: what this rank reads.

    Returns:
        What is in memory, and the plan of what is left for storage.
    """
    rows = _Rows(manifest, {read.pack for read in plan.reads})
    wanted: dict[FragmentRow, list[tuple[int, Piece]]] = {}
    for read in plan.reads:
        for piece in read.pieces:
            row = rows.at(read.pack, piece.offset) if piece.nbytes else None
            if row is not None:
                wanted.setdefault(row, []).append((read.pack, piece))
    found: dict[FragmentRow, list[np.ndarray]] = {}
    for row in wanted:
        unit, tensor = manifest.units[row.unit], manifest.tensors[row.tensor]
        fragment = Fragment(tensor.fqn, tensor.kind, tensor.dtype, tuple(tensor.shape), row.start, row.stop)
        views = held.find(unit.name, unit.version, fragment)
        if views is not None:
            found[row] = views
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="moc-check") as workers:
        right = list(workers.map(lambda item: _checksum(item[1]) == item[0].crc32c, found.items()))
    if wrong := [row for row, ok in zip(found, right, strict=True) if not ok]:
        name = manifest.units[wrong[0].unit].name
        logger.warning(
            "DAMAGED: %d fragments in memory are not what the checkpoint saved, %s among them; storage has them",
            len(wrong),
            name,
        )
    here: list[MemoryPiece] = []
    served: set[tuple[int, Piece]] = set()
    for (row, views), ok in zip(found.items(), right, strict=True):
        for pack, piece in wanted[row] if ok else ():
            here.append(MemoryPiece(piece, _cut(views, piece.offset - row.offset, piece.nbytes)))
            served.add((pack, piece))
    left = [
        Read(read.pack, pieces)
        for read in plan.reads
        if (pieces := tuple(piece for piece in read.pieces if (read.pack, piece) not in served))
    ]
    return here, RecoveryPlan(tuple(left), plan.dtypes)


class _Rows:
    """Finds the stored fragment at a place of a pack."""

    def __init__(self, manifest: Manifest, packs: set[int]) -> None:
        by_pack: dict[int, list[FragmentRow]] = {}
        for row in manifest.fragments:
            if row.pack in packs and row.stop > row.start:
                by_pack.setdefault(row.pack, []).append(row)
        self._rows: Mapping[int, list[FragmentRow]] = {
            pack: sorted(rows, key=lambda row: row.offset) for pack, rows in by_pack.items()
        }
        self._offsets = {pack: [row.offset for row in rows] for pack, rows in self._rows.items()}

    def at(self, pack: int, offset: int) -> FragmentRow | None:
        index = bisect_right(self._offsets.get(pack, []), offset) - 1
        return self._rows[pack][index] if index >= 0 else None


def _checksum(views: Sequence[np.ndarray]) -> int:
    value = 0
    for view in views:
        value = crc32c(view, value)
    return value


def _cut(views: Sequence[np.ndarray], offset: int, nbytes: int) -> list[np.ndarray]:
    found = []
    for view in views:
        if nbytes and offset < len(view):
            part = view[offset : offset + nbytes]
            found.append(part)
            nbytes -= len(part)
        offset = max(offset - len(view), 0)
    return found
