"""`engine.save_checkpoint`: every rank writes its part, rank 0 commits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from moc_ckpt.errors import ConfigError, CoverageError
from moc_ckpt.integrations.deepspeed.client_state import encode_client_state
from moc_ckpt.integrations.deepspeed.engine_state import capture_engine
from moc_ckpt.integrations.deepspeed.native_record import NATIVE, describe
from moc_ckpt.integrations.deepspeed.rng import capture_rng, digest_rng
from moc_ckpt.integrations.deepspeed.view import replicated_items
from moc_ckpt.persist.writer import SaveId, build_part, write_prepared
from moc_ckpt.plan.save_plan import plan_save
from moc_ckpt.plan.sharding import Replicated, Share, plan_shares
from moc_ckpt.snapshot.live import LiveSource, byte_view
from moc_ckpt.state.catalog import Catalog, Entry
from moc_ckpt.state.fragment import Fragment, TensorKey
from moc_ckpt.state.plain import encode_plain
from moc_ckpt.state.scalars import collect_scalars
from moc_ckpt.state.unit import UnitMap, Version, expert_unit, parse_expert_unit
from moc_ckpt.storage.checkpoint import check_tag
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import CommitInfo, MoELayerRecord, Topology
from moc_ckpt.storage.store import Store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = [
    "CLIENT_STATE",
    "SaveRequest",
    "SaveResult",
    "commit_info",
    "declared_parameters",
    "directory_text",
    "rank_file",
    "save",
]

CLIENT_STATE = "client_state.pt"


def rank_file(rank: int) -> str:
    """Returns the file name of one rank's own extra state."""
    return f"rank_{rank:05d}.msgpack"


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """The arguments of `engine.save_checkpoint`, which have DeepSpeed's meaning.

    `full` is ours: take every expert, whatever the configuration selects.
    """

    save_dir: str
    tag: str
    client_state: Mapping[str, Any]
    save_latest: bool
    exclude_frozen: bool
    full: bool = False


@dataclass(frozen=True, slots=True)
class _Local:
    """What one rank knows before the save and the others need; small and picklable."""

    tag: str
    save_dir: str
    step: int
    save_latest: bool
    exclude_frozen: bool
    full: bool
    replicated: list[Replicated]
    buffers: dict[str, int]


