"""`selection: sequential`: every expert of a layer once per cycle, in an order that balances the ranks. Pure.

MoC-System section 3.2 rotates a window over the experts of each layer. Here the order of each layer comes from
`plan_cycle`, which knows who owns what; the windows of a cycle are a permutation of the layer's experts, and how far
a layer has come in it is its cursor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moc_ckpt.errors import FormatError
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.schedule import CyclePlan, plan_cycle

__all__ = ["Experts", "Rotation", "advance"]

Experts = tuple[tuple[int, ...], ...]
"""Experts of each MoE layer, ascending."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where each layer is in its cycle.

    Attributes:
        k: K of each layer that the windows were made for.
        ownership: digest of the ownership that they were made for.
        turns: how often the rotation advanced.
        ahead: per layer, the windows still to come in its present cycle; none between cycles.
    """

    k: tuple[int, ...] = ()
    ownership: str = ""
    turns: int = 0
    ahead: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Returns plain data for a manifest."""
        ahead = [[list(window) for window in windows] for windows in self.ahead]
        return {"k": list(self.k), "ownership": self.ownership, "turns": self.turns, "ahead": ahead}

    @classmethod
    def from_data(cls, data: Mapping[str, Any], experts: Sequence[int]) -> Rotation:
        """Reads what `to_data` returned.

        Args:
            data: the plain data.
            experts: number of experts of each MoE layer.

        Raises:
            FormatError: if it is not a rotation of such layers.
        """
        try:
            ahead = tuple(
                tuple(tuple(int(expert) for expert in window) for window in windows) for windows in data["ahead"]
            )
            found = cls(tuple(map(int, data["k"])), str(data["ownership"]), int(data["turns"]), ahead)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"the rotation of the checkpoint cannot be read: {type(error).__name__}: {error}",
                where="manifest.json, ledger.rotation",
            ) from error
        listed = [sorted(expert for window in windows for expert in window) for windows in ahead]
        fits = len(ahead) in (0, len(experts)) and all(
            len(set(pending)) == len(pending) and (not pending or 0 <= pending[0] <= pending[-1] < count)
            for pending, count in zip(listed, experts, strict=False)
        )
        if not fits:
            raise FormatError(
                f"the rotation of the checkpoint names experts that layers of {tuple(experts)} experts do not have",
                where="manifest.json, ledger.rotation",
            )
        return found


def advance(rotation: Rotation, ownership: Ownership, k: Sequence[int]) -> tuple[Experts, Rotation]:
    """Returns the experts of the next save and the rotation after it.

    As long as K and the ownership stay, every expert is selected once in every cycle of its layer, at the same place.
    When one of them changes, each layer first ends the cycle that it is in, so nobody waits longer than the rest of
    the old cycle at the new K.

    Args:
        rotation: the state before.
        ownership: who writes what.
        k: K of each layer, from 1 to its number of experts.
    """
    wanted, layers = tuple(k), len(ownership.experts)
    ahead = rotation.ahead or ((),) * layers
    if (rotation.k, rotation.ownership) != (wanted, ownership.digest):
        # A layer that is saved whole has no cycle to end.
        pending = tuple(
            tuple(sorted(expert for window in windows for expert in window)) if limit < count else ()
            for windows, limit, count in zip(ahead, wanted, ownership.experts, strict=True)
        )
        ahead = plan_cycle(ownership, wanted, pending).windows if any(pending) else ((),) * layers
    if not all(ahead):
        full = _full_cycle(ownership, wanted).windows
        # By the number of the turn, not from the front: layers that come in later meet the others as planned.
        ahead = tuple(
            windows or tuple(whole[(rotation.turns + step) % len(whole)] for step in range(len(whole)))
            for windows, whole in zip(ahead, full, strict=True)
        )
    selected = tuple(windows[0] for windows in ahead)
    rest = tuple(windows[1:] for windows in ahead)
    return selected, Rotation(wanted, ownership.digest, rotation.turns + 1, rest)


@lru_cache(maxsize=8)
def _full_cycle(ownership: Ownership, k: tuple[int, ...]) -> CyclePlan:
    return plan_cycle(ownership, k)
