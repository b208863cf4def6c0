"""Fault-tolerant Mixture-of-Experts training for DeepSpeed and Megatron-DeepSpeed.

Importing this package imports neither torch nor DeepSpeed. It registers a hook that wraps
DeepSpeed's engine when (or if) DeepSpeed is imported; an engine whose ds_config has
`"moc_checkpoint": {"enabled": true}` then saves and loads through this package.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

from moc_ckpt._version import __version__

__all__ = ["__version__"]


def _install(module: ModuleType) -> None:
    from moc_ckpt.integrations.deepspeed.hooks import install

    install(module)


def _register() -> None:
    import wrapt

    # Runs at once if the module is loaded already.
    wrapt.register_post_import_hook(_install, "deepspeed.runtime.engine")


class _UntilDeepSpeed:
    """Registers the hook when DeepSpeed begins to be imported: the command line does without, and wrapt takes time."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        """Finds nothing, as an entry of `sys.meta_path`."""
        if name == "deepspeed":
            with suppress(ValueError):  # another thread was first
                sys.meta_path.remove(cls)
            _register()


if "deepspeed" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _UntilDeepSpeed)
