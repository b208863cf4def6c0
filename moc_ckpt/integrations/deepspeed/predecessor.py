"""What the last run of a job left in the memory of this node: brought to storage, shown to a load, then let go."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import torch

from moc_ckpt.comm import Comm
from moc_ckpt.config import MocConfig
from moc_ckpt.errors import StorageError
from moc_ckpt.recovery.ahead import Ahead
from moc_ckpt.recovery.flush import commit_flush, tokens_of, wait_for_agent, with_tokens, write_parts
from moc_ckpt.recovery.flush_plan import Flush, plan_restart
from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.recovery.memory import Inventory, JobMemory, join, open_memory
from moc_ckpt.snapshot.arena import forsaken, writer_pid
from moc_ckpt.snapshot.places import find_arenas
from moc_ckpt.storage.checkpoint import new_save_id
from moc_ckpt.storage.store import Store, open_store

__all__ = ["Predecessor"]

T = TypeVar("T")

logger = logging.getLogger("moc_ckpt")

# Of what is free in shared memory, what new arenas may take beside the ones of the last run.
_ROOM_SHARE = 0.9
# A killed process goes on for as long as its memory takes to be given back.
_ENDING_S = 10.0
_LOOK_S = 0.1


class Predecessor:
    """The memory of the runs before this one, on one node. Not thread-safe.

    Args:
        folder: the job's directory in shared memory.
        config: the validated configuration.
        own: arenas of this process: asking who writes one would let go of its lock.
        device: where what a load reads is going.

    Attributes:
        held: what a load may read from; None: nothing.
    """

    def __init__(self, folder: Path, config: MocConfig, own: Collection[Path], device: torch.device) -> None:
        self._folder = folder
        self._config = config
        self._own = own
        self._device = device
        self.held: HeldMemory | None = None
        self._ahead: Ahead | None = None
        self._leaving: threading.Thread | None = None
        self._memory: JobMemory | None = None
        self._pending: _Pending | None = None
        self._first = False

    def start(self, comm: Comm, *, first: bool) -> None:
        """Begins to bring what memory has newer than storage there; collective.

        What goes wrong is said, and keeps no run from starting. Every node writes what its own ranks left, in the
        background, while the run goes on with its start.

        Args:
            comm: all ranks of the new run, which need be neither as many nor at the same places as those of the last.
            first: this rank acts for its node.
        """
        self._first = first
        with ExitStack() as stack:
            found = _Step(comm, "looking at the memory of earlier runs").all(
                lambda: self._look(stack) if first else None
            )
            memory, self._memory = self._memory, None
            joined = join(item for item in found if item is not None) if found is not None else None
            if joined is not None and joined.url is not None:
                store = open_store(joined.url)
                if memory is not None and memory.inventory.run != joined.run:
                    memory = None
                planned = _Step(comm, "planning what memory brings to storage").first(
                    lambda: (_plan(joined, store), new_save_id())
                )
                if planned is not None and planned[0] is not None:
                    self._pending = _begin(comm, memory, store, planned[0], planned[1], stack.pop_all())
        self._hold(comm)
        if self._pending is None:
            self._remove(comm)

    def finish(self, comm: Comm) -> None:
        """Commits what `start` began to write, and removes the files of runs that are over; collective."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with pending:
            written = _Step(comm, "writing what memory held").all(pending.result)
            if written is not None:
                step = _Step(comm, "committing what memory held").first(pending.commit)
                if step is not None and comm.rank == 0:
                    logger.info(
                        "RECOVERED from the memory of the last run: %s %d and %d experts newer than storage are now %s",
                        "step" if pending.flush.dense else "stored step",
                        step,
                        len(pending.flush.experts),
                        pending.flush.tag,
                    )
        self._remove(comm)

    def make_room(self, comm: Comm, place: str, need: int) -> None:
        """Lets go of old memory where the new arenas do not fit beside it; collective.

        Args:
            comm: all ranks.
            place: the shared memory that this rank uses; equal for ranks that have it in common.
            need: bytes of the arena that this rank is going to make.
        """
        replies = comm.exchange("agreeing on room", lambda: (place, need, self.held is not None))
        if not any(held for _, _, held in replies):
            return
        wanted = sum(nbytes for other, nbytes, _ in replies if other == place)

        def fits() -> bool:
            return self.held is None or wanted <= _ROOM_SHARE * shutil.disk_usage(self._folder).free

        fitting = comm.exchange("looking for room", fits)
        if all(fitting):
            return
        self.finish(comm)

        def decide() -> None:
            if not fitting[comm.rank]:
                if comm.rank == 0:
                    logger.info("no room for new arenas beside the last run's: a load reads from storage")
                self.let_go()
                self.await_room()

        # Nobody makes an arena before all of a node have let go.
        comm.agree("making room", decide)

    def abandon(self) -> None:
        """Ends what `start` began, without a commit: the run cannot start. Doing it again changes nothing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with pending, suppress(Exception):
                pending.result()
        self.let_go()
        self.await_room()

    def _look(self, stack: ExitStack) -> Inventory | None:
        """Opens the memory of this node, once its agent has written what it was given."""
        # The other ranks wait for this one as long as for a commit.
        deadline_s = self._config.timeouts.commit_s / 2
        self._await_ends()
        over = self._over()
        if not over or not self._config.recovery.memory:
            with suppress(StorageError):
                wait_for_agent(self._folder, deadline_s, _tell_waiting)
            return None
        wait_for_agent(self._folder, deadline_s, _tell_waiting)
        self._memory = stack.enter_context(open_memory(self._folder, over))
        return self._memory.inventory if self._memory is not None else None

    def _hold(self, comm: Comm) -> None:
        """Maps the arenas on every rank, so that a load finds them even after their files are removed; collective."""

        def hold() -> None:
            if not self._config.recovery.memory:
                return
            try:
                self.held = HeldMemory.open(self._folder, self._over())
            except Exception as error:  # storage has all of it
                logger.warning("the memory of the last run is not read: %s", error)

        comm.agree("mapping the memory of earlier runs", hold)
        if self.held is not None and self.held.world == comm.world and comm.rank in self.held.ranks:
            self._ahead = Ahead(self.held, comm.rank, self._device)

    def _remove(self, comm: Comm) -> None:
        """Removes the files of runs that are over, on every node; collective."""

        def remove() -> None:
            for path in self._over() if self._first else ():
                logger.info("removing %s of a run that is over", path.name)
                path.unlink(missing_ok=True)
            for folder in forsaken(self._folder.parent, self._own) if self._first else ():
                logger.info("removing %s, which no run can find any more", folder)
                shutil.rmtree(folder, ignore_errors=True)

        comm.agree("clearing up after earlier runs", remove)

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that become free once all ranks of the node have let go."""
        return self.held.nbytes if self.held is not None else 0

    def readied(self) -> HeldMemory | None:
        """Returns what a load may read from, once what was begun ahead of it is done; None: nothing."""
        if self._ahead is not None:
            self._ahead.wait()
        return self.held

    def let_go(self) -> None:
        """Gives the memory back: it was restored, or nobody wants it. Doing it again changes nothing.

        In the background, since that takes the system about as long as making it took: `await_room` waits for it.
        """
        held, ahead = self.held, self._ahead
        self.held, self._ahead = None, None
        if held is None:
            return

        def leave() -> None:
            if ahead is not None:
                ahead.close()
            held.close()

        self._leaving = threading.Thread(target=leave, name="moc-let-go", daemon=True)
        self._leaving.start()

    def await_room(self) -> None:
        """Waits until memory that this process let go is free, unless others of the node still hold it."""
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.join()

    def _await_ends(self) -> None:
        """Waits for trainers of the last run that are just being killed: their memory is not over before they are."""
        end = time.monotonic() + _ENDING_S
        while time.monotonic() < end:
            living = [path for path in find_arenas(self._folder) if path not in self._own and writer_pid(path)]
            if not living:
                return
            time.sleep(_LOOK_S)
        logger.warning("%s has a writer that lives: is the run before this one still there?", living[0].name)

    def _over(self) -> list[Path]:
        return [path for path in find_arenas(self._folder) if path not in self._own and writer_pid(path) is None]


