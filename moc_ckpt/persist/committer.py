"""From parts to a checkpoint: who waits for whom, who commits, and what comes after (DESIGN section 9). No torch.

Agents of different nodes talk through files of the save alone: parts, notes of failures, and the note of its outcome.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from moc_ckpt.errors import CorruptionError, FormatError, MocError, StorageError
from moc_ckpt.storage.checkpoint import (
    LOCK,
    PartsStatus,
    check_save_id,
    check_tag,
    load_manifest,
    manifest_key,
    pack_key,
    part_key,
    save_prefix,
)
from moc_ckpt.storage.commit import Outcome as OutcomeNote
from moc_ckpt.storage.commit import commit, parts_status, read_outcome, write_outcome
from moc_ckpt.storage.retention import RetentionReport, apply_retention
from moc_ckpt.storage.store import Store

__all__ = ["GRACE_S", "Ending", "Flight", "SaveKey", "await_commit", "discard", "retain"]

GRACE_S = 20.0
"""Seconds that other agents leave the agent of rank 0 to commit a save whose parts are all there."""
_FIRST_LOOK_S = 0.2
_LOOK_S = 1.0
_SLOWER = 1.3
_LIST_EVERY = 3
_LOCK_S = 30.0
_MOST_NAMED = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveKey:
    """Names one save.

    Attributes:
        url: the checkpoint root.
        tag: the checkpoint's tag.
        save_id: the id that the ranks agreed on.
        attempt: the attempt that saves.
        step: engine.global_steps of the save.
        world: number of ranks.
    """

    url: str
    tag: str
    save_id: str
    attempt: int
    step: int
    world: int

    def __post_init__(self) -> None:
        check_tag(self.tag)
        check_save_id(self.save_id)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a save ended.

    Attributes:
        committed: whether the checkpoint exists.
        what: what went wrong, empty if nothing did.
        where: where.
        fix: what to do about it.
        stored_bytes: bytes that the save added to the storage.
        decided_here: this process committed it, or gave it up; it is the one to log that and to apply retention.
    """

    committed: bool
    what: str = ""
    where: str = ""
    fix: str = ""
    stored_bytes: int = 0
    decided_here: bool = False

    @classmethod
    def of(cls, error: MocError, *, decided_here: bool = False) -> Ending:
        """Returns the ending of a save that an error ended."""
        return cls(False, error.what, error.where, error.fix, decided_here=decided_here)


