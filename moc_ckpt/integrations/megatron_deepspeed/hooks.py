"""Where the plugin comes into Megatron-DeepSpeed's loop. Without moc_checkpoint enabled none of it does anything."""

from __future__ import annotations

import ast
import functools
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moc_ckpt.config import CONFIG_KEY
from moc_ckpt.integrations.megatron_deepspeed.arguments import add_arguments, merge
from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import (
    Concern,
    Finding,
    Machine,
    after_import,
    needed,
    not_found,
    require,
)
from moc_ckpt.integrations.megatron_deepspeed.run_state import RUN, megatron_args
from moc_ckpt.integrations.megatron_deepspeed.shims._parser import change_parser, needs_provider

__all__ = ["HOOKS"]

logger = logging.getLogger("moc_ckpt")

_TRAINING = "megatron.training"
_CHECKPOINTING = "megatron.checkpointing"
_ENGINE = "deepspeed.runtime.engine"
# What load_checkpoint reads of what save_checkpoint hands to the engine.
_KEYS = {"args", "checkpoint_version", "iteration", "tokens"}


# ------------------------------------------------------------------------------------------------ arguments, ds_config


def _find_arguments(checkout: Checkout, _: Machine) -> Finding:
    return needs_provider(checkout) or needed("--moc-* arguments")


def _install_arguments(_: Checkout) -> None:
    change_parser(add_arguments)


def _find_ds_config(checkout: Checkout, _: Machine) -> Finding:
    return require(checkout, _TRAINING, "_create_ds_config_dict") or needed(f"the key {CONFIG_KEY!r}")


def _install_ds_config(_: Checkout) -> None:
    def wrap(module: ModuleType) -> None:
        original = module._create_ds_config_dict

        @functools.wraps(original)
        def _create_ds_config_dict(*args: Any, **kwargs: Any) -> Any:
            settings = original(*args, **kwargs)
            arguments = megatron_args()
            own_signal = bool(getattr(arguments, "exit_signal_handler", False))
            section = merge(settings.get(CONFIG_KEY), arguments, save=arguments.save, own_signal=own_signal)
            if section is not None:
                settings[CONFIG_KEY] = section
            return settings

        module._create_ds_config_dict = _create_ds_config_dict  # type: ignore[attr-defined]

    after_import(_TRAINING, wrap)


# ------------------------------------------------------------------------------------------------ steps and exits


def _find_steps(checkout: Checkout, _: Machine) -> Finding:
    missing = require(checkout, _TRAINING, "setup_model_and_optimizer", "train", "train_step") or require(
        checkout, "megatron.global_vars", "get_args"
    )
    if missing is not None:
        return missing
    train = checkout.find(_TRAINING, "train")
    assert train is not None
    if "train_step" not in _called(train):
        return not_found(f"{_TRAINING}.train does not call train_step")
    return needed("snapshots once a step is counted, and full checkpoints before exits")


def _called(function: ast.AST) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {name.id for name in calls if isinstance(name, ast.Name)}


def _install_steps(_: Checkout) -> None:
    after_import(_TRAINING, _wrap_steps)


def _wrap_steps(module: ModuleType) -> None:
    setup, step, train = module.setup_model_and_optimizer, module.train_step, module.train

    @functools.wraps(setup)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        RUN.adopt(result[0][0])
        return result

    @functools.wraps(step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        # The loop has counted, evaluated and saved the step before this one.
        RUN.boundary()
        return step(*args, **kwargs)

    @functools.wraps(train)
    def wrapped_train(*args: Any, **kwargs: Any) -> Any:
        from moc_ckpt.integrations.deepspeed.preempt import PREEMPTED

        try:
            result = train(*args, **kwargs)
        except SystemExit as leaving:
            if leaving.code != PREEMPTED:  # that one has saved everything itself
                RUN.leave()
            raise
        RUN.boundary()
        return result

    module.setup_model_and_optimizer = setup_model_and_optimizer  # type: ignore[attr-defined]
    module.train_step = train_step  # type: ignore[attr-defined]
    module.train = wrapped_train  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ save and load


def _find_save(checkout: Checkout, _: Machine) -> Finding:
    missing = require(checkout, _CHECKPOINTING, "save_checkpoint")
    if missing is not None:
        return missing
    save = checkout.find(_CHECKPOINTING, "save_checkpoint")
    assert save is not None
    written = {
        target.slice.value: node.value
        for node in ast.walk(save)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant)
    }
    absent = sorted(_KEYS - set(written))
    if absent:
        return not_found(f"save_checkpoint does not save {', '.join(absent)}")
    version = written["checkpoint_version"]
    if not (isinstance(version, ast.Constant) and version.value == 3.0):
        return not_found("save_checkpoint writes another checkpoint_version than 3.0")
    return needed("client_state as plain data; the last save of a run takes every expert")


