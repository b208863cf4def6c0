"""`engine.load_checkpoint`: find, check, read into host memory, and only then touch live state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moc_ckpt.errors import CorruptionError
from moc_ckpt.integrations.deepspeed.client_state import decode_client_state
from moc_ckpt.integrations.deepspeed.cpu_adam import replay_bias_correction
from moc_ckpt.integrations.deepspeed.engine_state import (
    check_schedulers,
    restore_counters,
    restore_loss_scaler,
    restore_schedulers,
)
from moc_ckpt.integrations.deepspeed.match import check_model
from moc_ckpt.integrations.deepspeed.pec import Restored
from moc_ckpt.integrations.deepspeed.rng import capture_rng, derive_rng, digest_rng, restore_rng
from moc_ckpt.integrations.deepspeed.save import CLIENT_STATE, rank_file
from moc_ckpt.recovery.checks import Damage
from moc_ckpt.recovery.memory_reads import MemoryPiece, split_plan
from moc_ckpt.recovery.peers import Fetched, fetch_from_peers
from moc_ckpt.recovery.pinning import pinned
from moc_ckpt.recovery.resolver import RecoveryPlan, StoredTensor, resolve
from moc_ckpt.recovery.restorer import index_manifest, try_stage
from moc_ckpt.state.catalog import Catalog, dtype_name
from moc_ckpt.state.fragment import MASTER, WEIGHT, Fragment, TensorKey
from moc_ckpt.state.plain import decode_plain
from moc_ckpt.state.scalars import ScalarRecord, apply_scalars, index_scalars
from moc_ckpt.state.unit import UnitMap
from moc_ckpt.storage.checkpoint import STATE, manifest_key, read_extra
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import Store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Damaged", "InMemory", "LoadRequest", "Sources", "read", "stored_scalars", "take_over"]

_FIX = "load an older tag, or restore the file from a copy"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The arguments of `engine.load_checkpoint`, which have DeepSpeed's meaning."""

    strict: bool
    optimizer_states: bool
    lr_scheduler_states: bool
    module_only: bool
    custom_load_fn: Callable[..., Any] | None

    @property
    def continues(self) -> bool:
        """Tells whether all state is taken over, so that the run goes on where the checkpoint was saved.

        Otherwise older versions of the experts are none of what is trained from then on.
        """
        return self.optimizer_states and not self.module_only and self.custom_load_fn is None


@dataclass(frozen=True, slots=True)
class _Need:
    """A needed fragment and what to do with its values."""

    fragment: Fragment
    apply: Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one rank keeps to itself between the phases."""

    catalog: Catalog
    with_optimizer: bool
    skipped: set[str]
    needs: tuple[_Need, ...]
    plan: RecoveryPlan
    records: Mapping[str, ScalarRecord]
    state: Mapping[str, Any]
    rank_state: Mapping[str, Any]
    client_state: dict[str, Any]
    module: dict[str, torch.Tensor]
    experts: Restored | None


class Sources(NamedTuple):
    """Where what was restored came from, in bytes of tensors of all ranks.

    Attributes:
        memory: from the memory of the run before, on the rank's own node.
        peers: from its memory on other nodes.
        storage: from storage.
    """

    memory: int
    peers: int
    storage: int


@dataclass(frozen=True, slots=True)
class InMemory:
    """A checkpoint that was read: what this rank is going to restore, in host memory, checked."""

    prepared: _Prepared
    values: list[torch.Tensor]
    digests: Sequence[Mapping[str, str]]
    nbytes: Sources

    @property
    def experts(self) -> Restored | None:
        """What the checkpoint says about its experts."""
        return self.prepared.experts

    @property
    def client_state(self) -> dict[str, Any]:
        """The caller's."""
        return self.prepared.client_state


@dataclass(frozen=True, slots=True)
class Damaged:
    """What is damaged of a checkpoint.

    Attributes:
        own: what this rank found.
        everywhere: what all ranks found, in rank order; equal on all of them.
    """

    own: tuple[Damage, ...]
    everywhere: tuple[Damage, ...]


