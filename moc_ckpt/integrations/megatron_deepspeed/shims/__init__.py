"""One module per obstacle between a stock checkout and current versions of DeepSpeed, PyTorch and CUDA."""

from __future__ import annotations

from moc_ckpt.integrations.megatron_deepspeed.concern import Concern
from moc_ckpt.integrations.megatron_deepspeed.shims import (
    accumulation_fusion,
    apex,
    attention_view,
    compression,
    device_count,
    expert_keys,
    fused_kernels,
    kill_switch,
    loader_rng,
    scripted_fusion,
    softmax_fusion,
    universal_info,
    vision,
)

__all__ = ["SHIMS"]

SHIMS: tuple[Concern, ...] = (
    device_count.SHIM,
    apex.SHIM,
    fused_kernels.SHIM,
    softmax_fusion.SHIM,
    accumulation_fusion.SHIM,
    vision.SHIM,
    compression.SHIM,
    attention_view.SHIM,
    loader_rng.SHIM,
    kill_switch.SHIM,
    scripted_fusion.SHIM,
    universal_info.SHIM,
    expert_keys.SHIM,
)