def _install_save(_: Checkout) -> None:
    after_import(_CHECKPOINTING, _wrap_save)
    after_import(_ENGINE, _wrap_engine)


def _wrap_save(module: ModuleType) -> None:
    original = module.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        engine = RUN.engine
        if engine is None or model[0] is not engine or engine.moc is None:
            return original(iteration, model, *args, **kwargs)
        RUN.boundary()
        arguments = megatron_args()
        if RUN.is_saved(arguments.save, iteration):
            if arguments.rank == 0:
                logger.info("iteration %d is saved already: %s", iteration, arguments.save)
            return None
        last = RUN.is_last_save(iteration)
        with RUN.saving(last):
            result = original(iteration, model, *args, **kwargs)
        RUN.was_saved(arguments.save, iteration, last)
        return result

    module.save_checkpoint = save_checkpoint  # type: ignore[attr-defined]


def _wrap_engine(module: ModuleType) -> None:
    """The plugin's own hook is registered first, so what is wrapped here saves through the plugin."""
    from moc_ckpt.integrations.megatron_deepspeed.plain import decode, encode, is_encoded

    engine_class = module.DeepSpeedEngine
    save, load = engine_class.save_checkpoint, engine_class.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        self: Any, save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        state = client_state if client_state is not None else {}
        moc = getattr(self, "moc", None)
        if moc is None:
            return save(self, save_dir, tag, state, *args, **kwargs)
        plain = encode(dict(state))
        if RUN.full and self is RUN.engine:
            return moc.save(save_dir, tag, plain, *args, full=True, **kwargs)
        return save(self, save_dir, tag, plain, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        path, state = load(self, *args, **kwargs)
        if isinstance(state, Mapping) and is_encoded(state):
            state = decode(state, megatron_args())
        return path, state

    engine_class.save_checkpoint = save_checkpoint
    engine_class.load_checkpoint = load_checkpoint


def _find_load(checkout: Checkout, _: Machine) -> Finding:
    missing = require(checkout, _CHECKPOINTING, "load_checkpoint")
    if missing is not None:
        return missing
    load = checkout.find(_CHECKPOINTING, "load_checkpoint")
    assert load is not None
    attributes = {node.attr for node in ast.walk(load) if isinstance(node, ast.Attribute)}
    if not {"no_load_rng", "load_checkpoint"} <= attributes:
        return not_found("load_checkpoint has no args.no_load_rng, or does not load through the engine")
    return needed("every rank's own random generators come back")


def _install_load(_: Checkout) -> None:
    after_import(_CHECKPOINTING, _wrap_load)


def _wrap_load(module: ModuleType) -> None:
    original = module.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(model: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(model[0], "moc", None) is None:
            return original(model, *args, **kwargs)
        from moc_ckpt.integrations.deepspeed.rng import capture_rng, restore_rng

        arguments = megatron_args()
        given = arguments.no_load_rng
        streams = capture_rng()
        # The engine restores each rank's generators; client_state has those of rank 0.
        arguments.no_load_rng = True
        try:
            result = original(model, *args, **kwargs)
        finally:
            arguments.no_load_rng = given
        if given or arguments.finetune:
            restore_rng(streams)
        return result

    module.load_checkpoint = load_checkpoint  # type: ignore[attr-defined]


HOOKS: tuple[Concern, ...] = (
    Concern(
        name="arguments",
        why="--moc-* arguments beside the script's own",
        since="-",
        replaces="megatron.arguments.parse_args",
        find=_find_arguments,
        install=_install_arguments,
        optional=False,
    ),
    Concern(
        name="ds-config",
        why="the arguments override the ds_config's key",
        since="-",
        replaces="megatron.training._create_ds_config_dict",
        find=_find_ds_config,
        install=_install_ds_config,
        optional=False,
    ),
    Concern(
        name="steps",
        why="an automatic snapshot of a step has the counters and the evaluation of that step; exits save every expert",
        since="-",
        replaces="megatron.training.setup_model_and_optimizer, train_step and train",
        find=_find_steps,
        install=_install_steps,
        optional=False,
    ),
    Concern(
        name="save",
        why="args, counters and generators are saved as plain data, which nobody has to unpickle",
        since="-",
        replaces="megatron.checkpointing.save_checkpoint and the engine's",
        find=_find_save,
        install=_install_save,
        optional=False,
    ),
    Concern(
        name="load",
        why="each rank goes on with its own random generators, not with rank 0's",
        since="-",
        replaces="megatron.checkpointing.load_checkpoint and the engine's",
        find=_find_load,
        install=_install_load,
        optional=False,
    ),
)
