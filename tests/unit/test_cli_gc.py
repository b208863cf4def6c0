"""`moc-ckpt gc`: what goes, what stays, and that a kill in between loses nothing that is committed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from storage_samples import EXPERTS, each_file, make_store, save, write_rank
from typer.testing import CliRunner

from moc_ckpt.cli.main import app
from moc_ckpt.persist import garbage
from moc_ckpt.persist.garbage import collect_arenas, collect_garbage
from moc_ckpt.persist.heartbeat import HEARTBEAT, LockRecord, live_writer
from moc_ckpt.persist.process import place, start_ticks
from moc_ckpt.persist.protocol import RankStatus, Status
from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
from moc_ckpt.snapshot.places import agent_lock_path, arena_path, job_dir, job_key
from moc_ckpt.storage.attempts import open_attempt
from moc_ckpt.storage.checkpoint import Outcome, list_tags, write_outcome
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import verify

MIB = 1 << 20
runner = CliRunner()


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    base = Path("/dev/shm") / f"mct-{uuid.uuid4().hex[:8]}"
    base.mkdir(mode=0o700)
    monkeypatch.setenv("MOC_SHM_DIR", str(base))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MOC_JOB_ID", raising=False)
    yield base
    shutil.rmtree(base)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store("local", tmp_path)


def run(*args: object, code: int = 0) -> str:
    result = runner.invoke(app, ["gc", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.stdout if code != 2 else result.stderr


def as_json(*args: object, code: int = 0) -> dict[str, Any]:
    result = runner.invoke(app, ["gc", *map(str, args), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def age(store: Store, seconds: float = 3600.0) -> None:
    """Lets everything in the directory look old."""
    then = time.time() - seconds
    assert store.local_path is not None
    for path in store.local_path.rglob("*"):
        os.utime(path, (then, then))


def snapshot(store: Store) -> dict[str, bytes]:
    assert store.local_path is not None
    return {str(path): path.read_bytes() for path in each_file(store.local_path) if path.name != "commit.lock"}


def size_on_disk(store: Store) -> int:
    return sum(map(len, snapshot(store).values()))


def beat(store: Store, pid: int, where: str | None = None, counter: int = 7) -> None:
    record = LockRecord(
        run="r1", host="hostA", pid=pid, job="job", place=where or place(), started=None, counter=counter, period_s=5.0
    )
    store.write(HEARTBEAT, msgspec.json.encode(record))


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert start_ticks(process.pid) is None
    return process.pid


# ---- checkpoints ----


def test_without_options_every_checkpoint_stays(store: Store) -> None:
    for step in (10, 20, 30):
        save(store, f"t{step}", step)
    before = snapshot(store)
    text = run(store.url)
    assert "nothing to remove, 3 checkpoints kept: t30, t20, t10" in text
    assert snapshot(store) == before


def test_keep_last_removes_what_no_kept_checkpoint_refers_to(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20, experts=EXPERTS[:2])
    save(store, "t30", 30, experts=EXPERTS[2:3])
    before = size_on_disk(store)
    data = as_json(store.url, "--keep-last", 1)
    assert data["kept"] == ["t30"] and [item["name"] for item in data["removed"]] == ["t10", "t20"]
    # The bytes reported are those that are gone from the disk.
    assert data["bytes"] == before - size_on_disk(store) == sum(item["bytes"] for item in data["removed"])
    left = {key.split("/")[0] + "/" + key.split("/")[3] for key in store.list() if "/packs/" in key}
    assert {name for name in left if not name.startswith("t30")} == {
        f"t{step}/rank_0000{rank}.experts" for step in (10, 20) for rank in (0, 1)
    }
    assert verify(store, "t30").ok
    assert as_json(store.url, "--keep-last", 1)["removed"] == []


def test_dry_run_says_the_same_and_removes_nothing(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20, experts=EXPERTS[:2])
    write_rank(store, "t15", "half", 0, step=15, attempt=1, publish=False)
    age(store)
    before = snapshot(store)
    told = as_json(store.url, "--keep-last", 1, "--dry-run")
    assert snapshot(store) == before
    text = run(store.url, "--keep-last", 1, "--dry-run")
    assert "would be removed" in text and "t15/half" in text and "leftover save" in text and "would be freed" in text
    assert snapshot(store) == before
    done = as_json(store.url, "--keep-last", 1)
    assert {**told, "dry_run": False} == done
    assert size_on_disk(store) == sum(map(len, before.values())) - done["bytes"]
    assert verify(store, "t20").ok


def test_keep_every_alone_keeps_its_multiples_and_the_newest(store: Store) -> None:
    for step in (10, 15, 20, 25):
        save(store, f"t{step}", step)
    run(store.url, "--keep-every", 20)
    assert list_tags(store) == ["t20", "t25"]
    assert all(verify(store, tag).ok for tag in list_tags(store))


def test_keep_last_0_keeps_all(store: Store) -> None:
    for step in (10, 20):
        save(store, f"t{step}", step)
    run(store.url, "--keep-last", 0, "--keep-every", 20)
    assert list_tags(store) == ["t10", "t20"]


def test_what_a_restart_from_an_older_step_builds_on_stays(store: Store) -> None:
    """A save in flight of the new attempt refers to experts of the step that it forked at."""
    for step in (10, 20, 30):
        save(store, f"t{step}", step)
    attempt = open_attempt(store, parent=1, forked_at_step=10)
    data = as_json(store.url, "--keep-last", 1)
    assert data["kept"] == ["t30", "t10"] and list_tags(store) == ["t10", "t30"]
    manifest = save(store, "t12", 12, experts=EXPERTS[:1], attempt=attempt.attempt)
    assert any(path.startswith("t10/") for path in manifest.pack_paths)
    # Once it has a checkpoint of its own that is the newest one, and the older timeline goes but for what it needs.
    assert as_json(store.url, "--keep-last", 1)["kept"] == ["t12"]
    assert verify(store, "t12").ok


def test_an_unreadable_manifest_blocks_and_is_a_problem(store: Store) -> None:
    for step in (10, 20, 30):
        save(store, f"t{step}", step)
    store.write("t20/manifest.json", b"{")
    before = snapshot(store)
    assert "t20/manifest.json" in run(store.url, "--keep-last", 1, code=1)
    assert "t20/manifest.json" in as_json(store.url, "--keep-last", 1, code=1)["blocked"]
    assert snapshot(store) == before


def spoil_pack(store: Store, tag: str, *, gone: bool) -> None:
    """Takes a file of a checkpoint's own dense pack away, or the end of it."""
    assert store.local_path is not None
    (victim,) = store.local_path.glob(f"{tag}/*/packs/rank_00001.dense/c/0")
    victim.unlink() if gone else os.truncate(victim, victim.stat().st_size - 1)


