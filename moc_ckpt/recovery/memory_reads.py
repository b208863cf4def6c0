"""What of a recovery plan memory can serve: every stored fragment whose version lies in an arena of this node."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.recovery.resolver import Piece, Read, RecoveryPlan
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentRow, Manifest

__all__ = ["MemoryPiece", "Rows", "aligned", "cut_views", "split_plan", "verified", "without"]

logger = logging.getLogger("moc_ckpt")

_MOST_THREADS = 8
# Bytes that begin at a multiple of it can be used as a tensor of any dtype where they are.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class MemoryPiece:
    """An interval of a needed fragment, and its bytes in memory.

    Attributes:
        piece: the interval.
        views: its bytes, in order.
    """

    piece: Piece
    views: Sequence[npt.NDArray[np.uint8]]


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
    rows = Rows(manifest, {read.pack for read in plan.reads})
    wanted: dict[FragmentRow, list[tuple[int, Piece]]] = {}
    for read in plan.reads:
        for piece in read.pieces:
            row = rows.at(read.pack, piece.offset) if piece.nbytes else None
            if row is not None:
                wanted.setdefault(row, []).append((read.pack, piece))
    here: list[MemoryPiece] = []
    served: set[tuple[int, Piece]] = set()
    for row, views in verified(held, manifest, wanted).items():
        for pack, piece in wanted[row]:
            here.append(MemoryPiece(piece, cut_views(views, piece.offset - row.offset, piece.nbytes)))
            served.add((pack, piece))
    return here, without(plan, served)


def verified(
    held: HeldMemory, manifest: Manifest, rows: Iterable[FragmentRow]
) -> dict[FragmentRow, list[npt.NDArray[np.uint8]]]:
    """Finds stored fragments in memory, and checks them against the manifest's checksums.

    What does not agree is left out; a warning says so.

    Args:
        held: memory of the run that is over.
        manifest: the manifest of the rows.
        rows: the fragments.

    Returns:
        Row -> its bytes, in order; of those that are there and right.
    """
    found: dict[FragmentRow, list[npt.NDArray[np.uint8]]] = {}
    known: dict[FragmentRow, int | None] = {}
    for row in rows:
        unit, tensor = manifest.units[row.unit], manifest.tensors[row.tensor]
        fragment = Fragment(tensor.fqn, tensor.kind, tensor.dtype, tuple(tensor.shape), row.start, row.stop)
        views = held.find(unit.name, unit.version, fragment)
        if views is not None:
            found[row] = views
            known[row] = held.checksum(unit.name, unit.version, fragment)

    def is_right(row: FragmentRow) -> bool:
        value = known[row]
        return (_checksum(found[row]) if value is None else value) == row.crc32c

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="moc-check") as workers:
        right = list(workers.map(is_right, found))
    if wrong := [row for row, ok in zip(found, right, strict=True) if not ok]:
        logger.warning(
            "DAMAGED: %d fragments in memory are not what the checkpoint saved, %s among them; storage has them",
            len(wrong),
            manifest.units[wrong[0].unit].name,
        )
    return {row: views for (row, views), ok in zip(found.items(), right, strict=True) if ok}


def without(plan: RecoveryPlan, served: Set[tuple[int, Piece]]) -> RecoveryPlan:
    """Returns what is left of a plan. Pure.

    Args:
        plan: the plan.
        served: pack and piece of what is there already.
    """
    left = [
        Read(read.pack, pieces)
        for read in plan.reads
        if (pieces := tuple(piece for piece in read.pieces if (read.pack, piece) not in served))
    ]
    return RecoveryPlan(tuple(left), plan.dtypes)


class Rows:
    """Finds the stored fragment at a place of a pack.

    Args:
        manifest: the manifest.
        packs: indexes of the packs that will be asked for.
    """

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
        """Returns the fragment that begins at or before a byte of a pack and is the last to do so."""
        index = bisect_right(self._offsets.get(pack, []), offset) - 1
        return self._rows[pack][index] if index >= 0 else None


def _checksum(views: Sequence[npt.NDArray[np.uint8]]) -> int:
    value = 0
    for view in views:
        value = crc32c(view, value)
    return value


def cut_views(views: Sequence[npt.NDArray[np.uint8]], offset: int, nbytes: int) -> list[npt.NDArray[np.uint8]]:
    """Returns bytes [offset, offset + nbytes) of arrays that are one after the other, without a copy. Pure."""
    found = []
    for view in views:
        if nbytes and offset < len(view):
            part = view[offset : offset + nbytes]
            found.append(part)
            nbytes -= len(part)
        offset = max(offset - len(view), 0)
    return found


def aligned(at: int) -> int:
    """Returns the first place at or after a byte at which a tensor may begin. Pure."""
    return -(-at // _ALIGNMENT) * _ALIGNMENT
