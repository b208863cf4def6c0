"""A real training: an engine over an MoE model, and one step of it at a time."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Training", "pick_model"]

_SCRIPTS = Path(__file__).resolve().parents[2]


def pick_model(wanted: str) -> str:
    """Returns `gpt` (scripts/gpt_moe, needs megatron-core) or `blocks` (attention and MoE layers alone)."""
    if wanted != "auto":
        return wanted
    return "gpt" if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core") else "blocks"


class Training:
    """One rank's engine. Building it is collective, and so is a step.

    Attributes:
        engine: the DeepSpeed engine; its `moc` is None: the arms attach what they need.
        cuda: on a GPU.
        model: gpt or blocks.
        parameters: of the whole model, every expert once.
        state_bytes: of optimizer state (master, moments) that this rank holds.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        import moc_ckpt  # noqa: F401  (hooks itself into deepspeed, so that engine.moc exists)

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.basicConfig(format="           %(message)s")
        logging.getLogger("moc_ckpt").setLevel(logging.INFO)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        self.model = pick_model(arguments.model)
        # Libraries print; stdout is for the report alone.
        with contextlib.redirect_stdout(sys.stderr):
            if not dist.is_initialized():
                deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
            build = _build_gpt if self.model == "gpt" else _build_blocks
            self.engine, self._train = build(arguments)
        self.parameters = sum(
            p.numel() * (1 if getattr(p, "allreduce", True) else arguments.ep) for p in self.engine.module.parameters()
        )
        self.step()
        self.state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    @property
    def basic_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that updates the masters."""
        found = self.engine.optimizer
        return getattr(found, "optimizer", found)

    def step(self) -> None:
        """Trains one step."""
        self._train()

    def timed_step(self) -> Callable[[], float]:
        """Trains one step; the returned function gives its seconds, once the device has done it."""
        if not self.cuda:
            begin = time.perf_counter()
            self.step()
            seconds = time.perf_counter() - begin
            return lambda: seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self.step()
        last.record()
        return lambda: first.elapsed_time(last) / 1e3

    def synchronize(self) -> None:
        """Waits for all steps; not for copies beside them."""
        if self.cuda:
            torch.cuda.current_stream().synchronize()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the optimizer state that this rank owns: masters and moments, by a name of its own.

        Under ZeRO-1 and 2 these are a few large flat partitions, and the weights are their casts.
        """
        optimizer, rank = self.basic_optimizer, dist.get_rank()
        found = {}
        for group_number, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                name = f"rank{rank}.group{group_number}.{number}"
                found[f"{name}.master"] = parameter.detach()
                for key, value in optimizer.state[parameter].items():
                    if isinstance(value, torch.Tensor) and value.dim():
                        found[f"{name}.{key}"] = value
        return found


def _build_gpt(arguments: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    sys.path.insert(0, str(_SCRIPTS))
    from gpt_moe.arguments import parse_args, validate
    from gpt_moe.data import build_streams
    from gpt_moe.ds_config import absorb_file, build_ds_config
    from gpt_moe.main import _build_engine
    from gpt_moe.model import moe_layers
    from gpt_moe.progress import Progress
    from gpt_moe.runtime import prepare_environment, seed_everything, start
    from gpt_moe.train import Trainer

    class OneStep(Trainer):
        def step(self) -> None:
            self._iteration()

    given = {
        "num-layers": arguments.layers,
        "hidden-size": arguments.hidden,
        "num-attention-heads": max(1, arguments.hidden // 64),
        "seq-length": arguments.seq,
        "num-experts": arguments.experts,
        "moe-expert-parallel-size": arguments.ep,
        "expert-interval": arguments.expert_interval,
        "topk": arguments.top_k,
        "micro-batch-size": arguments.micro_batch,
        "global-batch-size": arguments.micro_batch * arguments.gas * dist.get_world_size()
        if dist.is_initialized()
        else None,
        "zero-stage": arguments.stage,
        "lr": 1e-5,
        "train-iters": 10**9,
    }
    args = parse_args([text for key, value in given.items() if value is not None for text in (f"--{key}", str(value))])
    args.moc, args.bf16 = False, arguments.dtype == "bf16"
    prepare_environment(args)
    runtime = start(args)
    absorb_file(args, {}, runtime.world_size)
    validate(args, runtime.world_size)
    ds_config, _ = build_ds_config(args, {})
    train_data, valid_data, fingerprint = build_streams(args)
    seed_everything(args.seed, runtime.rank)
    engine, _ = _build_engine(args, ds_config, runtime)
    progress = Progress.start(args, runtime.world_size, fingerprint)
    trainer = OneStep(engine, args, runtime, progress, (train_data, valid_data), moe_layers(engine.module))
    engine.train()
    return engine, trainer.step


def _build_blocks(arguments: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    hidden, heads = arguments.hidden, max(1, arguments.hidden // 64)

    def mlp() -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(hidden, 4 * hidden), torch.nn.GELU(), torch.nn.Linear(4 * hidden, hidden)
        )

    class Block(torch.nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(hidden), torch.nn.LayerNorm(hidden)
            self.qkv, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden)
            self.sparse = sparse
            self.mlp = (
                MoE(hidden, mlp(), num_experts=arguments.experts, ep_size=arguments.ep, k=arguments.top_k)
                if sparse
                else mlp()
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            size = x.shape
            q, k, v = (part.view(*size[:2], heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(size))
            if not self.sparse:
                return x + self.mlp(self.norm2(x)), x.new_zeros(())
            y, aux, _ = self.mlp(self.norm2(x))
            return x + y, aux

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                Block(number % arguments.expert_interval == 0) for number in range(1, arguments.layers + 1)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = 0.0
            for block in self.blocks:
                x, aux = block(x)
                total = total + aux
            return x.float().pow(2).mean() + 0.01 * total

    torch.manual_seed(0)
    with torch.device(get_accelerator().current_device_name()):
        model = Model()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "params"}
    )
    config = {
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "zero_optimization": {"stage": arguments.stage},
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
    generator = torch.Generator(device=engine.device).manual_seed(dist.get_rank())
    shape = (arguments.micro_batch, arguments.seq, hidden)
    batch = torch.randn(shape, generator=generator, device=engine.device, dtype=next(engine.module.parameters()).dtype)

    def train() -> None:
        for _ in range(arguments.gas):
            engine.backward(engine(batch))
            engine.step()

    return engine, train
