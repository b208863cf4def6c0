"""Brings the bytes of a recovery plan into host memory, checked, before any live state is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from moc_ckpt.errors import CorruptionError
from moc_ckpt.recovery.resolver import Read, RecoveryPlan, Stored, StoredTensor
from moc_ckpt.state.fragment import Fragment, TensorKey, itemsize
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import compact_units, explain_pack

__all__ = ["index_manifest", "stage"]

_ALIGNMENT = 64


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
    """Reads everything that a plan asks for. Not collective; touches no live state.

    Args:
        store: the checkpoint root.
        manifest: the manifest that the plan was made from.
        plan: what to read.
        needs: the needed fragments, as given to `resolve`.
        units: the unit of each, for messages.

    Returns:
        One 1-D CPU tensor per needed fragment, of the stored dtype.

    Raises:
        CorruptionError: naming the file, the units, and the expected and found checksum; and for a pack that an
            older checkpoint left, that checkpoint.
    """
    sizes = [need.numel * itemsize(dtype) for need, dtype in zip(needs, plan.dtypes, strict=True)]
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    # numpy asks for huge pages, which are an order of magnitude cheaper to touch first.
    memory = torch.from_numpy(np.empty(total, dtype=np.uint8))
    for read in plan.reads:
        _read_pack(store, manifest, read, memory, starts, needs, units)
    return [
        memory[start : start + size].view(getattr(torch, dtype))
        if size
        else torch.empty(0, dtype=getattr(torch, dtype))
        for start, size, dtype in zip(starts, sizes, plan.dtypes, strict=True)
    ]


def _read_pack(
    store: Store,
    manifest: Manifest,
    read: Read,
    memory: torch.Tensor,
    starts: Sequence[int],
    needs: Sequence[Fragment],
    units: Sequence[str],
) -> None:
    record = manifest.packs[read.pack]
    array = memory.numpy()
    requests = [
        (piece.offset, array[starts[piece.need] + piece.at : starts[piece.need] + piece.at + piece.nbytes])
        for piece in read.pieces
    ]
    reader = PackReader(store, record.path, record.nbytes)
    try:
        # Checks every chunk that it reads, which covers every byte once; `moc-ckpt verify` checks fragments as well.
        reader.read_batch(requests)
    except CorruptionError as error:
        trouble = explain_pack(store, manifest, record.path, error)
        affected = compact_units(units[piece.need] for piece in read.pieces)
        raise CorruptionError(
            f"{trouble.what}; this rank reads units {affected} from it",
            where=trouble.file,
            fix=trouble.fix or "load an older tag, or restore the file from a copy",
        ) from error
