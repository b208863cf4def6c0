from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError, StorageError
from moc_ckpt.snapshot.places import (
    agent_lock_path,
    agent_log_path,
    arena_path,
    find_arenas,
    job_dir,
    job_key,
    named_node,
    node_name,
    parse_arena_path,
    socket_path,
)

SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,39}")


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a short name: sockets lie below, and their paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="moc_") as folder:
        monkeypatch.setenv("MOC_SHM_DIR", folder)
        yield Path(folder)


def top(base: Path) -> Path:
    return base / f"moc_ckpt-{os.getuid()}"


# ---- keys ----


def test_all_names_of_a_directory_give_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "a dir"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [
        str(real),
        f"{real}/",
        f"{tmp_path}/x/../a dir",
        "a dir",
        "./a dir",
        "~/a dir",
        str(tmp_path / "link"),
        f"file://{tmp_path}/a%20dir",
        f"file://localhost{tmp_path}/a%20dir/",
    ]
    keys = {job_key(name, {}) for name in names} | {job_key(real, {})}
    assert len(keys) == 1
    assert job_key(str(tmp_path), {}) not in keys


def test_urls_have_keys() -> None:
    assert job_key("s3://bucket/run", {}) == job_key("s3://bucket/run/", {}) != job_key("gs://bucket/run", {})


def test_the_environment_names_the_job() -> None:
    assert job_key("/a", {"MOC_JOB_ID": "train-7_b"}) == job_key(None, {"MOC_JOB_ID": " train-7_b "}) == "train-7_b"
    assert job_key("/a", {"MOC_JOB_ID": " "}) == job_key("/a", {})


def test_without_a_name_keys_are_random() -> None:
    assert job_key(None, {}) != job_key(None, {})
    assert SAFE.fullmatch(job_key("", {}))


@given(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text), st.text(min_size=1))
def test_job_ids_become_file_names_and_stay_apart(one: str, other: str) -> None:
    keys = [job_key(None, {"MOC_JOB_ID": job}) for job in (one, other)]
    assert SAFE.fullmatch(keys[0])
    assert keys[0] == job_key("/elsewhere", {"MOC_JOB_ID": one})
    if other.strip() and one.strip() != other.strip():
        assert keys[0] != keys[1]


# ---- directories ----


def test_directories_are_private(base: Path) -> None:
    old = os.umask(0)
    try:
        folder = job_dir("job", create=True)
    finally:
        os.umask(old)
    assert folder == top(base) / "job"
    assert [path.stat().st_mode & 0o7777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert job_dir("job", create=True) == job_dir("job", create=False) == folder


def test_looking_makes_nothing(base: Path) -> None:
    assert job_dir("job", create=False) == top(base) / "job"
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("kind", "problem"),
    [("link", "is a link"), ("file", "is no directory"), ("open", r"is open to others \(mode 0750\)")],
)
@pytest.mark.parametrize("create", [True, False])
def test_directories_of_doubtful_origin_are_refused(
    base: Path, level: int, kind: str, problem: str, create: bool
) -> None:
    path = top(base)
    if level:
        path.mkdir(mode=0o700)
        path = path / "job"
    if kind == "link":
        (base / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(base / "elsewhere")
    elif kind == "file":
        path.touch(mode=0o600)
    else:
        path.mkdir()
        path.chmod(0o750)
    with pytest.raises(StorageError, match=problem) as info:
        job_dir("job", create=create)
    assert info.value.where == str(path)
    assert info.value.fix


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_refused(base: Path) -> None:
    job_dir("job", create=True)
    os.chown(top(base), 65534, 65534)
    with pytest.raises(StorageError, match="belongs to user 65534"):
        job_dir("job", create=True)


def test_base_that_cannot_be_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOC_SHM_DIR", str(base / "missing"))
    with pytest.raises(StorageError, match="cannot be made") as info:
        job_dir("job", create=True)
    assert "MOC_SHM_DIR" in info.value.fix
    (base / "file").touch()
    monkeypatch.setenv("MOC_SHM_DIR", str(base / "file"))
    with pytest.raises(StorageError, match="cannot be used"):
        job_dir("job", create=False)


def test_a_socket_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 107 - len(f"/moc_ckpt-{os.getuid()}/job/agent.sock")
    monkeypatch.setenv("MOC_SHM_DIR", "/" + "x" * (room - 1))
    assert len(str(socket_path(job_dir("job", create=False)))) == 107
    monkeypatch.setenv("MOC_SHM_DIR", "/" + "x" * room)
    with pytest.raises(StorageError, match="1 bytes too long"):
        job_dir("job", create=True)


@pytest.mark.parametrize("job", ["", ".", "..", "a/b", "../x", ".hidden", "a\n", "ä"])
def test_keys_that_are_no_file_names_are_refused(base: Path, job: str) -> None:
    with pytest.raises(ValueError, match="is no job key"):
        job_dir(job, create=True)
    assert list(base.iterdir()) == []


def test_nodes_of_one_machine_have_directories_apart(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOC_NODE", raising=False)
    assert node_name() == socket.gethostname() and named_node() is None
    folders = [job_dir("job", create=True)]
    for name in ("a", "b", "node-7_b.x"):
        monkeypatch.setenv("MOC_NODE", name)
        assert node_name() == named_node() == name
        folders.append(job_dir("job", create=True))
    assert len({folder.parent for folder in folders}) == 4
    assert folders[-1] == base / f"moc_ckpt-{os.getuid()}.node-7_b.x" / "job"
    assert all(stat.S_IMODE(folder.parent.stat().st_mode) == 0o700 for folder in folders)
    monkeypatch.setenv("MOC_NODE", " ")
    assert job_dir("job", create=False) == folders[0]


@pytest.mark.parametrize("name", ["..", ".a", "a/b", "a b", "ä", "a\n b", "x" * 41])
def test_node_names_that_are_no_file_names_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MOC_NODE", name)
    for look in (named_node, node_name, lambda: job_dir("job", create=True)):
        with pytest.raises(ConfigError, match="no name for a node") as info:
            look()
        assert info.value.where == "MOC_NODE"
    assert list(base.iterdir()) == []


def test_default_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOC_SHM_DIR", raising=False)
    assert job_dir("a-job-that-is-not", create=False) == Path(f"/dev/shm/moc_ckpt-{os.getuid()}/a-job-that-is-not")


# ---- files ----


def test_arenas_are_found_by_run_and_rank(tmp_path: Path) -> None:
    names = [("b", 2), ("a.rank_00001", 3), ("a", 100000), ("a", 7)]
    for run, rank in names:
        arena_path(tmp_path, run, rank).touch()
    for path in (
        agent_lock_path(tmp_path),
        agent_log_path(tmp_path),
        tmp_path / "x.arena",
        tmp_path / "a.rank_1.arena",
    ):
        path.touch()
    assert arena_path(tmp_path, "a", 7) == tmp_path / "a.rank_00007.arena"
    assert [parse_arena_path(path) for path in find_arenas(tmp_path)] == sorted(names)
    assert find_arenas(tmp_path / "missing") == []


def test_bad_arena_names() -> None:
    for run, rank in (("a/b", 0), ("", 0), ("..", 0), ("a", -1)):
        with pytest.raises(ValueError, match="must"):
            arena_path(Path("/x"), run, rank)
