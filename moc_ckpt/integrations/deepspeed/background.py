"""What the votes' thread does for a snapshot: its ballot, the state beside tensors, and the request to the agent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moc_ckpt.errors import ConfigError, RendezvousTimeoutError, StorageError
from moc_ckpt.integrations.deepspeed.capture import Captured
from moc_ckpt.integrations.deepspeed.client_state import encode_client_state
from moc_ckpt.integrations.deepspeed.host import Host
from moc_ckpt.integrations.deepspeed.in_flight import SaveInFlight, encode_files, persist_request
from moc_ckpt.integrations.deepspeed.live_state import LiveState
from moc_ckpt.integrations.deepspeed.pipeline_report import PipelineReport
from moc_ckpt.integrations.deepspeed.rng import digest_rng
from moc_ckpt.integrations.deepspeed.rounds import Status, Tally, digest
from moc_ckpt.integrations.deepspeed.save import CLIENT_STATE, commit_info, moe_layers, rank_file, topology
from moc_ckpt.integrations.deepspeed.tuning import Tuner
from moc_ckpt.pec.holdings import Place, persist_history
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.rotation import Rotation
from moc_ckpt.pec.selector import Selection
from moc_ckpt.persist.protocol import Outcome, Retention
from moc_ckpt.persist.snapshot_record import RECORD, SnapshotRecord, encode_record, pack_learnt
from moc_ckpt.plan.adaptive_model import Decision
from moc_ckpt.snapshot.local_slots import DENSE_UNIT, EXTRA_UNIT, LocalSlots, Version
from moc_ckpt.snapshot.slots import Slot
from moc_ckpt.snapshot.sources import UnitSource
from moc_ckpt.snapshot.stager import CopyJob, Piece, Work
from moc_ckpt.state.plain import encode_plain
from moc_ckpt.state.unit import expert_unit
from moc_ckpt.storage.checkpoint import write_failure
from moc_ckpt.storage.manifest import TensorRecord
from moc_ckpt.votes import Ballot

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Background", "Prepared", "Round"]

logger = logging.getLogger("moc_ckpt")


@dataclass(slots=True)
class Round:
    """One vote, and the snapshot and the save that began with it.

    Attributes:
        step: engine.global_steps.
        live: where the state lies.
        base: the ledger as of the vote before.
        rotation: where the snapshots' rotation is after it.
        saves: the saves in flight when it was submitted, its own not among them.
        call: what it is about, equal on all ranks.
        arguments: arguments of save_checkpoint.
        counts: returns this rank's token counts.
        timeline: number of restores of this process before it: versions of an older one must never count as newer.
        automatic: a step brought it, and nobody waits for it.
        snapshot: it began a snapshot.
        places: experts of that.
        versions: this rank's slots of it.
        captured: its state beside tensors.
        job: its copies.
        save: the save that began with it.
        client_state: encodes the caller's; rank 0 only.
        error: why this rank's snapshot is not whole.
        result: what the vote said, the ledger of the step, and what was prepared for the next round.
    """

    step: int
    live: LiveState
    base: Ledger
    rotation: Rotation
    saves: list[SaveInFlight]
    call: tuple[object, ...]
    arguments: tuple[object, ...] = ()
    counts: Callable[[], np.ndarray] = field(default=lambda: np.zeros(0, dtype=np.int64))
    timeline: int = 0
    automatic: bool = False
    snapshot: bool = False
    places: frozenset[Place] = frozenset()
    versions: Sequence[Version] = ()
    captured: Captured | None = None
    job: CopyJob | None = None
    save: SaveInFlight | None = None
    client_state: Callable[[], bytes] = bytes
    error: Exception | None = None
    result: Future[tuple[Tally, Ledger, Prepared]] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the votes' thread finds out for the next round, so that the training thread need not.

    Attributes:
        decision: what is decided anew of what is `auto`; None if nothing is.
        selection: what the next snapshot takes.
    """

    decision: Decision | None
    selection: Selection


