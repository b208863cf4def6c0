"""What `latest` stands for: the one place that decides it, for loads, for `moc-ckpt recover` and for flushes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from moc_ckpt.errors import CheckpointNotFoundError, CorruptionError, FormatError, NewerFormatError, StorageError
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.attempts import Ancestry, admissible, ancestry, current_attempt
from moc_ckpt.storage.checkpoint import check_tag, latest_tag, list_tags, load_manifest, part_version
from moc_ckpt.storage.commit import is_interrupted
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import Store

__all__ = ["Latest", "Manifests", "find_latest", "newest_of", "timeline"]

# Looking for checkpoints that `latest` should name reads manifests, which are large in a large world.
_MOST_LOOKED_AT = 32


class Manifests:
    """The manifests of a directory, each read at most once. Not thread-safe.

    Args:
        store: the checkpoint root.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._tags: list[str] | None = None
        self._found: dict[str, Manifest | StorageError] = {}

    def tags(self) -> list[str]:
        """Returns the tags that have a manifest, readable or not, as they were at the first call."""
        if self._tags is None:
            self._tags = list_tags(self.store) if self.store.root_exists() else []
        return self._tags

    def load(self, tag: str) -> Manifest:
        """Returns a manifest; errors as for `load_manifest`."""
        if tag not in self._found:
            try:
                self._found[tag] = load_manifest(self.store, tag)
            except StorageError as error:
                self._found[tag] = error
        found = self._found[tag]
        if isinstance(found, Manifest):
            return found
        raise found

    def get(self, tag: str) -> Manifest | None:
        """Returns a manifest; None if it cannot be read."""
        with suppress(StorageError):
            return self.load(tag)
        return None

    def readable(self) -> list[Manifest]:
        """Returns all that can be read, in the order of their tags."""
        return [manifest for tag in self.tags() if (manifest := self.get(tag)) is not None]

    def unreadable(self) -> list[tuple[str, StorageError]]:
        """Returns the tags whose manifests were tried and cannot be read, and why."""
        return [(tag, found) for tag, found in self._found.items() if isinstance(found, StorageError)]


@dataclass(frozen=True, slots=True)
class Latest:
    """What `latest` stands for.

    Attributes:
        manifest: the checkpoint that a load begins at; None if nothing is saved, or `named` cannot be read.
        named: the tag in the file; None if there is no file, or its bytes are no tag.
        damage: why the file, or the manifest of the checkpoint that it names, cannot be read.
        interrupted: a crash came before `latest` was moved from `named` to `manifest`.
        newer: the newest checkpoint that continues `manifest` and is not meant: `latest` was set back on purpose.
        line: the timeline of `manifest`, or of `named` as far as anything tells; None: nothing tells.
        at_most: checkpoints after this version do not count; None: all do.
    """

    manifest: Manifest | None = None
    named: str | None = None
    damage: StorageError | None = None
    interrupted: bool = False
    newer: Manifest | None = None
    line: Ancestry | None = None
    at_most: Version | None = None

    @property
    def is_right(self) -> bool:
        """The file names the checkpoint that a load begins at."""
        return self.manifest is not None and self.manifest.tag == self.named


def find_latest(manifests: Manifests) -> Latest:
    """Decides what `latest` stands for; changes nothing.

    It stands for what it names. Where a crash came between a commit and `latest` it stands for that commit
    (`storage.commit.is_interrupted`); where the file is missing or damaged, for the newest checkpoint that was not
    saved aside. Where it names what cannot be read, how far that had got bounds what may be restored instead.

    Args:
        manifests: those of the directory.

    Raises:
        StorageError: if the store cannot be read, what it names is of a newer format version, or DeepSpeed's own.
    """
    store = manifests.store
    try:
        named = latest_tag(store)
        named = named if named is None else check_tag(named)
    except StorageError as error:  # its bytes are no text, or text that cannot be a tag
        return _by_manifests(manifests, error)
    if named is None:
        return _by_manifests(manifests, None)
    try:
        manifest = manifests.load(named)
    except NewerFormatError:
        raise
    except (CorruptionError, FormatError, CheckpointNotFoundError) as error:
        return _unreadable(store, named, error)
    newer = _that_continue(manifest, manifests)
    left_behind = next((other for other in newer if is_interrupted(store, other)), None)
    if left_behind is not None:
        return _at(store, left_behind, named=named, interrupted=True)
    return _at(store, manifest, named=named, newer=newer[0] if newer else None)


def newest_of(manifests: Iterable[Manifest], line: Ancestry | None = None) -> Manifest | None:
    """Returns the newest checkpoint that `latest` may stand for (pure): those saved aside have no part in it.

    Args:
        manifests: to choose from.
        line: only those of this timeline; None: all.
    """
    found = [item for item in manifests if not item.kept and (line is None or admissible(item.version, line))]
    return max(found, key=lambda item: item.order, default=None)


def timeline(store: Store, attempt: int) -> Ancestry:
    """Returns the ancestry of an attempt; only the attempt itself if nobody knows what it continued."""
    try:
        return ancestry(store, attempt)
    except StorageError:
        return [(attempt, None)]


def _at(
    store: Store,
    manifest: Manifest,
    *,
    named: str | None,
    damage: StorageError | None = None,
    interrupted: bool = False,
    newer: Manifest | None = None,
) -> Latest:
    line = timeline(store, manifest.attempt)
    return Latest(manifest, named, damage, interrupted, newer, line, manifest.version)


def _by_manifests(manifests: Manifests, damage: StorageError | None) -> Latest:
    newest = newest_of(manifests.readable())
    if newest is None:
        return Latest(damage=damage)
    return _at(manifests.store, newest, named=None, damage=damage)


def _unreadable(store: Store, named: str, damage: StorageError) -> Latest:
    version = part_version(store, named)
    if version is not None:
        line: Ancestry | None = timeline(store, version.attempt)
        return Latest(named=named, damage=damage, line=line, at_most=version)
    line = None
    with suppress(StorageError):
        newest = current_attempt(store)
        line = timeline(store, newest.attempt) if newest is not None else None
    return Latest(named=named, damage=damage, line=line)


def _that_continue(manifest: Manifest, manifests: Manifests) -> list[Manifest]:
    """Returns the checkpoints that continue one, the newest first."""
    if len(manifests.tags()) > _MOST_LOOKED_AT:
        return []
    store = manifests.store
    later = [other for other in manifests.readable() if not other.kept and other.version > manifest.version]
    later.sort(key=lambda item: item.order, reverse=True)
    return [other for other in later if admissible(manifest.version, timeline(store, other.attempt))]
