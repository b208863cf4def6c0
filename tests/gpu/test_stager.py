"""The stager on a device: long copies are whole, and as fast as the bus; skipped where there is no CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity  # noqa: E402
from moc_ckpt.snapshot.device_copy import DeviceCopier, load_paced_copy  # noqa: E402
from moc_ckpt.snapshot.stager import CopyJob, Piece, Stager, register, unregister  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be pinned here"),
]

#: Above what a single registration was once limited to, and no multiple of anything.
NBYTES = (5 << 29) + 12_288


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    identity = Identity(job="job", run="run", rank=0, world=1, pid=1, node="node", url=None, attempt=None, created=0.0)
    path = Path("/dev/shm", f"moc_test_stager_{tmp_path.name}")
    made = Arena.create(path, ArenaSpec(4096, NBYTES, 1 << 20, 8), identity)
    try:
        yield made
    finally:
        made.close()
        path.unlink()


def test_one_copy_of_gigabytes(arena: Arena) -> None:
    memory = torch.from_numpy(arena.array)
    assert register(memory[: arena.spec.reserved])
    device = torch.device("cuda", torch.cuda.current_device())
    source = torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, device=device)
    expected = source.cpu()
    slots = arena.table.begin("experts", [("expert/0/0", NBYTES, b"")], attempt=1, step=1)
    assert slots is not None
    (slot,) = slots
    stager = Stager(memory, device, deadline_s=60.0)
    ended = threading.Event()
    try:
        job = stager.start(lambda: [([Piece(source, 0)], slot.extents)], lambda job: ended.set())
        # What the copy reads is overwritten as soon as the device may; the host waits only for the copy to be issued.
        stager.before_update()
        source.zero_()
        assert ended.wait(60)
        assert job.error is None and job.nbytes == NBYTES
        (start, _), *more = slot.extents
        assert not more and torch.equal(memory[start : start + NBYTES], expected)
        report(job)
    finally:
        stager.close()
        unregister(memory[: arena.spec.reserved])


def report(job: CopyJob) -> None:
    print(f"{job.nbytes / 1e9:.2f} GB in {job.runs} runs: {job.nbytes / job.seconds / 1e9:.1f} GB/s")


@pytest.mark.parametrize("compiled", [True, False])
def test_many_copies_of_any_size(compiled: bool) -> None:
    if compiled and load_paced_copy() is None:
        pytest.skip("installed without a C compiler: torch issues copies")
    device = torch.device("cuda", torch.cuda.current_device())
    source = torch.randint(0, 256, (70_000_001,), dtype=torch.uint8, device=device)
    expected, target = source.cpu(), torch.zeros(80_000_000, dtype=torch.uint8, pin_memory=True)
    copier = DeviceCopier(device, target, deadline_s=60.0, piece=1 << 20, window=4, compiled=compiled)
    assert copier.compiled == compiled
    at, runs = 0, []
    for number in range(400):
        size = 1 + (number * 7919) % 350_001 if number % 50 else 5_000_001
        size = min(size, 70_000_001 - at)
        if size:
            runs.append((at, 13 + at + number, size))
        at += size
    for _ in range(3):  # streams and events are used again
        target.zero_()
        boundary = torch.cuda.Event()
        boundary.record()
        began, ended = copier.copy([(source.data_ptr() + a, b, size) for a, b, size in runs], boundary)
        ended.synchronize()
        assert began.elapsed_time(ended) > 0
        assert all(torch.equal(target[b : b + size], expected[a : a + size]) for a, b, size in runs)


def test_others_get_the_engine_while_a_snapshot_is_copied(arena: Arena) -> None:
    """A small read of another stream waits for a few pieces at most, never for the whole copy."""
    memory = torch.from_numpy(arena.array)
    assert register(memory[: arena.spec.reserved])
    device = torch.device("cuda", torch.cuda.current_device())
    source = torch.zeros(NBYTES, dtype=torch.uint8, device=device)
    small = torch.ones(8, device=device)
    copier = DeviceCopier(device, memory[: arena.spec.reserved], deadline_s=60.0)
    try:
        boundary = torch.cuda.Event()
        boundary.record()
        ended: list[torch.cuda.Event] = []
        thread = threading.Thread(
            target=lambda: ended.append(copier.copy([(source.data_ptr(), 4096, NBYTES)], boundary)[1])
        )
        thread.start()
        reads = 0
        while not ended:
            small[0].item()
            reads += 1
        thread.join()
        ended[0].synchronize()
        # 161 pieces; before they were handed over one by one, the first read waited for all of them.
        assert reads >= 20, f"{reads} reads beside {NBYTES / 1e9:.1f} GB"
    finally:
        unregister(memory[: arena.spec.reserved])
