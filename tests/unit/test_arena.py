from __future__ import annotations

import errno
import gc
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moc_ckpt.errors import CorruptionError, FormatError, StorageError
from moc_ckpt.snapshot import arena as arena_module
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity, writer_pid
from moc_ckpt.snapshot.arena_format import CLOCK_AT, HEADER_BYTES, IDENTITY_AT, unpack_header
from moc_ckpt.snapshot.slots import SlotState

PAGE = 4096
ROOT = Path(__file__).resolve().parents[2]
SPEC = ArenaSpec(dense=3 * PAGE, experts=8 * PAGE, extra=4 * PAGE, slots=20, descriptors=PAGE)
WHO = Identity(job="job", run="run", rank=3, world=8, pid=os.getpid(), node="here", url=None, attempt=None, created=1.5)


@pytest.fixture
def shm() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="moc_test_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def path(shm: Path) -> Path:
    return shm / "run.rank_00003.arena"


@pytest.fixture
def arena(path: Path) -> Iterator[Arena]:
    with Arena.create(path, SPEC, WHO) as made:
        yield made


def run_python(code: str) -> str:
    """Runs code in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- making ----


def test_an_arena_is_private_whole_and_reserved(arena: Arena, path: Path) -> None:
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == arena.nbytes == len(arena.array) == SPEC.nbytes
    assert status.st_blocks * 512 == SPEC.reserved < SPEC.nbytes  # the rest is sparse
    assert arena.array.ctypes.data == arena.address and arena.address % PAGE == 0
    assert arena.identity == WHO and arena.table.live() == []
    regions = list(SPEC.regions().items())
    assert [name for name, _ in regions] == ["records", "dense", "experts", "descriptors", "extra"]
    assert all(region.start % PAGE == 0 for _, region in regions)


def test_sizes_are_rounded_to_pages() -> None:
    regions = ArenaSpec(dense=1, experts=PAGE + 1, extra=0, slots=9, descriptors=5).regions()
    assert [region.nbytes for region in regions.values()] == [9 * 512, PAGE, 2 * PAGE, PAGE, 0]
    assert regions["dense"].start == regions["records"].start + 2 * PAGE
    with pytest.raises(ValueError, match="experts of an arena is -1"):
        ArenaSpec(dense=0, experts=-1, extra=0, slots=0)


@pytest.mark.parametrize("populate", ["kernel", "touching"])
def test_every_reserved_page_is_populated_in_pieces(path: Path, populate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_POPULATE_PIECE", 64 * PAGE)
    monkeypatch.setattr(arena_module, "_RESERVE_PIECE", 100 * PAGE)
    if populate == "touching":
        monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 12345)  # an old kernel knows no such advice
    seen: list[tuple[int, int]] = []
    threads: list[threading.Thread] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.append(threading.current_thread())

    spec = ArenaSpec(dense=400 * PAGE, experts=600 * PAGE, extra=0, slots=64)
    with Arena.create(path, spec, WHO, progress=progress, threads=3) as arena:
        assert len(seen) == -(-spec.reserved // (64 * PAGE)) and seen[-1] == (spec.reserved, spec.reserved)
        assert sorted(seen) == seen and set(threads) == {threading.main_thread()}
        resident = _resident(path)
        assert resident >= spec.reserved
        assert not arena.array[spec.regions()["dense"].start : spec.reserved].any()


def _resident(path: Path) -> int:
    """Bytes of the file that are mapped into this process's page tables."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1]) * 1024


def test_a_file_that_exists_is_left_alone(path: Path) -> None:
    path.write_bytes(b"somebody's")
    with pytest.raises(StorageError, match="there is an arena of that name"):
        Arena.create(path, SPEC, WHO)
    assert path.read_bytes() == b"somebody's"


