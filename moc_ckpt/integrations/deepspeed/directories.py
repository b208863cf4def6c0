"""The directories that one engine saves into: attempts, what they hold, commits of saves that block, and the lock."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moc_ckpt.errors import StorageError
from moc_ckpt.integrations.deepspeed.report import shorten
from moc_ckpt.pec.selector import Selection
from moc_ckpt.persist.heartbeat import DirectoryLock, LockIdentity
from moc_ckpt.persist.process import launch_command
from moc_ckpt.persist.writer import SaveId
from moc_ckpt.snapshot.places import node_name
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.attempts import Attempt, has_attempt, open_attempt
from moc_ckpt.storage.base import Base, UnitTensors, open_base
from moc_ckpt.storage.checkpoint import list_checkpoints, new_save_id
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store, open_store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.pec import PartialExperts
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Directories", "OpenedDirectory", "OpenedSave"]

logger = logging.getLogger("moc_ckpt")


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


class Directories:
    """Directories of one engine. Methods are collective where they say so; not thread-safe.

    Args:
        moc: the engine's plugin.

    Attributes:
        required: on rank 0, what every expert unit consists of.
    """

    def __init__(self, moc: MocCheckpoint) -> None:
        self._moc = moc
        self._config = moc.config
        self._comm = moc.comm
        self._attempts: dict[str, Attempt] = {}
        self._restored: dict[str, tuple[int, int]] = {}
        self._spoilt: dict[str, dict[str, Version]] = {}
        # On rank 0: the checkpoint of each directory that the state comes from (its last commit or restore), and what
        # the next one builds on.
        self.required: dict[str, UnitTensors] = {}
        self._committed: dict[str, Manifest] = {}
        self._base: tuple[Manifest, ...] = ()
        self._locks: dict[str, DirectoryLock] = {}

    @property
    def _pec(self) -> PartialExperts:
        return self._moc.pec

    def restored(self, url: str, manifest: Manifest, spoilt: Mapping[str, Version]) -> None:
        """Takes in that the live state is that of a checkpoint. Not collective; done on all ranks.

        Wherever this run saves from now on it opens a new attempt; here that one forks at the restored step.

        Args:
            url: the directory.
            manifest: the checkpoint, experts that were damaged in the version that they were restored from.
            spoilt: by expert unit, the version that is damaged: the next save takes these (invariant I5).
        """
        self._spoilt[url] = dict(spoilt)
        self._restored[url] = (manifest.attempt, manifest.step)
        # The next save builds on this very checkpoint: another may have later versions than the state has now.
        if self._comm.rank == 0:
            self._committed[url] = manifest

    @property
    def newest(self) -> tuple[str, int] | None:
        """URL of the directory that this run opened last, and its attempt there; None before it has opened any.

        Any thread may ask.
        """
        opened = list(self._attempts.items())
        return (opened[-1][0], opened[-1][1].attempt) if opened else None

    def look_again(self) -> None:
        """Forgets what was committed: agents have committed since, so the next save reads the directory."""
        self._committed.clear()

    def forget(self) -> None:
        """Forgets where the live state is from. Not collective; done on all ranks."""
        self._attempts.clear()
        self._restored.clear()
        self._committed.clear()
        self._spoilt.clear()

    def close(self) -> None:
        """Lets other runs in. Not collective."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

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
            forced = frozenset() if full or not self._pec.partial else self._find_base(store, attempt.attempt)
            # All ranks would find the same; selected once, it is the same whatever happened to one of them.
            return attempt, new_save_id(), self._pec.select(store.url, forced, full=full)

        self._base = ()
        attempt, save_id, selection = self._comm.from_first("opening the save directory", first, wait="commit")
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
            self.look_again()
            base = self._open_base(store, attempt.attempt)
            return attempt, f"{new_save_id()[:16]}-", dict(base.stored)

        attempt, prefix, stored = self._comm.from_first("opening the save directory", first, wait="commit")
        store = self._meet_in(save_dir, attempt)
        self._attempts[store.url] = attempt
        return OpenedDirectory(store, attempt.attempt, prefix, stored)

    def check_save_dir(self) -> None:
        """Refuses a save_dir that cannot be written, before training begins; collective."""
        save_dir = self._config.save_dir
        if save_dir is not None:
            url = save_dir
            self._comm.from_first("checking save_dir", lambda: open_store(url, create=True).check_writable())

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
            return manifest.added_bytes

        # Not the manifest: it is large in a large world, and nobody else needs it.
        return self._comm.from_first("committing the checkpoint", first, wait="commit")

    def _lock(self, store: Store) -> None:
        """Keeps other runs out of a directory while this process lives; rank 0 only."""
        if store.url not in self._locks and self._moc.pipeline is not None:
            host = self._moc.pipeline.host
            identity = LockIdentity(run=host.run, host=node_name(), pid=os.getpid(), job=host.job)
            lock = DirectoryLock(store, identity)
            lock.acquire(self._config.timeouts.rendezvous_s)
            self._locks[store.url] = lock

    def _meet_in(self, save_dir: str, attempt: Attempt) -> Store:
        """Opens a directory on all ranks, and checks that all see the same one; collective."""

        def see() -> Store:
            store = open_store(save_dir)
            if not has_attempt(store, attempt.attempt, attempt.id):
                raise StorageError(
                    "this rank does not see what rank 0 wrote into the save directory",
                    where=f"{save_dir} on node {node_name()}",
                    fix="save into a directory that all nodes share, and check that it is mounted on this one",
                )
            return store

        return self._comm.agree("looking into the save directory", see, wait="rendezvous")

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
            step=self._moc.engine.global_steps,
            layers=self._moc.view.names.layers,
            required=self.required,
            known=[known] if known is not None else [],
            spoilt=self._spoilt.get(store.url),
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
        info = {
            "world": self._comm.world,
            "version": self._moc.version,
            # For the one who starts the run again (`moc-ckpt recover`).
            "command": launch_command(),
            "cwd": str(Path.cwd()),
        }
        return open_attempt(store, parent=parent, forked_at_step=step, info=info, after=copied)

    def _retain(self, store: Store, manifest: Manifest) -> None:
        storage = self._config.storage
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
