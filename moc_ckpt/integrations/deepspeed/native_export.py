"""One checkpoint as DeepSpeed's own files, which a run without this package resumes from."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moc_ckpt.errors import ClientStateError, CorruptionError
from moc_ckpt.integrations.deepspeed.client_state import decode_client_state
from moc_ckpt.integrations.deepspeed.load import stored_scalars
from moc_ckpt.integrations.deepspeed.native_files import (
    MODEL_FILE,
    Scratch,
    expert_file,
    import_deepspeed,
    optimizer_file,
    write_file,
    write_latest,
)
from moc_ckpt.integrations.deepspeed.native_plan import NativePlan, plan_native
from moc_ckpt.integrations.deepspeed.native_record import NativeRecord, read_record
from moc_ckpt.integrations.deepspeed.save import CLIENT_STATE, rank_file
from moc_ckpt.plan.native_groups import expert_name, split_name
from moc_ckpt.plan.zero_spec import FlatGroup
from moc_ckpt.recovery.resolver import resolve
from moc_ckpt.recovery.restorer import stage
from moc_ckpt.state.fragment import MASTER, Fragment, itemsize
from moc_ckpt.state.plain import decode_plain
from moc_ckpt.state.scalars import ScalarRecord, index_scalars, join_scalars
from moc_ckpt.state.unit import UnitMap, parse_expert_unit
from moc_ckpt.storage.checkpoint import LATEST, STATE, load_manifest, manifest_key, read_extra
from moc_ckpt.storage.export import Progress, check_source
from moc_ckpt.storage.local import fsync_dir
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.output import staged_directory
from moc_ckpt.storage.store import Store, open_store

__all__ = ["ExportedNative", "export_native"]

_BATCH = 64 << 20
_SLACK = 16 << 20


@dataclass(frozen=True, slots=True)
class ExportedNative:
    """A native checkpoint that was written.

    Attributes:
        tag: its name, here and there.
        step: engine.global_steps.
        path: its directory, which holds `latest` and the tag.
        world: ranks that it is for.
        expert_parallel: expert-parallel size that it is for; 1 without MoE layers.
        zero_stage: ZeRO stage that it is for.
        files: number of files below the tag.
        nbytes: their bytes.
        older_experts: experts from older steps, as the checkpoint has them.
        rank_buffers: buffers of which ranks had their own values; all ranks get the first replica's now.
    """

    tag: str
    step: int
    path: Path
    world: int
    expert_parallel: int
    zero_stage: int
    files: int
    nbytes: int
    older_experts: int
    rank_buffers: int


def export_native(
    store: Store,
    tag: str,
    url: str,
    *,
    world: int | None = None,
    expert_parallel: int | None = None,
    trust: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExportedNative:
    """Writes a checkpoint as DeepSpeed's own, for ZeRO stage 1 or 2.

    Memory: the weights of one expert, and what is read at once: 64 MiB, or one tensor. One rank's optimizer state, and
    the dense weights, are put together in files without a name on the disk of the output.

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.
        url: a local directory, which must not exist or be empty.
        world: number of ranks that will load it; None for as many as saved it.
        expert_parallel: their expert-parallel size; None for that of the run that saved it.
        trust: unpickle client_state even if that may run code from the checkpoint.
        progress: called with the bytes of tensors that were read.

    Raises:
        UnsupportedError: if the run was of a kind whose native files are not known.
        ConfigError: if world or expert-parallel size do not fit the model, or the output is not empty.
        ClientStateError: if client_state needs trust.
        CoverageError: if the checkpoint is not complete.
        CorruptionError: if bytes that are needed are missing or damaged; names the file.
        StorageError: if it cannot be written. What was written is removed.
    """
    manifest = load_manifest(store, tag)
    where = store.locate(manifest_key(tag))
    state = decode_plain(_extra(store, manifest, STATE), STATE)
    record = read_record(state, where)
    plan = plan_native(manifest, record, state, where, world=world, expert_parallel=expert_parallel)
    version = import_deepspeed()
    client_state = _client_state(store, manifest, trust=trust)
    own_buffers = _rank_buffers(store, manifest)
    check_source(store, manifest, {row.pack for row in manifest.fragments})
    total = plan.weight_bytes() + plan.state_bytes()
    scratch = max(plan.weight_bytes(), plan.rank_bytes())
    with staged_directory(url, store, total + scratch + _SLACK) as root:
        folder = root / tag
        folder.mkdir()
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        writer = _Writer(store, manifest, record, state, plan, version, Scratch(root), advance)
        sizes = list(writer.write(folder, client_state))
        fsync_dir(folder)
        # Whoever loads without naming a tag reads this.
        write_latest(root / LATEST, tag)
    path = open_store(url).local_path
    assert path is not None
    older = [unit for unit in manifest.units if unit.step != manifest.step and parse_expert_unit(unit.name) is not None]
    return ExportedNative(
        tag=tag,
        step=manifest.step,
        path=path,
        world=plan.parallel.world,
        expert_parallel=plan.ep,
        zero_stage=manifest.topology.zero_stage,
        files=len(sizes),
        nbytes=sum(sizes),
        older_experts=len(older),
        rank_buffers=own_buffers,
    )


def _extra(store: Store, manifest: Manifest, name: str) -> bytes:
    record = manifest.extra.get(name)
    if record is None:
        raise CorruptionError(
            f"checkpoint {manifest.tag} has no {name}",
            where=store.locate(manifest_key(manifest.tag)),
            fix="export another one (`moc-ckpt inspect` lists them)",
        )
    return read_extra(store, record)


def _client_state(store: Store, manifest: Manifest, *, trust: bool) -> dict[str, Any]:
    data = _extra(store, manifest, CLIENT_STATE)
    try:
        return decode_client_state(data, trust=trust, where=store.locate(manifest.extra[CLIENT_STATE].path))
    except ClientStateError as error:
        fix = "if everybody who could write the directory is trusted, say --trust"
        raise ClientStateError(error.what, where=error.where, fix=fix) from error


def _rank_buffers(store: Store, manifest: Manifest) -> int:
    """Counts the buffers of which some rank has its own value."""
    names: set[str] = set()
    for rank in range(manifest.topology.world):
        name = rank_file(rank)
        names |= decode_plain(_extra(store, manifest, name), name)["buffers"].keys()
    return len(names)


class _Writer:
    """Writes the files of one native checkpoint, one after the other."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        record: NativeRecord,
        state: Mapping[str, Any],
        plan: NativePlan,
        version: str,
        scratch: Scratch,
        advance: Callable[[int], None],
    ) -> None:
        self._scratch = scratch
        self._store, self._manifest, self._record, self._plan = store, manifest, record, plan
        self._state: Mapping[str, Any] = state["engine"]
        self._scalars = index_scalars(stored_scalars(state))
        self._version, self._advance = version, advance
        self._units = UnitMap(manifest.layers)
        zero = {
            "stage": manifest.topology.zero_stage,
            "round_robin_gradients": record.round_robin,
            "parameter_alignment": record.parameter_alignment,
        }
        # What readers of these files look for in it; the run's own configuration is not in the checkpoint.
        self._config = {"zero_optimization": zero, "use_data_before_expert_parallelism": record.data_first}

    def write(self, folder: Path, client_state: Mapping[str, Any]) -> Iterator[int]:
        """Writes all files; yields the bytes of each."""
        for layer in self._plan.layers:
            for expert, names in enumerate(self._plan.of_expert(layer)):
                yield write_file(folder / expert_file(layer.ordinal, expert), dict(self._weights(names)))
        yield write_file(folder / MODEL_FILE, {**self._model(), **client_state})
        bf16 = self._manifest.topology.precision == "bfloat16"
        # Nothing of one file is kept while the next is made.
        for rank in range(self._plan.parallel.world):
            yield write_file(folder / optimizer_file(rank, bf16=bf16), self._optimizer_data(rank))

    def _read(self, needs: Sequence[Fragment]) -> list[torch.Tensor]:
        units = [self._units.unit_of(need.fqn) for need in needs]
        return stage(self._store, self._manifest, resolve(self._plan.tensors, needs), needs, units)

    # ---- weights ----

    def _weights(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields weights by name, in the precision that they are trained with."""
        batch: list[tuple[str, Fragment]] = []
        room = _BATCH
        for name in names:
            key, stored = self._plan.source(name)
            need = Fragment(name, key.kind, stored.dtype, stored.shape, 0, math.prod(stored.shape))
            if batch and need.nbytes > room:
                yield from self._cast(batch)
                batch, room = [], _BATCH
            batch.append((name, need))
            room -= need.nbytes
        yield from self._cast(batch)

    def _cast(self, batch: Sequence[tuple[str, Fragment]]) -> Iterator[tuple[str, torch.Tensor]]:
        values = self._read([need for _, need in batch])
        for (name, need), value in zip(batch, values, strict=True):
            dtype = self._plan.weights[name]
            # A copy: what is read together shares one storage, which torch.save would write whole.
            weight = self._scratch.zeros(need.numel, getattr(torch, dtype))
            yield name, weight.copy_(value.reshape(-1)).reshape(need.shape)
            self._advance(need.numel * itemsize(dtype))

    def _model(self) -> dict[str, Any]:
        """Returns what rank 0 writes beside experts and optimizer."""
        plan, record = self._plan, self._record
        module = OrderedDict(self._weights(plan.dense()))
        aliases = dict(record.aliases or {})
        for alias, name in aliases.items():
            module[alias] = module[name]
        # From stage 2 on DeepSpeed writes what is not trained once more, and gives all ranks rank 0's experts then.
        again = plan.settings.stage == 2 and all(split_name(name) is None for name in plan.frozen)
        counters = self._state["counters"]
        return {
            "module": module,
            "buffer_names": list(record.buffers),
            "optimizer": None,
            "param_shapes": [
                OrderedDict(
                    (plan.specs[member].fqn, torch.Size(plan.specs[member].shape)) for member, _ in flat.members
                )
                for flat in plan.flat(0)
            ],
            "frozen_param_shapes": {name: torch.Size(plan.shape(name)) for name in plan.frozen} if again else None,
            "shared_params": aliases,
            "frozen_param_fragments": {name: module[name] for name in plan.frozen} if again else None,
            "lr_scheduler": self._state.get("lr_scheduler"),
            "data_sampler": self._state.get("data_sampler"),
            "random_ltd": self._state.get("random_ltd"),
            "skipped_steps": counters["skipped_steps"],
            "global_steps": counters["global_steps"],
            "global_samples": counters["global_samples"],
            "dp_world_size": plan.parallel.world,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": self._config,
            "ds_version": self._version,
            "num_experts": [layer.num_experts for layer in plan.layers],
            "ds_autoep_layers": None,
        }

    # ---- the optimizer ----

    def _optimizer_data(self, rank: int) -> dict[str, Any]:
        state = self._optimizer(rank)
        return {"optimizer_state_dict": state, "ds_config": self._config, "ds_version": self._version}

    def _optimizer(self, rank: int) -> dict[str, Any]:
        from deepspeed.runtime.zero.config import ZeroStageEnum

        plan, record = self._plan, self._record
        flats = plan.flat(rank)
        masters, states, options = [], {}, []
        for index, flat in enumerate(flats):
            names = [plan.specs[member].fqn for member, _ in flat.members]
            known, scalars = join_scalars(self._scalar(name) for name in names)
            values = {kind: self._partition(flat, kind, dtype) for kind, dtype in plan.kinds[flat.group]}
            master = values.pop(MASTER)
            masters.append(master[: flat.size - flat.padding(plan.numels)])
            states[index] = {**scalars, **values}
            options.append({**plan.groups[flat.group].options, **known, "params": [index]})
        return {
            "loss_scaler": self._scaler(),
            "dynamic_loss_scale": record.dynamic_loss_scale,
            "overflow": False,
            "clip_grad": record.clip_grad,
            "base_optimizer_state": {"state": states, "param_groups": options},
            "single_partition_of_fp32_groups": masters,
            "zero_stage": ZeroStageEnum(plan.settings.stage),
            "group_paddings": [flat.padding(plan.numels) for flat in flats],
            "param_alignment_paddings": [flat.gaps(plan.numels) for flat in flats],
            "partition_count": [flat.count for flat in flats],
            "ds_version": self._version,
            "param_slice_mappings": [self._slices(flat) for flat in flats],
        }

    def _scalar(self, name: str) -> ScalarRecord:
        found = self._scalars.get(name)
        if found is None:
            raise CorruptionError(
                f"the checkpoint has no step count and options of {name}",
                where=self._store.locate(manifest_key(self._manifest.tag)),
                fix="export another one (`moc-ckpt inspect` lists them)",
            )
        return found

    def _partition(self, flat: FlatGroup, kind: str, dtype: str) -> torch.Tensor:
        """Returns a rank's partition of one kind of state; padding is zeros, as in training."""
        plan = self._plan
        whole = self._scratch.zeros(flat.size, getattr(torch, dtype))
        batch: list[tuple[int, Fragment]] = []
        room = _BATCH
        for member, start, stop, at in flat.intervals(plan.numels):
            spec = plan.specs[member]
            need = Fragment(spec.fqn, kind, dtype, spec.shape, start, stop)
            if batch and need.nbytes > room:
                self._fill(whole, batch)
                batch, room = [], _BATCH
            batch.append((at, need))
            room -= need.nbytes
        self._fill(whole, batch)
        return whole

    def _fill(self, whole: torch.Tensor, batch: Sequence[tuple[int, Fragment]]) -> None:
        values = self._read([need for _, need in batch])
        for (at, need), value in zip(batch, values, strict=True):
            whole[at : at + need.numel] = value
            self._advance(need.nbytes)

    def _slices(self, flat: FlatGroup) -> OrderedDict[str, Any]:
        from deepspeed.utils.tensor_fragment import fragment_address

        plan = self._plan
        counts = {layer.prefix: layer.num_experts // plan.ep for layer in plan.layers}
        found: OrderedDict[str, Any] = OrderedDict()
        for member, start, stop, at in flat.intervals(plan.numels):
            name = plan.specs[member].fqn
            parts = split_name(name)
            if parts is not None:
                # As the module of that rank calls it.
                name = expert_name(parts[0], parts[1] % counts[parts[0]], parts[2])
            found[name] = fragment_address(numel=stop - start, start=at)
        return found

    def _scaler(self) -> Any:
        from deepspeed.runtime.fp16 import loss_scaler

        scaler = object.__new__(getattr(loss_scaler, self._record.scaler))
        vars(scaler).update(self._record.scaler_fields or {})
        # The record was made once, the numbers are from the checkpoint's step.
        current = self._state["loss_scaler"]
        vars(scaler).update({name: value for name, value in current.items() if name in vars(scaler)})
        return scaler