@dataclass(slots=True)
class _Prepared:
    """What one rank keeps to itself between the phases."""

    catalog: Catalog | None = None
    rng: dict[str, Any] = field(default_factory=dict)
    optimizer: bytes = b""
    client_state: bytes = b""
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What a save stored.

    Attributes:
        store: the directory.
        tag: the checkpoint's name.
        attempt: the attempt that saved it.
        nbytes: bytes of the packs that it wrote.
        experts: experts that it took, over all layers.
        k: how many of each layer it was to take.
    """

    store: Store
    tag: str
    attempt: int
    nbytes: int
    experts: int
    k: tuple[int, ...]


def save(moc: MocCheckpoint, request: SaveRequest) -> SaveResult:
    """Saves a checkpoint; collective, returns on all ranks after the commit.

    Raises:
        MocError: on every rank if anything failed on any rank; the previous checkpoint is then untouched.
    """
    engine, comm = moc.engine, moc.comm
    stored_weights = moc.stored_weights()
    prepared = _Prepared()
    local = comm.exchange("preparing the checkpoint", lambda: _prepare(moc, request, stored_weights, prepared))
    _check_equal(local)
    catalog = prepared.catalog
    assert catalog is not None

    # After an exchange, so all ranks are here.
    moc.pec.reduce()
    opened = moc.directories.open_for_save(request.save_dir, full=request.full)
    store, selection = opened.store, opened.selection
    ledger = moc.pec.begin_save(selection)
    units = UnitMap(catalog.layers)
    selected = {expert_unit(*place) for place in selection.places}

    def is_saved(unit: str) -> bool:
        return unit in selected or parse_expert_unit(unit) is None

    ident = SaveId(request.tag, opened.save_id, Version(opened.attempt, engine.global_steps), comm.rank, comm.world)

    def info() -> CommitInfo:
        return commit_info(
            moc,
            save_latest=request.save_latest,
            ledger=moc.pec.manifest_data(selection, ledger) if catalog.layers else None,
            selected=sorted(selected),
            state=prepared.state,
        )

    def write() -> None:
        shares = plan_shares(
            (item for reply in local for item in reply.replicated if is_saved(units.unit_of(item.key.fqn))),
            moc.pec.loads(selection),
            mode=moc.config.sharding,
        )
        kept = [entry for entry in catalog.entries if not (request.exclude_frozen and entry.frozen)]
        mine = [
            (entry.unit, *piece)
            for entry in kept
            if is_saved(entry.unit)
            for piece in _pieces(entry, shares, comm.rank)
        ]
        plan = plan_save([(fragment, unit) for unit, fragment, _ in mine])
        sources = [LiveSource(pack, [mine[item.index][2] for item in pack.fragments]) for pack in plan.packs]
        extras = _extras(moc, catalog, prepared, local)
        skipped = {entry.fragment.key for entry in catalog.entries if request.exclude_frozen and entry.frozen}
        declared = {key: value for key, value in catalog.declared.items() if key not in skipped}
        part = build_part(
            ident,
            plan,
            declared,
            tokens=moc.pec.tokens(selection, ledger),
            parameters=declared_parameters(catalog),
            rng=digest_rng(prepared.rng),
            optimizer=prepared.optimizer,
            commit=info() if comm.rank == 0 else None,
        )
        write_prepared(store, part, sources, extras, threads=moc.config.host.writer_threads)

    try:
        comm.agree("writing the checkpoint", write)
        nbytes = moc.directories.commit(store, ident)
    except Exception as error:
        moc.report.failed(store, request.tag, error)
        raise
    moc.pec.saved(store.url, selection, ledger)
    return SaveResult(store, request.tag, opened.attempt, nbytes, len(selected), selection.k)


def _prepare(moc: MocCheckpoint, request: SaveRequest, stored_weights: frozenset[str], prepared: _Prepared) -> _Local:
    check_tag(request.tag)
    moc.synchronize()
    catalog = moc.view.catalog(moc.comm.rank, stored_weights)
    prepared.catalog = catalog
    prepared.rng = capture_rng()
    prepared.optimizer = encode_plain(collect_scalars(catalog, moc.view.state_of), "optimizer")
    state = {
        "engine": capture_engine(moc.engine),
        "underived": sorted(moc.underived),
        "excluded_frozen": request.exclude_frozen,
        NATIVE: describe(moc.view),
    }
    prepared.state = encode_plain(state, "state")
    if moc.comm.rank == 0:
        prepared.client_state = encode_client_state(request.client_state, trust=moc.config.recovery.trust_client_state)
    return _Local(
        tag=request.tag,
        save_dir=request.save_dir,
        step=moc.engine.global_steps,
        save_latest=request.save_latest,
        exclude_frozen=request.exclude_frozen,
        full=request.full,
        replicated=replicated_items(catalog, skip_frozen=request.exclude_frozen),
        buffers={item.fqn: _checksum(item.tensor) for item in catalog.buffers()},
    )


def _check_equal(local: list[_Local]) -> None:
    for name in ("tag", "save_dir", "step", "save_latest", "exclude_frozen", "full"):
        values = {getattr(reply, name): rank for rank, reply in reversed(list(enumerate(local)))}
        if len(values) > 1:
            shown = ", ".join(f"{value!r} on rank {rank}" for value, rank in sorted(values.items(), key=lambda x: x[1]))
            raise ConfigError(
                f"ranks disagree about {name}: {shown}",
                where="engine.save_checkpoint",
                fix="call it with the same arguments at the same step on every rank",
            )


def _pieces(
    entry: Entry, shares: Mapping[TensorKey, tuple[Share, ...]], rank: int
) -> list[tuple[Fragment, torch.Tensor]]:
    """Returns what of an entry this rank writes, with live 1-D views."""
    if len(entry.holders) == 1:
        return [(entry.fragment, entry.flat())] if entry.holders[0] == rank else []
    try:
        found = [share for share in shares[entry.fragment.key] if share.writer == rank]
    except KeyError:
        fragment = entry.fragment
        raise CoverageError(f"no rank offered to write {fragment.fqn} {fragment.kind}") from None
    flat = entry.flat() if found else None
    return [
        (replace(entry.fragment, start=share.start, stop=share.stop), flat[share.start : share.stop])
        for share in found
        if flat is not None
    ]


def _extras(moc: MocCheckpoint, catalog: Catalog, prepared: _Prepared, local: list[_Local]) -> dict[str, bytes]:
    rank = moc.comm.rank
    # The logical value of a buffer is its first replica's; a rank whose own differs keeps it for an equal world.
    own = {
        item.fqn: item.tensor.detach()
        for item in catalog.buffers()
        if local[item.replicas[0]].buffers.get(item.fqn) != local[rank].buffers[item.fqn]
    }
    extras = {rank_file(rank): encode_plain({"rng": prepared.rng, "buffers": own}, "rank state")}
    if rank == 0:
        extras[CLIENT_STATE] = prepared.client_state
    return extras


def declared_parameters(catalog: Catalog) -> int:
    """Counts the elements of the parameters of which this rank is the first replica."""
    trained = sum(shard.param.numel() for shard in catalog.shards if shard.replicas[0] == catalog.rank)
    frozen = sum(
        item.tensor.numel() for item in catalog.weights if not item.is_buffer and item.replicas[0] == catalog.rank
    )
    return trained + frozen


def _checksum(tensor: torch.Tensor) -> int:
    return int(crc32c(byte_view(tensor.detach().cpu().contiguous().reshape(-1)).numpy()))


def commit_info(
    moc: MocCheckpoint, *, save_latest: bool, ledger: dict[str, Any] | None, selected: list[str], state: bytes
) -> CommitInfo:
    """Returns what rank 0's part says about a save, so that others can commit it. Not collective.

    Args:
        moc: the plugin.
        save_latest: let `latest` name the checkpoint.
        ledger: the lost-token ledger as plain data; None without MoE layers.
        selected: expert units that the save takes.
        state: the encoded map for `state.msgpack`.
    """
    return CommitInfo(
        topology=topology(moc),
        moe_layers=moe_layers(moc),
        save_latest=save_latest,
        ledger=ledger,
        selected=selected,
        state=state,
    )


def moe_layers(moc: MocCheckpoint) -> list[MoELayerRecord]:
    """Returns the model's MoE layers as a manifest has them."""
    return [MoELayerRecord(layer.ordinal, layer.prefix, layer.num_experts) for layer in moc.view.names.layers]


def topology(moc: MocCheckpoint) -> Topology:
    """Returns the run as a manifest has it."""
    import deepspeed

    engine = moc.engine
    precision = "bfloat16" if engine.bfloat16_enabled() else "float16" if engine.fp16_enabled() else "float32"
    return Topology(
        world=moc.comm.world,
        zero_stage=int(engine.zero_optimization_stage()),
        expert_parallel=moc.view.names.expert_parallel(),
        precision=precision,
        versions={"moc_ckpt": moc.version, "deepspeed": deepspeed.__version__, "torch": str(torch.__version__)},
    )


def directory_text(directory: str | os.PathLike[str], name: str) -> str:
    """Returns a directory argument as text; raises ValueError where it is empty, as DeepSpeed does."""
    text = os.fspath(directory) if directory else ""
    if not text:
        raise ValueError(f"{name} must be a non-empty string, got {directory!r}")
    return str(text)
