"""`engine.moc`: the plugin's state beside one DeepSpeed engine."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from moc_ckpt._version import __version__
from moc_ckpt.comm import Comm
from moc_ckpt.config import MocConfig
from moc_ckpt.errors import CheckpointNotFoundError, MocError, StorageError
from moc_ckpt.integrations.deepspeed.load import LoadRequest, load
from moc_ckpt.integrations.deepspeed.preflight import check_engine
from moc_ckpt.integrations.deepspeed.save import SaveRequest, directory_text, save
from moc_ckpt.integrations.deepspeed.view import EngineView
from moc_ckpt.persist.writer import SaveId
from moc_ckpt.plan.coverage import check_coverage, check_experts
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.storage.attempts import Attempt, has_attempt, open_attempt
from moc_ckpt.storage.checkpoint import latest_tag, list_checkpoints, load_manifest, new_save_id
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.manifest import Manifest, MoELayerRecord, Topology, decode_manifest, encode_manifest
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store, open_store

__all__ = ["MocCheckpoint"]

logger = logging.getLogger("moc_ckpt")


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
        self._check_coverage()

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
    ) -> bool:
        """Saves a checkpoint; collective; arguments and return value as `DeepSpeedEngine.save_checkpoint`.

        Returns on all ranks once the checkpoint is committed.

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
        )
        stored_bytes = save(self, request)
        if self.comm.rank == 0:
            logger.info(
                "COMMITTED %s: step %d, %s in %.2f s, at %s",
                request.tag,
                self.engine.global_steps,
                _bytes(stored_bytes),
                time.perf_counter() - begin,
                request.save_dir,
            )
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
        data = self.comm.from_first("finding the checkpoint", lambda: self._find(text, tag), wait="commit")
        if data is None:
            if self.comm.rank == 0:
                logger.warning("nothing to load: %s has no 'latest' (give a tag to load a certain checkpoint)", text)
            return None, None
        manifest = decode_manifest(data, text)
        store = self.comm.agree("opening the directory", lambda: open_store(text), wait="rendezvous")
        request = LoadRequest(
            strict=load_module_strict,
            optimizer_states=load_optimizer_states,
            lr_scheduler_states=load_lr_scheduler_states,
            module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        client_state = load(self, store, manifest, request)
        self.engine.loaded_checkpoint_dp_world_size = manifest.topology.world
        self.engine.loaded_checkpoint_mp_world_size = 1
        # Wherever this run saves from now on it opens a new attempt; here that one forks at the restored step.
        self._attempts.clear()
        self._restored = {} if load_module_only else {store.url: (manifest.attempt, manifest.step)}
        self.underived = frozenset()
        self._underived_step = -1
        if self.comm.rank == 0:
            logger.info(
                "RECOVERED %s: step %d, saved by %d ranks, loaded by %d in %.2f s",
                manifest.tag,
                manifest.step,
                manifest.topology.world,
                self.comm.world,
                time.perf_counter() - begin,
            )
        return store.locate(manifest.tag), client_state

    def stored_weights(self) -> frozenset[str]:
        """Returns the parameters whose weights are stored too; collective, equal on all ranks."""
        # Weights are recast by every update, so what differed at an older step is looked at again.
        if self._underived_step != self.engine.global_steps and (self.underived or self._underived_step < 0):
            found = self.comm.exchange("comparing weights and masters", self.view.underived)
            self.underived = frozenset().union(*found)
            self._underived_step = self.engine.global_steps
        return self._stored(self.underived)

    def open_for_save(self, save_dir: str) -> tuple[Store, int, str]:
        """Prepares a directory for a save; collective.

        Returns:
            The store, this run's attempt in it, and a new save_id that all ranks share.
        """

        def first() -> tuple[Attempt, str]:
            store = open_store(save_dir, create=True)
            store.check_writable()
            attempt = self._attempts.get(store.url)
            return self._open_attempt(store) if attempt is None else attempt, new_save_id()

        attempt, save_id = self.comm.from_first("opening the save directory", first, wait="commit")

        def see() -> Store:
            store = open_store(save_dir)
            if not has_attempt(store, attempt.attempt, attempt.id):
                raise StorageError(
                    "this rank does not see what rank 0 wrote into the save directory",
                    where=f"{save_dir} on host {socket.gethostname()}",
                    fix="save into a directory that all nodes share, and check that it is mounted on this one",
                )
            return store

        store = self.comm.agree("looking into the save directory", see, wait="rendezvous")
        self._attempts[store.url] = attempt
        return store, attempt.attempt, save_id

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

    def commit(
        self,
        store: Store,
        ident: SaveId,
        *,
        topology: Topology,
        moe_layers: list[MoELayerRecord],
        parameters: int,
        save_latest: bool,
    ) -> int:
        """Publishes the manifest from rank 0, then drops what retention no longer keeps; collective.

        Returns:
            Bytes of the checkpoint's packs in storage.
        """

        def first() -> int:
            manifest = commit(
                store,
                ident.tag,
                ident.save_id,
                ident.world,
                attempt=ident.version.attempt,
                topology=topology,
                moe_layers=moe_layers,
                parameters=parameters,
                save_latest=save_latest,
                base=(),
            )
            self._retain(store, manifest)
            return sum(pack.stored_bytes for pack in manifest.packs)

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

    def _stored(self, underived: frozenset[str]) -> frozenset[str]:
        return frozenset(self.view.trainable()) if self.config.save_weights == "sharded" else underived

    def _check_coverage(self) -> None:
        stored = self.stored_weights()

        def mine() -> tuple[dict[Any, Any], list[tuple[Any, int, int]]]:
            catalog = self.view.catalog(self.comm.rank, stored)
            spans = [
                (entry.fragment.key, entry.fragment.start, entry.fragment.stop)
                for entry in catalog.entries
                if entry.holders[0] == self.comm.rank
            ]
            return dict(catalog.declared), spans

        replies = self.comm.exchange("reading the catalogs", mine)
        declared = {key: value for reply in replies for key, value in reply[0].items()}
        check_experts(self.view.names.layers, declared)
        check_coverage(declared, (span for reply in replies for span in reply[1]))
        if self.comm.rank == 0:
            parameters = {key.fqn for key in declared}
            logger.info("catalog: %d tensors over %d ranks, covered exactly once", len(parameters), self.comm.world)

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
        except MocError as error:
            # The checkpoint is committed; files that could not be removed are tried again after the next one.
            logger.warning("retention failed: %s", error)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}"
