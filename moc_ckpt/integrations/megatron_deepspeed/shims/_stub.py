"""Modules that stand where others are missing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from moc_ckpt.errors import UnsupportedError

__all__ = ["add_module", "refuses"]


def add_module(name: str, content: Mapping[str, Any], *, package: bool = False) -> ModuleType:
    """Puts a module into `sys.modules`, and as an attribute into its parent if that is loaded.

    Args:
        name: its full name.
        content: its attributes.
        package: others are going to be below it.
    """
    module = ModuleType(name, "Stands in for a module that is not installed.")
    # Libraries ask find_spec whether something is installed; without a spec that raises.
    module.__spec__ = ModuleSpec(name, None, is_package=package)
    if package:
        module.__path__ = []
    for key, value in content.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


def refuses(what: str, fix: str) -> Any:
    """Returns a function that raises UnsupportedError when it is called."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(f"{what} is not available here", where="moc_ckpt.launch", fix=fix)

    return refuse
