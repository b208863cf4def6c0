"""Snapshots, votes, persists, commits and crashes in any order, over the slot tables of several ranks.

The machine plays what the trainers and agents of a job do with their tables. It keeps its own account of what every
version must contain, and looks at the bytes: a slot that was given away while somebody needed it holds other bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moc_ckpt.plan.arena_size import arena_need, largest_selection
from moc_ckpt.snapshot.arena_format import CLOCK_AT, ArenaSpec
from moc_ckpt.snapshot.slots import Slot, SlotState, SlotTable
from moc_ckpt.snapshot.versions import freeable
from moc_ckpt.storage.checksum import crc32c

FULL = os.environ.get("MOC_TEST_FULL") == "1"
EXAMPLES, STEPS = (1500, 100) if FULL else (60, 60)
PAGE = 4096
PAGES = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 21])
WHOLE = (SlotState.FILLED, SlotState.PERSISTING, SlotState.COMMITTED)


def pattern(rank: int, unit: str, step: int, pages: int) -> np.ndarray:
    """What one version of one unit on one rank has at the start of each of its pages."""
    return np.array([[rank, crc32c(unit.encode()), step, page] for page in range(pages)], dtype=np.uint64).reshape(
        -1, 4
    )


@dataclass
class Snapshot:
    """One snapshot of the job: which ranks have filled it, and the outcome once it was voted on."""

    step: int
    units: tuple[str, ...]
    filling: dict[int, list[Slot]] = field(default_factory=dict)
    filled: set[int] = field(default_factory=set)
    failed: bool = False

    def settled(self, world: int) -> bool:
        return self.failed or len(self.filled) == world


@dataclass
class Persist:
    """One save in flight: the slots that each rank has pinned."""

    step: int
    versions: dict[str, int]
    pinned: dict[int, list[Slot]]


class Rank:
    """A rank's shared memory, its table, and the news that it has not acted on yet."""

    def __init__(self, rank: int, sizes: dict[str, int], spec: ArenaSpec) -> None:
        self.rank = rank
        self.sizes = sizes
        self.spec = spec
        self.memory = np.zeros(spec.nbytes, dtype=np.uint8)
        self.words = self.memory.view(np.uint64).reshape(-1, PAGE // 8)
        self.news: list[tuple] = []
        self.confirmed = 0
        self.committed: int | None = None
        self.table = self.attach()

    def attach(self, *, writable: bool = True) -> SlotTable:
        regions = self.spec.regions()

        def write(at: int, data: bytes) -> None:
            assert regions["descriptors"].start <= at
            self.memory[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)

        return SlotTable(
            self.memory,
            regions["records"],
            regions,
            regions["descriptors"],
            clock_at=CLOCK_AT,
            write=write if writable else None,
        )

    def begin(self, step: int, units: tuple[str, ...]) -> list[Slot] | None:
        """One table call per pool, as the trainer does it; all or nothing."""
        dense = self.table.begin("dense", [("dense", self.sizes["dense"], b"dense")], attempt=1, step=step)
        if dense is None:
            return None
        items = [(unit, self.sizes[unit], unit.encode()) for unit in units if unit in self.sizes]
        experts = self.table.begin("experts", items, attempt=1, step=step)
        if experts is None:
            self.table.abandon(dense)
            return None
        return dense + experts

    def copy(self, slots: list[Slot], *, upto: int | None = None) -> None:
        """Writes the slots' bytes, or only those of the first few (a copy that was cut off)."""
        for slot in slots[:upto]:
            pages = self.pages(slot)
            self.words[pages, :4] = pattern(self.rank, slot.unit, slot.step, len(pages))

    def intact(self, slot: Slot) -> bool:
        pages = self.pages(slot)
        assert slot.nbytes == self.sizes[slot.unit] and len(pages) == -(-slot.nbytes // PAGE)
        return np.array_equal(self.words[pages, :4], pattern(self.rank, slot.unit, slot.step, len(pages)))

    @staticmethod
    def pages(slot: Slot) -> list[int]:
        return [page for at, size in slot.extents for page in range(at // PAGE, (at + size) // PAGE)]


class Job(RuleBasedStateMachine):
    """Two or three ranks, a few experts of which every rank owns pieces of any size, some none."""

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.world = data.draw(st.integers(2, 3), "world")
        count = data.draw(st.integers(2, 8), "experts")
        self.units = [f"expert/0/{expert}" for expert in range(count)]
        self.k = data.draw(st.integers(1, min(count, 4)), "k_snapshot")
        self.k_persist = data.draw(st.integers(1, count), "k_persist")
        self.keep_committed = data.draw(st.booleans(), "keep_committed")
        self.max_persists = data.draw(st.sampled_from([1, 1, 2]), "persists at once")
        self.ranks = []
        for rank in range(self.world):
            pages = data.draw(
                st.lists(PAGES, min_size=count, max_size=count),
                f"pages of rank {rank}",
            )
            # Not whole pages: the last one is filled in part.
            sizes = {unit: n * PAGE - 7 for unit, n in zip(self.units, pages, strict=True) if n}
            need = arena_need(
                sizes,
                largest_selection(sizes, combinations(self.units, self.k)),
                dense_bytes := data.draw(st.integers(1, 3), "dense pages") * PAGE - 5,
                pins_bytes=largest_selection(sizes, combinations(self.units, self.k_persist)),
                pinned_dense=1,
                keep_committed=self.keep_committed,
            )
            spec = ArenaSpec(dense=need.dense, experts=need.experts, extra=0, slots=need.slots, descriptors=PAGE)
            self.ranks.append(Rank(rank, {**sizes, "dense": dense_bytes}, spec))
        self.step = 0
        self.open: list[Snapshot] = []  # not voted on yet, oldest first; at most two
        self.done: list[Snapshot] = []  # confirmed, oldest first
        self.persists: list[Persist] = []
        self.ended: list[Persist] = []
        self.skipped = 0
        self.calm_until = data.draw(st.integers(0, 8), "no failure before step")

    # ---- what happens ----

    @rule(choice=st.data())
    def snapshot(self, choice: st.DataObject) -> None:
        """A step boundary: the copy before is joined, what is known by now is acted on, and a new snapshot begins."""
        for snapshot in self.open:
            for rank in list(snapshot.filling):
                self.finish_fill(snapshot, rank)
        while len(self.open) > 1:
            self.vote()
        for rank in self.ranks:
            self.act(rank)
        self.step += 1
        have = {unit for snapshot in [*self.done, *self.open] if not snapshot.failed for unit in snapshot.units}
        forced = [unit for unit in self.units if unit not in have]
        rest = [unit for unit in self.units if unit in have]
        if forced:
            units = tuple(forced) if len(forced) >= self.k else tuple((forced + rest)[: self.k])
        else:
            units = tuple(choice.draw(st.permutations(rest), "selection")[: choice.draw(st.integers(0, self.k), "k")])
        taken = {rank.rank: rank.begin(self.step, units) for rank in self.ranks}
        if any(slots is None for slots in taken.values()):
            assert self.max_persists > 1, [rank.table.refusal for rank in self.ranks]
            self.skipped += 1
            for rank in self.ranks:
                if (slots := taken[rank.rank]) is not None:
                    rank.table.abandon(slots)
            return
        self.open.append(Snapshot(self.step, units, filling={rank: slots or [] for rank, slots in taken.items()}))

    @precondition(lambda self: self.open and self.open[-1].filling)
    @rule(choice=st.data())
    def fill_ends(self, choice: st.DataObject) -> None:
        snapshot = self.open[-1]
        self.finish_fill(snapshot, choice.draw(st.sampled_from(sorted(snapshot.filling)), "rank"))

    @precondition(lambda self: self.open and self.open[-1].filling and self.step >= self.calm_until)
    @rule(choice=st.data())
    def fill_fails(self, choice: st.DataObject) -> None:
        snapshot = self.open[-1]
        rank = choice.draw(st.sampled_from(sorted(snapshot.filling)), "rank")
        slots = snapshot.filling.pop(rank)
        self.ranks[rank].copy(slots, upto=choice.draw(st.integers(0, len(slots)), "copied"))
        self.ranks[rank].table.abandon(slots)
        self.fail(snapshot)
        self.calm_until = self.step + choice.draw(st.integers(1, 8), "steps without failures")

    @precondition(lambda self: self.open and self.open[0].settled(self.world) and not self.open[0].filling)
    @rule()
    def vote_arrives(self) -> None:
        self.vote()

    @precondition(lambda self: any(rank.news for rank in self.ranks))
    @rule(choice=st.data())
    def rank_acts(self, choice: st.DataObject) -> None:
        """A rank acts on news earlier than the others."""
        self.act(choice.draw(st.sampled_from([rank for rank in self.ranks if rank.news]), "rank"))

    @precondition(lambda self: self.can_persist())
    @rule(choice=st.data())
    def persist_begins(self, choice: st.DataObject) -> None:
        """Takes the dense state of the newest snapshot and some experts at their newest versions.

        Each rank pins its slots as soon as its copy is done, when others may still fail.
        """
        known = [*self.done, *self.open]
        units = choice.draw(st.permutations(self.units), "experts")[: self.k_persist]
        newest = {unit: snapshot.step for snapshot in known for unit in snapshot.units}
        versions = {"dense": known[-1].step} | {unit: newest[unit] for unit in units if unit in newest}
        self.persists.append(persist := Persist(known[-1].step, versions, {}))
        for rank in self.ranks:
            if rank.rank not in known[-1].filling:
                self.pin(persist, rank)

    @precondition(lambda self: self.persists)
    @rule(choice=st.data(), committed=st.booleans())
    def persist_ends(self, choice: st.DataObject, committed: bool) -> None:
        persist = choice.draw(st.sampled_from(self.persists), "persist")
        self.read(persist)
        self.end_persist(persist, committed and len(persist.pinned) == self.world)

    @precondition(lambda self: self.step >= self.calm_until)
    @rule(choice=st.data())
    def crash(self, choice: st.DataObject) -> None:
        """A rank dies, perhaps in the middle of a copy; its memory is attached again by somebody who knows nothing."""
        rank = choice.draw(st.sampled_from(self.ranks), "rank")
        self.calm_until = self.step + choice.draw(st.integers(1, 8), "steps without failures")
        for snapshot in self.open:
            if rank.rank in snapshot.filling:
                slots = snapshot.filling.pop(rank.rank)
                rank.copy(slots, upto=choice.draw(st.integers(0, len(slots)), "copied"))
                self.fail(snapshot)
        before = [slot.state for slot in rank.table.live()]
        rank.table = rank.attach()
        assert rank.table.drop_filling() == before.count(SlotState.FILLING)
        unpins = any(item[0] == "unpin" for item in rank.news)
        if len(self.persists) == 1 and not unpins and choice.draw(st.booleans(), "the agent goes on"):
            return  # and says what came of it, as if nothing had happened
        assert rank.table.drop_pins() == before.count(SlotState.PERSISTING)
        assert all(slot.state in (SlotState.FILLED, SlotState.COMMITTED) for slot in rank.table.live())
        for persist in list(self.persists):
            persist.pinned.pop(rank.rank, None)
            self.end_persist(persist, committed=False)
        rank.news = [item for item in rank.news if item[0] != "unpin"]

    # ---- how it happens ----

    def finish_fill(self, snapshot: Snapshot, rank: int) -> None:
        slots = snapshot.filling.pop(rank)
        self.ranks[rank].copy(slots)
        self.ranks[rank].table.filled(slots)
        snapshot.filled.add(rank)
        for persist in self.persists:
            if rank not in persist.pinned:
                self.pin(persist, self.ranks[rank])

    def fail(self, snapshot: Snapshot) -> None:
        """One rank could not fill its part: saves that use the snapshot fail too."""
        snapshot.failed = True
        for persist in list(self.persists):
            if snapshot.step in persist.versions.values():
                self.end_persist(persist, committed=False)

    def pin(self, persist: Persist, rank: Rank) -> None:
        slots = [slot for slot in rank.table.live(persist.versions) if slot.step == persist.versions[slot.unit]]
        assert {slot.unit for slot in slots} == {unit for unit in persist.versions if unit in rank.sizes}
        persist.pinned[rank.rank] = rank.table.pin(slots)

    def vote(self) -> None:
        snapshot = self.open.pop(0)
        assert not snapshot.filling and snapshot.settled(self.world)
        if not snapshot.failed:
            self.done.append(snapshot)
        for rank in self.ranks:
            rank.news.append(("failed" if snapshot.failed else "confirmed", snapshot.step))

    def end_persist(self, persist: Persist, committed: bool) -> None:
        self.persists.remove(persist)
        self.ended.append(persist)
        for rank, slots in persist.pinned.items():
            self.ranks[rank].news.append(("unpin", slots, committed))
        if committed:
            for rank in self.ranks:
                rank.news.append(("committed", persist.step))

    def act(self, rank: Rank) -> None:
        """Acts on everything a rank has been told, in the order in which it was told."""
        later = []
        for item in rank.news:
            if item[0] == "unpin":
                after = rank.table.unpin(item[1], committed=item[2])
                assert all(slot.state == SlotState.COMMITTED for slot in after if item[2] and slot.state != 3)
            elif item[0] == "confirmed":
                rank.confirmed = item[1]
            elif item[0] == "committed":
                rank.committed = max(item[1], rank.committed or 0)
            else:
                slots = [slot for slot in rank.table.live() if slot.step == item[1]]
                rank.table.free([slot for slot in slots if slot.state != SlotState.PERSISTING])
                if any(slot.state == SlotState.PERSISTING for slot in slots):
                    later.append(item)  # a persist still reads it: freed after that
        for _, step in later:  # after the pins that have ended meanwhile
            rank.table.free([s for s in rank.table.live() if s.step == step and s.state != SlotState.PERSISTING])
        rank.news = later = [item for item in later if any(s.step == item[1] for s in rank.table.live())]
        doomed = {step for _, step in later}
        slots = [slot for slot in rank.table.live() if slot.step not in doomed]
        rank.table.free(
            freeable(
                slots,
                confirmed=rank.confirmed,
                committed=rank.committed,
                keep_committed=self.keep_committed,
            )
        )

    def can_persist(self) -> bool:
        known = [*self.done, *self.open]
        if not known or any(snapshot.failed for snapshot in self.open):
            return False
        waiting = any(item[0] == "unpin" for rank in self.ranks for item in rank.news)
        return len(self.persists) < self.max_persists and (not waiting or self.max_persists > 1)

    def read(self, persist: Persist) -> None:
        for rank, slots in persist.pinned.items():
            assert {slot.unit for slot in slots} == {
                unit for unit in persist.versions if unit in self.ranks[rank].sizes
            }
            for slot in slots:
                assert slot.step == persist.versions[slot.unit]
                assert self.ranks[rank].intact(slot), f"{slot} of rank {rank} was overwritten while it was read"

    # ---- what must hold at any moment ----

    @invariant()
    def pinned_slots_are_whole(self) -> None:
        for persist in getattr(self, "persists", ()):
            self.read(persist)

    @invariant()
    def bytes_are_what_the_table_says(self) -> None:
        for rank in getattr(self, "ranks", ()):
            for slot in rank.table.live():
                if slot.state in WHOLE:
                    assert rank.intact(slot), f"{slot} of rank {rank.rank} holds other bytes"
                assert rank.table.descriptor(slot) == slot.unit.encode()

    @invariant()
    def the_mapping_says_the_same(self) -> None:
        """Whoever attaches at this moment sees what the living table knows."""
        for rank in getattr(self, "ranks", ()):
            seen = rank.attach(writable=False)
            assert seen.live() == rank.table.live()
            assert not seen.damaged
            for pool in ("dense", "experts", "extra"):
                assert seen.holes(pool) == rank.table.holes(pool)

    @invariant()
    def every_byte_is_free_or_in_one_slot(self) -> None:
        for rank in getattr(self, "ranks", ()):
            regions = rank.spec.regions()
            for pool in ("dense", "experts"):
                used = [
                    extent
                    for slot in rank.table.live()
                    if (slot.unit == "dense") == (pool == "dense")
                    for extent in slot.extents
                ]
                holes = rank.table.holes(pool)
                assert sum(size for _, size in holes) == rank.table.free_bytes(pool)
                at = regions[pool].start
                for start, size in sorted(used + holes):
                    assert start == at, f"{pool} region of rank {rank.rank}: hole or overlap at {at}"
                    assert start % PAGE == size % PAGE == 0 and size > 0
                    at += size
                assert at == regions[pool].start + regions[pool].nbytes
                assert all(a + n != b for (a, n), (b, _) in pairwise(holes)), "holes not joined"

    @invariant()
    def there_is_always_a_common_state(self) -> None:
        """A dense version that all ranks have whole, and of every unit a common version not after it."""
        if not getattr(self, "done", None):
            return
        owned = {unit for rank in self.ranks for unit in rank.sizes}
        saved = {unit for snapshot in self.done for unit in snapshot.units} & owned

        def whole(rank: Rank, unit: str) -> set[int]:
            return {slot.step for slot in rank.table.live([unit]) if slot.state in WHOLE and rank.intact(slot)}

        common = {
            unit: set.intersection(*[whole(rank, unit) for rank in self.ranks if unit in rank.sizes])
            for unit in {"dense", *saved}
        }
        targets = [t for t in common["dense"] if all(any(v <= t for v in common[unit]) for unit in saved)]
        assert targets, f"no common state: {common}"
        # Nothing older than the newest confirmed version of a unit has to be used.
        newest = {unit: snapshot.step for snapshot in self.done for unit in snapshot.units}
        assert max(targets) >= self.done[-1].step
        for unit in saved:
            assert newest[unit] in common[unit], f"the newest confirmed version of {unit} is gone: {common[unit]}"

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return
        for persist in list(self.persists):
            self.read(persist)
            self.end_persist(persist, committed=False)
        for snapshot in self.open:
            for rank in list(snapshot.filling):
                self.finish_fill(snapshot, rank)
        while self.open:
            self.vote()
        for rank in self.ranks:
            self.act(rank)
            assert not rank.news
            rank.table.free(rank.table.live())
            for pool in ("dense", "experts"):
                region = rank.spec.regions()[pool]
                assert rank.table.holes(pool) == ([tuple(region)] if region.nbytes else [])
            assert rank.attach(writable=False).live() == []


TestJob = Job.TestCase
TestJob.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
