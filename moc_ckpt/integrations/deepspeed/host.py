"""What a rank needs on its node for snapshots: arena, stager, votes, and the agent's client."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moc_ckpt.errors import ConfigError
from moc_ckpt.integrations.deepspeed.pec import PartialExperts
from moc_ckpt.integrations.deepspeed.predecessor import Predecessor
from moc_ckpt.pec.holdings import largest_choice, largest_window
from moc_ckpt.pec.k_values import AUTO, K
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.persist.client import AgentClient
from moc_ckpt.persist.protocol import PROTOCOL, Event, Hello
from moc_ckpt.plan.arena_size import ArenaNeed, apply_budget, arena_need
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
from moc_ckpt.snapshot.places import UNNAMED, arena_path, job_dir, job_key, named_node, node_name
from moc_ckpt.snapshot.stager import Stager, register, unregister
from moc_ckpt.votes import Votes

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Host"]

logger = logging.getLogger("moc_ckpt")

_CONNECT_S = 60.0
_UNNAMED_LINGER_S = 10.0  # nobody finds such a job's memory again
_PROGRESS_S = 2.0
# Arenas of this process: asking who writes one would let go of its lock.
_own: set[Path] = set()
# Of what is free in shared memory, what the arenas of a node take at most where nobody said how much.
_ROOM_SHARE = 0.9
_POPULATE_THREADS = 16
# State beside tensors: sparse, so only what is used takes memory.
_EXTRA_BYTES = 1 << 30


class Host:
    """Arena, stager, votes and agent of one rank. Building it is collective; using it is not.

    Args:
        moc: the engine's plugin, with its experts' side ready.
        ownership: bytes of the slots of every expert, and of dense state, on every rank.

    Attributes:
        device: the device that trains.
        arena: this rank's arena.
        stager: copies into it.
        votes: the background reductions.
        agent: the connection to the node's agent.
        ownership: as given.
        dense_bytes: bytes of a dense slot.
        max_k: the largest K that the arena has room for.
        keep_committed: what the last commit holds is kept in memory, too.
        predecessor: what the last run left in memory.
    """

    def __init__(self, moc: MocCheckpoint, ownership: Ownership) -> None:
        comm, config = moc.comm, moc.config
        self.device = torch.device(moc.engine.device)
        self.ownership = ownership
        self._config = config
        self._pec: PartialExperts = moc.pec
        self._rank = comm.rank
        own = ownership.rank == comm.rank
        self.dense_bytes = int(ownership.dense[comm.rank])
        self._expert_bytes = {
            str(unit): int(nbytes) for unit, nbytes in zip(ownership.unit[own], ownership.nbytes[own], strict=True)
        }
        self.max_k = max(ownership.experts, default=1)
        job, run = comm.from_first("naming the job", lambda: (job_key(config.save_dir), uuid.uuid4().hex[:12]))
        self.job, self.run = job, run
        self._comm = comm
        self._made: Arena | None = None
        self._closed = False
        homes = comm.exchange("finding the ranks of each node", Home.here)
        check_homes(homes)
        home = homes[comm.rank]
        local_rank = homes[: comm.rank].count(home)
        self._neighbours = sum(home.memory == other.memory for other in homes)
        self._windows: dict[tuple[int, ...], int] = {}
        self._world = comm.world
        self._folder = comm.agree("making the job's directory", lambda: job_dir(job, create=True), wait="rendezvous")
        self.predecessor = Predecessor(self._folder, config, _own, self.device)
        self.predecessor.start(comm, first=local_rank == 0)
        try:
            need = comm.agree("sizing the arena", self._need)
            # K is the same on all ranks, so the one with the least memory decides.
            self.max_k = min(comm.exchange("agreeing on K", lambda: self.max_k))
            self.keep_committed = need.keep_committed
            if config.host.keep_committed and not need.keep_committed:
                logger.warning("rank %d has no memory for what the last commit holds (host.keep_committed)", comm.rank)
            self.predecessor.make_room(comm, home.memory, need.total)
            self._connect(moc, need, local_rank)
            self.predecessor.finish(comm)
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Removes what a failed start has made: nobody else will ever look for it."""
        self.predecessor.abandon()
        for part in (getattr(self, "votes", None), getattr(self, "stager", None)):
            if part is not None:
                part.close()
        if (agent := getattr(self, "agent", None)) is not None:
            agent.close(0.0)
        if self._made is not None:
            self._release(self._made)
            self._made.unlink()

    def _connect(self, moc: MocCheckpoint, need: ArenaNeed, local_rank: int) -> None:
        comm, config = self._comm, self._config
        self.arena: Arena = comm.agree("creating the arena", lambda: self._create(need), wait="commit")
        self.stager = comm.agree("starting the stager", self._stager)
        # A rank may be away for as long as at a commit, evaluating alone, say: a vote that breaks off ends snapshots.
        self.votes = Votes(deadline_s=config.timeouts.rendezvous_s + config.timeouts.commit_s)
        hello = Hello(
            protocol=PROTOCOL,
            version=moc.version,
            job=self.job,
            run=self.run,
            rank=comm.rank,
            local_rank=local_rank,
            world=comm.world,
            pid=os.getpid(),
            arena=str(self.arena.path),
        )
        unnamed = self.job.startswith(UNNAMED)
        if unnamed and config.snapshot_interval and comm.rank == 0:
            logger.warning(
                "after a crash nobody finds what memory holds: this run has neither save_dir in moc_checkpoint nor "
                "MOC_JOB_ID; set one of them, and the next start goes on from memory"
            )
        self.agent = AgentClient(
            self._folder,
            hello,
            may_start=local_rank == 0,
            linger_s=min(config.host.linger_s, _UNNAMED_LINGER_S) if unnamed else config.host.linger_s,
            connect_s=_CONNECT_S,
        )
        comm.agree("connecting to the node agent", self.agent.start, wait="commit")

    def window_bytes(self, k: K) -> int:
        """Returns the bytes of experts that the largest snapshot with K experts per layer takes of this rank."""
        counts, config = self._pec.snapshot_k(k, self.max_k), self._config
        found = self._windows.get(counts)
        if found is None:
            balance = config.balance == "fill"
            found = largest_window(self.ownership, counts, self._rank, method=config.selection, balance=balance)
            self._windows[counts] = found
        return found

    def grow(self) -> bool:
        """Makes the arena larger if K needs that now (Dynamic-K, after a restore), or else K smaller; collective.

        Nothing may be under way. What the arena held is gone if there is another one.

        Returns:
            Whether there is another arena now.
        """
        config = self._config
        if config.k_snapshot == AUTO or config.selection == "full":
            return False  # the arena has room for `max_k`, and K stays within that
        need = self._affordable(config.k_snapshot)
        if all(self._comm.exchange("looking whether K fits", lambda: need is not None and self._fits(need))):
            return False
        self.predecessor.await_room()
        larger = None
        try:
            # Beside the old one, since it may turn out that there is no room for it on some rank.
            if need is not None:
                larger = self._create(need, beside=True)
        except Exception as error:
            logger.warning("no larger arena: %s", error)
        if all(self._comm.exchange("making a larger arena", lambda: larger is not None, wait="commit")):
            assert larger is not None
            self.stager.close()
            self._release(self.arena)
            _own.discard(larger.path)
            larger.move(self.arena.path)
            _own.add(larger.path)
            self.arena = larger
            self.stager = self._stager()
            return True
        if larger is not None:
            self._release(larger)
            larger.unlink()
        self.max_k = min(self._comm.exchange("agreeing on K", self._largest_k))
        if self._rank == 0:
            logger.warning("K of snapshots stays at %d: there is no memory for more", self.max_k)
        return False

    def _affordable(self, k: K) -> ArenaNeed | None:
        try:
            return apply_budget(self._need_of(k), self._budget())
        except ConfigError as error:
            logger.warning("%s", error.what)
            return None

    def _fits(self, need: ArenaNeed) -> bool:
        return need.dense <= self.arena.spec.dense and need.experts <= self.arena.spec.experts

    def _largest_k(self) -> int:
        """Returns the largest K that the present arena has room for."""
        self.max_k = max(self._pec.full_k, default=1)
        return _largest(self.max_k, lambda k: self._fits(self._need_of(k)))

    def _stager(self) -> Stager:
        memory = torch.from_numpy(self.arena.array)
        return Stager(memory, self.device, deadline_s=self._config.timeouts.commit_s)

    def _release(self, arena: Arena) -> None:
        unregister(torch.from_numpy(arena.array[: arena.spec.reserved]))
        arena.close()
        _own.discard(arena.path)

    def _need(self) -> ArenaNeed:
        """Sizes the arena; with K `auto` it is as large as the budget, or else shared memory, allows."""
        config, budget = self._config, self._budget()
        if config.k_snapshot != AUTO or config.selection == "full":
            return apply_budget(self._need_of(config.k_snapshot), budget)
        room = budget
        if room is None:
            free = shutil.disk_usage(self._folder).free + self.predecessor.nbytes
            room = int(free * _ROOM_SHARE) // self._neighbours

        def fits(k: int) -> bool:
            try:
                apply_budget(self._need_of(k), room)
            except ConfigError:
                return False
            return True

        self.max_k = _largest(self.max_k, fits)
        # Where not even one expert fits, the budget says so here, or shared memory when the arena is made.
        return apply_budget(self._need_of(self.max_k), room if fits(self.max_k) else budget)

    def _budget(self) -> int | None:
        budget = self._config.host.memory_budget_gib
        return None if budget is None else int(budget * 2**30)

    def _need_of(self, k: K) -> ArenaNeed:
        config = self._config
        # Only where snapshots go on beside a persist does the persist need room of its own.
        beside = config.snapshot_interval != 0
        pins = largest_choice(self.ownership, self._pec.persist_k(k), self._rank) if beside else 0
        return arena_need(
            self._expert_bytes,
            self.window_bytes(k),
            self.dense_bytes,
            pins_bytes=pins,
            pinned_dense=int(beside),
            keep_committed=config.host.keep_committed,
        )

    def _create(self, need: ArenaNeed, *, beside: bool = False) -> Arena:
        begin = time.perf_counter()
        spec = ArenaSpec(need.dense, need.experts, _EXTRA_BYTES, need.slots)
        path = arena_path(self._folder, f"{self.run}-larger" if beside else self.run, self._rank)
        identity = Identity(
            job=self.job,
            run=self.run,
            rank=self._rank,
            world=self._world,
            pid=os.getpid(),
            node=node_name(),
            url=self._config.save_dir,
            attempt=None,
            created=time.time(),
        )
        _own.add(path)
        threads = max(1, min(_POPULATE_THREADS, (os.cpu_count() or 1) // self._neighbours))
        arena = Arena.create(path, spec, identity, progress=_progress("populating", self._rank), threads=threads)
        try:
            register(torch.from_numpy(arena.array[: spec.reserved]))
        except BaseException:
            arena.close()
            arena.unlink()
            raise
        self._made = arena
        if self._rank == 0:
            logger.info(
                "arena: %.2f GiB of shared memory per rank (%s), ready in %.1f s",
                need.total / 2**30,
                need.formula,
                time.perf_counter() - begin,
            )
        return arena

    def event(self, url: str, kind: str, step: int, *, attempt: int | None = None, **fields: Any) -> None:
        """Adds a line to the event log of a directory, through the agent; never raises."""
        self.agent.event(Event(url=url, event=kind, attempt=attempt, step=step, fields=fields))

    def close(self) -> None:
        """Lets go of everything; the arena's file stays for a recovery that can find it. May be repeated."""
        if self._closed:
            return
        self._closed = True
        self.predecessor.let_go()
        self.votes.close()
        self.stager.close()
        answered = self.agent.close(_CONNECT_S)
        self._release(self.arena)
        if answered and self.job.startswith(UNNAMED):
            self.arena.unlink()


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest K from 1 to `most` that fits; 1 if none does. What fits fits with a smaller K as well."""
    if most <= 1 or fits(most):
        return max(most, 1)
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Home(NamedTuple):
    """Where a rank lives: ranks of one node have equal ones.

    Attributes:
        name: name of the node.
        given: MOC_NODE gave that name.
        memory: the shared memory that it uses, which several nodes of one machine may have in common.
    """

    name: str
    given: bool
    memory: str

    @classmethod
    def here(cls) -> Home:
        """Returns that of this process. Containers may share a kernel, but not a /dev/shm.

        Raises:
            ConfigError: if MOC_NODE is no safe file name.
        """
        shared = os.environ.get("MOC_SHM_DIR") or "/dev/shm"
        with suppress(OSError):
            place = Path(shared).stat()
            shared = f"{place.st_dev}:{place.st_ino}"
        return cls(node_name(), named_node() is not None, f"{shared}/{_boot_id()}")


def check_homes(homes: Sequence[Home]) -> None:
    """Refuses one MOC_NODE on several machines: agents of both would write into one event log.

    Args:
        homes: of every rank.

    Raises:
        ConfigError: naming two of the ranks.
    """
    seen: dict[str, tuple[int, Home]] = {}
    for rank, home in enumerate(homes):
        first, other = seen.setdefault(home.name, (rank, home))
        if home != other and (home.given or other.given):
            raise ConfigError(
                f"ranks {first} and {rank} are both on a node named {home.name!r}, but share no memory",
                where="MOC_NODE",
                fix="give every node a name of its own, or leave MOC_NODE unset, which takes the host name",
            )


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _progress(what: str, rank: int) -> Callable[[int, int], None]:
    """Returns a progress callback that logs on rank 0 if it takes long."""
    last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if rank == 0 and (now - last > _PROGRESS_S):
            last = now
            logger.info("%s host memory: %.1f of %.1f GiB", what, done / 2**30, total / 2**30)

    return progress