def read(moc: MocCheckpoint, store: Store, manifest: Manifest, request: LoadRequest) -> InMemory | Damaged:
    """Reads a checkpoint into host memory; collective. The engine is untouched.

    Returns:
        On all ranks alike what was read, or what is damaged on any of them.

    Raises:
        MocError: on every rank if anything else failed on any rank.
    """
    comm = moc.comm
    box: list[_Prepared] = []

    def prepare() -> tuple[Mapping[str, str], tuple[Damage, ...]]:
        try:
            box.append(_prepare(moc, store, manifest, request))
        except CorruptionError as error:
            return {}, (Damage("", (), error.what, error.where, error.fix),)
        return digest_rng(capture_rng()), ()

    replies = comm.exchange("preparing to load", prepare, wait="commit")
    if found := _damaged(comm.rank, [reply[1] for reply in replies]):
        return found
    prepared = box[0]
    values: list[torch.Tensor] = []

    # A function that gets tensors may keep them, or write to them.
    memory = request.custom_load_fn is None and moc.config.recovery.memory
    held = moc.held_memory(store) if memory else None
    here, left = comm.agree(
        "looking into memory",
        lambda: split_plan(held, manifest, prepared.plan) if held is not None else ([], prepared.plan),
    )
    remote: Fetched = Fetched([], left)
    if memory:
        # A rank that cannot fetch reads storage, and must be back before the others' patience ends.
        remote = fetch_from_peers(comm, held, manifest, left, deadline_s=moc.config.timeouts.commit_s / 2)

    def fetch() -> tuple[tuple[Damage, ...], Sources]:
        staged, damage = _stage(store, manifest, prepared, remote.left, [*here, *remote.pieces])
        values.extend(staged)
        return tuple(damage), Sources(_nbytes(here), _nbytes(remote.pieces), remote.left.nbytes)

    fetched = comm.exchange("reading the checkpoint", fetch, wait="commit")
    if found := _damaged(comm.rank, [reply[0] for reply in fetched]):
        return found
    sources = Sources(*(sum(column) for column in zip(*(reply[1] for reply in fetched), strict=True)))
    return InMemory(prepared, values, [reply[0] for reply in replies], sources)


def _nbytes(pieces: Iterable[MemoryPiece]) -> int:
    return sum(item.piece.nbytes for item in pieces)


def _damaged(rank: int, found: Sequence[tuple[Damage, ...]]) -> Damaged | None:
    everywhere = tuple(item for damage in found for item in damage)
    return Damaged(found[rank], everywhere) if everywhere else None


def take_over(moc: MocCheckpoint, manifest: Manifest, found: InMemory, request: LoadRequest) -> None:
    """Makes what was read the live state; collective.

    Raises:
        MocError: on every rank if anything failed on any rank: the live state is then neither the old nor the new one.
    """
    comm, prepared, values = moc.comm, found.prepared, found.values
    moc.forget()
    comm.agree("restoring", lambda: _apply(moc, prepared, values, request))
    if request.custom_load_fn is None or (prepared.with_optimizer and moc.view.partitioned):
        moc.view.derive_weights()
    comm.agree("finishing the restore", lambda: _finish(moc, manifest, prepared, values, request, found.digests))


