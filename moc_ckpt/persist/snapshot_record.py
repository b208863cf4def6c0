"""What an arena says about its snapshots beside tensors, so that a process that knows nothing else can save them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import FormatError
from moc_ckpt.storage.manifest import MoELayerRecord, TensorRecord, Topology

__all__ = ["RECORD", "SnapshotRecord", "decode_record", "encode_record", "pack_learnt", "unpack_learnt"]

RECORD = "record"
"""Name of the file in an extra slot that holds it."""

_Ints = npt.NDArray[np.int64]


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's record of one snapshot.

    Attributes:
        step: engine.global_steps.
        topology: the run.
        moe_layers: the model's MoE layers.
        parameters: number of parameters of which the rank is the first replica.
        hollow: tensors without elements that the rank vouches for: no slot tells of them.
        rng: digest of each of its random number streams.
        learnt: step -> tokens that the experts of a version of that step have learnt (`pack_learnt`); for every
            step of which the arena may hold a version.
        ledger: the lost-token ledger as plain data; rank 0 only, and None without MoE layers.
        rotation: where the snapshots' rotation is, as plain data; rank 0 only.
        owners: expert unit -> all ranks whose arenas hold a part of it; for those that this rank's does. Whoever finds
            some of the arenas knows by it which experts are whole there. Empty if nobody noted it.
    """

    step: int
    topology: Topology
    moe_layers: list[MoELayerRecord]
    parameters: int
    hollow: list[TensorRecord]
    rng: dict[str, str]
    learnt: dict[int, bytes]
    ledger: dict[str, Any] | None = None
    rotation: dict[str, Any] | None = None
    owners: dict[str, list[int]] = {}


def encode_record(record: SnapshotRecord) -> bytes:
    """Returns the record as bytes."""
    return msgspec.msgpack.encode(record)


def decode_record(data: bytes, where: str) -> SnapshotRecord:
    """Reads a record.

    Raises:
        FormatError: if it is none.
    """
    try:
        return msgspec.msgpack.decode(data, type=SnapshotRecord)
    except msgspec.MsgspecError as error:
        raise FormatError(
            f"the record of a snapshot cannot be read: {error}",
            where=where,
            fix="it was written by another version of moc_ckpt; recover with that one",
        ) from error


def pack_learnt(learnt: Sequence[_Ints]) -> bytes:
    """Returns token counts, per layer int64 [experts], as bytes."""
    return np.concatenate([np.asarray(layer, dtype="<i8") for layer in learnt]).tobytes() if learnt else b""


def unpack_learnt(packed: Mapping[int, bytes], experts: Sequence[int]) -> dict[int, list[_Ints]]:
    """Returns step -> per layer, int64 [experts] token counts.

    Raises:
        FormatError: if they are not those of such layers.
    """
    found = {}
    for step, data in packed.items():
        if len(data) != 8 * sum(experts):
            raise FormatError(f"token counts of {len(data) // 8} experts, not of {sum(experts)}", where=f"step {step}")
        flat = np.frombuffer(data, dtype="<i8").astype(np.int64)
        found[step] = np.split(flat, np.cumsum(experts)[:-1]) if experts else []
    return found
