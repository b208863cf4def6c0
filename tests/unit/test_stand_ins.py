"""What stands in for apex, against references written out in plain PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.integrations.megatron_deepspeed import stand_ins


@pytest.fixture
def device() -> str:
    """tests/gpu has another one, and the same tests."""
    torch.manual_seed(3)
    return "cpu"


def adamw(weights: list[torch.Tensor], grads: list[list[torch.Tensor]], **given: float) -> list[torch.Tensor]:
    """AdamW as its paper has it, in float64."""
    beta1, beta2 = 0.9, 0.95
    weights = [weight.double().clone() for weight in weights]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step, row in enumerate(grads, 1):
        for index, raw in enumerate(row):
            grad = raw.double()
            weights[index] -= given["lr"] * given["weight_decay"] * weights[index]
            first[index] = beta1 * first[index] + (1 - beta1) * grad
            second[index] = beta2 * second[index] + (1 - beta2) * grad * grad
            mean, square = first[index] / (1 - beta1**step), second[index] / (1 - beta2**step)
            weights[index] -= given["lr"] * mean / (square.sqrt() + given["eps"])
    return weights


def test_fused_adam(device: str) -> None:
    shapes = [(7,), (5, 3), (64, 33)]
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    grads = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(20)]
    settings = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    expected = adamw([param.detach() for param in params], grads, **settings)
    before = [param.detach().clone() for param in params]
    optimizer = stand_ins.FusedAdam(params, betas=(0.9, 0.95), **settings)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        optimizer.step()
    for param, wanted, old in zip(params, expected, before, strict=True):
        torch.testing.assert_close(param.detach().double(), wanted, rtol=2e-5, atol=2e-6)
        assert (param - old).abs().max() > 1e-2
    assert all(param.device.type == device for param in params)


def test_fused_sgd(device: str) -> None:
    param = torch.nn.Parameter(torch.randn(9, device=device))
    grads = [torch.randn(9, device=device) for _ in range(5)]
    weight, speed = param.detach().double().clone(), None
    optimizer = stand_ins.FusedSGD([param], lr=0.1, momentum=0.9, weight_decay=0.01)
    for raw in grads:
        grad = raw.double() + 0.01 * weight
        speed = grad if speed is None else 0.9 * speed + grad
        weight = weight - 0.1 * speed
        param.grad = raw
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), weight, rtol=1e-5, atol=1e-6)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_layer_norm_and_its_gradients(device: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    x = torch.randn(6, 4, 48, device=device).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(48, device=device)).to(weights).requires_grad_()
    bias = (0.1 * torch.randn(48, device=device)).to(weights).requires_grad_()
    direction = torch.randn(6, 4, 48, device=device)
    out = stand_ins.FusedLayerNormAffineFunction.apply(x, weight, bias, torch.Size([48]), 1e-5)
    assert out.dtype == weights
    got = torch.autograd.grad((out.float() * direction).sum(), [x, weight, bias])
    reference = norm(x, weight, bias, 1e-5)
    wanted = torch.autograd.grad((reference * direction.double()).sum(), [x, weight, bias])
    tolerance = TOLERANCE[torch.bfloat16 if torch.bfloat16 in (dtype, weights) else torch.float32]
    torch.testing.assert_close(out.double(), reference, rtol=tolerance, atol=tolerance)
    for ours, plain in zip(got, wanted, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours.double(), plain.double(), rtol=tolerance, atol=tolerance * 10)
    module = stand_ins.FusedLayerNorm(48, device=device, dtype=weights)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    assert torch.equal(module(x), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(device: str, dtype: torch.dtype) -> None:
    module = stand_ins.FusedRMSNorm(32, eps=1e-6, sequence_parallel=True).to(device=device, dtype=dtype)
    with torch.no_grad():
        module.weight.add_(0.1 * torch.randn(32, device=device).to(dtype))
    x = torch.randn(5, 32, device=device).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight.double()
    torch.testing.assert_close(module(x).double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert module(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2norm(device: str, dtype: torch.dtype) -> None:
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in ((3,), (40, 50), (0,), ())]
    total, each = stand_ins.multi_tensor_applier(stand_ins.multi_tensor_l2norm, flag, [tensors], True)
    singles = [tensor.double().square().sum().sqrt() for tensor in tensors]
    torch.testing.assert_close(each.double(), torch.stack(singles), rtol=1e-5, atol=1e-6)
    whole = sum(single.square() for single in singles) ** 0.5
    assert total.shape == (1,) and total.dtype == torch.float32
    torch.testing.assert_close(total.double().view(()), torch.as_tensor(whole), rtol=1e-5, atol=1e-6)
    none, nothing = stand_ins.multi_tensor_applier(stand_ins.multi_tensor_l2norm, flag, [[]], False)
    assert none.tolist() == [0.0] and nothing.numel() == 0


def test_scale(device: str) -> None:
    sources = [torch.randn(4, 3, device=device), torch.randn(7, device=device).bfloat16()]
    targets = [torch.empty(4, 3, device=device, dtype=torch.bfloat16), torch.empty(7, device=device)]
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    stand_ins.multi_tensor_applier(stand_ins.multi_tensor_scale, flag, [sources, targets], 0.25)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, (source.float() * 0.25).to(target.dtype))
    assert flag.item() == 0
    # In place, as gradients are clipped.
    stand_ins.multi_tensor_applier(stand_ins.multi_tensor_scale, flag, [sources, sources], torch.tensor(2.0))
    assert flag.item() == 0
    sources[0][1, 1] = float("inf")
    stand_ins.multi_tensor_applier(stand_ins.multi_tensor_scale, flag, [sources, targets], 1.0)
    assert flag.item() == 1


@pytest.mark.parametrize(
    "given",
    [{"amsgrad": True}, {"adam_w_mode": False}, {"bias_correction": False}],
    ids=lambda given: next(iter(given)),
)
def test_what_is_not_the_same_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(given))):
        stand_ins.FusedAdam([torch.nn.Parameter(torch.zeros(1))], **given)


def test_the_modules_are_found_as_apex_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from moc_ckpt.integrations.megatron_deepspeed.shims.apex import add_stand_ins

    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda")]:
        del sys.modules[name]
    add_stand_ins()
    import amp_C
    import apex
    import fused_layer_norm_cuda  # noqa: F401
    from apex.multi_tensor_apply import multi_tensor_applier
    from apex.normalization import MixedFusedRMSNorm
    from apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction
    from apex.optimizers import FusedAdam

    assert apex.optimizers.FusedAdam is FusedAdam is stand_ins.FusedAdam
    assert MixedFusedRMSNorm is stand_ins.FusedRMSNorm
    assert FusedLayerNormAffineFunction is stand_ins.FusedLayerNormAffineFunction
    assert multi_tensor_applier(amp_C.multi_tensor_l2norm, torch.zeros(1), [[torch.ones(4)]], False)[0].item() == 2.0
    assert importlib.util.find_spec("apex") is not None
    with pytest.raises(ModuleNotFoundError):
        import apex.contrib.layer_norm.layer_norm
