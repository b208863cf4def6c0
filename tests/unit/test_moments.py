"""State that exists before the first step changes no bit of training."""

import pytest
import torch

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.state.moments import materialise_state

MAKERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "Adam amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.3),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
}


def make(maker):
    torch.manual_seed(3)
    params = [
        torch.nn.Parameter(torch.randn(5, 3)),
        torch.nn.Parameter(torch.randn(7)),
        torch.nn.Parameter(torch.empty(0)),
    ]
    return params, maker(params)


def train(params, optimizer, steps=4):
    torch.manual_seed(4)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_training_is_bit_identical(name):
    plain, reference = make(MAKERS[name])
    params, optimizer = make(MAKERS[name])
    before = [param.clone() for param in params]
    groups = [dict(group) for group in optimizer.param_groups]
    materialise_state(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    for param in params[:2]:
        state = optimizer.state[param]
        assert float(state.get("step", 0)) == 0
        if name.startswith("Adam") and name != "Adagrad":
            assert state["exp_avg"].shape == param.shape
            assert not state["exp_avg"].any()
    train(plain, reference)
    train(params, optimizer)
    for one, other in zip(plain, params, strict=True):
        assert torch.equal(one, other)
        for key, value in reference.state.get(one, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[other][key])), key


def test_existing_state_is_left_alone():
    params, optimizer = make(MAKERS["AdamW"])
    train(params, optimizer, steps=2)
    before = {id(param): optimizer.state[param]["exp_avg"].clone() for param in params[:2]}
    assert materialise_state(optimizer) == 0
    assert all(torch.equal(optimizer.state[param]["exp_avg"], before[id(param)]) for param in params[:2])


def test_hooks_of_the_optimizer_are_not_called():
    params, optimizer = make(MAKERS["AdamW"])
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    materialise_state(optimizer)
    assert calls == []
    train(params, optimizer, steps=1)
    assert calls == ["pre", "post"]


def test_an_optimizer_for_which_zero_is_not_nothing_is_refused():
    params = [torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(UnsupportedError, match="SGD"):
        materialise_state(optimizer)
