"""What a shim or a hook is: one concern, found by the shape of the code, with one reason and one switch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

import wrapt

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout

__all__ = [
    "Concern",
    "Finding",
    "Machine",
    "after_import",
    "needed",
    "not_found",
    "not_needed",
    "require",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a concern found in a checkout.

    Attributes:
        state: `needed`, `not needed`, or `not found`: the problem may be there, but not the code that was expected.
        note: why.
    """

    state: Literal["needed", "not needed", "not found"]
    note: str


def needed(note: str) -> Finding:
    """The checkout has the problem here."""
    return Finding("needed", note)


def not_needed(note: str) -> Finding:
    """The checkout, or this machine, has not got the problem."""
    return Finding("not needed", note)


def not_found(note: str) -> Finding:
    """The code that would be replaced is not what it was expected to be."""
    return Finding("not found", note)


@dataclass(frozen=True)
class Concern:
    """One obstacle cleared, or one place where the plugin comes in.

    Attributes:
        name: for the command line.
        why: what happens without it.
        since: from which version on.
        replaces: what is replaced.
        find: recognises the problem; imports nothing of the checkout.
        install: arranges the replacement; called before anything of the checkout is imported.
        optional: can be switched off by name.
    """

    name: str
    why: str
    since: str
    replaces: str
    find: Callable[[Checkout, Machine], Finding]
    install: Callable[[Checkout], None]
    optional: bool = True


class Machine:
    """What is installed here. Everything is looked up when somebody asks."""

    @cached_property
    def device(self) -> str:
        """Name of DeepSpeed's accelerator, such as `cpu` or `cuda`."""
        from deepspeed.accelerator import get_accelerator

        return str(get_accelerator().device_name())

    @cached_property
    def deepspeed(self) -> tuple[int, ...]:
        """DeepSpeed's version."""
        import deepspeed

        from moc_ckpt.integrations.deepspeed.preflight import version_tuple

        return version_tuple(deepspeed.__version__)

    def has(self, module: str) -> bool:
        """Tells whether a module can be found; imports at most its parent packages."""
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            return False

    @cached_property
    def nvcc(self) -> int | None:
        """Major version of CUDA's compiler; None if there is none."""
        import re
        import subprocess

        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            return None
        try:
            command = [str(Path(CUDA_HOME, "bin", "nvcc")), "-V"]
            out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        found = re.search(r"release (\d+)\.", out.stdout)
        return int(found[1]) if found else None


def after_import(module: str, change: Callable[[ModuleType], None]) -> None:
    """Changes a module as soon as it is executed, before anybody can take names from it."""
    wrapt.register_post_import_hook(change, module)


def require(checkout: Checkout, module: str, *names: str) -> Finding | None:
    """Returns a `not found` that names the functions which a module lacks; None if it has all of them."""
    if checkout.tree(module) is None:
        return not_found(f"there is no {module}")
    missing = [name for name in names if checkout.find(module, name) is None]
    return not_found(f"{module} has no function {', '.join(missing)}") if missing else None
