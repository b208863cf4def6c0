"""`expert-keys`: native saves name experts as no module is named, so rank 0's leak into the model's file."""

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
    not_found,
    not_needed,
    require,
)

__all__ = ["SHIM"]

_MODULE = "megatron.model.language_model"
_CLASS = "TransformerLanguageModel"
_METHOD = f"{_CLASS}.state_dict_for_save_checkpoint"
_SINCE = (0, 19, 2)
# The attribute of the model that holds the language model: what DeepSpeed's names of the experts begin with.
_OWNER = "language_model"


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if machine.deepspeed < _SINCE:
        return not_needed("this DeepSpeed strips experts whatever they are named")
    missing = require(checkout, _MODULE, _METHOD)
    if missing is not None:
        return missing
    function = checkout.find(_MODULE, _METHOD)
    assert function is not None
    keys = [
        target.slice
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript)
        and isinstance(target.value, ast.Name)
        and target.value.id == "moe_state_dict"
    ]
    if not keys:
        return not_found(f"{_METHOD} fills no moe_state_dict")
    if any(isinstance(part, ast.Constant) and _OWNER in str(part.value) for key in keys for part in ast.walk(key)):
        return not_needed("experts are named by their modules")
    if all(isinstance(key, ast.BinOp) and isinstance(key.left, ast.Attribute) for key in keys):
        return needed("experts are named without their language model")
    return not_found(f"{_METHOD} names experts in a way that is not known")


def _install(_: Checkout) -> None:
    def wrap(module: ModuleType) -> None:
        owner = getattr(module, _CLASS)
        original = owner.state_dict_for_save_checkpoint

        @functools.wraps(original)
        def state_dict_for_save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            experts = result.get("moe_state_dict")
            if experts:
                key = self._encoder_key
                result["moe_state_dict"] = {_rename(name, key): value for name, value in experts.items()}
            return result

        owner.state_dict_for_save_checkpoint = state_dict_for_save_checkpoint

    after_import(_MODULE, wrap)


def _rename(name: str, key: str) -> str:
    if not name.startswith(key):
        return name
    return f"{_OWNER}.{key}.{name.removeprefix(key).lstrip('.')}"


SHIM = Concern(
    name="expert-keys",
    why="DeepSpeed's own checkpoints hold rank 0's experts twice, and loading them dies",
    since="DeepSpeed 0.19.2",
    replaces=f"{_MODULE}.{_METHOD}, whose keys get the language model's name; saves of moc_ckpt do not need it",
    find=_find,
    install=_install,
)
