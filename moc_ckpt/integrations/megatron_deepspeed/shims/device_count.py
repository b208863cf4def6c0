"""`device-count`: without accelerators DeepSpeed counts NUMA nodes, and Megatron takes ranks modulo that."""

from __future__ import annotations

import os

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_needed

__all__ = ["SHIM"]


def _find(_: Checkout, machine: Machine) -> Finding:
    if machine.device != "cpu":
        return not_needed(f"this is {machine.device}")
    if int(os.environ.get("LOCAL_SIZE", "0") or 0) > 0:
        return not_needed("LOCAL_SIZE is set")
    if not os.environ.get("LOCAL_WORLD_SIZE"):
        return not_needed("LOCAL_WORLD_SIZE is not set: not started by torchrun")
    return needed("LOCAL_SIZE is not set")


def _install(_: Checkout) -> None:
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]


SHIM = Concern(
    name="device-count",
    why="on CPUs the local rank is taken modulo the number of NUMA nodes, and initialize_megatron refuses that",
    since="DeepSpeed 0.9 (CPU accelerator)",
    replaces="the environment variable LOCAL_SIZE, set to torchrun's LOCAL_WORLD_SIZE",
    find=_find,
    install=_install,
)
