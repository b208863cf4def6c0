"""Fault-tolerant Mixture-of-Experts training for DeepSpeed and Megatron-DeepSpeed.

Importing this package imports neither torch nor DeepSpeed. It registers a hook that wraps
DeepSpeed's engine when (or if) DeepSpeed is imported; an engine whose ds_config has
`"moc_checkpoint": {"enabled": true}` then saves and loads through this package.
"""

from __future__ import annotations

from types import ModuleType

import wrapt

from moc_ckpt._version import __version__

__all__ = ["__version__"]


def _install(module: ModuleType) -> None:
    from moc_ckpt.integrations.deepspeed.hooks import install

    install(module)


# Runs at once if DeepSpeed is loaded already.
wrapt.register_post_import_hook(_install, "deepspeed.runtime.engine")
