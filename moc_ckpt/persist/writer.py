"""Writes one rank's part of a checkpoint: its packs, its extras, then the part file that lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moc_ckpt.plan.save_plan import SavePlan
from moc_ckpt.state.fragment import TensorKey
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.checkpoint import pack_key, write_extra, write_part
from moc_ckpt.storage.manifest import (
    FORMAT_VERSION,
    FragmentTable,
    PackRecord,
    Part,
    TensorRecord,
    UnitRecord,
)
from moc_ckpt.storage.pack import ByteSource, write_pack
from moc_ckpt.storage.store import Store

__all__ = ["SaveId", "write_rank"]


@dataclass(frozen=True, slots=True)
class SaveId:
    """Names one save.

    Attributes:
        tag: the checkpoint's tag.
        save_id: random id that the ranks agreed on.
        version: attempt and step that the live state is from.
        rank: the writing rank.
        world: ranks that take part.
    """

    tag: str
    save_id: str
    version: Version
    rank: int
    world: int


def write_rank(
    store: Store,
    save: SaveId,
    plan: SavePlan,
    sources: Sequence[ByteSource],
    extras: Mapping[str, bytes],
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]],
    *,
    threads: int,
    tokens: Mapping[str, int] | None = None,
) -> Part:
    """Writes what one rank contributes. Not collective; durable on return.

    Args:
        store: the checkpoint root.
        save: which save this is.
        plan: the rank's fragments and their places.
        sources: one per pack of the plan, in its order.
        extras: small objects by file name, already encoded.
        declared: logical tensors that the rank vouches for.
        threads: threads that checksum and write.
        tokens: what each expert unit has learnt, in tokens (the ledger's count); units left out carry none.

    Returns:
        The part, as published.

    Raises:
        StorageError: if storage refuses.
    """
    units: dict[str, int] = {}
    tensors: dict[TensorKey, int] = {}
    tensor_records: list[TensorRecord] = []
    packs: list[PackRecord] = []
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    for number, (pack, source) in enumerate(zip(plan.packs, sources, strict=True)):
        key = pack_key(save.tag, save.save_id, save.rank, pack.name)
        entries = [(item.offset, item.fragment.nbytes) for item in pack.fragments]
        result = write_pack(store, key, pack.nbytes, entries, source, threads=threads)
        packs.append(PackRecord(key, pack.nbytes, result.stored_bytes))
        for item, checksum in zip(pack.fragments, result.crc32c, strict=True):
            fragment = item.fragment
            unit = units.setdefault(item.unit, len(units))
            if fragment.key not in tensors:
                tensors[fragment.key] = len(tensors)
                tensor_records.append(TensorRecord(fragment.fqn, fragment.kind, fragment.dtype, fragment.shape))
            rows.append((unit, tensors[fragment.key], number, fragment.start, fragment.stop, item.offset, checksum))
    extra_records = {}
    for name, data in extras.items():
        extra_records[name] = write_extra(store, save.tag, save.save_id, name, data)
    part = Part(
        format_version=FORMAT_VERSION,
        tag=save.tag,
        save_id=save.save_id,
        attempt=save.version.attempt,
        step=save.version.step,
        rank=save.rank,
        world=save.world,
        units=[UnitRecord(name, *save.version, (tokens or {}).get(name)) for name in units],
        tensors=tensor_records,
        declared=[TensorRecord(key.fqn, key.kind, dtype, shape) for key, (dtype, shape) in declared.items()],
        packs=packs,
        fragments=FragmentTable.from_rows(rows),
        extra=extra_records,
    )
    write_part(store, part)
    return part
