"""Commit: the moment at which a save becomes a checkpoint (invariants I1, I4)."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from moc_ckpt.errors import CorruptionError, StaleAttemptError, StorageError
from moc_ckpt.storage.attempts import admissible, ancestry, current_attempt
from moc_ckpt.storage.base import find_base
from moc_ckpt.storage.checkpoint import (
    ATTEMPTS,
    LATEST,
    LOCK,
    check_tag,
    latest_tag,
    list_checkpoints,
    load_manifest,
    manifest_key,
    read_parts,
)
from moc_ckpt.storage.manifest import Manifest, MoELayerRecord, Part, Topology, encode_manifest
from moc_ckpt.storage.merge import merge_parts, missing_experts
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store

__all__ = ["check_current", "commit"]

_CHECKS_AT_ONCE = 8


def commit(
    store: Store,
    tag: str,
    save_id: str,
    world: int,
    *,
    attempt: int,
    topology: Topology,
    moe_layers: Sequence[MoELayerRecord],
    parameters: int,
    save_latest: bool = True,
    ledger: dict[str, Any] | None = None,
    base: Sequence[Manifest] | None = None,
    selected: Collection[str] | None = None,
    timeout_s: float = 60.0,
) -> Manifest:
    """Publishes a save whose parts are all there.

    A save that is already committed is left as it is, so several may try. Holds the directory's lock, so that neither
    garbage collection nor a new attempt comes in between.

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.
        save_id: the save; parts of others are ignored.
        world: number of ranks.
        attempt: the attempt that commits; must be the newest one.
        topology: the run that saves.
        moe_layers: the model's MoE layers.
        parameters: number of parameters.
        save_latest: let `latest` name this checkpoint.
        ledger: the lost-token ledger as plain data.
        base: older checkpoints to take those experts from that no part holds; None: as many of this directory as
            needed, the newest commit first.
        selected: expert units that this save took; none of them comes from an older checkpoint. None leaves it open.
        timeout_s: seconds to wait for the lock.

    Returns:
        The manifest.

    Raises:
        StaleAttemptError: if a newer attempt owns the directory, or the save is not in this attempt's past.
        CoverageError: if parts are missing or do not make a whole checkpoint.
        CorruptionError: if a pack that it needs is missing or has the wrong size.
        StorageError: if the store cannot be written or the lock is taken.
    """
    check_tag(tag)
    with store.lock(LOCK, timeout_s):
        check_current(store, attempt)
        done = _already_committed(store, tag, save_id)
        if done is not None:
            if save_latest and _is_newest(store, done):
                store.write(LATEST, tag.encode())
            return done
        parts = [part for part in read_parts(store, tag, save_id) if part.save_id == save_id]
        _check_world(parts, world, f"{tag}/{save_id}")
        line = ancestry(store, attempt)
        _check_timeline(store, parts, attempt, line)
        step = parts[0].step if parts else 0
        if base is None:
            base = find_base(store, missing_experts(parts, moe_layers), step, line)
        manifest = merge_parts(
            parts,
            topology=topology,
            moe_layers=moe_layers,
            parameters=parameters,
            created=time.time(),
            base=base,
            is_admissible=lambda version: admissible(version, line),
            ledger=ledger,
            selected=selected,
        )
        manifest = msgspec.structs.replace(manifest, kept=not save_latest)
        _check_files(store, manifest)
        store.write(manifest_key(tag), encode_manifest(manifest))
        if save_latest:
            store.write(LATEST, tag.encode())
    return manifest


def check_current(store: Store, attempt: int) -> None:
    """Raises unless `attempt` is the newest attempt of the directory.

    Raises:
        StaleAttemptError: if it is not.
    """
    newest = current_attempt(store)
    if newest is None or newest.attempt != attempt:
        found = f"attempt {newest.attempt}" if newest else "no attempt at all"
        raise StaleAttemptError(
            f"attempt {attempt} may not publish here: the directory belongs to {found}",
            where=store.locate(ATTEMPTS),
            fix="another run was started on this directory; stop one of the two, or give it another save_dir",
        )


def _already_committed(store: Store, tag: str, save_id: str) -> Manifest | None:
    """Returns the manifest if this very save is committed (a damaged or other manifest is going to be replaced)."""
    try:
        manifest = load_manifest(store, tag) if store.exists(manifest_key(tag)) else None
    except StorageError:
        return None
    return manifest if manifest is not None and manifest.save_id == save_id else None


def _is_newest(store: Store, manifest: Manifest) -> bool:
    """Tells whether `latest` should name this commit; a crash may have come between manifest and `latest`."""
    newest = next((item for item in list_checkpoints(store) if not item.error), None)
    return newest is not None and newest.tag == manifest.tag and latest_tag(store) != manifest.tag


def _check_world(parts: Sequence[Part], world: int, where: str) -> None:
    for part in parts:
        if part.world != world:
            raise StorageError(
                f"rank {part.rank} wrote its part in a world of {part.world} ranks, the commit is of {world}",
                where=where,
                fix="no checkpoint was committed; save again",
            )


def _check_timeline(store: Store, parts: Sequence[Part], attempt: int, line: list[tuple[int, int | None]]) -> None:
    """Refuses a save of an older attempt that the current one did not continue from (it was rolled back)."""
    for part in parts:
        if not admissible((part.attempt, part.step), line):
            raise StaleAttemptError(
                f"the save is of step {part.step} of attempt {part.attempt}, which is not in the past of attempt "
                f"{attempt}",
                where=store.locate(f"{part.tag}/{part.save_id}"),
                fix="a restart from an older step gave this save up; save again",
            )


def _check_files(store: Store, manifest: Manifest) -> None:
    """Checks that every file the manifest needs is there with the right size, those of older checkpoints too."""
    for extra in manifest.extra.values():
        if not store.exists(extra.path):
            raise StorageError(
                "a file that a rank reported is not there",
                where=store.locate(extra.path),
                fix="check that all nodes mount the same directory",
            )
    with ThreadPoolExecutor(_CHECKS_AT_ONCE, thread_name_prefix="moc-commit") as workers:
        try:
            for _ in workers.map(lambda pack: PackReader(store, pack.path, pack.nbytes).check(), manifest.packs):
                pass
        except CorruptionError as error:
            raise CorruptionError(
                error.what,
                where=error.where,
                fix="no checkpoint was committed; save again: what older checkpoints have lost is then saved anew",
            ) from error
