"""A save on its way from host memory to storage, and the request that the node agent gets for it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import msgspec

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.pec.holdings import DirectoryVersions, Place
from moc_ckpt.pec.selector import SaveHistory, Selection
from moc_ckpt.persist.protocol import ExtraJob, Outcome, PackJob, Persist, Retention
from moc_ckpt.persist.slot_packs import SlotUnit, plan_pack
from moc_ckpt.persist.writer import SaveId, build_part
from moc_ckpt.plan.save_plan import DENSE, EXPERTS, PackPlan, SavePlan
from moc_ckpt.snapshot.local_slots import Version
from moc_ckpt.snapshot.slots import Slot
from moc_ckpt.state.fragment import TensorKey
from moc_ckpt.state.unit import Version as UnitVersion
from moc_ckpt.storage.manifest import CommitInfo
from moc_ckpt.storage.store import Store

__all__ = ["Directory", "SaveInFlight", "persist_request"]


@dataclass(slots=True)
class Directory:
    """A directory that this run saves into.

    Attributes:
        store: the checkpoint root.
        attempt: this run's attempt in it.
        run_prefix: save ids of this run begin with it.
        versions: what it holds of every expert.
    """

    store: Store
    attempt: int
    run_prefix: str
    versions: DirectoryVersions


@dataclass(slots=True)
class SaveInFlight:
    """One save, from the moment that its snapshot was scheduled.

    Attributes:
        directory: where to.
        save_id: its id.
        tag: the checkpoint's name.
        step: engine.global_steps of its dense state.
        experts: step of the version of each expert that it stores.
        k: K_persist of each layer.
        save_latest: let `latest` name it.
        explicit: somebody called save_checkpoint.
        history: the directory's history once it is committed; set in the background.
        floor: Dynamic-K's floor once it is committed; set in the background.
        needed: (unit, step) of this rank's versions that must stay until it has ended.
        pinned: they are marked as being persisted.
        outcome: how it ended; None while it is under way.
        reported: somebody was told how it failed.
        nbytes: bytes that this rank writes.
        submitted: when the agent got it, in seconds of `time.perf_counter`.
    """

    directory: Directory
    save_id: str
    tag: str
    step: int
    experts: Mapping[Place, int]
    k: tuple[int, ...]
    save_latest: bool
    explicit: bool
    history: SaveHistory | None = None
    floor: int = 0
    needed: list[tuple[str, int]] = field(default_factory=list)
    pinned: bool = False
    outcome: Outcome | None = None
    reported: bool = False
    nbytes: int = 0
    submitted: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def selection(self, layers: int) -> Selection:
        """Returns what it takes, with the history that it leaves behind."""
        assert self.history is not None
        experts: list[list[int]] = [[] for _ in range(layers)]
        for layer, expert in self.experts:
            experts[layer].append(expert)
        return Selection(tuple(tuple(sorted(found)) for found in experts), self.k, self.history)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error of this process."""
        known = error if isinstance(error, MocError) else None
        self.outcome = Outcome(
            seq=0,
            committed=False,
            what=known.what if known else f"{type(error).__name__}: {error}",
            where=known.where if known else "",
            fix=known.fix if known else "",
        )

    def error(self) -> MocError | None:
        """Returns what it failed with; None if it did not."""
        if self.outcome is None or self.outcome.committed:
            return None
        return StorageError(
            f"checkpoint {self.tag!r} of step {self.step} was not committed: {self.outcome.what}",
            where=self.outcome.where or self.directory.store.locate(self.tag),
            fix=self.outcome.fix or "the next save tries again; older checkpoints are as they were",
        )


def persist_request(
    save: SaveInFlight,
    *,
    rank: int,
    world: int,
    dense: Version | None,
    experts: Mapping[str, tuple[Version, int]],
    extra: Slot,
    extras: Collection[tuple[str, int, int]],
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]],
    parameters: int,
    rng: Mapping[str, str],
    optimizer: bytes,
    commit: CommitInfo | None,
    arena: str,
    threads: int,
    commit_s: float,
    retention: Retention,
) -> Persist:
    """Describes this rank's share of a save to the agent. Not collective.

    Args:
        save: the save.
        rank: this rank.
        world: number of ranks.
        dense: this rank's dense state of the save's step; None if it writes none.
        experts: unit -> this rank's version of it, and the tokens that it has learnt.
        extra: the slot with what is not a tensor.
        extras: (file name, first byte in that slot, bytes) of what the save needs of it.
        declared: logical tensors that the rank vouches for.
        parameters: number of parameters of which it is the first replica.
        rng: digests of its random number streams.
        optimizer: its optimizer's scalar records, encoded.
        commit: what the commit needs; rank 0 only.
        arena: path of the arena.
        threads: threads that checksum and write.
        commit_s: seconds within which all ranks must have written.
        retention: which checkpoints stay.
    """
    spans: list[list[tuple[int, int, int]]] = []
    packs: list[PackPlan] = []
    if dense is not None:
        packs.append(_pack(DENSE, [dense], spans))
    if experts:
        packs.append(_pack(EXPERTS, [version for version, _ in experts.values()], spans))
    attempt = save.directory.attempt
    ident = SaveId(save.tag, save.save_id, UnitVersion(attempt, save.step), rank, world)
    part = build_part(
        ident,
        SavePlan(tuple(packs)),
        declared,
        tokens={unit: tokens for unit, (_, tokens) in experts.items()},
        versions={unit: UnitVersion(attempt, version.slot.step) for unit, (version, _) in experts.items()},
        parameters=parameters,
        rng=rng,
        optimizer=optimizer,
        commit=commit,
    )
    return Persist(
        url=save.directory.store.url,
        part=part,
        packs=[PackJob(record.path, record.nbytes, places) for record, places in zip(part.packs, spans, strict=True)],
        extras=[ExtraJob(name, _in_file(extra, at), nbytes) for name, at, nbytes in extras],
        arena=arena,
        threads=threads,
        commit_s=commit_s,
        retention=retention,
        run_prefix=save.directory.run_prefix,
    )


def _pack(name: str, versions: Collection[Version], spans: list[list[tuple[int, int, int]]]) -> PackPlan:
    """Lays slots one after the other into a pack, and notes where their bytes are in the arena file."""
    units = []
    for version in versions:
        assert version.source is not None
        source = version.source
        units.append(SlotUnit(source.fragments, source.offsets, source.nbytes, version.slot.extents))
    pack, places = plan_pack(name, units)
    spans.append(places)
    return pack


def _in_file(slot: Slot, at: int) -> int:
    """Returns where byte `at` of a slot that is one run lies in the arena file."""
    (offset, _), *more = slot.extents
    if more:
        raise ValueError("the slot is not one run")
    return offset + at


def encode_files(files: Mapping[str, bytes]) -> tuple[bytes, list[tuple[str, int, int]], bytes]:
    """Joins small files for an extra slot.

    Returns:
        The bytes, (name, first byte, bytes) of each file, and the same as a descriptor for readers of the arena.
    """
    places, at = [], 0
    for name, data in files.items():
        places.append((name, at, len(data)))
        at += len(data)
    return b"".join(files.values()), places, msgspec.msgpack.encode(places)
