"""Hyper-parameters and step counts move between layouts."""

import pytest
import torch

from moc_ckpt.errors import ModelMismatchError
from moc_ckpt.state.catalog import ParamShard, StateGroup, build_catalog
from moc_ckpt.state.plain import decode_plain, encode_plain
from moc_ckpt.state.scalars import apply_scalars, collect_scalars, index_scalars


def whole(fqn, tensor, group):
    return ParamShard(fqn, tensor, 0, tensor.numel(), tensor.detach().view(-1), group, tensor, 0, (0,), (0,))


def raw(lrs, step, shared_state=True):
    """Two groups of a raw optimizer: one parameter each."""
    tensors = [torch.zeros(4), torch.zeros(6)]
    states = [
        {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(t.numel()), "exp_avg_sq": torch.zeros(t.numel())}
        for t in tensors
    ]
    groups = [
        StateGroup({"params": [t], "lr": lr, "name": f"g{i}"}, (t,))
        for i, (t, lr) in enumerate(zip(tensors, lrs, strict=True))
    ]
    return _catalog(
        [whole("a", tensors[0], 0), whole("b", tensors[1], 1)], groups, dict(zip(map(id, tensors), states, strict=True))
    )


def flat(lr, step):
    """One flat partition that holds both parameters."""
    params, master = [torch.zeros(4), torch.zeros(6)], torch.zeros(10)
    shards = [
        ParamShard("a", params[0], 0, 4, master[:4], 0, master, 0, (0,), (0,)),
        ParamShard("b", params[1], 0, 6, master[4:], 0, master, 4, (0,), (0,)),
    ]
    states = {
        id(master): {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(10), "exp_avg_sq": torch.zeros(10)}
    }
    return _catalog(shards, [StateGroup({"params": [master], "lr": lr}, (master,))], states)


def _catalog(shards, groups, states):
    state_of = lambda key: states.get(id(key), {})  # noqa: E731
    catalog = build_catalog(rank=0, shards=shards, weights=[], groups=groups, state_of=state_of, layers=[])
    return catalog, state_of


def stored(catalog, state_of):
    return index_scalars(decode_plain(encode_plain(collect_scalars(catalog, state_of), "x"), "x"))


def test_flat_to_raw_and_back():
    records = stored(*flat(0.25, 7))
    catalog, state_of = raw([0.1, 0.2], 0)
    apply_scalars(catalog, records, state_of)
    assert [group.options["lr"] for group in catalog.groups] == [0.25, 0.25]
    assert [group.options["name"] for group in catalog.groups] == ["g0", "g1"]
    assert all(float(state_of(key)["step"]) == 7 for group in catalog.groups for key in group.keys)
    target, target_state = flat(0.9, 0)
    apply_scalars(target, stored(catalog, state_of), target_state)
    assert target.groups[0].options["lr"] == 0.25
    assert float(target_state(target.groups[0].keys[0])["step"]) == 7


def test_parameters_that_share_state_take_the_largest_count():
    catalog, state_of = raw([0.1, 0.1], 5)
    state_of(catalog.groups[1].keys[0])["step"].zero_()
    target, target_state = flat(0.9, 0)
    apply_scalars(target, stored(catalog, state_of), target_state)
    assert float(target_state(target.groups[0].keys[0])["step"]) == 5


def test_different_options_cannot_be_joined():
    records = stored(*raw([0.1, 0.2], 3))
    target, target_state = flat(0.9, 1)
    with pytest.raises(ModelMismatchError, match="lr"):
        apply_scalars(target, records, target_state, check_only=True)
    assert target.groups[0].options["lr"] == 0.9


def test_check_only_touches_nothing():
    target, target_state = raw([0.9, 0.8], 1)
    apply_scalars(target, stored(*flat(0.5, 4)), target_state, check_only=True)
    assert [group.options["lr"] for group in target.groups] == [0.9, 0.8]
    assert float(target_state(target.groups[0].keys[0])["step"]) == 1


def test_step_in_the_group_moves_into_the_state_and_back():
    catalog, state_of = flat(0.5, 0)
    key = catalog.groups[0].keys[0]
    del state_of(key)["step"]
    catalog.groups[0].options["step"] = 9
    target, target_state = raw([0.1, 0.1], 0)
    apply_scalars(target, stored(catalog, state_of), target_state)
    assert float(target_state(target.groups[0].keys[0])["step"]) == 9
    assert "step" not in target.groups[0].options
    catalog.groups[0].options["step"] = 1
    apply_scalars(catalog, stored(target, target_state), state_of)
    assert catalog.groups[0].options["step"] == 9
    assert "step" not in state_of(key)


def test_an_integer_step_stays_an_integer():
    catalog, state_of = flat(0.5, 0)
    state_of(catalog.groups[0].keys[0])["step"] = 0
    apply_scalars(catalog, stored(*raw([0.1, 0.1], 6)), state_of)
    assert state_of(catalog.groups[0].keys[0])["step"] == 6
    assert type(state_of(catalog.groups[0].keys[0])["step"]) is int
