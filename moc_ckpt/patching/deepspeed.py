"""Patch of DeepSpeed: its factory of checkpoint engines loads a class that the ds_config names.

docs/patches.md has the text that goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moc_ckpt.patching.marks import Hunk
from moc_ckpt.patching.patch import NotNeeded, Patch, Target

if TYPE_CHECKING:
    from moc_ckpt.patching.tree import Tree

__all__ = ["DEEPSPEED"]

_NAME = "checkpoint-engine"
_FILE = "deepspeed/runtime/checkpoint_engine/utils.py"
_FUNCTION = "create_checkpoint_engine"


def _find(tree: Tree) -> Mapping[str, tuple[Hunk, ...]]:
    source = tree.source(_FILE)
    function = source.require(_FUNCTION)
    if not function.parameters or "config" not in function.parameters[0]:
        raise function.missing("the configuration as the first parameter")
    if "engine_path" in function.names():
        raise NotNeeded("the factory loads a named class already")
    if not tree.has("deepspeed/runtime/checkpoint_engine/checkpoint_engine.py"):
        raise function.missing("the base class in checkpoint_engine.py beside it")
    if "_param_dict" not in tree.source("deepspeed/runtime/config.py").attributes():
        raise function.missing("DeepSpeedConfig with _param_dict, in deepspeed/runtime/config.py")
    config = function.parameters[0]
    lines = (
        f'checkpoint_section = ({config}._param_dict.get("checkpoint") or {{}}) if {config} is not None else {{}}',
        'engine_path = checkpoint_section.get("engine")',
        "if engine_path is not None:",
        "\timport importlib",
        "\tfrom .checkpoint_engine import CheckpointEngine",
        '\tmodule_name, _, class_name = str(engine_path).partition(":")',
        "\ttry:",
        "\t\tengine_class = getattr(importlib.import_module(module_name), class_name)",
        "\texcept (ImportError, AttributeError, ValueError) as err:",
        '\t\traise ValueError(f\'checkpoint.engine must be "module:Class" that can be imported, not '
        "{engine_path!r}: {err}') from err",
        "\tif not (isinstance(engine_class, type) and issubclass(engine_class, CheckpointEngine)):",
        '\t\traise TypeError(f"checkpoint.engine {engine_path!r} is no subclass of CheckpointEngine")',
        f'\treturn engine_class({config}, **checkpoint_section.get("engine_config", {{}}))',
    )
    return {_FILE: (source.before(_NAME, function.start(), *lines),)}


DEEPSPEED = Target(
    name="deepspeed",
    package="deepspeed",
    required=("deepspeed/__init__.py", "deepspeed/runtime/engine.py"),
    patches=(
        Patch(
            name=_NAME,
            why="DeepSpeed knows a fixed list of checkpoint engines; another one needs a fork or an import hook",
            does=f'{_FUNCTION} in {_FILE} first loads the class that `"checkpoint": {{"engine": "module:Class"}}` '
            'names and gives it the configuration and, as keyword arguments, `"engine_config"`',
            since="all versions",
            imports_us=False,
            find=_find,
        ),
    ),
)
