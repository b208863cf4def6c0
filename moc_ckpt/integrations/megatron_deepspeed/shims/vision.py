"""`vision-import`: the training loop imports vision code, and with it torchvision, whatever it trains."""

from __future__ import annotations

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_needed
from moc_ckpt.integrations.megatron_deepspeed.shims._stub import add_module, refuses

__all__ = ["SHIM"]

_MODULE = "megatron.model.vision.knn_monitor"


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if _MODULE not in checkout.imports("megatron.training"):
        return not_needed(f"megatron.training does not import {_MODULE}")
    if machine.has("torchvision"):
        return not_needed("torchvision is installed")
    return needed("torchvision is not installed")


def _install(_: Checkout) -> None:
    missing = refuses("the feature bank of vision pretraining", "pip install torchvision")
    add_module(_MODULE, {"compute_feature_bank": missing})


SHIM = Concern(
    name="vision-import",
    why="megatron.training imports a vision module, which needs torchvision, also for language models",
    since="Megatron-DeepSpeed of January 2022",
    replaces=f"the module {_MODULE}",
    find=_find,
    install=_install,
)
