"""Attempts: every start or restore of a run opens one, which fences off older writers (DESIGN section 2)."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from moc_ckpt.errors import CorruptionError, StorageError
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.checkpoint import ATTEMPTS, LOCK
from moc_ckpt.storage.envelope import open_envelope, seal_envelope
from moc_ckpt.storage.store import Store

__all__ = ["Ancestry", "Attempt", "admissible", "ancestry", "current_attempt", "list_attempts", "open_attempt"]

_NAME = re.compile(rf"^{ATTEMPTS}/(\d{{6,}})\.json$")

Ancestry = Sequence[tuple[int, int | None]]
"""(attempt, last step that belongs to the timeline; None: all), the newest attempt first."""


class Attempt(msgspec.Struct, frozen=True):
    """One start or restore of a run in one checkpoint root.

    Attributes:
        attempt: its number, from 1.
        id: random and unique.
        parent: number of the attempt whose state it continues; None if it starts from scratch.
        forked_at_step: step of that state.
        created: seconds since 1970.
        info: plain data about the run, for people.
    """

    attempt: int
    id: str
    parent: int | None
    forked_at_step: int | None
    created: float
    info: dict[str, Any] = {}


def _key(number: int) -> str:
    return f"{ATTEMPTS}/{number:06d}.json"


def _numbers(store: Store) -> list[int]:
    return sorted(int(match[1]) for key in store.list(ATTEMPTS) if (match := _NAME.match(key)))


def _read(store: Store, number: int) -> Attempt:
    where = store.locate(_key(number))
    data = store.read(_key(number))
    if data is None:
        raise CorruptionError(
            f"the record of attempt {number} is missing",
            where=where,
            fix="restore the file; without it nobody knows which checkpoints belong to this run's timeline",
        )
    return open_envelope(data, Attempt, where)


def has_attempt(store: Store, number: int, ident: str | None = None) -> bool:
    """Tells whether there is a record of the attempt, and it is the one with this id (if given)."""
    return store.exists(_key(number)) and (ident is None or _read(store, number).id == ident)


def list_attempts(store: Store) -> list[Attempt]:
    """Returns all attempts, oldest first.

    Raises:
        CorruptionError: if a record is damaged.
    """
    return [_read(store, number) for number in _numbers(store)]


def current_attempt(store: Store) -> Attempt | None:
    """Returns the newest attempt, which is the only one that may publish; None if there is none yet.

    Raises:
        CorruptionError: if its record is damaged.
    """
    numbers = _numbers(store)
    return _read(store, numbers[-1]) if numbers else None


def open_attempt(
    store: Store,
    parent: int | None = None,
    forked_at_step: int | None = None,
    info: dict[str, Any] | None = None,
    *,
    after: int = 0,
    timeout_s: float = 60.0,
) -> Attempt:
    """Opens the next attempt; from then on no older one can commit here.

    Of several callers each gets another number. Waits for a commit in progress.

    Args:
        store: the checkpoint root.
        parent: number of the attempt whose state is continued, None for a start from scratch.
        forked_at_step: step of that state; needed with a parent.
        info: plain data about the run.
        after: the new number is above this one as well: checkpoints may have been copied here without the records.
        timeout_s: seconds to wait for a commit in progress.

    Returns:
        The new attempt.

    Raises:
        ValueError: if only one of parent and forked_at_step is given.
        StorageError: if the root cannot be written, or there is no such parent.
    """
    if (parent is None) != (forked_at_step is None):
        raise ValueError("parent and forked_at_step belong together")
    with store.lock(LOCK, timeout_s):
        while True:
            numbers = _numbers(store)
            if parent is not None and parent not in numbers:
                raise StorageError(
                    f"there is no attempt {parent} to continue", where=store.locate(ATTEMPTS), fix="check the directory"
                )
            number = max([after, *numbers]) + 1
            record = Attempt(number, uuid.uuid4().hex, parent, forked_at_step, time.time(), info or {})
            if store.create(_key(number), seal_envelope(record)):
                return record


def ancestry(store: Store, attempt: int) -> list[tuple[int, int | None]]:
    """Returns the timeline of an attempt: itself, its parent up to the fork, and so on.

    Args:
        store: the checkpoint root.
        attempt: its number.

    Returns:
        (attempt, last step that belongs to the timeline; None: all), starting with the attempt itself.

    Raises:
        CorruptionError: if a record is missing or damaged.
    """
    line: list[tuple[int, int | None]] = []
    number: int | None = attempt
    limit: int | None = None
    while number is not None:
        record = _read(store, number)
        line.append((number, limit))
        if record.parent is not None and record.parent >= number:
            raise CorruptionError(
                f"attempt {number} names attempt {record.parent} as its parent, which is not older",
                where=store.locate(_key(number)),
                fix="restore the file from a backup",
            )
        fork = record.forked_at_step
        limit = fork if limit is None else limit if fork is None else min(limit, fork)
        number = record.parent
    return line


def admissible(version: Version | tuple[int, int], line: Ancestry) -> bool:
    """Tells whether a version belongs to a timeline: made by one of its attempts at or before the fork (pure).

    Args:
        version: (attempt, step).
        line: what `ancestry` returns.
    """
    attempt, step = version
    return any(number == attempt and (limit is None or step <= limit) for number, limit in line)
