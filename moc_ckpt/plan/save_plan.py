"""What one rank writes for one checkpoint, and where in its packs it lies. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moc_ckpt.state.fragment import MASTER, Fragment
from moc_ckpt.state.unit import parse_expert_unit

__all__ = ["DENSE", "EXPERTS", "PackPlan", "PlannedFragment", "SavePlan", "lay_out", "plan_save"]

DENSE = "dense"
EXPERTS = "experts"

# Fragments begin at multiples of it, so that any dtype can be viewed in place.
_ALIGNMENT = 64
# Expert units begin at multiples of it, in their pack as in the arena: slots are then written as they are.
_UNIT_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class PlannedFragment:
    """A fragment with its place in a pack.

    Attributes:
        index: position in the sequence that was given to `plan_save`.
        fragment: the address.
        unit: the unit it belongs to.
        offset: first byte in the pack.
    """

    index: int
    fragment: Fragment
    unit: str
    offset: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """One pack: fragments at ascending offsets.

    Attributes:
        name: `dense` or `experts`.
        nbytes: size of the pack's array in bytes, alignment gaps included.
        fragments: in order of offset.
    """

    name: str
    nbytes: int
    fragments: tuple[PlannedFragment, ...]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What one rank writes: at most one dense and one expert pack."""

    packs: tuple[PackPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all fragments, without gaps."""
        return sum(item.fragment.nbytes for pack in self.packs for item in pack.fragments)


def lay_out(items: Sequence[Fragment]) -> tuple[list[int], int]:
    """Places the fragments of one expert unit, or all dense ones of a rank: in a pack and in a slot alike.

    Fragments of one kind are neighbours, masters first, in the order given: what is contiguous in a flat partition of
    the optimizer stays so (up to alignment) and is copied in one piece.

    Args:
        items: the fragments.

    Returns:
        The first byte of each fragment (a multiple of 64), in the order given, and the bytes that all take.
    """
    offsets = [0] * len(items)
    end = 0
    for index in sorted(range(len(items)), key=lambda index: (items[index].kind != MASTER, items[index].kind)):
        offsets[index] = end
        end = _up(end + items[index].nbytes, _ALIGNMENT)
    return offsets, end


def plan_save(items: Sequence[tuple[Fragment, str]]) -> SavePlan:
    """Lays out fragments in packs: dense and expert units apart, expert units one after the other (`lay_out`).

    Args:
        items: the fragments that this rank writes, each with its unit.

    Returns:
        The plan; packs without bytes are left out.
    """
    dense: list[int] = []
    experts: dict[tuple[int, int], list[int]] = {}
    for index, (_, unit) in enumerate(items):
        expert = parse_expert_unit(unit)
        (dense if expert is None else experts.setdefault(expert, [])).append(index)
    packs = (
        _pack(DENSE, items, [dense]),
        _pack(EXPERTS, items, (experts[expert] for expert in sorted(experts))),
    )
    return SavePlan(tuple(pack for pack in packs if pack.nbytes))


def _pack(name: str, items: Sequence[tuple[Fragment, str]], groups: Iterable[Sequence[int]]) -> PackPlan:
    """Lays out groups of fragments one after the other, each from a multiple of 4096 bytes on."""
    placed: list[PlannedFragment] = []
    end = 0
    for group in groups:
        begin = _up(end, _UNIT_ALIGNMENT)
        offsets, nbytes = lay_out([items[index][0] for index in group])
        found = [
            PlannedFragment(index, *items[index], begin + offset) for index, offset in zip(group, offsets, strict=True)
        ]
        # Empty fragments share their place with the next one.
        placed += sorted(found, key=lambda item: (item.offset, item.fragment.nbytes))
        end = begin + nbytes
    return PackPlan(name, end, tuple(placed))


def _up(count: int, grain: int) -> int:
    return -(-count // grain) * grain