class _Pending:
    """A flush that is being written on this node.

    Args:
        store: the checkpoint root.
        flush: what is written, on all nodes.
        save_id: of all nodes.
        tokens: what the versions of its experts have learnt.
        stack: the memory, closed at the end.
        write: writes this node's part.
    """

    def __init__(
        self,
        store: Store,
        flush: Flush,
        save_id: str,
        tokens: Mapping[str, int],
        stack: ExitStack,
        write: Callable[[], None],
    ) -> None:
        self.flush = flush
        self._tokens = tokens
        self._store = store
        self._save_id = save_id
        self._stack = stack
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moc-flush-node")
        self._result = self._worker.submit(write)

    def result(self) -> None:
        """Waits until this node's part is written; raises what kept it from that."""
        self._result.result()

    def commit(self) -> int:
        """Commits what all nodes have written; returns its step."""
        return commit_flush(self._store, self.flush, self._save_id, self._tokens).step

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown()
        self._stack.close()


def _begin(
    comm: Comm, memory: JobMemory | None, store: Store, flush: Flush, save_id: str, stack: ExitStack
) -> _Pending | None:
    """Begins to write what memory has that the directory lacks; collective. Closes the stack if it does not."""
    counts = _Step(comm, "reading what experts have learnt").all(
        lambda: tokens_of(memory, flush) if memory is not None else {}
    )
    if counts is None:
        stack.close()
        return None
    tokens = {unit: count for found in counts for unit, count in (found or {}).items()}
    flush = with_tokens(flush, tokens)
    if not flush.experts and not flush.dense:
        stack.close()
        return None

    def write() -> None:
        if memory is not None:
            write_parts(memory, store, flush, save_id, tokens)

    return _Pending(store, flush, save_id, tokens, stack, write)


