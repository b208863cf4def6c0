"""Brings the newest consistent state in memory to storage, after its trainers are gone (DESIGN section 9).

What is written is what a persist of that step would have written, with every expert of which memory has something
newer than the directory: dense state of the newest step that is whole on every rank, each expert at its newest version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moc_ckpt.errors import StaleAttemptError, StorageError
from moc_ckpt.pec.holdings import DirectoryVersions, Place, persist_history
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.rotation import Rotation
from moc_ckpt.pec.selector import SaveHistory
from moc_ckpt.persist.protocol import Status, StatusRequest
from moc_ckpt.persist.slot_packs import plan_pack
from moc_ckpt.persist.snapshot_record import SnapshotRecord, unpack_learnt
from moc_ckpt.persist.source import FileSource
from moc_ckpt.persist.survey import ask_agent
from moc_ckpt.persist.writer import SaveId, build_part, write_prepared
from moc_ckpt.plan.save_plan import DENSE, EXPERTS, PackPlan, SavePlan
from moc_ckpt.recovery.memory import Inventory, JobMemory, RankMemory, open_memory
from moc_ckpt.snapshot.arena import writer_pid
from moc_ckpt.state.unit import Version, parse_expert_unit
from moc_ckpt.storage.attempts import admissible, ancestry, current_attempt
from moc_ckpt.storage.checkpoint import list_checkpoints, load_manifest, new_save_id
from moc_ckpt.storage.commit import commit
from moc_ckpt.storage.manifest import CommitInfo, Manifest, Part
from moc_ckpt.storage.store import Store, open_store

__all__ = [
    "Flush",
    "flush_job",
    "plan_flush",
    "tokens_of",
    "wait_for_agent",
    "write_parts",
]

_THREADS = 2
_RANKS_AT_ONCE = 4
_LOOK_S = 0.2
# A commit whose parts are all there takes less.
_COMMIT_S = 5.0
_DENSE_UNIT = "dense"


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
        newest: the newest checkpoint of the timeline.
        nbytes: bytes of the slots to write on this node; 0 until it is known.
    """

    url: str
    attempt: int
    step: int
    stored_step: int | None
    experts: Mapping[str, int]
    world: int
    newest: Manifest | None
    nbytes: int = 0

    @property
    def tag(self) -> str:
        """Tag of the checkpoint that it makes: the one that storage has of this step, if there is one."""
        same = self.newest is not None and self.newest.step == self.step and not self.newest.kept
        return self.newest.tag if same and self.newest is not None else f"global_step{self.step}"


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
    if memory.absent:
        raise StorageError(
            f"the memory of ranks {', '.join(map(str, memory.absent))} of {memory.world} is not here, "
            "and dense state is sharded over all",
            where=store.url,
            fix="where their node is lost, the newest checkpoint on storage is what there is",
        )
    chosen = memory.choose()
    if chosen is None:
        raise StorageError(
            "memory holds no snapshot that is whole on every rank",
            where=store.url,
            fix="the newest checkpoint on storage is what there is",
        )
    newest_attempt = current_attempt(store)
    if newest_attempt is None or newest_attempt.attempt != memory.attempt:
        raise StaleAttemptError(
            f"what memory holds is of attempt {memory.attempt}; the directory belongs to "
            f"{f'attempt {newest_attempt.attempt}' if newest_attempt else 'nobody'}",
            where=store.url,
            fix="a later run went on from an older state; what it saved is what counts",
        )
    newest, stored = _stored(store, memory.attempt, chosen.step)
    experts = {unit: step for unit, step in chosen.experts.items() if step > stored.get(unit, -1)}
    if newest is not None and newest.step >= chosen.step and not experts:
        return None
    stored_step = newest.step if newest is not None else None
    return Flush(store.url, memory.attempt, chosen.step, stored_step, experts, memory.world, newest)


def _stored(store: Store, attempt: int, step: int) -> tuple[Manifest | None, dict[str, int]]:
    """Returns the newest checkpoint of a timeline, and the step of each expert's newest version there up to `step`."""
    line = ancestry(store, attempt)
    newest: Manifest | None = None
    found: dict[str, int] = {}
    for summary in list_checkpoints(store):
        if summary.error or not admissible((summary.attempt, summary.step), line):
            continue
        manifest = load_manifest(store, summary.tag)
        newest = newest or manifest
        for unit in manifest.units:
            if parse_expert_unit(unit.name) is not None and unit.step <= step and admissible(unit.version, line):
                found[unit.name] = max(unit.step, found.get(unit.name, -1))
    return newest, found


