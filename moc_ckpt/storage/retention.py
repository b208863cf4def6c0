"""Which checkpoints and packs may go, and removing them (invariant I6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from moc_ckpt.errors import StorageError
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.attempts import admissible, ancestry, current_attempt
from moc_ckpt.storage.checkpoint import (
    LOCK,
    latest_tag,
    list_tags,
    load_manifest,
    manifest_key,
    outcome_key,
    parts_status,
    read_outcome,
    read_parts,
    save_prefix,
)
from moc_ckpt.storage.commit import check_current
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import Store

__all__ = ["RetentionPlan", "RetentionReport", "apply_retention", "plan_retention"]

_PACK_DIR = re.compile(r"^rank_\d{5,}\.(dense|experts)$")
_PART = re.compile(r"/parts/rank_\d{5,}(\.failed)?\.json$")
_SAVE_DIRS = frozenset({"parts", "packs", "extra"})


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What to keep and what may go.

    Attributes:
        keep: tags that stay, the newest first (`Manifest.order`).
        drop: tags that go, the oldest first.
        needed: paths of all packs that a staying tag refers to.
        removable: paths of packs that only going tags refer to.
    """

    keep: tuple[str, ...]
    drop: tuple[str, ...]
    needed: frozenset[str]
    removable: frozenset[str]


@dataclass(slots=True)
class RetentionReport:
    """What `apply_retention` did, or with `dry_run` would do.

    Attributes:
        kept: tags that stay, the newest first.
        dropped: tags that went.
        packs: paths of the packs that were removed.
        saves: directories of unfinished or replaced saves that were removed, wholly or but for needed packs.
        in_flight: directories of saves that stay because they are, or may be, in flight.
        spared: directories of unfinished saves that are newer than the newest commit: somebody may still finish them.
        damaged: tags that stay but do not count as kept, since `damage` found something -> what that is.
        blocked: why nothing was removed; empty if something could be.
    """

    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    packs: list[str] = field(default_factory=list)
    saves: list[str] = field(default_factory=list)
    in_flight: list[str] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    blocked: str = ""


def plan_retention(
    manifests: Sequence[Manifest],
    *,
    keep_last: int,
    keep_every: int = 0,
    protect: Collection[str] = (),
    damaged: Callable[[Manifest], bool] = lambda manifest: False,
) -> RetentionPlan:
    """Chooses which checkpoints stay (pure).

    Args:
        manifests: all committed checkpoints of a directory.
        keep_last: number of newest checkpoints that stay; 0 keeps all. The newest one stays in any case. Commits that
            were saved aside (`Manifest.kept`) stay and do not count.
        keep_every: checkpoints whose step is a multiple of this stay as well; 0 for none.
        protect: tags that stay in any case.
        damaged: tells whether a checkpoint is; such a one stays, but does not count in `keep_last`. Asked only of
            those that would count.

    Returns:
        The plan.

    Raises:
        ValueError: if a number is negative.
    """
    if keep_last < 0 or keep_every < 0:
        raise ValueError(f"keep_last {keep_last} and keep_every {keep_every} must not be negative")
    ordered = sorted(manifests, key=lambda item: item.order, reverse=True)
    keep: list[Manifest] = []
    drop: list[Manifest] = []
    position = 0
    for manifest in ordered:
        counts = keep_last > 0 and not manifest.kept and position < keep_last
        position += counts and not damaged(manifest)
        stays = (
            manifest.kept
            or keep_last == 0
            or counts
            or (keep_every > 0 and manifest.step % keep_every == 0)
            or manifest.tag in protect
        )
        (keep if stays else drop).append(manifest)
    needed = frozenset(path for manifest in keep for path in manifest.pack_paths)
    gone = frozenset(path for manifest in drop for path in manifest.pack_paths)
    return RetentionPlan(
        keep=tuple(manifest.tag for manifest in keep),
        drop=tuple(manifest.tag for manifest in reversed(drop)),
        needed=needed,
        removable=gone - needed,
    )