def test_too_little_shared_memory_is_said_before_anything_is_taken(path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    spec = ArenaSpec(dense=free, experts=1 << 30, extra=0, slots=1)
    with pytest.raises(StorageError, match="shared memory is too small") as info:
        Arena.create(path, spec, WHO)
    assert f"{spec.reserved:,} bytes needed" in info.value.what and "bytes free" in info.value.what
    for advice in ("--shm-size", "memory_budget_gib", "save_mode durable", "MOC_SHM_DIR"):
        assert advice in info.value.fix
    assert not path.exists()


SMALL = r"""
import sys
from pathlib import Path
from moc_ckpt.errors import StorageError
import moc_ckpt.snapshot.arena as module
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity

folder = Path(sys.argv[1])
who = Identity(job="j", run="r", rank=0, world=1, pid=1, node="n", url=None, attempt=None, created=0.0)
import collections, shutil
real = shutil.disk_usage
shutil.disk_usage = lambda path: collections.namedtuple("U", "free")(1 << 40)  # as if others took it meanwhile
module._RESERVE_PIECE = 256 << 10
try:
    Arena.create(folder / "a", ArenaSpec(dense=1 << 20, experts=0, extra=0, slots=8), who)
except StorageError as exc:
    assert "shared memory is too small" in exc.what, exc.what
else:
    raise SystemExit("no error")
assert not list(folder.iterdir())
shutil.disk_usage = real

arena = Arena.create(folder / "a", ArenaSpec(dense=0, experts=700 << 10, extra=1 << 30, slots=99), who)
(slot,) = arena.table.begin("extra", [("extra", 2 << 20, b"")], attempt=1, step=1)
try:
    arena.write_slot(slot, bytes(2 << 20))
except StorageError as exc:
    assert "too small" in exc.what and "--shm-size" in exc.fix, exc
else:
    raise SystemExit("no error")
assert arena.table.begin("experts", [("a", 1, b"new")], attempt=1, step=1) is None
assert "shared memory is full" in arena.table.refusal
assert arena.table.begin("experts", [("a", 1, b"")], attempt=1, step=1)
print("fine")
"""


def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 1 MiB, in a mount namespace of its own: errors, and never SIGBUS."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path}'
    environ = {**os.environ, "CODE": SMALL, "PYTHONPATH": str(ROOT)}
    probe = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"this system lets us mount nothing: {probe.stderr.decode().strip()}")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, env=environ, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EOPNOTSUPP, "cannot reserve memory"),
        (errno.ENOSPC, "shared memory is too small"),
        (errno.EIO, "reserving shared memory failed"),
    ],
)
def test_reserving_fails(path: Path, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fallocate(self, *_: Any) -> int:
            return -1

    monkeypatch.setattr(arena_module.ctypes, "CDLL", Libc)
    monkeypatch.setattr(arena_module.ctypes, "get_errno", lambda: code)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(StorageError, match=message):
        Arena.create(path, SPEC, WHO)
    assert not path.exists() and len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_an_interrupted_start_leaves_no_file(path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Arena.create(path, SPEC, WHO, progress=interrupt)
    assert not path.exists()


# ---- opening ----


def test_another_process_sees_the_same_bytes(arena: Arena, path: Path) -> None:
    slots = arena.table.begin("experts", [("expert/0/1", PAGE + 5, b"what it is")], attempt=1, step=2)
    assert slots is not None
    (slot,) = arena.table.filled(slots)
    data = np.arange(PAGE + 5, dtype=np.uint64).astype(np.uint8)
    arena.array[slot.extents[0][0] : slot.extents[0][0] + len(data)] = data
    code = f"""
import sys
from pathlib import Path
from moc_ckpt.snapshot.arena import Arena
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
arena = Arena.open(Path({str(path)!r}))
(slot,) = arena.table.live()
print(slot.unit, slot.step, slot.state.name, arena.table.descriptor(slot).decode(), sum(arena.read_slot(slot)))
"""
    assert run_python(code) == f"expert/0/1 2 FILLED what it is {int(data.sum())}\n"


def test_reading_only_changes_nothing(arena: Arena, path: Path) -> None:
    with Arena.open(path) as reader:
        assert reader.identity == WHO and not reader.array.flags.writeable
        for act in (lambda: reader.update_identity(pid=1), lambda: reader.write(SPEC.reserved, b"x")):
            with pytest.raises(ValueError, match="reading only"):
                act()


def test_only_one_process_may_write(arena: Arena, path: Path) -> None:
    code = f"""
from pathlib import Path
from moc_ckpt.errors import StorageError
from moc_ckpt.snapshot.arena import Arena, writer_pid
print(writer_pid(Path({str(path)!r})))
try:
    Arena.open(Path({str(path)!r}), writable=True)
except StorageError as exc:
    print(exc.what)
"""
    assert run_python(code) == f"{os.getpid()}\nthe arena is in use by process {os.getpid()}\n"
    arena.close()
    assert run_python(code) == "None\n"
    assert writer_pid(path) is None


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", FormatError, "was not finished"),
        (bytes(100_000), FormatError, "was not finished"),
        (b"something else" * 1000, FormatError, "is not an arena"),
    ],
)
def test_foreign_files_are_refused(path: Path, content: bytes, error: type[Exception], message: str) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
    for writable in (False, True):
        with pytest.raises(error, match=message):
            Arena.open(path, writable=writable)
    assert path.read_bytes() == content


