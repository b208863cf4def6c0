"""Fetches over the network what only another node's memory holds of a checkpoint."""

from __future__ import annotations

import logging
from typing import NamedTuple

from moc_ckpt.comm import Comm
from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.recovery.memory_reads import MemoryPiece, without
from moc_ckpt.recovery.peer_plan import Offer, answer, encode_requests, plan_requests, taken
from moc_ckpt.recovery.resolver import RecoveryPlan
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.transfer import Transfer

__all__ = ["Fetched", "fetch_from_peers"]

logger = logging.getLogger("moc_ckpt")


class Fetched(NamedTuple):
    """What came from other nodes.

    Attributes:
        pieces: their bytes, checked, in this process's own memory.
        left: what is still to be read from storage.
    """

    pieces: list[MemoryPiece]
    left: RecoveryPlan


def fetch_from_peers(
    comm: Comm, held: HeldMemory | None, manifest: Manifest, plan: RecoveryPlan, *, deadline_s: float
) -> Fetched:
    """Asks the ranks of other nodes for what this node's memory does not hold; collective.

    Storage has all of it, too: what does not come, for whatever reason, is left in the plan.

    Args:
        comm: all ranks.
        held: memory of the run before on this node; None if there is none.
        manifest: the manifest that the plan was made from, the same on all ranks.
        plan: what this rank still needs.
        deadline_s: seconds that the transfer may take; less than `comm`'s deadline for a commit.
    """
    offer = Offer(held.ranks if held is not None else (), plan.nbytes)
    offers = comm.exchange("looking for memory on other nodes", lambda: offer, wait="commit")
    # Equal on all ranks: who lacks something, and whether anybody could have it.
    known = {rank for offer in offers for rank in offer.holds}
    if not any(offer.lacks and known - set(offer.holds) for offer in offers):
        return Fetched([], plan)
    requests = plan_requests(manifest, plan, offers, comm.rank)
    transfer: Transfer | None = None
    failed, replies = "", {}
    try:
        transfer = Transfer(deadline_s)
        questions = transfer.swap({whom: [encode_requests(rows)] for whom, rows in requests.items()})
        replies = transfer.swap({who: answer(held, manifest, rows) for who, rows in questions.items()})
    except Exception as error:  # whatever it is, storage has the bytes
        logger.debug("the transfer failed", exc_info=True)
        failed = str(error) or type(error).__name__
        if transfer is not None:
            transfer.close()  # peers need not wait for their deadline
    told = comm.exchange("fetching from other nodes", lambda: failed, wait="commit")
    if transfer is not None:
        transfer.close()
    trouble = [rank for rank, text in enumerate(told) if text]
    if trouble and comm.rank == 0:
        logger.warning(
            "ranks %s could not fetch from the memory of other nodes and read storage instead: %s",
            trouble,
            told[trouble[0]],
        )
    found = [item for whom, reply in replies.items() for item in taken(requests[whom], reply)]
    left = without(plan, {(request.pack, request.piece) for request, _ in found})
    return Fetched([piece for _, piece in found], left)
