"""Manifests and parts: what a checkpoint consists of, and what one rank contributed to it.

All structs are immutable and may be shared between threads. Bytes are counted in bytes, tensors in elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from operator import le
from typing import Any, NamedTuple

import msgspec

from moc_ckpt.errors import FormatError
from moc_ckpt.state.fragment import DTYPE_BYTES, TensorKey, itemsize
from moc_ckpt.state.unit import MoELayer, Version
from moc_ckpt.storage.envelope import FORMAT_VERSION, open_envelope, seal_envelope

__all__ = [
    "FORMAT_VERSION",
    "CommitInfo",
    "ExtraRecord",
    "FragmentRow",
    "FragmentTable",
    "Manifest",
    "MoELayerRecord",
    "PackRecord",
    "Part",
    "TensorRecord",
    "Topology",
    "UnitRecord",
    "decode_manifest",
    "decode_part",
    "encode_manifest",
    "encode_part",
]


class PackRecord(msgspec.Struct, frozen=True):
    """One pack.

    Attributes:
        path: its directory, relative to the checkpoint root.
        nbytes: payload bytes.
        stored_bytes: bytes of all its objects.
    """

    path: str
    nbytes: int
    stored_bytes: int


class TensorRecord(msgspec.Struct, frozen=True):
    """One logical tensor.

    Attributes:
        fqn: parameter or buffer name, experts with their global id.
        kind: state kind (`master`, `exp_avg`, ...).
        dtype: torch dtype name without its prefix.
        shape: shape of the whole logical tensor.
    """

    fqn: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> TensorKey:
        """Name and kind."""
        return TensorKey(self.fqn, self.kind)


class UnitRecord(msgspec.Struct, frozen=True):
    """One unit and the version that its bytes are from.

    Attributes:
        name: e.g. `expert/0/3` or `dense/h.0.mlp`.
        attempt: attempt that produced the bytes.
        step: engine.global_steps that they are from.
        tokens: what the expert had learnt at that step, in tokens (`pec.ledger`); None for dense units.
    """

    name: str
    attempt: int
    step: int
    tokens: int | None = None

    @property
    def version(self) -> Version:
        """(attempt, step)."""
        return Version(self.attempt, self.step)


class FragmentRow(NamedTuple):
    """One fragment: indices into a manifest's or part's lists, elements [start, stop), place and checksum."""

    unit: int
    tensor: int
    pack: int
    start: int
    stop: int
    offset: int
    crc32c: int


class FragmentTable(msgspec.Struct, frozen=True):
    """Fragments by column, which keeps the JSON small.

    Attributes:
        unit: index into `units`.
        tensor: index into `tensors`.
        pack: index into `packs`.
        start: first element in the row-major flattened logical tensor.
        stop: one past the last element.
        offset: first byte in the pack.
        crc32c: checksum of the fragment's bytes.
    """

    unit: list[int] = []
    tensor: list[int] = []
    pack: list[int] = []
    start: list[int] = []
    stop: list[int] = []
    offset: list[int] = []
    crc32c: list[int] = []

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, int, int, int, int, int, int]]) -> FragmentTable:
        """Builds the table from rows in the order of `FragmentRow`."""
        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(7)]
        return cls(*columns)

    def __len__(self) -> int:
        return len(self.unit)

    def __iter__(self) -> Iterator[FragmentRow]:
        columns = (self.unit, self.tensor, self.pack, self.start, self.stop, self.offset, self.crc32c)
        return map(FragmentRow._make, zip(*columns, strict=True))


class ExtraRecord(msgspec.Struct, frozen=True):
    """One file beside the packs (RNG state, schedulers, client state): path from the root, size and checksum."""

    path: str
    nbytes: int
    crc32c: int


class Topology(msgspec.Struct, frozen=True):
    """The run that wrote a checkpoint.

    Attributes:
        world: number of ranks.
        zero_stage: ZeRO stage, 0 for none.
        expert_parallel: expert-parallel size by prefix of the MoE layer.
        precision: e.g. `bf16`.
        versions: package versions by name.
    """

    world: int
    zero_stage: int
    expert_parallel: dict[str, int]
    precision: str
    versions: dict[str, str]


class MoELayerRecord(msgspec.Struct, frozen=True):
    """One MoE layer: its ordinal, the name of its module and the number of its experts over all ranks."""

    ordinal: int
    prefix: str
    num_experts: int


class CommitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit needs beside the parts' lists; rank 0 says it, so that any process can commit from storage alone.

    Attributes:
        topology: the run that saves; its world is taken from the parts.
        moe_layers: the model's MoE layers.
        save_latest: let `latest` name the checkpoint.
        ledger: the lost-token ledger as plain data.
        selected: expert units that this save took; none of them comes from an older checkpoint. None leaves it open.
        state: what goes into `state.msgpack`, an encoded map without `optimizer` and `rng_shared`.
    """

    topology: Topology
    moe_layers: list[MoELayerRecord]
    save_latest: bool = True
    ledger: dict[str, Any] | None = None
    selected: list[str] | None = None
    state: bytes = b"\x80"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank wrote for one save.

    Dense units have the version of the save. Expert units may have an older one, the same in all parts.

    Attributes:
        tag: the checkpoint's name.
        save_id: the random id that the ranks agreed for this save.
        attempt: the attempt that saves.
        step: engine.global_steps of the save.
        rank: the rank.
        world: number of ranks that take part.
        units: units that the fragments belong to, with their versions.
        tensors: logical tensors that the fragments are from.
        declared: logical tensors that must exist in a complete checkpoint, as far as this rank knows.
        packs: packs this rank wrote.
        fragments: the fragments in them.
        extra: files beside the packs, by name.
        parameters: number of parameters of which this rank is the first replica.
        rng: digest of each random number stream of this rank, by name.
        optimizer: its optimizer's scalar records, encoded; opaque here.
        commit: what the commit needs; rank 0 only.
        format_version: version of the format.
    """

    tag: str
    save_id: str
    attempt: int
    step: int
    rank: int
    world: int
    units: list[UnitRecord]
    tensors: list[TensorRecord]
    declared: list[TensorRecord]
    packs: list[PackRecord]
    fragments: FragmentTable
    extra: dict[str, ExtraRecord] = {}
    parameters: int = 0
    rng: dict[str, str] = {}
    optimizer: bytes = b""
    commit: CommitInfo | None = None
    format_version: int = FORMAT_VERSION

    @property
    def version(self) -> Version:
        """(attempt, step) of the save."""
        return Version(self.attempt, self.step)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A checkpoint: it exists if and only if its manifest does (invariant I4).

    Attributes:
        tag: the checkpoint's name.
        save_id: the save that it is from.
        attempt: attempt that saved it.
        step: engine.global_steps; all dense units are from this step.
        created: time of the commit in seconds since 1970.
        topology: the run that wrote it.
        moe_layers: the model's MoE layers.
        parameters: number of parameters of the model.
        units: every unit with the version of its bytes.
        tensors: every logical tensor.
        packs: the packs that it needs, possibly of older tags.
        fragments: where every byte of every tensor is.
        extra: files beside the packs, by name.
        ledger: the lost-token ledger as plain data.
        kept: saved aside, without moving `latest`: retention neither counts nor removes it.
        format_version: version of the format.
    """

    tag: str
    save_id: str
    attempt: int
    step: int
    created: float
    topology: Topology
    moe_layers: list[MoELayerRecord]
    parameters: int
    units: list[UnitRecord]
    tensors: list[TensorRecord]
    packs: list[PackRecord]
    fragments: FragmentTable
    extra: dict[str, ExtraRecord] = {}
    ledger: dict[str, Any] | None = None
    kept: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def version(self) -> Version:
        """(attempt, step) of the dense state."""
        return Version(self.attempt, self.step)

    @property
    def order(self) -> tuple[int, int, float]:
        """Sorts the checkpoints of a directory, the newest last. The time decides last: clocks jump."""
        return self.attempt, self.step, self.created

    @property
    def layers(self) -> tuple[MoELayer, ...]:
        """The model's MoE layers."""
        return tuple(MoELayer(layer.ordinal, layer.prefix, layer.num_experts) for layer in self.moe_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._by_kind.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all objects that the checkpoint needs, older tags' packs counted whole."""
        return sum(pack.stored_bytes for pack in self.packs) + sum(extra.nbytes for extra in self.extra.values())

    @property
    def added_bytes(self) -> int:
        """Bytes that its own save put into the storage: packs of older tags are not counted."""
        own = f"{self.tag}/{self.save_id}/"
        packs = sum(pack.stored_bytes for pack in self.packs if pack.path.startswith(own))
        return packs + sum(extra.nbytes for extra in self.extra.values())

    @property
    def pack_paths(self) -> frozenset[str]:
        """Paths of the packs that it needs."""
        return frozenset(pack.path for pack in self.packs)

    def version_of(self, unit: str) -> Version:
        """Returns the version of a unit.

        Raises:
            KeyError: if there is no such unit.
        """
        for record in self.units:
            if record.name == unit:
                return record.version
        raise KeyError(unit)

    def versions(self) -> dict[str, Version]:
        """Returns the version of every unit."""
        return {record.name: record.version for record in self.units}

    def bytes_by_kind(self) -> dict[str, int]:
        """Returns the bytes of each state kind."""
        return dict(self._by_kind)

    @cached_property
    def _by_kind(self) -> dict[str, int]:
        table = self.fragments
        counts = [0] * len(self.tensors)
        for tensor, start, stop in zip(table.tensor, table.start, table.stop, strict=True):
            counts[tensor] += stop - start
        sizes: dict[str, int] = {}
        for index in dict.fromkeys(table.tensor):
            record = self.tensors[index]
            sizes[record.kind] = sizes.get(record.kind, 0) + counts[index] * itemsize(record.dtype)
        return sizes

    def bytes_by_unit(self) -> dict[str, int]:
        """Returns the bytes of each unit (0 for one without elements)."""
        table, width = self.fragments, [itemsize(tensor.dtype) for tensor in self.tensors]
        counts = [0] * len(self.units)
        for unit, tensor, start, stop in zip(table.unit, table.tensor, table.start, table.stop, strict=True):
            counts[unit] += (stop - start) * width[tensor]
        sizes = {unit.name: 0 for unit in self.units}
        for record, count in zip(self.units, counts, strict=True):
            sizes[record.name] += count
        return sizes

    def declared(self) -> dict[TensorKey, tuple[str, tuple[int, ...]]]:
        """Returns dtype and shape of every tensor, as the coverage check takes them."""
        return {tensor.key: (tensor.dtype, tensor.shape) for tensor in self.tensors}

    def spans(self) -> Iterator[tuple[TensorKey, int, int]]:
        """Yields (tensor, start, stop) of every fragment, as the coverage check takes them."""
        keys = [tensor.key for tensor in self.tensors]
        for row in self.fragments:
            yield keys[row.tensor], row.start, row.stop


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the file of a manifest."""
    return seal_envelope(manifest)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Reads a manifest.

    Args:
        data: the file.
        where: its path or URL, for messages.

    Raises:
        CorruptionError: if it is truncated or damaged.
        FormatError: if it is not a manifest, inconsistent, or of a newer format version.
    """
    manifest = open_envelope(data, Manifest, where)
    _check_table(manifest, where)
    return manifest


def encode_part(part: Part) -> bytes:
    """Returns the file of a part."""
    return seal_envelope(part)


def decode_part(data: bytes, where: str) -> Part:
    """Reads a part. Arguments and errors as for `decode_manifest`."""
    part = open_envelope(data, Part, where)
    _check_table(part, where)
    return part


def _check_table(record: Manifest | Part, where: str) -> None:
    """Refuses tables whose indices or places make no sense, so that no reader needs to."""
    table = record.fragments
    columns = (table.unit, table.tensor, table.pack, table.start, table.stop, table.offset, table.crc32c)
    problem = ""
    if len({len(column) for column in columns}) != 1:
        problem = "the columns of the fragment table differ in length"
    elif unknown := {tensor.dtype for tensor in record.tensors} - DTYPE_BYTES.keys():
        problem = f"unknown dtype {sorted(unknown)[0]!r}"
    elif not _is_consistent(record):
        problem = next(_row_problems(record))
    if problem:
        raise FormatError(
            f"the file is not consistent: {problem}",
            where=where,
            fix="it was written by a faulty or incompatible program; restore from another checkpoint",
        )


def _is_consistent(record: Manifest | Part) -> bool:
    """Tells whether every row of the table refers to something. By column: there are hundreds of thousands of rows."""
    table = record.fragments
    if not len(table):
        return True
    indices = ((table.unit, record.units), (table.tensor, record.tensors), (table.pack, record.packs))
    if any(min(column) < 0 or max(column) >= len(things) for column, things in indices):
        return False
    if min(table.start) < 0 or min(table.offset) < 0 or not all(map(le, table.start, table.stop)):
        return False
    width = [itemsize(tensor.dtype) for tensor in record.tensors]
    room = [pack.nbytes for pack in record.packs]
    columns = zip(table.offset, table.start, table.stop, table.tensor, table.pack, strict=True)
    return all(at + (stop - start) * width[tensor] <= room[pack] for at, start, stop, tensor, pack in columns)


def _row_problems(record: Manifest | Part) -> Iterator[str]:
    """Yields what is wrong with the rows of a table that is not consistent."""
    for number, row in enumerate(record.fragments):
        if not (
            0 <= row.unit < len(record.units)
            and 0 <= row.tensor < len(record.tensors)
            and 0 <= row.pack < len(record.packs)
            and 0 <= row.start <= row.stop
            and row.offset >= 0
        ):
            yield f"fragment {number} refers to nothing: {row}"
        elif row.offset + (row.stop - row.start) * itemsize(record.tensors[row.tensor].dtype) > (
            record.packs[row.pack].nbytes
        ):
            yield f"fragment {number} ends behind its pack {record.packs[row.pack].path}"
