"""For each fragment, the bytes that hold it (DESIGN sections 1 and 11). Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moc_ckpt.errors import CoverageError
from moc_ckpt.state.fragment import Fragment, TensorKey, itemsize

__all__ = ["Piece", "Read", "RecoveryPlan", "Stored", "StoredTensor", "resolve"]


class Stored(NamedTuple):
    """A stored fragment.

    Attributes:
        start: first element in the flattened logical tensor.
        stop: one past the last element.
        pack: index of its pack.
        offset: first byte in the pack.
        crc32c: checksum of its bytes.
    """

    start: int
    stop: int
    pack: int
    offset: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor in storage.

    Attributes:
        dtype: its dtype there.
        shape: its logical shape.
        fragments: ascending, covering it exactly once.
    """

    dtype: str
    shape: tuple[int, ...]
    fragments: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored interval and where it goes.

    Attributes:
        need: index of the needed fragment.
        at: first byte of the interval inside the needed fragment, in bytes of the stored dtype.
        nbytes: bytes of the interval.
        offset: first byte in the pack.
        crc32c: checksum, where the interval is a whole stored fragment; None otherwise.
    """

    need: int
    at: int
    nbytes: int
    offset: int
    crc32c: int | None


@dataclass(frozen=True, slots=True)
class Read:
    """Everything that one rank reads from one pack, by ascending offset."""

    pack: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """What one rank reads.

    Attributes:
        reads: one per pack, by ascending pack index.
        dtypes: stored dtype of each needed fragment.
    """

    reads: tuple[Read, ...]
    dtypes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return sum(read.nbytes for read in self.reads)


def resolve(tensors: Mapping[TensorKey, StoredTensor], needs: Sequence[Fragment]) -> RecoveryPlan:
    """Finds the stored bytes of every needed fragment.

    Args:
        tensors: what storage holds.
        needs: what a rank needs; their dtypes may differ from the stored ones (values are then cast).

    Returns:
        The plan: reads per pack whose pieces fill every needed fragment exactly.

    Raises:
        CoverageError: if a needed interval is not stored; ModelMismatch is checked before.
    """
    by_pack: dict[int, list[Piece]] = {}
    dtypes: list[str] = []
    for index, need in enumerate(needs):
        tensor = tensors.get(need.key)
        if tensor is None:
            raise CoverageError(f"{need.fqn} has no {need.kind} in the checkpoint", where=need.fqn)
        dtypes.append(tensor.dtype)
        size = itemsize(tensor.dtype)
        for stored in _overlapping(tensor.fragments, need):
            low, high = max(stored.start, need.start), min(stored.stop, need.stop)
            whole = low == stored.start and high == stored.stop
            by_pack.setdefault(stored.pack, []).append(
                Piece(
                    need=index,
                    at=(low - need.start) * size,
                    nbytes=(high - low) * size,
                    offset=stored.offset + (low - stored.start) * size,
                    crc32c=stored.crc32c if whole else None,
                )
            )
    reads = tuple(
        Read(pack, tuple(sorted(pieces, key=lambda piece: piece.offset))) for pack, pieces in sorted(by_pack.items())
    )
    return RecoveryPlan(reads, tuple(dtypes))


def _overlapping(fragments: Sequence[Stored], need: Fragment) -> Iterable[Stored]:
    at = need.start
    index = max(bisect_right(fragments, need.start, key=lambda stored: stored.start) - 1, 0)
    for stored in fragments[index:]:
        if at >= need.stop:
            break
        if stored.stop <= at:
            continue
        if stored.start > at:
            break
        yield stored
        at = stored.stop
    if at < need.stop:
        raise CoverageError(
            f"{need.fqn} {need.kind}: elements [{at}, {need.stop}) are not stored",
            where=need.fqn,
            fix="verify the checkpoint with moc-ckpt verify",
        )
