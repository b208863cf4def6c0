"""SIGTERM (a scheduler, a spot notice): all ranks save every expert at the same step, then leave (`preempt_save`).

A rank that got the signal says so in the job's key-value store. A thread of each rank looks there once a second, over a
connection of its own; then it publishes how far its rank has come, and from there on the training thread halts at its
next step boundary until all have published. The step after the furthest is the one at which all of them save: nobody
is beyond it, since nobody passes a boundary meanwhile. The training thread thus waits for other ranks' threads only,
never for their training, so ranks that wait for each other within a step cannot deadlock. Without a signal a step costs
one comparison, and no collective: not even snapshots, whose vote would bring the news two snapshots late.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["PREEMPTED", "Preempt", "Watch"]

logger = logging.getLogger("moc_ckpt")

PREEMPTED = 128 + signal.SIGTERM
"""Exit status of a process that was told to end."""

_POLL_S = 1.0  # between two looks whether another rank got the signal
_VERDICT_POLL_S = 0.05
# Threads answer at once, so who does not is dead. Launchers kill 30 s after their SIGTERM.
_PUBLISH_S = 15.0
_LEAVE_S = 5.0
_ABSENT = "absent:"


class Watch:
    """One rank's thread that waits for the signal, its own or another rank's, and agrees on the step.

    Args:
        rank: this rank.
        world: number of ranks.
        store: the job's store, over a connection of its own; None in a world of one.
        prefix: of the keys, equal on all ranks.
        deadline_s: seconds within which all ranks say how far they are.
        leave: ends the process where it cannot save and its training thread hangs.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        store: Any,
        prefix: str,
        deadline_s: float,
        leave: Callable[[], None] | None = None,
    ) -> None:
        self._rank, self._world, self._store, self._prefix = rank, world, store, prefix
        self._deadline_s = deadline_s
        self._leave = leave or (lambda: os._exit(PREEMPTED))
        self._boundaries = 0
        self._halted = False
        self._last: int | None = None
        self._problem = ""
        self._decided = threading.Event()
        self._reached = threading.Event()
        # Its `put` may be called by a signal handler that interrupts another `put`; an Event's `set` may not.
        self._words: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="moc-preempt", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Lets all ranks stop; may be called by a signal handler, and again."""
        self._words.put(True)

    def boundary(self) -> bool:
        """Is called after every optimizer step, by the training thread; tells whether all ranks stop here."""
        self._boundaries += 1
        return self._halted and self._halt()

    @property
    def problem(self) -> str:
        """Why ranks that stop cannot save; empty if they can."""
        return self._problem

    def farewell(self) -> None:
        """Keeps rank 0, whose process may hold the store, until all ranks are done with it; has a deadline."""
        if self._store is None:
            return
        with suppress(RuntimeError):  # the store is gone already
            self._store.add(f"{self._prefix}/done", 1)
            end = time.monotonic() + _LEAVE_S
            while self._rank == 0 and time.monotonic() < end:
                if self._store.add(f"{self._prefix}/done", 0) >= self._world:
                    break
                time.sleep(_VERDICT_POLL_S)

    def close(self, join_s: float = 2.0) -> None:
        """Ends the thread. Not collective; may be repeated."""
        self._reached.set()
        self._words.put(False)
        if self._thread is not threading.current_thread():
            self._thread.join(join_s)

    def _halt(self) -> bool:
        """Waits for the step at which all stop; the training thread, which is at a boundary."""
        if not self._decided.wait(self._deadline_s + _LEAVE_S):
            self._decide(None, "the job's key-value store does not answer")
        if self._last is not None and self._boundaries < self._last:
            return False
        self._reached.set()
        return True

    # ------------------------------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        try:
            if not self._wanted():
                return
            self._agree()
        except Exception as error:
            self._decide(None, f"the job's key-value store cannot be used: {str(error).splitlines()[0]}")
        # A signal that cannot lead to a save must end the process all the same, as it would without this package.
        if self._problem and not self._reached.wait(_LEAVE_S):
            logger.error("rank %d leaves without a save: %s", self._rank, self._problem)
            self._leave()

    def _wanted(self) -> bool:
        """Waits until some rank got the signal; False if there is nothing to wait for any more."""
        store = self._store
        while True:
            try:
                word = self._words.get(timeout=None if store is None else _POLL_S)
            except queue.Empty:
                word = None
            if word is not None:
                if word:
                    logger.warning("rank %d got SIGTERM: all ranks stop at the next step", self._rank)
                    if self._store is not None:
                        self._store.set(f"{self._prefix}/want", str(self._rank))
                return word
            try:
                if store.check([f"{self._prefix}/want"]):
                    return True
            except RuntimeError:
                # Rank 0 ended, or its node did. A signal of this rank still counts.
                store = None

    def _agree(self) -> None:
        # In this order: once it is set, nobody passes a boundary beyond the one that is read next.
        self._halted = True
        at = self._boundaries
        if self._store is None:
            self._decide(at + 1, "")
            return
        store, key, everyone = self._store, self._prefix, range(self._world)
        store.set(f"{key}/at/{self._rank}", str(at))
        if store.add(f"{key}/count", 1) == self._world:
            furthest = max(int(store.get(f"{key}/at/{rank}")) for rank in everyone)
            store.compare_set(f"{key}/verdict", "", str(furthest + 1))
        end = time.monotonic() + self._deadline_s
        while not store.check([f"{key}/verdict"]):
            if time.monotonic() > end:
                absent = [str(rank) for rank in everyone if not store.check([f"{key}/at/{rank}"])]
                # Whoever decides first decides for all.
                store.compare_set(f"{key}/verdict", "", _ABSENT + (", ".join(absent) or "?"))
            time.sleep(_VERDICT_POLL_S)
        verdict = store.get(f"{key}/verdict").decode()
        if verdict.startswith(_ABSENT):
            absent_ranks = verdict.removeprefix(_ABSENT)
            self._decide(None, f"ranks {absent_ranks} did not say how far they are within {self._deadline_s:g} s")
        else:
            self._decide(int(verdict), "")

    def _decide(self, last: int | None, problem: str) -> None:
        if not self._decided.is_set():
            self._last, self._problem = last, problem
            self._halted = True
            self._decided.set()


class _Handler:
    """What SIGTERM calls: the watches of all engines, then what was installed before.

    A handler in Python runs once the main thread is back from C, and one that waits for a dead rank never is. So the
    interpreter also writes the signal's number into a pipe, if nobody else uses that, and a thread reads it there.
    """

    def __init__(self, previous: Any) -> None:
        self.watches: list[Watch] = []
        self.previous = previous
        self._pid = os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._theirs = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if self._theirs != -1:
            signal.set_wakeup_fd(self._theirs)
        threading.Thread(target=self._hear, name="moc-sigterm", daemon=True).start()

    def __call__(self, signum: int, frame: Any) -> None:
        """Notes the signal. A forked child (a data loader's) has no watch that could hear it."""
        own = os.getpid() == self._pid
        if own:
            self._ask()
        if callable(self.previous):
            self.previous(signum, frame)
        elif self.previous == signal.SIG_DFL and not (own and _somebody_hears()):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def deaf(self) -> None:
        """Lets go of the pipe; called in the main thread."""
        now = signal.set_wakeup_fd(-1)
        if now not in (-1, self._write):
            signal.set_wakeup_fd(now)
        os.close(self._write)  # which ends the thread

    def in_child(self) -> None:
        """Keeps a forked child's signals out of this process's pipe."""
        now = signal.set_wakeup_fd(-1)
        if now not in (-1, self._write):
            signal.set_wakeup_fd(now)

    def _ask(self) -> None:
        for watch in tuple(self.watches):
            watch.ask()

    def _hear(self) -> None:
        while numbers := os.read(self._read, 64):
            if signal.SIGTERM in numbers:
                self._ask()
        os.close(self._read)


class _State:
    """Of this process: the handler that is installed, and whether the process leaves because of a signal."""

    handler: _Handler | None = None
    leaving = False


_state = _State()


def _somebody_hears() -> bool:
    return _state.leaving or (_state.handler is not None and bool(_state.handler.watches))


def _after_fork() -> None:
    if _state.handler is not None:
        with suppress(ValueError):  # not in the main thread
            _state.handler.in_child()


os.register_at_fork(after_in_child=_after_fork)


def _listen(watch: Watch) -> bool:
    """Lets a SIGTERM reach a watch; False if this thread may not install handlers."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handler = _state.handler
    if handler is None:
        previous = signal.getsignal(signal.SIGTERM)
        if previous is None:  # not Python's: it could neither be called nor restored
            return False
        handler = _state.handler = _Handler(previous)
        signal.signal(signal.SIGTERM, handler)
    handler.watches.append(watch)
    return True


def _forget(watch: Watch) -> None:
    """Ends what `_listen` began; with the last watch the handler from before comes back."""
    handler = _state.handler
    watch.close()
    # Until a process that was told to end has ended, further signals must not cut it off.
    if handler is None or watch not in handler.watches or _state.leaving:
        return
    handler.watches.remove(watch)
    # Only the main thread can take it off; elsewhere it stays, with nobody to ask, until the next engine's end.
    if handler.watches or threading.current_thread() is not threading.main_thread():
        return
    previous, _state.handler = handler.previous, None
    handler.deaf()
    # Where somebody else has chained a handler to this one it stays beneath, and only hands on.
    if signal.getsignal(signal.SIGTERM) is handler:
        signal.signal(signal.SIGTERM, previous)


class Preempt:
    """The last save of one engine. Building it is collective; all ranks call `step_done` alike.

    Args:
        moc: the engine's plugin.

    Attributes:
        provider: gives the caller's client_state; called on rank 0.
        directory: of the last explicit save; for jobs without save_dir.
    """

    def __init__(self, moc: MocCheckpoint) -> None:
        self.provider: Callable[[], Mapping[str, Any]] | None = None
        self.directory: str | None = None
        comm = moc.comm
        store = None

        def connect() -> tuple[bool, str]:
            nonlocal store
            store = _own_connection(moc.config.timeouts.rendezvous_s) if comm.world > 1 else None
            return comm.world == 1 or store is not None, uuid.uuid4().hex

        replies = comm.exchange("watching for SIGTERM", connect)
        self._watch: Watch | None = None
        if not all(ready for ready, _ in replies):
            if comm.rank == 0:
                logger.warning("preempt_save needs a TCP or file store: SIGTERM ends ranks without a last save")
            return
        deadline = min(moc.config.timeouts.rendezvous_s, _PUBLISH_S)
        prefix = f"moc_ckpt/preempt/{replies[0][1]}"
        watch = Watch(rank=comm.rank, world=comm.world, store=store, prefix=prefix, deadline_s=deadline)
        self._watch = watch
        if not _listen(watch):
            logger.info("rank %d cannot handle SIGTERM itself: the engine is not built in the main thread", comm.rank)
        # Engines that nobody ends must not live on because of a thread or a handler.
        self._end = weakref.finalize(moc, _forget, watch)

    def step_done(self, moc: MocCheckpoint) -> None:
        """Is called at every step boundary.

        Raises:
            SystemExit: with status 143, on all ranks at the same step, once any of them got SIGTERM.
        """
        if self._watch is not None and self._watch.boundary():
            self._leave(moc, self._watch)

    def close(self) -> None:
        """Brings back the handler from before. Not collective; may be repeated."""
        if self._watch is not None:
            self._end()
            self._watch = None

    def _leave(self, moc: MocCheckpoint, watch: Watch) -> None:
        _state.leaving = True
        first, step = moc.comm.rank == 0, int(moc.engine.global_steps)
        directory = moc.config.save_dir or self.directory
        if directory is not None and directory.startswith("memory://"):
            directory = None  # it ends with this process
        if watch.problem:
            logger.error("SIGTERM: step %d is not saved: %s", step, watch.problem)
        elif directory is None:
            if first:
                logger.error("SIGTERM: step %d is not saved: no save_dir is set, and nothing was saved before", step)
        else:
            begin = time.perf_counter()
            if first:
                logger.warning("SIGTERM: saving step %d with every expert to %s", step, directory)
            try:
                moc.save(directory, client_state=self._client_state(first), full=True)
                if first:
                    logger.warning("SIGTERM: step %d is saved, %.1f s; leaving", step, time.perf_counter() - begin)
            except Exception as error:
                logger.error("SIGTERM: step %d is not saved: %s", step, error)
        watch.farewell()
        raise SystemExit(PREEMPTED)

    def _client_state(self, first: bool) -> Mapping[str, Any]:
        if not first:
            return {}
        if self.provider is None:
            logger.warning("the last save has no client_state: give engine.moc.register_state what returns it")
            return {}
        try:
            return dict(self.provider())
        except Exception:
            logger.exception("the last save has no client_state")
            return {}


def _own_connection(timeout_s: float) -> Any:
    """Returns the job's store over a connection of its own; None if that kind of store has none.

    A wait of the training thread on the common connection keeps other threads from it.
    """
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        timeout = timedelta(seconds=timeout_s)
        return dist.TCPStore(store.host, store.port, None, False, timeout, wait_for_workers=False)
    if isinstance(store, dist.FileStore):
        return dist.FileStore(str(getattr(store, "path")), -1)  # noqa: B009 (the stubs lack it)
    return None
