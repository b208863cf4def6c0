"""`attention-view`: the attention takes views of slices that are not contiguous."""

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

__all__ = ["SHIM"]

_MODULE = "megatron.model.transformer"
_METHOD = "CoreAttention.forward"


def _find(checkout: Checkout, _: Machine) -> Finding:
    missing = require(checkout, _MODULE, _METHOD)
    if missing is not None:
        return missing
    forward = checkout.find(_MODULE, _METHOD)
    assert forward is not None
    inputs = {argument.arg for argument in forward.args.args[1:4]}
    viewed = {
        node.func.value.id
        for node in ast.walk(forward)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "view"
        and isinstance(node.func.value, ast.Name)
    }
    if not inputs & viewed:
        return not_needed(f"{_METHOD} takes no view of its inputs")
    return needed(f"{_METHOD} calls view() on {', '.join(sorted(inputs & viewed))}")


def _install(_: Checkout) -> None:
    def wrap(module: ModuleType) -> None:
        original = module.CoreAttention.forward

        @functools.wraps(original)
        def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, query.contiguous(), key.contiguous(), value.contiguous(), *args, **kwargs)

        module.CoreAttention.forward = forward

    after_import(_MODULE, wrap)


SHIM = Concern(
    name="attention-view",
    why="with a micro-batch above 1 and without flash attention the first step dies in view()",
    since="Megatron-DeepSpeed of December 2024, where query, key and value are slices of one tensor",
    replaces="megatron.model.transformer.CoreAttention.forward, which gets contiguous inputs",
    find=_find,
    install=_install,
)
