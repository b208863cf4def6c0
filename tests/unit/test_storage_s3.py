"""The whole cycle on s3://, against a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from storage_samples import ArraySource, random_bytes, save

from moc_ckpt.errors import CorruptionError
from moc_ckpt.storage.checkpoint import latest_tag, list_tags
from moc_ckpt.storage.pack import PackReader, write_pack
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import verify

moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    import urllib.request

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
    spec = {"driver": "s3", "bucket": "bucket", "path": "run/", "endpoint": endpoint, "aws_region": "us-east-1"}
    return open_store({**spec, "aws_credentials": {"type": "environment"}})


def test_objects_and_locks(store: Store) -> None:
    store.check_writable()
    assert store.list() == []
    assert store.create("a/b", b"1") and not store.create("a/b", b"2")
    assert store.read("a/b") == b"1" and store.exists("a/b") and not store.exists("a")
    assert store.list_dirs() == ["a"]
    with store.lock("commit.lock"):
        pass
    store.delete_prefix("a")
    assert store.list() == []


def test_packs(store: Store) -> None:
    data = random_bytes(10_000_000)
    write_pack(store, "pack", len(data), [], ArraySource(data))
    reader = PackReader(store, "pack", len(data))
    np.testing.assert_array_equal(reader.read(4_900_000, 300_000), data[4_900_000:5_200_000])
    np.testing.assert_array_equal(reader.read(0, len(data)), data)
    stored = bytearray(store.read("pack/c/0") or b"")
    stored[17] ^= 1
    store.write("pack/c/0", bytes(stored))
    with pytest.raises(CorruptionError, match="checksum mismatch"):
        reader.read(0, 1)
    store.write("pack/c/0", bytes(stored[:-1]))
    with pytest.raises(CorruptionError):
        PackReader(store, "pack", len(data)).check()


def test_commit_verify_and_retention(store: Store) -> None:
    save(store, "t10", 10)
    save(store, "t20", 20, experts=[(0, 0)])
    save(store, "t30", 30)
    assert latest_tag(store) == "t30" and verify(store, "t20").ok
    assert apply_retention(store, keep_last=1).dropped == ("t10", "t20")
    assert list_tags(store) == ["t30"] and verify(store, "t30").ok
    assert not store.list("t10") and not store.list("t20")
