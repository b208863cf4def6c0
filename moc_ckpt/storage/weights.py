"""The weights of one checkpoint as whole tensors in safetensors files, laid out as Hugging Face's libraries do.

The container is written here: the library of that name takes tensors as a whole, all those of a file at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moc_ckpt.errors import ConfigError, CoverageError, UnsupportedError
from moc_ckpt.state.fragment import MASTER, WEIGHT, itemsize
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.storage.checkpoint import load_manifest, manifest_key
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.export import Progress, check_fragment, check_source, explained, fragment_bytes
from moc_ckpt.storage.local import fsync_dir, raise_storage_error, temporary_name
from moc_ckpt.storage.manifest import FragmentRow, Manifest, TensorRecord
from moc_ckpt.storage.output import new_directory
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store, open_store

__all__ = ["ExportedWeights", "export_weights", "parse_dtype", "parse_size"]

_INDEX = "model.safetensors.index.json"
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_PIECE = 16 << 20
_BATCH = 32 << 20
_BATCH_PIECES = 4096
_SLACK = 1 << 20


@dataclass(frozen=True, slots=True)
class ExportedWeights:
    """The files that were written.

    Attributes:
        tag: the checkpoint.
        step: engine.global_steps.
        path: the directory.
        dtype: what floating-point tensors were cast to.
        files: (name, bytes) of the safetensors files.
        tensors: number of tensors.
        nbytes: bytes of all tensors.
        older_experts: experts whose weights are from an older step, as the checkpoint has them.
        overflowed: names of tensors with finite values that `dtype` cannot hold.
    """

    tag: str
    step: int
    path: Path
    dtype: str
    files: tuple[tuple[str, int], ...]
    tensors: int
    nbytes: int
    older_experts: int
    overflowed: tuple[str, ...]


def parse_dtype(name: str) -> str:
    """Returns the full name of a floating-point dtype.

    Raises:
        ConfigError: if there is none of that name.
    """
    full = _SHORT.get(name.lower(), name.lower()).removeprefix("torch.")
    if full not in _FLOATS:
        raise ConfigError(
            f"{name!r} is not a dtype that weights can be cast to", fix=f"one of {', '.join((*_FLOATS, *_SHORT))}"
        )
    return full


def parse_size(text: str) -> int:
    """Returns a size in bytes, e.g. of "5GB" (powers of 1000) or "5GiB" (of 1024).

    Raises:
        ConfigError: if it is none, or 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ConfigError(f"{text!r} is not a size", fix="a number with B, KB, MB, GB, TB (or KiB, MiB, …), e.g. 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the export: its place in the manifest, its dtype there and here, and its place in its file."""

    index: int
    record: TensorRecord
    dtype: str
    file: int
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.record.shape) * itemsize(self.dtype)


