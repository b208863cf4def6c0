"""Packs that are written straight from the source's memory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import ArraySource, make_store, random_bytes
from test_storage_pack import BIG, MIB, read_with_tensorstore

from moc_ckpt.errors import StorageError
from moc_ckpt.persist.source import FileSource
from moc_ckpt.storage import pack_write
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.pack import PackReader, plan_pack, write_pack
from moc_ckpt.storage.store import Store, open_store

PAGE = 4096


def paged(data: np.ndarray, behind: int = 0xAA) -> np.ndarray:
    """Copies data to page-aligned memory, which goes on behind it up to the next page."""
    memory = np.frombuffer(mmap.mmap(-1, max(-(-len(data) // PAGE), 1) * PAGE), np.uint8)
    memory[: len(data)] = data
    memory[len(data) :] = behind
    return memory


class Pieces:
    """Shows its memory in pieces of random numbers of pages, but for the ranges that begin at `hidden` offsets."""

    def __init__(self, data: np.ndarray, hidden: Sequence[int] = (), most: int = 300) -> None:
        self.memory = paged(data)
        self.size = len(data)
        self.hidden = set(hidden)
        self.most = most
        self.copied: list[tuple[int, int]] = []
        self.shown: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        assert offset + len(dst) <= self.size
        self.copied.append((offset, len(dst)))
        dst[:] = self.memory[offset : offset + len(dst)]

    def pieces(self, offset: int, nbytes: int) -> list[np.ndarray | memoryview] | None:
        self.threads.add(threading.get_ident())
        assert offset % PAGE == nbytes % PAGE == 0 and 0 < nbytes <= self.size - offset
        if offset in self.hidden:
            return None
        self.shown.append((offset, nbytes))
        choice = random.Random(offset)
        out: list[np.ndarray | memoryview] = []
        while nbytes:
            count = min(choice.randint(1, self.most) * PAGE, nbytes)
            view = self.memory[offset : offset + count]
            out.append(view if choice.random() < 0.5 else memoryview(view))
            offset, nbytes = offset + count, nbytes - count
        return out


def files(store: Store) -> dict[str, bytes | None]:
    return {name: store.read(name) for name in store.list()}


def entries_of(nbytes: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    cuts = sorted(rng.randint(0, nbytes) for _ in range(40))
    return [(low, high - low) for low, high in zip(cuts[::2], cuts[1::2], strict=True)]


@pytest.fixture
def no_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    def take() -> None:
        raise AssertionError("a staging buffer was taken")

    monkeypatch.setattr(pack_write._pool, "take", take)


SIZES = [4 * MIB, 4 * MIB + 1, 8 * MIB + 8192, BIG, 40 * MIB, 40 * MIB + 64, 40 * MIB + PAGE - 64]


@pytest.mark.usefixtures("no_staging")
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("shard", [1 << 30, 9 * MIB])
def test_same_bytes_as_from_a_copy(nbytes: int, shard: int, tmp_path: Path) -> None:
    data, entries = random_bytes(nbytes), entries_of(nbytes)
    store, other = open_store(tmp_path / "pieces", create=True), make_store("memory", tmp_path)
    source = Pieces(data)
    results = [write_pack(store, "pack", nbytes, entries, source, threads=3, shard_bytes=shard)]
    results.append(write_pack(other, "pack", nbytes, entries, ArraySource(data), shard_bytes=shard))
    assert results[0] == results[1]
    assert results[0].crc32c == [crc32c(data[low : low + count]) for low, count in entries]
    assert results[0].stored_bytes == sum(len(content or b"") for content in files(store).values())
    assert files(store) == files(other)
    np.testing.assert_array_equal(PackReader(store, "pack", nbytes).read(0, nbytes), data)
    # Copied is only what does not fill a page.
    assert source.copied == ([(nbytes - nbytes % PAGE, nbytes % PAGE)] if nbytes % PAGE else [])
    assert sorted(source.shown)[0][0] == 0 and sum(count for _, count in source.shown) == nbytes - nbytes % PAGE
    assert threading.get_ident() not in source.threads


@pytest.mark.parametrize("nbytes", [BIG, 40 * MIB + 64])
def test_tensorstore_alone_reads_it(nbytes: int, tmp_path: Path) -> None:
    store, data = make_store("local", tmp_path), random_bytes(nbytes)
    write_pack(store, "pack", nbytes, [], Pieces(data))
    np.testing.assert_array_equal(read_with_tensorstore(store), data)
    position = plan_pack(nbytes).frame + 17
    path = tmp_path / "ckpt" / "pack" / "c" / "0"
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=r"crc32c|checksum|DATA_LOSS"):
        read_with_tensorstore(store)


@pytest.mark.parametrize("nbytes", [8 * MIB + 8192 + 64, 40 * MIB + 3 * PAGE + 100])
def test_what_follows_the_pack_is_zeros(nbytes: int, tmp_path: Path) -> None:
    """Whatever the memory holds behind the pack's end."""
    store, data = make_store("local", tmp_path), random_bytes(nbytes)
    write_pack(store, "pack", nbytes, [], Pieces(data))
    layout = plan_pack(nbytes)
    content = np.frombuffer(store.read("pack/c/0") or b"", np.uint8)
    frames = content[: layout.chunks * layout.frame].reshape(layout.chunks, layout.frame)
    payload = frames[:, : layout.chunk].reshape(-1)
    np.testing.assert_array_equal(payload[:nbytes], data)
    assert len(payload) > nbytes and not payload[nbytes:].any()
    tails = frames[:, layout.chunk :]
    assert not tails[:, 4:].any()
    assert [crc32c(row) for row in frames[:, : layout.chunk]] == tails[:, :4].copy().view("<u4").reshape(-1).tolist()


