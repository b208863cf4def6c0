"""Which rank writes how many bytes of which expert. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["Ownership"]

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ownership:
    """The bytes that each rank writes of each expert, and those that it writes in every save anyway.

    Experts are counted through all layers: `unit = offsets[layer] + expert`. Immutable; may be shared between threads.

    Attributes:
        experts: number of experts of each MoE layer, by ordinal.
        world: number of ranks.
        unit: [M] unit of each share.
        rank: [M] rank that writes it.
        nbytes: [M] its bytes, above 0; (unit, rank) pairs are distinct and sorted.
        dense: [world] bytes that each rank writes in every save.
    """

    experts: tuple[int, ...]
    world: int
    unit: _Ints
    rank: _Ints
    nbytes: _Ints
    dense: _Ints

    @classmethod
    def from_rows(
        cls,
        experts: Sequence[int],
        world: int,
        rows: Iterable[tuple[int, int, int, int]],
        dense: Sequence[int] | _Ints = (),
    ) -> Ownership:
        """Builds it from shares; shares of one expert on one rank are added up.

        Args:
            experts: number of experts of each MoE layer.
            world: number of ranks.
            rows: (layer, expert, rank, bytes).
            dense: bytes that each rank writes in every save; empty means none.

        Raises:
            ValueError: if a row names a layer, expert or rank that does not exist.
        """
        table = np.array([tuple(row) for row in rows], dtype=np.int64).reshape(-1, 4)
        return cls.from_arrays(experts, world, table[:, 0], table[:, 1], table[:, 2], table[:, 3], dense)

    @classmethod
    def from_arrays(
        cls,
        experts: Sequence[int],
        world: int,
        layer: _Ints,
        expert: _Ints,
        rank: _Ints,
        nbytes: _Ints,
        dense: Sequence[int] | _Ints = (),
    ) -> Ownership:
        """Builds it from columns; arguments and errors as `from_rows`."""
        counts = np.array(experts, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        known = (layer >= 0) & (layer < len(counts)) & (rank >= 0) & (rank < world) & (expert >= 0)
        known &= expert < counts[np.clip(layer, 0, max(len(counts) - 1, 0))] if len(counts) else False
        if not np.all(known):
            bad = int(np.flatnonzero(~known)[0])
            raise ValueError(
                f"layer {layer[bad]}, expert {expert[bad]}, rank {rank[bad]} does not exist: layers have "
                f"{tuple(experts)} experts, the world has {world} ranks"
            )
        everyone = np.zeros(world, dtype=np.int64) if len(dense) == 0 else np.asarray(dense, dtype=np.int64)
        if len(everyone) != world:
            raise ValueError(f"{len(everyone)} dense loads for {world} ranks")
        keys, places = np.unique((offsets[layer] + expert) * world + rank, return_inverse=True)
        sums = np.zeros(len(keys), dtype=np.int64)
        np.add.at(sums, places, nbytes)
        keys, sums = keys[sums > 0], sums[sums > 0]
        return cls(tuple(int(count) for count in counts), world, keys // world, keys % world, sums, everyone)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First unit of each layer, and one past the last unit of all."""
        return tuple(int(value) for value in np.concatenate([[0], np.cumsum(np.array(self.experts, dtype=np.int64))]))

    @cached_property
    def unit_bytes(self) -> _Ints:
        """[units] bytes of each expert over all ranks."""
        return np.bincount(self.unit, weights=self.nbytes, minlength=self.offsets[-1]).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Tells two ownerships apart; equal on all ranks of a job."""
        parts = (np.array(self.experts, dtype=np.int64), self.unit, self.rank, self.nbytes, self.dense)
        return hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=8).hexdigest()

    def owners_beside(self, rank: int) -> dict[tuple[int, int], tuple[int, ...]]:
        """Returns for every (layer, expert) that a rank writes a part of all ranks that do, ascending."""
        mine = set(self.unit[self.rank == rank].tolist())
        found: dict[int, list[int]] = {unit: [] for unit in sorted(mine)}
        for unit, owner in zip(self.unit.tolist(), self.rank.tolist(), strict=True):
            if unit in mine:
                found[unit].append(owner)
        places = [(layer, expert) for layer, count in enumerate(self.experts) for expert in range(count)]
        return {places[unit]: tuple(sorted(ranks)) for unit, ranks in found.items()}

    def loads(self, units: Collection[int]) -> _Ints:
        """Returns the bytes [world] that each rank writes in a save of these units, dense state included."""
        chosen = np.zeros(self.offsets[-1], dtype=bool)
        chosen[list(units)] = True
        mask = chosen[self.unit]
        found = np.bincount(self.rank[mask], weights=self.nbytes[mask], minlength=self.world)
        return self.dense + found.astype(np.int64)
