"""LazarusMoE in one process: what is refused, and the names that the engine's side relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moc_ckpt.errors import ConfigError, UnsupportedError
from moc_ckpt.lazarus.grouped import as_mlp
from moc_ckpt.lazarus.layer import LazarusMoE, even_placement
from moc_ckpt.lazarus.types import Placement


def layer(**kwargs: Any) -> LazarusMoE:
    arguments: dict[str, Any] = {"hidden_size": 4, "expert": nn.Linear(4, 4), "num_experts": 3, "name": "block 5"}
    return LazarusMoE(**{**arguments, **kwargs})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"drop_tokens": True}, UnsupportedError, ["drop_tokens"]),
        ({"use_tutel": True}, UnsupportedError, ["use_tutel"]),
        ({"enable_expert_tensor_parallelism": True}, UnsupportedError, ["enable_expert_tensor_parallelism"]),
        ({"k": 4}, ConfigError, ["k=4"]),
        ({"k": 0}, ConfigError, ["k=0"]),
        ({"noisy_gate_policy": "jitter"}, ConfigError, ["jitter"]),
        ({"ep_size": 2}, ConfigError, ["ep_size=2"]),
        ({"slots_per_rank": 2}, ConfigError, ["2 slots", "expert 2"]),
        ({"slots_per_rank": 0}, ConfigError, ["slots_per_rank=0"]),
        ({"fault_threshold": 2}, ConfigError, ["fault_threshold=2"]),
        ({"fault_threshold": 0}, ConfigError, ["fault_threshold=0"]),
        ({"placement": Placement(3, ((0, 1),))}, ConfigError, ["no rank holds expert 2"]),
        ({"placement": Placement(4, ((0, 1, 2, 3),))}, ConfigError, ["4 experts, the layer has 3"]),
        ({"placement": Placement(3, ((0, 1, 2),)), "slots_per_rank": 4}, ConfigError, ["rank 0", "3 slots, not 4"]),
        ({"placement": Placement(3, ((0, 1, 2), (0, 1, 2)))}, ConfigError, ["2 ranks, 1 share"]),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], error: type, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        layer(**arguments)
    assert all(word in str(caught.value) for word in [*words, "block 5"]), str(caught.value)


def test_used_token_needs_one_choice() -> None:
    with pytest.raises(ConfigError, match="used_token"):
        layer(k=2)(torch.ones(2, 4), torch.ones(2))


def test_names_and_marks() -> None:
    made = layer(use_residual=True)
    names = [name for name, _ in made.named_parameters()]
    experts = [f"deepspeed_moe.experts.deepspeed_experts.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    dense = ["mlp.weight", "mlp.bias", "coefficient.weight", "coefficient.bias"]
    assert names == ["deepspeed_moe.gate.wg.weight", *experts, *dense]
    assert made.expert_ids == (0, 1, 2) and not list(made.named_buffers())
    for name, parameter in made.named_parameters():
        assert getattr(parameter, "lazarus", False) is ("deepspeed_experts" in name)
        assert getattr(parameter, "allreduce", True) is ("deepspeed_experts" not in name)
    assert [module.weight.expert_id for module in made.deepspeed_moe.experts.deepspeed_experts] == [0, 1, 2]


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(4, 2, 2), (4, 4, 2), (5, 3, 2), (2, 2, 3), (8, 3, 5)])
def test_even_placement(experts: int, ranks: int, slots: int) -> None:
    placement = even_placement(experts, ranks, slots)
    assert all(len(row) == slots for row in placement.slots)
    assert max(placement.replicas()) - min(placement.replicas()) <= 1
    assert all(len(placement.holders(expert)) >= min(ranks, ranks * slots // experts) for expert in range(experts))
    if slots * 2 == experts:  # DeepSpeed's layout with ep_size 2
        assert placement.slots == tuple(tuple(range(rank % 2 * slots, (rank % 2 + 1) * slots)) for rank in range(ranks))


def test_noise_is_a_matter_of_training() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(64, 4)
    for policy in ("Jitter", "RSample"):
        made = layer(noisy_gate_policy=policy)
        plain, noisy = made.eval()(tokens)[0], [made.train()(tokens)[0] for _ in range(2)]
        assert torch.equal(plain, made.eval()(tokens)[0])
        assert not torch.equal(noisy[0], noisy[1])


def test_second_expert_is_drawn_with_the_gates_probabilities() -> None:
    made = layer(k=2)
    gate = made.deepspeed_moe.gate
    with torch.no_grad():
        gate.wg.weight.zero_()
        gate.wg.weight[:, 0] = torch.tensor([2.0, 1.0, 0.0])
    torch.manual_seed(0)
    routing = gate(torch.ones(20000, 4))
    assert (routing.experts[:, 0] == 0).all()
    # Of the two others: e / (e + 1).
    assert abs(float((routing.experts[:, 1] == 1).float().mean()) - 0.7311) < 0.02


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped GEMM")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_gemm_equals_the_loop(packed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 24, bias=bias), nn.GELU(), nn.Linear(24, 16, bias=bias))
    made = layer(hidden_size=16, expert=mlp, num_experts=4).to(torch.bfloat16)
    experts = made.deepspeed_moe.experts
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    if packed:
        experts.pack()
        assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())
        first, second = (expert[0].weight for expert in list(experts.deepspeed_experts)[:2])
        assert second.data_ptr() - first.data_ptr() == first.numel() * 2
    counts = [5, 0, 9, 1]  # one without rows
    tokens = torch.randn(15, 16).to(torch.bfloat16)
    calls: list[str] = []
    real = torch._grouped_mm

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(experts.compute)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "_grouped_mm", counted)
    results = []
    for experts.compute in ("loop", "grouped"):
        mine = tokens.clone().requires_grad_()
        out = experts(mine, counts, torch.tensor(counts))
        grads = torch.autograd.grad(out.float().square().sum(), [mine, *experts.parameters()])
        results.append([out, *grads])
    assert calls == ["grouped"] * 6
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
    assert any(float(grad.abs().max()) == 0 for grad in results[1][1:]), "zeros where no token went"


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.GELU()),
        nn.ModuleList([nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)]),
    ],
)
def test_other_modules_are_not_grouped(module: nn.Module) -> None:
    assert as_mlp(module) is None


def test_modules_with_hooks_are_not_grouped() -> None:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert as_mlp(mlp) is not None
    mlp[0].register_forward_hook(lambda *_: None)
    assert as_mlp(mlp) is None
