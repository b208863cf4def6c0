"""What memory holds after all trainers were killed comes to storage, and restores bit for bit."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import harness
from distributed.pec_tools import Diary, tags, verified
from distributed.pool import CaseHang, Pool
from distributed.test_pipeline import build, slow_down
from typer.testing import CliRunner

from moc_ckpt.cli.main import app
from moc_ckpt.errors import StaleAttemptError, StorageError
from moc_ckpt.events import EventKind, read_events
from moc_ckpt.recovery.flush import flush_job
from moc_ckpt.snapshot.arena import Arena
from moc_ckpt.snapshot.places import find_arenas, job_dir, job_key
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import latest_tag, load_manifest
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.store import open_store

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROW = "w2_ep1"
WORLD = 2
LAST = 7


@pytest.fixture(scope="module")
def victims() -> Iterator[Pool]:
    """Processes of their own: these die."""
    with Pool() as own:
        yield own


@pytest.fixture(autouse=True)
def their_memory(victims: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOC_SHM_DIR", str(victims._shared))


def section(path: str, **more: Any) -> dict[str, Any]:
    return {
        "k_snapshot": 1,
        "snapshot_interval": 1,
        "persist_interval": 4,
        "save_dir": path,
        "storage": {"keep_last": 0},
        # On a busy machine no step may be missed, and a restart takes its time.
        "host": {"linger_s": 90.0, "on_busy": "wait"},
        **more,
    }


def case_killed(ctx: Any, path: str, when: str) -> None:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, **section(diary.path))
    engine.moc.register_state(lambda: {"seen": engine.global_steps})
    for step in range(LAST):
        if when == "copy" and step == LAST - 1:
            engine.moc.pipeline.host.votes.idle(30)
            engine.moc.pipeline.host.stager.join()
            if ctx.rank == 1:
                slow_down(30.0)
        harness.train(engine, 1)
        diary.note(engine, attempt=1)
    if when == "idle":
        engine.moc.wait()
        engine.moc.pipeline.host.votes.idle(30)
    Path(path, f"died{ctx.rank}").write_text("")
    ctx.barrier()
    if when == "alive":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


def case_resume(ctx: Any, path: str) -> dict[str, Any]:
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, seed=3, save_mode="durable")
    harness.train(engine, 1, data_seed=5)
    wrong = diary.load(engine)
    found = engine.global_steps
    _, state = engine.load_checkpoint(diary.path)
    plt = engine.moc.pec.ledger.plt
    # What the directory holds is known: the next saves are exact as well.
    for _ in range(2):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
        engine.save_checkpoint(diary.path)
    other = build(ctx, ROW, None, seed=4, save_mode="durable")
    for tag in tags(diary.path):
        wrong += diary.load(other, tag)
    return {"wrong": wrong, "found": found, "state": state, "plt": plt}


def folder_of(path: Path) -> Path:
    return job_dir(job_key(path), create=False)


def kill(victims: Pool, path: Path, when: str) -> Path:
    with pytest.raises(CaseHang):
        victims.run(WORLD, case_killed, path=str(path), when=when, deadline=60.0)
    assert (path / "died0").exists() and (path / "died1").exists(), "the case failed before its end"
    return path / "c"


@pytest.mark.parametrize("when", ["idle", "at once", "copy"])
def test_memory_outlives_the_trainers(victims: Pool, pool: Pool, tmp_path: Path, when: str) -> None:
    ckpt = kill(victims, tmp_path, when)
    store = open_store(str(ckpt))
    before = load_manifest(store, "global_step4")
    flush, manifest = flush_job(folder_of(ckpt), store)
    assert flush is not None and manifest is not None
    assert latest_tag(store) == manifest.tag == f"global_step{manifest.step}"
    # Between the step and its record lies a vote, so a kill at once may find the step before.
    assert manifest.step in {"idle": (LAST,), "at once": (LAST - 1, LAST), "copy": (LAST - 1,)}[when]
    assert verified(str(ckpt), manifest.tag) == []
    ahead = [unit for unit in manifest.units if unit.step > before.step]
    assert {unit.name for unit in ahead if unit.name.startswith("expert")} == set(flush.experts)
    assert all(unit.step == manifest.step for unit in manifest.units if unit.name.startswith("dense"))
    # A second time there is nothing to do.
    assert flush_job(folder_of(ckpt), store) == (None, None)
    for answer in pool.run(WORLD, case_resume, path=str(tmp_path)):
        assert answer["wrong"] == []
        assert answer["found"] == manifest.step
        assert answer["state"] == {"seen": manifest.step}
        assert 0 <= answer["plt"] < 1


def case_restart(ctx: Any, path: str, use: bool) -> dict[str, Any]:
    """Just starts the run again, as torchrun does."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    with warnings_of("moc_ckpt") as said:
        engine = build(ctx, ROW, None, seed=3, **section(diary.path, recovery={"memory": use}))
    with warnings_of("moc_ckpt") as said_by_load, counted_reads() as read, counted_checks() as checked:
        wrong = diary.load(engine)
    said += said_by_load
    found = engine.global_steps
    assert engine.moc.pipeline.host.predecessor.held is None, "the memory of the last run is kept for ever"
    for _ in range(4):
        harness.train(engine, 1)
        diary.note(engine, attempt=2)
        engine.moc.wait()
    other = build(ctx, ROW, None, seed=4, save_mode="durable")
    for tag in tags(diary.path):
        wrong += diary.load(other, tag)
    return {
        "wrong": wrong,
        "found": found,
        "tags": tags(diary.path),
        "read": sum(read),
        "checked": sum(checked),
        "said": said,
    }