def _with_bytes(flush: Flush, memory: JobMemory) -> Flush:
    """Returns a flush that knows how many bytes of it are in this memory."""
    wanted = {(_DENSE_UNIT, flush.step), *flush.experts.items()}
    slots = (item for rank in memory.ranks.values() for item in rank.slots.items())
    return replace(flush, nbytes=sum(slot.nbytes for key, slot in slots if key in wanted))


def flush_job(
    folder: Path,
    store: Store | None = None,
    *,
    only: Container[Path] | None = None,
    deadline_s: float = 600.0,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    waiting: Callable[[list[int]], None] = lambda ranks: None,
) -> tuple[Flush | None, Manifest | None]:
    """Writes the newest consistent state in a job's memory to storage and commits it.

    Waits first for what the job's agent still writes. A kill at any moment leaves the directory as it was.

    Args:
        folder: the job's directory in shared memory.
        store: the checkpoint root; None: the one that the job saved into last.
        only: look at these arenas alone; None for all of the job.
        deadline_s: seconds to wait for the agent.
        dry_run: only say what would be written.
        progress: is told the bytes written, and all.
        waiting: is told for which ranks the agent is still writing, once.

    Returns:
        What was to write (None: nothing, the directory has all or memory is empty), and the new checkpoint.

    Raises:
        StorageError: if memory holds nothing whole, its trainers still live, or storage refuses.
        StaleAttemptError: if a later run owns the directory.
    """
    wait_for_agent(folder, deadline_s, waiting)
    with open_memory(folder, only) as memory:
        if memory is None:
            return None, None
        _refuse_living(memory)
        store = store or (open_store(memory.inventory.url) if memory.inventory.url else None)
        if store is None:
            return None, None
        flush = plan_flush(memory.inventory, store)
        if flush is None:
            return None, None
        flush = _with_bytes(flush, memory)
        if dry_run:
            return flush, None
        save_id = new_save_id()
        write_parts(memory, store, flush, save_id, tokens_of(memory, flush), progress)
        return flush, commit(store, flush.tag, save_id, attempt=flush.attempt)


def _refuse_living(memory: JobMemory) -> None:
    """Raises StorageError if a trainer of the run still lives."""
    for rank in memory.ranks.values():
        pid = writer_pid(rank.arena.path)
        if pid is not None:
            raise StorageError(
                f"rank {rank.rank} is still alive (process {pid})",
                where=str(rank.arena.path),
                fix="end the run first; a run that lives saves by itself",
            )


def wait_for_agent(folder: Path, deadline_s: float, tell: Callable[[list[int]], None] = lambda ranks: None) -> None:
    """Waits until the job's agent has written what its trainers gave it; an agent that is gone has nothing.

    A save that is written and waits for the parts of other ranks is waited for shortly only: where its other trainers
    are gone, those parts never come.

    Args:
        folder: the job's directory in shared memory.
        deadline_s: seconds to wait.
        tell: is told once for which ranks.

    Raises:
        StorageError: if the agent is still writing then.
    """
    begun = time.monotonic()
    told = False
    while True:
        try:
            answer = ask_agent(folder, StatusRequest())
        except StorageError:
            return
        # Trainers that live go on saving; theirs is none of this.
        ranks = [rank for rank in answer.ranks if not rank.alive] if isinstance(answer, Status) else []
        writing = [rank.rank for rank in ranks if rank.queued or rank.writing]
        waited = time.monotonic() - begun
        if not writing and (waited > _COMMIT_S or not any(rank.committing for rank in ranks)):
            return
        if writing and not told:
            tell(writing)
            told = True
        if waited > deadline_s:
            raise StorageError(
                f"the agent has not written the saves of ranks {', '.join(map(str, writing))} after {deadline_s:g} s",
                where=str(folder),
                fix="`moc-ckpt agent status` shows what it is doing; is the storage slow?",
            )
        time.sleep(_LOOK_S)


def tokens_of(memory: JobMemory, flush: Flush) -> dict[str, int]:
    """Returns the tokens that each expert's version of a flush has learnt; rank 0's memory knows them."""
    return _tokens(memory.ranks[0].record(flush.step), flush.experts)


