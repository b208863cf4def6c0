"""The agent's requests: a short queue, two writers, and one watcher per save (DESIGN section 9). No torch."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.events import EventKind
from moc_ckpt.persist.agent_events import EventWriter
from moc_ckpt.persist.agent_jobs import Counts, Job, Save
from moc_ckpt.persist.agent_read import (
    Arenas,
    GuardedSource,
    check_request,
    is_published,
    read_extras,
    remove_leftovers,
)
from moc_ckpt.persist.committer import Ending, Flight, SaveKey, await_commit, discard, retain
from moc_ckpt.persist.protocol import Event, Outcome, Persist, Persisted, ToClient
from moc_ckpt.persist.writer import write_prepared
from moc_ckpt.storage.checkpoint import write_failure
from moc_ckpt.storage.store import Store, open_store

__all__ = ["Work"]

RANKS_AT_ONCE = 2
"""Ranks whose parts are written at the same time; more do not make one disk faster."""
_MOST_UNFINISHED = 8
_KEEP_FINISHED = 64
_MOST_THREADS = 64

_log = logging.getLogger(__name__)


class _Unwanted(MocError):
    """Ends a write whose bytes nobody wants any more."""


class _Aborted(Exception):
    """Ends a write because the agent ends; the next agent does it again."""


class Work:
    """The agent's requests, from arrival to answer. Thread-safe.

    Every rank has at most one request per directory waiting for a writer; a second one is answered with a failure
    ("busy"), so that nothing queues without bound. A request that comes again, after a lost connection, joins the one
    that is there; one whose part is in storage already is not written again.

    Args:
        folder: the job's directory; arenas are in it.
        node: this node's name, for the event log.
        grace_s: see `committer.await_commit`.
        changed: called (from any thread) when a request is finished.
    """

    def __init__(self, folder: Path, node: str, *, grace_s: float, changed: Callable[[], None]) -> None:
        self._folder = folder
        self._grace_s = grace_s
        self._changed = changed
        self._mutex = threading.Lock()
        self._wake = threading.Condition(self._mutex)
        self._queue: deque[Job] = deque()
        self._jobs: dict[tuple[str, str, str, int], Job] = {}
        self._finished: deque[tuple[str, str, str, int]] = deque()
        self._saves: dict[tuple[str, str, str], Save] = {}
        self._writing: set[str] = set()
        self._arenas = Arenas()
        self._stores: dict[str, Store] = {}
        self._flights: dict[str, Flight] = {}
        self._counts: dict[tuple[str, int], Counts] = {}
        self._prefixes: dict[tuple[str, int], set[str]] = {}
        self._events = EventWriter(self._store, node)
        self._watchers = 0
        self._closing = False
        self._aborted = False
        self._dropped = 0
        self._threads = [
            threading.Thread(target=self._write_loop, name=f"moc-writer-{index}", daemon=True)
            for index in range(RANKS_AT_ONCE)
        ]
        for thread in self._threads:
            thread.start()

    # ---- requests ----

    def submit(self, who: tuple[str, int], request: Persist, reply: Callable[[ToClient], None]) -> None:
        """Takes a request, or answers it at once: with a failure, or because it is known. Does no I/O.

        Args:
            who: (run, rank) of the trainer.
            request: the request.
            reply: sends a message to the trainer; called from any thread.
        """
        part = request.part
        try:
            key = SaveKey(request.url, part.tag, part.save_id, part.attempt, part.step, part.world)
            check_request(request, who[1], self._folder)
        except MocError as error:
            reply(_failed(request.seq, error))
            return
        name = (request.url, part.tag, part.save_id, part.rank)
        with self._mutex:
            job = self._jobs.get(name)
            if job is not None:
                job.reply, job.seq = reply, request.seq
                self._answer_again(job)
                return
            if (busy := self._busy(who, request)) is not None:
                reply(_failed(request.seq, busy))
                return
            save = self._saves.setdefault(name[:3], Save(key))
            job = Job(who, request, save, reply, request.seq, time.monotonic())
            save.jobs.append(job)
            self._jobs[name] = job
            self._queue.append(job)
            if request.run_prefix:
                self._prefixes.setdefault(who, set()).add(request.run_prefix)
            if not save.watched:
                save.watched = True
                self._watchers += 1
                threading.Thread(target=self._watch, args=(save,), name=f"moc-commit-{key.tag}", daemon=True).start()
            self._wake.notify_all()

    def _answer_again(self, job: Job) -> None:
        if job.persisted is not None:
            job.reply(Persisted(job.seq, job.persisted.nbytes, job.persisted.seconds, job.persisted.cpu_seconds))
        if job.outcome is not None:
            old = job.outcome
            job.reply(Outcome(job.seq, old.committed, old.what, old.where, old.fix, old.stored_bytes, old.seconds))

    def _busy(self, who: tuple[str, int], request: Persist) -> MocError | None:
        own = [
            job
            for job in self._jobs.values()
            if job.who == who and job.request is not None and job.request.url == request.url
        ]
        queued = sum(job.state == "queued" for job in own)
        if self._closing:
            what = "busy: the agent is ending"
        elif queued and not request.again:
            what = f"busy: a save of rank {who[1]} waits for a writer already"
        elif len(own) >= _MOST_UNFINISHED:
            what = f"busy: {len(own)} saves of rank {who[1]} are not finished yet"
        else:
            return None
        return StorageError(
            what, where=request.url, fix="the next save tries again; save less often than storage takes"
        )

    def knows(self, request: Persist) -> bool:
        """Tells whether a request belongs to a save that is going on."""
        with self._mutex:
            return (request.url, request.part.tag, request.part.save_id) in self._saves

    def cancel(self, who: tuple[str, int], seq: int) -> None:
        """Ends a request that the trainer no longer waits for: it is not written any further."""
        with self._mutex:
            for job in self._jobs.values():
                if job.who == who and job.seq == seq and job.state in ("queued", "writing"):
                    job.cancelled = True
                    _log.warning("rank %d no longer waits for %s", who[1], job.save.key.tag)

    def event(self, event: Event) -> None:
        """Hands a line to the event log of its directory; dropped when storage is too slow for them all."""
        self._events.put(event)

    def forget(self, who: tuple[str, int]) -> None:
        """Lets go of a trainer that is gone: its saves stay, its mapping goes once nothing is written from it."""
        with self._mutex:
            if not any(job.who == who and job.request is not None for job in self._jobs.values()):
                self._prefixes.pop(who, None)
                self._counts.pop(who, None)
                self._arenas.forget(who)

    def counts(self, who: tuple[str, int]) -> Counts:
        """Returns what a rank's requests are doing."""
        with self._mutex:
            base = self._counts.get(who, Counts())
            states = [job.state for job in self._jobs.values() if job.who == who]
        return Counts(
            states.count("queued"),
            states.count("writing"),
            states.count("committing"),
            base.done,
            base.failed,
            base.nbytes,
            base.seconds,
            base.error,
        )

    def unfinished(self, who: tuple[str, int] | None = None) -> int:
        """Returns the number of requests (of one rank) without an answer, and of commits whose aftermath goes on."""
        with self._mutex:
            open_jobs = sum(job.request is not None for job in self._jobs.values() if who in (None, job.who))
            return max(open_jobs, self._watchers) if who is None else open_jobs

    def close(self, deadline_s: float, *, abort: bool = False) -> None:
        """Takes no more requests, drops those that are not being written, and waits for the running writes.

        Dropped requests are not answered: the trainer sends them to its next agent.

        Args:
            deadline_s: seconds to wait for commits of what is written; writes are waited for without limit, since a
                write that ends is worth more than one that is done again.
            abort: cut the running writes off.
        """
        self._aborted = abort
        with self._mutex:
            self._closing = True
            self._dropped += len(self._queue)
            self._queue.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        end = time.monotonic() + deadline_s
        while self.unfinished() > self._dropped and time.monotonic() < end:
            time.sleep(0.05)
        self._events.close(max(end - time.monotonic(), 1.0))

    # ---- writing ----

    def _write_loop(self) -> None:
        while True:
            with self._mutex:
                while (job := self._next()) is None:
                    if self._closing:
                        return
                    self._wake.wait()
                assert job.request is not None
                job.state = "writing"
                request = job.request
                self._writing.add(request.arena)
            try:
                self._write(job, request)
            finally:
                with self._mutex:
                    self._writing.discard(request.arena)
                    job.state = "committing"
                    self._wake.notify_all()
                job.save.news.set()

    def _next(self) -> Job | None:
        for job in self._queue:
            assert job.request is not None
            if job.request.arena not in self._writing:
                self._queue.remove(job)
                return job
        return None

    def _write(self, job: Job, request: Persist) -> None:
        part = request.part
        try:
            self._check_wanted(job)
            store = self._store(request.url)
            begun, cpu = time.monotonic(), time.process_time()
            nbytes = 0
            if not is_published(store, part):
                if request.again:  # what a writer that was killed half-way left behind
                    remove_leftovers(store, request)
                array = self._arenas.map(request, job.who)
                sources = [GuardedSource(array, pack.spans, lambda: self._check_wanted(job)) for pack in request.packs]
                extras = read_extras(request)
                written = write_prepared(store, part, sources, extras, threads=min(request.threads, _MOST_THREADS))
                nbytes = sum(pack.stored_bytes for pack in written.packs) + sum(map(len, extras.values()))
            done = Persisted(job.seq, nbytes, time.monotonic() - begun, time.process_time() - cpu)
        except _Aborted:
            _log.warning("writing %s of rank %d was cut off", part.tag, part.rank)
            return
        except Exception as error:
            if not isinstance(error, MocError):
                _log.exception("writing %s of rank %d failed", part.tag, part.rank)
                error = MocError(
                    f"writing failed: {type(error).__name__}: {error}", where=request.url, fix="see the agent's log"
                )
            else:
                _log.warning("rank %d could not write its part of %s: %s", part.rank, part.tag, error)
            job.error = error
            if job.save.ending is None:
                self._note_failure(request, error)
            return
        with self._mutex:
            job.persisted = done
            base = self._counts.get(job.who, Counts())
            self._counts[job.who] = Counts(
                done=base.done, failed=base.failed, nbytes=nbytes, seconds=done.seconds, error=base.error
            )
            job.reply(Persisted(job.seq, nbytes, done.seconds, done.cpu_seconds))
        rate = nbytes / 1e9 / done.seconds if done.seconds > 0 else 0.0
        _log.info("rank %d persisted %s: %d bytes in %.3f s", part.rank, part.tag, nbytes, done.seconds)
        self.event(
            Event(
                request.url,
                EventKind.PERSISTED.value,
                part.attempt,
                part.step,
                part.tag,
                {
                    "rank": part.rank,
                    "bytes": nbytes,
                    "seconds": round(done.seconds, 4),
                    "gb_per_s": round(rate, 4),
                    "cpu_seconds": round(done.cpu_seconds, 4),
                },
            )
        )

    def _check_wanted(self, job: Job) -> None:
        """Raises if nobody wants the bytes any more, so that the arena is not read for nothing."""
        if self._aborted:
            raise _Aborted
        if job.cancelled:
            raise _Unwanted("the trainer no longer waits for this save", fix="the next save tries again")
        ending = job.save.ending
        if ending is not None and not ending.committed:
            raise _Unwanted(f"the save has failed meanwhile: {ending.what}", where=ending.where, fix=ending.fix)

    def _note_failure(self, request: Persist, error: MocError) -> None:
        part = request.part
        try:
            write_failure(self._store(request.url), part.tag, part.save_id, part.rank, error)
        except Exception as second:
            _log.warning("the other nodes cannot be told about it: %s", second)

    # ---- the end of a save ----

    def _watch(self, save: Save) -> None:
        try:
            self._watch_to_end(save)
        except Exception:
            _log.exception("watching over %s failed", save.key.tag)
            ending = Ending(False, "the agent failed inside; see its log", str(self._folder), "report this")
            self._answer(save, ending)
        finally:
            with self._mutex:
                self._watchers -= 1
            self._changed()

    def _watch_to_end(self, save: Save) -> None:
        with self._mutex:
            requests = [job.request for job in save.jobs if job.request is not None]
        first = requests[0]
        leads = any(request.part.rank == 0 for request in requests)
        try:
            store = self._store(save.key.url)
        except MocError as error:
            self._answer(save, Ending.of(error, decided_here=True))
            return

        def wait(seconds: float) -> None:
            if save.news.wait(seconds):
                save.news.clear()

        def failure() -> MocError | None:
            return next((job.error for job in list(save.jobs) if job.error is not None), None)

        begun = time.monotonic()
        ending = await_commit(
            store,
            save.key,
            leads=lambda: leads or any(job.request and job.request.part.rank == 0 for job in list(save.jobs)),
            commit_s=first.commit_s,
            local_failure=failure,
            wait=wait,
            grace_s=self._grace_s,
        )
        self._answer(save, ending)
        self._aftermath(store, save, first, ending, time.monotonic() - begun, failure() is not None)

    def _answer(self, save: Save, ending: Ending) -> None:
        """Answers each rank as soon as its arena is not read any more."""
        save.ending = ending
        while True:
            with self._mutex:
                ready = [job for job in save.jobs if job.state == "committing"]
                for job in [job for job in save.jobs if job.state == "queued"]:
                    if job in self._queue and not ending.committed:
                        self._queue.remove(job)
                        ready.append(job)
                    elif job not in self._queue:
                        ready.append(job)
                for job in ready:
                    self._finish(job, ending)
                if all(job.state == "finished" for job in save.jobs):
                    self._saves.pop((save.key.url, save.key.tag, save.key.save_id), None)
                    return
            save.news.wait(1.0)
            save.news.clear()

    def _finish(self, job: Job, ending: Ending) -> None:
        assert job.request is not None
        part = job.request.part
        if job.error is not None and not ending.committed and not isinstance(job.error, _Unwanted):
            ending = Ending.of(job.error)
        job.outcome = Outcome(
            job.seq,
            ending.committed,
            ending.what,
            ending.where,
            ending.fix,
            ending.stored_bytes,
            time.monotonic() - job.arrived,
        )
        base = self._counts.get(job.who, Counts())
        self._counts[job.who] = Counts(
            done=base.done + ending.committed,
            failed=base.failed + (not ending.committed),
            nbytes=base.nbytes,
            seconds=base.seconds,
            error=ending.what or base.error,
        )
        name = (job.request.url, part.tag, part.save_id, part.rank)
        job.state, job.request = "finished", None
        self._finished.append(name)
        while len(self._finished) > _KEEP_FINISHED:
            self._jobs.pop(self._finished.popleft(), None)
        job.reply(job.outcome)

    def _aftermath(
        self, store: Store, save: Save, request: Persist, ending: Ending, seconds: float, failed_here: bool
    ) -> None:
        key = save.key
        with self._mutex:
            flight = self._flights.setdefault(key.url, Flight())
            prefixes = tuple(sorted(set().union(*self._prefixes.values())))
        flight.finish(key.save_id)
        if ending.committed and ending.decided_here:
            _log.info("committed %s (step %d) in %s", key.tag, key.step, key.url)
            fields = {"stored_bytes": ending.stored_bytes, "seconds": round(seconds, 4), "save_id": key.save_id}
            self.event(Event(key.url, EventKind.COMMITTED.value, key.attempt, key.step, key.tag, fields))
            keep = request.retention
            if keep is not None:
                report = retain(
                    store,
                    keep_last=keep.keep_last,
                    keep_every=keep.keep_every,
                    attempt=key.attempt,
                    flight=flight,
                    prefixes=prefixes,
                )
                if report is not None and (report.dropped or report.saves):
                    _log.info("retention removed %s", ", ".join((*report.dropped, *report.saves)))
        if ending.committed:
            return
        ranks = sorted({job.who[1] for job in save.jobs})
        discard(store, key, ranks, leads=0 in ranks)
        if ending.decided_here or failed_here:
            _log.warning("%s (step %d) failed: %s", key.tag, key.step, ending.what)
            told = {"reason": ending.what, "where": ending.where, "fix": ending.fix, "save_id": key.save_id}
            self.event(Event(key.url, EventKind.FAILED.value, key.attempt, key.step, key.tag, told))

    # ---- the rest ----

    def _store(self, url: str) -> Store:
        with self._mutex:
            store = self._stores.get(url)
        if store is None:
            # A store without URL syntax goes by its specification (`KvStore.url`).
            store = open_store(json.loads(url) if url.startswith("{") else url)
            with self._mutex:
                store = self._stores.setdefault(url, store)
        return store


def _failed(seq: int, error: MocError) -> Outcome:
    return Outcome(seq, False, error.what, error.where, error.fix)
