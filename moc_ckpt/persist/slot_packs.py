"""From slots of an arena to packs: where the bytes of each slot go, and where they are in the file. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moc_ckpt.plan.save_plan import PackPlan, PlannedFragment
from moc_ckpt.state.fragment import Fragment

__all__ = ["SlotUnit", "plan_pack"]

# Expert units begin at multiples of it in their pack, as in the arena, so that slots are written as they are.
_GRAIN = 4096


@dataclass(frozen=True, slots=True)
class SlotUnit:
    """What one slot holds.

    Attributes:
        fragments: its fragments, each with the unit that it belongs to.
        offsets: first byte of each in the slot.
        nbytes: bytes of the slot's content.
        extents: (first byte in the arena file, bytes) that it lies in, in order.
    """

    fragments: Sequence[tuple[str, Fragment]]
    offsets: Sequence[int]
    nbytes: int
    extents: Sequence[tuple[int, int]]


def plan_pack(name: str, units: Iterable[SlotUnit]) -> tuple[PackPlan, list[tuple[int, int, int]]]:
    """Lays slots one after the other into a pack.

    Args:
        name: `dense` or `experts`.
        units: what the slots hold.

    Returns:
        The pack, and its spans: (offset in the pack, offset in the arena file, bytes).
    """
    at = end = 0
    fragments: list[PlannedFragment] = []
    spans: list[tuple[int, int, int]] = []
    for item in units:
        for (unit, fragment), offset in zip(item.fragments, item.offsets, strict=True):
            fragments.append(PlannedFragment(len(fragments), fragment, unit, at + offset))
        left, inside = item.nbytes, at
        for offset, room in item.extents:
            count = min(left, room)
            spans.append((inside, offset, count))
            left, inside = left - count, inside + count
        end = at + item.nbytes
        at += -(-item.nbytes // _GRAIN) * _GRAIN
    fragments.sort(key=lambda item: item.offset)
    return PackPlan(name, end, tuple(fragments)), spans
