"""What the agent's tests share: job directories, hand-made saves with plain files as arenas, and real agents."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moc_ckpt._version import __version__
from moc_ckpt.persist.protocol import PROTOCOL, ExtraJob, Hello, PackJob, Persist, Retention
from moc_ckpt.snapshot.places import agent_lock_path, agent_log_path, socket_path
from moc_ckpt.state.unit import dense_unit
from moc_ckpt.storage.checkpoint import load_manifest, manifest_key, new_save_id, pack_key
from moc_ckpt.storage.manifest import (
    CommitInfo,
    FragmentTable,
    PackRecord,
    Part,
    TensorRecord,
    Topology,
    UnitRecord,
)
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import verify

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4096
NAME = "layer.weight"
PATIENCE_S = 90.0
"""Seconds that a test waits for what takes a fraction of one on an idle machine."""


@contextmanager
def job_folder(job: str = "test") -> Iterator[Path]:
    """A private job directory in shared memory; whatever is left in it goes, and agents that still serve it."""
    folder = Path("/dev/shm") / f"moc_test-{uuid.uuid4().hex[:8]}" / job
    folder.mkdir(parents=True, mode=0o700)
    try:
        yield folder
    finally:
        with suppress(OSError, ValueError):
            end_agent(int(agent_lock_path(folder).read_text()), folder)
        shutil.rmtree(folder.parent, ignore_errors=True)


def end_agent(pid: int, folder: Path) -> None:
    """Kills an agent by its number, if that is still an agent of this directory."""
    with suppress(OSError):
        if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z", "the agent to die")


def state_of(pid: int) -> str:
    """The state letter of a process, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """Waits for something to be true and returns it."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **extra}


def spawn_agent(
    folder: Path, *, job: str = "test", linger: float = 60.0, grace: float = 1.0, node: str = "node0", **env: str
) -> subprocess.Popen[bytes]:
    """A real agent that is this process's child; waits until it listens."""
    command = [sys.executable, "-m", "moc_ckpt.persist.agent", "--dir", str(folder), "--job", job]
    command += ["--linger", str(linger), "--grace", str(grace), "--node", node]
    agent = subprocess.Popen(command, env=environment(**env), stderr=subprocess.PIPE)
    wait_until(lambda: can_connect(folder) or agent.poll() is not None, "the agent to listen")
    return agent


@contextmanager
def running_agent(folder: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    agent = spawn_agent(folder, **options)
    try:
        yield agent
    finally:
        if agent.poll() is None:
            agent.kill()
        agent.wait()
        if agent.stderr is not None:
            agent.stderr.close()


def can_connect(folder: Path) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(socket_path(folder)))
        except OSError:
            return False
    return True


def log_of(folder: Path) -> str:
    path = agent_log_path(folder)
    return path.read_text() if path.exists() else ""


def hello(folder: Path, *, run: str = "r1", rank: int = 0, world: int = 1, job: str = "test", **changes: Any) -> Hello:
    made = Hello(
        protocol=PROTOCOL,
        version=__version__,
        job=job,
        run=run,
        rank=rank,
        local_rank=rank,
        world=world,
        pid=os.getpid(),
        arena=str(arena_file(folder, run, rank)),
    )
    return msgspec.structs.replace(made, **changes)


def arena_file(folder: Path, run: str, rank: int) -> Path:
    return folder / f"{run}.rank_{rank:05d}.arena"


def content(tag: str, rank: int, nbytes: int) -> np.ndarray:
    """What a rank holds at a save; different for every save and rank."""
    seed = int.from_bytes(f"{tag}/{rank}".encode()[-8:], "little")
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def make_request(
    folder: Path,
    url: str | Path,
    tag: str,
    *,
    save_id: str = "",
    rank: int = 0,
    world: int = 1,
    run: str = "r1",
    step: int = 1,
    attempt: int = 1,
    nbytes: int = 64 << 10,
    at: int = PAGE,
    commit_s: float = 60.0,
    threads: int = 2,
    retention: Retention | None = None,
    fill: bool = True,
) -> Persist:
    """Fills a rank's arena file (from byte `at` on) and makes the request that saves it.

    One dense tensor of `world` x `nbytes` bytes; each rank holds its part of it. Nine bytes of a small file follow.
    """
    save_id = save_id or f"{run}-{new_save_id()}"
    arena = arena_file(folder, run, rank)
    count = nbytes // 4
    extra_at = at + -(-nbytes // PAGE) * PAGE
    if fill:
        with arena.open("r+b" if arena.exists() else "w+b") as file:
            file.truncate(max(extra_at + PAGE, arena.stat().st_size))
            file.seek(at)
            file.write(content(tag, rank, nbytes).data)
            file.seek(extra_at)
            file.write(bytes([rank]) * 9)
    key = pack_key(tag, save_id, rank, "dense")
    part = Part(
        tag=tag,
        save_id=save_id,
        attempt=attempt,
        step=step,
        rank=rank,
        world=world,
        units=[UnitRecord(dense_unit(NAME), attempt, step)],
        tensors=[TensorRecord(NAME, "master", "float32", (world * count,))],
        declared=[TensorRecord(NAME, "master", "float32", (world * count,))],
        packs=[PackRecord(key, nbytes, 0)],
        fragments=FragmentTable.from_rows([(0, 0, 0, rank * count, (rank + 1) * count, 0, 0)]),
        parameters=world * count if rank == 0 else 0,
        commit=CommitInfo(
            topology=Topology(world=world, zero_stage=1, expert_parallel={}, precision="bf16", versions={}),
            moe_layers=[],
        )
        if rank == 0
        else None,
    )
    return Persist(
        url=str(url),
        part=part,
        packs=[PackJob(key, nbytes, [(0, at, nbytes)])],
        extras=[ExtraJob(f"rng/{rank}", extra_at, 9)],
        arena=str(arena),
        threads=threads,
        commit_s=commit_s,
        retention=retention,
        run_prefix=f"{run}-",
    )


def check_committed(url: str | Path | Store, tag: str, *, world: int = 1, nbytes: int = 64 << 10) -> None:
    """Every byte of a checkpoint of `make_request` is there and intact, compared with what the arenas held."""
    store = url if isinstance(url, Store) else open_store(str(url))
    report = verify(store, tag)
    assert report.ok, report.problems
    manifest = load_manifest(store, tag)
    assert len(manifest.packs) == world
    for rank in range(world):
        path = pack_key(tag, manifest.save_id, rank, "dense")
        found = PackReader(store, path, nbytes).read(0, nbytes)
        assert np.array_equal(found, content(tag, rank, nbytes)), f"rank {rank} of {tag}"
        assert store.read(manifest.extra[f"rng/{rank}"].path) == bytes([rank]) * 9


def is_committed(url: str | Path, tag: str) -> bool:
    return open_store(str(url)).exists(manifest_key(tag))
