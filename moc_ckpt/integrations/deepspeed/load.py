"""`engine.load_checkpoint`: find, check, read into host memory, and only then touch live state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moc_ckpt.errors import CorruptionError
from moc_ckpt.integrations.deepspeed.client_state import decode_client_state
from moc_ckpt.integrations.deepspeed.cpu_adam import replay_bias_correction
from moc_ckpt.integrations.deepspeed.engine_state import restore_counters, restore_loss_scaler, restore_schedulers
from moc_ckpt.integrations.deepspeed.match import check_model
from moc_ckpt.integrations.deepspeed.rng import derive_rng, restore_rng
from moc_ckpt.integrations.deepspeed.save import CLIENT_STATE, STATE, rank_file
from moc_ckpt.recovery.resolver import RecoveryPlan, StoredTensor, resolve
from moc_ckpt.recovery.restorer import index_manifest, stage
from moc_ckpt.state.catalog import Catalog, dtype_name
from moc_ckpt.state.fragment import MASTER, WEIGHT, Fragment, TensorKey
from moc_ckpt.state.plain import decode_plain
from moc_ckpt.state.scalars import ScalarRecord, apply_scalars, index_scalars
from moc_ckpt.state.unit import UnitMap
from moc_ckpt.storage.checkpoint import manifest_key, read_extra
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import Store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["LoadRequest", "load"]

_FIX = "load an older tag, or restore the file from a copy"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The arguments of `engine.load_checkpoint`, which have DeepSpeed's meaning."""

    strict: bool
    optimizer_states: bool
    lr_scheduler_states: bool
    module_only: bool
    custom_load_fn: Callable[..., Any] | None


@dataclass(frozen=True, slots=True)
class _Need:
    """A needed fragment and what to do with its values."""

    fragment: Fragment
    apply: Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    catalog: Catalog
    needs: tuple[_Need, ...]
    plan: RecoveryPlan
    records: Mapping[str, ScalarRecord]
    state: Mapping[str, Any]
    rank_state: Mapping[str, Any]
    client_state: dict[str, Any]
    module: dict[str, torch.Tensor] | None


def load(moc: MocCheckpoint, store: Store, manifest: Manifest, request: LoadRequest) -> dict[str, Any]:
    """Restores the engine from a manifest; collective.

    Returns:
        The caller's client_state.

    Raises:
        MocError: on every rank if anything failed on any rank. Up to the last byte that is read and checked the
            engine is untouched.
    """
    comm = moc.comm
    prepared = comm.agree("preparing to load", lambda: _prepare(moc, store, manifest, request), wait="commit")
    values = comm.agree("reading the checkpoint", lambda: _stage(store, manifest, prepared))
    comm.agree("restoring", lambda: _apply(moc, prepared, values, request))
    _refresh(moc, prepared, manifest, values, request)
    comm.agree("restoring schedulers and RNG", lambda: _finish(moc, manifest, prepared, request))
    return prepared.client_state


def _prepare(moc: MocCheckpoint, store: Store, manifest: Manifest, request: LoadRequest) -> _Prepared:
    catalog = moc.view.catalog(moc.comm.rank)
    wanted = {entry.fragment.key for entry in catalog.entries}
    names = [shard.fqn for shard in catalog.shards] + [item.fqn for item in catalog.weights]
    wanted |= {TensorKey(fqn, kind) for fqn in names for kind in (MASTER, WEIGHT)}
    with_optimizer = request.optimizer_states and not request.module_only
    tensors = index_manifest(manifest, wanted)
    missing = check_model(catalog, manifest, tensors, moc.view, strict=request.strict, with_optimizer=with_optimizer)
    state = decode_plain(_extra(store, manifest, STATE), STATE)
    records = index_scalars(state["optimizer"]) if with_optimizer else {}
    apply_scalars(catalog, records, moc.view.state_of, check_only=True)

    same_world = manifest.topology.world == moc.comm.world
    name = rank_file(moc.comm.rank if same_world else 0)
    rank_state = decode_plain(_extra(store, manifest, name), name)
    client_state = decode_client_state(
        _extra(store, manifest, CLIENT_STATE),
        trust=moc.config.recovery.trust_client_state,
        where=store.locate(manifest.extra[CLIENT_STATE].path),
    )
    module: dict[str, torch.Tensor] | None = {} if request.custom_load_fn is not None else None
    needs = _needs(catalog, tensors, missing, set(state["underived"]), with_optimizer=with_optimizer)
    if module is not None:
        needs = [*_without_weights(needs), *_module_needs(catalog, tensors, missing, module)]
    plan = resolve(tensors, [need.fragment for need in needs])
    return _Prepared(catalog, tuple(needs), plan, records, state, rank_state, client_state, module)


