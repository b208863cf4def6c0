"""Megatron's client_state as plain data and back."""

from __future__ import annotations

import argparse
import enum
import random
from typing import Any

import numpy as np
import pytest
import torch

from moc_ckpt.errors import ClientStateError
from moc_ckpt.integrations.deepspeed.client_state import _copy, decode_client_state, encode_client_state
from moc_ckpt.integrations.megatron_deepspeed.plain import decode, encode


class Kind(enum.Enum):
    ENCODER = 1


def sample() -> dict[str, Any]:
    args = argparse.Namespace(
        num_layers=2,
        num_experts=[4, 8],
        lr=1e-3,
        save=None,
        params_dtype=torch.bfloat16,
        model_type=Kind.ENCODER,
        init=torch.nn.init.ones_,
        table=np.arange(6, dtype=np.int32).reshape(2, 3),
        scale=np.float64(0.5),
        deepspeed_config_dict={"a": {"b": [1, 2.5]}},
        rotary=torch.arange(4.0),
        empty=torch.empty(0, 3),
        raw=b"\x00\xff",
        none=b"",
        large=torch.zeros(1 << 20),
    )
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    return {"args": args, "iteration": 7, "tokens": 123, "rng_state": [rng]}


def test_it_is_plain_and_loads_without_trust() -> None:
    plain = encode(sample())
    _copy(plain)  # TypeError for anything but data
    data = encode_client_state(plain, trust=False)
    assert decode_client_state(data, trust=False, where="") == plain


def test_round_trip() -> None:
    state = sample()
    live = argparse.Namespace(model_type="of this process")
    back = decode(encode(state), live)
    got, wanted = vars(back["args"]), vars(state["args"])
    assert got["model_type"] == "of this process"
    # Neither data, nor known here.
    assert set(wanted) - set(got) == {"init", "large"}
    for name in set(got) - {"model_type"}:
        if isinstance(wanted[name], torch.Tensor):
            assert torch.equal(got[name], wanted[name]) and got[name].dtype == wanted[name].dtype
            assert got[name].shape == wanted[name].shape
        elif isinstance(wanted[name], np.ndarray):
            np.testing.assert_array_equal(got[name], wanted[name], strict=True)
        else:
            assert got[name] == wanted[name]
    streams = back["rng_state"][0]
    drawn = (random.random(), np.random.rand(), torch.rand(2))
    random.setstate(streams["random_rng_state"])
    np.random.set_state(streams["np_rng_state"])
    torch.set_rng_state(streams["torch_rng_state"])
    assert (random.random(), np.random.rand()) == drawn[:2]
    assert torch.equal(torch.rand(2), drawn[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_every_kind(dtype: torch.dtype) -> None:
    for shape in ((), (3,), (2, 0), (2, 3)):
        tensor = (torch.rand(shape) * 3).to(dtype)
        back = decode(encode(tensor))
        assert torch.equal(back, tensor) and back.dtype == dtype and back.shape == tensor.shape


def test_a_transposed_tensor() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(decode(encode(tensor)), tensor)


def test_it_ends_on_what_contains_itself() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    _copy(encode(loop))


@pytest.mark.parametrize(
    "value",
    [
        {"__moc__": "code", "data": "x"},
        {"__moc__": "tensor", "dtype": "save", "shape": [1], "data": "0"},
        {"__moc__": "tensor", "dtype": "float32", "shape": [9], "data": "0000"},
        {"__moc__": "bytes", "data": 3},
        {"__moc__": "ndarray", "dtype": "O", "shape": [1], "data": "00000000"},
        {"__moc__": "namespace"},
        object(),
    ],
)
def test_what_is_no_encoding_is_refused(value: Any) -> None:
    with pytest.raises(ClientStateError):
        decode(value)
