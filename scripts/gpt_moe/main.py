"""Put the parts together: arguments, process group, model, engine, checkpoint, loop."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from gpt_moe.arguments import ArgumentError, parse_args, validate
from gpt_moe.ds_config import absorb_file, build_ds_config, load_file

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train.

    Args:
        argv: the arguments; the process's own if None.
    """
    started = time.perf_counter()
    args = parse_args(argv)
    try:
        _train(args, started)
    except ArgumentError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same; one message is enough
            print(f"pretrain_gpt.py: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _train(args: argparse.Namespace, started: float) -> None:
    file_config = load_file(args.deepspeed_config)
    try:
        from gpt_moe.runtime import prepare_environment, seed_everything, start
    except ImportError as error:
        raise SystemExit(f"torch or numpy is missing: pip install 'moc_ckpt[pretrain]' ({error})") from error

    prepare_environment(args)
    runtime = start(args)
    conflicts = absorb_file(args, file_config, runtime.world_size)
    validate(args, runtime.world_size)
    runtime.check_precision(args)
    ds_config, more = build_ds_config(args, file_config)
    for conflict in [*conflicts, *more]:
        runtime.print(f" conflict: {conflict}")

    from gpt_moe.data import build_streams
    from gpt_moe.model import moe_layers
    from gpt_moe.progress import Progress, load_checkpoint
    from gpt_moe.train import Trainer

    train_data, valid_data, fingerprint = build_streams(args)
    seed_everything(args.seed, runtime.rank)
    engine, description = _build_engine(args, ds_config, runtime)
    runtime.print(description)
    runtime.print(f" data: {len(train_data)} training and {len(valid_data)} validation samples, {train_data.name}")

    progress = Progress.start(args, runtime.world_size, fingerprint)
    plugin = getattr(engine, "moc", None)
    if hasattr(plugin, "register_state"):
        plugin.register_state(progress.client_state)
    trainer = Trainer(engine, args, runtime, progress, (train_data, valid_data), moe_layers(engine.module))
    seed_everything(args.seed, runtime.rank)
    load_checkpoint(engine, args, progress, runtime)  # nothing may draw random numbers from here to the first step
    runtime.print(f" start-up took {time.perf_counter() - started:.1f} s")
    trainer.run()
    if hasattr(plugin, "wait"):
        plugin.wait()
    _leave()


def _build_engine(args: argparse.Namespace, ds_config: dict[str, Any], runtime: Any) -> tuple[Any, str]:
    """Build model, optimizer and engine; return the engine and a description for the log."""
    import deepspeed

    from gpt_moe.data import vocabulary
    from gpt_moe.model import build_model, moe_layers, parameter_counts
    from gpt_moe.optimizer import build_optimizer, build_schedule, parameter_groups
    from gpt_moe.runtime import quiet

    with quiet(not args.verbose):
        swap = bool(ds_config.get("use_data_before_expert_parallelism", False))
        model = build_model(args, vocabulary(args), runtime.device, swap)
        total, in_experts = parameter_counts(model, args.num_experts)
        groups = parameter_groups(model, args.weight_decay)
        optimizer, optimizer_name = build_optimizer(args, groups, ds_config, runtime.device)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=None if optimizer else groups,
            lr_scheduler=build_schedule(args, ds_config),
            config=ds_config,
        )
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    experts = f"EP {args.moe_expert_parallel_size}"
    if args.lazarus:
        experts = f"{args.lazarus_slots} expert slots per rank ({args.lazarus_optimizer_state} state)"
    description = (
        f" model: {args.num_layers} layers, hidden {args.hidden_size}, {len(moe_layers(model))} MoE layers x "
        f"{args.num_experts} experts, {total:,} parameters ({in_experts:,} in experts)\n"
        f" run: {runtime.world_size} ranks on {runtime.device.type}, {experts}, "
        f"ZeRO-{args.zero_stage}, {precision}, {optimizer_name}, global batch {args.global_batch_size} = "
        f"{args.micro_batch_size} x {runtime.world_size} ranks x {args.gradient_accumulation_steps}, checkpoints by "
        f"{'moc_ckpt' if getattr(engine, 'moc', None) is not None else 'DeepSpeed'}"
    )
    notes = [f"\n lazarus: {note}" for note in args.lazarus_notes] if args.lazarus else []
    return engine, description + "".join(notes)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
