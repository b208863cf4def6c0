"""What an engine must be like: checked once, before anything is touched (invariant I8)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moc_ckpt.errors import UnsupportedError

__all__ = ["OLDEST", "TESTED", "check_engine", "check_settings", "check_version", "version_tuple"]

OLDEST = (0, 17)
TESTED = (0, 19, 8)

_ENGINE_NEEDS = ("save_checkpoint", "load_checkpoint", "step", "zero_optimization_stage", "gradient_accumulation_steps")
_GROUP_NEEDS = ("_get_expert_parallel_rank", "_get_expert_data_parallel_group")


def version_tuple(text: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: `0.19.8+abc` gives (0, 19, 8)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def check_version(version: str, engine_class: type, groups: Any) -> None:
    """Refuses a DeepSpeed that lacks what the hooks need; warns once for one newer than tested.

    Raises:
        UnsupportedError: naming what is missing.
    """
    found = version_tuple(version)
    missing = [f"DeepSpeedEngine.{name}" for name in _ENGINE_NEEDS if not hasattr(engine_class, name)]
    missing += [f"deepspeed.utils.groups.{name}" for name in _GROUP_NEEDS if not hasattr(groups, name)]
    if found < OLDEST or missing:
        oldest, tested = ".".join(map(str, OLDEST)), ".".join(map(str, TESTED))
        raise UnsupportedError(
            f"DeepSpeed {version} lacks {', '.join(missing)}" if missing else f"DeepSpeed {version} is too old",
            where="the installed deepspeed package",
            fix=f"install deepspeed >= {oldest} (tested up to {tested})",
        )
    if found > TESTED:
        tested = ".".join(map(str, TESTED))
        warnings.warn(
            f"moc_ckpt was tested with DeepSpeed up to {tested}; this is {version}", RuntimeWarning, stacklevel=2
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses unsupported features by their ds_config keys, before DeepSpeed builds anything.

    Args:
        settings: the ds_config.

    Raises:
        UnsupportedError: naming every such feature.
    """
    zero = _section(settings, "zero_optimization")
    offloads = [_section(zero, "offload_optimizer"), _section(zero, "offload_param")]
    tensor_parallel = _section(settings, "tensor_parallel")
    _refuse(
        {
            "ZeRO-3": zero.get("stage") == 3,
            "ZenFlow": bool(zero.get("zenflow")),
            "NVMe offload": any(offload.get("device") == "nvme" for offload in offloads),
            "torch autocast": bool(_section(settings, "torch_autocast").get("enabled")),
            "AutoEP": bool(_section(settings, "expert_parallel").get("enabled")),
            "tensor parallelism (TP)": (tensor_parallel.get("autotp_size") or 0) > 1,
            "sequence parallelism": (settings.get("sequence_parallel_size") or 1) > 1,
            "the hybrid engine": bool(_section(settings, "hybrid_engine").get("enabled")),
            "load_universal_checkpoint": bool(_section(settings, "checkpoint").get("load_universal")),
            "checkpoint.use_node_local_storage": bool(_section(settings, "checkpoint").get("use_node_local_storage")),
        }
    )


def check_engine(engine: Any) -> None:
    """Refuses what only the built engine shows.

    Raises:
        UnsupportedError: naming every such feature that the engine uses.
    """
    _refuse({name: uses(engine) for name, uses in _UNSUPPORTED.items()})
    if engine.optimizer is None or type(engine.optimizer).__name__ == "DummyOptim":
        raise UnsupportedError(
            "the engine has no optimizer, so there is no training state to checkpoint",
            where="deepspeed.initialize",
            fix="pass an optimizer, or disable moc_checkpoint for inference",
        )
    groups = getattr(engine.optimizer, "bit16_groups", ())
    inner = getattr(engine.optimizer, "optimizer", None)
    if groups and inner is not None and len(inner.param_groups) != len(groups):
        # ZeRO makes torch.optim.Adagrad anew, out of its defaults.
        raise UnsupportedError(
            f"ZeRO has {len(groups)} param groups and its {type(inner).__name__} {len(inner.param_groups)}: "
            "DeepSpeed cannot step so",
            where="the optimizer given to deepspeed.initialize",
            fix="use another one: ZeRO keeps a single param group of torch.optim.Adagrad",
        )


def _refuse(features: Mapping[str, bool]) -> None:
    found = [name for name, used in features.items() if used]
    if found:
        raise UnsupportedError(
            f"moc_checkpoint does not support {', '.join(found)} yet",
            where="the DeepSpeed configuration and engine",
            fix='turn it off, or set "moc_checkpoint": {"enabled": false} to use DeepSpeed\'s own checkpoints',
        )


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}


def _device_of(offload: Any) -> str:
    return str(getattr(getattr(offload, "device", None), "value", getattr(offload, "device", "none")))


def _call(engine: Any, name: str) -> Any:
    method = getattr(engine, name, None)
    return method() if callable(method) else None


def _tensor_parallel(engine: Any) -> bool:
    mpu = engine.mpu
    sizes = [_call(engine, "autotp_size") or 0]
    names = ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size")
    sizes += [getattr(mpu, name)() for name in names if hasattr(mpu, name)]
    return max(sizes) > 1


def _pipeline(engine: Any) -> bool:
    mpu = engine.mpu
    stages = getattr(mpu, "get_pipeline_model_parallel_world_size", lambda: 1)() if mpu is not None else 1
    return bool(getattr(engine, "pipeline_parallelism", False)) or stages > 1


def _sequence_parallel(engine: Any) -> bool:
    return int(getattr(engine, "sequence_parallel_size", 1) or 1) > 1


def _auto_ep(engine: Any) -> bool:
    config = getattr(engine._config, "expert_parallel_config", None)
    named = any(type(module).__name__ == "AutoEPMoELayer" for module in engine.module.modules())
    return named or bool(getattr(config, "enabled", False))


def _autocast(engine: Any) -> bool:
    return bool(_call(engine, "torch_autocast_enabled"))


_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "tensor parallelism (TP)": _tensor_parallel,
    "pipeline parallelism (PP)": _pipeline,
    "sequence parallelism": _sequence_parallel,
    "ZeRO-3": lambda engine: engine.zero_optimization_stage() == 3,
    "AutoEP": _auto_ep,
    "ZenFlow": lambda engine: bool(getattr(engine, "zenflow", False)),
    "torch autocast": _autocast,
    "NVMe offload": lambda engine: _device_of(_call(engine, "zero_offload_optimizer")) == "nvme",
    "load_universal_checkpoint": lambda engine: bool(_call(engine, "load_universal_checkpoint")),
    "the hybrid engine": lambda engine: type(engine).__name__ == "DeepSpeedHybridEngine",
    "parameters on the meta device": lambda engine: any(
        isinstance(param, torch.Tensor) and param.is_meta for param in engine.module.parameters()
    ),
}