@dataclass(slots=True)
class _File:
    name: str
    tensors: list[_Tensor]
    tmp: Path
    header: bytes = b""

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def export_weights(
    store: Store,
    tag: str,
    url: str,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Progress = lambda done, total: None,
) -> ExportedWeights:
    """Writes the weights of a checkpoint: of every parameter and buffer the `weight`, where there is none the master.

    One file if all fit, else several and an index, which comes last. Every pack is read once, in order; tensors are
    written where they belong as their bytes come by. Memory: 32 MiB of bytes that were read, and some sub-chunks.

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.
        url: a local directory, which must not exist or be empty.
        dtype: what floating-point tensors are cast to (rounding to the nearest, ties to even); others stay as they
            are. None for the precision of the run.
        shard_bytes: bytes of tensors in one file at most; a larger tensor has a file of its own.
        progress: called after every batch of reads.

    Raises:
        UnsupportedError: if the output is no local directory, or a dtype has no name in safetensors.
        CoverageError: if the checkpoint is not complete.
        CorruptionError: if bytes that are needed are missing or damaged; names the file. The output is removed.
        ConfigError: if the output is not empty.
        StorageError: if it cannot be written.
    """
    manifest = load_manifest(store, tag)
    path = open_store(url).local_path
    if path is None:
        raise UnsupportedError(
            "safetensors files cannot be written to an object store", where=url, fix="name a directory, then copy it"
        )
    target = parse_dtype(dtype or manifest.topology.precision)
    files = _plan_files(store, manifest, target, shard_bytes, path)
    wanted = {tensor.index: tensor for file in files for tensor in file.tensors}
    rows: dict[int, list[FragmentRow]] = {}
    for row in manifest.fragments:
        if row.tensor in wanted:
            rows.setdefault(row.pack, []).append(row)
    check_source(store, manifest, rows)
    overflowed: set[str] = set()
    with new_directory(url, store, sum(file.nbytes for file in files) + _SLACK):
        try:
            for file in files:
                _begin(file)
            total = sum(fragment_bytes(manifest, row) for group in rows.values() for row in group)
            done = 0
            for pack in sorted(rows):
                for count in _copy(store, manifest, pack, rows[pack], wanted, files, overflowed):
                    done += count
                    progress(done, total)
            _publish(path, files)
        except OSError as exc:
            raise_storage_error(exc, "writing the weights", path, sum(file.nbytes for file in files))
    older = sum(unit.step < manifest.step for unit in manifest.units if parse_expert_unit(unit.name) is not None)
    return ExportedWeights(
        tag,
        manifest.step,
        path,
        target,
        tuple((file.name, file.nbytes) for file in files),
        len(wanted),
        sum(tensor.nbytes for tensor in wanted.values()),
        older,
        tuple(sorted(overflowed)),
    )


# ---- the files ----


