"""Plain data round-trips exactly, without pickle."""

import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import FormatError, NotPlainError
from moc_ckpt.state.plain import decode_plain, encode_plain

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.binary(max_size=8)
)
KEYS = st.text(max_size=4) | st.integers() | st.tuples(st.integers(), st.text(max_size=2))
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$", "v", "a"]), inner, max_size=3)
        | st.sets(st.integers(), max_size=4)
    ),
    max_leaves=20,
)


def same(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return left == right


@given(VALUES)
def test_round_trip(value):
    assert same(decode_plain(encode_plain(value, "x"), "x"), value)


def test_floats_keep_every_bit():
    values = [math.pi, 5e-324, -0.0, math.inf, -math.inf, 1e308]
    assert same(decode_plain(encode_plain(values, "x"), "x"), values)
    assert math.isnan(decode_plain(encode_plain(math.nan, "x"), "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors(dtype):
    for shape in [(), (0,), (3, 0), (2, 3)]:
        tensor = torch.randint(0, 2, shape).to(dtype)
        found = decode_plain(encode_plain({"t": tensor}, "x"), "x")["t"]
        assert found.dtype == dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)


def test_random_generator_states():
    state = random.getstate()
    assert decode_plain(encode_plain(state, "x"), "x") == state
    numpy_state = np.random.get_state()
    found = decode_plain(encode_plain(tuple(numpy_state), "x"), "x")
    assert found[0] == numpy_state[0]
    assert np.array_equal(found[1], numpy_state[1])
    np.random.set_state(found)


def test_numpy_scalars_keep_their_type():
    found = decode_plain(encode_plain([np.float64(0.1), np.int32(7)], "x"), "x")
    assert [type(item) for item in found] == [np.float64, np.int32]


def test_mapping_subclasses_come_back_as_dict():
    assert same(decode_plain(encode_plain(OrderedDict(b=1, a=2), "x"), "x"), {"b": 1, "a": 2})


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, Custom()]}, "root.a[1]"),
        ({"f": len}, "root.f"),
        ({1: Custom()}, "root[1]"),
        (np.array([object()]), "root"),
    ],
)
def test_other_objects_are_refused_with_their_path(value, path):
    with pytest.raises(NotPlainError) as caught:
        encode_plain(value, "root")
    assert caught.value.where == path


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa1$\xa4evil", b"\x82\xa1$\xa6tensor\xa1v\xa1x"])
def test_foreign_bytes_are_refused(data):
    with pytest.raises(FormatError, match="state"):
        decode_plain(data, "state")