def write_parts(
    memory: JobMemory,
    store: Store,
    flush: Flush,
    save_id: str,
    tokens: Mapping[str, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes what a node has of a flush; `commit` follows once all nodes have done so.

    Args:
        memory: the memory of this node.
        store: the checkpoint root.
        flush: what to write, on all nodes.
        save_id: the same on all nodes.
        tokens: of `tokens_of`.
        progress: is told the bytes written, and all of this node.

    Raises:
        StorageError: if storage refuses.
    """
    done = [0]

    def write(rank: RankMemory) -> None:
        record = rank.record(flush.step)
        info = _commit_info(rank, record, flush) if rank.rank == 0 else None
        part, packs, extras = _part(rank, record, flush, save_id, tokens, info)
        sources = [FileSource(rank.arena.array, spans) for spans in packs]
        written = write_prepared(store, part, sources, extras, threads=_THREADS)
        done[0] += sum(pack.nbytes for pack in written.packs)
        progress(done[0], flush.nbytes)

    progress(0, flush.nbytes)
    with ThreadPoolExecutor(_RANKS_AT_ONCE, thread_name_prefix="moc-flush") as workers:
        for _ in workers.map(write, memory.ranks.values()):
            pass


def _part(
    rank: RankMemory,
    record: SnapshotRecord,
    flush: Flush,
    save_id: str,
    tokens: Mapping[str, int],
    info: CommitInfo | None,
) -> tuple[Part, list[list[tuple[int, int, int]]], dict[str, bytes]]:
    packs: list[PackPlan] = []
    spans: list[list[tuple[int, int, int]]] = []
    declared = {item.key: (item.dtype, item.shape) for item in record.hollow}
    own = {unit: step for unit, step in flush.experts.items() if (unit, step) in rank.slots}
    groups: Sequence[tuple[str, list[tuple[str, int]]]] = (
        (DENSE, [(_DENSE_UNIT, flush.step)] if (_DENSE_UNIT, flush.step) in rank.slots else []),
        # In the order of memory, so that a pack is few long runs.
        (EXPERTS, sorted(own.items(), key=lambda item: rank.slots[item].extents)),
    )
    for name, keys in groups:
        if not keys:
            continue
        units = [rank.unit(*key) for key in keys]
        pack, places = plan_pack(name, units)
        packs.append(pack)
        spans.append(places)
        for item in units:
            for _, fragment in item.fragments:
                declared[fragment.key] = (fragment.dtype, fragment.shape)
    files = rank.files(flush.step)
    optimizer = files.pop("optimizer", b"")
    # What commits and parts carry is no file of a checkpoint.
    extras = {name: data for name, data in files.items() if name not in ("state", "record")}
    part = build_part(
        SaveId(flush.tag, save_id, Version(flush.attempt, flush.step), rank.rank, flush.world),
        SavePlan(tuple(packs)),
        declared,
        tokens={unit: tokens[unit] for unit in own if unit in tokens},
        versions={unit: Version(flush.attempt, step) for unit, step in own.items()},
        parameters=record.parameters,
        rng=record.rng,
        optimizer=optimizer,
        commit=info,
    )
    return part, spans, extras


def _tokens(record: SnapshotRecord, experts: Mapping[str, int]) -> dict[str, int]:
    """Returns the tokens that each expert's version has learnt."""
    learnt = unpack_learnt(record.learnt, [layer.num_experts for layer in record.moe_layers])
    found = {}
    for unit, step in experts.items():
        place = parse_expert_unit(unit)
        if place is not None and step in learnt:
            found[unit] = int(learnt[step][place[0]][place[1]])
    return found


def _commit_info(first: RankMemory, record: SnapshotRecord, flush: Flush) -> CommitInfo:
    ledger = None
    if record.ledger is not None:
        counts = [layer.num_experts for layer in record.moe_layers]
        found, learnt = Ledger.from_data(record.ledger), unpack_learnt(record.learnt, counts)

        def learnt_at(step: int) -> Sequence[np.ndarray]:
            return learnt.get(step, found.learnt)

        versions = {place: step for unit, step in flush.experts.items() if (place := _place(unit)) is not None}
        saved = flush.newest.ledger if flush.newest is not None else None
        history = SaveHistory.from_data(saved["history"], counts) if saved and "history" in saved else None
        rotation = Rotation.from_data(record.rotation or Rotation().to_data(), counts)
        directory = DirectoryVersions(history or SaveHistory.start(counts))
        after = persist_history(directory, rotation, versions, found, learnt_at)
        taken = [sum(place[0] == layer for place in versions) for layer in range(len(counts))]
        ledger = {**record.ledger, "k": taken, "history": after.to_data()}
    return CommitInfo(
        topology=record.topology,
        moe_layers=record.moe_layers,
        save_latest=True,
        ledger=ledger,
        selected=sorted(flush.experts),
        state=first.files(flush.step)["state"],
    )


def _place(unit: str) -> Place | None:
    return parse_expert_unit(unit)
