"""What one rank writes for one checkpoint, and where in its packs it lies. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moc_ckpt.state.fragment import Fragment
from moc_ckpt.state.unit import parse_expert_unit

__all__ = ["DENSE", "EXPERTS", "PackPlan", "PlannedFragment", "SavePlan", "plan_save"]

DENSE = "dense"
EXPERTS = "experts"

# Fragments begin at multiples of it, so that any dtype can be viewed in place.
_ALIGNMENT = 64


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


def plan_save(items: Sequence[tuple[Fragment, str]]) -> SavePlan:
    """Lays out fragments in packs: units together, dense and expert units apart.

    Args:
        items: the fragments that this rank writes, each with its unit.

    Returns:
        The plan; packs without bytes are left out.
    """
    dense: dict[str, list[int]] = {}
    experts: dict[tuple[int, int], list[int]] = {}
    for index, (_, unit) in enumerate(items):
        expert = parse_expert_unit(unit)
        if expert is None:
            dense.setdefault(unit, []).append(index)
        else:
            experts.setdefault(expert, []).append(index)
    packs = (
        _lay_out(DENSE, items, (index for indices in dense.values() for index in indices)),
        _lay_out(EXPERTS, items, (index for expert in sorted(experts) for index in experts[expert])),
    )
    return SavePlan(tuple(pack for pack in packs if pack.nbytes))


def _lay_out(name: str, items: Sequence[tuple[Fragment, str]], order: Iterable[int]) -> PackPlan:
    offset = 0
    placed: list[PlannedFragment] = []
    for index in order:
        fragment, unit = items[index]
        placed.append(PlannedFragment(index, fragment, unit, offset))
        offset += -(-fragment.nbytes // _ALIGNMENT) * _ALIGNMENT
    return PackPlan(name, offset, tuple(placed))
