"""`gradient-accumulation-fusion`: on by default, and it needs an extension of apex."""

from __future__ import annotations

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_needed
from moc_ckpt.integrations.megatron_deepspeed.shims._parser import needs_provider, set_default

__all__ = ["SHIM"]

_EXTENSION = "fused_weight_gradient_mlp_cuda"


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if "--no-gradient-accumulation-fusion" not in checkout.options:
        return not_needed("there is no --no-gradient-accumulation-fusion")
    if machine.has(_EXTENSION):
        return not_needed(f"{_EXTENSION} is installed")
    return needs_provider(checkout) or needed(f"{_EXTENSION} is not installed")


SHIM = Concern(
    name="gradient-accumulation-fusion",
    why="the linear layers refuse to be built without apex unless --no-gradient-accumulation-fusion is given",
    since="Megatron-DeepSpeed of February 2022",
    replaces="the default of --no-gradient-accumulation-fusion",
    find=_find,
    install=lambda _: set_default("gradient_accumulation_fusion", False),
)
