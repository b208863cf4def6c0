"""What the agent remembers of requests and of the saves that they belong to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from moc_ckpt.errors import MocError
from moc_ckpt.persist.committer import Ending, SaveKey
from moc_ckpt.persist.protocol import Outcome, Persist, Persisted, ToClient

__all__ = ["Counts", "Job", "Save"]


@dataclass(frozen=True, slots=True)
class Counts:
    """What one rank's requests are doing; see `protocol.RankStatus`."""

    queued: int = 0
    writing: int = 0
    committing: int = 0
    done: int = 0
    failed: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(eq=False, slots=True)
class Job:
    """One rank's request.

    Attributes:
        who: (run, rank).
        request: the request; None once it is finished.
        save: the save that it belongs to.
        reply: sends a message to the trainer that asked last, or drops it.
        seq: the number that trainer gave the request.
        arrived: monotonic seconds.
        state: queued, writing, committing or finished.
        persisted: what was answered when the part was durable.
        error: why it cannot be written.
        outcome: the final answer.
        cancelled: set to end the write early.
    """

    who: tuple[str, int]
    request: Persist | None
    save: Save
    reply: Callable[[ToClient], None]
    seq: int
    arrived: float
    state: str = "queued"
    persisted: Persisted | None = None
    error: MocError | None = None
    outcome: Outcome | None = None
    cancelled: bool = False


@dataclass(eq=False, slots=True)
class Save:
    """One save, as far as this node takes part in it.

    Attributes:
        key: the save.
        jobs: the requests of this node's ranks.
        news: set when a request is written or has failed.
        ending: how it ended; None while it has not.
        watched: a thread sees it to its end.
    """

    key: SaveKey
    jobs: list[Job] = field(default_factory=list)
    news: threading.Event = field(default_factory=threading.Event)
    ending: Ending | None = None
    watched: bool = False