def _plan(memory: Inventory, store: Store) -> Flush | None:
    """Finds what memory brings to storage, and says so where it cannot be all of the newest state."""
    flush = plan_restart(memory, store)
    if flush is not None and not flush.dense:
        absent = ", ".join(map(str, memory.absent))
        logger.warning(
            "%s: the run goes on from %s (step %d), and %d experts from newer versions in memory than that has",
            f"the memory of ranks {absent} of {memory.world} is not here, and dense state is sharded over all"
            if absent
            else "memory holds no whole state that is newer than storage",
            flush.tag,
            flush.step,
            len(flush.experts),
        )
    return flush


class _Step:
    """Collective work that may fail without keeping the run from starting: all ranks then go on without it.

    Args:
        comm: all ranks.
        what: name of the work, for messages.
    """

    def __init__(self, comm: Comm, what: str) -> None:
        self._comm = comm
        self._what = what

    def all(self, work: Callable[[], T]) -> list[T | None] | None:
        """Returns what `work` returned on every rank; None if it failed on any."""
        replies = self._comm.exchange(self._what, lambda: _caught(work), wait="commit")
        failed = [(rank, text) for rank, (_, text) in enumerate(replies) if text]
        if failed:
            self._tell(f"rank {failed[0][0]}: {failed[0][1]}")
            return None
        return [value for value, _ in replies]

    def first(self, work: Callable[[], T]) -> T | None:
        """Returns what `work` returned on rank 0, the only one to do it; None if it failed."""
        value, text = self._comm.from_first(self._what, lambda: _caught(work), wait="commit")
        if text:
            self._tell(text)
        return value

    def _tell(self, text: str) -> None:
        if self._comm.rank == 0:
            logger.warning("what memory held of the last run is given up: %s", text)


def _caught(work: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return work(), ""
    except Exception as error:
        return None, str(error).replace("\n  ", "; ") or type(error).__name__


def _tell_waiting(ranks: list[int]) -> None:
    logger.info("waiting for the agent to write what ranks %s of the last run left", ranks)
