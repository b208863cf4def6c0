"""Older checkpoints of a directory as a source of the experts that a save does not take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moc_ckpt.errors import StorageError
from moc_ckpt.state.fragment import MASTER, WEIGHT, TensorKey
from moc_ckpt.state.unit import MoELayer, UnitMap, Version, parse_expert_unit
from moc_ckpt.storage.attempts import admissible, ancestry
from moc_ckpt.storage.checkpoint import list_checkpoints, load_manifest
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store

__all__ = ["Base", "UnitTensors", "choose_versions", "find_base", "open_base", "unit_tensors"]

_CHECKS_AT_ONCE = 8
_NONE = Version(-1, -1)

UnitTensors = Mapping[tuple[str, str], tuple[str, tuple[int, ...]]]
"""What a unit consists of: (fqn, state kind) -> dtype and shape."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a save into a directory can build on.

    Attributes:
        manifests: older checkpoints that hold the experts that are not to be saved anew.
        forced: (layer, expert) of those that must be (invariant I5): the directory has no admissible version of them,
            its bytes are gone, or the expert consists of other tensors now.
        stored: (layer, expert) -> step of the version that the directory has of the others.
        forgone: experts among them of which the directory has an admissible version that cannot be used, by reason.
    """

    manifests: tuple[Manifest, ...]
    forced: frozenset[tuple[int, int]]
    stored: Mapping[tuple[int, int], int]
    forgone: Mapping[str, tuple[str, ...]]


def unit_tensors(
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]], layers: Sequence[MoELayer]
) -> dict[str, dict[tuple[str, str], tuple[str, tuple[int, ...]]]]:
    """Groups tensors by expert unit; dense ones are left out.

    Args:
        declared: dtype and shape of every logical tensor.
        layers: the MoE layers.
    """
    units = UnitMap(layers)
    found: dict[str, dict[tuple[str, str], tuple[str, tuple[int, ...]]]] = {}
    for key, (dtype, shape) in declared.items():
        unit = units.unit_of(key.fqn)
        if parse_expert_unit(unit) is not None:
            found.setdefault(unit, {})[key.fqn, key.kind] = (dtype, tuple(shape))
    return found


def find_base(
    store: Store, missing: Iterable[str], step: int, line: Sequence[tuple[int, int | None]]
) -> list[Manifest]:
    """Returns older checkpoints, newest commit first, until every missing expert was seen in one.

    Versions of an expert only grow along a timeline, so the newest commit that has an admissible one has the best.

    Args:
        store: the checkpoint root.
        missing: names of expert units.
        step: versions after it do not count.
        line: the timeline (`ancestry`).
    """
    base: list[Manifest] = []
    left = set(missing)
    if not left:
        return base
    for summary in list_checkpoints(store):
        if summary.error:
            continue
        manifest = load_manifest(store, summary.tag)
        found = {
            unit.name
            for unit in manifest.units
            if unit.name in left and unit.step <= step and admissible(unit.version, line)
        }
        if found:
            base.append(manifest)
            left -= found
        if not left:
            break
    return base


def choose_versions(
    missing: Collection[str], base: Sequence[Manifest], step: int, is_admissible: Callable[[Version], bool]
) -> list[tuple[Manifest, set[str]]]:
    """Returns for each older manifest the experts to take from it: those that it has the newest version of.

    Args:
        missing: names of expert units.
        base: older checkpoints.
        step: versions after it do not count.
        is_admissible: tells whether a version belongs to the current timeline.
    """
    best: dict[str, tuple[Version, int]] = {}
    for position, manifest in enumerate(base):
        for unit in manifest.units:
            if unit.name not in missing or unit.step > step or not is_admissible(unit.version):
                continue
            if unit.name not in best or unit.version > best[unit.name][0]:
                best[unit.name] = (unit.version, position)
    groups: dict[int, set[str]] = {}
    for name, (_, position) in best.items():
        groups.setdefault(position, set()).add(name)
    return [(base[position], names) for position, names in sorted(groups.items())]


def open_base(
    store: Store,
    *,
    attempt: int,
    step: int,
    layers: Sequence[MoELayer],
    required: Mapping[str, UnitTensors],
    known: Collection[Manifest] = (),
    spoilt: Mapping[str, Version] | None = None,
) -> Base:
    """Finds what a save can leave to older checkpoints, and what it cannot (invariant I5).

    Args:
        store: the checkpoint root.
        attempt: the attempt that saves.
        step: its step.
        layers: the model's MoE layers.
        required: what every expert unit must consist of now (`unit_tensors`).
        known: checkpoints that this attempt committed here, which saves reading them again.
        spoilt: by expert unit, a version that a restore found damaged, which the files' sizes do not show. As long as
            the directory has nothing newer, the expert is saved anew: what is left of it is older than it could be.

    Raises:
        StorageError: if the directory cannot be read.
    """
    line = ancestry(store, attempt)
    manifests = [item for item in known if admissible(item.version, line) and item.step <= step]
    if not manifests:
        manifests = find_base(store, required, step, line)
    if any(manifest.layers != tuple(layers) for manifest in manifests):
        # Units are known by the number of their layer, so those of another model mean other experts.
        names = tuple(sorted(required))
        return Base((), _places(names), {}, {"the older checkpoints are of other MoE layers": names})
    chosen = choose_versions(required, manifests, step, lambda version: admissible(version, line))
    lost = _lost_packs(store, manifests)
    changed: list[str] = []
    gone: list[str] = []
    older: list[str] = []
    for manifest, own in chosen:
        older += sorted(
            unit.name
            for unit in manifest.units
            if unit.name in own and unit.version <= (spoilt or {}).get(unit.name, _NONE)
        )
        stored = unit_tensors(manifest.declared(), layers)
        changed += sorted(name for name in own if not _alike(stored.get(name, {}), required[name]))
        gone += sorted(
            {manifest.units[row.unit].name for row in manifest.fragments if manifest.packs[row.pack].path in lost} & own
        )
    unusable = {*changed, *gone, *older}
    stored_somewhere = set().union(*(own for _, own in chosen))
    forced = {name for name in required if name not in stored_somewhere or name in unusable}
    reasons = {
        "their packs are gone or damaged": tuple(gone),
        "they consist of other tensors now": tuple(name for name in changed if name not in set(gone)),
        "their newest version was found damaged": tuple(name for name in older if name not in {*gone, *changed}),
    }
    steps = {
        place: unit.step
        for manifest, own in chosen
        for unit in manifest.units
        if unit.name in own and unit.name not in forced and (place := parse_expert_unit(unit.name)) is not None
    }
    return Base(tuple(manifests), _places(forced), steps, {reason: names for reason, names in reasons.items() if names})


def _places(units: Iterable[str]) -> frozenset[tuple[int, int]]:
    return frozenset(place for place in map(parse_expert_unit, units) if place is not None)


def _alike(stored: UnitTensors, required: UnitTensors) -> bool:
    """Tells whether a stored version of a unit can stand for the present one.

    Weights beside a master are stored while they cannot be derived from it: one too many does no harm.
    """
    if any(stored.get(name) != spec for name, spec in required.items()):
        return False
    return all(name in required or (name[1] == WEIGHT and (name[0], MASTER) in stored) for name in stored)


def _lost_packs(store: Store, manifests: Iterable[Manifest]) -> set[str]:
    """Returns the packs with expert state that are missing or have the wrong size."""
    packs = {
        manifest.packs[row.pack].path: manifest.packs[row.pack].nbytes
        for manifest in manifests
        for row in manifest.fragments
        if parse_expert_unit(manifest.units[row.unit].name) is not None
    }

    def lost(item: tuple[str, int]) -> bool:
        try:
            PackReader(store, *item).check()
        except StorageError:
            return True
        return False

    with ThreadPoolExecutor(_CHECKS_AT_ONCE, thread_name_prefix="moc-base") as workers:
        return {
            path for (path, _), missing in zip(packs.items(), workers.map(lost, packs.items()), strict=True) if missing
        }
