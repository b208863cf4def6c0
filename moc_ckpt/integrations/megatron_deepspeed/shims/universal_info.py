"""`universal-checkpoint-info`: native saves hand DeepSpeed a key that it keeps for itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
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

_KEY = "universal_checkpoint_info"
_SINCE = (0, 19, 2)
_ENGINE = "deepspeed.runtime.engine"


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if machine.deepspeed < _SINCE:
        return not_needed("this DeepSpeed takes the key in client_state")
    missing = require(checkout, "megatron.checkpointing", "save_checkpoint")
    if missing is not None:
        return missing
    if checkout.find("megatron.checkpointing", "_universal_checkpoint_info") is None:
        return not_needed("megatron.checkpointing writes no such key")
    return needed(f"this DeepSpeed rejects {_KEY!r} in client_state")


def _install(_: Checkout) -> None:
    def wrap(module: ModuleType) -> None:
        engine_class = module.DeepSpeedEngine
        original = engine_class.save_checkpoint

        @functools.wraps(original)
        def save_checkpoint(
            self: Any, save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            state = client_state if client_state is not None else {}
            if getattr(self, "moc", None) is not None or not isinstance(state, Mapping) or _KEY not in state:
                return original(self, save_dir, tag, state, *args, **kwargs)
            attributes = vars(self.module)
            before = attributes.get(_KEY, _ABSENT)
            # DeepSpeed looks for it on the module, where the checkout has a method of that name.
            attributes[_KEY] = state[_KEY]
            try:
                rest = {key: value for key, value in state.items() if key != _KEY}
                return original(self, save_dir, tag, rest, *args, **kwargs)
            finally:
                if before is _ABSENT:
                    del attributes[_KEY]
                else:
                    attributes[_KEY] = before

        engine_class.save_checkpoint = save_checkpoint

    after_import(_ENGINE, wrap)


_ABSENT = object()

SHIM = Concern(
    name="universal-checkpoint-info",
    why="DeepSpeed's own save_checkpoint raises: the key universal_checkpoint_info is reserved, and it takes the "
    "module's method of that name for a dict",
    since="DeepSpeed 0.19.2",
    replaces="DeepSpeedEngine.save_checkpoint, which gets the key as an attribute of the module; saves of moc_ckpt "
    "do not need it",
    find=_find,
    install=_install,
)