def apply_retention(
    store: Store,
    *,
    keep_last: int,
    keep_every: int = 0,
    protect: Collection[str] = (),
    in_flight: Collection[str] | Callable[[str], bool] = (),
    attempt: int | None = None,
    may_be_written: Callable[[str, str], bool] = lambda tag, save_id: False,
    remnants: bool = False,
    removing: Callable[[str], None] = lambda key: None,
    damage: Callable[[Manifest], str] = lambda manifest: "",
    dry_run: bool = False,
    timeout_s: float = 60.0,
) -> RetentionReport:
    """Removes old checkpoints, and what unfinished and replaced saves left behind.

    Holds the directory's lock, so that no commit begins to refer to a pack meanwhile. A checkpoint's manifest goes
    before its data, so a crash half-way leaves no broken checkpoint; the next call finishes the work. Directories
    and files that this package did not write are not touched.

    An unfinished save goes only once a commit is at or past its step (before that `moc-ckpt recover` might still
    finish it); one that no rank finished a part of, or that a rank gave up, goes unless it is in flight.

    The newest checkpoint that the current attempt may build on stays too: after a restart from an older step that is
    not the newest one of the directory, and a save in flight may refer to its experts.

    Args:
        store: the checkpoint root.
        keep_last: number of newest checkpoints that stay; 0 keeps all.
        keep_every: checkpoints whose step is a multiple of this stay as well; 0 for none.
        protect: tags that stay in any case; the one that `latest` names always does.
        in_flight: save ids that any node may be writing at the moment, or a function that tells whether one is. With
            asynchronous saves the caller must know them all: an older save that finishes late looks like one that
            was abandoned.
        attempt: the attempt that asks, which must be the newest one; None if no run is using the directory.
        may_be_written: tells of a save (tag, save id) that was not committed whether somebody may still be writing it.
            Unlike `in_flight` this is not asked of saves whose tag was committed at a later step since.
        remnants: remove also what is left of saves when only the note of how they ended is left of them, or empty
            directories. Agents may still wait for such a note while a run saves.
        removing: called with every object or directory that is going to be removed, before it is; also in a dry run.
        damage: says what is wrong with a checkpoint, empty if nothing is. Older ones are kept in the place of those
            with which something is.
        dry_run: remove nothing, only report.
        timeout_s: seconds to wait for the lock.

    Returns:
        What was removed. If a manifest cannot be read, nothing is, since it may need any pack: see `blocked`.

    Raises:
        StaleAttemptError: if a newer attempt owns the directory.
        StorageError: if something cannot be removed or the lock is taken.
    """
    is_in_flight = in_flight if callable(in_flight) else in_flight.__contains__
    with store.lock(LOCK, timeout_s):
        if attempt is not None:
            check_current(store, attempt)
        try:
            manifests = [load_manifest(store, tag) for tag in list_tags(store)]
            latest = latest_tag(store)
            base = _build_on(store, manifests)
        except StorageError as exc:
            return RetentionReport(blocked=str(exc))
        if not manifests:
            return RetentionReport(blocked="there is no committed checkpoint: nothing is removed before a commit")
        found: dict[str, str] = {}

        def damaged(manifest: Manifest) -> bool:
            what = damage(manifest)
            if what:
                found[manifest.tag] = what
            return bool(what)

        plan = plan_retention(
            manifests,
            keep_last=keep_last,
            keep_every=keep_every,
            protect={*protect, *base, *([latest] if latest else [])},
            damaged=damaged,
        )
        report = RetentionReport(kept=plan.keep, dropped=plan.drop, damaged=found)
        for tag in plan.drop:
            removing(manifest_key(tag))
            if not dry_run:
                store.delete(manifest_key(tag))
        current = {manifest.tag: manifest for manifest in manifests if manifest.tag in plan.keep}
        dropped = {(manifest.tag, manifest.save_id) for manifest in manifests if manifest.tag in plan.drop}
        horizon = max(manifest.version for manifest in manifests)
        for tag, save_id in _find_saves(store, remnants=remnants):
            if tag in current and current[tag].save_id == save_id:
                continue
            gone = (tag, save_id) in dropped
            if not gone and (
                is_in_flight(save_id)
                or (may_be_written(tag, save_id) and not _is_replaced(store, tag, save_id, current))
            ):
                report.in_flight.append(save_prefix(tag, save_id))
            elif gone or _is_past(store, tag, save_id, horizon):
                _remove_save(store, tag, save_id, plan.needed, report, removing, dry_run=dry_run)
                if not dry_run and tag not in current:
                    store.prune(tag)
            else:
                report.spared.append(save_prefix(tag, save_id))
    return report


