from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from storage_samples import ArraySource, flip, make_store, random_bytes

from moc_ckpt.errors import CorruptionError, FormatError, StorageError
from moc_ckpt.storage import pack_write
from moc_ckpt.storage.checksum import crc32c, crc32c_combine
from moc_ckpt.storage.pack import PackReader, plan_pack, write_pack
from moc_ckpt.storage.pack_layout import ALIGNMENT, MAX_CHUNK, decode_metadata, encode_metadata
from moc_ckpt.storage.store import Store, open_store

MIB = 1 << 20
BIG = 21 * MIB + 12345


def write(store: Store, data: np.ndarray, key: str = "pack", **options: int) -> list[int]:
    half = len(data) // 2
    entries = [(0, half), (half, 0), (half, len(data) - half)]
    result = write_pack(store, key, len(data), entries, ArraySource(data), **options)
    assert result.stored_bytes == sum(len(store.read(name) or b"") for name in store.list(key))
    return result.crc32c


def read_with_tensorstore(store: Store, key: str = "pack") -> np.ndarray:
    """Reads a pack by TensorStore alone, from a copy of its files."""
    context = ts.Context()
    kv = ts.KvStore.open({"driver": "memory", "path": "copy/"}, context=context).result()
    for name in store.list(key):
        kv[name.removeprefix(f"{key}/")] = store.read(name)
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory", "path": "copy/"}, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True, context=context).result().read().result()


# ---- layout ----


