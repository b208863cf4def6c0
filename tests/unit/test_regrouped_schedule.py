"""A torch scheduler's state moves between numbers of param groups."""

import pytest
import torch

from moc_ckpt.errors import ModelMismatchError
from moc_ckpt.integrations.deepspeed.engine_state import regrouped


def scheduler(groups, lambdas=None):
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1 * (1 + index % 2)} for index in range(groups)]
    made = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(params), lambdas or (lambda step: 0.5**step))
    for _ in range(3):
        made.optimizer.step()
        made.step()
    return made


@pytest.mark.parametrize(("saved", "now"), [(4, 2), (2, 4), (2, 2)])
def test_goes_on_where_it_was(saved, now):
    old, new = scheduler(saved), scheduler(now)
    new.load_state_dict(regrouped(old.state_dict(), new.optimizer.param_groups))
    old.step()
    new.step()
    assert [group["lr"] for group in new.optimizer.param_groups][:2] == [
        group["lr"] for group in old.optimizer.param_groups
    ][:2]
    assert new.last_epoch == old.last_epoch
    assert len(new.base_lrs) == now


def test_state_that_differs_between_groups_is_refused():
    old = scheduler(4)
    state = old.state_dict() | {"lr_lambdas": [None, None, {"a": 1}, None]}
    with pytest.raises(ModelMismatchError, match="lr_lambdas for each of 4 param groups; now there are 2"):
        regrouped(state, scheduler(2).optimizer.param_groups)