@pytest.mark.parametrize("hidden", [[0], [1], [0, 1, 2, 3]])
def test_ranges_that_cannot_be_shown_are_staged(hidden: list[int], tmp_path: Path) -> None:
    nbytes = 40 * MIB + 64
    layout, data, entries = plan_pack(nbytes), random_bytes(nbytes), entries_of(nbytes)
    store = make_store("local", tmp_path)
    source = Pieces(data, [index * layout.chunk for index in hidden])
    result = write_pack(store, "pack", nbytes, entries, source)
    assert result.crc32c == [crc32c(data[low : low + count]) for low, count in entries]
    np.testing.assert_array_equal(PackReader(store, "pack", nbytes).read(0, nbytes), data)
    copied = {(index * layout.chunk, layout.chunk_bytes(index)) for index in hidden if index < layout.chunks}
    assert copied <= set(source.copied) and len(source.shown) == layout.chunks - len(copied)


def test_small_packs_and_object_stores_are_copied(tmp_path: Path) -> None:
    data = random_bytes(3 * MIB)
    for kind in ("local", "memory"):
        store, source = make_store(kind, tmp_path), Pieces(data)
        write_pack(store, "pack", len(data), [], source)
        assert source.copied == [(0, len(data))] and not source.shown
    store, source = make_store("memory", tmp_path), Pieces(random_bytes(BIG))
    write_pack(store, "pack", BIG, [], source)
    assert [offset for offset, _ in source.copied] == [0, plan_pack(BIG).chunk] and not source.shown


def test_o_direct_is_used_and_done_without_where_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, direct, refuse = os.pwritev, [], False
    real_open = os.open

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        assert all(len(view) % PAGE == 0 for view in views) and offset % PAGE == 0
        return real(fd, views, offset)

    def open_(path: os.PathLike[str], flags: int, *args: int) -> int:
        if refuse and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args)

    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        supported = True
    except OSError:
        supported = False
    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "open", open_)
    data = random_bytes(BIG)
    stores = []
    for refuse in (False, True):
        stores.append(open_store(tmp_path / str(refuse), create=True))
        write_pack(stores[-1], "pack", BIG, [], Pieces(data))
        assert direct and set(direct) == {supported and not refuse}
        direct.clear()
    assert files(stores[0]) == files(stores[1])


