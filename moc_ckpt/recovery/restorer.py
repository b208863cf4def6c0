"""Brings the bytes of a recovery plan into host memory, checked, before any live state is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from moc_ckpt.errors import CorruptionError
from moc_ckpt.recovery.checks import Damage
from moc_ckpt.recovery.memory_reads import MemoryPiece, aligned
from moc_ckpt.recovery.resolver import Piece, Read, RecoveryPlan, Stored, StoredTensor
from moc_ckpt.state.fragment import Fragment, TensorKey, itemsize
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.state.unit_text import compact_units
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentRow, Manifest
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import explain_pack

__all__ = ["index_manifest", "stage", "try_stage"]


def index_manifest(manifest: Manifest, wanted: Iterable[TensorKey] | None = None) -> dict[TensorKey, StoredTensor]:
    """Returns where each logical tensor of a manifest is stored.

    Args:
        manifest: the manifest.
        wanted: leave out all other tensors; None takes all.
    """
    keys = [TensorKey(record.fqn, record.kind) for record in manifest.tensors]
    keep = set(wanted) if wanted is not None else None
    found: dict[TensorKey, list[Stored]] = {key: [] for key in keys if keep is None or key in keep}
    for row in manifest.fragments:
        fragments = found.get(keys[row.tensor])
        if fragments is not None:
            fragments.append(Stored(row.start, row.stop, row.pack, row.offset, row.crc32c))
    return {
        key: StoredTensor(record.dtype, tuple(record.shape), tuple(sorted(found[key])))
        for key, record in zip(keys, manifest.tensors, strict=True)
        if key in found
    }


def stage(
    store: Store, manifest: Manifest, plan: RecoveryPlan, needs: Sequence[Fragment], units: Sequence[str]
) -> list[torch.Tensor]:
    """Reads everything that a plan asks for, all or nothing; otherwise as `try_stage`.

    Raises:
        CorruptionError: naming the file, the units, and the expected and found checksum; and for a pack that an
            older checkpoint left, that checkpoint.
    """
    values, damage = try_stage(store, manifest, plan, needs, units)
    if damage:
        raise damage[0].error()
    return values


def try_stage(
    store: Store,
    manifest: Manifest,
    plan: RecoveryPlan,
    needs: Sequence[Fragment],
    units: Sequence[str],
    memory: Sequence[MemoryPiece] = (),
) -> tuple[list[torch.Tensor], list[Damage]]:
    """Reads what can be read of a plan. Not collective; touches no live state.

    Args:
        store: the checkpoint root.
        manifest: the manifest that the plan was made from.
        plan: what to read.
        needs: the needed fragments, as given to `resolve`.
        units: the unit of each.
        memory: what is not read because it is in memory already.

    Returns:
        One 1-D CPU tensor per needed fragment, of the stored dtype, and what is damaged: the values of units that are
        named there mean nothing. What lies in memory in one piece is shown where it is: it may not be written to.

    Raises:
        StorageError: if the store cannot be read.
    """
    sizes = [need.numel * itemsize(dtype) for need, dtype in zip(needs, plan.dtypes, strict=True)]
    shown = {
        item.piece.need: item.views[0]
        for item in memory
        if len(item.views) == 1 and item.piece.nbytes == sizes[item.piece.need] and _is_aligned(item.views[0])
    }
    starts, total = [], 0
    for index, size in enumerate(sizes):
        starts.append(total)
        total += aligned(size) if index not in shown else 0
    # numpy asks for huge pages, which are an order of magnitude cheaper to touch first.
    staged = torch.from_numpy(np.empty(total, dtype=np.uint8))
    for item in memory:
        if item.piece.need not in shown:
            at = starts[item.piece.need] + item.piece.at
            for view in item.views:
                staged.numpy()[at : at + len(view)] = view
                at += len(view)
    damage = []
    witnesses = _Witnesses(manifest)
    for read in plan.reads:
        found = _PackStage(store, manifest, read, staged.numpy(), starts, units, witnesses).run()
        damage += [found] if found is not None else []
    values = []
    for index, (start, size, dtype) in enumerate(zip(starts, sizes, plan.dtypes, strict=True)):
        data = torch.from_numpy(shown[index]) if index in shown else staged[start : start + size]
        kind = getattr(torch, dtype)
        values.append(data.view(kind) if size else torch.empty(0, dtype=kind))
    return values, damage


def _is_aligned(view: np.ndarray) -> bool:
    at = int(view.ctypes.data)
    return aligned(at) == at


class _Witnesses:
    """Whole fragments of packs, the smallest first; made when the first is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._by_pack: dict[int, list[FragmentRow]] | None = None

    def of(self, pack: int, start: int, stop: int) -> tuple[FragmentRow, int] | None:
        """Returns the smallest fragment with bytes of the pack in [start, stop), and its size in bytes."""
        if self._by_pack is None:
            self._by_pack = {}
            for row in self._manifest.fragments:
                if row.stop > row.start:
                    self._by_pack.setdefault(row.pack, []).append(row)
        sized = [(row, self._nbytes(row)) for row in self._by_pack.get(pack, [])]
        inside = [item for item in sized if item[0].offset < stop and item[0].offset + item[1] > start]
        return min(inside, key=lambda item: item[1], default=None)

    def _nbytes(self, row: FragmentRow) -> int:
        return (row.stop - row.start) * itemsize(self._manifest.tensors[row.tensor].dtype)


