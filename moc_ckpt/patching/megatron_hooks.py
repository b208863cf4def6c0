"""Patches of Megatron-DeepSpeed that bring the plugin in. Each inserts calls of what the launcher's hooks call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import libcst as cst
from libcst import matchers as m

from moc_ckpt.patching.marks import Hunk
from moc_ckpt.patching.patch import Patch
from moc_ckpt.patching.source import Function, Source

if TYPE_CHECKING:
    from moc_ckpt.patching.tree import Tree

__all__ = ["CALLS", "HOOKS", "decorated", "parser_of"]

ARGUMENTS = "megatron/arguments.py"
CHECKPOINTING = "megatron/checkpointing.py"
TRAINING = "megatron/training.py"
#: What stands in front of every call of ours.
CALLS = "from moc_ckpt.integrations.megatron_deepspeed import patched as moc_patched"

# What load_checkpoint reads of what save_checkpoint hands to the engine.
_KEYS = ("args", "checkpoint_version", "iteration", "tokens")
_VERSION = 3.0


def parser_of(source: Source) -> tuple[cst.CSTNode, str]:
    """Returns the statement of `parse_args` that parses, and the name of the parser.

    Raises:
        Missing: if there is no such function or statement.
    """
    function = source.require("parse_args")
    shape = m.Call(func=m.Attribute(value=m.Name(), attr=m.Name("parse_args") | m.Name("parse_known_args")))
    calls = function.findall(shape)
    parsers = {call.func.value.value for call in calls if isinstance(call, cst.Call)}  # type: ignore[attr-defined]
    if len(parsers) != 1:
        raise function.missing("one variable whose parse_args() or parse_known_args() is called")
    statement = min((function.top(call) for call in calls), key=source.first)
    return statement, parsers.pop()


def decorated(patch: str, function: Function, attribute: str) -> Hunk:
    """Returns the hunk that decorates a function with one of ours."""
    return function.source.before(patch, function.node, CALLS, f"@moc_patched.{attribute}")


def _arguments(tree: Tree) -> Mapping[str, tuple[Hunk, ...]]:
    source = tree.source(ARGUMENTS)
    statement, parser = parser_of(source)
    return {ARGUMENTS: (source.before("arguments", statement, CALLS, f"moc_patched.arguments({parser})"),)}


def _ds_config(tree: Tree) -> Mapping[str, tuple[Hunk, ...]]:
    function = tree.source(TRAINING).require("_create_ds_config_dict")
    if not function.returns_something():
        raise function.missing("a return of the settings")
    return {TRAINING: (decorated("ds-config", function, "ds_config"),)}


def _steps(tree: Tree) -> Mapping[str, tuple[Hunk, ...]]:
    names = ("setup_model_and_optimizer", "train_step", "train")
    source = tree.source(TRAINING)
    setup, step, train = (source.require(name) for name in names)
    if not train.calls("train_step"):
        raise train.missing("a call of train_step")
    returned = m.Return(value=m.Tuple(elements=[m.AtLeastN(n=2)]))
    if not setup.findall(returned):
        raise setup.missing("a return of the model and more")
    tree.source("megatron/global_vars.py").require("get_args")
    hunks = [decorated("steps", function, function.name) for function in (setup, step, train)]
    return {TRAINING: tuple(sorted(hunks, key=lambda hunk: hunk.at))}


def _save(tree: Tree) -> Mapping[str, tuple[Hunk, ...]]:
    function = tree.source(CHECKPOINTING).require("save_checkpoint")
    if function.parameters[:2] != ["iteration", "model"]:
        raise function.missing("the parameters iteration and model")
    written = function.values()
    absent = [key for key in _KEYS if key not in written]
    if absent:
        raise function.missing(f"something saved as {', '.join(absent)}")
    version = written["checkpoint_version"]
    if not (isinstance(version, cst.Float) and version.evaluated_value == _VERSION):
        raise function.missing(f"checkpoint_version {_VERSION}")
    return {CHECKPOINTING: (decorated("save", function, "save_checkpoint"),)}


def _load(tree: Tree) -> Mapping[str, tuple[Hunk, ...]]:
    function = tree.source(CHECKPOINTING).require("load_checkpoint")
    if function.parameters[:1] != ["model"]:
        raise function.missing("the parameter model")
    for name in ("no_load_rng", "load_checkpoint"):
        if not function.findall(m.Attribute(attr=m.Name(name))):
            raise function.missing(f"something with .{name}")
    return {CHECKPOINTING: (decorated("load", function, "load_checkpoint"),)}


HOOKS = (
    Patch(
        name="arguments",
        why="--moc-* arguments beside the script's own",
        does=f"`parse_args` in {ARGUMENTS} hands its parser to `moc_patched.arguments` before it parses",
        since="",
        imports_us=True,
        find=_arguments,
    ),
    Patch(
        name="ds-config",
        why="the arguments override the ds_config's key",
        does=f"`_create_ds_config_dict` in {TRAINING} is decorated with `moc_patched.ds_config`",
        since="",
        imports_us=True,
        find=_ds_config,
    ),
    Patch(
        name="steps",
        why="an automatic snapshot of a step has the counters and the evaluation of that step; exits save every expert",
        does=f"`setup_model_and_optimizer`, `train_step` and `train` in {TRAINING} are decorated likewise",
        since="",
        imports_us=True,
        find=_steps,
    ),
    Patch(
        name="save",
        why="args, counters and generators are saved as plain data, which nobody has to unpickle",
        does=f"`save_checkpoint` in {CHECKPOINTING} is decorated with `moc_patched.save_checkpoint`",
        since="",
        imports_us=True,
        find=_save,
    ),
    Patch(
        name="load",
        why="each rank goes on with its own random generators, not with rank 0's",
        does=f"`load_checkpoint` in {CHECKPOINTING} is decorated with `moc_patched.load_checkpoint`",
        since="",
        imports_us=True,
        find=_load,
    ),
)
