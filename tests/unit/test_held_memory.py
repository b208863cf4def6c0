"""What memory serves of a recovery plan: addresses, checksums, and the plan that is left."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import TOPOLOGY

from moc_ckpt.recovery.held import cut_extents
from moc_ckpt.recovery.memory_reads import split_plan
from moc_ckpt.recovery.pinning import merge_pages
from moc_ckpt.recovery.resolver import Stored, StoredTensor, resolve
from moc_ckpt.state.fragment import Fragment, TensorKey
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentTable, Manifest, PackRecord, TensorRecord, UnitRecord


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 20)), max_size=6), st.data())
def test_extents_are_cut_as_their_bytes(extents: list[tuple[int, int]], data: st.DataObject) -> None:
    places = [at for start, room in extents for at in range(start, start + room)]
    offset = data.draw(st.integers(0, len(places)))
    nbytes = data.draw(st.integers(0, len(places) - offset))
    cut = cut_extents(extents, offset, nbytes)
    assert [at for start, count in cut for at in range(start, start + count)] == places[offset : offset + nbytes]


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=8))
def test_pages_are_joined(ranges: list[tuple[int, int]]) -> None:
    page = 16
    wanted = {at // page for start, count in ranges for at in range(start, start + count)}
    found = merge_pages(ranges, page)
    assert {at // page for start, count in found for at in range(start, start + count)} == wanted
    assert all(start % page == 0 and count % page == 0 for start, count in found)
    # One registration each: none touches the next.
    assert all(a + count < b for (a, count), (b, _) in itertools.pairwise(found))


class Memory:
    """Holds some fragments, each in several pieces."""

    def __init__(self, content: dict[tuple[str, Version, Fragment], bytes], generator: random.Random) -> None:
        self._content = content
        self._random = generator

    def checksum(self, unit: str, version: Version, fragment: Fragment) -> int | None:
        return None

    def find(self, unit: str, version: Version, fragment: Fragment) -> Sequence[np.ndarray] | None:
        data = self._content.get((unit, version, fragment))
        if data is None:
            return None
        cut = self._random.randrange(len(data) + 1)
        return [np.frombuffer(part, dtype=np.uint8) for part in (data[:cut], data[cut:]) if part]


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_is_split_between_memory_and_storage(seed: int) -> None:
    generator = random.Random(seed)
    count = generator.randrange(1, 6)
    tensors, rows, stored, content, truth = [], [], {}, {}, {}
    offsets = [0, 0]
    for number in range(count):
        name, numel = f"t{number}", generator.randrange(1, 40)
        data = generator.randbytes(4 * numel)
        truth[name] = data
        tensors.append(TensorRecord(name, "master", "float32", (numel,)))
        cuts = sorted({0, numel, *(generator.randrange(numel + 1) for _ in range(2))})
        fragments = []
        for start, stop in itertools.pairwise(cuts):
            pack = generator.randrange(2)
            part = data[4 * start : 4 * stop]
            rows.append((number, number, pack, start, stop, offsets[pack], crc32c(part)))
            fragments.append(Stored(start, stop, pack, offsets[pack], crc32c(part)))
            offsets[pack] += len(part) + generator.randrange(3) * 4
            version = Version(1, generator.choice([7, 7, 6]))
            if generator.random() < 0.7:
                fragment = Fragment(name, "master", "float32", (numel,), start, stop)
                damaged = generator.random() < 0.2
                held = bytes([part[0] ^ 1]) + part[1:] if damaged else part
                content[f"expert/0/{number}", version, fragment] = held
        stored[TensorKey(name, "master")] = StoredTensor("float32", (numel,), tuple(fragments))
    manifest = Manifest(
        tag="t",
        save_id="s",
        attempt=1,
        step=7,
        created=0.0,
        topology=TOPOLOGY,
        moe_layers=[],
        parameters=0,
        units=[UnitRecord(f"expert/0/{number}", 1, 7) for number in range(count)],
        tensors=tensors,
        packs=[PackRecord(f"p{pack}", nbytes, 0) for pack, nbytes in enumerate(offsets)],
        fragments=FragmentTable.from_rows(rows),
    )
    needs = []
    for tensor in tensors:
        low, high = sorted(generator.randrange(tensor.shape[0] + 1) for _ in range(2))
        needs.append(Fragment(tensor.fqn, "master", "float32", tuple(tensor.shape), low, high))
    plan = resolve(stored, needs)
    here, left = split_plan(Memory(content, generator), manifest, plan)  # type: ignore[arg-type]
    assert sum(item.piece.nbytes for item in here) + left.nbytes == plan.nbytes
    covered: dict[int, dict[int, int | None]] = {}
    for item in here:
        need = needs[item.piece.need]
        data = b"".join(view.tobytes() for view in item.views)
        first = 4 * need.start + item.piece.at
        assert data == truth[need.fqn][first : first + item.piece.nbytes], "not the bytes that were saved"
        for at in range(item.piece.nbytes):
            assert covered.setdefault(item.piece.need, {}).setdefault(item.piece.at + at, None) is None
            covered[item.piece.need][item.piece.at + at] = 1
    # What is whole in memory and right is never read from storage.
    whole = {
        (pack, offset)
        for unit, _, pack, start, stop, offset, checksum in rows
        if (data := content.get((f"expert/0/{unit}", Version(1, 7), fragment_of(tensors[unit], start, stop))))
        and crc32c(data) == checksum
    }
    for read in left.reads:
        for piece in read.pieces:
            row = max(row for row in ((r[5], r[2]) for r in rows if r[2] == read.pack and r[5] <= piece.offset))
            assert (read.pack, row[0]) not in whole


def fragment_of(tensor: TensorRecord, start: int, stop: int) -> Fragment:
    return Fragment(tensor.fqn, tensor.kind, tensor.dtype, tuple(tensor.shape), start, stop)
