"""`engine.moc`: the plugin's state beside one DeepSpeed engine."""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from moc_ckpt._version import __version__
from moc_ckpt.comm import Comm
from moc_ckpt.config import MocConfig
from moc_ckpt.errors import ConfigError
from moc_ckpt.events import Event, EventKind, EventLog, read_events
from moc_ckpt.integrations.deepspeed.directories import Directories
from moc_ckpt.integrations.deepspeed.fallback import find_and_read
from moc_ckpt.integrations.deepspeed.load import LoadRequest, take_over
from moc_ckpt.integrations.deepspeed.pec import OwnedBytes, PartialExperts, owned_bytes
from moc_ckpt.integrations.deepspeed.pipeline import Pipeline
from moc_ckpt.integrations.deepspeed.preempt import Preempt
from moc_ckpt.integrations.deepspeed.preflight import check_engine
from moc_ckpt.integrations.deepspeed.report import Reporter
from moc_ckpt.integrations.deepspeed.save import SaveRequest, directory_text, save
from moc_ckpt.integrations.deepspeed.view import EngineView
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.plan.coverage import check_coverage, check_experts
from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.snapshot.places import node_name
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.state.fragment import MASTER, WEIGHT, TensorKey
from moc_ckpt.storage.base import unit_tensors
from moc_ckpt.storage.store import Store, open_store

__all__ = ["MocCheckpoint"]

logger = logging.getLogger("moc_ckpt")

# Engines with saves that may be under way when the process ends.
_engines: set[MocCheckpoint] = set()


@atexit.register
def _close_all() -> None:
    for moc in list(_engines):
        try:
            moc.close()
        except Exception:
            logger.exception("at the end of the process")


