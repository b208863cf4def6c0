"""Hooks into DeepSpeedEngine: five methods are wrapped, nothing else changes.

An engine whose ds_config lacks the key, or says `enabled: false`, runs DeepSpeed's own code, except that experts with
replicas (LazarusMoE) are trained as `lazarus` has it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moc_ckpt.config import MocConfig, find_config
from moc_ckpt.errors import UnsupportedError

__all__ = ["install", "log_to_stderr"]

_MARK = "_moc_ckpt_wrapped"


def install(module: ModuleType) -> None:
    """Wraps `DeepSpeedEngine` in `deepspeed.runtime.engine`; doing it again changes nothing."""
    engine_class = module.DeepSpeedEngine
    if getattr(engine_class, _MARK, False):
        return
    setattr(engine_class, _MARK, True)
    _wrap_init(engine_class)
    _wrap_method(engine_class, "save_checkpoint", "save")
    _wrap_method(engine_class, "load_checkpoint", "load")
    _wrap_step(engine_class)
    _wrap_destroy(engine_class)


def _wrap_init(engine_class: type) -> None:
    original = engine_class.__init__  # type: ignore[misc]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        settings = _settings(args, kwargs)
        config = find_config(settings)
        self.moc = self.lazarus = None
        if config.enabled:
            _preflight(engine_class, self, settings)
        bound = signature.bind(self, *args, **kwargs)
        prepared = _prepare_replicas(bound.arguments, settings)
        if prepared is None:
            original(self, *args, **kwargs)
        else:
            with prepared.building():
                original(*bound.args, **bound.kwargs)
            self.lazarus = prepared.attach(self)
        if config.enabled:
            self.moc = _attach(self, config)

    engine_class.__init__ = __init__  # type: ignore[misc]


def _wrap_method(engine_class: type, name: str, ours: str) -> None:
    original = getattr(engine_class, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        moc = getattr(self, "moc", None)
        if moc is not None:
            return getattr(moc, ours)(*args, **kwargs)
        if getattr(self, "lazarus", None) is not None:
            raise UnsupportedError(
                "DeepSpeed's own checkpoints do not know experts with replicas",
                where=f"engine.{name}",
                fix='set "moc_checkpoint": {"enabled": true}',
            )
        return original(self, *args, **kwargs)

    setattr(engine_class, name, method)


def _wrap_step(engine_class: type) -> None:
    original = engine_class.step  # type: ignore[attr-defined]

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        moc, lazarus = getattr(self, "moc", None), getattr(self, "lazarus", None)
        if moc is None:
            return original(self, *args, **kwargs)
        steps, skipped = self.global_steps, self.skipped_steps
        result = original(self, *args, **kwargs)
        if lazarus is not None:
            lazarus.follow()  # a snapshot has the options as schedules left them
        if self.global_steps != steps:
            moc.step_done(skipped=self.skipped_steps != skipped)
            if lazarus is not None:
                lazarus.step_done()
        return result

    engine_class.step = step  # type: ignore[attr-defined]


def _wrap_destroy(engine_class: type) -> None:
    original = engine_class.destroy  # type: ignore[attr-defined]

    @functools.wraps(original)
    def destroy(self: Any, *args: Any, **kwargs: Any) -> Any:
        for part in (getattr(self, "lazarus", None), getattr(self, "moc", None)):
            if part is not None:
                part.close()
        return original(self, *args, **kwargs)

    engine_class.destroy = destroy  # type: ignore[attr-defined]


def _settings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the ds_config of an engine that is about to be built."""
    config_class = kwargs.get("config_class")
    settings = getattr(config_class, "_param_dict", None)
    if settings is None:
        settings = kwargs.get("config")
    return settings if isinstance(settings, Mapping) else {}


def _preflight(engine_class: type, engine: Any, settings: Mapping[str, Any]) -> None:
    import deepspeed
    from deepspeed.utils import groups

    from moc_ckpt.integrations.deepspeed.preflight import check_settings, check_version

    check_version(deepspeed.__version__, engine_class, groups)
    check_settings(settings)
    if "Pipeline" in type(engine).__name__:
        raise UnsupportedError(
            "moc_checkpoint does not support pipeline parallelism (PP) yet",
            where=f"engine class {type(engine).__name__}",
            fix='set "moc_checkpoint": {"enabled": false}, or train without pipeline stages',
        )


def _prepare_replicas(arguments: dict[str, Any], settings: Mapping[str, Any]) -> Any:
    """Returns what a model with replicas needs; None for one without."""
    # A model that has such layers has imported them.
    if "moc_ckpt.lazarus.layer" not in sys.modules:
        return None
    from moc_ckpt.integrations.deepspeed.lazarus import prepare

    return prepare(arguments, settings)


def _attach(engine: Any, config: MocConfig) -> Any:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

    log_to_stderr()
    return MocCheckpoint(engine, config)


def log_to_stderr() -> None:
    """Shows this package's events where the program has set up no logging of its own."""
    logger = logging.getLogger("moc_ckpt")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[moc_ckpt] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
