"""The ds_config's section `lazarus`, DeepSpeed's groups of experts, and which ranks make a node."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moc_ckpt.config import LazarusConfig, parse_lazarus
from moc_ckpt.errors import ConfigError
from moc_ckpt.integrations.deepspeed.expert_groups import separate
from moc_ckpt.integrations.deepspeed.lazarus import prepare
from moc_ckpt.integrations.deepspeed.rebalance import ranks_per_node
from moc_ckpt.lazarus.layer import LazarusMoE


def test_without_a_section_nothing_is_rebalanced() -> None:
    assert parse_lazarus({}) == LazarusConfig(
        optimizer_state="replicated", rebalance_interval=0, fault_threshold=1, restart_s=60.0, bandwidth_gb_s=10.0
    )
    section = {"optimizer_state": "sharded", "rebalance_interval": 500, "restart_s": 0, "bandwidth_gb_s": 25}
    assert parse_lazarus({"lazarus": section}) == LazarusConfig(**section)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rebalance_intervall": 5}, "unknown key lazarus.rebalance_intervall.*did you mean 'rebalance_interval'"),
        ({"x": 5}, "known keys here: optimizer_state, rebalance_interval, fault_threshold, restart_s, bandwidth_gb_s"),
        ({"rebalance_interval": -1}, "lazarus.rebalance_interval: .*greater than or equal to 0, got -1"),
        ({"rebalance_interval": 2.5}, "lazarus.rebalance_interval: .*integer, got 2.5"),
        ({"rebalance_interval": True}, "lazarus.rebalance_interval: .*integer, got True"),
        ({"rebalance_interval": "auto"}, "lazarus.rebalance_interval: .*integer, got 'auto'"),
        ({"fault_threshold": 0}, "lazarus.fault_threshold: .*greater than or equal to 1, got 0"),
        ({"restart_s": -1}, "lazarus.restart_s: .*greater than or equal to 0, got -1"),
        ({"restart_s": math.nan}, "lazarus.restart_s: .*finite number, got nan"),
        ({"bandwidth_gb_s": 0}, "lazarus.bandwidth_gb_s: .*greater than 0, got 0"),
        ({"optimizer_state": ["sharded"]}, "lazarus.optimizer_state: .*'replicated' or 'sharded', got \\['sharded'"),
        ("sharded", "lazarus must be an object, got str 'sharded'"),
        (None, "lazarus must be an object, got NoneType"),
    ],
)
def test_wrong_settings_are_refused(section: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}") as caught:
        parse_lazarus({"lazarus": section})
    assert "ds_config" in str(caught.value)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.moe = LazarusMoE(4, lambda: nn.Linear(4, 4), num_experts=3)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("moc", [{}, {"moc_checkpoint": {"enabled": False}}])
def test_without_the_ledger_there_is_nothing_to_decide_on(world_of_one: None, moc: dict[str, Any]) -> None:
    settings = {"zero_optimization": {"stage": 2}, "lazarus": {"rebalance_interval": 10}, **moc}
    with pytest.raises(ConfigError, match=r"(?s)rebalance_interval is 10, and nobody counts tokens.*moc_checkpoint"):
        prepare({"model": Model()}, settings)


@pytest.mark.parametrize(
    ("nodes", "ranks"),
    [("aaaa", 1), ("aabb", 2), ("abcd", 1), ("aabbcc", 2), ("aab", 1), ("abab", 1), ("aaab", 1), ("a", 1)],
)
def test_ranks_of_a_node(nodes: str, ranks: int) -> None:
    assert ranks_per_node(nodes) == ranks


@pytest.mark.parametrize("most", [None, 178956971, 20, 5])
def test_deepspeeds_groups_of_experts_go_back_to_the_dense_ones(most: int | None) -> None:
    """The installed DeepSpeed's own function makes groups of experts alone, of any size; no expert is left in one."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    model = Model()
    experts = [param for name, param in model.named_parameters() if "deepspeed_experts" in name]
    matrices = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    given = [
        {"params": matrices, "name": "decay", "weight_decay": 0.1},
        {"params": vectors, "name": "plain", "weight_decay": 0.0},
    ]
    groups = split(given, max_group_size=most)
    assert sum(group.get("moe", False) for group in groups) >= 2
    assert all(group["name"] == "lazarus" for group in groups if group.get("moe"))
    kept, found = separate(model, None, groups, None)
    assert [group["name"] for group in kept] == ["decay", "plain"]
    dense = {id(param) for param in model.parameters()} - {id(param) for param in experts}
    assert {id(param) for group in kept for param in group["params"]} == dense
    assert found.place_of == {id(param): int(param.ndim < 2) for param in experts}


def test_deepspeeds_groups_in_an_optimizer() -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    model = Model()
    optimizer = torch.optim.AdamW(split({"params": list(model.parameters()), "name": "all"}))
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 6]
    separate(model, optimizer, None, None)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]
