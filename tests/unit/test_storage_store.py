from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from storage_samples import make_store

from moc_ckpt.errors import StorageError
from moc_ckpt.storage import local, remote
from moc_ckpt.storage.store import Store, open_store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


def names(store: Store) -> list[str]:
    """All directory entries of the root, hidden ones too."""
    assert store.local_path is not None
    return [path.name for path in store.local_path.iterdir()]


def test_objects(store: Store) -> None:
    assert store.read("a/b") is None
    assert not store.exists("a/b")
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    store.write("a/c/d", b"")
    assert store.read("a/b") == b"two"
    assert store.read("a/c/d") == b""
    assert store.exists("a/b")
    assert not store.exists("a")
    assert store.read("a") is None
    assert store.list() == ["a/b", "a/c/d"]
    assert store.list("a/c") == ["a/c/d"]
    assert store.list("a/c/") == ["a/c/d"]
    assert store.list_dirs() == ["a"]
    assert store.list_dirs("a") == ["c"]
    assert store.list_dirs("nothing") == []
    store.delete("a/b")
    store.delete("a/b")
    assert store.list() == ["a/c/d"]


def test_delete_prefix_takes_a_directory_and_not_its_namesakes(store: Store) -> None:
    for key in ("tag/1/x", "tag/1/y/z", "tag/10/x", "tag1/x"):
        store.write(key, b"data")
    store.delete_prefix("tag/1")
    store.delete_prefix("tag/1")
    assert store.list() == ["tag/10/x", "tag1/x"]


def test_delete_prefix_removes_directories_and_lock_files(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    store.write("tag/pack/c/0", b"data")
    (store.local_path / "tag/pack/c/0.__lock").touch()
    (store.local_path / "tag/pack/c/.0.tmp-1-a").touch()
    assert store.list("tag") == ["tag/pack/c/0"]
    store.delete_prefix("tag/pack")
    assert not (store.local_path / "tag/pack").exists()
    store.prune("tag")
    assert not (store.local_path / "tag").exists()


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", "a/", ".", "a/./b", "a\\b", "a\0"])
def test_keys_cannot_leave_the_root(store: Store, key: str) -> None:
    for call in (store.read, store.exists, store.delete, lambda key: store.write(key, b"")):
        with pytest.raises(StorageError, match="not a key"):
            call(key)


def test_create_if_absent_has_one_winner(store: Store) -> None:
    for round_ in range(10):
        barrier = threading.Barrier(6)
        won: list[int] = []

        def contend(number: int, round_: int = round_, barrier: threading.Barrier = barrier, won: list = won) -> None:
            barrier.wait()
            if store.create(f"race/{round_}", b"%d" % number):
                won.append(number)

        threads = [threading.Thread(target=contend, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"race/{round_}") == b"%d" % won[0]
    assert len(store.list("race")) == 10


def test_create_where_hard_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a") == b"1"
    assert names(store) == ["a"]


def test_readers_never_see_a_torn_write(store: Store) -> None:
    stop = threading.Event()
    store.write("x", b"a" * 100_000)

    def rewrite() -> None:
        while not stop.is_set():
            for letter in (b"b", b"a"):
                store.write("x", letter * 100_000)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(50):
            data = store.read("x")
            assert data is not None and len(data) == 100_000 and len(set(data)) == 1
    finally:
        stop.set()
        writer.join()


def test_write_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        calls.append("dir" if Path(f"/proc/self/fd/{fd}").is_dir() else "file")
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    store.write("x", b"data")
    assert calls == ["file", "rename", "dir"]


def test_read_ranges(store: Store) -> None:
    store.write("x", b"0123456789")
    one, two, three = bytearray(2), bytearray(3), bytearray(4)
    store.read_ranges("x", [(1, [memoryview(one), memoryview(two)]), (-4, [memoryview(three)])])
    assert (one, two, three) == (b"12", b"345", b"6789")
    for offset in (7, 100):
        with pytest.raises(EOFError):
            store.read_ranges("x", [(offset, [memoryview(bytearray(4))])])
    with pytest.raises(EOFError):
        store.read_ranges("x", [(-11, [memoryview(bytearray(11))])])
    with pytest.raises(FileNotFoundError):
        store.read_ranges("y", [(0, [memoryview(one)])])


def test_lock_excludes_and_is_released(store: Store) -> None:
    refused = pytest.raises(StorageError, match="another process held the lock")
    with store.lock("the.lock"), refused, store.lock("the.lock", 0.05):
        raise AssertionError("two holders")
    with store.lock("the.lock", 0.05):
        pass


def test_lock_of_a_dead_holder_is_taken_over_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("memory", tmp_path)
    monkeypatch.setattr(remote, "LOCK_LEASE_S", -1.0)
    with store.lock("the.lock"):  # its lease has run out at once
        monkeypatch.setattr(remote, "LOCK_LEASE_S", 300.0)
        with store.lock("the.lock", 0.05):
            owner = store.read("the.lock")
            with pytest.raises(StorageError), store.lock("the.lock", 0.05):
                raise AssertionError("two holders")
            assert store.read("the.lock") == owner


def test_open_store_addresses(tmp_path: Path) -> None:
    url = (tmp_path / "a b").as_uri()
    assert open_store(url).local_path == tmp_path / "a b"
    assert open_store(str(tmp_path)).local_path == tmp_path
    assert not open_store(tmp_path / "new").root_exists()
    assert open_store(tmp_path / "new" / "deep", create=True).root_exists()
    assert open_store({"driver": "memory", "path": "x"}).locate("k").endswith("x/k")
    one, other = open_store("memory://shared-root"), open_store("memory://shared-root/")
    one.write("k", b"v")
    assert other.read("k") == b"v"
    other.delete("k")
    for bad in ("", "ftp://x/y", "file://host/path", "s3://"):
        with pytest.raises(StorageError):
            open_store(bad)


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    store.check_writable()
    assert store.list() == [] and names(store) == []
    with pytest.raises(StorageError, match="not enough space"):
        store.check_writable(need_bytes=1 << 60)
    with pytest.raises(StorageError, match="does not exist"):
        open_store(tmp_path / "no" / "where").check_writable()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        open_store(tmp_path / "file").check_writable()
    with pytest.raises(StorageError, match="making the checkpoint directory failed"):
        open_store(tmp_path / "file" / "below", create=True)

    def read_only(fd: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(StorageError, match="read-only: remount it"):
        store.check_writable()
    assert names(store) == []


def test_full_disk_is_explained_and_leaves_the_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    store.write("x", b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device \(3 bytes needed, [\d,]+ bytes free\)") as info:
        store.write("x", b"new")
    assert str(store.local_path / "x") in str(info.value) and "free space" in info.value.fix
    assert store.read("x") == b"old"
    assert names(store) == ["x"]


def test_storage_error_of_an_unknown_kind_still_says_what_to_do() -> None:
    with pytest.raises(StorageError) as info:
        local.raise_storage_error(OSError(errno.EXDEV, "Invalid link"), "linking", "/x")
    assert info.value.fix and info.value.where == "/x"


def test_unreachable_object_store_is_explained() -> None:
    spec = {
        "driver": "s3",
        "bucket": "bucket",
        "endpoint": "http://127.0.0.1:9",
        "aws_region": "us-east-1",
        "aws_credentials": {"type": "anonymous"},
        "s3_request_retries": {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"},
    }
    store = open_store(spec)
    with pytest.raises(StorageError, match="writing failed") as info:
        store.check_writable()
    assert "credentials" in info.value.fix
