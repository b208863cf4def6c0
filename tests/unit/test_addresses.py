"""Fragments, units and what maps names to them."""

import pytest

from moc_ckpt.state.fragment import Fragment, TensorKey, itemsize
from moc_ckpt.state.unit import MoELayer, UnitMap, expert_unit, parse_expert_unit

EXPERT = "h.{}.mlp.deepspeed_moe.experts.deepspeed_experts.{}.w.weight"


def test_fragment_sizes():
    fragment = Fragment("a.weight", "master", "float32", (3, 5), 2, 9)
    assert (fragment.numel, fragment.nbytes, fragment.tensor_numel) == (7, 28, 15)
    assert fragment.key == TensorKey("a.weight", "master")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 16)])
def test_fragment_outside_its_tensor_is_refused(start, stop):
    with pytest.raises(ValueError, match=r"a\.weight"):
        Fragment("a.weight", "master", "float32", (3, 5), start, stop)


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float33"):
        itemsize("float33")


def test_units_by_layer_ordinal_and_owning_module():
    units = UnitMap([MoELayer(0, "h.1.mlp", 4), MoELayer(1, "h.3.mlp", 4)])
    assert units.unit_of(EXPERT.format(1, 2)) == "expert/0/2"
    assert units.unit_of(EXPERT.format(3, 0)) == "expert/1/0"
    assert units.unit_of("h.1.mlp.deepspeed_moe.gate.wg.weight") == "dense/h.1.mlp.deepspeed_moe.gate.wg"
    assert units.unit_of("scale") == "dense/"


def test_expert_of_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match=r"h\.2\.mlp"):
        UnitMap([MoELayer(0, "h.1.mlp", 4)]).unit_of(EXPERT.format(2, 0))


def test_expert_unit_names_round_trip():
    assert parse_expert_unit(expert_unit(3, 17)) == (3, 17)
    assert parse_expert_unit("dense/expert/3/17") is None