class Background:
    """The part of a pipeline that runs in the votes' thread, in the order of the rounds.

    Args:
        moc: the engine's plugin.
        host: the node's side.
        slots: this rank's slots.
        tuner: gets the measurements.
        report: tells people.

    Attributes:
        slots: as given.
        learnt: step -> per layer, [experts] tokens that the state of the step has learnt.
    """

    def __init__(self, moc: MocCheckpoint, host: Host, slots: LocalSlots, tuner: Tuner, report: PipelineReport) -> None:
        self._moc = moc
        self._host = host
        self.slots = slots
        self._tuner = tuner
        self._report = report
        self._config = moc.config
        self._rank, self._world = moc.comm.rank, moc.comm.world
        self._empty = encode_client_state({}, trust=False) if self._rank == 0 else b""
        self._topology, self._layers = topology(moc), moe_layers(moc)
        owners = host.ownership.owners_beside(self._rank)
        self._owners = {expert_unit(*place): list(ranks) for place, ranks in owners.items()}
        self._known_hollow: tuple[LiveState, list[TensorRecord]] | None = None
        self.learnt: dict[int, Sequence[np.ndarray]] = {}

    def submit(
        self,
        current: Round,
        previous: Round | None,
        has_room: Callable[[Round, Round | None], bool],
        prepare: Callable[[Round | None, Tally, Ledger], Prepared],
        *,
        retired: Round | None,
    ) -> None:
        """Hands a round over; what it says about the snapshot of the round before is known by its turn.

        Args:
            current: the round. It must not refer to older ones: that would keep them all.
            previous: the round before it.
            has_room: tells whether there is room for another snapshot after this one; called in the votes' thread.
            prepare: acts in memory upon what the vote says about the previous round, and prepares the next; likewise.
            retired: a round that nobody needs any more; the thread lets go of it last.
        """
        votes, sizes = self._host.votes, Status.sizes(self._moc.pec.counts_size)
        what = f"the vote of step {current.step}"
        ballot = partial(self._ballot, current, previous, has_room)
        current.result = votes.submit(what, sizes, ballot, partial(self._finish, current, previous, prepare))
        votes.post(partial(self._complete, current, retired))

    def _ballot(
        self, current: Round, previous: Round | None, has_room: Callable[[Round, Round | None], bool]
    ) -> Ballot:
        if current.automatic and current.save is None:
            time.sleep(self._tuner.vote_hold_back_s)
        captured, reader, buffers = current.captured, current.live.reader, 0
        if captured is not None:
            captured.wait()
        if captured is not None and reader.shared_buffers:
            buffers = digest(*(encode_plain(captured.buffers[name].cpu(), name) for name in reader.shared_buffers))
        return Status(
            counts=current.counts(),
            can_fill=has_room(current, previous),
            filled=previous is None or previous.error is None,
            settled=tuple(save.outcome is not None for save in current.saves),
            failed=tuple(save.error() is not None for save in current.saves),
            # With what was selected: ranks whose arenas differ must not go different ways.
            call=digest(*current.call, sorted(current.places)),
            arguments=digest(*current.arguments),
            buffers=buffers,
            **self._tuner.rates(),
        ).ballot()

    def _finish(
        self,
        current: Round,
        previous: Round | None,
        prepare: Callable[[Round | None, Tally, Ledger], Prepared],
        totals: Ballot,
    ) -> tuple[Tally, Ledger, Prepared]:
        pec = self._moc.pec
        tally = Tally.of(totals, world=self._world, counts=pec.counts_size, saves=len(current.saves))
        ledger = pec.add_counts(current.base, tally.counts)
        if current.snapshot or current.save is not None:
            self.learnt[current.step] = ledger.learnt
        return tally, ledger, prepare(previous, tally, ledger)

    def place(self, current: Round, work: Sequence[tuple[UnitSource, tuple[Piece, ...]]]) -> Work:
        """Takes slots for a snapshot's units; runs in the stager's thread.

        Args:
            current: the snapshot's round.
            work: the units and what to copy of them.

        Returns:
            What to copy where.

        Raises:
            StorageError: if there is no room; the vote before had promised some.
        """
        versions = self.slots.begin([source for source, _ in work], attempt=current.timeline, step=current.step)
        if versions is None:
            raise StorageError("the arena has no room for a snapshot", where=str(self._host.arena.path))
        current.versions = versions
        return [(pieces, version.slot.extents) for (_, pieces), version in zip(work, versions, strict=True)]

    def copied(self, current: Round, job: CopyJob) -> None:
        """Takes in that a snapshot's copies have ended; runs in the stager's thread."""
        if job.error is not None and current.error is None:
            current.error = job.error
        self.slots.end(current.versions, whole=current.error is None)

    def _complete(self, current: Round, _retired: Round | None) -> None:
        """Makes a snapshot whole on this rank, then hands its save to the agent."""
        save = current.save
        try:
            tally, ledger, _ = current.result.result()
            self._check(current, tally)
            if current.captured is not None:
                slot, places, optimizer = self._write_extra(current, tally, ledger)
                if save is not None:
                    self._persist(current, save, ledger, slot, places, optimizer)
            if current.job is not None:
                self._tuner.copied(current.job)
                self._report.snapshotted(current.step, current.job, len(current.places), self._tuner)
        except Exception as error:
            if current.error is None:
                current.error = error
            if current.snapshot:
                self._report.snapshot_failed(current.step, error)
            if save is not None:
                self._give_up(save, error)
        finally:
            current.captured = None

    def _check(self, current: Round, tally: Tally) -> None:
        """Raises what keeps this rank's snapshot from being whole."""
        if not tally.agreed or not tally.same_arguments:
            raise ConfigError(
                f"save_checkpoint at step {current.step} has other arguments on other ranks than "
                f"{', '.join(map(repr, current.arguments))}"
                if tally.agreed
                else f"ranks do different things at step {current.step}; this one: {current.call}",
                where=f"rank {self._rank} of {self._world}",
                fix="call save_checkpoint with the same arguments at the same step on every rank",
            )
        if current.job is not None and not current.job.wait(self._config.timeouts.commit_s):
            raise RendezvousTimeoutError(
                f"the copies of step {current.step} did not end within {self._config.timeouts.commit_s:g} s",
                where=f"rank {self._rank} of {self._world}",
            )
        if current.error is not None:
            raise current.error

    def _write_extra(
        self, current: Round, tally: Tally, ledger: Ledger
    ) -> tuple[Slot, list[tuple[str, int, int]], bytes]:
        captured, reader = current.captured, current.live.reader
        assert captured is not None
        own = reader.own_buffers(captured, self._rank, current.live.first_holders, same=tally.same_buffers)
        optimizer = reader.optimizer_blob(captured)
        files = {rank_file(self._rank): encode_plain({"rng": captured.rng, "buffers": own}, "rank state")}
        if self._rank == 0:
            files[CLIENT_STATE] = current.client_state() or self._empty
        stored = len(files)
        # What parts and commits carry, for a recovery that finds nothing but the arena.
        files |= {"optimizer": optimizer, "state": captured.state, RECORD: self._record(current, ledger)}
        data, places, descriptor = encode_files(files)
        slot = self.slots.add_extra(data, descriptor, attempt=current.timeline, step=current.step)
        if slot is None:
            raise StorageError(
                f"state beside tensors of {len(data):,} bytes does not fit into the arena",
                where=str(self._host.arena.path),
                fix="keep client_state small, or use save_mode durable",
            )
        return slot, places[:stored], optimizer

    def _record(self, current: Round, ledger: Ledger) -> bytes:
        captured, first = current.captured, self._rank == 0
        assert captured is not None
        return encode_record(
            SnapshotRecord(
                step=current.step,
                topology=self._topology,
                moe_layers=self._layers,
                parameters=current.live.parameters,
                hollow=self._hollow(current.live),
                rng=digest_rng(captured.rng),
                learnt={step: pack_learnt(learnt) for step, learnt in self.learnt.items()},
                ledger=ledger.to_data() if first and ledger.processed else None,
                rotation=current.rotation.to_data() if first else None,
                owners=self._owners,
            )
        )

    def _hollow(self, live: LiveState) -> list[TensorRecord]:
        if self._known_hollow is None or self._known_hollow[0] is not live:
            found = [
                TensorRecord(key.fqn, key.kind, dtype, tuple(shape))
                for key, (dtype, shape) in live.catalog.declared.items()
                if 0 in shape
            ]
            self._known_hollow = live, found
        return self._known_hollow[1]

    def _persist(
        self,
        current: Round,
        save: SaveInFlight,
        ledger: Ledger,
        slot: Slot,
        places: list[tuple[str, int, int]],
        optimizer: bytes,
    ) -> None:
        pec, captured = self._moc.pec, current.captured
        assert captured is not None
        self.slots.need([(EXTRA_UNIT, save.step)])
        save.needed.append((EXTRA_UNIT, save.step))
        self.slots.pin(save.needed)
        save.pinned = True
        save.history = persist_history(
            save.directory.versions, current.rotation, save.experts, ledger, self.learnt.__getitem__
        )
        chosen = save.selection(len(ledger.processed))
        kept = pec.begin_save(chosen, ledger)
        save.floor = kept.floor
        experts: dict[str, tuple[Version, int]] = {}
        for (layer, expert), step in save.experts.items():
            version = self.slots.get(expert_unit(layer, expert), step)
            if version is not None:
                experts[expert_unit(layer, expert)] = (version, int(self.learnt[step][layer][expert]))
        info = None
        if self._rank == 0:
            info = commit_info(
                self._moc,
                save_latest=save.save_latest,
                ledger=pec.manifest_data(chosen, kept) if ledger.processed else None,
                selected=[expert_unit(*place) for place in sorted(save.experts)],
                state=captured.state,
            )
        storage = self._config.storage
        request = persist_request(
            save,
            rank=self._rank,
            world=self._world,
            dense=self.slots.get(DENSE_UNIT, save.step),
            # In the order of memory, so that a pack is few long runs.
            experts=dict(sorted(experts.items(), key=lambda item: item[1][0].slot.extents)),
            extra=slot,
            extras=places,
            declared=current.live.catalog.declared,
            parameters=current.live.parameters,
            rng=digest_rng(captured.rng),
            optimizer=optimizer,
            commit=info,
            arena=str(self._host.arena.path),
            threads=self._config.host.writer_threads,
            commit_s=self._config.timeouts.commit_s,
            retention=Retention(storage.keep_last, storage.keep_every),
        )
        save.nbytes = sum(pack.nbytes for pack in request.packs)
        save.submitted = time.perf_counter()
        self._host.agent.submit(request).add_done_callback(partial(self._ended, save))

    def _ended(self, save: SaveInFlight, future: Future[Outcome]) -> None:
        """Takes in how a save ended; runs in the agent client's thread."""
        try:
            outcome = future.result()
        except Exception as error:
            save.fail(error)
        else:
            if outcome.committed:
                self._tuner.persisted(save.nbytes, time.perf_counter() - save.submitted)
            save.outcome = outcome
        self._report.ended(save)

    def _give_up(self, save: SaveInFlight, error: Exception) -> None:
        """Ends a save that this rank cannot take part in, and tells the agents of the other ranks."""
        directory = save.directory
        try:
            write_failure(directory.store, save.tag, save.save_id, self._rank, error)
        except Exception as problem:  # they will wait for their deadline then
            logger.warning("the failure of %s cannot be reported to other ranks: %s", save.tag, problem)
        save.fail(error)
        self._report.ended(save)
