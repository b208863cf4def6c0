"""Which checkpoint a load takes, and what becomes of it when files are damaged: older versions, said loudly.

Rank 0 looks at the directory. What the ranks find damaged while they read they tell each other; then all of them read
again, with the experts' next older versions or the checkpoint before, until all is whole or nothing is left to try.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from moc_ckpt.errors import CheckpointNotFoundError, CorruptionError, FormatError, NewerFormatError, StorageError
from moc_ckpt.integrations.deepspeed.load import Damaged, InMemory, LoadRequest, read
from moc_ckpt.recovery.restorer import Damage
from moc_ckpt.recovery.versions import StoredCheckpoint, UnitSource, plan_versions, stored_checkpoint
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.attempts import Ancestry, admissible, ancestry, current_attempt
from moc_ckpt.storage.checkpoint import check_tag, latest_tag, list_tags, load_manifest, part_version
from moc_ckpt.storage.commit import is_interrupted
from moc_ckpt.storage.manifest import Manifest, decode_manifest, encode_manifest
from moc_ckpt.storage.merge import replace_experts
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import compact_units

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Found", "Setback", "find_and_read"]

logger = logging.getLogger("moc_ckpt")

# Looking for checkpoints that `latest` should name reads manifests, which are large in a large world.
_MOST_LOOKED_AT = 32


class Setback(NamedTuple):
    """What damage costs a restore; small and picklable.

    Attributes:
        replaced: experts that are restored from other manifests than the checkpoint's own.
        passed_over: newer checkpoints that could not be restored, the newest first.
    """

    replaced: tuple[UnitSource, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def spoilt(self) -> dict[str, Version]:
        """By expert, the version that was found damaged."""
        return {item.unit: item.wanted for item in self.replaced if item.version <= item.wanted}


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was read.

    Attributes:
        store: the directory.
        manifest: the checkpoint, with the places of what is restored in the end.
        memory: what was read.
        setback: what damage cost.
        plt_cost: how much more PLT the restore costs for it.
    """

    store: Store
    manifest: Manifest
    memory: InMemory
    setback: Setback
    plt_cost: float


class _Target(NamedTuple):
    """What rank 0 tells the others to read."""

    manifest: bytes
    setback: Setback
    plain: bytes | None
    """The checkpoint's own manifest, if that is another."""


def find_and_read(moc: MocCheckpoint, load_dir: str, tag: str | None, request: LoadRequest) -> Found | None:
    """Finds a checkpoint and reads it into host memory; collective. The engine is untouched.

    Args:
        moc: the engine's plugin.
        load_dir: path or URL.
        tag: exactly this checkpoint; None: the one that `latest` names, or the newest before it that can be read.
        request: how to load.

    Returns:
        What was read; None if nothing is saved there.

    Raises:
        MocError: on all ranks: the checkpoint cannot be restored.
    """
    comm = moc.comm
    search = _Search(load_dir, tag, moc.config.recovery.require_resume)
    target = comm.from_first("finding the checkpoint", search.start, wait="commit")
    if target is None:
        return None
    store = comm.agree("opening the directory", lambda: open_store(load_dir), wait="rendezvous")
    while True:
        manifest = decode_manifest(target.manifest, load_dir)
        memory = read(moc, store, manifest, request)
        if isinstance(memory, InMemory):
            break
        answer = comm.from_first(
            "looking for older versions", partial(search.without, memory.everywhere), wait="commit"
        )
        if isinstance(answer, str):
            _refuse(moc, memory, answer)
        target = answer
    cost = 0.0
    if target.plain is not None and memory.experts is not None:
        undamaged = moc.pec.read(decode_manifest(target.plain, load_dir))
        cost = memory.experts.ledger.plt - undamaged.ledger.plt if undamaged is not None else 0.0
    return Found(store, manifest, memory, target.setback, cost)


def _refuse(moc: MocCheckpoint, damaged: Damaged, why: str) -> NoReturn:
    """Raises on all ranks what each found itself, or what another rank found."""

    def tell() -> None:
        for item in damaged.own:
            raise CorruptionError(f"{item.what}{why}", where=item.where, fix=item.fix)

    moc.comm.agree("reading the checkpoint", tell)
    raise AssertionError("some rank found damage")


