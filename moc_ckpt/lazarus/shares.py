"""How replicas of an expert share its tokens, where equal shares would leave ranks with unequal work. Pure."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.types import Placement

__all__ = ["Shares", "check_shares", "even_shares", "slot_shares"]

#: For each place the weight of each expert; a place works on its weight's part of an expert's tokens.
Shares = tuple[tuple[int, ...], ...]

# What the weights of one expert add up to, about.
_WHOLE = 1 << 16
# What they may add up to: the dispatcher multiplies them with numbers of tokens, in 64 bits.
_MOST = 1 << 31


def slot_shares(placement: Placement) -> Shares:
    """Returns one share per slot, as in the paper."""
    return tuple(tuple(slots.count(expert) for expert in range(placement.num_experts)) for slots in placement.slots)


def even_shares(loads: Sequence[float], placement: Placement, *, sweeps: int = 200, tolerance: float = 1e-3) -> Shares:
    """Returns shares with which all places get as nearly the same work as the placement allows.

    With one share per slot a place's work is whatever its slots happen to add up to: a placement that survives the most
    failures puts the busiest experts together, and their slots need not have the load of others. The tokens of an
    expert may be shared in any way, though, so its busiest places can leave tokens to its idlest ones. Minimises the
    sum of the squares of the places' loads, and thereby the largest one, by pouring each expert's load onto the lowest
    of its places in turn until nothing moves any more. No expert moves, so survival is that of the placement.

    Args:
        loads: for each expert the tokens routed to it, any unit.
        placement: where replicas are. Only which places have an expert counts, and the slots where there is no load.
        sweeps: over all experts at most.
        tolerance: ends when a sweep moves less than this part of a place's mean load anywhere.

    Raises:
        ConfigError: if there is not one load for each expert, or a load is negative or not finite.
    """
    if len(loads) != placement.num_experts or any(not 0 <= load < math.inf for load in loads):
        raise ConfigError(
            f"{len(loads)} loads, the smallest {min(loads, default=0)}, for {placement.num_experts} experts",
            fix="give one finite load of 0 or more for each expert",
        )
    places = len(placement.slots)
    table = [list(row) for row in slot_shares(placement)]
    holders = [placement.holders(expert) for expert in range(placement.num_experts)]
    poured: list[dict[int, float]] = []
    level = [0.0] * places
    for expert, load in enumerate(loads):
        slots = sum(table[place][expert] for place in holders[expert])
        poured.append({place: load * table[place][expert] / slots for place in holders[expert]})
        for place, part in poured[expert].items():
            level[place] += part
    # Experts in few places have no choice; those in many fill the gaps, so they come last.
    order = [expert for expert in sorted(range(len(loads)), key=lambda e: (len(holders[e]), e)) if loads[expert]]
    for _ in range(sweeps):
        moved = 0.0
        for expert in order:
            old = poured[expert]
            base = {place: level[place] - part for place, part in old.items()}
            new = _poured(loads[expert], base)
            for place, part in new.items():
                moved = max(moved, abs(part - old[place]))
                level[place] = base[place] + part
            poured[expert] = new
        if moved <= tolerance * sum(loads) / max(1, places):
            break
    for expert in order:
        weights = {place: round(_WHOLE * part / loads[expert]) for place, part in poured[expert].items()}
        # A load that vanishes beside the others' is lost in rounding; where it goes does not matter.
        if any(weights.values()):
            for place, weight in weights.items():
                table[place][expert] = weight
    return tuple(tuple(row) for row in table)


def check_shares(shares: Shares, placement: Placement, *, where: str = "") -> None:
    """Refuses shares that do not fit a placement.

    Args:
        shares: one row per place, one weight per expert.
        placement: where replicas are.
        where: the layer, for messages.

    Raises:
        ConfigError: another number of places or experts, a weight of an expert that the place lacks, one that is
            negative or no whole number, or an expert without any or with too large ones.
    """
    if [len(row) for row in shares] != [placement.num_experts] * len(placement.slots):
        raise ConfigError(
            f"shares are not a table of {len(placement.slots)} places by {placement.num_experts} experts",
            where=where,
            fix="compute them for this placement",
        )
    for expert in range(placement.num_experts):
        weights = [row[expert] for row in shares]
        holders = placement.holders(expert)
        wrong = [
            place
            for place, weight in enumerate(weights)
            if not isinstance(weight, numbers.Integral) or weight < 0 or (weight and place not in holders)
        ]
        if wrong or not 0 < sum(weights) <= _MOST:
            what = f"place {wrong[0]} cannot have {weights[wrong[0]]}" if wrong else f"all places have {sum(weights)}"
            raise ConfigError(f"shares of expert {expert}: {what}", where=where, fix="compute them for this placement")


def _poured(amount: float, base: dict[int, float]) -> dict[int, float]:
    """Returns what each place gets if an amount is poured onto levels as water: the lowest ones are filled first."""
    levels = sorted(base.values())
    surface, below = 0.0, 0.0
    for number, level in enumerate(levels, start=1):
        below += level
        surface = (amount + below) / number
        if number == len(levels) or surface <= levels[number]:
            break
    return {place: max(0.0, surface - level) for place, level in base.items()}