@pytest.mark.parametrize("how", ["gone", "truncated", "extra", "older"])
def test_an_older_checkpoint_stays_in_the_place_of_a_damaged_one(store: Store, tmp_path: Path, how: str) -> None:
    save(store, "t10", 10)
    save(store, "t15", 15, experts=EXPERTS[1:])
    save(store, "t20", 20)
    save(store, "t30", 30, experts=EXPERTS[:1])
    assert store.local_path is not None
    shutil.copytree(store.local_path, tmp_path / "whole")
    if how == "older":  # what it has from an older tag; then that one is damaged, too
        (victim,) = store.local_path.glob("t20/*/packs/rank_00000.experts/c/0")
        victim.unlink()
    elif how == "extra":
        (victim,) = store.local_path.glob("t30/*/extra/rng/1")
        victim.unlink()
    else:
        spoil_pack(store, "t30", gone=how == "gone")
    kept = ["t30", "t20", "t15"] if how == "older" else ["t30", "t20"]
    before = snapshot(store)
    told = as_json(store.url, "--keep-last", 1, "--dry-run", code=1)
    assert snapshot(store) == before and told["kept"] == kept and list(told["damaged"]) == kept[:-1]
    text = run(store.url, "--keep-last", 1, code=1)
    assert "t30 is damaged" in text and "stays and does not count" in text
    assert sorted(list_tags(store)) == sorted(kept) and verify(store, kept[-1]).ok
    # All files are put back.
    shutil.copytree(tmp_path / "whole", store.local_path, dirs_exist_ok=True)
    data = as_json(store.url, "--keep-last", 1, "--idle", 0)
    assert data["kept"] == ["t30"] and data["damaged"] == {} and verify(store, "t30").ok


def test_damage_does_not_matter_where_everything_stays(store: Store) -> None:
    for step in (10, 20):
        save(store, f"t{step}", step)
    spoil_pack(store, "t20", gone=True)
    assert as_json(store.url)["kept"] == ["t20", "t10"]


