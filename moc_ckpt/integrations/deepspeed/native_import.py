"""A native DeepSpeed checkpoint as one of ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moc_ckpt._version import __version__
from moc_ckpt.errors import CheckpointNotFoundError, ClientStateError, CorruptionError, UnsupportedError
from moc_ckpt.integrations.deepspeed.client_state import encode_client_state
from moc_ckpt.integrations.deepspeed.engine_state import scaler_numbers
from moc_ckpt.integrations.deepspeed.native_files import MODEL_FILE, import_deepspeed, optimizer_file
from moc_ckpt.integrations.deepspeed.native_record import (
    NATIVE,
    WRAPPER,
    NativeRecord,
    layout_options,
    plain_fields,
)
from moc_ckpt.integrations.deepspeed.native_source import NativeShard, NativeSource
from moc_ckpt.integrations.deepspeed.save import CLIENT_STATE, rank_file
from moc_ckpt.persist.writer import SaveId, build_part, write_prepared
from moc_ckpt.plan.native_groups import NativeGroup, split_name
from moc_ckpt.plan.save_plan import plan_save
from moc_ckpt.snapshot.live import LiveSource
from moc_ckpt.state.catalog import dtype_name
from moc_ckpt.state.fragment import MASTER, WEIGHT, Fragment, TensorKey
from moc_ckpt.state.plain import encode_plain
from moc_ckpt.state.scalars import LAYOUT_KEYS, ScalarRecord
from moc_ckpt.state.unit import UnitMap, Version
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import check_tag, latest_tag, new_save_id
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.export import Progress
from moc_ckpt.storage.manifest import CommitInfo, MoELayerRecord, Topology
from moc_ckpt.storage.output import staged_directory
from moc_ckpt.storage.store import Store, open_store

__all__ = ["ImportedNative", "import_native"]

_SLACK = 64 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class ImportedNative:
    """A checkpoint that was made of DeepSpeed's own.

    Attributes:
        tag: its name, here and there.
        step: engine.global_steps.
        url: its directory.
        world: ranks that saved it.
        expert_parallel: expert-parallel size of the run that saved it; 1 without MoE layers.
        zero_stage: ZeRO stage of that run.
        experts: number of experts over all MoE layers.
        nbytes: bytes of all its tensors.
        stored_bytes: bytes of its packs and extra files.
        underived: trained parameters whose weights are not their master's cast, so that they are stored as well.
    """

    tag: str
    step: int
    url: str
    world: int
    expert_parallel: int
    zero_stage: int
    experts: int
    nbytes: int
    stored_bytes: int
    underived: int


def import_native(
    directory: str,
    url: str,
    *,
    tag: str | None = None,
    trust: bool = False,
    progress: Progress = lambda done, total: None,
) -> ImportedNative:
    """Makes a checkpoint of this package out of DeepSpeed's own, of ZeRO stage 1 or 2.

    Memory: some tens of MiB; the files are mapped, one rank's at a time.

    Args:
        directory: what was given to DeepSpeed's save_checkpoint.
        url: a local directory, which must not exist or be empty.
        tag: the checkpoint's name; None for the one that `latest` names.
        trust: unpickle whatever the files hold, which may run code from them.
        progress: called after every file of a rank, with the bytes of files that were read.

    Raises:
        CheckpointNotFoundError: if there is no such checkpoint, or a file of it is missing.
        ConfigError: if a file needs trust, or the output is not empty.
        UnsupportedError: if the checkpoint is of a kind that is not known.
        CorruptionError: if a file cannot be read or does not fit the others.
        NotPlainError: if a scheduler has state that is not plain data.
        StorageError: if it cannot be written. What was written is removed.
    """
    source_store = open_store(directory)
    path = source_store.local_path
    if path is None:
        raise UnsupportedError(
            "DeepSpeed's checkpoints are read from a local directory", where=directory, fix="copy it to one"
        )
    tag = check_tag(tag if tag is not None else _latest(source_store))
    import_deepspeed()
    try:
        return _import(path, tag, url, source_store, trust=trust, progress=progress)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        # Whatever wrote these files, it was not one save of DeepSpeed's.
        raise CorruptionError(
            f"the files do not fit together ({type(error).__name__}: {error})",
            where=str(path / tag),
            fix="import another tag, or restore the files from a copy",
        ) from error


def _import(path: Path, tag: str, url: str, source_store: Store, *, trust: bool, progress: Progress) -> ImportedNative:
    source = NativeSource(path / tag, trust=trust)
    sizes = [(path / tag / optimizer_file(rank, bf16=source.bf16)).stat().st_size for rank in range(source.world)]
    need = sum(item.stat().st_size for item in (path / tag).iterdir() if item.is_file())
    with staged_directory(url, source_store, need + _SLACK) as hidden:
        store = open_store(str(hidden), create=True)
        manifest, underived = _Importer(store, source, tag, trust=trust).write(sizes, progress)
    out = open_store(url)
    return ImportedNative(
        tag=tag,
        step=manifest.step,
        url=out.url,
        world=source.world,
        expert_parallel=source.ep,
        zero_stage=source.stage,
        experts=sum(layer.num_experts for layer in source.layers),
        nbytes=manifest.nbytes,
        stored_bytes=manifest.stored_bytes,
        underived=underived,
    )


def _latest(store: Store) -> str:
    tag = latest_tag(store) if store.root_exists() else None
    if tag is None:
        raise CheckpointNotFoundError(
            "there is no file `latest` that names a checkpoint",
            where=store.url,
            fix="name the directory that was given to save_checkpoint, or the tag with --tag",
        )
    return tag


class _Importer:
    """Writes one part per rank that saved, the last rank's first: rank 0's needs to know what the others found."""

    def __init__(self, store: Store, source: NativeSource, tag: str, *, trust: bool) -> None:
        self._store, self._source, self._tag, self._trust = store, source, tag, trust
        self._save_id = new_save_id()
        self._units = UnitMap(source.layers)
        self._trained = source.trained()
        self._underived: set[str] = set()
        self._step = int(source.model["global_steps"])

    def write(self, sizes: list[int], progress: Progress) -> tuple[Any, int]:
        """Writes and commits the checkpoint; returns its manifest and the number of underived weights."""
        info = {"imported": str(self._source.folder)}
        attempt = open_attempt(self._store, info=info).attempt
        done = 0
        for rank in reversed(range(self._source.world)):
            self._write_rank(rank, Version(attempt, self._step))
            done += sizes[rank]
            progress(done, sum(sizes))
        return commit(self._store, self._tag, self._save_id, attempt=attempt), len(self._underived)

    def _write_rank(self, rank: int, version: Version) -> None:
        source = self._source
        state = source.optimizer(rank)
        items = list(self._state_items(rank, state))
        extras = {rank_file(rank): encode_plain({"rng": {}, "buffers": {}}, "rank state")}
        declared: dict[TensorKey, tuple[str, tuple[int, ...]]] = {}
        info = None
        if rank == 0:
            items += self._weight_items()
            declared = self._declared(state)
            info = self._commit_info(state)
            extras[CLIENT_STATE] = self._client_state()
        plan = plan_save([(fragment, self._units.unit_of(fragment.fqn)) for fragment, _ in items])
        part = build_part(
            SaveId(self._tag, self._save_id, version, rank, source.world),
            plan,
            declared,
            parameters=self._parameters() if rank == 0 else 0,
            optimizer=encode_plain(list(self._records(rank, state)), "optimizer"),
            commit=info,
        )
        sources = [LiveSource(pack, [items[item.index][1] for item in pack.fragments]) for pack in plan.packs]
        write_prepared(self._store, part, sources, extras, threads=1)

    # ---- tensors ----

    def _state_items(self, rank: int, state: Mapping[str, Any]) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """Yields what a rank holds of masters and moments; notes which weights are not their master's cast."""
        shards = list(self._source.shards(rank, state))
        moments = [self._moments(rank, state, group) for group in range(len(state["partition_count"]))]
        self._compare(shards, state)
        for shard in shards:
            shape = self._source.weights[shard.fqn][1]
            numel = shard.stop - shard.start
            master = state["single_partition_of_fp32_groups"][shard.group]
            for kind, values in ((MASTER, master), *moments[shard.group].items()):
                part = values.narrow(0, shard.at, numel)
                yield Fragment(shard.fqn, kind, dtype_name(values.dtype), shape, shard.start, shard.stop), part

    def _moments(self, rank: int, state: Mapping[str, Any], group: int) -> dict[str, torch.Tensor]:
        known = self._optimizer_state(state, group)
        found = {name: value for name, value in sorted(known.items()) if _elementwise(value)}
        size = state["single_partition_of_fp32_groups"][group].numel() + int(state["group_paddings"][group])
        wrong = [name for name, value in found.items() if value.numel() != size]
        options = state["base_optimizer_state"]["param_groups"][group]
        # SGD without momentum keeps nothing, at any step.
        if wrong or (not known and options.get("momentum") != 0):
            raise UnsupportedError(
                f"the optimizer keeps {wrong[0]!r} of another size than its parameters"
                if wrong
                else "the checkpoint is from before the first step: it has no optimizer state",
                where=str(self._source.folder / optimizer_file(rank, bf16=self._source.bf16)),
                fix="import a later checkpoint of an optimizer with elementwise state, such as AdamW",
            )
        return found

    @staticmethod
    def _optimizer_state(state: Mapping[str, Any], group: int) -> Mapping[str, Any]:
        base = state["base_optimizer_state"]
        (key,) = base["param_groups"][group]["params"]
        found: Mapping[str, Any] = base["state"].get(key, {})
        return found

    def _compare(self, shards: list[NativeShard], state: Mapping[str, Any]) -> None:
        module = self._source.model["module"]
        opened: tuple[tuple[int, int], dict[str, torch.Tensor]] | None = None
        for shard in sorted(shards, key=lambda shard: self._units.unit_of(shard.fqn)):
            place = self._place(shard.fqn)
            if place is not None and (opened is None or opened[0] != place):
                opened = (place, self._source.expert(*place))
            holder = module if place is None or opened is None else opened[1]
            weight = holder[shard.fqn].reshape(-1)[shard.start : shard.stop]
            master = state["single_partition_of_fp32_groups"][shard.group].narrow(0, shard.at, weight.numel())
            if not _same_bits(master.to(weight.dtype), weight):
                self._underived.add(shard.fqn)

    def _place(self, name: str) -> tuple[int, int] | None:
        """Returns layer and expert of a name; None outside experts."""
        parts = split_name(name)
        if parts is None:
            return None
        return next(layer.ordinal for layer in self._source.layers if layer.prefix == parts[0]), parts[1]

    def _weight_items(self) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """Yields what no master tells: frozen parameters, buffers, and weights that are not a master's cast."""
        opened: tuple[tuple[int, int], dict[str, torch.Tensor]] | None = None
        for name in self._stored_weights():
            dtype, shape = self._source.weights[name]
            if not math.prod(shape):
                continue
            place = self._place(name)
            if place is not None and (opened is None or opened[0] != place):
                opened = (place, self._source.expert(*place))
            holder = self._source.model["module"] if place is None or opened is None else opened[1]
            values = holder[name].detach().contiguous().reshape(-1)
            yield Fragment(name, WEIGHT, dtype, shape, 0, values.numel()), values

    def _stored_weights(self) -> list[str]:
        names = [name for name in self._source.weights if name not in self._trained or name in self._underived]
        return sorted(names, key=lambda name: (self._place(name) or (-1, -1), name))

    def _declared(self, state: Mapping[str, Any]) -> dict[TensorKey, tuple[str, tuple[int, ...]]]:
        found = {}
        for name, group in self._trained.items():
            shape = self._source.weights[name][1]
            master = state["single_partition_of_fp32_groups"][group]
            found[TensorKey(name, MASTER)] = (dtype_name(master.dtype), shape)
            for kind, values in self._moments(0, state, group).items():
                found[TensorKey(name, kind)] = (dtype_name(values.dtype), shape)
        for name in self._stored_weights():
            found[TensorKey(name, WEIGHT)] = self._source.weights[name]
        return found

    def _parameters(self) -> int:
        buffers = {_anywhere(name) for name in self._source.model.get("buffer_names") or ()}
        names = [name for name in self._source.weights if _anywhere(name) not in buffers]
        return sum(math.prod(self._source.weights[name][1]) for name in names)

    # ---- the rest ----

    def _records(self, rank: int, state: Mapping[str, Any]) -> Iterator[ScalarRecord]:
        for group, names in self._source.members(rank):
            known = self._optimizer_state(state, group)
            options = state["base_optimizer_state"]["param_groups"][group]
            yield {
                "fqns": names,
                "options": {name: value for name, value in options.items() if name not in LAYOUT_KEYS},
                "scalars": {name: value for name, value in known.items() if not _elementwise(value)},
            }

    def _client_state(self) -> bytes:
        try:
            return encode_client_state(self._source.client_state(), trust=self._trust)
        except ClientStateError as error:
            where = str(self._source.folder / MODEL_FILE)
            raise ClientStateError(f"{error.what} ({error.where})", where=where, fix="say --trust") from error

    def _commit_info(self, state: Mapping[str, Any]) -> CommitInfo:
        source, model = self._source, self._source.model
        names = ("global_steps", "global_samples", "skipped_steps")
        engine: dict[str, Any] = {
            "counters": {name: int(model[name]) for name in names if model.get(name) is not None},
            "loss_scaler": scaler_numbers(state["loss_scaler"]),
        }
        engine |= {
            name: model[name] for name in ("lr_scheduler", "random_ltd", "data_sampler") if model.get(name) is not None
        }
        data = {
            "engine": engine,
            "underived": sorted(self._underived),
            "excluded_frozen": False,
            NATIVE: self._record(state).encode(),
        }
        versions = {
            "moc_ckpt": __version__,
            "deepspeed": str(model.get("ds_version", "")),
            "torch": str(torch.__version__),
        }
        return CommitInfo(
            topology=Topology(
                world=source.world,
                zero_stage=source.stage,
                expert_parallel={layer.prefix: source.ep for layer in source.layers},
                precision=self._precision(),
                versions=versions,
            ),
            moe_layers=[MoELayerRecord(layer.ordinal, layer.prefix, layer.num_experts) for layer in source.layers],
            state=encode_plain(data, "state"),
        )

    def _precision(self) -> str:
        """Returns the dtype that most trained elements have."""
        if self._source.bf16:
            return "bfloat16"
        sizes: dict[str, int] = {}
        for name in self._trained:
            dtype, shape = self._source.weights[name]
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return max(sizes, key=lambda dtype: sizes[dtype], default="float32")

    def _record(self, state: Mapping[str, Any]) -> NativeRecord:
        source, precision = self._source, self._precision()
        options = state["base_optimizer_state"]["param_groups"]
        return NativeRecord(
            wrapper=WRAPPER,
            groups=tuple(
                NativeGroup(tuple(source.group_names(index)), layout_options(group))
                for index, group in enumerate(options)
            ),
            aliases=source.aliases,
            buffers=tuple(source.model.get("buffer_names") or ()),
            dtypes={name: source.weights[name][0] for name in self._trained if source.weights[name][0] != precision},
            round_robin=source.round_robin,
            parameter_alignment=source.parameter_alignment,
            data_first=source.parallel.data_before_expert,
            clip_grad=float(state["clip_grad"]),
            dynamic_loss_scale=bool(state["dynamic_loss_scale"]),
            scaler=type(state["loss_scaler"]).__name__,
            scaler_fields=plain_fields(state["loss_scaler"]),
        )


def _anywhere(name: str) -> tuple[str, str]:
    """Returns a name without the number of the expert."""
    parts = split_name(name)
    return (name, "") if parts is None else (parts[0], parts[2])


def _elementwise(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As integers: NaN equals itself and the zeros of either sign differ.
    integer = _INTEGERS[left.element_size()]
    return torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))
