"""Commit: the moment at which a save becomes a checkpoint (invariants I1, I4)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from moc_ckpt.errors import CorruptionError, CoverageError, StaleAttemptError, StorageError
from moc_ckpt.storage.attempts import Ancestry, admissible, ancestry, current_attempt
from moc_ckpt.storage.base import find_base
from moc_ckpt.storage.checkpoint import (
    ATTEMPTS,
    LATEST,
    LOCK,
    STATE,
    Outcome,
    PartsStatus,
    check_tag,
    latest_tag,
    load_manifest,
    manifest_key,
    parts_status,
    pointer_key,
    read_extra,
    read_outcome,
    read_parts,
    write_extra,
    write_failure,
    write_outcome,
)
from moc_ckpt.storage.manifest import Manifest, Part, encode_manifest
from moc_ckpt.storage.merge import check_parts, commit_info, complete_experts, merge_parts, merge_state, missing_experts
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store

__all__ = [
    "Outcome",
    "PartsStatus",
    "check_current",
    "commit",
    "commit_experts",
    "finish_pointer",
    "is_interrupted",
    "parts_status",
    "read_outcome",
    "write_failure",
    "write_outcome",
]

_CHECKS_AT_ONCE = 8


def commit(
    store: Store,
    tag: str,
    save_id: str,
    *,
    attempt: int,
    base: Sequence[Manifest] | None = None,
    timeout_s: float = 60.0,
) -> Manifest:
    """Publishes a save whose parts are all there. Everything it needs to know is in the parts.

    A save that is already committed is left as it is, so several may try. Holds the directory's lock, so that neither
    garbage collection nor a new attempt comes in between.

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.
        save_id: the save; parts of others are ignored.
        attempt: the attempt that commits; must be the newest one.
        base: older checkpoints to take those experts from that no part holds; None: as many of this directory as
            needed, the newest commit first.
        timeout_s: seconds to wait for the lock.

    Returns:
        The manifest.

    Raises:
        StaleAttemptError: if a newer attempt owns the directory, the save is not in this attempt's past, or the tag
            has a newer checkpoint already.
        CoverageError: if parts are missing or do not make a whole checkpoint.
        CorruptionError: if a pack that it needs is missing or has the wrong size.
        StorageError: if the store cannot be written or the lock is taken.
    """
    check_tag(tag)
    with store.lock(LOCK, timeout_s):
        check_current(store, attempt)
        line = ancestry(store, attempt)
        done = _existing(store, tag)
        if done is None or done.save_id != save_id:
            parts = _read(store, tag, save_id)
            manifest = _merge(store, parts, attempt, line, base)
            if done is not None and _is_later(done, manifest, line):
                raise StaleAttemptError(
                    f"checkpoint {tag} is of step {done.step} already, this save is of step {manifest.step}",
                    where=store.locate(f"{tag}/{save_id}"),
                    fix="nothing is lost: a later save under the same tag was committed first",
                )
            state = write_extra(store, tag, save_id, STATE, merge_state(parts))
            done = msgspec.structs.replace(manifest, extra={**manifest.extra, STATE: state})
            _check_files(store, done)
            if not done.kept:
                # Should a crash come between manifest and `latest`, this says that nobody meant it to stay behind.
                store.write(pointer_key(tag, save_id), b"")
            store.write(manifest_key(tag), encode_manifest(done))
        if not done.kept:
            _move_latest(store, done, line)
            store.delete(pointer_key(tag, save_id))
    return done


def commit_experts(
    store: Store,
    base: Manifest,
    save_id: str,
    *,
    attempt: int,
    ledger: dict[str, object] | None,
    timeout_s: float = 60.0,
) -> Manifest:
    """Publishes a checkpoint again, with newer versions of some experts, from parts that hold these alone.

    Everything else of it stays what and where it is; its small files are copied, since retention removes those of
    replaced saves. `latest` does not move. Holds the directory's lock; a save that is committed already is left as it
    is.

    Args:
        store: the checkpoint root.
        base: the checkpoint.
        save_id: the save of the parts; they are those of its ranks that have something.
        attempt: the attempt that commits; must be the newest one.
        ledger: takes the place of the checkpoint's.
        timeout_s: seconds to wait for the lock.

    Returns:
        The new manifest, under the same tag.

    Raises:
        StaleAttemptError: if a newer attempt owns the directory, or the tag was saved again meanwhile.
        CoverageError: if the parts do not make whole experts.
        CorruptionError: if a pack or a small file that it needs is missing or damaged.
        StorageError: if the store cannot be written or the lock is taken.
    """
    with store.lock(LOCK, timeout_s):
        check_current(store, attempt)
        line = ancestry(store, attempt)
        present = load_manifest(store, base.tag)
        if present.save_id == save_id:
            return present
        if present.save_id != base.save_id:
            raise StaleAttemptError(
                f"checkpoint {base.tag} was saved again meanwhile",
                where=store.locate(manifest_key(base.tag)),
                fix="nothing is lost: what was saved there counts",
            )
        parts = [part for part in read_parts(store, base.tag, save_id) if part.save_id == save_id]
        done = complete_experts(
            present, parts, created=time.time(), is_admissible=lambda version: admissible(version, line)
        )
        with ThreadPoolExecutor(_CHECKS_AT_ONCE, thread_name_prefix="moc-commit") as workers:
            copies = workers.map(
                lambda item: write_extra(store, base.tag, save_id, item[0], read_extra(store, item[1])),
                present.extra.items(),
            )
            extra = dict(zip(present.extra, copies, strict=True))
        done = msgspec.structs.replace(done, extra=extra, ledger=ledger)
        _check_files(store, done)
        interrupted = is_interrupted(store, present)
        if interrupted:
            store.write(pointer_key(base.tag, save_id), b"")
        store.write(manifest_key(base.tag), encode_manifest(done))
        if interrupted:
            _move_latest(store, done, line)
            store.delete(pointer_key(base.tag, save_id))
    return done


def is_interrupted(store: Store, manifest: Manifest) -> bool:
    """Tells whether a crash came between the commit of a checkpoint and `latest`, which therefore may not name it."""
    return not manifest.kept and store.exists(pointer_key(manifest.tag, manifest.save_id))


def finish_pointer(store: Store, manifest: Manifest, timeout_s: float = 30.0) -> None:
    """Lets `latest` name a checkpoint whose commit was interrupted.

    Raises:
        StorageError: if the store cannot be written or the lock is taken.
    """
    with store.lock(LOCK, timeout_s):
        store.write(LATEST, manifest.tag.encode())
        store.delete(pointer_key(manifest.tag, manifest.save_id))


def _read(store: Store, tag: str, save_id: str) -> list[Part]:
    """Returns the parts of a save, checked to be one of every rank."""
    parts = [part for part in read_parts(store, tag, save_id) if part.save_id == save_id]
    try:
        check_parts(parts)
    except CoverageError as error:
        failed = parts_status(store, tag, save_id).failed
        if not failed:
            raise
        told = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(failed.items()))
        raise CoverageError(f"{error.what} ({told})", where=error.where, fix=error.fix) from error
    return parts


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


def _existing(store: Store, tag: str) -> Manifest | None:
    """Returns the tag's manifest; None if there is none or it is damaged (it is going to be replaced then)."""
    try:
        return load_manifest(store, tag) if store.exists(manifest_key(tag)) else None
    except StorageError:
        return None


