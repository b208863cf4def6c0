"""Units: what PEC selects and recovery versions (DESIGN section 2). Pure: no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["EXPERTS_MARK", "MoELayer", "UnitMap", "Version", "dense_unit", "expert_unit", "parse_expert_unit"]

EXPERTS_MARK = ".deepspeed_moe.experts.deepspeed_experts."
_EXPERT_UNIT = re.compile(r"^expert/(\d+)/(\d+)$")


class Version(NamedTuple):
    """Where a unit's bytes are from: the attempt that produced them and its step (engine.global_steps)."""

    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer.

    Attributes:
        ordinal: position among MoE layers in named_modules order, from 0.
        prefix: name of its MoE module (`deepspeed.moe.layer.MoE`) from the module root.
        num_experts: experts in the layer over all ranks.
    """

    ordinal: int
    prefix: str
    num_experts: int


@lru_cache(maxsize=1 << 16)
def expert_unit(layer: int, expert: int) -> str:
    """Returns the unit name of one expert of one MoE layer (both counted from 0; the expert id is global)."""
    return f"expert/{layer}/{expert}"


def dense_unit(fqn: str) -> str:
    """Returns the unit name of a dense tensor: its owning leaf module (`dense/` plus the module's path)."""
    return f"dense/{fqn.rpartition('.')[0]}"


def parse_expert_unit(unit: str) -> tuple[int, int] | None:
    """Returns (layer, expert) of an expert unit, None for a dense one."""
    match = _EXPERT_UNIT.match(unit)
    return (int(match[1]), int(match[2])) if match else None


class UnitMap:
    """Maps fully qualified names (with global expert ids) to units.

    Args:
        layers: the model's MoE layers.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers = tuple(layers)
        self._by_prefix = {layer.prefix: layer.ordinal for layer in self.layers}

    def unit_of(self, fqn: str) -> str:
        """Returns the unit that owns the tensor `fqn`.

        Raises:
            ValueError: if the name is an expert's but its layer is not known.
        """
        prefix, mark, rest = fqn.partition(EXPERTS_MARK)
        if not mark:
            return dense_unit(fqn)
        if prefix not in self._by_prefix:
            raise ValueError(f"{fqn} lies in an MoE layer that is not known: {prefix}")
        return expert_unit(self._by_prefix[prefix], int(rest.partition(".")[0]))