def test_files_of_doubtful_origin_are_refused(arena: Arena, path: Path) -> None:
    path.chmod(0o640)
    with pytest.raises(FormatError, match="others may touch it"):
        Arena.open(path)
    path.chmod(0o600)
    (path.parent / "link").symlink_to(path)
    with pytest.raises(StorageError, match="opening an arena failed"):
        Arena.open(path.parent / "link")
    with pytest.raises(StorageError, match="opening an arena failed: No such file"):
        Arena.open(path.parent / "missing")


@pytest.mark.parametrize("at", range(8, HEADER_BYTES))
def test_a_damaged_header_is_found(arena: Arena, path: Path, at: int) -> None:
    arena.array[at] ^= 1
    with pytest.raises((CorruptionError, FormatError)):
        Arena.open(path)


def test_a_truncated_arena_is_found_before_it_is_read(arena: Arena, path: Path) -> None:
    os.truncate(path, SPEC.nbytes - 1)
    with pytest.raises(CorruptionError, match="truncated"):
        Arena.open(path)
    os.truncate(path, 2 * PAGE)
    with pytest.raises(CorruptionError, match="truncated"):
        Arena.open(path)


def test_a_newer_version_is_said_to_be_one(arena: Arena) -> None:
    data = bytearray(arena.array[:HEADER_BYTES].tobytes())
    data[8] += 1
    with pytest.raises(FormatError, match="has format version 2"):
        unpack_header(bytes(data), SPEC.nbytes, "x")


# ---- identity ----


def test_the_identity_changes_field_by_field(arena: Arena, path: Path) -> None:
    for attempt in range(1, 6):
        arena.update_identity(attempt=attempt)
    arena.update_identity(url="s3://bucket/run")
    with Arena.open(path) as reader:
        assert reader.identity == msgspec.structs.replace(WHO, attempt=5, url="s3://bucket/run")
    with pytest.raises(TypeError):
        arena.update_identity(colour="red")
    with pytest.raises(ValueError, match="identity takes"):
        arena.update_identity(url="x" * PAGE)
    assert arena.identity.attempt == 5


@pytest.mark.parametrize("updates", [0, 1, 2, 3])
def test_a_torn_update_leaves_the_identity_before(arena: Arena, updates: int) -> None:
    for attempt in range(1, updates + 1):
        arena.update_identity(attempt=attempt)
    old = arena.identity
    before = arena.array[: 3 * PAGE].copy()
    new = arena.update_identity(attempt=99)
    after = arena.array[: 3 * PAGE].copy()
    changed = np.flatnonzero(before != after)
    assert len(changed) > 3
    for count in range(len(changed)):
        arena.array[: 3 * PAGE] = before
        arena.array[changed[:count]] = after[changed[:count]]
        assert arena.identity == old
    arena.array[: 3 * PAGE] = after
    assert arena.identity == new


def test_a_damaged_identity_is_found(arena: Arena, path: Path) -> None:
    arena.update_identity(attempt=1)
    for at in IDENTITY_AT:
        arena.array[at + 20] ^= 1
    with pytest.raises(CorruptionError, match="identity"):
        Arena.open(path)


