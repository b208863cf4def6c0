"""Does a checkpoint belong to this model? Checked by names and shapes before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from moc_ckpt.errors import ModelMismatchError
from moc_ckpt.recovery.resolver import StoredTensor
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.state.fragment import MASTER, WEIGHT, TensorKey
from moc_ckpt.state.unit import EXPERTS_MARK
from moc_ckpt.storage.manifest import Manifest

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.view import EngineView

__all__ = ["check_model"]

_SHOWN = 8


def check_model(
    catalog: Catalog,
    manifest: Manifest,
    tensors: Mapping[TensorKey, StoredTensor],
    view: EngineView,
    *,
    strict: bool,
    with_optimizer: bool,
    surgery: bool,
    excluded_frozen: bool,
) -> set[str]:
    """Compares this rank's model with the checkpoint.

    Args:
        catalog: this rank's catalog.
        manifest: the checkpoint.
        tensors: its tensors that this rank's model has too.
        view: the engine.
        strict: as DeepSpeed's load_module_strict; else names that only one side has are left out.
        with_optimizer: optimizer state will be restored as well, so what is trained must be the same.
        surgery: a custom_load_fn loads the module; whatever differs is left to it.
        excluded_frozen: the checkpoint was saved with exclude_frozen_parameters.

    Returns:
        Names of the model that cannot be restored (none if strict, unless surgery).

    Raises:
        ModelMismatchError: listing names and shapes.
    """
    if not surgery:
        _check_layers(catalog, manifest)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        shard.fqn: (MASTER, tuple(shard.param.shape)) for shard in catalog.shards
    }
    shapes.update({item.fqn: (WEIGHT, tuple(item.tensor.shape)) for item in catalog.weights})
    missing: set[str] = set()
    differ: dict[str, str] = {}
    for fqn, (kind, shape) in shapes.items():
        stored = tensors.get(TensorKey(fqn, kind)) or _other_kind(tensors, fqn, kind)
        if stored is None:
            missing.add(fqn)
        elif stored.shape != shape:
            differ[fqn] = f"{fqn}: model {list(shape)}, checkpoint {list(stored.shape)}"
        elif with_optimizer and TensorKey(fqn, kind) not in tensors:
            theirs, ours = ("trained", "frozen") if kind == WEIGHT else ("frozen", "trained")
            differ[fqn] = f"{fqn}: {theirs} in the checkpoint, {ours} in the model"
    if surgery:
        return missing | set(differ)
    if differ:
        raise _mismatch(manifest, f"{len(differ)} tensors differ: {_list(list(differ.values()))}")
    unexpected = _unexpected(manifest, shapes, catalog, view) if strict else []
    if strict and (missing or unexpected):
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors of the model are not in the checkpoint: {_list(sorted(missing))}")
            if excluded_frozen:
                parts.append("it was saved with exclude_frozen_parameters=True")
        if unexpected:
            parts.append(f"{len(unexpected)} tensors of the checkpoint are not in the model: {_list(unexpected)}")
        raise _mismatch(manifest, "; ".join(parts))
    if with_optimizer:
        _check_moments(catalog, manifest, missing)
    return missing


def _check_layers(catalog: Catalog, manifest: Manifest) -> None:
    ours = {layer.prefix: layer.num_experts for layer in catalog.layers}
    theirs = {layer.prefix: layer.num_experts for layer in manifest.moe_layers}
    wrong = [
        f"{prefix}: model {count} experts, checkpoint {theirs[prefix]}"
        for prefix, count in ours.items()
        if theirs.get(prefix, count) != count
    ]
    if wrong:
        raise _mismatch(manifest, f"MoE layers have different numbers of experts: {_list(wrong)}")


def _other_kind(tensors: Mapping[TensorKey, StoredTensor], fqn: str, kind: str) -> StoredTensor | None:
    return tensors.get(TensorKey(fqn, MASTER if kind == WEIGHT else WEIGHT))


def _unexpected(manifest: Manifest, ours: Iterable[str], catalog: Catalog, view: EngineView) -> list[str]:
    known = set(ours)
    layers = {layer.prefix for layer in catalog.layers}
    found = []
    for record in manifest.tensors:
        if record.kind not in (MASTER, WEIGHT) or record.fqn in known:
            continue
        prefix, mark, _ = record.fqn.partition(EXPERTS_MARK)
        # Experts of other ranks are theirs to check.
        if mark and prefix in layers and view.names.localise(record.fqn) is None:
            continue
        found.append(record.fqn)
    return sorted(set(found))


def _check_moments(catalog: Catalog, manifest: Manifest, missing: set[str]) -> None:
    stored: dict[str, set[str]] = {shard.fqn: set() for shard in catalog.shards}
    for record in manifest.tensors:
        if record.fqn in stored and record.kind not in (MASTER, WEIGHT):
            stored[record.fqn].add(record.kind)
    lacking: set[str] = set()
    surplus: set[str] = set()
    for shard in catalog.shards:
        if shard.fqn not in missing:
            kinds = set(catalog.moment_kinds[shard.group])
            lacking |= kinds - stored[shard.fqn]
            surplus |= stored[shard.fqn] - kinds
    if lacking or surplus:
        parts = [f"lacks {', '.join(sorted(lacking))}"] if lacking else []
        parts += [f"also has {', '.join(sorted(surplus))}"] if surplus else []
        raise ModelMismatchError(
            f"the checkpoint was saved with another optimizer: beside what this one keeps it {' and '.join(parts)}",
            where=f"checkpoint {manifest.tag}",
            fix="use the optimizer of the run that saved it, or pass load_optimizer_states=False",
        )


def _mismatch(manifest: Manifest, what: str) -> ModelMismatchError:
    return ModelMismatchError(
        f"the checkpoint is of another model: {what}",
        where=f"checkpoint {manifest.tag} (step {manifest.step})",
        fix="build the model as in the run that saved it; load_module_strict=False skips names that only one side has, "
        "load_optimizer_states=False takes weights whether they are trained or frozen",
    )


def _list(items: list[str]) -> str:
    shown = "; ".join(items[:_SHOWN])
    return shown + (f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
