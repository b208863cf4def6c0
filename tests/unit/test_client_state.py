"""client_state is proven loadable when it is saved."""

import argparse

import pytest
import torch

from moc_ckpt.errors import ClientStateError, CorruptionError
from moc_ckpt.integrations.deepspeed.client_state import decode_client_state, encode_client_state


class Thing:
    def __init__(self, value):
        self.value = value


def test_plain_data_and_tensors_round_trip():
    state = {"iteration": 3, "nested": {"t": torch.arange(3), "l": [1, (2.5, None)]}}
    found = decode_client_state(encode_client_state(state, trust=False), trust=False, where="x")
    assert found["iteration"] == 3
    assert torch.equal(found["nested"]["t"], torch.arange(3))
    assert found["nested"]["l"] == [1, (2.5, None)]


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": [0, Thing(1)]}}, "client_state['a']['b'][1]"),
        ({"args": argparse.Namespace(lr=1)}, "client_state['args']"),
    ],
)
def test_unloadable_objects_are_named_when_saved(state, path):
    with pytest.raises(ClientStateError) as caught:
        encode_client_state(state, trust=False)
    assert caught.value.where == path
    assert "recovery.trust_client_state" in caught.value.fix


def test_trust_allows_them_both_ways():
    data = encode_client_state({"thing": Thing(5)}, trust=True)
    assert decode_client_state(data, trust=True, where="x")["thing"].value == 5
    with pytest.raises(ClientStateError, match="trust_client_state"):
        decode_client_state(data, trust=False, where="x")


def test_what_cannot_be_pickled_at_all_is_named():
    with pytest.raises(ClientStateError) as caught:
        encode_client_state({"f": lambda: 1}, trust=True)
    assert caught.value.where == "client_state['f']"


def test_damage_is_corruption():
    with pytest.raises(CorruptionError):
        decode_client_state(b"not a file", trust=False, where="x")
