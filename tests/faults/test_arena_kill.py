"""A real SIGKILL while a process changes its slots: whoever opens the arena next finds only valid ones, whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moc_ckpt.errors import StorageError
from moc_ckpt.snapshot.arena import Arena, writer_pid
from moc_ckpt.snapshot.slots import Slot, SlotState

pytestmark = [pytest.mark.faults]

KILLS = 40 if os.environ.get("MOC_TEST_FULL") == "1" else 10
ROOT = Path(__file__).resolve().parents[2]
PAGE = 4096

VICTIM = r"""
import os, random, sys
from pathlib import Path
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
from moc_ckpt.snapshot.slots import SlotState

path, seed = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)
if path.exists():
    arena = Arena.open(path, writable=True)
    arena.table.drop_filling()
    arena.table.drop_pins()
    arena.update_identity(pid=os.getpid())
else:
    identity = Identity(
        job="job", run="run", rank=0, world=1, pid=os.getpid(), node="here", url=None, attempt=None, created=0.0
    )
    arena = Arena.create(path, ArenaSpec(dense=64 * 4096, experts=256 * 4096, extra=0, slots=96), identity)
assert "torch" not in sys.modules
table, words = arena.table, arena.array.view("<u8").reshape(-1, 512)
step = arena.identity.attempt or 0
print("ready", flush=True)
while True:
    step += 1
    arena.update_identity(attempt=step)
    for pool, count in (("dense", 1), ("experts", rng.randint(1, 24))):
        items = [
            (f"{pool}/{i}", rng.randint(1, 5 * 4096), b"%s/%d@%d" % (pool.encode(), i, step)) for i in range(count)
        ]
        slots = table.begin(pool, items, attempt=1, step=step)
        if slots is None:
            idle = [slot for slot in table.live() if slot.state in (SlotState.FILLED, SlotState.COMMITTED)]
            table.free(rng.sample(idle, len(idle) // 2 + 1))
            continue
        for slot in slots:
            for at, size in slot.extents:
                words[at // 4096 : (at + size) // 4096] = slot.step * 100 + int(slot.unit.split("/")[1])
        if rng.random() < 0.2:
            table.abandon(slots)
            continue
        slots = table.pin(table.filled(slots))
        if rng.random() < 0.9:
            table.unpin(slots, committed=rng.random() < 0.5)
    pinned = [slot for slot in table.live() if slot.state == SlotState.PERSISTING]
    if len(pinned) > 30:
        table.unpin(pinned, committed=False)
"""


@pytest.fixture
def shm() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="moc_test_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def check(arena: Arena) -> list[Slot]:
    """Everything that must hold of an arena whose process was killed; its slots."""
    table, slots = arena.table, arena.table.live()
    assert table.damaged == ()
    words = arena.array.view("<u8").reshape(-1, PAGE // 8)
    regions = arena.spec.regions()
    for pool in ("dense", "experts"):
        at = regions[pool].start
        used = [extent for slot in slots if slot.unit.startswith(pool) for extent in slot.extents]
        for start, size in sorted(used + table.holes(pool)):
            assert start == at, f"{pool}: hole or overlap at {at}"
            at += size
        assert at == regions[pool].start + regions[pool].nbytes
    for slot in slots:
        assert table.descriptor(slot) == f"{slot.unit}@{slot.step}".encode()
        if slot.state != SlotState.FILLING:
            value = slot.step * 100 + int(slot.unit.split("/")[1])
            for start, size in slot.extents:
                assert np.all(words[start // PAGE : (start + size) // PAGE] == value), f"{slot} is not whole"
    return slots


def test_killed_at_any_moment(shm: Path) -> None:
    rng = random.Random(os.environ.get("MOC_TEST_SEED", "11"))
    path = shm / "run.rank_00000.arena"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    steps, states = 0, set()
    for kill in range(KILLS):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(path), str(kill)], stdout=subprocess.PIPE, env=environ, text=True
        )
        try:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "ready\n"
            assert writer_pid(path) == victim.pid
            with pytest.raises(StorageError, match=f"in use by process {victim.pid}"):
                Arena.open(path, writable=True)
            until = time.monotonic() + rng.uniform(0.01, 0.15)
            while time.monotonic() < until:
                with Arena.open(path) as living:  # a reader sees a moment of it, never a mixture
                    assert living.table.damaged == ()
                    states |= {slot.state for slot in living.table.live()}
        finally:
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait(10)
            if victim.stdout is not None:
                victim.stdout.close()
        assert writer_pid(path) is None
        with Arena.open(path) as arena:
            slots = check(arena)
            assert arena.identity.pid == victim.pid and (arena.identity.attempt or 0) > steps
            steps = arena.identity.attempt or 0
        states |= {slot.state for slot in slots}
        if kill % 3 == 2:  # the others are taken over by the next victim as they are
            with Arena.open(path, writable=True) as heir:
                filling = sum(slot.state == SlotState.FILLING for slot in slots)
                assert heir.table.drop_filling() == filling
                assert len(check(heir)) == len(slots) - filling
                heir.table.drop_pins()
                heir.table.free(heir.table.live())
                assert [heir.table.holes(pool) for pool in ("dense", "experts")] == [
                    [tuple(heir.spec.regions()[pool])] for pool in ("dense", "experts")
                ]
    assert steps > 10 * KILLS, "the victims did too little to be killed in the middle of anything"
    assert states >= {SlotState.FILLING, SlotState.PERSISTING, SlotState.COMMITTED}


def test_the_check_can_fail(shm: Path) -> None:
    """Another process's slot with one foreign page is found."""
    path = shm / "run.rank_00000.arena"
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(path), "0"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert victim.stdout is not None
    victim.stdout.readline()
    time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(10)
    victim.stdout.close()
    with Arena.open(path, writable=True) as arena:
        slot = next(slot for slot in check(arena) if slot.state != SlotState.FILLING)
        arena.array[sum(slot.extents[-1]) - 1] ^= 1
        with pytest.raises(AssertionError, match="is not whole"):
            check(arena)
