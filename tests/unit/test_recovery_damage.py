"""What a restore tells about damage, manifests with older experts in them, and saves after such a restore."""

from __future__ import annotations

from pathlib import Path

import pytest
from storage_samples import DENSE, flip, make_store, save, tensor_values, write_rank

from moc_ckpt.errors import CorruptionError, NewerFormatError
from moc_ckpt.recovery.checks import Damage
from moc_ckpt.recovery.resolver import RecoveryPlan, resolve
from moc_ckpt.recovery.restorer import index_manifest, stage, try_stage
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.state.unit import UnitMap, Version, expert_unit
from moc_ckpt.storage.base import open_base, unit_tensors
from moc_ckpt.storage.checkpoint import load_manifest, manifest_key, new_save_id, part_version
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.merge import replace_experts
from moc_ckpt.storage.store import Store, open_store

FORCED = {(0, 0), (1, 1)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store("local", tmp_path)
    save(store, "a", 10)
    save(store, "b", 20, experts=[(0, 0), (1, 1)])
    return store


def wants(manifest: Manifest, part: float = 1.0) -> tuple[RecoveryPlan, list[Fragment], list[str]]:
    """A need of every tensor, or of the first elements of each."""
    units = UnitMap(manifest.layers)
    needs = []
    for record in manifest.tensors:
        numel = record.shape[0] * record.shape[1]
        needs.append(Fragment(record.fqn, record.kind, record.dtype, record.shape, 0, int(numel * part)))
    return resolve(index_manifest(manifest), needs), needs, [units.unit_of(need.fqn) for need in needs]


def payload(store: Store, tag: str, pack: str) -> Path:
    assert store.local_path is not None
    (file,) = (store.local_path / tag).glob(f"*/packs/{pack}/c/0")
    return file


def test_damage_is_told_by_unit(store: Store) -> None:
    manifest = load_manifest(store, "b")
    plan, needs, units = wants(manifest)
    assert try_stage(store, manifest, plan, needs, units)[1] == []
    flip(payload(store, "b", "rank_00001.experts"), 40)
    values, damage = try_stage(store, manifest, plan, needs, units)
    (found,) = damage
    assert found.pack.endswith("rank_00001.experts") and set(found.units) == {"expert/0/0", "expert/1/1"}
    assert "rank_00001.experts" in found.where and isinstance(found, Damage)
    for need, value, unit in zip(needs, values, units, strict=True):
        if unit not in found.units:
            version = manifest.version_of(unit)
            assert value.numpy().tolist() == tensor_values(need.fqn, need.kind, need.shape, *version).ravel().tolist()
    with pytest.raises(CorruptionError, match="this rank reads units expert"):
        stage(store, manifest, plan, needs, units)


@pytest.mark.parametrize("part", [1.0, 0.2], ids=["whole fragments", "parts of fragments"])
def test_another_file_in_its_place_is_noticed(store: Store, part: float) -> None:
    """A whole file of another checkpoint: every checksum inside it is right."""
    save(store, "c", 30, experts=[(0, 0), (1, 1)])
    one, two = payload(store, "b", "rank_00000.experts"), payload(store, "c", "rank_00000.experts")
    swapped = two.read_bytes(), one.read_bytes()
    assert len(swapped[0]) == len(swapped[1])
    one.write_bytes(swapped[0]), two.write_bytes(swapped[1])
    manifest = load_manifest(store, "c")
    damage = try_stage(store, manifest, *wants(manifest, part))[1]
    assert [set(item.units) for item in damage] == [{"expert/0/0", "expert/1/1"}]
    assert "not the bytes" in damage[0].what


def test_a_manifest_with_older_experts(store: Store) -> None:
    new, old = load_manifest(store, "b"), load_manifest(store, "a")
    found = replace_experts(new, {"expert/1/1": old})
    assert found.versions() == {**new.versions(), "expert/1/1": Version(1, 10)}
    assert {t.key for t in found.tensors} == {t.key for t in new.tensors} and len(found.fragments) == len(new.fragments)
    flip(payload(store, "b", "rank_00000.experts"), 40)
    plan, needs, units = wants(replace_experts(new, {"expert/0/0": old, "expert/1/1": old}))
    values = stage(store, replace_experts(new, {"expert/0/0": old, "expert/1/1": old}), plan, needs, units)
    steps = {need.fqn: 20 if need.fqn == DENSE[0] else 10 for need in needs}
    for need, value in zip(needs, values, strict=True):
        assert (
            value.numpy().tolist()
            == tensor_values(need.fqn, need.kind, need.shape, 1, steps[need.fqn]).ravel().tolist()
        )


def test_what_was_found_damaged_is_saved_anew(store: Store) -> None:
    """Although nothing of it shows in sizes and indexes, and although an older version is there (I5)."""
    manifest = load_manifest(store, "b")
    required = unit_tensors(manifest.declared(), manifest.layers)
    rest = {"attempt": 1, "step": 30, "layers": manifest.layers, "required": required}
    assert open_base(store, **rest).forced == frozenset()
    spoilt = {expert_unit(*place): Version(1, 20) for place in sorted(FORCED)}
    older = replace_experts(manifest, {expert_unit(*place): load_manifest(store, "a") for place in FORCED})
    for known in ([], [older]):
        base = open_base(store, **rest, known=known, spoilt=spoilt)
        assert base.forced == FORCED and not FORCED & base.stored.keys()
        assert [names for reason, names in base.forgone.items() if "found damaged" in reason] == [tuple(sorted(spoilt))]
    save(store, "c", 30, experts=list(FORCED))
    assert open_base(store, **{**rest, "step": 40}, spoilt=spoilt).forced == frozenset()


def test_a_damaged_version_number_is_damage(store: Store) -> None:
    data = store.read(manifest_key("b"))
    assert data is not None
    store.write(manifest_key("b"), data.replace(b'"format_version":2', b'"format_version":6', 1))
    with pytest.raises(CorruptionError, match="version"):
        load_manifest(store, "b")
    edited = data.replace(b'"format_version":2', b'"format_version":6', 1).replace(b'"step":20', b'"step":21', 1)
    store.write(manifest_key("b"), edited)
    with pytest.raises(NewerFormatError, match="upgrade"):
        load_manifest(store, "b")


def test_parts_tell_what_a_checkpoint_was(store: Store) -> None:
    assert part_version(store, "b") == (1, 20)
    write_rank(store, "b", new_save_id(), 0, step=25, attempt=1, experts=[(0, 0)])
    assert part_version(store, "b") == (1, 25)
    assert store.local_path is not None
    for file in (store.local_path / "b").glob("*/parts/*"):
        file.write_bytes(b"{")
    assert part_version(open_store(store.local_path), "b") is None
    assert part_version(store, "z") is None
