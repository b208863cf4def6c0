"""What storage lacks of what the memory of a run that is over holds (DESIGN section 11). Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moc_ckpt.errors import StaleAttemptError, StorageError
from moc_ckpt.recovery.memory import Inventory, choose_newer
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.storage.attempts import admissible, ancestry, current_attempt
from moc_ckpt.storage.latest import Manifests, newest_of
from moc_ckpt.storage.manifest import Manifest
from moc_ckpt.storage.store import Store, open_store

__all__ = ["Flush", "plan_completion", "plan_flush", "plan_restart"]


@dataclass(frozen=True, slots=True)
class Flush:
    """What memory has that the directory lacks.

    Attributes:
        url: the directory.
        attempt: attempt of the run there.
        step: of the dense state.
        stored_step: step of the newest checkpoint of the run's timeline; None if there is none.
        experts: expert unit -> step of the version to write.
        world: number of ranks.
        newest: the newest checkpoint of the timeline that `latest` may stand for.
        nbytes: bytes of the slots to write on this node; 0 until it is known.
        dense: it has dense state of its own. Otherwise it completes `newest`, whose dense state it shares: experts of
            which memory holds something newer than that checkpoint refers to, not after its step.
        aside: tags of checkpoints that were saved aside, which stay what they are.
    """

    url: str
    attempt: int
    step: int
    stored_step: int | None
    experts: Mapping[str, int]
    world: int
    newest: Manifest | None
    nbytes: int = 0
    dense: bool = True
    aside: frozenset[str] = frozenset()

    @property
    def tag(self) -> str:
        """Tag of the checkpoint that it makes: the one that storage has of this step, if there is one."""
        if self.newest is not None and (not self.dense or self.newest.step == self.step):
            return self.newest.tag
        tag = f"global_step{self.step}"
        return tag if tag not in self.aside else f"{tag}_flushed"


def plan_flush(memory: Inventory, store: Store) -> Flush | None:
    """Finds what memory has that a directory lacks; writes nothing.

    Args:
        memory: what the nodes hold.
        store: the checkpoint root.

    Returns:
        What to write; None if the directory has all of it.

    Raises:
        StorageError: if memory holds no whole state for this directory: says why.
        StaleAttemptError: if a later run owns the directory.
    """
    attempt = _attempt_of(memory, store)
    if memory.absent:
        raise StorageError(
            f"the memory of ranks {', '.join(map(str, memory.absent))} of {memory.world} is not here, "
            "and dense state is sharded over all",
            where=store.url,
            fix="look on their nodes; where one is lost, the next start goes on from the newest checkpoint on storage, "
            "with the experts that memory has newer than that",
        )
    chosen = memory.choose()
    if chosen is None:
        raise StorageError(
            "memory holds no snapshot that is whole on every rank",
            where=store.url,
            fix="the newest checkpoint on storage is what there is",
        )
    _check_attempt(store, attempt)
    manifests = _timeline(store, attempt)
    # What was saved aside has no part in `latest`, so no restart goes on from it.
    newest = newest_of(manifests)
    stored = _stored(store, attempt, manifests, chosen.step)
    experts = {unit: step for unit, step in chosen.experts.items() if step > stored.get(unit, -1)}
    if newest is not None and newest.step >= chosen.step and not experts:
        return None
    stored_step = newest.step if newest is not None else None
    aside = frozenset(manifest.tag for manifest in manifests if manifest.kept)
    return Flush(store.url, attempt, chosen.step, stored_step, experts, memory.world, newest, aside=aside)


def plan_completion(memory: Inventory, store: Store) -> Flush | None:
    """Finds the experts that memory has newer than the newest checkpoint refers to, not after its step; writes nothing.

    What is left where a node is lost with its memory: dense state comes back at the last commit, and the experts whose
    owners are all here at their newest version up to it (DESIGN section 11).

    Args:
        memory: what the nodes that are left hold.
        store: the checkpoint root.

    Returns:
        What to write; None if memory has nothing newer, or this run has committed nothing.

    Raises:
        StorageError: if memory belongs to no directory, or to another.
        StaleAttemptError: if a later run owns the directory.
    """
    attempt = _attempt_of(memory, store)
    _check_attempt(store, attempt)
    manifests = _timeline(store, attempt)
    newest = newest_of(manifests)
    # Of a run that has restored and not yet committed memory holds nothing that is not after the checkpoint.
    if newest is None or newest.attempt != attempt:
        return None
    stored = _stored(store, attempt, manifests, newest.step)
    known = {unit.name for unit in newest.units}
    experts = {
        unit: step
        for unit, step in choose_newer(memory.ranks, memory.world, newest.step, stored).items()
        if unit in known
    }
    if not experts:
        return None
    return Flush(store.url, attempt, newest.step, newest.step, experts, memory.world, newest, dense=False)


def plan_restart(memory: Inventory, store: Store) -> Flush | None:
    """Finds what a start brings to storage, of a run that may have lost nodes; writes nothing.

    Arguments, return value and errors as of `plan_flush`, which it falls back from to `plan_completion`.
    """
    try:
        flush = plan_flush(memory, store)
    except StorageError:
        # Too little is left for a state of its own.
        flush = plan_completion(memory, store)
        if flush is None:
            raise
        return flush
    if flush is not None and flush.stored_step is not None and flush.step < flush.stored_step:
        # Experts of a step before the newest checkpoint are of use in that one alone.
        return plan_completion(memory, store)
    return flush


def _attempt_of(memory: Inventory, store: Store) -> int:
    """Returns the attempt that memory belongs to; raises StorageError if it is not one of this directory."""
    if memory.url is None or memory.attempt is None:
        raise StorageError(
            "what memory holds has not been saved into any directory since the run began or restored, "
            "so nobody knows which timeline it belongs to",
            where=store.url,
            fix="the newest checkpoint on storage is what there is; set save_dir, so that runs save early",
        )
    if open_store(memory.url).url != store.url:
        raise StorageError(
            f"what memory holds belongs to {memory.url}", where=store.url, fix="name that directory instead"
        )
    return memory.attempt


def _check_attempt(store: Store, attempt: int) -> None:
    """Raises StaleAttemptError if a later run owns the directory."""
    newest = current_attempt(store)
    if newest is None or newest.attempt != attempt:
        raise StaleAttemptError(
            f"what memory holds is of attempt {attempt}; the directory belongs to "
            f"{f'attempt {newest.attempt}' if newest else 'nobody'}",
            where=store.url,
            fix="a later run went on from an older state; what it saved is what counts",
        )


def _timeline(store: Store, attempt: int) -> list[Manifest]:
    """Returns the readable checkpoints of a timeline."""
    line = ancestry(store, attempt)
    return [manifest for manifest in Manifests(store).readable() if admissible(manifest.version, line)]


def _stored(store: Store, attempt: int, manifests: Sequence[Manifest], step: int) -> dict[str, int]:
    """Returns the step of each expert's newest version up to `step` in the checkpoints of a timeline."""
    line = ancestry(store, attempt)
    found: dict[str, int] = {}
    for manifest in manifests:
        for unit in manifest.units:
            if parse_expert_unit(unit.name) is not None and unit.step <= step and admissible(unit.version, line):
                found[unit.name] = max(unit.step, found.get(unit.name, -1))
    return found
