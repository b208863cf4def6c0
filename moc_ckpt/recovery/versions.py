"""Which checkpoint of a damaged directory to restore, and which version of each expert (DESIGN section 11). Pure.

Damage is known by pack and unit: what reading found. An expert with any damaged piece is not whole in that version and
goes back to its newest older one, as a whole (invariant I3); a checkpoint with damaged dense state is passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moc_ckpt.state.fragment import MASTER, WEIGHT
from moc_ckpt.state.unit import MoELayer, Version, parse_expert_unit
from moc_ckpt.storage.attempts import Ancestry, admissible
from moc_ckpt.storage.manifest import Manifest

__all__ = ["Holding", "StoredCheckpoint", "UnitSource", "VersionPlan", "plan_versions", "stored_checkpoint"]


class Holding(NamedTuple):
    """What a checkpoint has of one unit.

    Attributes:
        version: where its bytes are from.
        packs: paths of the packs that they lie in.
        tokens: what it had learnt by then; None if nobody counted, or it is dense.
        content: what it consists of; versions that differ in this cannot stand for each other.
    """

    version: Version
    packs: frozenset[str]
    tokens: int | None = None
    content: Hashable = None


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint as far as the choice of versions goes.

    Attributes:
        tag: its name.
        version: version of its dense state.
        created: time of the commit.
        units: every unit by name.
        learnt: tokens that each expert unit had learnt at its step; absent where nobody counted.
        layers: the MoE layers, which give the expert units their meaning.
    """

    tag: str
    version: Version
    created: float
    units: Mapping[str, Holding]
    learnt: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[MoELayer, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitSource:
    """Where one expert is restored from.

    Attributes:
        unit: its name.
        tag: the checkpoint whose manifest says where its bytes are.
        version: the version that is restored.
        wanted: the version that the restored checkpoint itself names.
        lost: tokens lost against the step of the restored checkpoint.
    """

    unit: str
    tag: str
    version: Version
    wanted: Version
    lost: int


@dataclass(frozen=True, slots=True)
class VersionPlan:
    """What to restore.

    Attributes:
        tag: the checkpoint that dense state and all small state come from.
        version: its version t.
        sources: one per expert unit that has a whole version, by name.
        hopeless: expert units of which no whole version is left; not empty: nothing can be restored.
        passed_over: newer checkpoints that cannot be restored, the newest first.
    """

    tag: str
    version: Version
    sources: Mapping[str, UnitSource]
    hopeless: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def replaced(self) -> tuple[UnitSource, ...]:
        """The experts that another checkpoint's manifest says the place of."""
        return tuple(source for source in self.sources.values() if source.tag != self.tag)


def stored_checkpoint(manifest: Manifest) -> StoredCheckpoint:
    """Returns what the choice of versions needs of a manifest."""
    packs: list[set[str]] = [set() for _ in manifest.units]
    content: list[set[tuple[str, str, str, tuple[int, ...]]]] = [set() for _ in manifest.units]
    masters = {tensor.fqn for tensor in manifest.tensors if tensor.kind == MASTER}
    for row in manifest.fragments:
        tensor = manifest.tensors[row.tensor]
        packs[row.unit].add(manifest.packs[row.pack].path)
        # Weights beside a master are stored only where they cannot be derived, which changes with the step.
        if tensor.kind != WEIGHT or tensor.fqn not in masters:
            content[row.unit].add((tensor.fqn, tensor.kind, tensor.dtype, tuple(tensor.shape)))
    units = {
        unit.name: Holding(unit.version, frozenset(packs[index]), unit.tokens, frozenset(content[index]))
        for index, unit in enumerate(manifest.units)
    }
    return StoredCheckpoint(
        manifest.tag, manifest.version, manifest.created, units, _learnt(manifest, units), manifest.layers
    )


def _learnt(manifest: Manifest, units: Mapping[str, Holding]) -> dict[str, int]:
    ledger = manifest.ledger or {}
    processed, lost = ledger.get("processed"), ledger.get("lost")
    found: dict[str, int] = {}
    if not (isinstance(processed, list) and isinstance(lost, list)):
        return found
    for name in units:
        place = parse_expert_unit(name)
        if place is None:
            continue
        try:
            found[name] = int(processed[place[0]][place[1]]) - int(lost[place[0]][place[1]])
        except (IndexError, TypeError, ValueError):  # a ledger that cannot be read says nothing; the load will tell
            return {}
    return found


def plan_versions(
    checkpoints: Sequence[StoredCheckpoint],
    *,
    damaged: Collection[tuple[str, str]] = (),
    unusable: Collection[str] = (),
    line: Ancestry | None = None,
    tag: str | None = None,
    at_most: Version | None = None,
    prefer: str | None = None,
) -> VersionPlan | None:
    """Chooses the checkpoint and the version of every expert.

    Args:
        checkpoints: those of the directory that can be read.
        damaged: (pack, unit) of what cannot be read.
        unusable: tags that cannot be the target for other reasons (small state that is damaged); their experts are
            as good as others'.
        line: the timeline (`storage.attempts.ancestry`); None: every version belongs to it.
        tag: exactly this checkpoint; None: the newest of the timeline whose dense state is whole.
        at_most: without a tag, checkpoints after this version do not count.
        prefer: of several checkpoints of one version, this one.

    Returns:
        The plan; None if no checkpoint qualifies.
    """
    bad = set(damaged)

    def whole(unit: str, holding: Holding) -> bool:
        return not any((pack, unit) in bad for pack in holding.packs)

    def belongs(version: Version) -> bool:
        return line is None or admissible(version, line)

    def loadable(item: StoredCheckpoint) -> bool:
        return item.tag not in unusable and all(
            whole(unit, holding) for unit, holding in item.units.items() if parse_expert_unit(unit) is None
        )

    if tag is not None:
        candidates = [item for item in checkpoints if item.tag == tag]
    else:
        candidates = [
            item for item in checkpoints if belongs(item.version) and (at_most is None or item.version <= at_most)
        ]
        candidates.sort(key=lambda item: (item.version, item.tag == prefer, item.created), reverse=True)
    position = next((index for index, item in enumerate(candidates) if loadable(item)), None)
    if position is None:
        return None
    target = candidates[position]
    sources: dict[str, UnitSource] = {}
    hopeless: list[str] = []
    # The target's own bytes where versions tie, so that nothing is moved without need.
    others = [target] + [item for item in checkpoints if item is not target and item.layers == target.layers]
    for unit, wanted in target.units.items():
        if parse_expert_unit(unit) is None:
            continue
        best: tuple[Version, StoredCheckpoint] | None = None
        for item in others:
            holding = item.units.get(unit)
            if holding is None or holding.content != wanted.content or not whole(unit, holding):
                continue
            # What the target itself names was admissible when it was committed.
            known = holding.version == wanted.version or belongs(holding.version)
            if not known or not _not_after(holding.version, target.version):
                continue
            if best is None or holding.version > best[0]:
                best = (holding.version, item)
        if best is None:
            hopeless.append(unit)
        else:
            lost = _lost(target, unit, best[1].units[unit])
            sources[unit] = UnitSource(unit, best[1].tag, best[0], wanted.version, lost)
    passed = tuple(item.tag for item in candidates[:position])
    return VersionPlan(target.tag, target.version, sources, tuple(hopeless), passed)


def _not_after(version: Version, target: Version) -> bool:
    return version <= target and version.step <= target.step


def _lost(target: StoredCheckpoint, unit: str, holding: Holding) -> int:
    """C(t) - C(v): what the expert had learnt at the target's step, less what the restored version had."""
    if holding.version == target.version or unit not in target.learnt:
        return 0
    # A version without a count is from before counting began.
    return max(target.learnt[unit] - (holding.tokens or 0), 0)