class _PackStage:
    """Reads what one rank needs of one pack."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        read: Read,
        memory: np.ndarray,
        starts: Sequence[int],
        units: Sequence[str],
        witnesses: _Witnesses,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._read = read
        self._memory = memory
        self._starts = starts
        self._units = units
        self._witnesses = witnesses
        self._record = manifest.packs[read.pack]
        self._reader = PackReader(store, self._record.path, self._record.nbytes)

    def run(self) -> Damage | None:
        """Reads it; what is damaged, unit by unit."""
        try:
            self._fill(self._read.pieces)
        except CorruptionError as error:
            first = error
        else:
            return None
        by_unit: dict[str, list[Piece]] = {}
        for piece in self._read.pieces:
            by_unit.setdefault(self._units[piece.need], []).append(piece)
        bad = list(by_unit)
        if any(parse_expert_unit(unit) is not None for unit in by_unit):
            # Only for experts does it matter which of them can still be read.
            bad = []
            for unit, pieces in by_unit.items():
                try:
                    self._fill(pieces)
                except CorruptionError as error:
                    first = error if not bad else first
                    bad.append(unit)
        if not bad:
            return None  # it can be read now
        trouble = explain_pack(self._store, self._manifest, self._record.path, first)
        return Damage(
            self._record.path,
            tuple(bad),
            f"{trouble.what}; this rank reads units {compact_units(bad)} from it",
            trouble.file,
            trouble.fix or "load an older tag, or restore the file from a copy",
        )

    def _fill(self, pieces: Sequence[Piece]) -> None:
        """Reads pieces and checks them.

        Every sub-chunk carries its own checksum, which says that it is as it was written; that it is this checkpoint's,
        and not another file in its place, only the manifest's checksums of fragments can tell.
        """
        reader = self._reader
        targets = [(piece, self._target(piece)) for piece in pieces]
        reader.read_batch([(piece.offset, target) for piece, target in targets])
        known: set[int] = set()
        touched: set[int] = set()
        for piece, target in targets:
            if not piece.nbytes:
                continue
            size = reader.object_bytes
            objects = range(piece.offset // size, (piece.offset + piece.nbytes - 1) // size + 1)
            touched.update(objects)
            if piece.crc32c is not None:
                self._check(target, piece.crc32c, piece.offset)
                known.update(objects)
        # A rank that needs only parts of fragments reads one whole one per object, to know that the object is right.
        for number in sorted(touched - known):
            size = reader.object_bytes
            found = self._witnesses.of(self._read.pack, number * size, (number + 1) * size)
            if found is not None:
                row, nbytes = found
                self._check(reader.read(row.offset, nbytes), row.crc32c, row.offset)

    def _target(self, piece: Piece) -> np.ndarray:
        start = self._starts[piece.need] + piece.at
        return self._memory[start : start + piece.nbytes]

    def _check(self, data: np.ndarray, expected: int, offset: int) -> None:
        actual = crc32c(data)
        if actual != expected:
            number = offset // self._reader.object_bytes
            raise CorruptionError(
                f"these are not the bytes that the checkpoint saved: its manifest has crc32c {expected:08x}, the data "
                f"has {actual:08x}",
                where=f"{self._store.locate(self._record.path)}/c/{number}, byte {offset:,} of the pack",
                fix="the file was exchanged for another one: restore it from a copy, or load an older tag",
            )
