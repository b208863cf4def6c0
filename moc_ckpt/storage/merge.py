"""Parts of all ranks -> one manifest (pure)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from moc_ckpt.errors import CoverageError, MocError, StorageError
from moc_ckpt.plan.coverage import check_coverage, check_experts
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer, UnitMap, Version, expert_unit, parse_expert_unit
from moc_ckpt.storage.base import choose_versions
from moc_ckpt.storage.manifest import (
    CommitInfo,
    ExtraRecord,
    FragmentTable,
    Manifest,
    MoELayerRecord,
    PackRecord,
    Part,
    TensorRecord,
    UnitRecord,
)

__all__ = [
    "check_parts",
    "commit_info",
    "complete_experts",
    "merge_parts",
    "merge_state",
    "missing_experts",
    "replace_experts",
]

_R = TypeVar("_R")


class _Index(Generic[_R]):
    """A list of distinct records with their positions."""

    def __init__(self, name: Callable[[_R], Hashable], clash: Callable[[_R, _R], MocError]) -> None:
        self.records: list[_R] = []
        self._positions: dict[Hashable, int] = {}
        self._name = name
        self._clash = clash

    def add(self, record: _R) -> int:
        position = self._positions.setdefault(self._name(record), len(self.records))
        if position == len(self.records):
            self.records.append(record)
        elif self.records[position] != record:
            raise self._clash(self.records[position], record)
        return position


def _tensor_clash(one: TensorRecord, other: TensorRecord) -> MocError:
    return CoverageError(
        f"ranks disagree about {one.fqn} ({one.kind}): {one.dtype} {one.shape} and {other.dtype} {other.shape}",
        where=f"{one.fqn} ({one.kind})",
        fix="check that all ranks run the same model code and configuration",
    )


def _unit_clash(one: UnitRecord, other: UnitRecord) -> MocError:
    return CoverageError(
        f"ranks wrote different versions of {one.name}: step {one.step} of attempt {one.attempt} and step {other.step} "
        f"of attempt {other.attempt} (tokens {one.tokens} and {other.tokens})",
        where=one.name,
        fix="no checkpoint was committed; the next save writes the unit again",
    )


def _pack_clash(one: PackRecord, other: PackRecord) -> MocError:
    return StorageError(
        f"two records of one pack differ: {one.nbytes} and {other.nbytes} bytes",
        where=one.path,
        fix="no checkpoint was committed; the next save writes a new pack",
    )


def missing_experts(parts: Iterable[Part], layers: Sequence[MoELayerRecord]) -> set[str]:
    """Returns the expert units that no part holds: those to be taken from older checkpoints."""
    present = {unit.name for part in parts for unit in part.units}
    everyone = {expert_unit(layer.ordinal, expert) for layer in layers for expert in range(layer.num_experts)}
    return everyone - present


def commit_info(parts: Iterable[Part]) -> CommitInfo:
    """Returns what rank 0 says about the save.

    Raises:
        CoverageError: if no part says it.
    """
    for part in parts:
        if part.rank == 0 and part.commit is not None:
            return part.commit
    raise CoverageError(
        "no part says what the save is of (rank 0 does, in its part)",
        fix="wait for rank 0, or save again; an older moc_ckpt's unfinished save cannot be committed",
    )


def merge_state(parts: Sequence[Part]) -> bytes:
    """Makes `state.msgpack`: rank 0's map, the distinct optimizer blobs in order of rank, and the shared RNG streams.

    Args:
        parts: one per rank, in any order.

    Returns:
        A msgpack map; `optimizer` is a list of binaries, `rng_shared` the names of the streams that all ranks share.

    Raises:
        CoverageError: if rank 0's part does not say what the save is of.
        StorageError: if what it says is not a map.
    """
    info = commit_info(parts)
    try:
        state = msgspec.msgpack.decode(info.state, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError as exc:
        raise StorageError(
            f"the state that rank 0 gave is not a map: {exc}", fix="no checkpoint was committed; report this"
        ) from exc
    ordered = sorted(parts, key=lambda part: part.rank)
    first = ordered[0]
    blobs = list(dict.fromkeys(part.optimizer for part in ordered if part.optimizer))
    shared = [name for name, digest in first.rng.items() if all(part.rng.get(name) == digest for part in ordered)]
    merged: dict[str, object] = {**state, "optimizer": blobs, "rng_shared": shared}
    return msgspec.msgpack.encode(merged)


def merge_parts(
    parts: Sequence[Part],
    *,
    created: float,
    base: Sequence[Manifest] = (),
    is_admissible: Callable[[Version], bool] = lambda version: True,
) -> Manifest:
    """Makes the manifest of one save, and checks that it is complete (invariants I1, I3).

    Args:
        parts: one per rank, in any order; that of rank 0 with `commit`.
        created: time of the commit in seconds since 1970.
        base: older checkpoints of the same directory; an expert that no part holds is taken from the one that has
            its newest admissible version not after this step.
        is_admissible: tells whether a version belongs to the current timeline.

    Returns:
        The manifest, still without `state.msgpack`.

    Raises:
        CoverageError: if a rank is missing, ranks disagree, or the fragments leave a hole or overlap.
        StorageError: if ranks wrote different files under one name.
    """
    first = check_parts(parts)
    info = commit_info(parts)
    moe_layers = info.moe_layers
    tensors = _Index[TensorRecord](lambda record: record.key, _tensor_clash)
    units = _Index[UnitRecord](lambda record: record.name, _unit_clash)
    packs = _Index[PackRecord](lambda record: record.path, _pack_clash)
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    extra: dict[str, ExtraRecord] = {}
    declared = {}
    absent = missing_experts(parts, moe_layers)
    _check_selected(absent, info.selected, first)
    older = choose_versions(absent, base, first.step, is_admissible)
    reused = set().union(*(names for _, names in older))
    unit_of = UnitMap([MoELayer(layer.ordinal, layer.prefix, layer.num_experts) for layer in moe_layers]).unit_of
    for part in sorted(parts, key=lambda part: part.rank):
        for tensor in part.declared:
            # An expert of an older version consists of what it consisted of then (weights that were not derivable).
            if reused and EXPERTS_MARK in tensor.fqn and unit_of(tensor.fqn) in reused:
                continue
            tensors.add(tensor)
            declared[tensor.key] = (tensor.dtype, tensor.shape)
        _add(part, None, tensors, units, packs, rows)
        for name, record in part.extra.items():
            if extra.setdefault(name, record) != record:
                raise StorageError(
                    f"two ranks wrote different extra files named {name!r}",
                    where=f"{extra[name].path} and {record.path}",
                    fix="put the rank into the name",
                )
    _check_versions(units.records, first, is_admissible)
    for source, names in older:
        for tensor in source.tensors:
            if EXPERTS_MARK in tensor.fqn and unit_of(tensor.fqn) in names:
                tensors.add(tensor)
                declared[tensor.key] = (tensor.dtype, tensor.shape)
        _add(source, names, tensors, units, packs, rows)
    keys = [tensor.key for tensor in tensors.records]
    check_experts(moe_layers, declared)
    check_coverage(declared, ((keys[row[1]], row[3], row[4]) for row in rows))
    return Manifest(
        tag=first.tag,
        save_id=first.save_id,
        attempt=first.attempt,
        step=first.step,
        created=created,
        topology=msgspec.structs.replace(info.topology, world=first.world),
        moe_layers=moe_layers,
        parameters=sum(part.parameters for part in parts),
        units=units.records,
        tensors=tensors.records,
        packs=packs.records,
        fragments=FragmentTable.from_rows(rows),
        extra=extra,
        ledger=info.ledger,
        kept=not info.save_latest,
    )


def replace_experts(manifest: Manifest, sources: Mapping[str, Manifest]) -> Manifest:
    """Returns a manifest with some experts' versions and places taken from others: what a restore reads after damage.

    Such a manifest is never written: the next save takes these experts itself.

    Args:
        manifest: the checkpoint to be restored.
        sources: by unit, the manifest to take it from.

    Raises:
        CoverageError: if the result is not a whole checkpoint.
    """
    tensors = _Index[TensorRecord](lambda record: record.key, _tensor_clash)
    units = _Index[UnitRecord](lambda record: record.name, _unit_clash)
    packs = _Index[PackRecord](lambda record: record.path, _pack_clash)
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    unit_of = UnitMap(manifest.layers).unit_of
    groups: dict[str, tuple[Manifest, set[str]]] = {}
    for unit, source in sources.items():
        groups.setdefault(f"{source.tag}/{source.save_id}", (source, set()))[1].add(unit)
    kept = {unit.name for unit in manifest.units} - sources.keys()
    for source, names in [(manifest, kept), *groups.values()]:
        for tensor in source.tensors:
            # Dense tensors come from the checkpoint itself, and some have no fragment (no elements).
            if (EXPERTS_MARK in tensor.fqn or source is manifest) and unit_of(tensor.fqn) in names:
                tensors.add(tensor)
        _add(source, names, tensors, units, packs, rows)
    return _with_content(manifest, tensors, units, packs, rows)


def complete_experts(
    manifest: Manifest,
    parts: Sequence[Part],
    *,
    created: float,
    is_admissible: Callable[[Version], bool] = lambda version: True,
) -> Manifest:
    """Makes the manifest of a checkpoint with newer versions of some experts, and checks it (invariants I1, I3).

    Args:
        manifest: the checkpoint.
        parts: of those ranks that have something; of expert units alone.
        created: time of the commit in seconds since 1970.
        is_admissible: tells whether a version belongs to the current timeline.

    Returns:
        The manifest under the save id of the parts, with the small files and the ledger of the old one.

    Raises:
        CoverageError: if the parts are of another save or step, hold dense state or unknown experts, disagree, or leave
            a hole.
    """
    if not parts:
        raise CoverageError("no rank has finished its part of the save", fix="start the run again")
    first = parts[0]
    newer = {unit.name for part in parts for unit in part.units}
    strangers = sorted(newer - {unit.name for unit in manifest.units if parse_expert_unit(unit.name) is not None})
    same = {(part.save_id, part.tag, part.version) for part in parts} == {
        (first.save_id, manifest.tag, manifest.version)
    }
    if strangers or not same:
        raise CoverageError(
            f"the parts do not belong to checkpoint {manifest.tag} of step {manifest.step}"
            + (f": it has no expert {strangers[0]}" if strangers else ""),
            where=f"{first.tag}/{first.save_id}",
            fix="the checkpoint stays as it is; report this",
        )
    tensors = _Index[TensorRecord](lambda record: record.key, _tensor_clash)
    units = _Index[UnitRecord](lambda record: record.name, _unit_clash)
    packs = _Index[PackRecord](lambda record: record.path, _pack_clash)
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    unit_of = UnitMap(manifest.layers).unit_of
    for tensor in manifest.tensors:
        # What has no elements is in no slot and no part.
        if 0 in tensor.shape or unit_of(tensor.fqn) not in newer:
            tensors.add(tensor)
    _add(manifest, {unit.name for unit in manifest.units} - newer, tensors, units, packs, rows)
    for part in sorted(parts, key=lambda part: part.rank):
        _add(part, None, tensors, units, packs, rows)
    _check_versions(units.records, first, is_admissible)
    before = manifest.versions()
    if older := sorted(unit.name for unit in units.records if unit.version < before[unit.name]):
        raise CoverageError(
            f"the part's version of {older[0]} is older than the checkpoint's",
            where=f"{first.tag}/{first.save_id}",
            fix="the checkpoint stays as it is; report this",
        )
    found = _with_content(manifest, tensors, units, packs, rows)
    return msgspec.structs.replace(found, save_id=first.save_id, created=created)


def _with_content(
    manifest: Manifest,
    tensors: _Index[TensorRecord],
    units: _Index[UnitRecord],
    packs: _Index[PackRecord],
    rows: Sequence[tuple[int, int, int, int, int, int, int]],
) -> Manifest:
    """Returns a manifest with other content, once that covers every tensor exactly once (invariant I1)."""
    keys = [tensor.key for tensor in tensors.records]
    declared = {tensor.key: (tensor.dtype, tensor.shape) for tensor in tensors.records}
    check_experts(manifest.moe_layers, declared)
    check_coverage(declared, ((keys[row[1]], row[3], row[4]) for row in rows))
    return msgspec.structs.replace(
        manifest,
        units=units.records,
        tensors=tensors.records,
        packs=packs.records,
        fragments=FragmentTable.from_rows(rows),
    )


def check_parts(parts: Sequence[Part]) -> Part:
    """Checks that there is one part of every rank of one save; returns the first of them.

    Raises:
        CoverageError: if not; names the ranks.
    """
    if not parts:
        raise CoverageError("no rank has finished its part of the save", fix="wait for the ranks, or save again")
    first = parts[0]
    where = f"{first.tag}/{first.save_id}"
    for part in parts:
        for name in ("save_id", "tag", "step", "attempt", "world"):
            mine, other = getattr(part, name), getattr(first, name)
            if mine != other:
                raise CoverageError(
                    f"ranks {first.rank} and {part.rank} wrote parts of different saves: {name} {other} and {mine}",
                    where=where,
                    fix="no checkpoint was committed; save again",
                )
    ranks = sorted(part.rank for part in parts)
    missing = sorted(set(range(first.world)) - set(ranks))
    if missing:
        raise CoverageError(
            f"{len(missing)} of {first.world} ranks have not finished their part: {', '.join(map(str, missing[:16]))}"
            + (", …" if len(missing) > 16 else ""),
            where=where,
            fix="look at the logs of these ranks' nodes",
        )
    if ranks != list(range(first.world)):
        raise CoverageError(
            f"parts of unexpected ranks: {ranks} in a world of {first.world}", where=where, fix="save again"
        )
    return first


def _check_selected(absent: set[str], selected: Collection[str] | None, save: Part) -> None:
    """Refuses to take an older version of an expert that this save was to write."""
    forgotten = sorted(absent & set(selected or ()))
    if forgotten:
        raise CoverageError(
            f"no rank wrote {', '.join(forgotten[:8])}, which the save selected",
            where=f"{save.tag}/{save.save_id}",
            fix="no checkpoint was committed; save again, and report this if it comes back",
        )


def _check_versions(units: Sequence[UnitRecord], save: Part, is_admissible: Callable[[Version], bool]) -> None:
    """Checks that all dense units have the version of the save, and every expert one of its past (I3)."""
    for unit in units:
        expert = parse_expert_unit(unit.name) is not None
        wrong = unit.step > save.step or unit.attempt > save.attempt if expert else unit.version != save.version
        if wrong:
            raise CoverageError(
                f"{unit.name} is from step {unit.step} of attempt {unit.attempt}, the save is of step {save.step} "
                f"of attempt {save.attempt}",
                where=unit.name,
                fix="all dense units must be from the step of the save and no expert newer than it; report this",
            )
        if unit.version != save.version and not is_admissible(unit.version):
            raise CoverageError(
                f"{unit.name} is from step {unit.step} of attempt {unit.attempt}, which a restart has rolled back",
                where=unit.name,
                fix="no checkpoint was committed; save again, and report this",
            )


def _add(
    source: Part | Manifest,
    only: set[str] | None,
    tensors: _Index[TensorRecord],
    units: _Index[UnitRecord],
    packs: _Index[PackRecord],
    rows: list[tuple[int, int, int, int, int, int, int]],
) -> None:
    """Adds a source's units (all, or some by name) with their fragments, indices remapped."""
    unit_map = {i: units.add(unit) for i, unit in enumerate(source.units) if only is None or unit.name in only}
    tensor_map: dict[int, int] = {}
    pack_map: dict[int, int] = {}
    for row in source.fragments:
        if row.unit not in unit_map:
            continue
        if row.tensor not in tensor_map:
            tensor_map[row.tensor] = tensors.add(source.tensors[row.tensor])
        if row.pack not in pack_map:
            pack_map[row.pack] = packs.add(source.packs[row.pack])
        rows.append((unit_map[row.unit], tensor_map[row.tensor], pack_map[row.pack], *row[3:]))