def test_short_writes_go_on_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwritev, []

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        assert len(views) <= 1024
        calls.append(offset)
        if len(calls) % 3:
            return real(fd, views, offset)
        return real(fd, [views[0][: max(len(views[0]) // 2 // PAGE, 1) * PAGE]], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    store, data = make_store("local", tmp_path), random_bytes(BIG)
    write_pack(store, "pack", BIG, [], Pieces(data, most=1))  # more pieces than one call takes
    assert len(calls) > 4
    np.testing.assert_array_equal(PackReader(store, "pack", BIG).read(0, BIG), data)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_disk_is_explained_and_leaves_nothing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwritev(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    store = make_store("local", tmp_path)
    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(StorageError, match="writing a pack failed") as info:
        write_pack(store, "pack", BIG, [], Pieces(random_bytes(BIG)))
    assert info.value.where == store.locate("pack/c/0")
    assert [path for path in (tmp_path / "ckpt").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("fault", ["short", "address", "length"])
def test_a_source_that_shows_the_wrong_memory_is_refused(fault: str, tmp_path: Path) -> None:
    class Wrong(Pieces):
        def pieces(self, offset: int, nbytes: int) -> list[np.ndarray | memoryview] | None:
            view = self.memory[offset : offset + nbytes]
            if fault == "short":
                return [view[:-PAGE]]
            return [self.memory[1 : 1 + nbytes]] if fault == "address" else [view[:100], view[100:]]

    store = make_store("local", tmp_path)
    with pytest.raises(ValueError, match=r"Wrong.pieces\(0, "):
        write_pack(store, "pack", BIG, [], Wrong(random_bytes(BIG)))
    assert store.list() == []


# ---- spans of a file ----


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_spans_of_a_file(draw: st.DataObject) -> None:
    """Read in windows and shown in pieces, a pack is its spans with zeros between them."""
    data = draw.draw
    memory = paged(random_bytes(64 * PAGE))
    spans, expected, end = [], np.zeros(96 * PAGE, np.uint8), 0
    for _ in range(data(st.integers(0, 6))):
        place = end + data(st.sampled_from([0, 64, PAGE - end % PAGE, PAGE, 3 * PAGE + 64]))
        position = data(st.integers(0, 40)) * PAGE + (place % PAGE if data(st.integers(0, 4)) else 64)
        nbytes = data(st.sampled_from([0, 1, 64, PAGE - 64, PAGE, 2 * PAGE, 5 * PAGE, 7 * PAGE + 192]))
        spans.append((place, position, nbytes))
        expected[place : place + nbytes] = memory[position : position + nbytes]
        end = place + nbytes
    source = FileSource(memory, data(st.permutations(spans)))
    low = data(st.integers(0, 60 * PAGE))
    dst = np.full(data(st.integers(0, 30 * PAGE)), 0xAA, np.uint8)
    source.read_into(dst, low)
    np.testing.assert_array_equal(dst, expected[low : low + len(dst)])
    first, count = data(st.integers(0, 60)), data(st.integers(1, 30))
    pieces = source.pieces(first * PAGE, count * PAGE)
    if pieces is not None:
        assert all(piece.ctypes.data % PAGE == len(piece) % PAGE == 0 for piece in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces), expected[first * PAGE : (first + count) * PAGE])


def test_spans_are_shown_where_they_are() -> None:
    memory = paged(random_bytes(3000 * PAGE))
    base = memory.ctypes.data
    source = FileSource(memory, [(0, 10 * PAGE, 1000 * PAGE - 64), (1000 * PAGE, 1010 * PAGE, 100 * PAGE)])
    pieces = source.pieces(0, 1100 * PAGE)
    assert pieces is not None
    shown = [((piece.ctypes.data - base) // PAGE, len(piece) // PAGE) for piece in pieces]
    assert shown[0] == (10, 999) and shown[2] == (1010, 100)
    assert len(pieces[1]) == PAGE and not pieces[1][-64:].any()
    assert memory[1010 * PAGE - 64 : 1010 * PAGE].any()  # the gap is zeros though the memory is not
    # Neighbours in pack and file are one piece.
    joined = FileSource(memory, [(0, 0, 8 * PAGE), (8 * PAGE, 8 * PAGE, PAGE), (9 * PAGE, 9 * PAGE, 3 * PAGE)])
    assert [len(piece) for piece in joined.pieces(PAGE, 11 * PAGE) or []] == [11 * PAGE]
    # What lies across pages is not shown.
    assert FileSource(memory, [(0, 64, 1000 * PAGE)]).pieces(0, 1000 * PAGE) is None


@pytest.mark.parametrize(
    "spans", [[(0, 0, 10), (5, 20, 10)], [(0, PAGE - 5, 10)], [(0, -1, 1)], [(0, 0, -1)], [(-5, 0, 2)]]
)
def test_spans_that_cannot_be(spans: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="span"):
        FileSource(paged(random_bytes(PAGE)), spans)
    with pytest.raises(ValueError, match="uint8"):
        FileSource(np.zeros(4, np.int8), [])


@pytest.mark.usefixtures("no_staging")
def test_a_pack_from_a_shared_memory_file(tmp_path: Path) -> None:
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    path = folder / f"moc-test-{os.getpid()}-{threading.get_ident()}"
    units = [6 * MIB - 64, 5 * MIB + 192, 9 * MIB, 7 * MIB + 4032]
    content = random_bytes(48 * MIB)
    try:
        content.tofile(path)
        array = np.memmap(path, np.uint8, "r")
        spans, expected, end, position = [], [], 0, len(content)
        for nbytes in units:
            position -= -(-nbytes // PAGE) * PAGE
            spans.append((end, position, nbytes))
            padded = np.zeros(-(-nbytes // PAGE) * PAGE, np.uint8)
            padded[:nbytes] = content[position : position + nbytes]
            expected.append(padded)
            end += len(padded)
        nbytes = spans[-1][0] + spans[-1][2]
        store = make_store("local", tmp_path)
        entries = [(place, count) for place, _, count in spans]
        result = write_pack(store, "pack", nbytes, entries, FileSource(array, spans))
        payload = np.concatenate(expected)[:nbytes]
        assert result.crc32c == [crc32c(payload[low : low + count]) for low, count in entries]
        np.testing.assert_array_equal(PackReader(store, "pack", nbytes).read(0, nbytes), payload)
        np.testing.assert_array_equal(read_with_tensorstore(store), payload)
    finally:
        path.unlink(missing_ok=True)
