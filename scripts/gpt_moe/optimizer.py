"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from gpt_moe.runtime import can_build_fused_adam

__all__ = ["build_optimizer", "build_schedule", "learning_rate", "parameter_groups"]


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters by weight decay, then dense from experts, as DeepSpeed's MoE needs it.

    Args:
        model: the GPTModel.
        weight_decay: for matrices; biases and norms get none.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    matrices, vectors = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (vectors if parameter.dim() < 2 else matrices).append(parameter)
    both = [
        {"params": matrices, "weight_decay": weight_decay, "name": "decay"},
        {"params": vectors, "weight_decay": 0.0, "name": "no_decay"},
    ]
    # Replicated experts are taken out when the engine is built.
    replicated = any(getattr(parameter, "lazarus", False) for parameter in model.parameters())
    return both if replicated else split_params_into_different_moe_groups_for_optimizer(both)


def build_optimizer(
    args: argparse.Namespace, groups: list[dict[str, Any]], ds_config: Mapping[str, Any], device: torch.device
) -> tuple[torch.optim.Optimizer | None, str]:
    """Return AdamW in the fastest form that needs no compiler at hand, or None to leave it to the ds_config.

    Args:
        args: settled arguments.
        groups: from `parameter_groups`.
        ds_config: the engine's configuration; its "optimizer" section, if any, decides.
        device: where the parameters live.

    Returns:
        The optimizer (or None), and its name for the log.
    """
    if "optimizer" in ds_config:
        return None, f"{ds_config['optimizer'].get('type', 'AdamW')} from the DeepSpeed configuration"
    options: dict[str, Any] = {"lr": args.lr, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}
    if ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options), "DeepSpeedCPUAdam"
    if device.type == "cuda" and can_build_fused_adam():
        from deepspeed.ops.adam import FusedAdam

        try:
            return FusedAdam(groups, adam_w_mode=True, **options), "FusedAdam"
        except Exception as error:  # whatever the build ran into, torch's optimizer does as well
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f" FusedAdam cannot be built ({reason}); torch AdamW is used", flush=True)
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, fused=fused, **options), f"torch AdamW{' (fused)' if fused else ''}"


def learning_rate(args: argparse.Namespace, iteration: int) -> float:
    """Return the learning rate of an iteration (0 is the first).

    Args:
        args: lr, min_lr, lr_decay_style, lr_warmup_iters, lr_decay_iters.
        iteration: finished iterations.
    """
    if iteration < args.lr_warmup_iters:
        return args.lr * (iteration + 1) / args.lr_warmup_iters
    if args.lr_decay_style == "constant":
        return args.lr
    length = max(1, args.lr_decay_iters - args.lr_warmup_iters)
    share = min(1.0, (iteration - args.lr_warmup_iters) / length)
    weight = 1.0 - share if args.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return args.min_lr + (args.lr - args.min_lr) * weight


def build_schedule(
    args: argparse.Namespace, ds_config: Mapping[str, Any]
) -> Callable[[torch.optim.Optimizer], LambdaLR] | None:
    """Return what makes the scheduler from the optimizer, or None to leave it to the ds_config.

    Args:
        args: settled arguments.
        ds_config: the engine's configuration; its "scheduler" section, if any, decides.
    """
    if "scheduler" in ds_config:
        return None
    base = args.lr or 1.0
    return lambda optimizer: LambdaLR(optimizer, lambda iteration: learning_rate(args, iteration) / base)
