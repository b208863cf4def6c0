"""Sharding of state that several ranks hold alike (DESIGN section 7). Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moc_ckpt.state.fragment import TensorKey

__all__ = ["Replicated", "assign_writers"]


class Replicated(NamedTuple):
    """A logical tensor that several ranks hold alike.

    Attributes:
        key: which tensor.
        nbytes: its size in bytes.
        holders: global ranks that hold it, ascending.
    """

    key: TensorKey
    nbytes: int
    holders: tuple[int, ...]


def assign_writers(items: Iterable[Replicated], loads: Mapping[int, int]) -> dict[TensorKey, int]:
    """Picks one writer per tensor: largest first onto the least loaded of its holders.

    A pure function of its arguments, whatever the order of `items`, so every rank finds the same.

    Args:
        items: the replicated tensors of all ranks.
        loads: bytes that each rank writes anyway (what ZeRO partitioned); ranks left out have 0.

    Returns:
        The writing rank of each tensor.
    """
    load = dict(loads)
    # Holder sets are few (one per process group): a heap each, with loads refreshed when they are looked at.
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    writers: dict[TensorKey, int] = {}
    for item in sorted(items, key=lambda item: (-item.nbytes, item.key)):
        heap = heaps.get(item.holders)
        if heap is None:
            heap = [(load.get(rank, 0), rank) for rank in item.holders]
            heapq.heapify(heap)
            heaps[item.holders] = heap
        while heap[0][0] != load.get(heap[0][1], 0):
            rank = heap[0][1]
            heapq.heapreplace(heap, (load.get(rank, 0), rank))
        rank = heap[0][1]
        writers[item.key] = rank
        load[rank] = load.get(rank, 0) + item.nbytes
        heapq.heapreplace(heap, (load[rank], rank))
    return writers