def _needs(
    catalog: Catalog,
    tensors: Mapping[TensorKey, StoredTensor],
    missing: set[str],
    underived: set[str],
    *,
    with_optimizer: bool,
) -> list[_Need]:
    needs = [
        _Need(entry.fragment, entry.load)
        for entry in catalog.entries
        if entry.fragment.fqn not in missing and (with_optimizer or entry.fragment.kind in (MASTER, WEIGHT))
    ]
    # Weights that are not their master's cast were stored; they follow once the others are derived (_refresh).
    for shard in catalog.shards:
        key = TensorKey(shard.fqn, WEIGHT)
        if shard.fqn in underived and key in tensors and shard.fqn not in missing:
            dtype = dtype_name(shard.param.dtype)
            if tensors[key].dtype == dtype:
                whole = Fragment(shard.fqn, WEIGHT, dtype, tuple(shard.param.shape), 0, shard.param.numel())
                needs.append(_Need(whole, _later))
    return needs


def _later(values: torch.Tensor) -> None:
    """Marks values that `_refresh` applies."""


def _without_weights(needs: Sequence[_Need]) -> list[_Need]:
    return [need for need in needs if need.fragment.kind != WEIGHT]


def _module_needs(
    catalog: Catalog, tensors: Mapping[TensorKey, StoredTensor], missing: set[str], module: dict[str, torch.Tensor]
) -> list[_Need]:
    """What a custom_load_fn gets: every tensor of this rank's module, whole."""

    def keep(fqn: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
        def apply(values: torch.Tensor) -> None:
            module[fqn] = values.to(dtype).reshape(shape)

        return apply

    found: dict[str, tuple[str, torch.Tensor]] = {shard.fqn: (MASTER, shard.param) for shard in catalog.shards}
    found.update({item.fqn: (WEIGHT, item.tensor) for item in catalog.weights})
    needs = []
    for fqn, (kind, tensor) in found.items():
        key = TensorKey(fqn, kind)
        if fqn not in missing and key in tensors:
            shape = tuple(tensor.shape)
            fragment = Fragment(fqn, kind, tensors[key].dtype, shape, 0, tensor.numel())
            needs.append(_Need(fragment, keep(fqn, tensor.dtype, shape)))
    return needs


def _extra(store: Store, manifest: Manifest, name: str) -> bytes:
    record = manifest.extra.get(name)
    if record is None:
        raise CorruptionError(
            f"checkpoint {manifest.tag} has no {name}", where=store.locate(manifest_key(manifest.tag)), fix=_FIX
        )
    return read_extra(store, record)


def _stage(store: Store, manifest: Manifest, prepared: _Prepared) -> list[torch.Tensor]:
    units = UnitMap(prepared.catalog.layers)
    fragments = [need.fragment for need in prepared.needs]
    return stage(store, manifest, prepared.plan, fragments, [units.unit_of(item.fqn) for item in fragments])


def _apply(moc: MocCheckpoint, prepared: _Prepared, values: Sequence[torch.Tensor], request: LoadRequest) -> None:
    for need, value in zip(prepared.needs, values, strict=True):
        need.apply(value)
    if prepared.records:
        apply_scalars(prepared.catalog, prepared.records, moc.view.state_of)
        replay_bias_correction(moc.view.optimizer)
    if prepared.module is not None and request.custom_load_fn is not None:
        request.custom_load_fn(src=moc.view.state_dict_of(prepared.module), dst=moc.engine.module)


def _refresh(
    moc: MocCheckpoint,
    prepared: _Prepared,
    manifest: Manifest,
    values: Sequence[torch.Tensor],
    request: LoadRequest,
) -> None:
    """Derives weights from masters (collective under ZeRO), or masters from weights where DeepSpeed does."""
    with_optimizer = request.optimizer_states and not request.module_only
    partitioned = hasattr(moc.engine.optimizer, "update_lp_params")
    if request.custom_load_fn is None or (with_optimizer and partitioned):
        moc.view.derive_weights()
    with torch.no_grad():
        by_fqn = {shard.fqn: shard for shard in prepared.catalog.shards}
        if request.custom_load_fn is None:
            for need, value in zip(prepared.needs, values, strict=True):
                if need.apply is _later:
                    param = by_fqn[need.fragment.fqn].param
                    param.copy_(value.view(param.shape))
        if not with_optimizer:
            # As DeepSpeed: without optimizer states the masters begin at the weights.
            for shard in prepared.catalog.shards:
                shard.master.copy_(shard.param.detach().view(-1)[shard.start : shard.stop])
        if request.custom_load_fn is None and manifest.topology.world == moc.comm.world:
            own = prepared.rank_state["buffers"]
            for item in prepared.catalog.buffers():
                if item.fqn in own:
                    item.tensor.copy_(own[item.fqn])


def _finish(moc: MocCheckpoint, manifest: Manifest, prepared: _Prepared, request: LoadRequest) -> None:
    if request.module_only:
        return
    engine, state = moc.engine, prepared.state["engine"]
    if request.optimizer_states:
        restore_loss_scaler(engine, state)
    restore_schedulers(engine, state, lr=request.lr_scheduler_states)
    restore_counters(engine, state)
    if manifest.topology.world == moc.comm.world:
        restore_rng(dict(prepared.rank_state["rng"]))
    else:
        derive_rng(dict(prepared.rank_state["rng"]), set(prepared.state["rng_shared"]), moc.comm.rank, manifest.step)