def await_commit(
    store: Store,
    save: SaveKey,
    *,
    leads: Callable[[], bool],
    commit_s: float,
    local_failure: Callable[[], MocError | None] = lambda: None,
    wait: Callable[[float], object] = time.sleep,
    grace_s: float = GRACE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    """Sees one save to its end: a commit, or a failure that names who is to blame. Not collective.

    The agent of rank 0 (`leads`) commits as soon as every part is there, fails the save at once when a rank notes that
    it cannot finish, and gives up after `commit_s`; it notes the outcome for the others. They read that note. Should
    none come within `grace_s` of the last part (or of a failure, or of the deadline), they do its work; a commit may
    be done twice.

    Waiting costs one small read every 0.2 to 1 s, and now and then a listing of the parts.

    Args:
        store: the checkpoint root.
        save: the save.
        leads: tells whether rank 0 is on this node; its request may come after those of other ranks.
        commit_s: seconds from now within which all parts must be there.
        local_failure: returns why a rank of this node cannot finish; None while none has failed.
        wait: waits for so many seconds, or less if `local_failure` has news.
        grace_s: see above.
        clock: monotonic seconds.

    Returns:
        The ending. Failures are results, not exceptions.
    """
    begun = clock()
    look = _FIRST_LOOK_S
    decidable_since: float | None = None
    rounds = 0
    while True:
        first = leads()
        limit = begun + commit_s + (0.0 if first else grace_s)
        last = limit + grace_s  # nobody commits after it: by then the trainers have given the save up
        failure = local_failure()
        if failure is not None:
            return _give_up(store, save, Ending.of(failure), note=first)
        trouble: StorageError | None = None
        late = clock() >= limit
        try:
            told = _read_note(store, save)
            if told is not None:
                return told
            if first or late or rounds % _LIST_EVERY == 0:
                status = parts_status(store, save.tag, save.save_id)
                problem = _problem(store, save, status)
                whole = len(status.done) >= save.world
                if problem is not None or whole:
                    decidable_since = clock() if decidable_since is None else decidable_since
                    if first or clock() - decidable_since >= grace_s:
                        if problem is not None:
                            return _give_up(store, save, problem)
                        if clock() < last:
                            return _commit(store, save)
                elif late:
                    return _give_up(store, save, _absent(store, save, status, clock() - begun))
        except StorageError as error:
            trouble = error
        if clock() >= last or (trouble is not None and late):
            return _give_up(store, save, _nobody(store, save, clock() - begun, trouble))
        rounds += 1
        wait(max(min(look, limit - clock()), 0.05))
        look = min(look * _SLOWER, _LOOK_S)


def _read_note(store: Store, save: SaveKey) -> Ending | None:
    try:
        note = read_outcome(store, save.tag, save.save_id)
    except (CorruptionError, FormatError) as error:
        _log.warning("the note of how %s ended is not readable: %s", save.tag, error.what)
        return None
    return None if note is None else _from_note(store, save, note)


def _from_note(store: Store, save: SaveKey, note: OutcomeNote) -> Ending:
    if note.committed:
        return Ending(True, stored_bytes=note.stored_bytes)
    return Ending(
        False, note.error or "the save failed", store.locate(save.tag), "the next save tries again; see the event log"
    )


def _problem(store: Store, save: SaveKey, status: PartsStatus) -> Ending | None:
    """Returns the ending if a rank has given up (one that has written its part since has not)."""
    failed = sorted(status.failed.keys() - status.done)
    if not failed:
        return None
    text = status.failed[failed[0]].replace("\n  ", "; ")
    more = f" (and {_ranks(failed[1:])})" if len(failed) > 1 else ""
    return Ending(
        False,
        f"rank {failed[0]} could not write its part{more}: {text}",
        store.locate(f"{save.tag}/{save.save_id}"),
        "the next save tries again",
    )


def _absent(store: Store, save: SaveKey, status: PartsStatus, seconds: float) -> Ending:
    absent = sorted(set(range(save.world)) - status.done)
    return Ending(
        False,
        f"{_ranks(absent)} of {save.world} had not written their parts after {seconds:,.0f} s",
        store.locate(f"{save.tag}/{save.save_id}/parts"),
        "look at those ranks' nodes and agents (`moc-ckpt agent status` there), or raise timeouts.commit_s",
    )


def _nobody(store: Store, save: SaveKey, seconds: float, trouble: StorageError | None) -> Ending:
    told = f"; the last look at it failed: {trouble.what}" if trouble is not None else ""
    return Ending(
        False,
        f"the save was neither committed nor given up within {seconds:,.0f} s{told}",
        trouble.where if trouble is not None else store.locate(f"{save.tag}/{save.save_id}"),
        trouble.fix if trouble is not None else "look at the agent on the node of rank 0, and at the file system",
    )


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", …" if len(ranks) > _MOST_NAMED else "")
    return f"rank{'s' if len(ranks) != 1 else ''} {named}"


def _commit(store: Store, save: SaveKey) -> Ending:
    try:
        manifest = commit(store, save.tag, save.save_id, attempt=save.attempt, timeout_s=_LOCK_S)
    except MocError as error:
        return _give_up(store, save, Ending.of(error))
    except Exception as error:  # the others must hear of it all the same
        _log.exception("committing %s failed", save.tag)
        what = f"the commit failed: {type(error).__name__}: {error}"
        return _give_up(store, save, Ending(False, what, store.locate(save.tag), "see the agent's log; report this"))
    stored = manifest.added_bytes
    _note(store, save, OutcomeNote(committed=True, attempt=save.attempt, step=save.step, stored_bytes=stored))
    return Ending(True, stored_bytes=stored, decided_here=True)


