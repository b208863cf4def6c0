"""What a snapshot copies of one rank: for each unit its fragments, their places in a slot, and the live bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import torch

from moc_ckpt.errors import CoverageError
from moc_ckpt.plan.save_plan import DENSE, lay_out
from moc_ckpt.plan.sharding import Share
from moc_ckpt.snapshot.stager import Piece
from moc_ckpt.state.catalog import Catalog, Entry
from moc_ckpt.state.fragment import Fragment, TensorKey
from moc_ckpt.state.unit import parse_expert_unit

__all__ = ["Sources", "UnitSource", "build_sources", "share_pieces"]


class Volatile(NamedTuple):
    """Live bytes that may change before the next update: cloned when the snapshot begins (invariant I2).

    Attributes:
        fqn: the tensor's name.
        start: first element in it.
        stop: one past the last element.
        offset: first byte in the slot.
    """

    fqn: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class UnitSource:
    """What this rank copies of one unit: all dense state counts as one.

    Attributes:
        unit: `dense`, or the name of an expert unit.
        fragments: their addresses, each with the unit that it belongs to.
        offsets: first byte of each in the slot.
        nbytes: bytes of the slot.
        pieces: contiguous runs of live memory.
        volatile: what must be cloned first.
        descriptor: the fragments as msgpack, for readers of the arena that know nothing else.
    """

    unit: str
    fragments: tuple[tuple[str, Fragment], ...]
    offsets: tuple[int, ...]
    nbytes: int
    pieces: tuple[Piece, ...]
    volatile: tuple[Volatile, ...]
    descriptor: bytes


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything that one rank copies.

    Attributes:
        dense: its dense state; None if it has none to write.
        experts: (layer, expert) -> its part of that expert.
    """

    dense: UnitSource | None
    experts: Mapping[tuple[int, int], UnitSource]


def share_pieces(
    entry: Entry, shares: Mapping[TensorKey, tuple[Share, ...]], rank: int
) -> list[tuple[Fragment, int, int]]:
    """Returns what of an entry a rank writes: addresses, and elements [start, stop) of the entry's own tensor.

    Args:
        entry: an entry of the rank's catalog.
        shares: who writes what of the tensors that several ranks hold.
        rank: the rank.

    Raises:
        CoverageError: if nobody is to write it.
    """
    fragment = entry.fragment
    if len(entry.holders) == 1:
        return [(fragment, 0, fragment.numel)] if entry.holders[0] == rank else []
    try:
        found = [share for share in shares[fragment.key] if share.writer == rank]
    except KeyError:
        raise CoverageError(f"no rank offered to write {fragment.fqn} {fragment.kind}") from None
    return [(replace(fragment, start=share.start, stop=share.stop), share.start, share.stop) for share in found]


def build_sources(
    catalog: Catalog, shares: Mapping[TensorKey, tuple[Share, ...]], *, is_volatile: Callable[[Entry], bool]
) -> Sources:
    """Finds what this rank copies of every unit. Not collective.

    Args:
        catalog: the rank's catalog; the result is of no use once its tensors were replaced.
        shares: who writes what of the tensors that several ranks hold.
        is_volatile: tells whether an entry must be cloned when a snapshot begins.
    """
    units: dict[str, list[tuple[str, Fragment, Entry, int, int]]] = {}
    for entry in catalog.entries:
        name = entry.unit if parse_expert_unit(entry.unit) is not None else DENSE
        for fragment, start, stop in share_pieces(entry, shares, catalog.rank):
            units.setdefault(name, []).append((entry.unit, fragment, entry, start, stop))
    found = {name: _unit(name, items, is_volatile) for name, items in units.items()}
    dense = found.pop(DENSE, None)
    experts = {}
    for name, source in found.items():
        place = parse_expert_unit(name)
        assert place is not None
        experts[place] = source
    return Sources(dense, experts)


def _unit(
    name: str,
    items: Sequence[tuple[str, Fragment, Entry, int, int]],
    is_volatile: Callable[[Entry], bool],
) -> UnitSource:
    offsets, nbytes = lay_out([fragment for _, fragment, *_ in items])
    pieces: list[Piece] = []
    volatile: list[Volatile] = []
    for (_, fragment, entry, start, stop), offset in zip(items, offsets, strict=True):
        if is_volatile(entry) or not entry.tensor.is_contiguous():
            volatile.append(Volatile(fragment.fqn, start, stop, offset))
        else:
            pieces.append(Piece(entry.flat()[start:stop], offset))
    rows = [
        (unit, item.fqn, item.kind, item.dtype, item.shape, item.start, item.stop, offset)
        for (unit, item, *_), offset in zip(items, offsets, strict=True)
    ]
    return UnitSource(
        unit=name,
        fragments=tuple((unit, fragment) for unit, fragment, *_ in items),
        offsets=tuple(offsets),
        nbytes=nbytes,
        pieces=tuple(_joined(pieces)),
        volatile=tuple(volatile),
        descriptor=msgspec.msgpack.encode(rows),
    )


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Joins pieces that are neighbours in memory and in the slot, as bytes: flat partitions are few long runs."""
    spans: list[tuple[int, torch.Tensor, int, int, int]] = []
    for piece in pieces:
        tensor = piece.tensor
        size = tensor.element_size()
        storage = tensor.untyped_storage().data_ptr()
        spans.append((storage, tensor, int(tensor.storage_offset()) * size, piece.offset, tensor.numel() * size))
    spans.sort(key=lambda span: (span[0], span[2]))
    joined: list[tuple[int, torch.Tensor, int, int, int]] = []
    for storage, tensor, start, offset, nbytes in spans:
        last = joined[-1] if joined else None
        if last is not None and last[0] == storage and last[2] + last[4] == start and last[3] + last[4] == offset:
            joined[-1] = (*last[:4], last[4] + nbytes)
        elif nbytes:
            joined.append((storage, tensor, start, offset, nbytes))
    found = []
    for _, tensor, start, offset, nbytes in joined:
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        found.append(Piece(whole[start : start + nbytes], offset))
    return sorted(found, key=lambda piece: piece.offset)
