"""Bytes between ranks: they arrive as they were sent, and a rank that does not take part is named in time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from distributed.pool import Pool

pytestmark = pytest.mark.distributed

WORLD = 4


def bytes_of(source: int, to: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng([source, to]).integers(0, 256, nbytes, dtype=np.uint8)


def case_swap(ctx: Any, seed: int) -> dict[str, Any]:
    from moc_ckpt.transfer import Transfer

    # Everybody knows what everybody sends: many sizes around that of a message, often nothing.
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 0, 1, 4095, 4096, 4097, 300_001], (WORLD, WORLD))
    transfer = Transfer(30.0, chunk=4096)
    wrong = []
    for _ in range(2):
        outgoing = {}
        for to in range(WORLD):
            data = bytes_of(ctx.rank, to, sizes[ctx.rank, to])
            cut = len(data) // 3
            outgoing[to] = [data[:cut], data[cut:cut], data[cut:]]
        found = transfer.swap(outgoing)
        if sorted(found) != [source for source in range(WORLD) if sizes[source, ctx.rank]]:
            wrong.append(f"{ctx.rank} got something from {sorted(found)}")
        for source, data in found.items():
            if data.tobytes() != bytes_of(source, ctx.rank, sizes[source, ctx.rank]).tobytes():
                wrong.append(f"{source} to {ctx.rank}: other bytes")
            if data.ctypes.data % 64:
                wrong.append("not aligned")
    transfer.close()
    transfer.close()
    return {"wrong": wrong, "own": int(sizes[ctx.rank, ctx.rank])}


@pytest.mark.parametrize("seed", range(3))
def test_what_is_sent_arrives(pool: Pool, seed: int) -> None:
    answers = pool.run(WORLD, case_swap, seed=seed)
    assert [line for answer in answers for line in answer["wrong"]] == []


def case_broken(ctx: Any, how: str) -> dict[str, Any]:
    from moc_ckpt.transfer import Transfer

    begin = time.monotonic()
    transfer = Transfer(6.0, chunk=4096)
    text = ""
    data = np.zeros(1 << 20, np.uint8)
    try:
        if ctx.rank == 1:
            # It says what it sends, as the others do, and then does not.
            sizes: list[Any] = [None] * WORLD
            import torch.distributed as dist

            dist.all_gather_object(sizes, {0: len(data)}, group=transfer._group)
            if how == "leaves":
                transfer.close()
        else:
            transfer.swap({} if ctx.rank == 0 else {0: [data]})
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begin
    # Whatever happened there, the collectives of the package still work.
    from moc_ckpt.comm import Comm

    told = Comm(rendezvous_s=30.0, commit_s=60.0).exchange("afterwards", lambda: ctx.rank)
    transfer.close()
    return {"text": text, "seconds": seconds, "told": told}


@pytest.mark.parametrize("how", ["is silent", "leaves"])
def test_a_rank_that_does_not_send_is_named(pool: Pool, how: str) -> None:
    answers = pool.run(WORLD, case_broken, how=how)
    for answer in answers:
        assert answer["told"] == list(range(WORLD))
    text, seconds = answers[0]["text"], answers[0]["seconds"]
    if how == "is silent":
        assert "RendezvousTimeoutError: rank 1 did not send all bytes within 6 s" in text
        assert 5 < seconds < 12
    else:
        assert "the connection to rank 1 broke" in text
        assert seconds < 5
    assert [answer["text"] for answer in answers[2:]] == ["", ""]