def recovered(ckpt: Path) -> dict[str, Any]:
    """What the log of a directory says about the first load from it."""
    events = read_events(open_store(str(ckpt)))
    return next(event for event in events if event.event == EventKind.RECOVERED).fields


def case_nodes_killed(ctx: Any, path: str) -> None:
    """Every rank on a node of its own."""
    own_node(ctx.rank, path)
    case_killed(ctx, path, "idle")


def case_nodes_restart(ctx: Any, path: str, moved: bool, cut_off: bool) -> dict[str, Any]:
    from moc_ckpt.errors import RankError
    from moc_ckpt.transfer import Transfer

    own_node(1 - ctx.rank if moved else ctx.rank, path)
    original = Transfer.swap
    calls: list[None] = []

    def swap(self: Transfer, outgoing: Any) -> Any:
        # One rank knows what it is asked for, and then its connections break.
        calls.append(None)
        if cut_off and ctx.rank == 1 and len(calls) == 2:
            raise RankError("the cable is out")
        return original(self, outgoing)

    Transfer.swap = swap  # type: ignore[method-assign]
    try:
        return case_restart(ctx, path, True)
    finally:
        Transfer.swap = original  # type: ignore[method-assign]


def case_nodes_flush(ctx: Any, path: str) -> list[str]:
    """Brings the memory of all nodes to storage, as a start does, and leaves it where it is."""
    import torch

    from moc_ckpt.comm import Comm
    from moc_ckpt.config import MocConfig
    from moc_ckpt.integrations.deepspeed.predecessor import Predecessor

    own_node(ctx.rank, path)
    with warnings_of("moc_ckpt") as said:
        comm = Comm(rendezvous_s=30.0, commit_s=60.0)
        predecessor = Predecessor(folder_of(Path(path, "c")), MocConfig(enabled=True), (), torch.device("cpu"))
        predecessor._remove = lambda _: None  # type: ignore[method-assign, assignment]
        predecessor.start(comm, first=True)
        predecessor.finish(comm)
        predecessor.let_go()
    return said


def own_node(number: int, path: str) -> None:
    os.environ["MOC_SHM_DIR"] = f"{os.environ['MOC_SHM_DIR']}/{Path(path).name}-node{number}"
    Path(os.environ["MOC_SHM_DIR"]).mkdir(exist_ok=True)


@pytest.mark.parametrize("how", ["same", "moved", "moved and damaged", "moved and cut off", "one lost"])
def test_nodes_bring_their_memory_together(victims: Pool, tmp_path: Path, how: str) -> None:
    with pytest.raises(CaseHang):
        victims.run(WORLD, case_nodes_killed, path=str(tmp_path), deadline=60.0, fresh_after=True)
    assert (tmp_path / "died0").exists() and (tmp_path / "died1").exists(), "the case failed before its end"
    ckpt = tmp_path / "c"
    assert latest_tag(open_store(str(ckpt))) == "global_step4"
    arenas = sorted(Path(victims._shared).glob(f"{tmp_path.name}-node*/**/*.arena"))
    assert len(arenas) == WORLD
    if how == "one lost":
        arenas[1].unlink()
    if how == "moved and damaged":
        # Storage has it first: of what a flush writes, the bytes in memory are what the checkpoint saved.
        answers = victims.run(WORLD, case_nodes_flush, path=str(tmp_path), fresh_after=True)
        assert latest_tag(open_store(str(ckpt))) == f"global_step{LAST}", answers
        spoil(arenas[1])
    facts = {"moved": how.startswith("moved"), "cut_off": how.endswith("cut off")}
    answers = victims.run(WORLD, case_nodes_restart, path=str(tmp_path), **facts, fresh_after=True)
    facts = recovered(ckpt)
    for answer in answers:
        assert answer["wrong"] == []
        assert answer["found"] == (4 if how == "one lost" else LAST), answer["said"]
        if how in ("same", "moved"):
            assert answer["read"] == 0
    if how == "same":
        # Buffers that all ranks have are saved by one, which is on another node for the others.
        assert 0 < facts["peer_bytes"] < 1000 and facts["memory_bytes"] > 0
    if how in ("moved", "moved and damaged"):
        assert facts["peer_bytes"] > 20_000 and facts["memory_bytes"] < 1000, facts
    if how == "moved and cut off":
        assert facts["peer_bytes"] == 0
        assert any("could not fetch from the memory of other nodes" in line for line in answers[0]["said"])
    assert (facts["storage_bytes"] > 0) == (how not in ("same", "moved"))
    assert [line for tag in tags(str(ckpt)) for line in verified(str(ckpt), tag)] == []


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """Collects what a logger warns of."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logging.getLogger(name).addHandler(collector)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(collector)


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Counts the bytes of tensors that this process asks storage for."""
    read: list[int] = []
    original = PackReader.read_batch

    def count(self: PackReader, requests: Any) -> None:
        requests = list(requests)
        read.extend(dst.nbytes for _, dst in requests)
        original(self, requests)

    PackReader.read_batch = count  # type: ignore[method-assign]
    try:
        yield read
    finally:
        PackReader.read_batch = original  # type: ignore[method-assign]


