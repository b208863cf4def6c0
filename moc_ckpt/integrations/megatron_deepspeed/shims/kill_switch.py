"""`kill-switch`: every rank looks for the file by itself, and one that appears between two looks ends some."""

from __future__ import annotations

import ast
import functools
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
from moc_ckpt.integrations.megatron_deepspeed.run_state import megatron_args

__all__ = ["SHIM"]

_UTILS = "megatron.utils"
_FUNCTION = "found_kill_switch"
_OPTION = "--kill-switch-file"
_COLLECTIVES = {"all_gather", "all_gather_object", "all_reduce", "broadcast", "broadcast_object_list"}


def _find(checkout: Checkout, _: Machine) -> Finding:
    if _OPTION not in checkout.options:
        return not_needed(f"there is no {_OPTION}")
    missing = require(checkout, _UTILS, _FUNCTION)
    if missing is not None:
        return missing
    function = checkout.find(_UTILS, _FUNCTION)
    assert function is not None
    if any(isinstance(node, ast.Attribute) and node.attr in _COLLECTIVES for node in ast.walk(function)):
        return not_needed("the ranks look together")
    return needed("each rank looks for the file by itself")


def _install(_: Checkout) -> None:
    # Before megatron.training takes the name.
    after_import(_UTILS, _look_together)


def _look_together(module: ModuleType) -> None:
    """One rank's finding is every rank's; collective where a file is named, and nothing where none is."""
    original = module.found_kill_switch

    @functools.wraps(original)
    def found_kill_switch(*args: Any, **kwargs: Any) -> bool:
        found = bool(original(*args, **kwargs))
        if megatron_args().kill_switch_file is None:
            return found
        return _on_any_rank(found)

    module.found_kill_switch = found_kill_switch  # type: ignore[attr-defined]


def _on_any_rank(found: bool) -> bool:
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    if not dist.is_initialized():
        return found
    device = get_accelerator().current_device_name() if dist.get_backend() != "gloo" else "cpu"
    seen = torch.tensor([int(found)], dtype=torch.int32, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


SHIM = Concern(
    name="kill-switch",
    why="a kill switch that appears after some ranks have looked ends the others only; those that train on hang or die",
    since="all versions with --kill-switch-file",
    replaces=f"{_UTILS}.{_FUNCTION}, whose ranks tell each other (one number per step, only with {_OPTION})",
    find=_find,
    install=_install,
)