def _prepare(moc: MocCheckpoint, store: Store, manifest: Manifest, request: LoadRequest) -> _Prepared:
    catalog = moc.view.catalog(moc.comm.rank)
    state = decode_plain(_extra(store, manifest, STATE), STATE)
    with_optimizer = request.optimizer_states and not request.module_only
    surgery = request.custom_load_fn is not None
    wanted = {entry.fragment.key for entry in catalog.entries}
    names = [shard.fqn for shard in catalog.shards] + [item.fqn for item in catalog.weights]
    wanted |= {TensorKey(fqn, kind) for fqn in names for kind in (MASTER, WEIGHT)}
    tensors = index_manifest(manifest, None if surgery else wanted)
    skipped = check_model(
        catalog,
        manifest,
        tensors,
        moc.view,
        strict=request.strict,
        with_optimizer=with_optimizer,
        surgery=surgery,
        excluded_frozen=state["excluded_frozen"],
    )
    records = index_scalars(stored_scalars(state)) if with_optimizer else {}
    apply_scalars(catalog, records, moc.view.state_of, check_only=True)
    if not request.module_only:
        check_schedulers(moc.engine, state["engine"], lr=request.lr_scheduler_states)

    same_world = manifest.topology.world == moc.comm.world
    name = rank_file(moc.comm.rank if same_world else 0)
    rank_state = decode_plain(_extra(store, manifest, name), name)
    client_state = decode_client_state(
        _extra(store, manifest, CLIENT_STATE),
        trust=moc.config.recovery.trust_client_state,
        where=store.locate(manifest.extra[CLIENT_STATE].path),
    )
    # Of an expert of an older version nobody knows any more whether its stored weights could be derived, and where its
    # replicas have different buffers each rank's own are of the checkpoint's step: it gets the version's.
    earlier = _earlier(manifest)
    underived = set(state["underived"]) | {shard.fqn for shard in catalog.shards if shard.fqn in earlier}
    rank_state["buffers"] = {fqn: value for fqn, value in rank_state["buffers"].items() if fqn not in earlier}
    needs = _needs(catalog, tensors, skipped, underived, with_optimizer=with_optimizer)
    module: dict[str, torch.Tensor] = {}
    if surgery:
        # The function loads the weights: of them only the masters that lie apart are restored here.
        apart = {shard.fqn for shard in catalog.shards if shard.master.data_ptr() != shard.param.data_ptr()}
        kept = {MASTER} if with_optimizer else set()
        needs = [
            need
            for need in needs
            if need.fragment.kind not in (MASTER, WEIGHT) or (need.fragment.kind in kept and need.fragment.fqn in apart)
        ]
        needs += _module_needs(moc, manifest, tensors, module)
    plan = resolve(tensors, [need.fragment for need in needs])
    return _Prepared(
        catalog,
        with_optimizer,
        skipped,
        tuple(needs),
        plan,
        records,
        state,
        rank_state,
        client_state,
        module,
        moc.pec.read(manifest),
    )


def stored_scalars(state: Mapping[str, Any]) -> list[ScalarRecord]:
    """Returns the optimizer's records: encoded once per rank, or (format version 1) as they are."""
    found: list[ScalarRecord] = []
    for item in state["optimizer"]:
        found += decode_plain(item, STATE) if isinstance(item, bytes) else [item]
    return found


def _earlier(manifest: Manifest) -> set[str]:
    """Returns the parameters and buffers of experts that are from before the checkpoint's own step."""
    units = {index for index, unit in enumerate(manifest.units) if unit.step != manifest.step}
    rows = zip(manifest.fragments.unit, manifest.fragments.tensor, strict=True) if units else ()
    return {manifest.tensors[tensor].fqn for unit, tensor in rows if unit in units}


def _needs(
    catalog: Catalog,
    tensors: Mapping[TensorKey, StoredTensor],
    skipped: set[str],
    underived: set[str],
    *,
    with_optimizer: bool,
) -> list[_Need]:
    needs = []
    for entry in catalog.entries:
        fragment = entry.fragment
        if fragment.fqn in skipped or not (with_optimizer or fragment.kind in (MASTER, WEIGHT)):
            continue
        if fragment.key not in tensors:
            # Without optimizer states, what was trained may be frozen now and the other way round.
            fragment = replace(fragment, kind=MASTER if fragment.kind == WEIGHT else WEIGHT)
        needs.append(_Need(fragment, entry.load))
    # Weights that are not their master's cast were stored; they follow once the others are derived (_finish).
    for shard in catalog.shards:
        key = TensorKey(shard.fqn, WEIGHT)
        if shard.fqn in underived and key in tensors and shard.fqn not in skipped:
            dtype = dtype_name(shard.param.dtype)
            if tensors[key].dtype == dtype:
                whole = Fragment(shard.fqn, WEIGHT, dtype, tuple(shard.param.shape), 0, shard.param.numel())
                needs.append(_Need(whole, _later))
    return needs


def _later(values: torch.Tensor) -> None:
    """Marks values that `_finish` applies."""


