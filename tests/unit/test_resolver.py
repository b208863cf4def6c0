"""The resolver against element-by-element brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import CoverageError
from moc_ckpt.recovery.resolver import Stored, StoredTensor, resolve
from moc_ckpt.state.fragment import Fragment, TensorKey

KEY = TensorKey("w", "master")


@st.composite
def partitions(draw, numel):
    cuts = sorted(draw(st.sets(st.integers(1, max(numel - 1, 1)), max_size=5)) | {0, numel})
    return list(itertools.pairwise(cuts))


@given(st.data(), st.integers(1, 60))
def test_every_needed_element_comes_from_its_place(data, numel):
    spans = data.draw(partitions(numel))
    packs: dict[int, list[int]] = {}
    stored = []
    for start, stop in spans:
        number = data.draw(st.integers(0, 2))
        content = packs.setdefault(number, [])
        content.extend([-1] * data.draw(st.integers(0, 3)))
        stored.append(Stored(start, stop, number, 4 * len(content), start))
        content.extend(range(start, stop))
    files = {number: np.array(content, np.int32).view(np.uint8) for number, content in packs.items()}
    low = data.draw(st.integers(0, numel))
    high = data.draw(st.integers(low, numel))
    needs = [
        Fragment("w", "master", "int32", (numel,), low, high),
        Fragment("w", "master", "int32", (numel,), 0, numel),
    ]
    plan = resolve({KEY: StoredTensor("int32", (numel,), tuple(sorted(stored)))}, needs)
    found = [np.full(need.nbytes, 0xFF, np.uint8) for need in needs]
    for read in plan.reads:
        offsets = [piece.offset for piece in read.pieces]
        assert offsets == sorted(offsets)
        for piece in read.pieces:
            found[piece.need][piece.at : piece.at + piece.nbytes] = files[read.pack][
                piece.offset : piece.offset + piece.nbytes
            ]
            if piece.crc32c is not None:
                span = next(item for item in stored if item.crc32c == piece.crc32c)
                assert piece.nbytes == 4 * (span.stop - span.start)
    for need, values in zip(needs, found, strict=True):
        assert values.view(np.int32).tolist() == list(range(need.start, need.stop))
    assert plan.nbytes == sum(need.nbytes for need in needs)


@pytest.mark.parametrize("spans", [[(0, 4)], [(0, 4), (6, 10)], [(2, 10)], []])
def test_holes_are_named(spans):
    stored = tuple(Stored(start, stop, 0, 0, 0) for start, stop in spans)
    with pytest.raises(CoverageError, match="w master: elements"):
        resolve({KEY: StoredTensor("int32", (10,), stored)}, [Fragment("w", "master", "int32", (10,), 0, 10)])


def test_absent_tensor_is_named():
    with pytest.raises(CoverageError, match="w has no master"):
        resolve({}, [Fragment("w", "master", "int32", (10,), 0, 10)])


def test_stored_dtype_decides_the_bytes():
    tensor = StoredTensor("float32", (6,), (Stored(0, 6, 0, 0, 1),))
    plan = resolve({KEY: tensor}, [Fragment("w", "master", "bfloat16", (6,), 2, 4)])
    assert plan.dtypes == ("float32",)
    assert [(piece.offset, piece.nbytes, piece.crc32c) for piece in plan.reads[0].pieces] == [(8, 8, None)]
