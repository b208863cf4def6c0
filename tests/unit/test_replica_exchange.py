"""How an expert's elements are shared out among its holders; which param groups experts go with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.integrations.deepspeed.expert_groups import separate
from moc_ckpt.lazarus.replica_exchange import GRAIN, split_evenly, split_first
from moc_ckpt.lazarus.replicas import sibling_optimizer


@given(st.integers(1, 9), st.lists(st.integers(0, 5000), min_size=1, max_size=4))
def test_shares_cover_every_element_once_and_evenly(count, segments):
    split = split_evenly(tuple(range(count)), segments)
    seen = [0] * sum(segments)
    for share in split.shares:
        assert len(share) == len(segments)
        for start, stop in share:
            for index in range(start, stop):
                seen[index] += 1
    assert seen == [1] * sum(segments)
    begin = 0
    for place, numel in enumerate(segments):
        sizes = [share[place][1] - share[place][0] for share in split.shares]
        grain = GRAIN if numel >= GRAIN * count else 1
        assert max(sizes) <= -(-numel // count) + grain - 1
        assert all((share[place][0] - begin) % grain == 0 for share in split.shares if share[place][0] < begin + numel)
        begin += numel


@given(st.integers(1, 5), st.integers(0, 100))
def test_the_first_holder_has_all(count, numel):
    split = split_first(tuple(range(3, 3 + count)), numel)
    assert split.share_of(3) == ((0, numel),)
    assert all(split.share_of(rank) == ((0, 0),) for rank in range(4, 3 + count))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(2, 2)
        self.expert = torch.nn.Linear(2, 2)
        for param in self.expert.parameters():
            param.lazarus = True


@pytest.mark.parametrize("built", [False, True])
def test_experts_go_with_the_group_they_were_in(built):
    model = Model()
    groups = [
        {"params": [model.expert.weight, model.dense.weight], "weight_decay": 0.1},
        {"params": [model.dense.bias, model.expert.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups) if built else None
    kept, found = separate(model, optimizer, None if built else groups, None)
    left = optimizer.param_groups if built else kept
    assert [[id(p) for p in group["params"]] for group in left] == [[id(model.dense.weight)], [id(model.dense.bias)]]
    assert [group["weight_decay"] for group in left] == [0.1, 0.0]
    assert found.place_of == {id(model.expert.weight): 0, id(model.expert.bias): 1}


def test_all_parameters_are_one_group():
    model = Model()
    kept, found = separate(model, None, None, None)
    assert [id(param) for param in kept] == [id(param) for param in model.dense.parameters()]
    assert set(found.place_of.values()) == {0}
    kept, _ = separate(model, None, model.parameters(), None)
    assert len(kept) == 2


def test_a_group_of_experts_alone_goes_with_one_of_its_options():
    model = Model()
    groups = [
        {"params": list(model.dense.parameters()), "lr": 0.1, "name": "a"},
        {"params": list(model.expert.parameters()), "lr": 0.1, "name": "moe_a", "moe": True},
    ]
    kept, found = separate(model, None, groups, None)
    assert len(kept) == 1
    assert set(found.place_of.values()) == {0}
    groups[1]["lr"] = 0.2
    with pytest.raises(UnsupportedError, match="param group 1 has experts alone"):
        separate(model, None, groups, None)


def test_a_built_scheduler_would_lose_its_groups():
    model = Model()
    optimizer = torch.optim.SGD(
        [{"params": list(model.dense.parameters())}, {"params": list(model.expert.parameters())}]
    )
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(UnsupportedError, match="scheduler was made for them"):
        separate(model, optimizer, None, scheduler)


def test_what_cannot_be_trained_is_named():
    model = Model()
    with pytest.raises(UnsupportedError, match=r"expert\.bias requires a gradient, but is in no param group"):
        separate(model, None, [*model.dense.parameters(), model.expert.weight], None)
    with pytest.raises(UnsupportedError, match="no parameter is left"):
        separate(model, None, list(model.expert.parameters()), None)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_sibling_steps_as_the_original_and_shares_no_state(make):
    torch.manual_seed(0)
    one, two = torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.zeros(5))
    original = make([one], lr=0.1)
    calls = []
    original.register_step_pre_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.ConstantLR(original, factor=1.0)  # puts its own `step` on the original
    two.data.copy_(one)
    options = {name: value for name, value in original.param_groups[0].items() if name != "params"}
    sibling = sibling_optimizer(original, [{**options, "params": [two]}])
    one.grad, two.grad = torch.ones(5), torch.ones(5)
    sibling.step()
    assert not calls
    assert one not in sibling.state and not original.state
    original.step()
    assert torch.equal(one, two)
    assert len(calls) == 1
