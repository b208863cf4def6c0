"""Brings the newest consistent state in memory to storage, after its trainers are gone (DESIGN section 9).

What is written is what a persist of that step would have written, with every expert of which memory has something
newer than the directory: dense state of the newest step that is whole on every rank, each expert at its newest version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from moc_ckpt.errors import StorageError
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
from moc_ckpt.recovery.flush_plan import Flush, plan_flush
from moc_ckpt.recovery.memory import JobMemory, RankMemory, open_memory
from moc_ckpt.snapshot.arena import writer_pid
from moc_ckpt.state.unit import Version, parse_expert_unit
from moc_ckpt.storage.checkpoint import new_save_id
from moc_ckpt.storage.commit import commit, commit_experts
from moc_ckpt.storage.manifest import CommitInfo, Manifest, Part
from moc_ckpt.storage.store import Store, open_store

__all__ = [
    "commit_flush",
    "flush_job",
    "tokens_of",
    "wait_for_agent",
    "with_tokens",
    "write_parts",
]

_THREADS = 2
_RANKS_AT_ONCE = 4
_LOOK_S = 0.2
# A commit whose parts are all there takes less.
_COMMIT_S = 5.0
_DENSE_UNIT = "dense"


def _with_bytes(flush: Flush, memory: JobMemory) -> Flush:
    """Returns a flush that knows how many bytes of it are in this memory."""
    wanted = {*([(_DENSE_UNIT, flush.step)] if flush.dense else []), *flush.experts.items()}
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
        return flush, commit_flush(store, flush, save_id)


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
    """Returns the tokens that each expert's version of a flush has learnt, as far as this node knows them.

    Of a flush with dense state rank 0's memory knows them all; otherwise the memory of whoever holds a part of it does.
    """
    if flush.dense:
        return _tokens(memory.ranks[0].record(flush.step), flush.experts) if 0 in memory.ranks else {}
    found: dict[str, int] = {}
    for rank in memory.ranks.values():
        for unit, step in flush.experts.items():
            if unit not in found and (unit, step) in rank.slots and (tokens := rank.learnt(unit, step)) is not None:
                found[unit] = tokens
    return found


def with_tokens(flush: Flush, tokens: Mapping[str, int]) -> Flush:
    """Returns a flush without those experts whose version nobody has counted the tokens of, if it only completes one.

    Without a count they would be charged to the PLT as if they had learnt nothing. Pure.
    """
    if flush.dense or flush.newest is None or flush.newest.ledger is None:
        return flush
    return replace(flush, experts={unit: step for unit, step in flush.experts.items() if unit in tokens})


def commit_flush(store: Store, flush: Flush, save_id: str, tokens: Mapping[str, int] | None = None) -> Manifest:
    """Publishes a flush once all nodes have written what they have of it.

    Args:
        store: the checkpoint root.
        flush: what was written.
        save_id: of all nodes.
        tokens: of `tokens_of`, of all nodes; for a flush without dense state.

    Raises:
        MocError: as `storage.commit.commit`.
    """
    if flush.dense or flush.newest is None:
        return commit(store, flush.tag, save_id, attempt=flush.attempt)
    ledger = flush.newest.ledger
    if ledger is not None and "history" in ledger:
        counts = [layer.num_experts for layer in flush.newest.moe_layers]
        history = SaveHistory.from_data(ledger["history"], counts).with_saved(
            {place: tokens[unit] for unit in flush.experts if tokens and (place := _place(unit)) is not None}
        )
        ledger = {**ledger, "history": history.to_data()}
    return commit_experts(store, flush.newest, save_id, attempt=flush.attempt, ledger=ledger)


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
        if not flush.dense and not any(key in rank.slots for key in flush.experts.items()):
            return
        record = rank.record(flush.step) if flush.dense else None
        info = _commit_info(rank, record, flush) if rank.rank == 0 and record is not None else None
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
    record: SnapshotRecord | None,
    flush: Flush,
    save_id: str,
    tokens: Mapping[str, int],
    info: CommitInfo | None,
) -> tuple[Part, list[list[tuple[int, int, int]]], dict[str, bytes]]:
    packs: list[PackPlan] = []
    spans: list[list[tuple[int, int, int]]] = []
    declared = {item.key: (item.dtype, item.shape) for item in (record.hollow if record is not None else ())}
    own = {unit: step for unit, step in flush.experts.items() if (unit, step) in rank.slots}
    groups: Sequence[tuple[str, list[tuple[str, int]]]] = (
        (DENSE, [(_DENSE_UNIT, flush.step)] if flush.dense and (_DENSE_UNIT, flush.step) in rank.slots else []),
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
    files = rank.files(flush.step) if record is not None else {}
    optimizer = files.pop("optimizer", b"")
    # What commits and parts carry is no file of a checkpoint.
    extras = {name: data for name, data in files.items() if name not in ("state", "record")}
    part = build_part(
        SaveId(flush.tag, save_id, Version(flush.attempt, flush.step), rank.rank, flush.world),
        SavePlan(tuple(packs)),
        declared,
        tokens={unit: tokens[unit] for unit in own if unit in tokens},
        versions={unit: Version(flush.attempt, step) for unit, step in own.items()},
        parameters=record.parameters if record is not None else 0,
        rng=record.rng if record is not None else {},
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
