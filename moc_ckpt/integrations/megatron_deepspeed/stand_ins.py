"""What a language model takes from apex, in terms of torch: optimizers, norms and functions on lists of tensors.

Signatures are apex's, as far as Megatron-DeepSpeed calls them; what is not supported is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from moc_ckpt.errors import UnsupportedError

__all__ = [
    "FusedAdam",
    "FusedLayerNorm",
    "FusedLayerNormAffineFunction",
    "FusedRMSNorm",
    "FusedSGD",
    "multi_tensor_applier",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
]

_CHUNK = 2048 * 32


def _refuse(where: str, **given: bool) -> None:
    names = [name for name, wrong in given.items() if wrong]
    if names:
        raise UnsupportedError(
            f"{where} has no {', '.join(names)} here", where="moc_ckpt.launch, shim apex", fix="install apex"
        )


class FusedAdam(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` with the arguments of apex's FusedAdam.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        bias_correction: must be true.
        betas: decay of the moments.
        eps: added to the denominator.
        adam_w_mode: must be true: weight decay is decoupled, which is apex's default.
        weight_decay: its coefficient.
        amsgrad: must be false.
        set_grad_none: without effect: gradients are always set to None.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        _refuse("FusedAdam", **{"bias_correction=False": not bias_correction, "adam_w_mode=False": not adam_w_mode})
        _refuse("FusedAdam", amsgrad=amsgrad)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


class FusedSGD(torch.optim.SGD):
    """`torch.optim.SGD` with the arguments of apex's FusedSGD.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: its factor.
        dampening: of the momentum.
        weight_decay: its coefficient, added to the gradient before the momentum.
        nesterov: use that momentum.
        wd_after_momentum: must be false.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
    ) -> None:
        _refuse("FusedSGD", wd_after_momentum=wd_after_momentum)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            foreach=True,
        )


def _shape(size: Any) -> list[int]:
    return [int(size)] if isinstance(size, int) else [int(part) for part in size]


def _layer_norm(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: Any, eps: float
) -> torch.Tensor:
    if input.dtype == weight.dtype:
        return functional.layer_norm(input, _shape(shape), weight, bias, eps)
    # As apex's mixed kernels: computed in float32, given out as the weight's dtype.
    wide = None if bias is None else bias.float()
    return functional.layer_norm(input.float(), _shape(shape), weight.float(), wide, eps).to(weight.dtype)


class FusedLayerNormAffineFunction:
    """`torch.nn.functional.layer_norm` where apex has an autograd function."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any, normalized_shape: Any, eps: float) -> torch.Tensor:
        """Says by its signature that there is no memory-efficient variant; `ctx` is not used."""
        return _layer_norm(input, weight, bias, normalized_shape, eps)

    @classmethod
    def apply(cls, input: Any, weight: Any, bias: Any, normalized_shape: Any, eps: float) -> torch.Tensor:
        """Normalizes over the last dimensions.

        Args:
            input: [..., *normalized_shape].
            weight: [*normalized_shape], of the same dtype as the result.
            bias: likewise.
            normalized_shape: the last dimensions.
            eps: added to the variance.
        """
        return cls.forward(None, input, weight, bias, normalized_shape, eps)


class FusedLayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`, which also takes inputs of another dtype than its weight's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes over the last dimensions."""
        if self.weight is None:
            return super().forward(input)
        return _layer_norm(input, self.weight, self.bias, self.normalized_shape, self.eps)


class FusedRMSNorm(torch.nn.Module):
    """Root-mean-square norm with apex's constructor.

    Args:
        normalized_shape: the last dimensions.
        eps: added to the mean square.
        elementwise_affine: have a weight.
        sequence_parallel: noted on the weight, for Megatron.
    """

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.normalized_shape = tuple(_shape(normalized_shape))
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(self.normalized_shape)) if elementwise_affine else None
        if self.weight is not None:
            self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes over the last dimensions, in float32; the result has the weight's dtype."""
        dims = tuple(range(-len(self.normalized_shape), 0))
        wide = input.float()
        wide = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + self.eps)
        if self.weight is None:
            return wide.to(input.dtype)
        return (wide * self.weight.float()).to(self.weight.dtype)


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], *args: Any
) -> Any:
    """Calls `op` on lists of tensors.

    Args:
        op: such as `multi_tensor_scale`.
        noop_flag: int32 [1], set to 1 where a value is not finite.
        tensor_lists: lists of equal length.
        *args: handed on.
    """
    return op(_CHUNK, noop_flag, tensor_lists, *args)


def multi_tensor_l2norm(
    _chunk: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norm of all tensors together, float32 [1], and of each, float32 [n] (empty unless asked for)."""
    tensors = tensor_lists[0]
    if not tensors:
        return torch.zeros(1, device=noop_flag.device), torch.zeros(0, device=noop_flag.device)
    norms = torch.stack([torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors])
    total = torch.linalg.vector_norm(norms).view(1)
    return total, norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(
    _chunk: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float | torch.Tensor
) -> None:
    """Writes `scale` times each tensor of the first list into the second's; flags values that are not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        product = source.detach().float() * scale
        noop_flag.masked_fill_((~torch.isfinite(product)).any(), 1)
        target.detach().copy_(product)