def _give_up(store: Store, save: SaveKey, ending: Ending, *, note: bool = True) -> Ending:
    """Notes a failure for the others, as far as the storage lets us."""
    if note:
        text = str(MocError(ending.what, where=ending.where, fix=ending.fix)).replace("\n  ", "; ")
        _note(store, save, OutcomeNote(committed=False, error=text, attempt=save.attempt, step=save.step))
    return Ending(False, ending.what, ending.where, ending.fix, decided_here=note)


def _note(store: Store, save: SaveKey, note: OutcomeNote) -> None:
    try:
        write_outcome(store, save.tag, save.save_id, note)
    except StorageError as error:
        _log.warning("the outcome of %s cannot be noted for the other nodes: %s", save.tag, error.what)


def discard(store: Store, save: SaveKey, ranks: Collection[int], *, leads: bool) -> None:
    """Removes what ranks have written for a save that failed: on a full disk it would be in the next one's way.

    Does nothing if the save was committed after all. A failure is logged; retention removes what is left over.

    Args:
        store: the checkpoint root.
        save: the save, which nobody is going to commit any more.
        ranks: whose packs to remove; nobody writes them any more.
        leads: remove the extra files of all ranks too.
    """
    try:
        with store.lock(LOCK, _LOCK_S):  # no commit reads the parts meanwhile
            if store.exists(manifest_key(save.tag)) and load_manifest(store, save.tag).save_id == save.save_id:
                return
            for rank in ranks:
                store.delete(part_key(save.tag, save.save_id, rank))
        for rank in ranks:
            for which in ("dense", "experts"):
                store.delete_prefix(pack_key(save.tag, save.save_id, rank, which))
        if leads:
            store.delete_prefix(f"{save_prefix(save.tag, save.save_id)}/extra")
    except MocError as error:
        _log.warning("what was written of %s is left behind: %s", save.tag, error.what)


class Flight:
    """Tells which saves may be in flight: those of the runs that are connected, until they are known to be finished.

    Thread-safe for the uses made of it: one instance serves one directory of one agent.
    """

    _KEEP = 1024

    def __init__(self) -> None:
        self._finished: dict[str, None] = {}

    def finish(self, save_id: str) -> None:
        """Notes that a save has ended."""
        self._finished[save_id] = None
        while len(self._finished) > self._KEEP:
            self._finished.pop(next(iter(self._finished)), None)

    def learn(self, store: Store, prefixes: tuple[str, ...]) -> None:
        """Reads the outcomes of saves of these runs that this agent has not followed itself (it may be new).

        Raises:
            StorageError: if the store cannot be read.
        """
        for tag in store.list_dirs() if prefixes else ():
            for save_id in store.list_dirs(tag):
                if not save_id.startswith(prefixes) or save_id in self._finished:
                    continue
                try:
                    if read_outcome(store, tag, save_id) is not None:
                        self.finish(save_id)
                except StorageError:
                    continue  # no save at all, or not readable: left alone

    def contains(self, save_id: str, prefixes: tuple[str, ...]) -> bool:
        """Tells whether a save may still be in flight, given the connected runs' prefixes."""
        return bool(prefixes) and save_id.startswith(prefixes) and save_id not in self._finished


def retain(
    store: Store,
    *,
    keep_last: int,
    keep_every: int,
    attempt: int,
    flight: Flight,
    prefixes: tuple[str, ...],
) -> RetentionReport | None:
    """Removes what retention no longer keeps, after a commit. A failure is logged: the checkpoint exists all the same.

    Args:
        store: the checkpoint root.
        keep_last: see `storage.retention.apply_retention`.
        keep_every: likewise.
        attempt: the attempt that committed.
        flight: knows which saves have ended.
        prefixes: what the save ids of connected runs begin with.

    Returns:
        What was removed; None if it failed.
    """
    try:
        flight.learn(store, prefixes)
        return apply_retention(
            store,
            keep_last=keep_last,
            keep_every=keep_every,
            in_flight=lambda save_id: flight.contains(save_id, prefixes),
            attempt=attempt,
            timeout_s=_LOCK_S,
        )
    except MocError as error:
        _log.warning("old checkpoints in %s were not removed: %s", store.url, error)
        return None