def _choose(manifest: Manifest) -> list[tuple[int, TensorRecord]]:
    """Returns the tensors to write, in the order of their names: the weight of each name, else its master."""
    chosen: dict[str, tuple[int, TensorRecord]] = {}
    for index, tensor in enumerate(manifest.tensors):
        if tensor.kind == WEIGHT or (tensor.kind == MASTER and tensor.fqn not in chosen):
            chosen[tensor.fqn] = (index, tensor)
    return [chosen[name] for name in sorted(chosen, key=_by_number)]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts `h.2` before `h.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _plan_files(store: Store, manifest: Manifest, target: str, shard_bytes: int, path: Path) -> list[_File]:
    groups: list[list[tuple[int, TensorRecord, str]]] = []
    room = 0
    for index, record in _choose(manifest):
        dtype = target if record.dtype in _FLOATS else record.dtype
        if dtype not in _NAMES:
            raise UnsupportedError(
                f"safetensors has no dtype {dtype}", where=record.fqn, fix="export with --to moc; nothing was written"
            )
        nbytes = math.prod(record.shape) * itemsize(dtype)
        if not groups or nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append((index, record, dtype))
        room -= nbytes
    if not groups:
        raise CoverageError(
            "the checkpoint holds no weights",
            where=store.locate(manifest_key(manifest.tag)),
            fix="export another one; nothing was written",
        )
    files = []
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors, at = [], 0
        # The widest first keeps every tensor aligned.
        for index, record, dtype in sorted(group, key=lambda item: -itemsize(item[2])):
            tensors.append(_Tensor(index, record, dtype, number, at))
            at += tensors[-1].nbytes
        file = _File(name, tensors, temporary_name(path / name))
        file.header = _header(file)
        files.append(file)
    return files


def _header(file: _File) -> bytes:
    data: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in file.tensors:
        data[tensor.record.fqn] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.record.shape),
            "data_offsets": [tensor.begin, tensor.begin + tensor.nbytes],
        }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _begin(file: _File) -> None:
    """Makes a file of its final size under a hidden name, with its header."""
    with file.tmp.open("xb") as out:
        out.write(file.header)
        out.truncate(file.nbytes)


def _publish(path: Path, files: Sequence[_File]) -> None:
    """Makes the files durable and gives them their names; the index, without which nobody reads them, comes last."""
    for file in files:
        with file.tmp.open("rb+") as out:
            os.fsync(out.fileno())
    for file in files:
        file.tmp.replace(path / file.name)
    fsync_dir(path)
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)},
        "weight_map": {tensor.record.fqn: file.name for file in files for tensor in file.tensors},
    }
    tmp = temporary_name(path / _INDEX)
    with tmp.open("xb") as out:
        out.write((json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        out.flush()
        os.fsync(out.fileno())
    tmp.replace(path / _INDEX)
    fsync_dir(path)


# ---- the bytes ----


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [start, stop) of a tensor, which are a part of one fragment, and their first byte in the pack."""

    row: FragmentRow
    start: int
    stop: int
    offset: int


def _copy(
    store: Store,
    manifest: Manifest,
    pack: int,
    rows: Sequence[FragmentRow],
    wanted: dict[int, _Tensor],
    files: Sequence[_File],
    overflowed: set[str],
) -> Iterator[int]:
    """Copies fragments out of one pack; yields the bytes read, batch by batch."""
    record = manifest.packs[pack]
    reader = PackReader(store, record.path, record.nbytes)
    crc = 0
    for batch in _batches(manifest, sorted(rows, key=lambda row: (row.offset, row.stop))):
        sizes = [(piece.stop - piece.start) * itemsize(manifest.tensors[piece.row.tensor].dtype) for piece in batch]
        buffers = [np.empty(size, dtype=np.uint8) for size in sizes]
        with explained(store, manifest, pack):
            reader.read_batch([(piece.offset, buffer) for piece, buffer in zip(batch, buffers, strict=True)])
        for piece, buffer in zip(batch, buffers, strict=True):
            tensor = wanted[piece.row.tensor]
            crc = crc32c(buffer, crc if piece.start > piece.row.start else 0)
            if piece.stop == piece.row.stop:
                check_fragment(store, manifest, piece.row, crc)
            data, fits = _cast(buffer, tensor.record.dtype, tensor.dtype)
            if not fits:
                overflowed.add(tensor.record.fqn)
            file = files[tensor.file]
            _write(file.tmp, data, len(file.header) + tensor.begin + piece.start * itemsize(tensor.dtype))
        yield sum(sizes)


def _batches(manifest: Manifest, rows: Sequence[FragmentRow]) -> Iterator[list[_Piece]]:
    """Yields what to read at once: in order, so that few sub-chunks are read twice."""
    batch: list[_Piece] = []
    room = _BATCH
    for row in rows:
        size = itemsize(manifest.tensors[row.tensor].dtype)
        step = _PIECE // size
        for start in range(row.start, row.stop, step) if row.stop > row.start else [row.start]:
            stop = min(start + step, row.stop)
            if batch and (room < (stop - start) * size or len(batch) >= _BATCH_PIECES):
                yield batch
                batch, room = [], _BATCH
            batch.append(_Piece(row, start, stop, row.offset + (start - row.start) * size))
            room -= (stop - start) * size
    if batch:
        yield batch


def _cast(data: np.ndarray, stored: str, target: str) -> tuple[np.ndarray, bool]:
    """Returns the bytes in the target's dtype, and whether it can hold all finite values."""
    if stored == target:
        return data, True
    values = data.view(_numpy(stored))
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(_numpy(target))
    finite = np.isfinite(result)
    fits = bool(finite.all()) or not bool(np.isfinite(values)[~finite].any())
    return result.view(np.uint8), fits


def _numpy(dtype: str) -> np.dtype:
    if dtype in ("float64", "float32", "float16"):
        return np.dtype(dtype).newbyteorder("<")
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype))


def _write(path: Path, data: np.ndarray, offset: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = data.data
        while len(view):
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    finally:
        os.close(fd)