def _build_on(store: Store, manifests: Sequence[Manifest]) -> set[str]:
    """Returns the tags of the newest version that the current attempt continues; none if no run was ever here."""
    newest = current_attempt(store)
    if newest is None:
        return set()
    line = ancestry(store, newest.attempt)
    versions = [manifest.version for manifest in manifests if admissible(manifest.version, line)]
    return {manifest.tag for manifest in manifests if versions and manifest.version == max(versions)}


def _is_replaced(store: Store, tag: str, save_id: str, current: Mapping[str, Manifest]) -> bool:
    """Tells whether a save can never be committed: its tag was, at a later step of the same attempt."""
    manifest = current.get(tag)
    if manifest is None:
        return False
    try:
        parts = read_parts(store, tag, save_id)
    except StorageError:
        return False
    return bool(parts) and all(part.attempt == manifest.attempt and part.version < manifest.version for part in parts)


def _find_saves(store: Store, *, remnants: bool = False) -> list[tuple[str, str]]:
    """Returns (tag, save_id) of every directory that is a save of ours beyond doubt.

    Args:
        store: the checkpoint root.
        remnants: those too of which only the note of how they ended, or empty directories are left.
    """
    found = []
    for tag in store.list_dirs():
        for save_id in store.list_dirs(tag):
            try:
                prefix = save_prefix(tag, save_id)
            except StorageError:
                continue
            inside = set(store.list_dirs(prefix))
            packs = store.list_dirs(f"{prefix}/packs") if "packs" in inside else []
            parts = store.list(f"{prefix}/parts") if "parts" in inside else []
            shaped = all(map(_PACK_DIR.match, packs)) and all(map(_PART.search, parts))
            if not shaped or not inside <= _SAVE_DIRS:
                continue
            if packs or parts or (remnants and _is_remnant(store, tag, save_id, inside)):
                found.append((tag, save_id))
    return found


def _is_remnant(store: Store, tag: str, save_id: str, inside: set[str]) -> bool:
    """Tells whether a directory without packs and parts is what is left of a save."""
    try:
        if read_outcome(store, tag, save_id) is not None:
            return True
    except StorageError:
        return False
    return bool(inside & {"packs", "parts"}) and not store.list(save_prefix(tag, save_id))


def _is_past(store: Store, tag: str, save_id: str, horizon: Version) -> bool:
    """Tells whether nobody is going to finish a save: a commit is at or past its step, no rank wrote its part, or one
    gave up.
    """
    status = parts_status(store, tag, save_id)
    if status.failed.keys() - status.done:
        return True
    try:
        parts = read_parts(store, tag, save_id)
    except StorageError:
        return True  # a damaged part can never be committed
    return all((part.attempt, part.step) <= horizon for part in parts)


def _remove_save(
    store: Store,
    tag: str,
    save_id: str,
    needed: frozenset[str],
    report: RetentionReport,
    removing: Callable[[str], None],
    *,
    dry_run: bool,
) -> None:
    """Removes a save but for packs that are needed; the directory goes with the last of them."""
    prefix = save_prefix(tag, save_id)
    packs = [f"{prefix}/packs/{name}" for name in store.list_dirs(f"{prefix}/packs")]
    going = [pack for pack in packs if pack not in needed]
    rest = [name for name in ("extra", "parts") if store.list(f"{prefix}/{name}")]
    noted = store.exists(outcome_key(tag, save_id))
    if not going and not rest and packs and not noted:
        return  # only needed packs are left
    report.packs += going
    report.saves.append(prefix)
    note = [outcome_key(tag, save_id)] if noted else []
    for key in [prefix] if len(going) == len(packs) else [*going, *note, *(f"{prefix}/{name}" for name in rest)]:
        removing(key)
    if dry_run:
        return
    for pack in going:
        store.delete_prefix(pack)
    if noted:
        store.delete(outcome_key(tag, save_id))
    # Parts last: they tell the next call what this save was, should this one be cut off.
    for name in rest:
        store.delete_prefix(f"{prefix}/{name}")
    if len(going) == len(packs):
        store.delete_prefix(prefix)
