"""Two-layer MLPs of several experts as two grouped GEMMs, instead of two GEMMs per expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Mlp", "apply_grouped", "as_mlp", "can_group", "pack_weights"]

# Element-wise, without parameters and without state.
_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.ELU)


class Mlp(NamedTuple):
    """The parts of an expert that is a plain two-layer MLP."""

    first: nn.Linear
    activation: nn.Module
    second: nn.Linear


def as_mlp(module: nn.Module) -> Mlp | None:
    """Returns the parts of nn.Sequential(Linear, activation, Linear); None for any other module, or one with hooks."""
    parts = list(module.children())
    if type(module) is not nn.Sequential or len(parts) != 3:
        return None
    first, activation, second = parts
    if type(first) is not nn.Linear or type(second) is not nn.Linear or not isinstance(activation, _ACTIVATIONS):
        return None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(part, name) for part in (module, *parts) for name in hooks):
        return None
    return Mlp(first, activation, second)


def can_group(tokens: Tensor, mlps: Sequence[Mlp]) -> bool:
    """Whether torch's grouped GEMM takes these: bfloat16, rows of a multiple of 16 bytes, equal shapes and activations.

    On a GPU before compute capability 9.0 torch has no kernel for it and computes one expert after the other.
    """
    if not hasattr(torch, "_grouped_mm") or tokens.dtype != torch.bfloat16 or not len(tokens):
        return False
    if tokens.is_cuda and torch.cuda.get_device_capability(tokens.device) < (9, 0):
        return False
    model = mlps[0]
    layers = [layer for mlp in mlps for layer in (mlp.first, mlp.second)]
    return (
        all(repr(mlp) == repr(model) for mlp in mlps)
        and all(layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous() for layer in layers)
        and all(size % 8 == 0 for size in (*model.first.weight.shape, *model.second.weight.shape))
    )


def apply_grouped(tokens: Tensor, mlps: Sequence[Mlp], counts: Sequence[int], rows_of: Tensor) -> Tensor:
    """Applies every expert to its rows.

    Args:
        tokens: [rows, hidden] bfloat16, sorted by expert.
        mlps: the experts, alike in shape; see `can_group`.
        counts: rows of every expert.
        rows_of: the same on the device, int64.

    Returns:
        [rows, hidden].
    """
    ends = rows_of.cumsum(0).to(torch.int32)
    hidden = _linear(tokens, [mlp.first for mlp in mlps], counts, rows_of, ends)
    return _linear(mlps[0].activation(hidden), [mlp.second for mlp in mlps], counts, rows_of, ends)


@torch.no_grad()
def pack_weights(mlps: Sequence[Mlp]) -> None:
    """Lays the weights of all experts at equal distances in memory, so that a grouped GEMM need not copy them together.

    Parameters keep their identity and their values; whatever looked at their old memory must look again. A later
    `module.to(...)` undoes it; an optimizer that flattens the parameters of the experts in order keeps it.
    """
    for layers in ([mlp.first for mlp in mlps], [mlp.second for mlp in mlps]):
        packed = torch.stack([layer.weight for layer in layers])
        for layer, weight in zip(layers, packed, strict=True):
            layer.weight.data = weight


def _linear(
    tokens: Tensor, layers: Sequence[nn.Linear], counts: Sequence[int], rows_of: Tensor, ends: Tensor
) -> Tensor:
    weights = [layer.weight for layer in layers]
    out: Tensor = _GroupedGemm.apply(tokens, list(counts), ends, *weights)
    if layers[0].bias is not None:
        out = _GroupedBias.apply(out, list(counts), rows_of, *[layer.bias for layer in layers])
    return out


def _together(weights: Sequence[Tensor]) -> Tensor:
    """Returns [experts, out, in]: a view where the weights lie at equal distances, else a copy."""
    first = weights[0]
    if len(weights) == 1:
        return first[None]
    at = [weight.storage_offset() for weight in weights]
    step = at[1] - at[0]
    same = {weight.untyped_storage().data_ptr() for weight in weights}
    regular = len(same) == 1 and step >= first.numel() and all(b - a == step for a, b in pairwise(at))
    # The kernel wants 16-byte alignment of every expert's weights.
    if regular and (step * first.element_size()) % 16 == 0 and first.data_ptr() % 16 == 0:
        return first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    return torch.stack(list(weights))


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, counts: list[int], ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(tokens, ends, *weights)
        out: Tensor = torch._grouped_mm(tokens, _together(weights).transpose(1, 2), offs=ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, ends, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        for_tokens = torch._grouped_mm(grad, _together(weights), offs=ends) if ctx.needs_input_grad[0] else None
        for_weights = torch._grouped_mm(grad.t(), tokens, offs=ends).unbind(0)
        for number, gradient in zip(ctx.counts, for_weights, strict=True):
            if not number:  # some devices leave it undefined (pytorch issue 172439)
                gradient.zero_()
        return for_tokens, None, None, *for_weights


class _GroupedBias(torch.autograd.Function):
    """Adds an expert's bias to its rows. Sums gradients per expert in a fixed order, as no scatter-add would."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rows_of: Tensor, *biases: Tensor) -> Tensor:
        ctx.counts = counts
        return rows + torch.stack(biases).repeat_interleave(rows_of, dim=0, output_size=len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, *[part.sum(0) for part in grads[0].split(ctx.counts)]