def _module_needs(
    moc: MocCheckpoint, manifest: Manifest, tensors: Mapping[TensorKey, StoredTensor], module: dict[str, torch.Tensor]
) -> list[_Need]:
    """What a custom_load_fn gets: every stored weight, whole, in the shape and precision of the run that saved it.

    Of the experts of layers that this model has too, only those of this rank, under their local names.
    """
    precision = getattr(torch, manifest.topology.precision)

    def keep(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
        def apply(values: torch.Tensor) -> None:
            module[name] = values.to(dtype).reshape(shape)

        return apply

    needs = []
    for key, tensor in tensors.items():
        stored_too = key.kind == MASTER and TensorKey(key.fqn, WEIGHT) in tensors
        name = moc.view.names.localise(key.fqn)
        if key.kind not in (MASTER, WEIGHT) or stored_too or name is None:
            continue
        dtype = precision if key.kind == MASTER else getattr(torch, tensor.dtype)
        fragment = Fragment(key.fqn, key.kind, tensor.dtype, tensor.shape, 0, math.prod(tensor.shape))
        needs.append(_Need(fragment, keep(name, dtype, tensor.shape)))
    return needs


def _extra(store: Store, manifest: Manifest, name: str) -> bytes:
    record = manifest.extra.get(name)
    if record is None:
        raise CorruptionError(
            f"checkpoint {manifest.tag} has no {name}", where=store.locate(manifest_key(manifest.tag)), fix=_FIX
        )
    return read_extra(store, record)


def _stage(
    store: Store, manifest: Manifest, prepared: _Prepared, plan: RecoveryPlan, here: Sequence[MemoryPiece]
) -> tuple[list[torch.Tensor], list[Damage]]:
    units = UnitMap(manifest.layers)
    fragments = [need.fragment for need in prepared.needs]
    return try_stage(store, manifest, plan, fragments, [units.unit_of(item.fqn) for item in fragments], here)


def _apply(moc: MocCheckpoint, prepared: _Prepared, values: Sequence[torch.Tensor], request: LoadRequest) -> None:
    with pinned(values, torch.device(moc.engine.device)):
        for need, value in zip(prepared.needs, values, strict=True):
            need.apply(value)
    if prepared.records:
        apply_scalars(prepared.catalog, prepared.records, moc.view.state_of)
        replay_bias_correction(moc.view.optimizer)
    if request.custom_load_fn is not None:
        request.custom_load_fn(src=moc.view.with_aliases(prepared.module), dst=moc.engine.module)
        with torch.no_grad():
            # What has no master in the checkpoint begins at what the function loaded.
            for shard in prepared.catalog.shards:
                if shard.fqn in prepared.skipped:
                    shard.master.copy_(shard.param.detach().view(-1)[shard.start : shard.stop])


def _finish(
    moc: MocCheckpoint,
    manifest: Manifest,
    prepared: _Prepared,
    values: Sequence[torch.Tensor],
    request: LoadRequest,
    digests: Sequence[Mapping[str, str]],
) -> None:
    """What follows once weights are derived from masters. Not collective."""
    engine, catalog = moc.engine, prepared.catalog
    same_world = manifest.topology.world == moc.comm.world
    with torch.no_grad():
        if request.custom_load_fn is None:
            params = {shard.fqn: shard.param for shard in catalog.shards}
            for need, value in zip(prepared.needs, values, strict=True):
                if need.apply is _later:
                    param = params[need.fragment.fqn]
                    param.copy_(value.view(param.shape))
            own = prepared.rank_state["buffers"] if same_world else {}
            for item in catalog.buffers():
                if item.fqn in own:
                    item.tensor.copy_(own[item.fqn])
        if not prepared.with_optimizer:
            # As DeepSpeed under ZeRO: without optimizer states the masters begin at the weights.
            for shard in catalog.shards:
                shard.master.copy_(shard.param.detach().view(-1)[shard.start : shard.stop])
    if request.module_only:
        return
    state = prepared.state["engine"]
    if request.optimizer_states:
        restore_loss_scaler(engine, state)
    restore_schedulers(engine, state, lr=request.lr_scheduler_states)
    restore_counters(engine, state)
    streams = dict(prepared.rank_state["rng"])
    if same_world:
        restore_rng(streams)
    else:
        # One saved rank shares every stream with itself: what this world shares decides as well.
        shared = {name for name, digest in digests[0].items() if all(other.get(name) == digest for other in digests)}
        derive_rng(streams, shared & set(prepared.state["rng_shared"]), moc.comm.rank, manifest.step)