def test_memory_stays_if_only_a_damaged_checkpoint_is_as_new(store: Store) -> None:
    for step in (90, 100):
        save(store, f"t{step}", step)
    make_arena(job_key(store.url), 0, 100, store.url).close()
    spoil_pack(store, "t100", gone=False)
    (item,) = as_json(store.url, "--arenas")["arenas"]
    assert "it holds step 100, storage step 90" in item["stays"]


def test_nothing_goes_before_a_commit(store: Store) -> None:
    open_attempt(store)
    write_rank(store, "t10", "half", 0, step=10, attempt=1)
    age(store)
    assert "before a commit" in run(store.url, code=1)
    assert store.list("t10/half")


def test_other_directories_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    assert "does not exist" in run(tmp_path / "nowhere", code=2)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    error = run(tmp_path / "mine", "--keep-last", 1, code=2)
    assert "no run of this package" in error and "what to do" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    for wrong in (["--keep-last", "-1"], ["--keep-every", "x"], ["--idle", "-2"]):
        run(tmp_path, *wrong, code=2)


def test_other_peoples_files_stay(store: Store) -> None:
    foreign = ["global_step5/mp_rank_00_model_states.pt", "a/b/packs/box/x", "a/c/extra/y", "runs/z", "t10/README"]
    for key in foreign:
        store.write(key, b"mine")
    assert store.local_path is not None
    (store.local_path / "a/d/empty").mkdir(parents=True)
    save(store, "t10", 10)
    save(store, "t20", 20)
    age(store)
    run(store.url, "--keep-last", 1, "--idle", 0)
    assert all(store.exists(key) for key in foreign) and (store.local_path / "a/d/empty").is_dir()
    assert list_tags(store) == ["t20"]


# ---- leftovers ----


def leftovers(store: Store) -> None:
    """Two checkpoints, and saves of every kind that never committed, all of them older than the newest one."""
    save(store, "t10", 10)
    write_rank(store, "t12", "nopart", 0, step=12, attempt=1, publish=False)
    write_rank(store, "t15", "onepart", 0, step=15, attempt=1)
    write_outcome(store, "t17", "noted", Outcome(committed=False, error="disk full", attempt=1, step=17))
    save(store, "t20", 20, experts=EXPERTS[:3])
    write_rank(store, "t40", "later", 0, step=40, attempt=1)
    write_rank(store, "t40", "later", 1, step=40, attempt=1)


def test_leftovers_go_once_nothing_changes_in_them(store: Store) -> None:
    leftovers(store)
    data = as_json(store.url)
    assert data["removed"] == [] and [item["save"] for item in data["in_flight"]] == [
        "t12/nopart",
        "t15/onepart",
        "t17/noted",
        "t40/later",
    ]
    assert "it changed" in data["in_flight"][0]["reason"]
    assert "--idle 0" in run(store.url)
    age(store)
    assert store.local_path is not None
    (store.local_path / "t12/nopart/packs/rank_00000.dense/c/0").touch()  # somebody writes a pack
    data = as_json(store.url)
    assert [item["name"] for item in data["removed"]] == ["t15/onepart", "t17/noted"]
    assert [item["save"] for item in data["in_flight"]] == ["t12/nopart"]
    # All parts of t40 are there: it is newer than any commit, and may be finished.
    assert data["unfinished"] == ["t40/later"]
    assert [item["name"] for item in as_json(store.url, "--idle", 0)["removed"]] == ["t12/nopart"]
    assert sorted(store.list_dirs()) == ["attempts", "t10", "t20", "t40"]
    assert all(verify(store, tag).ok for tag in ("t10", "t20"))


def test_files_that_a_killed_commit_never_finished(store: Store) -> None:
    save(store, "t10", 10)
    assert store.local_path is not None
    ours = ["t20/.manifest.json.tmp-123-0123abcd", ".latest.tmp-1-0123abcd", "attempts/.000002.json.tmp-5-0123abcd"]
    theirs = ["t20x/.manifest.json.tmp-mine", "notes/.a.tmp-123-0123abcd", ".swp.tmp-123-0123abcd"]
    for name in ours + theirs:
        path = store.local_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1234")
    assert as_json(store.url)["removed"] == []
    age(store)
    beat(store, os.getpid())
    assert as_json(store.url)["removed"] == []
    store.delete(HEARTBEAT)
    for flags in (["--dry-run"], []):
        data = as_json(store.url, *flags)
        assert sorted(item["name"] for item in data["removed"]) == sorted(ours) and data["bytes"] == 12
    assert not any((store.local_path / name).exists() for name in ours) and not (store.local_path / "t20").exists()
    assert all((store.local_path / name).exists() for name in theirs) and verify(store, "t10").ok


