"""`engine.moc`: the plugin's state beside one DeepSpeed engine."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moc_ckpt._version import __version__
from moc_ckpt.comm import Comm
from moc_ckpt.config import MocConfig
from moc_ckpt.errors import CheckpointNotFoundError, ConfigError, StorageError
from moc_ckpt.integrations.deepspeed.load import LoadRequest, load
from moc_ckpt.integrations.deepspeed.pec import OwnedBytes, PartialExperts, owned_bytes
from moc_ckpt.integrations.deepspeed.pipeline import Pipeline
from moc_ckpt.integrations.deepspeed.preflight import check_engine
from moc_ckpt.integrations.deepspeed.report import Reporter, shorten
from moc_ckpt.integrations.deepspeed.save import SaveRequest, directory_text, save
from moc_ckpt.integrations.deepspeed.view import EngineView
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.selector import Selection
from moc_ckpt.persist.heartbeat import DirectoryLock, LockIdentity
from moc_ckpt.persist.writer import SaveId
from moc_ckpt.plan.coverage import check_coverage, check_experts
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.state.fragment import MASTER, WEIGHT, TensorKey
from moc_ckpt.storage.attempts import Attempt, has_attempt, open_attempt
from moc_ckpt.storage.base import Base, UnitTensors, open_base, unit_tensors
from moc_ckpt.storage.checkpoint import latest_tag, list_checkpoints, load_manifest, new_save_id, save_prefix
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.manifest import Manifest, decode_manifest, encode_manifest
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store, open_store

__all__ = ["MocCheckpoint", "OpenedSave"]

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


class OpenedSave(NamedTuple):
    """A directory that is ready for a save.

    Attributes:
        store: the directory.
        attempt: this run's attempt in it.
        save_id: a new one that all ranks share.
        selection: the experts to save.
    """

    store: Store
    attempt: int
    save_id: str
    selection: Selection


class OpenedDirectory(NamedTuple):
    """A directory that is ready for saves that no rank waits for.

    Attributes:
        store: the directory.
        attempt: this run's attempt in it.
        run_prefix: what the save ids of this run begin with, from now on.
        stored: (layer, expert) -> step of the version that it has.
    """

    store: Store
    attempt: int
    run_prefix: str
    stored: Mapping[tuple[int, int], int]


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
        self._attempts: dict[str, Attempt] = {}
        self._restored: dict[str, tuple[int, int]] = {}
        self.pec: PartialExperts = self.comm.agree("hooking the gates", self._build_pec, wait="rendezvous")
        self.report = Reporter(engine, self.pec, self.comm.rank)
        # On rank 0: what every expert consists of, the checkpoint of each directory that the state comes from (its last
        # commit or restore), and what the next one builds on.
        self._required: dict[str, UnitTensors] = {}
        self._committed: dict[str, Manifest] = {}
        self._base: tuple[Manifest, ...] = ()
        self._check_coverage()
        self._locks: dict[str, DirectoryLock] = {}
        self.pipeline: Pipeline | None = None
        if config.asynchronous:
            self._check_save_dir()
            self.pipeline = Pipeline(self)
            self._before_update = self.view.optimizer.register_step_pre_hook(self._update_begins)
            _engines.add(self)

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
        """
        self.pec.step_done(skipped)
        if self.pipeline is not None:
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
        if self.pipeline is not None:
            pipeline, self.pipeline = self.pipeline, None
            self._before_update.remove()
            pipeline.close(self.config.timeouts.exit_s)
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

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
        """Sets what gives automatic snapshots the caller's client_state. Not collective; call it on all ranks.

        Args:
            provider: returns the dict; called on rank 0 at each automatic snapshot, after the step. None for nothing.
        """
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
        `full` ones, those that exclude frozen parameters, and those into `memory://`.

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
        pipeline = self.pipeline
        if pipeline is not None:
            direct = full or exclude_frozen_parameters or request.save_dir.startswith("memory://")
            if not direct:
                scheduled = pipeline.save(request)
                if self.config.save_mode == "durable":
                    timeouts = self.config.timeouts
                    deadline = timeouts.commit_s + timeouts.rendezvous_s
                    self.comm.agree("committing the checkpoint", lambda: pipeline.wait(deadline, scheduled))
                return True
            pipeline.quiesce()
            pipeline.forget_directory(request.save_dir)
            # What the agents committed meanwhile is read from the directory.
            self._committed.clear()
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
        data = self.comm.from_first("finding the checkpoint", lambda: self._find(text, tag), wait="commit")
        if data is None:
            if self.comm.rank == 0:
                logger.warning("nothing to load: %s has no 'latest' (give a tag to load a certain checkpoint)", text)
            return None, None
        manifest = decode_manifest(data, text)
        store = self.comm.agree("opening the directory", lambda: open_store(text), wait="rendezvous")
        client_state, experts = load(self, store, manifest, request)
        if self.pipeline is not None:
            self.pipeline.reset(experts.history if experts is not None and request.continues else None)
        self.engine.loaded_checkpoint_dp_world_size = manifest.topology.world
        self.engine.loaded_checkpoint_mp_world_size = 1
        if request.continues:
            # Wherever this run saves from now on it opens a new attempt; here that one forks at the restored step.
            self._restored[store.url] = (manifest.attempt, manifest.step)
            # The next save builds on this very checkpoint: another may have later versions than the state has now.
            if self.comm.rank == 0:
                self._committed[store.url] = manifest
            self.pec.restored(store.url, experts)
        seconds = time.perf_counter() - begin
        self.report.recovered(store, manifest, self.comm.world, seconds, goes_on=request.continues)
        return store.locate(manifest.tag), client_state

    def forget(self) -> None:
        """Forgets where the live state is from: it is about to be overwritten. Not collective; done on all ranks."""
        self._attempts.clear()
        self._restored.clear()
        self._committed.clear()
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

    def open_for_save(self, save_dir: str, *, full: bool) -> OpenedSave:
        """Prepares a directory for a save; collective.

        Args:
            save_dir: path or URL.
            full: the save takes every expert.
        """

        def first() -> tuple[Attempt, str, Selection]:
            store = open_store(save_dir, create=True)
            store.check_writable()
            attempt = self._attempts.get(store.url) or self._open_attempt(store)
            # Known before the others look: a retry after their failure must not open yet another one.
            self._attempts[store.url] = attempt
            forced = frozenset() if full or not self.pec.partial else self._find_base(store, attempt.attempt)
            # All ranks would find the same; selected once, it is the same whatever happened to one of them.
            return attempt, new_save_id(), self.pec.select(store.url, forced, full=full)

        self._base = ()
        attempt, save_id, selection = self.comm.from_first("opening the save directory", first, wait="commit")
        store = self._meet_in(save_dir, attempt)
        self._attempts[store.url] = attempt
        return OpenedSave(store, attempt.attempt, save_id, selection)

    def open_directory(self, save_dir: str) -> OpenedDirectory:
        """Prepares a directory for saves that no rank waits for; collective.

        Raises:
            MocError: on all ranks, if it cannot be written, or another live run writes into it.
        """

        def first() -> tuple[Attempt, str, dict[tuple[int, int], int]]:
            store = open_store(save_dir, create=True)
            store.check_writable()
            self._lock(store)
            attempt = self._attempts.get(store.url) or self._open_attempt(store)
            self._attempts[store.url] = attempt
            self._committed.clear()
            base = self._open_base(store, attempt.attempt)
            return attempt, f"{new_save_id()[:16]}-", dict(base.stored)

        attempt, prefix, stored = self.comm.from_first("opening the save directory", first, wait="commit")
        store = self._meet_in(save_dir, attempt)
        self._attempts[store.url] = attempt
        return OpenedDirectory(store, attempt.attempt, prefix, stored)

    def _lock(self, store: Store) -> None:
        """Keeps other runs out of a directory while this process lives; rank 0 only."""
        if store.url not in self._locks and self.pipeline is not None:
            host = self.pipeline.host
            identity = LockIdentity(run=host.run, host=socket.gethostname(), pid=os.getpid(), job=host.job)
            lock = DirectoryLock(store, identity)
            lock.acquire(self.config.timeouts.rendezvous_s)
            self._locks[store.url] = lock

    def _meet_in(self, save_dir: str, attempt: Attempt) -> Store:
        """Opens a directory on all ranks, and checks that all see the same one; collective."""

        def see() -> Store:
            store = open_store(save_dir)
            if not has_attempt(store, attempt.attempt, attempt.id):
                raise StorageError(
                    "this rank does not see what rank 0 wrote into the save directory",
                    where=f"{save_dir} on host {socket.gethostname()}",
                    fix="save into a directory that all nodes share, and check that it is mounted on this one",
                )
            return store

        return self.comm.agree("looking into the save directory", see, wait="rendezvous")

    def _check_save_dir(self) -> None:
        """Refuses a save_dir that cannot be written, before training begins; collective."""
        save_dir = self.config.save_dir
        if save_dir is not None:
            url = save_dir
            self.comm.from_first("checking save_dir", lambda: open_store(url, create=True).check_writable())

    def _find_base(self, store: Store, attempt: int) -> frozenset[tuple[int, int]]:
        """Finds the older checkpoints that a partial save refers to; rank 0 only. Returns the experts it must take."""
        base = self._open_base(store, attempt)
        self._base = base.manifests
        return base.forced

    def _open_base(self, store: Store, attempt: int) -> Base:
        """Looks what a directory has of every expert; rank 0 only."""
        known = self._committed.get(store.url)
        base = open_base(
            store,
            attempt=attempt,
            step=self.engine.global_steps,
            layers=self.view.names.layers,
            required=self._required,
            known=[known] if known is not None else [],
        )
        for reason, names in base.forgone.items():
            logger.warning("%d experts are saved anew because %s: %s", len(names), reason, shorten(names))
        return base

    def _open_attempt(self, store: Store) -> Attempt:
        """Opens this run's attempt in a directory; rank 0 only."""
        parent, step = self._restored.get(store.url, (None, None))
        if parent is not None and not has_attempt(store, parent):
            logger.warning(
                "%s has checkpoints of attempt %d without its record (copied?): a new line of attempts begins",
                store.url,
                parent,
            )
            parent = step = None
        copied = max((summary.attempt for summary in list_checkpoints(store)), default=0)
        info = {"world": self.comm.world, "version": self.version}
        return open_attempt(store, parent=parent, forked_at_step=step, info=info, after=copied)

    def commit(self, store: Store, ident: SaveId) -> int:
        """Publishes the manifest from rank 0, then drops what retention no longer keeps; collective.

        Returns:
            Bytes in storage of the packs that this save wrote.
        """

        def first() -> int:
            manifest = commit(store, ident.tag, ident.save_id, attempt=ident.version.attempt, base=self._base)
            self._base = ()
            self._committed[store.url] = manifest
            self._retain(store, manifest)
            own = save_prefix(ident.tag, ident.save_id)
            return sum(pack.stored_bytes for pack in manifest.packs if pack.path.startswith(own + "/"))

        # Not the manifest: it is large in a large world, and nobody else needs it.
        return self.comm.from_first("committing the checkpoint", first, wait="commit")

    def synchronize(self) -> None:
        """Waits for the device, so that live tensors hold the state of this step."""
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        if accelerator.device_name() != "cpu":
            accelerator.synchronize()

    def _build_view(self) -> EngineView:
        check_engine(self.engine)
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
            self._required = dict(unit_tensors(needed, self.view.names.layers))
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

    def _find(self, load_dir: str, tag: str | None) -> bytes | None:
        """Returns the encoded manifest to load; None if nothing is saved and that is allowed."""
        store = open_store(load_dir)
        chosen = str(tag) if tag is not None else latest_tag(store)
        if chosen is None:
            if self.config.recovery.require_resume:
                raise CheckpointNotFoundError(
                    "nothing is saved here, and moc_checkpoint.recovery.require_resume is set",
                    where=load_dir,
                    fix="check the directory, or unset require_resume for the first run",
                )
            return None
        return encode_manifest(load_manifest(store, chosen))

    def _retain(self, store: Store, manifest: Manifest) -> None:
        storage = self.config.storage
        try:
            report = apply_retention(
                store, keep_last=storage.keep_last, keep_every=storage.keep_every, attempt=manifest.attempt
            )
            if report.blocked:
                logger.warning("retention removes nothing: %s", report.blocked)
            if report.dropped:
                logger.info("removed %s (storage.keep_last is %d)", ", ".join(report.dropped), storage.keep_last)
        except Exception as error:
            # The checkpoint is committed; files that could not be removed are tried again after the next one.
            logger.warning("retention failed: %s", error)