class _Search:
    """One load's search in a directory. Belongs to rank 0.

    Args:
        load_dir: path or URL.
        tag: exactly this checkpoint, or None.
        required: it is an error if nothing is saved.
    """

    def __init__(self, load_dir: str, tag: str | None, required: bool) -> None:
        self._dir = load_dir
        self._required = required
        self._tag = tag
        self._known: dict[str, Manifest | None] = {}
        self._stored: dict[str, StoredCheckpoint] = {}
        self._damaged: set[tuple[str, str]] = set()
        self._unusable: set[str] = set()
        self._lost: list[str] = []
        self._line: Ancestry | None = None
        self._at_most: Version | None = None
        self._prefer: str | None = None
        self._current = ""

    def start(self) -> _Target | None:
        """Returns what to read first; None if nothing is saved."""
        self._store = open_store(self._dir)
        if self._tag is not None:
            manifest = load_manifest(self._store, self._tag)
            self._begin_at(manifest)
            return self._whole(manifest)
        try:
            named = latest_tag(self._store)
            named = named if named is None else check_tag(named)
        except StorageError as error:  # its bytes are no text, or text that cannot be a tag
            return self._without_latest(error)
        if named is None:
            return self._without_latest(None)
        try:
            manifest = load_manifest(self._store, named)
        except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
            if isinstance(error, NewerFormatError):
                raise
            return self._without_named(named, error)
        manifest = self._not_behind(manifest)
        self._begin_at(manifest)
        return self._whole(manifest)

    def without(self, damage: Sequence[Damage]) -> _Target | str:
        """Returns what to read instead; a text says why there is nothing."""
        before = len(self._damaged) + len(self._unusable)
        for item in damage:
            self._damaged.update((item.pack, unit) for unit in item.units)
            if not item.units:
                self._unusable.add(self._current)
        for item in dict.fromkeys(damage):
            logger.warning("DAMAGED: %s\n  where: %s", item.what, item.where)
        if before == len(self._damaged) + len(self._unusable):
            return ""
        return self._choose()

    def _choose(self) -> _Target | str:
        tags = list_tags(self._store)
        manifests = {tag: manifest for tag in tags if (manifest := self._manifest(tag)) is not None}
        plan = plan_versions(
            [self._summary(manifest) for manifest in manifests.values()],
            damaged=self._damaged,
            unusable=self._unusable,
            line=self._line,
            tag=self._tag,
            at_most=self._at_most,
            prefer=self._prefer,
        )
        if plan is None:
            return "" if self._tag is not None else "; no older checkpoint here can be restored either"
        if plan.hopeless:
            return f"; no other version of {compact_units(plan.hopeless)} is whole here"
        target, self._current = manifests[plan.tag], plan.tag
        setback = Setback(plan.replaced, (*self._lost, *plan.passed_over))
        if not setback.replaced:
            return _Target(encode_manifest(target), setback, None)
        virtual = replace_experts(target, {item.unit: manifests[item.tag] for item in plan.replaced})
        return _Target(encode_manifest(virtual), setback, encode_manifest(target))

    def _whole(self, manifest: Manifest) -> _Target:
        self._current = manifest.tag
        return _Target(encode_manifest(manifest), Setback(), None)

    def _begin_at(self, manifest: Manifest) -> None:
        """Takes a checkpoint for the newest that counts."""
        self._known[manifest.tag] = manifest
        self._line = self._timeline(manifest.attempt)
        self._at_most = manifest.version
        self._prefer = manifest.tag

    def _timeline(self, attempt: int) -> Ancestry:
        try:
            return ancestry(self._store, attempt)
        except StorageError:
            # Nobody knows what the attempt continued: what it saved itself belongs to it in any case.
            return [(attempt, None)]

    def _manifest(self, tag: str) -> Manifest | None:
        if tag not in self._known:
            self._known[tag] = None
            with suppress(StorageError):
                self._known[tag] = load_manifest(self._store, tag)
        return self._known[tag]

    def _summary(self, manifest: Manifest) -> StoredCheckpoint:
        if manifest.tag not in self._stored:
            self._stored[manifest.tag] = stored_checkpoint(manifest)
        return self._stored[manifest.tag]

    def _without_latest(self, error: StorageError | None) -> _Target | None:
        """Goes by the manifests: `latest` is damaged, or it was lost, or a crash came before it was written."""
        found = [manifest for tag in list_tags(self._store) if (manifest := self._manifest(tag)) is not None]
        # Checkpoints that were saved aside have no part in `latest`.
        newest = max((item for item in found if not item.kept), key=lambda item: item.order, default=None)
        if newest is None:
            if error is not None:
                raise error
            if self._required:
                raise CheckpointNotFoundError(
                    "nothing is saved here, and moc_checkpoint.recovery.require_resume is set",
                    where=self._dir,
                    fix="check the directory, or unset require_resume for the first run",
                )
            return None
        reason = f"is damaged ({error.what})" if error is not None else "is missing"
        logger.warning(
            "DAMAGED: the file `latest` in %s %s; going by the manifests, the newest checkpoint is %s, step %d",
            self._store.url,
            reason,
            newest.tag,
            newest.step,
        )
        self._begin_at(newest)
        return self._whole(newest)

    def _without_named(self, named: str, error: StorageError) -> _Target:
        """Goes back from a checkpoint whose manifest cannot be read."""
        version = part_version(self._store, named)
        if version is not None:
            self._line, self._at_most = self._timeline(version.attempt), version
        else:
            with suppress(StorageError):
                newest = current_attempt(self._store)
                self._line = self._timeline(newest.attempt) if newest is not None else None
        self._known[named] = None
        self._lost.append(named)
        target = self._choose()
        if isinstance(target, str):
            raise error
        logger.warning("DAMAGED: %s\n  where: %s", error.what, error.where)
        return target

    def _not_behind(self, manifest: Manifest) -> Manifest:
        """Returns what `latest` should name: a newer checkpoint that continues it, if a crash came before it moved.

        Without such a crash it was changed on purpose, and counts; a warning says so.
        """
        tags = list_tags(self._store)
        if len(tags) > _MOST_LOOKED_AT:
            return manifest
        found = [other for tag in tags if (other := self._manifest(tag)) is not None and not other.kept]
        newer = [
            other
            for other in sorted(found, key=lambda item: item.order, reverse=True)
            if other.version > manifest.version and admissible(manifest.version, self._timeline(other.attempt))
        ]
        for other in newer:
            if is_interrupted(self._store, other):
                logger.warning(
                    "`latest` in %s names %s (step %d): a crash came before it was moved to %s (step %d), "
                    "which is loaded",
                    self._store.url,
                    manifest.tag,
                    manifest.step,
                    other.tag,
                    other.step,
                )
                return other
        if newer:
            logger.warning(
                "`latest` in %s names %s (step %d), but %s (step %d) continues it and is not loaded; give its tag "
                "to load it",
                self._store.url,
                manifest.tag,
                manifest.step,
                newer[0].tag,
                newer[0].step,
            )
        return manifest
