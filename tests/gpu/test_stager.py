"""The stager on a device: long copies are whole, and as fast as the bus; skipped where there is no CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity  # noqa: E402
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
