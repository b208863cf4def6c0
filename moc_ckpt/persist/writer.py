"""One rank's part of a checkpoint: planned first (`build_part`), then written (`write_prepared`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from moc_ckpt.plan.save_plan import SavePlan
from moc_ckpt.state.fragment import TensorKey, itemsize
from moc_ckpt.state.unit import Version, parse_expert_unit
from moc_ckpt.storage.checkpoint import pack_key, write_extra, write_part
from moc_ckpt.storage.manifest import (
    CommitInfo,
    FragmentTable,
    PackRecord,
    Part,
    TensorRecord,
    UnitRecord,
)
from moc_ckpt.storage.pack import ByteSource, write_pack
from moc_ckpt.storage.store import Store

__all__ = ["SaveId", "build_part", "write_prepared"]


@dataclass(frozen=True, slots=True)
class SaveId:
    """Names one save.

    Attributes:
        tag: the checkpoint's tag.
        save_id: random id that the ranks agreed on.
        version: attempt and step of the dense state.
        rank: the writing rank.
        world: ranks that take part.
    """

    tag: str
    save_id: str
    version: Version
    rank: int
    world: int


def build_part(
    save: SaveId,
    plan: SavePlan,
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]],
    *,
    tokens: Mapping[str, int] | None = None,
    versions: Mapping[str, Version] | None = None,
    parameters: int = 0,
    rng: Mapping[str, str] | None = None,
    optimizer: bytes = b"",
    commit: CommitInfo | None = None,
) -> Part:
    """Describes what one rank is going to write: everything of its part but checksums and stored sizes. Pure.

    Args:
        save: which save this is.
        plan: the rank's fragments and their places.
        declared: logical tensors that the rank vouches for.
        tokens: what each expert unit has learnt at its version, in tokens; units left out carry none.
        versions: attempt and step of expert units whose bytes are older than the save; the others have the save's.
        parameters: number of parameters of which the rank is the first replica.
        rng: digest of each of its random number streams.
        optimizer: its optimizer's scalar records, encoded.
        commit: what the commit needs; from rank 0 only.

    Returns:
        The part, with checksums and `stored_bytes` 0 and without extra files.

    Raises:
        ValueError: if a dense unit is given a version, which is the save's (invariant I3).
    """
    given = versions or {}
    if wrong := sorted(unit for unit in given if parse_expert_unit(unit) is None and given[unit] != save.version):
        raise ValueError(f"dense units have the version of the save: {wrong[0]} is given {given[wrong[0]]}")
    units: dict[str, int] = {}
    tensors: dict[TensorKey, int] = {}
    tensor_records: list[TensorRecord] = []
    packs: list[PackRecord] = []
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    for number, pack in enumerate(plan.packs):
        packs.append(PackRecord(pack_key(save.tag, save.save_id, save.rank, pack.name), pack.nbytes, 0))
        for item in pack.fragments:
            fragment = item.fragment
            unit = units.setdefault(item.unit, len(units))
            if fragment.key not in tensors:
                tensors[fragment.key] = len(tensors)
                tensor_records.append(TensorRecord(fragment.fqn, fragment.kind, fragment.dtype, fragment.shape))
            rows.append((unit, tensors[fragment.key], number, fragment.start, fragment.stop, item.offset, 0))
    return Part(
        tag=save.tag,
        save_id=save.save_id,
        attempt=save.version.attempt,
        step=save.version.step,
        rank=save.rank,
        world=save.world,
        units=[UnitRecord(name, *given.get(name, save.version), (tokens or {}).get(name)) for name in units],
        tensors=tensor_records,
        declared=[TensorRecord(key.fqn, key.kind, dtype, shape) for key, (dtype, shape) in declared.items()],
        packs=packs,
        fragments=FragmentTable.from_rows(rows),
        parameters=parameters,
        rng=dict(rng or {}),
        optimizer=optimizer,
        commit=commit,
    )


def write_prepared(
    store: Store, part: Part, sources: Sequence[ByteSource], extras: Mapping[str, bytes], *, threads: int
) -> Part:
    """Writes what a part describes: its packs, its extra files, then the part itself. Not collective.

    Durable on return. Nothing counts before the part is there, so a call that failed or was killed half-way leaves
    nothing but files that retention removes.

    Args:
        store: the checkpoint root.
        part: from `build_part`; not changed.
        sources: one per pack of the part, in its order.
        extras: small objects by file name, already encoded.
        threads: threads that checksum and write.

    Returns:
        The part as published, with checksums, sizes and extra files.

    Raises:
        StorageError: if storage refuses.
        ValueError: if the fragments of a pack overlap or leave it.
    """
    table = part.fragments
    members: list[list[int]] = [[] for _ in part.packs]
    for number, pack in enumerate(table.pack):
        members[pack].append(number)
    checksums = list(table.crc32c)
    packs: list[PackRecord] = []
    for record, source, own in zip(part.packs, sources, members, strict=True):
        own.sort(key=lambda number: (table.offset[number], table.stop[number] - table.start[number]))
        entries = [
            (table.offset[i], (table.stop[i] - table.start[i]) * itemsize(part.tensors[table.tensor[i]].dtype))
            for i in own
        ]
        result = write_pack(store, record.path, record.nbytes, entries, source, threads=threads)
        packs.append(msgspec.structs.replace(record, stored_bytes=result.stored_bytes))
        for number, checksum in zip(own, result.crc32c, strict=True):
            checksums[number] = checksum
    written = msgspec.structs.replace(
        part,
        packs=packs,
        fragments=msgspec.structs.replace(table, crc32c=checksums),
        extra={name: write_extra(store, part.tag, part.save_id, name, data) for name, data in extras.items()},
    )
    write_part(store, written)
    return written