# ---- the sparse regions ----


def test_extra_bytes_are_written_past_the_mapping_and_seen_in_it(arena: Arena) -> None:
    data = bytes(range(256)) * 20
    slots = arena.table.begin("extra", [("extra", len(data), b"")], attempt=1, step=1)
    assert slots is not None
    arena.write_slot(slots[0], data)
    assert arena.read_slot(slots[0]) == data
    with pytest.raises(ValueError, match="3 bytes for a slot of 5120"):
        arena.write_slot(slots[0], b"abc")
    for offset in (SPEC.reserved - 1, SPEC.nbytes - 1, -5, 0):
        with pytest.raises(ValueError, match="not in the sparse regions"):
            arena.write(offset, b"ab")


# ---- ending ----


def test_views_outlive_close_and_the_file_outlives_both(path: Path) -> None:
    arena = Arena.create(path, SPEC, WHO)
    view = arena.array[SPEC.regions()["dense"].start :][:5]
    arena.table.filled(arena.table.begin("dense", [("dense", 5, b"d")], attempt=1, step=1) or [])
    view[:] = 7
    arena.close()
    arena.close()
    assert view.tolist() == [7] * 5
    for use in (lambda: arena.array, lambda: arena.table):
        with pytest.raises(ValueError, match="is closed"):
            use()
    with Arena.open(path, writable=True) as again:
        (slot,) = again.table.live()
        assert again.read_slot(slot) == b"\7" * 5 and slot.state == SlotState.FILLED
    arena.unlink()
    arena.unlink()
    assert not path.exists()


def test_a_table_kept_beyond_close_writes_nowhere(path: Path) -> None:
    arena = Arena.create(path, SPEC, WHO)
    table = arena.table
    arena.close()
    with pytest.raises(StorageError, match="writing descriptors"):
        table.begin("dense", [("dense", 5, b"d")], attempt=1, step=1)


def test_a_thousand_snapshots_grow_nothing(shm: Path) -> None:
    """Memory and descriptors of a process that snapshots, reads the table and opens arenas again and again."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    def cycle(arena: Arena, step: int, held: list) -> list:
        items = [(f"expert/0/{i}", PAGE * (1 + (i + step) % 3), b"%d at %d" % (i, step % 7)) for i in range(20)]
        slots = arena.table.begin("experts", items, attempt=1, step=step)
        extra = arena.table.begin("extra", [("extra", 3 * PAGE, b"")], attempt=1, step=step)
        assert slots is not None and extra is not None
        arena.write_slot(extra[0], bytes(3 * PAGE))
        done = arena.table.unpin(arena.table.pin(arena.table.filled([*slots, *extra])), committed=True)
        arena.table.free(held)
        arena.update_identity(attempt=step)
        if step % 10 == 0:
            with Arena.open(arena.path) as reader:
                assert len(reader.table.live(["extra"])) == 1
        return done

    spec = ArenaSpec(dense=PAGE, experts=160 * PAGE, extra=8 * PAGE, slots=64, descriptors=1 << 20)
    with Arena.create(shm / "a.rank_00000.arena", spec, WHO) as arena:
        held: list = []
        for step in range(1, 201):
            held = cycle(arena, step, held)
        gc.collect()  # what earlier tests of this process left open
        memory, descriptors = resident(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        blocks = arena.path.stat().st_blocks
        for step in range(201, 1201):
            held = cycle(arena, step, held)
        assert len(os.listdir("/proc/self/fd")) <= descriptors  # noqa: PTH208
        assert resident() - memory < 1 << 20
        assert arena.path.stat().st_blocks == blocks
        arena.table.free(held)
        assert all(arena.table.holes(pool) == [tuple(spec.regions()[pool])] for pool in ("experts", "extra"))


def test_the_clock_is_in_the_head_page() -> None:
    assert HEADER_BYTES <= CLOCK_AT <= PAGE - 8 and CLOCK_AT % 8 == 0