@contextmanager
def counted_checks() -> Iterator[list[int]]:
    """Counts the bytes in memory whose checksums are computed."""
    from moc_ckpt.recovery import memory_reads

    checked: list[int] = []
    original = memory_reads._checksum

    def count(views: Any) -> int:
        checked.append(sum(view.nbytes for view in views))
        return original(views)

    memory_reads._checksum = count
    try:
        yield checked
    finally:
        memory_reads._checksum = original


@pytest.mark.parametrize("how", ["memory", "storage", "other world", "damaged memory", "half of the memory"])
def test_a_restart_finds_what_memory_held(victims: Pool, tmp_path: Path, how: str) -> None:
    ckpt = kill(victims, tmp_path, "idle")
    if how in ("damaged memory", "half of the memory"):
        flush_job(folder_of(ckpt))  # storage has it, so memory is only the nearer place
        _, second = find_arenas(folder_of(ckpt))
        if how == "damaged memory":
            spoil(second)
        else:
            second.unlink()
    world = 4 if how == "other world" else WORLD
    answers = victims.run(world, case_restart, path=str(tmp_path), use=how != "storage")
    if how in ("memory", "other world"):
        # A rank that is where it was has checked its memory before the load asks for it, but for a few buffers.
        assert (max(answer["checked"] for answer in answers) > 1000) == (how == "other world"), answers
    for answer in answers:
        assert answer["wrong"] == []
        assert answer["found"] == (4 if how == "storage" else LAST), answer["said"]
        if how in ("memory", "other world"):
            assert answer["read"] == 0
        else:
            assert answer["read"] > 0
    facts = recovered(ckpt)
    assert (facts["memory_bytes"] > 0) == (how != "storage")
    assert (facts["storage_bytes"] > 0) == (how not in ("memory", "other world"))
    assert facts["peer_bytes"] == 0
    assert [line for tag in tags(str(ckpt)) for line in verified(str(ckpt), tag)] == []


def spoil(path: Path) -> None:
    """Changes a byte in every expert and in the dense state of an arena."""
    with Arena.open(path) as arena:
        places = [slot.extents[0][0] for slot in arena.table.live() if slot.unit != "extra"]
    with path.open("r+b") as file:
        for at in places:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))


def test_what_cannot_be_flushed_is_refused(victims: Pool, tmp_path: Path) -> None:
    ckpt = kill(victims, tmp_path, "idle")
    store, folder = open_store(str(ckpt)), folder_of(ckpt)
    with pytest.raises(StorageError, match=r"belongs to .*/c\b"):
        flush_job(folder, open_store(str(tmp_path / "other"), create=True))
    flush, manifest = flush_job(folder, store, dry_run=True)
    assert flush is not None and flush.step == LAST and manifest is None
    assert latest_tag(store) == "global_step4"
    _, second = find_arenas(folder)
    hidden = second.with_suffix(".hidden")
    second.rename(hidden)
    with pytest.raises(StorageError, match="memory of ranks 1 of 2 is not here"):
        flush_job(folder, store)
    hidden.rename(second)
    code = (
        "import sys; from pathlib import Path; from moc_ckpt.snapshot.arena import Arena\n"
        "arena = Arena.open(Path(sys.argv[1]), writable=True); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(second)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        with pytest.raises(StorageError, match=f"rank 1 is still alive .process {writer.pid}"):
            flush_job(folder, store)
        writer.communicate()
    assert open_attempt(store, 1, 4).attempt == 2
    with pytest.raises(StaleAttemptError, match="of attempt 1; the directory belongs to attempt 2"):
        flush_job(folder, store)
    assert latest_tag(store) == "global_step4"


def test_recover_says_what_comes_back(victims: Pool, tmp_path: Path) -> None:
    ckpt = kill(victims, tmp_path, "idle")
    runner = CliRunner()
    shown = runner.invoke(app, ["recover", str(ckpt), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "global_step7" in shown.output and latest_tag(open_store(str(ckpt))) == "global_step4"
    done = runner.invoke(app, ["recover", str(ckpt), "--json"])
    assert done.exit_code == 0, done.output
    import json

    data = json.loads(done.stdout)
    assert data["tag"] == "global_step7" and data["step"] == 7 and data["flushed"] is True
    manifest = load_manifest(open_store(str(ckpt)), "global_step7")
    behind = {unit.name: 7 - unit.step for unit in manifest.units if unit.name.startswith("expert")}
    assert {item["unit"]: item["behind"] for item in data["experts"]} == {
        name: steps for name, steps in behind.items() if steps
    }
