"""Snapshots beside training, and saves on their way to storage (DESIGN sections 8 and 9).

Three threads of a trainer share the work. The training thread decides which experts and which slots; it waits for
neither network, nor disk, nor device. The stager's thread copies. The votes' thread reduces the ranks' statuses,
encodes what is not a tensor, and hands whole snapshots to the node agent (`background`). What a vote said is acted upon
at the next one, on all ranks alike (invariant I7).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from moc_ckpt.errors import MocError, RankError, RendezvousTimeoutError
from moc_ckpt.integrations.deepspeed.background import Background, Prepared, Round
from moc_ckpt.integrations.deepspeed.client_state import client_state_encoder
from moc_ckpt.integrations.deepspeed.host import Host
from moc_ckpt.integrations.deepspeed.in_flight import Directory, SaveInFlight
from moc_ckpt.integrations.deepspeed.live_state import StateFinder
from moc_ckpt.integrations.deepspeed.open_directories import OpenDirectories
from moc_ckpt.integrations.deepspeed.pipeline_report import PipelineReport
from moc_ckpt.integrations.deepspeed.rounds import MAX_IN_FLIGHT, Tally
from moc_ckpt.integrations.deepspeed.save import SaveRequest
from moc_ckpt.integrations.deepspeed.tuning import Tuner
from moc_ckpt.pec.holdings import MemoryVersions, plan_persist, plan_snapshot
from moc_ckpt.pec.k_values import K
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.selector import SaveHistory, Selection
from moc_ckpt.snapshot.local_slots import DENSE_UNIT, LocalSlots
from moc_ckpt.state.unit import expert_unit
from moc_ckpt.storage.checkpoint import check_tag

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Pipeline"]

logger = logging.getLogger("moc_ckpt")

_IDLE_VOTES = 4  # that free nothing while no save is under way: the first of them confirms the last snapshot
_POLL_S = 0.01  # between two looks at saves that somebody waits for


class Pipeline:
    """Automatic snapshots and asynchronous saves of one engine. Methods are collective where they say so.

    Building it is collective. Everything public belongs to the training thread.

    Args:
        moc: the engine's plugin, with its experts' side ready.

    Attributes:
        host: arena, stager, votes and agent of this rank.
        tuner: K and the intervals that apply now.
    """

    def __init__(self, moc: MocCheckpoint) -> None:
        self._moc = moc
        self._config = moc.config
        self._rank, self._world = moc.comm.rank, moc.comm.world
        self._memory = MemoryVersions([layer.num_experts for layer in moc.view.names.layers])
        self._finder = StateFinder(moc)
        self._live = self._finder.find()
        self._may_change = any(moc.comm.exchange("looking for buffers", lambda: self._live.reader.may_change))
        self.host = Host(moc, self._finder.slot_ownership(self._live))
        self.tuner = Tuner(moc.config, moc.pec, self.host, self._rank)
        self._slots = LocalSlots(self.host.arena, keep_committed=self.host.keep_committed)
        self._report = PipelineReport(moc, self.host)
        self._background = Background(moc, self.host, self._slots, self.tuner, self._report)
        self._directories = OpenDirectories(moc, self._report, self.host, self._memory.experts)
        self._saves: list[SaveInFlight] = []
        self._number = 0
        self._timeline = -1
        self._provider: Callable[[], Mapping[str, Any]] | None = None
        self._proven = False
        self._broken: Exception | None = None
        self._unreported: list[MocError] = []
        self.reset(None)

    # ------------------------------------------------------------------------------------------ public

    def register_state(self, provider: Callable[[], Mapping[str, Any]] | None) -> None:
        """Sets what gives automatic snapshots the caller's client state; called on rank 0 at each of them."""
        self._provider, self._proven = provider, False

    def before_update(self) -> None:
        """Keeps the optimizer's update behind the copies that read what it overwrites. Never raises."""
        try:
            self.tuner.update_begins()
            self.tuner.stalled(self.host.stager.before_update())
        except Exception as error:
            if self._last is not None and self._last.job is not None:
                # The copy may be torn, so it must never count as whole.
                self._last.error = error
            self._break(error)

    def step_done(self) -> None:
        """Takes the snapshot and begins the persist that are due after an optimizer step.

        Collective in effect: all ranks do the same at the same step, and nothing waits unless the last vote is still
        under way. Never raises (invariant I8).
        """
        step = int(self._moc.engine.global_steps)
        self.tuner.step_ended()
        snapshot, persist = self.tuner.due(step)
        # While something is under way every step votes: what storage has written frees memory at once.
        if self._broken is not None or not (snapshot or persist or self._saves or self._unconfirmed):
            return
        begin = time.perf_counter()
        self._report.flush(self.tuner)
        try:
            self._adopt()
            if snapshot or persist:
                self._automatic(step, persist=persist)
            else:
                self._submit(self._round(step, ("step", step)))
        except Exception as error:
            self._break(error)
        self.tuner.snapshot_took(time.perf_counter() - begin)

    def save(self, request: SaveRequest) -> SaveInFlight:
        """Schedules a checkpoint of the live state; collective. Waits for saves that are still under way.

        Returns:
            The save; `wait_for` waits for it.

        Raises:
            MocError: on all ranks, if it cannot begin.
        """
        begin = time.perf_counter()
        moc, step = self._moc, int(self._moc.engine.global_steps)
        check_tag(request.tag)
        if not self._directories.is_open(request.save_dir):
            # The ranks meet here, so bad arguments raise on all. Later errors fail the save, and `wait` raises them.
            moc.comm.agree("checking client_state", partial(self._encode, request), wait="rendezvous")
        directory = self._directories.open(request.save_dir)
        call = ("save", step)
        self._settle(call)
        self._refresh(may_meet=True)
        current = self._round(step, call)
        current.arguments = (request.tag, request.save_dir, request.save_latest)
        try:
            current.client_state = self._encode(request)
        except MocError as error:
            current.error = error
        self._begin_snapshot(current)
        save = self._begin_save(current, directory, request.tag, explicit=True)
        save.save_latest = request.save_latest
        self._submit(current)
        self.tuner.snapshot_took(time.perf_counter() - begin)
        return save

    def must_block(self) -> bool:
        """Tells whether a save at this step cannot go through memory; equal on all ranks.

        Snapshots have ended; or this step was copied already, and state has changed since that no update changes.
        """
        copied = self._copied_at == int(self._moc.engine.global_steps)
        return self._broken is not None or (copied and self._may_change)

    def wait(self, timeout_s: float, only: SaveInFlight | None = None) -> None:
        """Waits until saves of this rank have ended. Not collective.

        Args:
            timeout_s: seconds to wait at most.
            only: the save to wait for; None for all.

        Raises:
            RendezvousTimeoutError: if they do not end in time; names them.
            MocError: what the save, or the first one since the last call, failed with; the log has all of them.
        """
        deadline = time.monotonic() + timeout_s
        wanted = [only] if only is not None else list(self._saves)
        while pending := [save for save in wanted if save.outcome is None]:
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(
                    f"not committed after {timeout_s:g} s: {', '.join(save.tag for save in pending)}",
                    where=f"rank {self._rank} of {self._world}",
                    fix="`moc-ckpt agent status` shows what the agents are doing; the log says which ranks are late",
                )
            time.sleep(_POLL_S)
        errors = [error for save in wanted if (error := save.error()) is not None]
        for save in wanted:
            save.reported = True
        if only is None:
            errors, self._unreported = [*self._unreported, *errors], []
        if errors:
            raise errors[0]

    def quiesce(self) -> None:
        """Brings everything under way to its end, before live state or directories change otherwise; collective."""
        if self._broken is None:
            try:
                self._settle(("quiesce", int(self._moc.engine.global_steps)))
            except Exception as error:
                self._break(error)
        self.host.stager.join()

    def reset(self, history: SaveHistory | None) -> None:
        """Forgets memory and directories: the live state has become another one. Not collective; on all ranks.

        Args:
            history: the saves of the directory that it was restored from; None if nothing is known of any.
        """
        self._slots.free_all()
        self._memory.forget()
        self._directories.clear()
        self._background.learnt.clear()
        self._history = SaveHistory.start(self._memory.experts)
        if history is not None:
            self._history = SaveHistory(history.rotation, self._history.ages, self._history.saved)
        self._last: Round | None = None
        self._before: Round | None = None
        self._unconfirmed: Round | None = None
        self._copied_at = -1
        self._next: Selection | None = None
        self._adopted = True
        self._room = True
        self._timeline += 1

    def make_room(self) -> None:
        """Makes the arena larger if Dynamic-K wants more than it was made for; collective."""
        if self.host.grow():
            self._slots = self._background.slots = LocalSlots(self.host.arena, keep_committed=self.host.keep_committed)

    def forget_directory(self, save_dir: str) -> None:
        """Forgets what a directory holds: a save that did not go through here has changed it."""
        self._directories.forget(save_dir)

    def close(self, timeout_s: float) -> None:
        """Waits for saves under way, then lets go of agent and arena. Not collective."""
        try:
            if not self.host.votes.idle(timeout_s):
                logger.warning("a vote is still under way after %g s", timeout_s)
            self.wait(timeout_s)
        except MocError as error:
            logger.warning("%s", error)
        self.host.close()

    # ------------------------------------------------------------------------------------------ deciding

    def _refresh(self, *, may_meet: bool) -> None:
        """Looks whether tensors were replaced, or (where ranks may meet) need not be stored any more."""
        if self._finder.is_stale(self._live, may_meet=may_meet):
            stored = self._finder.stored
            self._live = self._finder.find()
            if stored != self._finder.stored:
                # Experts consist of other tensors now: versions from before must not meet new ones.
                self._memory.forget()
            self.host.stager.join()
            self._slots.free_all()
            self._copied_at, self._next = -1, None

    def _automatic(self, step: int, *, persist: bool) -> None:
        call, waits = ("step", step), self._config.host.on_busy == "wait"
        directory = self._directory_for_persist() if persist else None
        if directory is not None:
            busy = [save for save in self._saves if save.directory is directory]
            if (busy or len(self._saves) == MAX_IN_FLIGHT) and waits:
                self._settle(call)
            elif busy or len(self._saves) == MAX_IN_FLIGHT:
                self._skipped(step, "persist", f"{self._saves[0].tag} is still being written")
                directory = None
        if not self._room and waits:
            self._settle(call)
        if not self._room:
            self._skipped(step, "snapshot", "the arena has no room while older versions are still being written")
            self._submit(self._round(step, call))
            return
        self._refresh(may_meet=False)
        current = self._round(step, call)
        current.automatic = True
        if self._rank == 0:
            self._ask_provider(current, prove=directory is not None)
        self._begin_snapshot(current)  # from here on other threads take the interpreter from this one
        if directory is not None:
            self._begin_save(current, directory, f"global_step{step}", explicit=False)
        self._submit(current)

    def _directory_for_persist(self) -> Directory | None:
        """Returns save_dir, opened; collective the first time. None if it cannot be used now."""
        save_dir = str(self._config.save_dir)
        try:
            return self._directories.open(save_dir)
        except MocError as error:
            self._unreported.append(error)
            self._report.not_opened(save_dir, error)
            return None

    def _encode(self, request: SaveRequest) -> Callable[[], bytes]:
        trust = self._config.recovery.trust_client_state
        return bytes if self._rank else client_state_encoder(request.client_state, trust=trust)

    def _ask_provider(self, current: Round, *, prove: bool) -> None:
        if self._provider is None:
            self._report.no_client_state()
            return
        try:
            # What goes to storage is proven to load.
            trust, prove = self._config.recovery.trust_client_state, prove or not self._proven
            current.client_state = client_state_encoder(dict(self._provider()), trust=trust, prove=prove)
            self._proven = True
        except Exception as error:
            current.error = error

    def _round(self, step: int, call: tuple[object, ...]) -> Round:
        return Round(
            step=step,
            live=self._live,
            base=self._moc.pec.ledger,
            rotation=self._history.rotation,
            saves=list(self._saves),
            call=call,
            timeline=self._timeline,
            counts=self._moc.pec.take_counts(),
        )

    def _begin_snapshot(self, current: Round) -> None:
        """Selects experts, takes slots and starts the copies; where this step was copied already, only the rest."""
        step, captured = current.step, self._live.reader.capture(self._moc.underived)
        current.captured = captured
        if self._copied_at == step:
            return
        selection, self._next = self._next or self._select(self._moc.pec.ledger, self.tuner.k), None
        self._history, current.rotation = selection.after, selection.after.rotation
        current.snapshot, current.places = True, frozenset(selection.places)
        self._memory.took(step, selection.places)
        self._copied_at = step
        sources = self._live.sources
        mine = [sources.dense] if sources.dense is not None else []
        mine += [sources.experts[place] for place in selection.places if place in sources.experts]
        # Two jobs would race for the stream; the last one has long ended unless steps are very short.
        self.host.stager.join()
        reader = self._live.reader
        work = [(source, reader.pieces(source, captured)) for source in mine]
        prepare, done = partial(self._background.place, current, work), partial(self._background.copied, current)
        hold_back = self.tuner.copy_hold_back_s if current.automatic else 0.0
        current.job = self.host.stager.start(prepare, done, keep=captured.buffers, hold_back_s=hold_back)

    def _select(self, ledger: Ledger, k: K) -> Selection:
        config = self._config
        return plan_snapshot(
            self._memory,
            self._history,
            ledger,
            self.host.ownership,
            method=config.selection,
            k=self._moc.pec.snapshot_k(k, self.host.max_k),
            balance=config.balance == "fill",
        )

    def _begin_save(self, current: Round, directory: Directory, tag: str, *, explicit: bool) -> SaveInFlight:
        """Chooses what a persist takes (DESIGN section 6), and keeps those versions."""
        pec = self._moc.pec
        # After repeated failures nothing that the directory should hold is taken for granted.
        everything = directory.versions.failures > 1
        k = pec.full_k if everything else pec.persist_k(self.tuner.k)
        self._number += 1
        save = current.save = SaveInFlight(
            directory=directory,
            save_id=f"{directory.run_prefix}{self._number:08d}",
            tag=tag,
            step=current.step,
            experts=plan_persist(self._memory, directory.versions, k, full=everything),
            k=k,
            save_latest=True,
            explicit=explicit,
        )
        sources = self._live.sources
        save.needed = [(DENSE_UNIT, save.step)] if sources.dense is not None else []
        save.needed += [(expert_unit(*place), step) for place, step in save.experts.items() if place in sources.experts]
        self._slots.need(save.needed)
        self._saves.append(save)
        return save

    def _submit(self, current: Round) -> None:
        retired, self._before, self._last, self._adopted = self._before, self._last, current, False
        # Letting go of a round frees events and pinned memory: nothing for the training thread.
        self._background.submit(current, self._before, self._expects_room, self._prepare, retired=retired)
        if current.snapshot:
            self._unconfirmed = current

    def _expects_room(self, current: Round, before: Round | None) -> bool:
        """Tells whether the next snapshot will find room, once the one before this round is confirmed.

        Runs in the votes' thread; until the vote's result is taken in, nobody else changes what it reads.
        """
        if current.job is not None:
            current.job.wait_planned(self._config.timeouts.commit_s)
        confirmed, units = self._memory.confirmed, []
        if before is not None and before.snapshot:
            confirmed = max(confirmed, before.step)
            units = [expert_unit(*place) for place in before.places]
        dense, experts = self._slots.room_after(confirmed, units)
        return dense >= self.host.dense_bytes and experts >= self.host.window_bytes(self.tuner.k)

    def _prepare(self, before: Round | None, tally: Tally, ledger: Ledger) -> Prepared:
        """Acts in memory upon whether the snapshot before a vote is whole everywhere, and selects for the next one.

        Runs in the votes' thread; when the vote's result is there, the training thread finds it done.
        """
        if before is not None and before.snapshot and tally.agreed:
            if tally.filled:
                older = self._memory.confirm(before.step)
                self._slots.confirm(before.step, [expert_unit(*place) for place in {*older, *before.places}])
            else:
                self._memory.drop(before.step)
                self._slots.drop(before.step)
        live = self._memory.steps() | {step for save in self._saves for step in (save.step, *save.experts.values())}
        for step in self._background.learnt.keys() - live:
            del self._background.learnt[step]
        decision = self.tuner.reconsider(tally)
        return Prepared(decision, self._select(ledger, self.tuner.k_after(decision)))

    # ------------------------------------------------------------------------------------------ after a vote
    def _adopt(self) -> None:
        """Takes in what the last vote said; all ranks do the same."""
        last = self._last
        if last is None or self._adopted:
            return
        # The vote has a deadline of its own, behind that of the copies before it.
        config = self._config.timeouts
        tally, ledger, prepared = last.result.result(2 * (config.rendezvous_s + config.commit_s))
        self._adopted = True
        if not tally.agreed:
            raise RankError(
                f"ranks do different things at step {last.step}; this one: {last.call}",
                where=f"rank {self._rank} of {self._world}",
                fix="call save_checkpoint at the same step on every rank",
            )
        self._moc.pec.ledger, self._next = ledger, prepared.selection
        self._room = tally.can_fill
        before = self._before
        if before is not None and before.snapshot:
            if self._unconfirmed is before:
                self._unconfirmed = None
            if not tally.filled and self._copied_at == before.step:
                self._copied_at = -1
        for save, settled, failed in zip(last.saves, tally.settled, tally.failed, strict=True):
            if settled:
                self._end_save(save, committed=not failed)
        if prepared.decision is not None and self.tuner.apply(prepared.decision):
            self._report.retuned(self.tuner)

    def _end_save(self, save: SaveInFlight, *, committed: bool) -> None:
        self._saves.remove(save)
        self._slots.release(save.needed, pinned=save.pinned, committed=committed)
        directory = save.directory
        if committed and save.history is not None:
            directory.versions.committed(save.experts, save.history)
            self._moc.pec.lower_floor(save.floor)
            self._moc.pec.keep_history(directory.store.url, save.history)
        else:
            directory.versions.lost(save.experts)
            error = save.error()
            if error is not None and not save.reported:
                self._unreported.append(error)

    def _settle(self, call: tuple[object, ...]) -> None:
        """Votes until no save is under way and there is room for a snapshot; all ranks vote equally often.

        Raises:
            RendezvousTimeoutError: on all ranks, if that takes longer than a commit may.
        """
        timeouts = self._config.timeouts
        deadline = time.monotonic() + timeouts.commit_s + timeouts.rendezvous_s
        idle = 0
        self._adopt()
        while self._saves or not self._room:
            idle = 0 if self._saves else idle + 1
            for save in self._saves:
                while save.outcome is None and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
            if time.monotonic() > deadline or idle > _IDLE_VOTES:
                raise RendezvousTimeoutError(
                    f"waited in vain for {', '.join(save.tag for save in self._saves) or 'room in the arena'}",
                    where=f"rank {self._rank} of {self._world}",
                    fix="`moc-ckpt agent status` shows what the node agents are doing; a slow storage needs a larger "
                    "moc_checkpoint.timeouts.commit_s",
                )
            self._submit(self._round(int(self._moc.engine.global_steps), (*call, "waiting")))
            self._adopt()

    # ------------------------------------------------------------------------------------------ small things

    def _break(self, error: Exception) -> None:
        """Ends snapshots on this rank; training goes on (invariant I8)."""
        if self._broken is None:
            self._broken = error
            self._unreported.append(
                error if isinstance(error, MocError) else RankError(f"{type(error).__name__}: {error}")
            )
            self._report.broken(error)

    def _skipped(self, step: int, what: str, reason: str) -> None:
        self.tuner.skipped += 1
        self._report.skipped(step, what, reason)