def _is_later(other: Manifest, manifest: Manifest, line: Ancestry) -> bool:
    """Tells whether `other` is from later in the same timeline."""
    return other.version > manifest.version and admissible(other.version, line)


def _move_latest(store: Store, manifest: Manifest, line: Ancestry) -> None:
    """Lets `latest` name a commit unless it names a later one: saves may be committed late, or again after a crash."""
    named = None
    with suppress(StorageError):  # a damaged one is replaced
        named = latest_tag(store)
    if named == manifest.tag:
        return
    present = _existing(store, named) if named is not None else None
    if present is None or not _is_later(present, manifest, line):
        store.write(LATEST, manifest.tag.encode())


def _merge(
    store: Store, parts: Sequence[Part], attempt: int, line: Ancestry, base: Sequence[Manifest] | None
) -> Manifest:
    """Makes the manifest from the parts, still without `state.msgpack`."""
    _check_timeline(store, parts, attempt, line)
    if base is None:
        base = find_base(store, missing_experts(parts, commit_info(parts).moe_layers), parts[0].step, line)
    return merge_parts(parts, created=time.time(), base=base, is_admissible=lambda version: admissible(version, line))


def _check_timeline(store: Store, parts: Sequence[Part], attempt: int, line: Ancestry) -> None:
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
