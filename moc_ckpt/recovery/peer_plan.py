"""What of a recovery plan the memory of other nodes can serve: who is asked for what, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.recovery.memory_reads import MemoryPiece, Rows, aligned, cut_views, verified
from moc_ckpt.recovery.resolver import Piece, RecoveryPlan
from moc_ckpt.storage.checkpoint import pack_rank
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import Manifest

__all__ = ["Offer", "Request", "answer", "encode_requests", "plan_requests", "taken"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What one rank says before anybody asks; small.

    Attributes:
        holds: ranks of the run before whose memory is on this rank's node.
        lacks: bytes that this rank needs and does not have there.
    """

    holds: tuple[int, ...]
    lacks: int


@dataclass(frozen=True, slots=True)
class Request:
    """An interval of a pack that another node may have in memory.

    Attributes:
        pack: index of the pack.
        piece: the interval.
    """

    pack: int
    piece: Piece


def plan_requests(
    manifest: Manifest, plan: RecoveryPlan, offers: Sequence[Offer], rank: int
) -> dict[int, list[Request]]:
    """Decides whom a rank asks for what its own node does not have. Pure.

    A pack was written from the memory of the rank that it is named after, so that is where its bytes may be. Of the
    ranks on that node each asker takes another one.

    Args:
        manifest: the manifest that the plan was made from.
        plan: what this rank still has to read.
        offers: of all ranks, in rank order.
        rank: this rank.

    Returns:
        Rank -> what it is asked for.
    """
    holders: dict[int, list[int]] = {}
    for holder, offer in enumerate(offers):
        for held in offer.holds:
            holders.setdefault(held, []).append(holder)
    mine = set(offers[rank].holds)
    found: dict[int, list[Request]] = {}
    for read in plan.reads:
        writer = pack_rank(manifest.packs[read.pack].path)
        if writer is None or writer in mine or writer not in holders:
            continue
        whom = holders[writer][rank % len(holders[writer])]
        found.setdefault(whom, []).extend(Request(read.pack, piece) for piece in read.pieces if piece.nbytes)
    return {whom: requests for whom, requests in found.items() if requests}


def encode_requests(requests: Sequence[Request]) -> npt.NDArray[np.uint8]:
    """Encodes requests for the rank that is asked; `answer` reads them."""
    rows = [(request.pack, request.piece.offset, request.piece.nbytes) for request in requests]
    return np.array(rows, np.int64).reshape(-1, 3).view(np.uint8).reshape(-1)


def answer(held: HeldMemory | None, manifest: Manifest, encoded: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    """Finds what another rank asks for, and checks it against the manifest's checksums.

    Args:
        held: memory of the run before on this node.
        manifest: the manifest that both ranks read.
        encoded: what `encode_requests` returned there.

    Returns:
        One byte per request, 1 where it is served; then the bytes of those that are, in order, each from a multiple of
        64 bytes on.
    """
    wanted = encoded.view(np.int64).reshape(-1, 3)
    flags = np.zeros(len(wanted), np.uint8)
    parts = [flags]
    at = len(flags)
    if held is not None:
        rows = Rows(manifest, {int(pack) for pack in np.unique(wanted[:, 0])})
        places = [rows.at(int(pack), int(offset)) for pack, offset, _ in wanted]
        right = verified(held, manifest, {row for row in places if row is not None})
        for index, (row, (_, offset, nbytes)) in enumerate(zip(places, wanted, strict=True)):
            if row is None or row not in right:
                continue
            views = cut_views(right[row], int(offset) - row.offset, int(nbytes))
            if sum(len(view) for view in views) == nbytes:
                flags[index] = 1
                parts += [np.zeros(aligned(at) - at, np.uint8), *views]
                at = aligned(at) + int(nbytes)
    return parts


def taken(requests: Sequence[Request], reply: npt.NDArray[np.uint8]) -> list[tuple[Request, MemoryPiece]]:
    """Reads an answer; what is not there, or not what the checkpoint saved, is left out.

    Args:
        requests: what was asked for.
        reply: the bytes that `answer` returned there.
    """
    found = []
    at = len(requests)
    for request, served in zip(requests, reply[: len(requests)], strict=True):
        if not served:
            continue
        piece, begin = request.piece, aligned(at)
        at = begin + piece.nbytes
        data = reply[begin:at]
        if piece.crc32c is None or crc32c(data) == piece.crc32c:
            found.append((request, MemoryPiece(piece, [data])))
    return found
