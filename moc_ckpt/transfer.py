"""Bulk bytes between the host memories of ranks, straight from where they lie.

Over a gloo group of its own, made for the purpose: when a connection breaks in the middle of it, only the transfer is
lost, not the collectives that agree on what to do then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moc_ckpt.errors import RankError, RendezvousTimeoutError

__all__ = ["Transfer", "chunks"]

# A message; both sides cut at multiples of it.
_CHUNK = 16 << 20
# Messages under way to one rank: one is sent while the next is put together.
_AHEAD = 3


class Transfer:
    """Exchanges bytes between all ranks of a job. Making it is collective. Not thread-safe.

    Args:
        deadline_s: seconds that all of it may take.
        chunk: bytes of a message, the same on all ranks.
    """

    def __init__(self, deadline_s: float, *, chunk: int = _CHUNK) -> None:
        self._deadline_s = deadline_s
        self._end = time.monotonic() + deadline_s
        self._chunk = chunk
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))

    def swap(self, outgoing: Mapping[int, Sequence[np.ndarray]]) -> dict[int, np.ndarray]:
        """Sends bytes to any ranks and returns what came from any; collective.

        Args:
            outgoing: rank -> what it gets, uint8 arrays that it will see as one.

        Returns:
            Rank -> uint8 array that begins at a multiple of 64 bytes, of every rank that sent something.

        Raises:
            RendezvousTimeoutError: if a rank has not sent or taken everything in time.
            RankError: if the connection to a rank broke.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        sizes: list[dict[int, int]] = [{} for _ in range(world)]
        own = {to: total for to, views in outgoing.items() if (total := sum(len(view) for view in views))}
        try:
            dist.all_gather_object(sizes, own, group=self._group)
        except RuntimeError as error:
            raise RankError(f"the ranks could not tell each other what they send: {error}") from error
        incoming = {source: _aligned(told[rank]) for source, told in enumerate(sizes) if rank in told}
        receives: list[tuple[int, Any]] = []
        for source, buffer in incoming.items():
            if source == rank:  # which has no connection to itself
                np.concatenate(outgoing[rank], out=buffer)
                continue
            for at in range(0, len(buffer), self._chunk):
                room = torch.from_numpy(buffer[at : at + self._chunk])
                receives.append((source, self._start(dist.irecv, room, source)))
        queues = {to: chunks(outgoing[to], self._chunk) for to in own if to != rank}
        under_way: deque[tuple[int, Any, torch.Tensor]] = deque()
        while queues:
            # One message to each in turn, so that nobody waits for all that others get.
            for to in list(queues):
                part = next(queues[to], None)
                if part is None:
                    del queues[to]
                    continue
                tensor = torch.from_numpy(part)
                under_way.append((to, self._start(dist.isend, tensor, to), tensor))
            while len(under_way) > _AHEAD * max(len(queues), 1):
                to, work, _ = under_way.popleft()
                self._wait(to, work, "take")
        for to, work, _ in under_way:
            self._wait(to, work, "take")
        for source, work in receives:
            self._wait(source, work, "send")
        return incoming

    def _start(self, begin: Callable[..., Any], tensor: torch.Tensor, peer: int) -> Any:
        try:
            return begin(tensor, peer, group=self._group)
        except RuntimeError as error:
            raise RankError(f"the connection to rank {peer} broke: {error}") from error

    def _wait(self, peer: int, work: Any, what: str) -> None:
        left = self._end - time.monotonic()
        try:
            if left > 0:
                work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            left = self._end - time.monotonic()
            if left > 0:
                raise RankError(f"the connection to rank {peer} broke: {error}") from error
        if left <= 0:
            raise RendezvousTimeoutError(f"rank {peer} did not {what} all bytes within {self._deadline_s:g} s")

    def close(self) -> None:
        """Closes the connections. Doing it again changes nothing. Not collective: who waits for this rank fails."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


def _aligned(nbytes: int) -> np.ndarray:
    room = np.empty(nbytes + 64, np.uint8)
    skip = -room.ctypes.data % 64
    return room[skip : skip + nbytes]


def chunks(views: Sequence[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the bytes of arrays in pieces of `size`, the last one smaller; copies only what crosses arrays."""
    buffer = np.empty(0, np.uint8)
    filled = 0
    for view in views:
        at = 0
        while at < len(view):
            if filled == 0 and len(view) - at >= size:
                yield view[at : at + size]
                at += size
                continue
            if filled == 0:
                buffer = np.empty(size, np.uint8)
            count = min(size - filled, len(view) - at)
            buffer[filled : filled + count] = view[at : at + count]
            filled, at = filled + count, at + count
            if filled == size:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]
