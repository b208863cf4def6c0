"""Which checkpoint of a directory to read, and what instead where reading it finds damage. Reads manifests only.

`load_checkpoint` reads what this names; `moc-ckpt recover` looks at the same files and restores nothing. Both tell it
what they find damaged, and get what to read instead: so one says what the other does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moc_ckpt.recovery.checks import Damage
from moc_ckpt.recovery.versions import StoredCheckpoint, UnitSource, plan_versions, stored_checkpoint
from moc_ckpt.state.unit import Version
from moc_ckpt.state.unit_text import compact_units
from moc_ckpt.storage.latest import Latest, Manifests, find_latest, timeline
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.merge import replace_experts
from moc_ckpt.storage.store import Store

__all__ = ["Search", "Setback", "Target"]


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


class Target(NamedTuple):
    """What to read.

    Attributes:
        manifest: the checkpoint, with the places of what is to be restored.
        setback: what damage costs.
        plain: the checkpoint's own manifest, if that is another.
    """

    manifest: Manifest
    setback: Setback = Setback()
    plain: Manifest | None = None


class Search:
    """One search in a directory. Not thread-safe, not collective.

    Args:
        store: the checkpoint root.
        tag: exactly this checkpoint; None: the one that `latest` stands for, or the newest before it that can be read.

    Attributes:
        manifests: those of the directory, as far as they were read.
        latest: what `latest` stands for; None with a tag, and before `start`.
    """

    def __init__(self, store: Store, tag: str | None = None) -> None:
        self.manifests = Manifests(store)
        self.latest: Latest | None = None
        self._store = store
        self._tag = tag
        self._stored: dict[str, StoredCheckpoint] = {}
        self._damaged: set[tuple[str, str]] = set()
        self._unusable: set[str] = set()
        self._begin = Latest()
        self._current = ""

    def start(self) -> Target | None:
        """Returns what to read first; None if nothing is saved.

        Raises:
            StorageError: if there is something and no manifest of it can be read.
        """
        if self._tag is not None:
            manifest = self.manifests.load(self._tag)
            line = timeline(self._store, manifest.attempt)
            self._begin = Latest(manifest, self._tag, line=line, at_most=manifest.version)
            return self._whole(manifest)
        self._begin = self.latest = find_latest(self.manifests)
        if self._begin.manifest is not None:
            return self._whole(self._begin.manifest)
        if self._begin.named is not None:
            target = self._choose()
            if isinstance(target, Target):
                return target
        if self._begin.damage is not None:
            raise self._begin.damage
        return None

    def without(self, damage: Sequence[Damage]) -> Target | str:
        """Returns what to read instead of what was named last; a text says why there is nothing.

        Args:
            damage: what was found damaged in it, on any rank.
        """
        before = len(self._damaged) + len(self._unusable)
        for item in damage:
            self._damaged.update((item.pack, unit) for unit in item.units)
            if not item.units:
                self._unusable.add(self._current)
        if before == len(self._damaged) + len(self._unusable):
            return ""
        return self._choose()

    def _choose(self) -> Target | str:
        begin = self._begin
        readable = {manifest.tag: manifest for manifest in self.manifests.readable()}
        plan = plan_versions(
            [self._summary(manifest) for manifest in readable.values()],
            damaged=self._damaged,
            unusable=self._unusable,
            line=begin.line,
            tag=self._tag,
            at_most=begin.at_most,
            prefer=begin.manifest.tag if begin.manifest is not None else None,
        )
        if plan is None:
            return "" if self._tag is not None else "; no older checkpoint here can be restored either"
        if plan.hopeless:
            return f"; no other version of {compact_units(plan.hopeless)} is whole here"
        target, self._current = readable[plan.tag], plan.tag
        # What `latest` names and nobody can read was passed over as well.
        lost = (begin.named,) if begin.manifest is None and begin.named is not None else ()
        setback = Setback(plan.replaced, (*lost, *plan.passed_over))
        if not setback.replaced:
            return Target(target, setback)
        virtual = replace_experts(target, {item.unit: readable[item.tag] for item in plan.replaced})
        return Target(virtual, setback, target)

    def _whole(self, manifest: Manifest) -> Target:
        self._current = manifest.tag
        return Target(manifest)

    def _summary(self, manifest: Manifest) -> StoredCheckpoint:
        if manifest.tag not in self._stored:
            self._stored[manifest.tag] = stored_checkpoint(manifest)
        return self._stored[manifest.tag]
