"""`masked-softmax-fusion`: 16-bit training calls a compiled softmax, which may not be there."""

from __future__ import annotations

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_needed
from moc_ckpt.integrations.megatron_deepspeed.shims._parser import needs_provider, set_default
from moc_ckpt.integrations.megatron_deepspeed.shims.fused_kernels import cannot_compile

__all__ = ["SHIM"]


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if "--no-masked-softmax-fusion" not in checkout.options:
        return not_needed("there is no --no-masked-softmax-fusion")
    reason = (
        cannot_compile(machine) if machine.device == "cuda" else f"the kernel is for CUDA, this is {machine.device}"
    )
    if reason is None:
        return not_needed("the kernels can be compiled")
    return needs_provider(checkout) or needed(reason)


SHIM = Concern(
    name="masked-softmax-fusion",
    why="with --bf16 or --fp16 the attention imports a compiled softmax unless --no-masked-softmax-fusion is given",
    since="Megatron-DeepSpeed of January 2021",
    replaces="the default of --no-masked-softmax-fusion",
    find=_find,
    install=lambda _: set_default("masked_softmax_fusion", False),
)
