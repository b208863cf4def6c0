"""`compression-import`: DeepSpeed has no compression library any more, and the training loop imports it."""

from __future__ import annotations

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_needed
from moc_ckpt.integrations.megatron_deepspeed.shims._stub import add_module, refuses

__all__ = ["SHIM"]

_MODULE = "deepspeed.compression.compress"
_FIX = "install deepspeed < 0.19.7 to use compression training"


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if _MODULE not in checkout.imports("megatron.training"):
        return not_needed(f"megatron.training does not import {_MODULE}")
    if machine.has(_MODULE):
        return not_needed(f"this DeepSpeed has {_MODULE}")
    return needed(f"this DeepSpeed has no {_MODULE}")


def _install(_: Checkout) -> None:
    import importlib
    from contextlib import suppress

    package = _MODULE.rpartition(".")[0]
    with suppress(ImportError):
        importlib.import_module(package)
    import sys

    if package not in sys.modules:
        add_module(package, {}, package=True)
    missing = refuses("DeepSpeed's compression training", _FIX)
    add_module(_MODULE, {"init_compression": missing, "redundancy_clean": missing})


SHIM = Concern(
    name="compression-import",
    why="megatron.training imports deepspeed.compression.compress, which is gone",
    since="DeepSpeed 0.19.7",
    replaces=f"the module {_MODULE}",
    find=_find,
    install=_install,
)