class MocCheckpoint:
    """Checkpointing of one engine. Methods are collective where they say so; not thread-safe.

    Building it is collective: it checks that the catalogs of all ranks cover every logical tensor
    exactly once, and which weights are their masters' casts.

    Args:
        engine: a built DeepSpeed engine.
        config: the validated configuration.

    Attributes:
        engine: the engine.
        config: the configuration.
        comm: all ranks.
        view: the engine's state.
        directories: where it saves to.
        pipeline: snapshots and saves that no rank waits for; None where every save blocks.
        preempt: the save after SIGTERM; None without `preempt_save`.
        underived: names of parameters whose weights are not their master's cast; equal on all ranks.
        version: this package's version.

    Raises:
        MocError: on all ranks, if the engine is not supported or its state cannot be mapped.
    """

    def __init__(self, engine: Any, config: MocConfig) -> None:
        self.engine = engine
        self.config = config
        self.version = __version__
        self.comm = Comm(rendezvous_s=config.timeouts.rendezvous_s, commit_s=config.timeouts.commit_s)
        self.view: EngineView = self.comm.agree("reading the engine", self._build_view, wait="rendezvous")
        self.underived: frozenset[str] = frozenset()
        self._underived_step = -1
        self.pec: PartialExperts = self.comm.agree("hooking the gates", self._build_pec, wait="rendezvous")
        self.report = Reporter(engine, self.pec, self.comm.rank)
        self.directories = Directories(self)
        self._check_coverage()
        self.pipeline: Pipeline | None = None
        if config.asynchronous:
            self.directories.check_save_dir()
            self.pipeline = Pipeline(self)
            self._before_update = self.view.optimizer.register_step_pre_hook(self._update_begins)
            _engines.add(self)
        self.preempt = Preempt(self) if config.preempt_save else None
        self._held = self._pending = False

    @property
    def plt(self) -> float:
        """Cumulative proportion of lost tokens (MoC-System, equation 7), 0 to 1, as of the last save or restore."""
        return self.pec.ledger.plt

    @property
    def ledger(self) -> Ledger:
        """Tokens that each expert has processed and lost, as of the last save or restore; equal on all ranks."""
        return self.pec.ledger

    def step_done(self, *, skipped: bool) -> None:
        """Is called after every optimizer step; not collective, waits for nothing.

        Args:
            skipped: the step overflowed and changed nothing.

        Raises:
            SystemExit: after the last save, on all ranks at the same step, if any of them got SIGTERM.
        """
        self.pec.step_done(skipped)
        self._pending = True
        if not self._held:
            self.boundary()

    def hold_boundaries(self) -> None:
        """From now on a step ends when `boundary` is called, and not when `engine.step` returns.

        For training loops that count a step, or evaluate, after `engine.step`: a snapshot then has what belongs to its
        step. Not collective; all ranks do it.
        """
        self._held = True

    def boundary(self) -> None:
        """Ends the last step, if that has not happened: takes the snapshot that is due; waits for nothing.

        All ranks call it alike, between `engine.step` and the next forward pass; may be repeated.

        Raises:
            SystemExit: after the last save, on all ranks at the same step, if any of them got SIGTERM.
        """
        if not self._pending:
            return
        self._pending = False
        if self.preempt is not None:
            self.preempt.step_done(self)
        if self.pipeline is not None:
            # A run that trains without having loaded has no use for what the last one left.
            self.pipeline.host.predecessor.let_go()
            self.pipeline.step_done()

    def _update_begins(self, *_: Any) -> None:
        if self.pipeline is not None:
            self.pipeline.before_update()

    def close(self) -> None:
        """Waits for saves under way, then takes the plugin's hooks off the engine. Not collective; may be repeated.

        Happens by itself at the end of the process, with `timeouts.exit_s` as its deadline.
        """
        _engines.discard(self)
        self.pec.close()
        try:
            if self.pipeline is not None:
                pipeline, self.pipeline = self.pipeline, None
                self._before_update.remove()
                pipeline.close(self.config.timeouts.exit_s)
        finally:
            self.directories.close()
            if self.preempt is not None:
                self.preempt.close()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until every save that this rank knows of is committed. Not collective, but useful on all ranks.

        Args:
            timeout_s: seconds to wait at most; None for `timeouts.commit_s`.

        Raises:
            RendezvousTimeoutError: if they are not done by then; names them.
            MocError: what the first of them, or of those since the last call, failed with.
        """
        if self.pipeline is not None:
            self.pipeline.wait(self.config.timeouts.commit_s if timeout_s is None else timeout_s)

    def register_state(self, provider: Callable[[], Mapping[str, Any]] | None) -> None:
        """Sets what gives automatic snapshots, and the save after SIGTERM, the caller's client_state.

        Not collective; call it on all ranks.

        Args:
            provider: returns the dict; called on rank 0 at each automatic snapshot, after the step. None for nothing.
        """
        if self.preempt is not None:
            self.preempt.provider = provider
        if self.pipeline is not None:
            self.pipeline.register_state(provider)

    def catalog(self) -> Catalog:
        """Returns the catalog of this rank, with views on the live tensors of this moment. Not collective."""
        return self.view.catalog(self.comm.rank, self._stored(self.underived))

    def save(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        full: bool = False,
    ) -> bool:
        """Saves a checkpoint; collective; arguments and return value as `DeepSpeedEngine.save_checkpoint`.

        With save_mode `async` it returns once the copy is scheduled; `wait` tells how the save ended. Otherwise it
        returns on all ranks once the checkpoint is committed, and so do saves that do not go through host memory:
        `full` ones, those that exclude frozen parameters, those into `memory://`, and a second one at a step of a model
        with buffers or frozen parameters, which may have changed since.

        `full` saves every expert, whatever the configuration selects: right for the last checkpoint of a run, from
        which then nothing is lost.

        Raises:
            ValueError: if save_dir is empty.
            MocError: on all ranks, if anything failed on any; what was committed before is untouched.
        """
        begin = time.perf_counter()
        request = SaveRequest(
            save_dir=directory_text(save_dir, "save_dir"),
            tag=f"global_step{self.engine.global_steps}" if tag is None else str(tag),
            client_state=client_state or {},
            save_latest=save_latest,
            exclude_frozen=exclude_frozen_parameters,
            full=full,
        )
        if self.preempt is not None:
            self.preempt.directory = request.save_dir
        pipeline = self.pipeline
        if pipeline is not None:
            direct = full or exclude_frozen_parameters or request.save_dir.startswith("memory://")
            if not (direct or pipeline.must_block()):
                scheduled = pipeline.save(request)
                if self.config.save_mode == "durable":
                    timeouts = self.config.timeouts
                    deadline = timeouts.commit_s + timeouts.rendezvous_s
                    self.comm.agree("committing the checkpoint", lambda: pipeline.wait(deadline, scheduled))
                return True
            pipeline.quiesce()
            pipeline.forget_directory(request.save_dir)
            self.directories.look_again()
        result = save(self, request)
        self.report.committed(result, time.perf_counter() - begin)
        return True

    def load(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Restores a checkpoint; collective; arguments and return value as `DeepSpeedEngine.load_checkpoint`.

        Experts whose bytes are damaged are restored from older versions in the directory. Without a tag, a checkpoint
        whose other state is damaged is passed over for the one before. Both are said loudly.

        Returns:
            The checkpoint's path and the caller's client_state; (None, None) if nothing is saved there.

        Raises:
            MocError: on all ranks, if anything failed on any. Until everything is read and checked the engine is
                untouched.
        """
        begin = time.perf_counter()
        text = directory_text(load_dir, "load_dir")
        request = LoadRequest(
            strict=load_module_strict,
            optimizer_states=load_optimizer_states,
            lr_scheduler_states=load_lr_scheduler_states,
            module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        self._check_load_arguments(text, tag, request)
        if self.pipeline is not None:
            self.pipeline.quiesce()
        found = find_and_read(self, text, None if tag is None else str(tag), request)
        if found is None:
            if self.comm.rank == 0:
                logger.warning("nothing to load: %s has no 'latest' (give a tag to load a certain checkpoint)", text)
            return None, None
        store, manifest, experts = found.store, found.manifest, found.memory.experts
        take_over(self, manifest, found.memory, request)
        found.memory.values.clear()
        if self.pipeline is not None:
            # What it took may be needed for a larger arena.
            self.pipeline.host.predecessor.let_go()
            self.pipeline.reset(experts.history if experts is not None and request.continues else None)
        self.engine.loaded_checkpoint_dp_world_size = manifest.topology.world
        self.engine.loaded_checkpoint_mp_world_size = 1
        if request.continues:
            self.directories.restored(store.url, manifest, found.setback.spoilt)
            self.pec.restored(store.url, experts)
            if self.pipeline is not None:
                self.pipeline.make_room()
        seconds = time.perf_counter() - begin
        self.report.recovered(found, self.comm.world, seconds, goes_on=request.continues)
        return store.locate(manifest.tag), found.memory.client_state

    def log_event(self, kind: EventKind, step: int, fields: Mapping[str, Any]) -> bool:
        """Adds an event to the log of the directory that this run opened last. Not collective; any thread may call it.

        Args:
            kind: what happened.
            step: the step that it is about.
            fields: plain data.

        Returns:
            Whether there is such a directory.
        """
        found, pipeline = self.directories.newest, self.pipeline
        if found is None:
            return False
        url, attempt = found
        if pipeline is not None:
            pipeline.host.event(url, kind.value, step, attempt=attempt, **fields)
        else:
            EventLog(open_store(url)).write(kind, attempt=attempt, step=step, **fields)
        return True

    def events_of(self, kind: EventKind) -> list[Event] | None:
        """Reads the events of a kind in the log of the directory that this run opened last. Not collective.

        Any thread may call it.

        Returns:
            The events, the oldest first; None if there is no such directory.
        """
        found = self.directories.newest
        return None if found is None else [item for item in read_events(open_store(found[0])) if item.event == kind]

    def held_memory(self, store: Store) -> HeldMemory | None:
        """Returns the memory that the run before left on this node, if it saved into this directory."""
        held = self.pipeline.host.predecessor.readied() if self.pipeline is not None else None
        return held if held is not None and open_store(held.url).url == store.url else None

    def forget(self) -> None:
        """Forgets where the live state is from: it is about to be overwritten. Not collective; done on all ranks."""
        self.directories.forget()
        self.underived = frozenset()
        self._underived_step = -1
        self.pec.forget()

    def _check_load_arguments(self, load_dir: str, tag: str | None, request: LoadRequest) -> None:
        """Refuses a load that ranks ask for differently: they would restore different things, or wait for ever."""
        mine = {
            "load_dir": load_dir,
            "tag": None if tag is None else str(tag),
            "load_module_strict": request.strict,
            "load_optimizer_states": request.optimizer_states,
            "load_lr_scheduler_states": request.lr_scheduler_states,
            "load_module_only": request.module_only,
            "custom_load_fn": request.custom_load_fn is not None,
        }
        replies = self.comm.exchange("comparing the arguments of load_checkpoint", lambda: mine)
        for rank, reply in enumerate(replies):
            if reply != replies[0]:
                names = [name for name in mine if reply[name] != replies[0][name]]
                shown = ", ".join(f"{name} is {replies[0][name]!r} and {reply[name]!r}" for name in names)
                raise ConfigError(
                    f"ranks 0 and {rank} disagree: {shown}",
                    where="engine.load_checkpoint",
                    fix="call it with the same arguments on every rank",
                )

    @property
    def weights_may_be_derived(self) -> bool:
        """Tells whether weights that are stored may have become their masters' casts since; equal on all ranks."""
        return bool(self.underived) and self._underived_step != self.engine.global_steps

    def stored_weights(self) -> frozenset[str]:
        """Returns the parameters whose weights are stored too; collective, equal on all ranks."""
        # Weights are recast by every update, so what differed at an older step is looked at again.
        if self._underived_step != self.engine.global_steps and (self.underived or self._underived_step < 0):
            found = self.comm.exchange("comparing weights and masters", self.view.underived)
            self.underived = frozenset().union(*found)
            self._underived_step = self.engine.global_steps
        return self._stored(self.underived)

    def synchronize(self) -> None:
        """Waits for the device, so that live tensors hold the state of this step."""
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        if accelerator.device_name() != "cpu":
            accelerator.synchronize()

    def _build_view(self) -> EngineView:
        check_engine(self.engine)
        node_name()  # a name that cannot be used is refused before anything is made
        return EngineView(self.engine)

    def _build_pec(self) -> PartialExperts:
        return PartialExperts(self.engine, self.config, self.view.names.layers)

    def _stored(self, underived: frozenset[str]) -> frozenset[str]:
        return frozenset(self.view.trainable()) if self.config.save_weights == "sharded" else underived

    def _check_coverage(self) -> None:
        stored = self.stored_weights()

        def mine() -> tuple[dict[Any, Any], list[tuple[Any, int, int]], OwnedBytes, str]:
            catalog = self.view.catalog(self.comm.rank, stored)
            spans = [
                (entry.fragment.key, entry.fragment.start, entry.fragment.stop)
                for entry in catalog.entries
                if entry.holders[0] == self.comm.rank
            ]
            return dict(catalog.declared), spans, owned_bytes(catalog), self.config.model_dump_json()

        replies = self.comm.exchange("reading the catalogs", mine)
        declared = {key: value for reply in replies for key, value in reply[0].items()}
        check_experts(self.view.names.layers, declared)
        check_coverage(declared, (span for reply in replies for span in reply[1]))
        self._check_config([reply[3] for reply in replies])
        self.pec.set_ownership([reply[2] for reply in replies])
        if self.comm.rank == 0:
            derived = {TensorKey(key.fqn, WEIGHT) for key in declared if key.kind == MASTER}
            optional = derived if self.config.save_weights == "derive" else set()
            needed = {key: value for key, value in declared.items() if key not in optional}
            self.directories.required = dict(unit_tensors(needed, self.view.names.layers))
            parameters = {key.fqn for key in declared}
            logger.info("catalog: %d tensors over %d ranks, covered exactly once", len(parameters), self.comm.world)

    def _check_config(self, texts: list[str]) -> None:
        """Refuses configurations that differ between ranks: they would select and write different things."""
        for rank, text in enumerate(texts):
            if text != texts[0]:
                ours, theirs = json.loads(texts[0]), json.loads(text)
                names = ", ".join(sorted(name for name in ours if ours[name] != theirs[name]))
                raise ConfigError(
                    f"ranks 0 and {rank} have different values of {names}",
                    where="ds_config, moc_checkpoint",
                    fix="give all ranks the same ds_config",
                )