@given(
    st.integers(1, 1 << 42)
    | st.builds(lambda count, step: count * 4 * MIB + step, st.integers(1, 99), st.integers(-9, 9)),
    st.sampled_from([1 << 30, 256 * MIB, 20 * MIB]),
)
@example(4 * MIB + 1, 1 << 30)
@example(8 * MIB + 1, 1 << 30)
@example(16 * MIB + 1, 1 << 30)
def test_layout_is_tight_and_within_limits(nbytes: int, cap: int) -> None:
    layout = plan_pack(nbytes, shard_bytes=cap)
    assert layout.chunks * layout.chunk >= nbytes > (layout.chunks - 1) * layout.chunk
    sizes = [layout.shard_bytes(shard) for shard in {0, layout.shards // 2, layout.shards - 1}]
    assert max(sizes) <= cap
    assert sum(layout.shard_chunks(shard) for shard in {0, layout.shards - 1}) <= layout.chunks or layout.shards == 1
    assert layout.shard_chunks(layout.shards - 1) >= 1
    padding = layout.chunks * layout.frame - nbytes
    assert padding == 4 if nbytes < 4 * MIB else padding < nbytes * (0.001 if nbytes >= 8 * MIB else 0.002)
    assert layout.stored_bytes - nbytes - padding < 700 + 40 * layout.chunks
    if nbytes >= 4 * MIB:
        assert layout.aligned and layout.chunk % ALIGNMENT == layout.tail % ALIGNMENT == 0
        assert 4 * MIB <= layout.chunk <= MAX_CHUNK
        assert layout.chunk >= 8 * MIB or layout.chunks == 1
    assert decode_metadata(encode_metadata(layout), "") == layout


def test_layout_refuses_nonsense() -> None:
    assert plan_pack(0).stored_bytes == 0
    with pytest.raises(ValueError):
        plan_pack(-1)
    with pytest.raises(ValueError):
        plan_pack(1, shard_bytes=0)


# ---- round trips ----


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, MIB + 3, 4 * MIB, BIG])
def test_round_trip(kind: str, nbytes: int, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    data = random_bytes(nbytes)
    half = nbytes // 2
    assert write(store, data) == [crc32c(data[:half]), 0, crc32c(data[half:])]
    reader = PackReader(store, "pack", nbytes)
    reader.check()
    np.testing.assert_array_equal(reader.read(0, nbytes), data)
    np.testing.assert_array_equal(read_with_tensorstore(store), data)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_round_trip_over_several_objects(kind: str, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    data = random_bytes(BIG)
    write(store, data, shard_bytes=9 * MIB)
    assert [name for name in store.list("pack/c") if name.startswith("pack/c/")] == [f"pack/c/{i}" for i in range(3)]
    np.testing.assert_array_equal(PackReader(store, "pack", BIG).read(0, BIG), data)
    np.testing.assert_array_equal(read_with_tensorstore(store), data)


@pytest.mark.parametrize("nbytes", [100, BIG])
def test_all_write_paths_make_the_same_bytes(nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(nbytes)
    stores = [open_store(tmp_path / "direct", create=True), make_store("memory", tmp_path)]
    for store in stores:
        write(store, data, shard_bytes=9 * MIB)
    real_open = os.open

    def no_direct(path: os.PathLike[str], flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args)

    monkeypatch.setattr(os, "open", no_direct)
    stores.append(open_store(tmp_path / "buffered", create=True))
    write(stores[-1], data, shard_bytes=9 * MIB)
    files = [{name: store.read(name) for name in store.list()} for store in stores]
    assert files[0] == files[1] == files[2]


def test_refusal_of_the_first_direct_write_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    real, refused = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = random_bytes(BIG)
    write(store, data)
    assert refused == [0]
    np.testing.assert_array_equal(PackReader(store, "pack", BIG).read(0, BIG), data)


def test_empty_pack_writes_nothing(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    result = write_pack(store, "pack", 0, [(0, 0)], ArraySource(random_bytes(0)))
    assert (result.crc32c, result.stored_bytes, store.list()) == ([0], 0, [])
    reader = PackReader(store, "pack", 0)
    reader.check()
    assert len(reader.read(0, 0)) == 0
    assert list(reader.scan()) == []
    with pytest.raises(ValueError):
        reader.read(0, 1)


def test_source_is_asked_in_order_from_the_calling_thread(tmp_path: Path) -> None:
    source = ArraySource(random_bytes(BIG))
    write_pack(make_store("local", tmp_path), "pack", BIG, [], source)
    assert source.offsets == [i * plan_pack(BIG).chunk for i in range(2)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_entry_checksums_at_arbitrary_cuts(data: st.DataObject) -> None:
    nbytes = data.draw(st.sampled_from([1000, 9 * MIB + 7]))
    cuts = sorted(data.draw(st.lists(st.integers(0, nbytes), min_size=2, max_size=12)))
    entries = [(low, high - low) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]
    content = random_bytes(nbytes)
    result = write_pack(open_store("memory://entries"), "pack", nbytes, entries, ArraySource(content))
    assert result.crc32c == [crc32c(content[low : low + count]) for low, count in entries]


@pytest.mark.parametrize("entries", [[(0, 6), (5, 2)], [(5, 2), (0, 2)], [(0, 11)], [(0, -1)], [(-1, 2)]])
def test_entries_must_be_ascending_and_inside(entries: list[tuple[int, int]], tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    with pytest.raises(ValueError, match="entry"):
        write_pack(store, "pack", 10, entries, ArraySource(random_bytes(10)))
    assert store.list() == []


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crc32c_combine(first: bytes, second: bytes) -> None:
    assert crc32c_combine(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


# ---- reading ----


@pytest.fixture(scope="module", params=["local", "memory"])
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    store = make_store(request.param, tmp_path_factory.mktemp("big"))
    data = random_bytes(BIG)
    write(store, data, shard_bytes=9 * MIB)
    return store, data


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(st.tuples(st.integers(0, BIG), st.integers(0, 9 * MIB)), max_size=6))
def test_batches_of_any_ranges(big: tuple[Store, np.ndarray], requests: list[tuple[int, int]]) -> None:
    store, data = big
    spans = [(low, min(low + count, BIG)) for low, count in requests]
    batch = [(low, np.full(high - low, 0xAA, np.uint8)) for low, high in spans]
    PackReader(store, "pack", BIG).read_batch(batch)
    for (low, high), (_, got) in zip(spans, batch, strict=True):
        np.testing.assert_array_equal(got, data[low:high])


def test_many_small_requests(big: tuple[Store, np.ndarray]) -> None:
    store, data = big
    batch = [(i * 1000 + i % 7, np.empty(300, np.uint8)) for i in range(2000)]
    PackReader(store, "pack", BIG).read_batch(batch)
    assert all((got == data[low : low + 300]).all() for low, got in batch)


def test_only_needed_sub_chunks_are_read_and_each_once(
    big: tuple[Store, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = big
    layout = plan_pack(BIG, shard_bytes=9 * MIB)
    touched: list[tuple[str, int, int]] = []
    real = type(store).read_ranges

    def spy(self: Store, key: str, ranges: list) -> None:
        touched.extend((key, offset, sum(map(len, views))) for offset, views in ranges)
        real(self, key, ranges)

    monkeypatch.setattr(type(store), "read_ranges", spy)
    reader = PackReader(store, "pack", BIG)
    at = layout.chunk + 10
    reader.read_batch([(at, np.empty(5, np.uint8)), (at + 3, np.empty(9, np.uint8)), (at + 500, np.empty(1, np.uint8))])
    assert touched == [("pack/c/1", -layout.index_bytes, layout.index_bytes), ("pack/c/1", 0, layout.chunk + 4)]
    touched.clear()
    reader.read(layout.chunk - 1, 2)
    assert sorted(touched) == [
        ("pack/c/0", -layout.index_bytes, layout.index_bytes),
        ("pack/c/0", 0, layout.chunk + 4),
        ("pack/c/1", 0, layout.chunk + 4),
    ]


def test_wrong_requests(big: tuple[Store, np.ndarray]) -> None:
    reader = PackReader(big[0], "pack", BIG)
    for offset, dst in (
        (-1, np.empty(1, np.uint8)),
        (BIG, np.empty(1, np.uint8)),
        (0, np.empty(1, np.int8)),
        (0, np.empty((1, 1), np.uint8)),
        (0, np.empty(4, np.uint8)[::2]),
    ):
        with pytest.raises(ValueError):
            reader.read_into(dst, offset)


def test_scan_gives_everything_in_order(big: tuple[Store, np.ndarray]) -> None:
    store, data = big
    end = 0
    for offset, chunk in PackReader(store, "pack", BIG).scan():
        assert offset == end and isinstance(chunk, np.ndarray)
        np.testing.assert_array_equal(chunk, data[offset : offset + len(chunk)])
        end += len(chunk)
    assert end == BIG


# ---- damage ----


def damage(store: Store, key: str, position: int, mask: int = 0x04) -> None:
    if store.local_path is not None:
        flip(store.local_path / key, position, mask)
    else:
        data = bytearray(store.read(key) or b"")
        data[position] ^= mask
        store.write(key, bytes(data))


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("nbytes", [1000, 9 * MIB])
def test_a_flipped_byte_is_found_wherever_it_is(kind: str, nbytes: int, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    data = random_bytes(nbytes)
    write(store, data)
    layout = plan_pack(nbytes)
    size = layout.shard_bytes(0)
    regions = {
        "data": 0,
        "middle": nbytes // 2,
        "padding": (layout.chunks - 1) * layout.frame + layout.chunk_bytes(layout.chunks - 1),
        "checksum": layout.chunk + 1,
        "index": size - layout.index_bytes,
        "index checksum": size - 1,
    }
    for region, position in regions.items():
        damage(store, "pack/c/0", position)
        with pytest.raises(CorruptionError) as info:
            PackReader(store, "pack", nbytes).read(0, nbytes)
        assert store.locate("pack/c/0") in info.value.where and "byte" in info.value.where, region
        assert info.value.fix
        with pytest.raises(ValueError):  # TensorStore alone finds it as well
            read_with_tensorstore(store)
        damage(store, "pack/c/0", position)
        np.testing.assert_array_equal(PackReader(store, "pack", nbytes).read(0, nbytes), data)


def test_intact_sub_chunks_of_a_damaged_pack_still_read(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    data = random_bytes(BIG)
    write(store, data)
    chunk = plan_pack(BIG).chunk
    damage(store, "pack/c/0", plan_pack(BIG).frame + 99)
    reader = PackReader(store, "pack", BIG)
    np.testing.assert_array_equal(reader.read(0, chunk), data[:chunk])
    with pytest.raises(CorruptionError, match="checksum mismatch") as info:
        reader.read(chunk, 1)
    assert f"byte {chunk:,} of the pack" in info.value.where
    results = [result for _, result in reader.scan()]
    assert [isinstance(result, CorruptionError) for result in results] == [False, True]


def test_every_byte_of_the_metadata_is_guarded(tmp_path: Path) -> None:
    store = make_store("memory", tmp_path)
    write(store, random_bytes(1000))
    good = store.read("pack/zarr.json") or b""
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        store.write("pack/zarr.json", bytes(bad))
        with pytest.raises(CorruptionError, match="metadata") as info:
            PackReader(store, "pack", 1000).read(0, 1)
        assert store.locate("pack/zarr.json") in info.value.where
    store.write("pack/zarr.json", good[:-20])
    with pytest.raises(CorruptionError):
        PackReader(store, "pack", 1000).check()


def test_newer_pack_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    newer = encode_metadata(plan_pack(BIG)).replace(b'"format_version":2', b'"format_version":7')
    crc = json.loads(newer)["attributes"]["moc_ckpt"]["crc32c"].encode()
    plain = newer.replace(crc, b"00000000")
    newer = plain.replace(b"00000000", b"%08x" % crc32c(plain))
    with pytest.raises(FormatError, match=r"version 7.*up to 2") as info:
        decode_metadata(newer, "here")
    assert "upgrade" in info.value.fix


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("name", ["zarr.json", "c/0"])
def test_missing_files_are_named(kind: str, name: str, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    write(store, random_bytes(1000))
    store.delete(f"pack/{name}")
    for call in (lambda reader: reader.read(0, 10), lambda reader: reader.check()):
        with pytest.raises(CorruptionError, match="missing") as info:
            call(PackReader(store, "pack", 1000))
        assert info.value.where == store.locate(f"pack/{name}")


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("keep", [0, 3, 500, -1])
def test_truncation_is_found_without_reading_the_payload(kind: str, keep: int, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    write(store, random_bytes(1000))
    data = store.read("pack/c/0") or b""
    store.write("pack/c/0", data[:keep])
    with pytest.raises(CorruptionError, match="truncated"):
        PackReader(store, "pack", 1000).check()
    store.write("pack/c/0", data + b"\0")
    with pytest.raises(CorruptionError):
        PackReader(store, "pack", 1000).check()


def test_another_packs_size_is_refused(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    write(store, random_bytes(1000))
    with pytest.raises(CorruptionError, match=r"holds 1,000 bytes, its manifest says 999"):
        PackReader(store, "pack", 999).read(0, 1)


def test_an_unreadable_device_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    write(store, random_bytes(1000))

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CorruptionError, match="Input/output error"):
        PackReader(store, "pack", 1000).read(0, 1)


# ---- failing writes ----


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("nbytes", [1000, BIG])
def test_failing_disk_is_explained_and_leaves_nothing(
    code: int, nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("local", tmp_path)
    real = os.pwrite
    monkeypatch.setattr(pack_write.os, "pwrite", lambda fd, data, offset: fail(code) if offset else real(fd, data, 0))
    with pytest.raises(StorageError, match="writing a pack failed") as info:
        write(store, random_bytes(nbytes))
    assert info.value.where == store.locate("pack/c/0") and info.value.fix
    if code != errno.EIO:
        assert f"{plan_pack(nbytes).shard_bytes(0):,} bytes needed" in info.value.what
    assert [path for path in (tmp_path / "ckpt").rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    write(store, random_bytes(nbytes))  # the same process can go on


def fail(code: int) -> int:
    raise OSError(code, os.strerror(code))


def test_full_disk_is_found_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store("local", tmp_path)
    source = ArraySource(random_bytes(BIG))
    monkeypatch.setattr(pack_write, "_allocate", lambda fd, size: fail(errno.ENOSPC))
    with pytest.raises(StorageError, match="bytes needed"):
        write_pack(store, "pack", BIG, [], source)
    assert source.offsets == []


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_failing_source_leaves_no_object(kind: str, tmp_path: Path) -> None:
    class Broken(ArraySource):
        def read_into(self, dst: np.ndarray, offset: int) -> None:
            if offset:
                raise RuntimeError("the slot is gone")
            super().read_into(dst, offset)

    store = make_store(kind, tmp_path)
    with pytest.raises(RuntimeError, match="the slot is gone"):
        write_pack(store, "pack", BIG, [], Broken(random_bytes(BIG)))
    assert store.list() == []


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    out = 0
    real_take, real_give = pack_write._pool.take, pack_write._pool.give

    def take() -> object:
        nonlocal out
        out += 1
        taken.append(out)
        return real_take()

    def give(buffer: object) -> None:
        nonlocal out
        out -= 1
        real_give(buffer)

    monkeypatch.setattr(pack_write._pool, "take", take)
    monkeypatch.setattr(pack_write._pool, "give", give)
    write_pack(make_store("local", tmp_path), "pack", 6 * BIG, [], ArraySource(random_bytes(6 * BIG)), threads=2)
    assert max(taken) == 4 and out == 0
