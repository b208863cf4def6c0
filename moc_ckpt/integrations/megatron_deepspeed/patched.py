"""What a patched Megatron-DeepSpeed tree calls (docs/patches.md): the launcher's hooks and shims, one by one.

Decorators for functions of the tree, and functions for its parser and its package. Under the launcher none of them does
anything, because the launcher brings the same in by itself. Decorating is not collective.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = [
    "apex",
    "arguments",
    "build_pretraining_data_loader",
    "build_train_valid_test_data_iterators",
    "ds_config",
    "found_kill_switch",
    "load_checkpoint",
    "masked_softmax_fusion",
    "save_checkpoint",
    "setup_model_and_optimizer",
    "train",
    "train_step",
]

Function = Callable[..., Any]

_ROOM = __name__.rpartition(".")[0]
_ENGINE = "deepspeed.runtime.engine"
_STEPS = ("setup_model_and_optimizer", "train_step", "train")


def _ours(module: str) -> Any:
    return importlib.import_module(f"{_ROOM}.{module}")


def _launched() -> bool:
    """Tells whether the launcher runs this process."""
    return f"{_ROOM}.launcher" in sys.modules


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the `--moc-*` arguments to the script's parser."""
    if not _launched():
        _ours("arguments").add_arguments(parser)


def masked_softmax_fusion(parser: argparse.ArgumentParser) -> None:
    """Makes --no-masked-softmax-fusion the default where the kernels cannot be compiled."""
    if _launched():
        return
    machine = _ours("concern").Machine()
    if machine.device != "cuda" or _ours("shims.fused_kernels").cannot_compile(machine) is not None:
        parser.set_defaults(masked_softmax_fusion=False)


def apex() -> None:
    """Puts stand-ins for apex into `sys.modules` on CUDA, if apex is not installed."""
    if _launched():
        return
    machine = _ours("concern").Machine()
    if machine.device == "cuda" and not (machine.has("apex") and machine.has("amp_C")):
        _ours("shims.apex").add_stand_ins()


def ds_config(original: Function) -> Function:
    """Decorates `_create_ds_config_dict`: the `--moc-*` arguments override the ds_config's section."""
    if _launched():
        return original

    @functools.wraps(original)
    def _create_ds_config_dict(*args: Any, **kwargs: Any) -> Any:
        from moc_ckpt.config import CONFIG_KEY

        settings = original(*args, **kwargs)
        given = _ours("run_state").megatron_args()
        section = _ours("arguments").merge(settings.get(CONFIG_KEY), given, save=given.save)
        if section is not None:
            settings[CONFIG_KEY] = section
        return settings

    return _create_ds_config_dict


def setup_model_and_optimizer(original: Function) -> Function:
    """Decorates the function of that name: the engine that it returns is the one that trains."""
    return _changed("hooks", "_wrap_steps", original, _STEPS)


def train_step(original: Function) -> Function:
    """Decorates the function of that name: before a step the one before it is complete."""
    return _changed("hooks", "_wrap_steps", original, _STEPS)


def train(original: Function) -> Function:
    """Decorates the function of that name: a checkpoint before an exit has every expert."""
    return _changed("hooks", "_wrap_steps", original, _STEPS)


def save_checkpoint(original: Function) -> Function:
    """Decorates `megatron.checkpointing.save_checkpoint`: client_state is plain data."""
    _change_engine()
    return _changed("hooks", "_wrap_save", original, ("save_checkpoint",))


def load_checkpoint(original: Function) -> Function:
    """Decorates `megatron.checkpointing.load_checkpoint`: each rank's own generators come back."""
    _change_engine()
    return _changed("hooks", "_wrap_load", original, ("load_checkpoint",))


def build_pretraining_data_loader(original: Function) -> Function:
    """Decorates the function of that name: its loaders have generators of their own."""
    return _changed("shims.loader_rng", "_give_generators", original, ("build_pretraining_data_loader",))


def build_train_valid_test_data_iterators(original: Function) -> Function:
    """Decorates the function of that name: every generator stays where it was."""
    return _changed("shims.loader_rng", "_keep_generators", original, ("build_train_valid_test_data_iterators",))


def found_kill_switch(original: Function) -> Function:
    """Decorates the function of that name: what one rank finds, all find."""
    return _changed("shims.kill_switch", "_look_together", original, ("found_kill_switch",))


def _changed(room: str, change: str, original: Function, names: tuple[str, ...]) -> Function:
    """Returns what a hook makes of one function of a module.

    Args:
        room: the module of the hook or shim.
        change: its function, which replaces functions of the module that it is given.
        original: the function.
        names: of all functions that it replaces.
    """
    if _launched():
        return original
    name = original.__name__
    module = SimpleNamespace(**{**dict.fromkeys(names), name: original})
    getattr(_ours(room), change)(module)
    changed: Function = getattr(module, name)
    return changed


@functools.cache
def _change_engine() -> None:
    """Changes DeepSpeed's engine, once; its import lets the plugin hook in first, as it has to."""
    if not _launched():
        _ours("hooks")._wrap_engine(importlib.import_module(_ENGINE))
