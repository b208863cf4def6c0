"""The DeepSpeed configuration: made from the arguments, then overruled by the user's JSON file.

Where the file says something else than an argument that was given, the file wins and the conflict is named. The
arguments are then updated, so that the rest of the program agrees with the engine.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_moe.arguments import ArgumentError, resolve_batch

__all__ = ["absorb_file", "build_ds_config", "load_file"]

# (path in the file, argument)
_SHARED_KEYS = (
    (("train_micro_batch_size_per_gpu",), "micro_batch_size"),
    (("train_batch_size",), "global_batch_size"),
    (("gradient_clipping",), "clip_grad"),
    (("zero_optimization", "stage"), "zero_stage"),
    (("optimizer", "params", "lr"), "lr"),
    (("bf16", "enabled"), "bf16"),
    (("fp16", "enabled"), "fp16"),
)


def load_file(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON file; no path gives an empty configuration.

    Args:
        path: the file, or None.

    Raises:
        ArgumentError: if it cannot be read, is not a JSON object, or asks for ZeRO-3.
    """
    if path is None:
        return {}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ArgumentError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(config, dict):
        raise ArgumentError(f"--deepspeed_config {path}: expected a JSON object")
    config = _without_auto(config)
    if config.get("zero_optimization", {}).get("stage", 0) not in (0, 1, 2):
        raise ArgumentError(f"--deepspeed_config {path}: DeepSpeed's MoE layers need ZeRO stage 0, 1 or 2")
    return config


def absorb_file(args: argparse.Namespace, file_config: Mapping[str, Any], world_size: int) -> list[str]:
    """Let the file's values overrule the arguments, then settle the batch sizes.

    Args:
        args: changed in place.
        file_config: what `load_file` returned.
        world_size: the number of ranks.

    Returns:
        One sentence for each argument that was given explicitly and lost.
    """
    conflicts = []
    for keys, name in _SHARED_KEYS:
        value = _lookup(file_config, keys)
        if value is None:
            continue
        current = getattr(args, name)
        if name in args.explicit and current != value:
            conflicts.append(f"--{name.replace('_', '-')} {current} gives way to {'.'.join(keys)} {value} in the file")
        setattr(args, name, value)
    steps = file_config.get("gradient_accumulation_steps")
    if steps is not None and "train_batch_size" not in file_config:
        total = args.micro_batch_size * world_size * steps
        if "global_batch_size" in args.explicit and args.global_batch_size != total:
            conflicts.append(
                f"--global-batch-size {args.global_batch_size} gives way to {total}: gradient_accumulation_steps "
                f"{steps} x micro batch {args.micro_batch_size} x {world_size} ranks"
            )
        args.global_batch_size = total
    resolve_batch(args, world_size)
    if steps is not None and args.gradient_accumulation_steps != steps:
        raise ArgumentError(
            f"gradient_accumulation_steps {steps} contradicts global batch {args.global_batch_size} / "
            f"(micro batch {args.micro_batch_size} x {world_size} ranks) = {args.gradient_accumulation_steps}"
        )
    return conflicts


def build_ds_config(args: argparse.Namespace, file_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the engine's configuration.

    Args:
        args: settled arguments (after `absorb_file`).
        file_config: what `load_file` returned; it is merged on top, section by section.

    Returns:
        The configuration, and one sentence for each key of --moc-checkpoint that the file overrules.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "train_batch_size": args.global_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.clip_grad,
        "zero_optimization": {"stage": args.zero_stage},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if args.bf16:
        config["bf16"] = {"enabled": True}
    if args.fp16:
        config["fp16"] = {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 500}
    if args.lazarus:
        config["lazarus"] = {"optimizer_state": args.lazarus_optimizer_state}
        if args.lazarus_rebalance_interval:
            config["lazarus"] |= {
                "rebalance_interval": args.lazarus_rebalance_interval,
                "fault_threshold": args.lazarus_fault_threshold,
            }
    conflicts: list[str] = []
    if args.moc:
        # By its directory a start finds the memory of the run before.
        named = {"save_dir": args.save} if args.save else {}
        section = {"enabled": True, **named, **(args.moc_checkpoint or {})}
        in_file = file_config.get("moc_checkpoint", {})
        for key, value in (args.moc_checkpoint or {}).items():
            if key in in_file and in_file[key] != value:
                conflicts.append(f"--moc-checkpoint {key} {value} gives way to {in_file[key]} in the file")
        config["moc_checkpoint"] = section
    merged = _merge(config, file_config)
    if not args.moc:
        merged.pop("moc_checkpoint", None)
    return merged, conflicts


def _lookup(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = config
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value
