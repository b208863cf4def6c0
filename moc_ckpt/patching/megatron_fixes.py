"""Patches of Megatron-DeepSpeed that clear what keeps it from running on current versions; one per launcher's shim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import libcst as cst
from libcst import matchers as m

from moc_ckpt.patching.marks import Hunk
from moc_ckpt.patching.megatron_hooks import ARGUMENTS, CALLS, CHECKPOINTING, TRAINING, decorated, parser_of
from moc_ckpt.patching.patch import Missing, NotNeeded, Patch
from moc_ckpt.patching.source import Source, text_of

if TYPE_CHECKING:
    from moc_ckpt.patching.tree import Tree

__all__ = ["FIXES"]

Hunks = Mapping[str, tuple[Hunk, ...]]

_INITIALIZE = "megatron/initialize.py"
_KERNELS = "megatron/fused_kernels/__init__.py"
_LANGUAGE = "megatron/model/language_model.py"
_PACKAGE = "megatron/__init__.py"
_SAMPLERS = "megatron/data/data_samplers.py"
_TRANSFORMER = "megatron/model/transformer.py"
_UTILS = "megatron/utils.py"

# What the stand-ins for apex cover, and the modules that a language model does not import.
_COVERED = {"apex.optimizers", "apex.normalization", "apex.normalization.fused_layer_norm", "apex.multi_tensor_apply"}
_OPTIONAL = {"apex.contrib.layer_norm.layer_norm"}  # imported in a try statement
_ELSEWHERE = "megatron/model/vision/"


def _device_count(tree: Tree) -> Hunks:
    source = tree.source(_INITIALIZE)
    found = [source.find(name) for name in ("_initialize_distributed", "initialize_megatron")]
    functions = [function for function in found if function] or [source.require("_initialize_distributed")]
    for function in functions:
        calls = function.findall(m.Call(func=m.Attribute(attr=m.Name("device_count")), args=[]))
        # torch.cuda's would not be one.
        of_accelerator = [call for call in calls if isinstance(_owner(call), cst.Call)]
        if of_accelerator:
            break
    else:
        raise NotNeeded("initialize_megatron counts no devices of DeepSpeed's accelerator")
    first = min(of_accelerator, key=lambda call: source.first(function.top(call)))
    accelerator = source.code(_owner(first), function=function.name)
    lines = (
        "import os as moc_os",
        f'if {accelerator}.device_name() == "cpu" and "LOCAL_WORLD_SIZE" in moc_os.environ:',
        '\tmoc_os.environ.setdefault("LOCAL_SIZE", moc_os.environ["LOCAL_WORLD_SIZE"])',
    )
    return {_INITIALIZE: (source.before("device-count", function.top(first), *lines),)}


def _owner(call: cst.CSTNode) -> cst.CSTNode:
    assert isinstance(call, cst.Call) and isinstance(call.func, cst.Attribute)
    return call.func.value


def _apex(tree: Tree) -> Hunks:
    used: dict[str, str] = {}
    for file in sorted({*tree.files("megatron", b"apex"), *tree.files("megatron", b"amp_C")}):
        if not file.startswith(_ELSEWHERE):
            names = {name for name, _ in tree.source(file).imports()}
            used |= {name: file for name in names if name.split(".")[0] in ("apex", "amp_C")}
    if not used:
        raise NotNeeded("nothing imports apex")
    beyond = sorted(set(used) - _COVERED - _OPTIONAL - {"amp_C"})
    if beyond:
        raise Missing(used[beyond[0]], "", f"no import of {beyond[0]}, which has no stand-in")
    source = tree.source(_PACKAGE)
    for statement in source.module.body:
        if m.matches(statement, m.SimpleStatementLine(body=[m.Import() | m.ImportFrom()])):
            names = {text_of(node.module) for node in m.findall(statement, m.ImportFrom(module=m.Name("__future__")))}  # type: ignore[attr-defined]
            if not names:
                return {_PACKAGE: (source.before("apex", statement, CALLS, "moc_patched.apex()"),)}
    raise Missing(_PACKAGE, "", "an import")


def _fused_kernels(tree: Tree) -> Hunks:
    source = tree.source(_KERNELS)
    function = source.require("load")
    if not function.parameters:
        raise function.missing("a parameter, the arguments")
    args = function.parameters[0]
    helpers = function.findall(m.FunctionDef())
    names = {node.name.value for node in helpers if isinstance(node, cst.FunctionDef)}
    asked = m.If(test=m.Attribute(value=m.Name(args), attr=m.Name("masked_softmax_fusion")))
    inside = {
        id(call)
        for node in function.findall(asked)
        for call in m.findall(node.body, m.Call(func=m.Name()))  # type: ignore[attr-defined]
    }
    # Kernels are built by a function of its own, or straight away; older trees have some that cannot be switched off.
    shape = m.Call(func=m.Name()) | m.Call(func=m.Attribute(attr=m.Name("load")))
    for call in function.findall(shape):
        assert isinstance(call, cst.Call)
        is_helper = not isinstance(call.func, cst.Name) or call.func.value in names
        if is_helper and id(call) not in inside and source.function_of(call) is function.node:
            raise function.missing(f"kernels built only under `if {args}.masked_softmax_fusion`")
    start = function.start()
    if m.matches(start, m.If(test=m.UnaryOperation(operator=m.Not(), expression=asked.test))):
        raise NotNeeded("load compiles nothing that is not asked for")
    lines = (f"if not {args}.masked_softmax_fusion:", "\treturn")
    return {_KERNELS: (source.before("fused-kernels", start, *lines),)}


def _needs_options(source: Source, options: Mapping[str, str]) -> list[str]:
    """Returns which attributes the options set that there are.

    Args:
        source: the file that declares them.
        options: attributes by option string.

    Raises:
        NotNeeded: if there is none of them.
        Missing: if one sets another attribute.
    """
    found = []
    for call in m.findall(source.module, m.Call(func=m.Attribute(attr=m.Name("add_argument")))):
        assert isinstance(call, cst.Call)
        values = [arg.value.evaluated_value for arg in call.args if isinstance(arg.value, cst.SimpleString)]
        for flag, dest in options.items():
            if flag in values:
                # argparse names an attribute by the option unless it is told.
                if dest not in values and dest != flag.lstrip("-").replace("-", "_"):
                    raise Missing(source.file, "", f"{flag} with dest={dest!r}")
                found.append(dest)
    if not found:
        raise NotNeeded(f"there is no {' and no '.join(options)}")
    return sorted(found)


def _softmax_fusion(tree: Tree) -> Hunks:
    source = tree.source(ARGUMENTS)
    _needs_options(source, {"--no-masked-softmax-fusion": "masked_softmax_fusion"})
    statement, parser = parser_of(source)
    name = "masked-softmax-fusion"
    return {ARGUMENTS: (source.before(name, statement, CALLS, f"moc_patched.masked_softmax_fusion({parser})"),)}


def _accumulation_fusion(tree: Tree) -> Hunks:
    source = tree.source(ARGUMENTS)
    _needs_options(source, {"--no-gradient-accumulation-fusion": "gradient_accumulation_fusion"})
    statement, parser = parser_of(source)
    lines = (
        "from importlib.util import find_spec as moc_find_spec",
        'if moc_find_spec("fused_weight_gradient_mlp_cuda") is None:',
        f"\t{parser}.set_defaults(gradient_accumulation_fusion=False)",
    )
    return {ARGUMENTS: (source.before("gradient-accumulation-fusion", statement, *lines),)}


def _scripted_fusion(tree: Tree) -> Hunks:
    source = tree.source(ARGUMENTS)
    options = {"--no-bias-dropout-fusion": "bias_dropout_fusion", "--no-bias-gelu-fusion": "bias_gelu_fusion"}
    found = _needs_options(source, options)
    statement, parser = parser_of(source)
    lines = (
        "from deepspeed.accelerator import get_accelerator as moc_accelerator",
        'if moc_accelerator().device_name() != "cuda":',
        f"\t{parser}.set_defaults({', '.join(f'{dest}=False' for dest in found)})",
    )
    return {ARGUMENTS: (source.before("scripted-fusion", statement, *lines),)}


def _late_import(patch: str, tree: Tree, module: str) -> Hunks:
    """Moves an import of a module from the top of training.py to where its names are used."""
    source = tree.source(TRAINING)
    body = source.module.body
    at_top = [node for name, node in source.imports() if name == module and source.statement(node) in body]
    if not at_top:
        raise NotNeeded(f"{TRAINING} does not import {module} at its top")
    hunks: dict[int, Hunk] = {}
    needed: dict[cst.CSTNode, list[str]] = {}
    for node in at_top:
        statement = source.statement(node)
        if not isinstance(node, cst.ImportFrom) or isinstance(node.names, cst.ImportStar):
            raise Missing(TRAINING, "", f"`from {module} import` with names")
        if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
            raise Missing(TRAINING, "", f"the import of {module} on a line of its own")
        for alias in node.names:
            called = text_of(alias.asname.name) if alias.asname else text_of(alias.name)
            text = text_of(alias.name) + (f" as {called}" if alias.asname else "")
            for use in m.findall(source.module, m.Name(called)):
                place = source.statement(use)
                if place is statement or _is_label(source, use):
                    continue
                if place in body:
                    raise Missing(TRAINING, "", f"{called} to be used in functions only")
                if text not in needed.setdefault(place, []):
                    needed[place].append(text)
        hunks[source.first(statement)] = source.commented(patch, statement)
    for place, names in needed.items():
        hunks[source.first(place)] = source.before(patch, place, f"from {module} import {', '.join(names)}")
    return {TRAINING: tuple(hunks[at] for at in sorted(hunks))}


def _is_label(source: Source, name: cst.CSTNode) -> bool:
    """Tells whether a name is an attribute or the keyword of an argument."""
    parent = source.parent(name)
    return (isinstance(parent, cst.Attribute) and parent.attr is name) or (
        isinstance(parent, cst.Arg) and parent.keyword is name
    )


def _vision(tree: Tree) -> Hunks:
    return _late_import("vision-import", tree, "megatron.model.vision.knn_monitor")


def _compression(tree: Tree) -> Hunks:
    return _late_import("compression-import", tree, "deepspeed.compression.compress")


def _attention_view(tree: Tree) -> Hunks:
    source = tree.source(_TRANSFORMER)
    function = source.require("CoreAttention.forward")
    inputs = function.parameters[1:4]
    views = function.findall(m.Call(func=m.Attribute(value=m.Name(), attr=m.Name("view"))))
    viewed = {owner.value for owner in map(_owner, views) if isinstance(owner, cst.Name)}
    if not viewed.intersection(inputs):
        raise NotNeeded("CoreAttention.forward takes no view of its inputs")
    line = f"{', '.join(inputs)} = {', '.join(f'{name}.contiguous()' for name in inputs)}"
    return {_TRANSFORMER: (source.before("attention-view", function.start(), line),)}


def _loader_rng(tree: Tree) -> Hunks:
    iterators = tree.source(TRAINING).require("build_train_valid_test_data_iterators")
    loader = tree.source(_SAMPLERS).require("build_pretraining_data_loader")
    if not loader.findall(m.Call(func=m.Name("DataLoader") | m.Attribute(attr=m.Name("DataLoader")))):
        raise loader.missing("a DataLoader")
    return {
        TRAINING: (decorated("loader-rng", iterators, iterators.name),),
        _SAMPLERS: (decorated("loader-rng", loader, loader.name),),
    }


def _kill_switch(tree: Tree) -> Hunks:
    _needs_options(tree.source(ARGUMENTS), {"--kill-switch-file": "kill_switch_file"})
    function = tree.source(_UTILS).require("found_kill_switch")
    together = ("all_gather", "all_gather_object", "all_reduce", "broadcast", "broadcast_object_list")
    if function.findall(m.Call(func=m.Attribute(attr=m.OneOf(*map(m.Name, together))))):
        raise NotNeeded("the ranks look together")
    return {_UTILS: (decorated("kill-switch", function, function.name),)}


def _universal_info(tree: Tree) -> Hunks:
    source = tree.source(CHECKPOINTING)
    function = source.require("save_checkpoint")
    if source.find("_universal_checkpoint_info") is None:
        raise NotNeeded(f"{CHECKPOINTING} writes no universal_checkpoint_info")
    shape = m.Call(
        func=m.Attribute(attr=m.Name("save_checkpoint")),
        args=[m.ZeroOrMore(), m.Arg(keyword=m.Name("client_state")), m.ZeroOrMore()],
    )
    found = function.findall(m.SimpleStatementLine(body=[m.Expr(shape)]))
    if len(found) != 1:
        raise function.missing("one statement that saves through the engine, with client_state")
    call = m.findall(found[0], shape)[0]
    engine = source.code(_owner(call), function=function.name)
    states = [arg.value for arg in call.args if arg.keyword and arg.keyword.value == "client_state"]  # type: ignore[attr-defined]
    key = _universal_key(function.findall(m.Assign(value=m.Call(func=m.Name("_universal_checkpoint_info")))))
    if not isinstance(states[0], cst.Name) or key is None:
        raise function.missing("client_state in a variable, with the result of _universal_checkpoint_info in it")
    state, key_code = states[0].value, source.code(key, function=function.name)
    numbers = '[int(part) for part in moc_deepspeed.__version__.split("+")[0].split(".")[:3]]'
    before = (
        "import deepspeed as moc_deepspeed",
        f'moc_reserved = getattr({engine}, "moc", None) is None and {numbers} >= [0, 19, 2]',
        f"if moc_reserved and {key_code} in {state}:",
        f"\tvars({engine}.module)[{key_code}] = {state}.pop({key_code})",
    )
    after = ("if moc_reserved:", f"\tvars({engine}.module).pop({key_code}, None)")
    name = "universal-checkpoint-info"
    return {
        CHECKPOINTING: (
            source.before(name, found[0], *before),
            source.after(name, found[0], *after, function=function.name),
        )
    }


def _universal_key(assignments: list[cst.CSTNode]) -> cst.CSTNode | None:
    for node in assignments:
        assert isinstance(node, cst.Assign)
        target = node.targets[0].target
        if isinstance(target, cst.Subscript) and isinstance(target.slice[0].slice, cst.Index):
            return target.slice[0].slice.value
    return None


def _expert_keys(tree: Tree) -> Hunks:
    source = tree.source(_LANGUAGE)
    function = source.require("TransformerLanguageModel.state_dict_for_save_checkpoint")
    hunks = []
    target = m.Subscript(value=m.Name("moe_state_dict"), slice=[m.SubscriptElement(m.Index())])
    assignments = function.findall(m.Assign(targets=[m.AssignTarget(target)]))
    if not assignments:
        raise function.missing("experts put into moe_state_dict")
    for node in assignments:
        key = node.targets[0].target.slice[0].slice.value  # type: ignore[attr-defined]
        code = source.code(key, function=function.name)
        if "language_model" in code:
            raise NotNeeded("experts are named by their modules")
        shape = m.BinaryOperation(left=m.Attribute(), operator=m.Add(), right=m.Name())
        statement = source.statement(node)
        if not m.matches(key, shape) or not isinstance(statement, cst.SimpleStatementLine):
            raise function.missing("a key that is an attribute plus a variable")
        left, right = source.code(key.left), source.code(key.right)
        line = f'moe_state_dict["language_model." + {left} + "." + {right}] = moe_state_dict.pop({code})'
        hunks.append(source.after("expert-keys", statement, line, function=function.name))
    return {_LANGUAGE: tuple(hunks)}


FIXES = (
    Patch(
        name="device-count",
        why="on CPUs the local rank is taken modulo the number of NUMA nodes, and initialize_megatron refuses that",
        does=f"`_initialize_distributed` in {_INITIALIZE} sets LOCAL_SIZE to torchrun's LOCAL_WORLD_SIZE on a CPU, "
        "unless it is set",
        since="DeepSpeed 0.9 (CPU accelerator)",
        imports_us=False,
        find=_device_count,
    ),
    Patch(
        name="apex",
        why="on CUDA apex and amp_C are imported unconditionally",
        does=f"{_PACKAGE} calls `moc_patched.apex` before it imports anything: on CUDA, where apex is not installed, "
        "torch's AdamW, layer_norm and foreach functions stand in",
        since="all versions",
        imports_us=True,
        find=_apex,
    ),
    Patch(
        name="fused-kernels",
        why="initialize_megatron runs nvcc also where no kernel is asked for",
        does=f"`load` in {_KERNELS} returns at once unless --masked-softmax-fusion is on",
        since="CUDA 13, or any machine without nvcc",
        imports_us=False,
        find=_fused_kernels,
    ),
    Patch(
        name="masked-softmax-fusion",
        why="with --bf16 or --fp16 the attention imports a compiled softmax unless --no-masked-softmax-fusion is given",
        does=f"`parse_args` in {ARGUMENTS} calls `moc_patched.masked_softmax_fusion`, which makes the option's default "
        "off where the kernels cannot be compiled",
        since="Megatron-DeepSpeed of January 2021",
        imports_us=True,
        find=_softmax_fusion,
    ),
    Patch(
        name="gradient-accumulation-fusion",
        why="the linear layers refuse to be built without apex unless --no-gradient-accumulation-fusion is given",
        does=f"`parse_args` in {ARGUMENTS} makes the option's default off where apex's extension is not installed",
        since="Megatron-DeepSpeed of February 2022",
        imports_us=False,
        find=_accumulation_fusion,
    ),
    Patch(
        name="vision-import",
        why="megatron.training imports a vision module, which needs torchvision, also for language models",
        does=f"the import of megatron.model.vision.knn_monitor in {TRAINING} moves to where its names are used",
        since="Megatron-DeepSpeed of January 2022",
        imports_us=False,
        find=_vision,
    ),
    Patch(
        name="compression-import",
        why="megatron.training imports deepspeed.compression.compress, which is gone",
        does=f"that import in {TRAINING} moves to where its names are used",
        since="DeepSpeed 0.19.7",
        imports_us=False,
        find=_compression,
    ),
    Patch(
        name="attention-view",
        why="with a micro-batch above 1 and without flash attention the first step dies in view()",
        does=f"`CoreAttention.forward` in {_TRANSFORMER} makes its inputs contiguous",
        since="Megatron-DeepSpeed of December 2024, where query, key and value are slices of one tensor",
        imports_us=False,
        find=_attention_view,
    ),
    Patch(
        name="loader-rng",
        why="iter(DataLoader) draws from the CPU generator after a checkpoint has restored it, so a resumed run with "
        "dropout on a CPU leaves the uninterrupted one",
        does=f"`build_pretraining_data_loader` in {_SAMPLERS}, decorated, gives its loaders generators of their "
        f"own; `build_train_valid_test_data_iterators` in {TRAINING} leaves all generators as they were",
        since="all versions",
        imports_us=True,
        find=_loader_rng,
    ),
    Patch(
        name="kill-switch",
        why="a kill switch that appears after some ranks have looked ends the others only; those that train on hang "
        "or die",
        does=f"`found_kill_switch` in {_UTILS}, decorated, tells what any rank found (one number per step, only with "
        "--kill-switch-file)",
        since="all versions with --kill-switch-file",
        imports_us=True,
        find=_kill_switch,
    ),
    Patch(
        name="scripted-fusion",
        why="TorchScript computes the first calls of a function in another way than later ones, so the first steps of "
        "a process that resumes on a CPU are not those of the one that goes on",
        does=f"`parse_args` in {ARGUMENTS} makes --no-bias-dropout-fusion and --no-bias-gelu-fusion the default on "
        "anything but CUDA",
        since="PyTorch 1.10",
        imports_us=False,
        find=_scripted_fusion,
    ),
    Patch(
        name="universal-checkpoint-info",
        why="DeepSpeed's own save_checkpoint raises: the key universal_checkpoint_info is reserved, and it takes the "
        "module's method of that name for a dict",
        does=f"`save_checkpoint` in {CHECKPOINTING} hands the key over as an attribute of the module while the engine "
        "saves; saves of moc_ckpt do not need it",
        since="DeepSpeed 0.19.2",
        imports_us=False,
        find=_universal_info,
    ),
    Patch(
        name="expert-keys",
        why="DeepSpeed's own checkpoints hold rank 0's experts twice, and loading them dies",
        does=f"`TransformerLanguageModel.state_dict_for_save_checkpoint` in {_LANGUAGE} names experts by the language "
        "model they belong to; saves of moc_ckpt do not need it",
        since="DeepSpeed 0.19.2",
        imports_us=False,
        find=_expert_keys,
    ),
)
