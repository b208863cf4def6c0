"""`fused-kernels`: on CUDA the start always runs nvcc, for architectures that a new one does not know."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import (
    Concern,
    Finding,
    Machine,
    after_import,
    needed,
    not_needed,
    require,
)

__all__ = ["SHIM", "cannot_compile"]

_MODULE = "megatron.fused_kernels"
# The first nvcc without the architectures that the checkout asks for.
_NVCC = 13


def cannot_compile(machine: Machine) -> str | None:
    """Returns why the kernels cannot be compiled on a machine with CUDA; None if they can."""
    if machine.nvcc is None:
        return "there is no nvcc"
    if machine.nvcc >= _NVCC:
        return f"nvcc {machine.nvcc} knows compute_70 no more"
    return None


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if machine.device != "cuda":
        return not_needed(f"kernels are compiled for CUDA only, this is {machine.device}")
    reason = cannot_compile(machine)
    if reason is None:
        return not_needed("the kernels can be compiled")
    return require(checkout, _MODULE, "load") or needed(reason)


def _install(_: Checkout) -> None:
    def replace(module: ModuleType) -> None:
        def load(args: Any) -> None:
            """Compiles nothing: without --masked-softmax-fusion nothing asks for it."""
            if getattr(args, "masked_softmax_fusion", False):
                raise RuntimeError("--masked-softmax-fusion needs kernels: pass --moc-no-shim fused-kernels")

        module.load = load  # type: ignore[attr-defined]

    after_import(_MODULE, replace)


SHIM = Concern(
    name="fused-kernels",
    why="initialize_megatron compiles softmax kernels with nvcc, also where they are not used",
    since="CUDA 13, or any machine without nvcc",
    replaces="megatron.fused_kernels.load",
    find=_find,
    install=_install,
)
