"""`apex`: on CUDA apex is imported whatever is used of it; torch has all of it."""

from __future__ import annotations

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_found, not_needed
from moc_ckpt.integrations.megatron_deepspeed.shims._stub import add_module

__all__ = ["SHIM", "add_stand_ins"]

# What the stand-ins cover, and the modules of a checkout that a language model does not import.
_COVERED = {"apex.optimizers", "apex.normalization", "apex.normalization.fused_layer_norm", "apex.multi_tensor_apply"}
_OPTIONAL = {"apex.contrib.layer_norm.layer_norm"}  # imported in a try statement
_ELSEWHERE = ("megatron.model.vision",)


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if machine.device != "cuda":
        return not_needed(f"apex is imported on CUDA only, this is {machine.device}")
    used: dict[str, str] = {}
    for module in checkout.files("megatron"):
        if not module.startswith(_ELSEWHERE):
            used |= {name: module for name in checkout.imports(module) if name.split(".")[0] in ("apex", "amp_C")}
    if not used:
        return not_needed("nothing imports apex")
    if machine.has("apex") and machine.has("amp_C"):
        return not_needed("apex is installed")
    beyond = sorted(set(used) - _COVERED - _OPTIONAL - {"amp_C"})
    if beyond:
        return not_found(f"{used[beyond[0]]} imports {beyond[0]}, which has no stand-in")
    return needed("apex is not installed")


def add_stand_ins() -> None:
    """Puts modules named as apex's into `sys.modules`."""
    from moc_ckpt.integrations.megatron_deepspeed import stand_ins as ours

    add_module("apex", {}, package=True)
    add_module("apex.optimizers", {"FusedAdam": ours.FusedAdam, "FusedSGD": ours.FusedSGD})
    norms = {
        "FusedLayerNorm": ours.FusedLayerNorm,
        "FusedLayerNormAffineFunction": ours.FusedLayerNormAffineFunction,
        "FusedRMSNorm": ours.FusedRMSNorm,
        "MixedFusedLayerNorm": ours.FusedLayerNorm,
        "MixedFusedRMSNorm": ours.FusedRMSNorm,
    }
    add_module("apex.normalization", norms, package=True)
    add_module("apex.normalization.fused_layer_norm", norms)
    add_module("apex.multi_tensor_apply", {"multi_tensor_applier": ours.multi_tensor_applier})
    kernels = {"multi_tensor_l2norm": ours.multi_tensor_l2norm, "multi_tensor_scale": ours.multi_tensor_scale}
    add_module("amp_C", kernels)
    # Asked for by name only; what it would do the autograd function above does.
    add_module("fused_layer_norm_cuda", {})


SHIM = Concern(
    name="apex",
    why="on CUDA apex and amp_C are imported unconditionally",
    since="all versions",
    replaces="the modules apex, amp_C and fused_layer_norm_cuda: torch.optim.AdamW(fused=True) for FusedAdam, "
    "torch's layer_norm for FusedLayerNorm, torch's foreach functions for multi_tensor_applier",
    find=_find,
    install=lambda _: add_stand_ins(),
)
