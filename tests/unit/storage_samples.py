"""A small checkpoint to test storage with: one dense tensor, two MoE layers of four experts, split over the ranks."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moc_ckpt.state.unit import EXPERTS_MARK, dense_unit, expert_unit
from moc_ckpt.storage.attempts import current_attempt, open_attempt
from moc_ckpt.storage.checkpoint import new_save_id, pack_key, write_extra, write_part
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.manifest import (
    CommitInfo,
    FragmentTable,
    Manifest,
    MoELayerRecord,
    PackRecord,
    Part,
    TensorRecord,
    Topology,
    UnitRecord,
)
from moc_ckpt.storage.pack import write_pack
from moc_ckpt.storage.store import Store, open_store

LAYERS = [MoELayerRecord(0, "h.0.mlp.moe", 4), MoELayerRecord(1, "h.1.mlp.moe", 4)]
EXPERTS = [(layer.ordinal, expert) for layer in LAYERS for expert in range(4)]
TOPOLOGY = Topology(world=2, zero_stage=1, expert_parallel={"ep_size_2": 2}, precision="bf16", versions={"torch": "2"})
KINDS = ("master", "exp_avg")
DENSE = ("h.0.attn.weight", (5, 7))
EXPERT_SHAPE = (6, 5)


@dataclass
class ArraySource:
    """Gives a pack's bytes from an array, and notes the order in which it was asked."""

    data: np.ndarray

    def __post_init__(self) -> None:
        self.offsets: list[int] = []

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        assert dst.dtype == np.uint8
        self.offsets.append(offset)
        np.copyto(dst, self.data[offset : offset + len(dst)])


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def make_store(kind: str, tmp_path: Path) -> Store:
    if kind == "memory":
        return open_store(f"memory://{uuid.uuid4().hex}")
    return open_store(tmp_path / "ckpt", create=True)


def expert_name(layer: int, expert: int) -> str:
    return f"{LAYERS[layer].prefix}{EXPERTS_MARK}{expert}.w"


def tensor_values(fqn: str, kind: str, shape: tuple[int, ...], attempt: int, step: int) -> np.ndarray:
    seed = abs(hash_text(f"{fqn} {kind} {attempt} {step}"))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def hash_text(text: str) -> int:
    return int.from_bytes(text.encode()[-16:], "little")


def pieces(numel: int, world: int, rank: int) -> tuple[int, int]:
    return numel * rank // world, numel * (rank + 1) // world


def write_rank(
    store: Store,
    tag: str,
    save_id: str,
    rank: int,
    *,
    step: int,
    attempt: int,
    world: int = 2,
    experts: Collection[tuple[int, int]] = tuple(EXPERTS),
    publish: bool = True,
    save_latest: bool = True,
    versions: Mapping[tuple[int, int], tuple[int, int]] | None = None,
    dense: bool = True,
) -> Part:
    """Writes one rank's packs, extra file and part of a save.

    `versions` gives the (attempt, step) of experts whose bytes are older than the save. Without dense state it is a
    part that completes a checkpoint.
    """
    tensors: list[TensorRecord] = []
    units: list[UnitRecord] = []
    packs: list[PackRecord] = []
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    groups = {
        "dense": [(dense_unit(DENSE[0]), DENSE[0], DENSE[1])] if dense else [],
        "experts": [(expert_unit(*place), expert_name(*place), EXPERT_SHAPE) for place in sorted(experts)],
    }
    for which, members in groups.items():
        payload, spans = bytearray(), []
        for unit, fqn, shape in members:
            version = {expert_unit(*place): found for place, found in (versions or {}).items()}.get(
                unit, (attempt, step)
            )
            units.append(UnitRecord(unit, *version, None if which == "dense" else version[1] * 10))
            for kind in KINDS:
                tensors.append(TensorRecord(fqn, kind, "float32", shape))
                start, stop = pieces(int(np.prod(shape)), world, rank)
                data = tensor_values(fqn, kind, shape, *version).reshape(-1)[start:stop].tobytes()
                spans.append((len(units) - 1, len(tensors) - 1, start, stop, len(payload), len(data)))
                payload += data + b"\0" * 4  # a gap between fragments
        if not members:
            continue
        path = pack_key(tag, save_id, rank, which)
        result = write_pack(
            store,
            path,
            len(payload),
            [span[4:6] for span in spans],
            ArraySource(np.frombuffer(bytes(payload), np.uint8)),
        )
        packs.append(PackRecord(path, len(payload), result.stored_bytes))
        rows += [
            (unit, tensor, len(packs) - 1, start, stop, offset, crc)
            for (unit, tensor, start, stop, offset, _), crc in zip(spans, result.crc32c, strict=True)
        ]
    declared = [TensorRecord(DENSE[0], kind, "float32", DENSE[1]) for kind in KINDS]
    declared += [
        TensorRecord(expert_name(*place), kind, "float32", EXPERT_SHAPE) for place in EXPERTS for kind in KINDS
    ]
    if not dense:
        declared = []
    extra = {} if not dense else {f"rng/{rank}": write_extra(store, tag, save_id, f"rng/{rank}", bytes([rank] * 9))}
    part = Part(
        tag=tag,
        save_id=save_id,
        attempt=attempt,
        step=step,
        rank=rank,
        world=world,
        units=units,
        tensors=tensors,
        declared=declared,
        packs=packs,
        fragments=FragmentTable.from_rows(rows),
        extra=extra,
        parameters=275 if rank == 0 else 0,
        rng={"python": "same", "torch": f"of rank {rank}"},
        optimizer=msgspec.msgpack.encode([{"fqns": [f"rank {rank}"]}]),
        commit=commit_info(save_latest) if rank == 0 and dense else None,
    )
    if publish:
        write_part(store, part)
    return part


def commit_info(save_latest: bool = True, **changes: Any) -> CommitInfo:
    info = CommitInfo(
        topology=TOPOLOGY, moe_layers=LAYERS, save_latest=save_latest, state=msgspec.msgpack.encode({"engine": {}})
    )
    return msgspec.structs.replace(info, **changes)


def save(
    store: Store,
    tag: str,
    step: int,
    *,
    experts: Collection[tuple[int, int]] = tuple(EXPERTS),
    attempt: int | None = None,
    save_latest: bool = True,
    world: int = 2,
) -> Manifest:
    """Writes and commits a whole checkpoint; opens an attempt if there is none."""
    if attempt is None:
        found = current_attempt(store) or open_attempt(store)
        attempt = found.attempt
    save_id = new_save_id()
    for rank in range(world):
        write_rank(
            store,
            tag,
            save_id,
            rank,
            step=step,
            attempt=attempt,
            experts=experts,
            world=world,
            save_latest=save_latest,
        )
    return commit(store, tag, save_id, attempt=attempt)


def flip(path: Path, position: int, mask: int = 0x10) -> None:
    """Flips bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def each_file(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())
