"""Which ranks share an expert: DeepSpeed's expert-parallel groups, from sizes alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import ConfigError

__all__ = ["ParallelLayout"]

_Index = TypeVar("_Index", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The ranks of a job, all of them data parallel, and how they are grouped for an expert-parallel size.

    With EP ranks to one set of experts, each rank has an EP position, which says which experts it holds, and a replica
    index, which counts the ranks of that position (its expert-data-parallel group) in ascending order.
    Follows `_create_expert_and_data_parallel` in deepspeed/utils/groups.py. Methods take one index or an array of them.

    Attributes:
        world: number of ranks.
        data_before_expert: DeepSpeed's `use_data_before_expert_parallelism`: the replicas of an expert are neighbours,
            instead of the ranks of one set of experts.

    Raises:
        ConfigError: if there is no rank.
    """

    world: int
    data_before_expert: bool = False

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ConfigError(f"a world of {self.world} ranks", fix="there must be at least 1 rank")

    def replicas(self, ep: int) -> int:
        """Returns the number of ranks that hold the same expert, for an expert-parallel size.

        Raises:
            ConfigError: if the world is not a multiple of `ep`.
        """
        if ep < 1 or self.world % ep:
            raise ConfigError(
                f"expert-parallel size {ep} does not divide the world of {self.world} ranks",
                fix="choose an expert-parallel size that divides the number of ranks",
            )
        return self.world // ep

    def expert_position(self, ep: int, rank: _Index) -> _Index:
        """Returns the EP position of a global rank: it holds the experts [position * local, (position + 1) * local)."""
        return rank // self.replicas(ep) if self.data_before_expert else rank % ep

    def replica_index(self, ep: int, rank: _Index) -> _Index:
        """Returns the place of a global rank among the ranks of its EP position."""
        return rank % self.replicas(ep) if self.data_before_expert else rank // ep

    def rank_of(self, ep: int, position: _Index, replica: _Index) -> _Index:
        """Returns the global rank at an EP position and replica index; ascending in the latter."""
        return position * self.replicas(ep) + replica if self.data_before_expert else replica * ep + position

    def expert_replicas(self, ep: int, position: int) -> tuple[int, ...]:
        """Returns the ranks that hold the experts of an EP position (its expert-data-parallel group), ascending.

        Raises:
            ConfigError: if the world is not a multiple of `ep`, or there is no such position.
        """
        count = self.replicas(ep)
        if not 0 <= position < ep:
            raise ConfigError(f"EP position {position} does not exist: the expert-parallel size is {ep}")
        return tuple(self.rank_of(ep, position, replica) for replica in range(count))
