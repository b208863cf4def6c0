"""What the planning and the training half of this room share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moc_ckpt.errors import MocError


@dataclass(frozen=True)
class Placement:
    """Which experts of one MoE layer each place holds. A place is a node while planning, and a rank while training.

    Attributes:
        num_experts: E, of the layer.
        slots: for each place the expert in each of its slots, ascending. A place may give several slots to one expert;
            it then has one copy of it and takes that many shares of its tokens.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for place, experts in enumerate(self.slots):
            for expert in experts:
                if not 0 <= expert < self.num_experts:
                    raise MocError(
                        f"a slot is given to expert {expert}, which the layer does not have",
                        where=f"place {place} of {len(self.slots)}",
                        fix=f"use experts 0 to {self.num_experts - 1}",
                    )
        object.__setattr__(self, "slots", tuple(tuple(sorted(experts)) for experts in self.slots))

    def distinct(self, place: int) -> tuple[int, ...]:
        """Returns the experts of which a place has a copy, ascending."""
        return tuple(sorted(set(self.slots[place])))

    def replicas(self) -> tuple[int, ...]:
        """Returns the number of slots of every expert."""
        counted = Counter(expert for experts in self.slots for expert in experts)
        return tuple(counted[expert] for expert in range(self.num_experts))

    def holders(self, expert: int) -> tuple[int, ...]:
        """Returns the places that have a copy of an expert, ascending."""
        return tuple(place for place, experts in enumerate(self.slots) if expert in experts)