def test_a_live_writer_keeps_its_saves(store: Store) -> None:
    leftovers(store)
    age(store)
    beat(store, os.getpid())
    data = as_json(store.url, "--idle", 0, "--keep-last", 1)
    assert "process" in data["writer"] and "hostA" in data["writer"]
    assert [item["name"] for item in data["removed"]] == ["t10"]  # a checkpoint, not a save in flight
    assert {item["save"] for item in data["in_flight"]} == {"t12/nopart", "t15/onepart", "t40/later"}
    assert "its saves are left alone" in run(store.url)
    assert verify(store, "t20").ok
    beat(store, dead_pid())
    data = as_json(store.url)
    assert data["writer"] is None
    assert [item["name"] for item in data["removed"]] == ["t12/nopart", "t15/onepart", "t17/noted"]


def test_a_writer_on_another_machine_is_watched(store: Store) -> None:
    now = [0.0]

    def silent(seconds: float) -> None:
        now[0] += seconds

    def renewing(seconds: float) -> None:
        now[0] += seconds
        beat(store, 4242, "another boot", counter=8)

    assert live_writer(store, clock=lambda: now[0], sleep=silent) == ""
    beat(store, 4242, "another boot")
    assert live_writer(store, clock=lambda: now[0], sleep=silent) == "" and now[0] == pytest.approx(12.5)
    assert "process 4242 on hostA" in live_writer(store, clock=lambda: now[0], sleep=renewing)
    store.write(HEARTBEAT, b"?")
    assert live_writer(store, clock=lambda: now[0], sleep=silent) == ""


@pytest.mark.parametrize(("busy", "name"), [(1, "the agent of job j (process 7 on n)"), (0, None)])
def test_a_working_agent_of_this_node_counts_as_a_writer(
    store: Store, monkeypatch: pytest.MonkeyPatch, busy: int, name: str | None
) -> None:
    """Its trainers may be gone, and with them the heartbeat."""
    leftovers(store)
    age(store)
    rank = RankStatus(
        run="r",
        rank=0,
        local_rank=0,
        world=1,
        pid=1,
        alive=False,
        connected=False,
        arena="",
        queued=0,
        writing=busy,
        committing=0,
        done=0,
        failed=0,
        bytes=0,
        seconds=0.0,
        error="",
        steps=[],
    )
    status = Status(
        pid=7,
        node="n",
        job="j",
        version="0",
        uptime_s=1.0,
        linger_s=600.0,
        idle_s=None,
        stopping="",
        rss=0,
        fds=0,
        ranks=[rank],
    )
    asked = []
    monkeypatch.setattr(garbage, "ask_agent", lambda folder, message: asked.append(folder) or status)
    data = as_json(store.url)
    assert data["writer"] == name and asked == [job_dir(job_key(store.url), create=False)]
    gone = [item["name"] for item in data["removed"]]
    assert gone == ([] if busy else ["t12/nopart", "t15/onepart", "t17/noted"])


def test_a_replaced_save_goes_at_once_but_for_needed_packs(store: Store) -> None:
    first = save(store, "a", 10)
    save(store, "b", 20, experts=EXPERTS[:1])
    save(store, "a", 25)
    data = as_json(store.url)
    assert [(item["kind"], item["name"], item["packs"]) for item in data["removed"]] == [
        ("replaced save", f"a/{first.save_id}", 2)
    ]
    assert verify(store, "a").ok and verify(store, "b").ok


def test_object_stores_tell_no_times(tmp_path: Path) -> None:
    store = make_store("memory", tmp_path)
    leftovers(store)
    found = collect_garbage(store, keep_last=0)
    assert found.report.saves == ["t15/onepart", "t17/noted"] and list(found.stays) == ["t12/nopart"]
    assert found.report.spared == ["t40/later"] and found.total > 0
    found = collect_garbage(store, keep_last=0, idle_s=0)
    assert found.report.saves == ["t12/nopart"]
    assert all(verify(store, tag).ok for tag in ("t10", "t20"))


# ---- a kill in between ----

KILLED = """
import os, sys
from moc_ckpt.storage.local import LocalStore
left = [int(sys.argv.pop(1))]
for name in ("delete", "delete_prefix"):
    def removing(self, key, real=getattr(LocalStore, name)):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        real(self, key)
    setattr(LocalStore, name, removing)
from moc_ckpt.cli.main import main
main()
"""


