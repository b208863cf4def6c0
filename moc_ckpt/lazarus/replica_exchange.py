"""Moves experts' elements between the ranks that hold them: gradients are summed, shares are gathered.

One variable-size all-to-all per layer does each. Who sends what to whom follows from the placement alone, so every rank
makes the same calls in the same order, whichever experts it has and in whatever order it has them. There is no process
group per set of holders, and no collective that only some ranks make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["GRAIN", "ReplicaExchange", "Split", "split_evenly", "split_first"]

# Shares begin at multiples of it where there is enough to share out: vector instructions then see the same groups of
# elements in a share as in the whole, and results do not depend on how an expert was cut.
GRAIN = 64

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Split:
    """How the elements of one expert are shared out among its holders.

    Attributes:
        holders: the ranks that hold the expert, ascending.
        shares: for each holder its intervals [start, stop) of the flattened expert, ascending, one per segment; those
            of all holders cover every element once.
    """

    holders: tuple[int, ...]
    shares: tuple[tuple[Interval, ...], ...]

    def share_of(self, rank: int) -> tuple[Interval, ...]:
        """Returns the intervals of a holder."""
        return self.shares[self.holders.index(rank)]


def split_evenly(holders: Sequence[int], segments: Sequence[int]) -> Split:
    """Gives every holder an even part of every segment.

    Args:
        holders: the ranks that hold the expert, ascending.
        segments: elements of the consecutive parts of the flattened expert that are cut alone.
    """
    count = len(holders)
    shares: list[list[Interval]] = [[] for _ in holders]
    begin = 0
    for numel in segments:
        grain = GRAIN if numel >= GRAIN * count else 1
        size = -(-numel // (grain * count)) * grain
        for place in range(count):
            shares[place].append((begin + min(place * size, numel), begin + min((place + 1) * size, numel)))
        begin += numel
    return Split(tuple(holders), tuple(map(tuple, shares)))


def split_first(holders: Sequence[int], numel: int) -> Split:
    """Gives all of an expert to its first holder.

    Args:
        holders: the ranks that hold the expert, ascending.
        numel: its elements.
    """
    return Split(tuple(holders), tuple(((0, numel if place == 0 else 0),) for place in range(len(holders))))


class ReplicaExchange:
    """The exchanges of one layer's experts. Methods are collective over all ranks of the group; not thread-safe.

    Args:
        splits: for each local expert, by ascending global id, how it is shared out; may be empty.
        group: the process group over whose ranks the layer is placed.
        device: of the elements; needed where this rank may have no expert to exchange, and takes part all the same.
    """

    def __init__(self, splits: Mapping[int, Split], group: Any, device: torch.device | None = None) -> None:
        self._splits = {expert: splits[expert] for expert in sorted(splits)}
        self._nothing = torch.empty(0, device=device)
        self._group = group
        self._rank = dist.get_rank(group)
        self._world = dist.get_world_size(group)

    def reduce(self, flats: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Sums the experts' elements over their holders, in the order of the ranks; each holder gets its share.

        Args:
            flats: for each local expert its elements, [numel], all of one dtype and device.

        Returns:
            For each local expert the sums of this rank's share, its intervals one after the other.
        """

        def sent(expert: int, other: int) -> list[Tensor]:
            return [flats[expert][start:stop] for start, stop in self._splits[expert].share_of(other)]

        def expected(expert: int, other: int) -> int:
            return _numel(self._splits[expert].share_of(self._rank))

        received = self._swap(flats, sent, expected)
        sums = {}
        for expert, split in self._splits.items():
            first, *others = (received[expert, rank] for rank in split.holders)
            for part in others:
                first.add_(part)
            sums[expert] = first
        return sums

    def gather(self, shares: Mapping[int, Tensor], out: Mapping[int, Tensor]) -> None:
        """Gives every holder of an expert the shares of all of them, bit for bit.

        Args:
            shares: for each local expert this rank's share, its intervals one after the other.
            out: for each local expert where its elements go, [numel], of the dtype and device of the shares.
        """

        def sent(expert: int, other: int) -> list[Tensor]:
            return [shares[expert]]

        def expected(expert: int, other: int) -> int:
            return _numel(self._splits[expert].share_of(other))

        received = self._swap(shares, sent, expected)
        for (expert, rank), part in received.items():
            intervals = self._splits[expert].share_of(rank)
            pieces = part.split([stop - start for start, stop in intervals])
            for (start, stop), piece in zip(intervals, pieces, strict=True):
                out[expert][start:stop].copy_(piece)

    def _swap(
        self,
        like: Mapping[int, Tensor],
        sent: Callable[[int, int], list[Tensor]],
        expected: Callable[[int, int], int],
    ) -> dict[tuple[int, int], Tensor]:
        """Exchanges what `sent` gives for (expert, rank); returns what came by (expert, rank), `expected` elements."""
        pieces: list[Tensor] = []
        outgoing, incoming = [0] * self._world, [0] * self._world
        places: list[tuple[int, int]] = []
        sizes: list[int] = []
        for other in range(self._world):
            for expert, split in self._splits.items():
                if other not in split.holders:
                    continue
                parts = sent(expert, other)
                pieces += parts
                outgoing[other] += sum(part.numel() for part in parts)
                places.append((expert, other))
                sizes.append(expected(expert, other))
                incoming[other] += sizes[-1]
        first = next(iter(like.values()), self._nothing)
        buffer = torch.cat(pieces) if pieces else self._nothing
        arrived = torch.empty(sum(incoming), dtype=first.dtype, device=first.device)
        # As bytes: not every backend exchanges every dtype.
        size = first.element_size()
        dist.all_to_all_single(
            arrived.view(torch.uint8),
            buffer.view(torch.uint8),
            [count * size for count in incoming],
            [count * size for count in outgoing],
            group=self._group,
        )
        return dict(zip(places, arrived.split(sizes), strict=True))


def _numel(intervals: Sequence[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)
