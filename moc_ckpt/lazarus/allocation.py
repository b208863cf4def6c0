"""How many replicas each expert gets (Lazarus, section 4.1, equation 1). Pure."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from moc_ckpt.errors import ConfigError

__all__ = ["Allocation", "allocate", "layer_text"]

# Sums and ratios of loads stay within a float.
_MAX_LOAD = 1e100


@dataclass(frozen=True, slots=True)
class Allocation:
    """The replicas of one MoE layer.

    Attributes:
        replicas: for each expert its number of slots; their sum is nodes * slots.
        fault_threshold: replicas that every expert has at least. Fewer failed nodes than that lose no expert, if its
            replicas are on different nodes.
        asked: the fault threshold that was asked for.
    """

    replicas: tuple[int, ...]
    fault_threshold: int
    asked: int

    @property
    def note(self) -> str:
        """What a user should know; empty if all was possible."""
        if self.fault_threshold == self.asked:
            return ""
        return (
            f"{sum(self.replicas):,} slots do not hold {self.asked} replicas of {len(self.replicas):,} experts: "
            f"every expert has at least {self.fault_threshold}"
        )


def allocate(
    loads: Sequence[float], nodes: int, slots: int, fault_threshold: int = 1, *, layer: int | None = None
) -> Allocation:
    """Shares out the slots by load (pure, exact integer arithmetic).

    Experts are taken by load, the least loaded first (ties by number). Each gets the share of the remaining slots that
    its load has of the remaining load, rounded down, and at least the fault threshold; the last one gets what is left.
    The remaining slots never fall below threshold * remaining experts: an expert either takes the threshold itself, or
    no more than the mean of what remains, since none of the others has less load.

    Args:
        loads: for each expert the tokens routed to it, any unit; not all of them need be positive. Where all remaining
            loads are zero, slots are shared evenly.
        nodes: N, number of nodes.
        slots: c, slots of each node.
        fault_threshold: f, replicas of each expert at least. If the slots do not suffice the largest threshold that
            is possible is used; `Allocation.note` says so.
        layer: ordinal of the MoE layer, for messages.

    Raises:
        ConfigError: for fewer slots than experts, a threshold above the number of nodes, or a load that is negative,
            1e100 or more, or not a number (it names the expert and the layer).
    """
    where = layer_text(layer)
    sizes = (("nodes", nodes), ("slots", slots), ("fault_threshold", fault_threshold))
    for name, value in sizes:
        if value < 1:
            raise ConfigError(f"{name} is {value}", where=where, fix="give at least 1")
    exact = _exact(loads, layer)
    experts, room = len(exact), nodes * slots
    if not experts:
        raise ConfigError("there are no experts", where=where, fix="give one load for each expert")
    if fault_threshold > nodes:
        raise ConfigError(
            f"a fault threshold of {fault_threshold} needs as many nodes, and there are {nodes}",
            where=where,
            fix=f"use a threshold of at most {nodes}: two replicas on one node are lost together",
        )
    if room < experts:
        raise ConfigError(
            f"{nodes} nodes of {slots} slots have {room} slots for {experts} experts: expert {room} would get none",
            where=where,
            fix=f"use at least {-(-experts // nodes)} slots per node, or {-(-experts // slots)} nodes",
        )
    threshold = min(fault_threshold, room // experts)
    replicas = [0] * experts
    load_left, left = sum(exact), experts
    for expert in sorted(range(experts), key=lambda index: (exact[index], index)):
        share = exact[expert] * room // load_left if load_left else room // left
        replicas[expert] = max(share, threshold)  # the last one's share is all that remains
        room -= replicas[expert]
        load_left -= exact[expert]
        left -= 1
    return Allocation(tuple(replicas), threshold, fault_threshold)


def _exact(loads: Sequence[float], layer: int | None) -> list[int]:
    """Returns integers in the ratio of the loads, exactly."""
    for expert, load in enumerate(loads):
        if not isinstance(load, numbers.Real) or not 0 <= _plain(load) < _MAX_LOAD:
            raise ConfigError(
                f"the load of expert {expert} is {load!r}",
                where=layer_text(layer),
                fix=f"loads are numbers of tokens: finite (below {_MAX_LOAD:g}), and not negative",
            )
    if all(isinstance(load, numbers.Integral) for load in loads):
        return [int(load) for load in loads]
    exact = [Fraction(load) if isinstance(load, int | float | Fraction) else Fraction(float(load)) for load in loads]
    scale = math.lcm(*(item.denominator for item in exact))
    return [item.numerator * (scale // item.denominator) for item in exact]


def _plain(load: numbers.Real) -> float:
    """Returns a Python number: numpy's small ones do not compare with large ones."""
    return int(load) if isinstance(load, numbers.Integral) else float(load)


def layer_text(layer: int | None) -> str:
    """Returns how messages name an MoE layer; empty for None."""
    return "" if layer is None else f"MoE layer {layer}"