def test_a_kill_after_any_removal_leaves_whole_checkpoints(tmp_path: Path) -> None:
    origin = make_store("local", tmp_path)
    save(origin, "t10", 10)
    write_rank(origin, "t15", "half", 0, step=15, attempt=1)
    save(origin, "t20", 20, experts=EXPERTS[:1])
    save(origin, "t30", 30, experts=EXPERTS[1:3])
    age(origin)
    for count in range(40):
        store = make_store("local", tmp_path / str(count))
        assert origin.local_path is not None and store.local_path is not None
        shutil.copytree(origin.local_path, store.local_path, dirs_exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(count), "gc", store.url, "--keep-last", "1", "--idle", "0"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode in (0, 9), done.stderr
        assert "t30" in list_tags(store) and all(verify(store, tag).ok for tag in list_tags(store)), count
        run(store.url, "--keep-last", 1, "--idle", 0)
        assert list_tags(store) == ["t30"] and verify(store, "t30").ok
        left = [key for key in store.list() if not key.startswith(("t30/", "attempts/", "latest", "commit.lock"))]
        assert left and all(".experts/" in key and key.startswith(("t10/", "t20/")) for key in left), count
        if done.returncode == 0:
            break
    assert 8 < count < 39


# ---- shared memory ----


def make_arena(job: str, rank: int, step: int, url: str | None = None) -> Arena:
    folder = job_dir(job, create=True)
    who = Identity(job=job, run="r1", rank=rank, world=2, pid=os.getpid(), node="n", url=url, attempt=1, created=0.0)
    arena = Arena.create(arena_path(folder, "r1", rank), ArenaSpec(4 * MIB, 4 * MIB, MIB, 32), who)
    arena.table.filled(arena.table.begin("dense", [("dense", MIB, b"")], attempt=1, step=step) or [])
    return arena


def test_forsaken_arenas_go_and_others_stay(store: Store) -> None:
    save(store, "t100", 100)
    job = job_key(store.url)
    make_arena(job, 0, 100, store.url).close()
    make_arena(job, 1, 110, store.url).close()
    make_arena("other-job", 0, 5).close()
    make_arena("any.0123", 0, 5).close()
    make_arena("any.4567", 0, 5).close()
    old = time.time() - 3600
    os.utime(job_dir("any.0123", create=False), (old, old))
    told = as_json(store.url, "--arenas", "--dry-run")["arenas"]
    gone = [item["path"] for item in told if item["stays"] is None]
    expected = [job_dir("any.0123", create=False), arena_path(job_dir(job, create=False), "r1", 0)]
    assert gone == list(map(str, expected)) and all(path.exists() for path in expected)
    assert all(item["bytes"] >= 8 * MIB for item in told)
    text = run(store.url, "--arenas")
    assert "shared memory removed" in text and "it holds step 110, storage step 100" in text
    assert not any(path.exists() for path in expected)
    assert arena_path(job_dir(job, create=False), "r1", 1).exists()
    for other in ("other-job", "any.4567"):
        assert arena_path(job_dir(other, create=False), "r1", 0).exists()
    assert "no forsaken arena" in run(store.url, "--arenas")


def in_another_process(store: Store) -> list[str]:
    """A file's locks are not in the way of the process that has them, so another one must look."""
    done = subprocess.run(
        [sys.executable, "-m", "moc_ckpt.cli.main", "gc", store.url, "--arenas", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [item["stays"] for item in json.loads(done.stdout)["arenas"]]


def test_arenas_of_a_live_process_or_agent_stay(store: Store) -> None:
    import fcntl

    save(store, "t100", 100)
    job = job_key(store.url)
    folder = job_dir(job, create=True)
    arena = make_arena(job, 0, 90, store.url)
    assert in_another_process(store) == [f"process {os.getpid()} writes it"]
    arena.close()
    with agent_lock_path(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert in_another_process(store) == ["the job's agent, or another rank, lives"]
    make_arena(job, 1, 90, "/another/dir").close()
    found = collect_arenas(store, 100)
    assert [item.stays for item in found] == ["", "it is of a run that saves into /another/dir"]
    assert [path.exists() for path in (arena_path(folder, "r1", 0), arena_path(folder, "r1", 1))] == [False, True]


def test_help_is_quick() -> None:
    script = (
        "import sys\nfrom moc_ckpt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    bad = sorted({'torch', 'deepspeed', 'tensorstore'} & set(sys.modules))\n"
        "    sys.exit(f'imported {bad}' if bad else end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "gc", "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout and "--arenas" in done.stdout and "DIR" in done.stdout
