"""Tiny but nasty MoE models and the engine configurations that they are trained under.

Everything that has broken a checkpoint somewhere is in the model: odd sizes, an empty parameter, frozen
parameters (dense and in the experts), tied weights, buffers that change in forward and differ by rank,
an integer counter, a buffer outside the state dict, several parameter groups, layers of different
expert-parallel sizes, noisy gates, random token selection, dropout, and Python's and numpy's generators
used in forward, so that anything that is not restored shows in the losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any

VOCAB, HIDDEN, FFN, SEQ = 23, 12, 7, 6
#: Samples per micro-step over all ranks; divisible by every world size that is tested.
GLOBAL_MICRO = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    """One MoE layer."""

    experts: int = 4
    ep: int = 2
    k: int = 1
    residual: bool = False
    noise: str | None = "RSample"


@dataclasses.dataclass(frozen=True)
class Row:
    """One model under one engine configuration."""

    name: str
    world: int = 4
    stage: int = 2
    dtype: str = "bf16"
    layers: tuple[Layer, ...] = (Layer(ep=2), Layer(ep=4, k=2), Layer(ep=1, residual=True))
    gas: int = 1
    clip: float = 0.5
    #: torch_adamw, cpu_adam, fused: DeepSpeed makes it. client_{adamw,adam,amsgrad,adagrad,sgd,plain_sgd}: the caller.
    optimizer: str = "torch_adamw"
    scheduler: str = "warmup"  # warmup | lambda | none
    hidden: int = HIDDEN
    ffn: int = FFN
    dropout: float = 0.1
    groups: int = 3
    tied: bool = True
    frozen: bool = True
    rank_buffers: bool = True
    empty: bool = True
    extra_layer: bool = False
    expert_bias_extra: bool = False
    dense_name: str = "dense"
    odd: int = 3
    #: Parameters whose names start with one of these are frozen as well.
    freeze: tuple[str, ...] = ()
    zero: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()
    #: Steps (by engine.global_steps) whose gradients overflow, so that fp16 skips them.
    poison: tuple[int, ...] = ()

    def with_model(self, **changes: Any) -> Row:
        return dataclasses.replace(self, **changes)


def _rows() -> dict[str, Row]:
    ep2 = (Layer(ep=2), Layer(ep=2, k=2))
    rows = [
        Row("z2_bf16", gas=2),
        Row("z1_bf16", stage=1, layers=ep2),
        Row("z2_fp32", dtype="fp32", scheduler="lambda"),
        Row("z1_fp32", stage=1, dtype="fp32", layers=ep2, clip=0.0, gas=2),
        Row("z1_bf16_fp32acc", stage=1, gas=2, config=(("data_types", {"grad_accum_dtype": "fp32"}),)),
        Row("z0_bf16", stage=0, gas=2),
        Row("z0_fp32", stage=0, dtype="fp32", gas=2),
        Row("z2_bf16_round_robin", zero=(("round_robin_gradients", True),)),
        Row("z2_bf16_aligned", zero=(("parameter_alignment", True),), layers=ep2),
        Row("z2_bf16_client_adamw", optimizer="client_adamw", scheduler="lambda", layers=ep2),
        Row("z1_fp32_amsgrad", stage=1, dtype="fp32", optimizer="client_amsgrad", scheduler="none", layers=ep2),
        Row("z2_bf16_sgd", optimizer="client_sgd", scheduler="none", layers=ep2),
        Row(
            "z2_bf16_cpu_adam",
            optimizer="cpu_adam",
            zero=(("offload_optimizer", {"device": "cpu"}),),
            layers=ep2,
        ),
        Row(
            "z2_bf16_data_first",
            layers=(Layer(ep=2), Layer(ep=4)),
            config=(("use_data_before_expert_parallelism", True),),
        ),
        Row(
            "z0_fp32_client_amsgrad", stage=0, dtype="fp32", optimizer="client_amsgrad", layers=ep2, scheduler="lambda"
        ),
        Row("z2_bf16_buffers_bf16", config=(("data_types", {"buffer_dtype": "bf16"}),), layers=ep2),
        Row("z2_fp16", dtype="fp16", poison=(2, 8), gas=2),
        Row("z0_fp16", stage=0, dtype="fp16", poison=(2, 8), layers=ep2),
        Row("w2_ep1", world=2, layers=(Layer(ep=1), Layer(experts=2, ep=1, k=2))),
        Row("w1", world=1, layers=(Layer(ep=1), Layer(ep=1, k=2))),
    ]
    return {row.name: row for row in rows}


ROWS = _rows()
_COMPILES: list[str] = []


def skip_unless_possible(row: str) -> None:
    """Skip the running test, with the reason, where a row needs a compiler and there is none."""
    import pytest

    if ROWS[row].optimizer != "cpu_adam":
        return
    if not _COMPILES:
        _COMPILES.append(_try_cpu_adam())
    if _COMPILES[0]:
        pytest.skip(_COMPILES[0])


def _try_cpu_adam() -> str:
    """Build DeepSpeedCPUAdam in a process of its own; why it cannot be built, or ''."""
    import shutil
    import subprocess
    import sys
    import time
    from pathlib import Path

    from distributed.pool import worker_env

    if not shutil.which("ninja") and not (Path(sys.executable).parent / "ninja").exists():
        return "DeepSpeedCPUAdam needs ninja to compile"
    env = worker_env()
    env["PATH"] = f"{Path(sys.executable).parent}:{env.get('PATH', '')}"
    for lock in Path(env["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
        if time.time() - lock.stat().st_mtime > 600:  # a killed build would make everyone wait for ever
            lock.unlink(missing_ok=True)
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(verbose=False)"
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "DeepSpeedCPUAdam did not compile within 300 s"
    if done.returncode:
        return f"DeepSpeedCPUAdam does not compile here: {done.stderr.decode(errors='replace')[-300:]}"
    return ""


# ------------------------------------------------------------------------------------------- model


def build_model(row: Row, *, rank: int, world: int, seed: int) -> Any:
    """The model of a row, each of its parameters a function of (global name, seed) only."""
    import torch
    from deepspeed.moe.layer import MoE
    from torch import nn

    class Expert(nn.Module):
        """Two odd-sized matrices, a frozen gain and a buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(row.hidden, row.ffn)
            self.down = nn.Linear(row.ffn, row.hidden, bias=False)
            if row.frozen:
                self.gain = nn.Parameter(torch.ones(row.ffn), requires_grad=False)
            if row.expert_bias_extra:
                self.extra = nn.Parameter(torch.zeros(row.hidden))
            self.register_buffer("offset", torch.full((3,), 0.01))

        def forward(self, x: Any) -> Any:
            y = torch.nn.functional.gelu(self.up(x))
            if row.frozen:
                y = y * self.gain
            y = self.down(torch.nn.functional.dropout(y, row.dropout, self.training)) + self.offset.sum().to(x.dtype)
            return y + self.extra if row.expert_bias_extra else y

    class Block(nn.Module):
        """A dense part and a MoE layer."""

        def __init__(self, layer: Layer) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(row.hidden)
            setattr(self, row.dense_name, nn.Linear(row.hidden, row.hidden))
            self.moe = MoE(
                row.hidden,
                Expert(),
                num_experts=layer.experts,
                ep_size=layer.ep,
                k=layer.k,
                use_residual=layer.residual,
                noisy_gate_policy=layer.noise if layer.k == 1 else None,
                capacity_factor=1.25,
                min_capacity=2,
                use_rts=True,
            )

        def forward(self, x: Any) -> tuple[Any, Any]:
            h = torch.tanh(getattr(self, row.dense_name)(self.norm(x)))
            h = torch.nn.functional.dropout(h, row.dropout, self.training)
            out, aux, _ = self.moe(h)
            return x + out, aux

    class Net(nn.Module):
        """Embedding, blocks, tied head."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, row.hidden)
            self.blocks = nn.ModuleList(Block(layer) for layer in row.layers)
            if row.extra_layer:
                self.extra_dense = nn.Linear(row.hidden, row.hidden)
            self.odd = nn.Parameter(torch.zeros(row.odd, 1))
            if row.empty:
                self.empty = nn.Parameter(torch.zeros(0, 5))
            if row.frozen:
                self.frozen = nn.Parameter(torch.zeros(row.hidden, 3), requires_grad=False)
            self.head = nn.Linear(row.hidden, VOCAB, bias=True)
            if row.tied:
                self.head.weight = self.embed.weight
            self.register_buffer("running_mean", torch.zeros(row.hidden))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
            table = torch.sin(torch.arange(SEQ * row.hidden, dtype=torch.float32)).view(SEQ, row.hidden)
            self.register_buffer("positions", 0.1 * table, persistent=False)

        def forward(self, tokens: Any, target: Any) -> Any:
            x = self.embed(tokens)
            x = x + self.positions.to(x.dtype)
            if row.rank_buffers:
                if self.training:
                    with torch.no_grad():
                        self.running_mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
                        self.seen.add_(1)
                x = x - 0.5 * self.running_mean.to(x.dtype) + 0.001 * (self.seen % 5).to(x.dtype)
            x = x * (1.0 + 0.01 * self.odd.sum())
            if row.empty:
                x = x + self.empty.sum()
            if row.frozen:
                x = x + (x @ self.frozen).sum(-1, keepdim=True) * 0.1
            if row.extra_layer:
                x = x + self.extra_dense(x)
            aux = 0.0
            for block in self.blocks:
                x, one = block(x)
                aux = aux + one
            if self.training:
                import numpy as np

                x = x * (1.0 + 0.01 * random.random() + 0.01 * np.random.rand())
            logits = self.head(x).float()
            loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), target.view(-1))
            return loss + 0.01 * aux

    net = Net()
    net.world, net.data_first = world, dict(row.config).get("use_data_before_expert_parallelism", False)
    for name, tensor in net.named_parameters():
        if row.freeze and name.startswith(row.freeze):
            tensor.requires_grad_(False)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            generator = torch.Generator().manual_seed(_hash(f"{seed}|{initial_name(net, name, rank)}"))
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("norm.weight", "gain")):
                tensor.copy_(1.0 + 0.1 * noise)
            else:
                tensor.copy_(0.3 * noise)
        for name, tensor in net.named_buffers():
            if name.endswith("offset"):
                generator = torch.Generator().manual_seed(_hash(f"{seed}|{initial_name(net, name, rank)}"))
                tensor.add_(0.01 * torch.randn(tensor.shape, generator=generator))
    return net


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def initial_name(net: Any, name: str, rank: int) -> str:
    """The global name of a parameter before the groups exist (`check_expert_ranks` proves the guess)."""
    from deepspeed.moe.layer import MoE

    for prefix, module in net.named_modules():
        if isinstance(module, MoE):
            stem = f"{prefix}.deepspeed_moe.experts.deepspeed_experts."
            if name.startswith(stem):
                local, _, rest = name[len(stem) :].partition(".")
                first = _place(net, module, rank) * module.num_local_experts
                return f"{stem}{first + int(local)}.{rest}"
    return name


def check_expert_ranks(net: Any, rank: int) -> None:
    """Fail when a rank's place in an expert-parallel group is not what `initial_name` took it to be."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    for prefix, module in net.named_modules():
        if isinstance(module, MoE):
            real = groups._get_expert_parallel_rank(module.expert_group_name)
            assert real == _place(net, module, rank), f"{prefix}: expert-parallel rank {real} on rank {rank}"


def _place(net: Any, moe: Any, rank: int) -> int:
    """A rank's place in the expert-parallel group of a layer, as DeepSpeed will lay it out."""
    return rank // (net.world // moe.ep_size) if net.data_first else rank % moe.ep_size


# ------------------------------------------------------------------------------------------ engine


def param_groups(row: Row, net: Any) -> list[dict[str, Any]]:
    """Parameter groups: by weight decay and learning rate, then split for the experts."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    decay, plain, embed = [], [], []
    for name, tensor in net.named_parameters():
        if row.groups >= 3 and name.startswith("embed"):
            embed.append(tensor)
        elif row.groups >= 2 and (tensor.ndim < 2 or tensor.numel() == 0):
            plain.append(tensor)
        else:
            decay.append(tensor)
    groups: list[dict[str, Any]] = [{"params": decay, "name": "decay", "weight_decay": 0.1}]
    if plain:
        groups.append({"params": plain, "name": "plain", "weight_decay": 0.0, "lr": 2e-2})
    if embed:
        groups.append({"params": embed, "name": "embed", "weight_decay": 0.01, "lr": 5e-3})
    return split_params_into_different_moe_groups_for_optimizer(groups)


def client_optimizer(row: Row, net: Any) -> tuple[Any, Any]:
    """The optimizer and scheduler that the user passes to deepspeed.initialize, or None."""
    import torch

    optimizer = None
    if row.optimizer == "client_adamw":
        optimizer = torch.optim.AdamW(param_groups(row, net), lr=1e-2, betas=(0.8, 0.95))
    elif row.optimizer == "client_amsgrad":
        optimizer = torch.optim.Adam(param_groups(row, net), lr=1e-2, amsgrad=True)
    elif row.optimizer == "client_adam":
        optimizer = torch.optim.Adam(param_groups(row, net), lr=1e-2, betas=(0.8, 0.95))
    elif row.optimizer == "client_adagrad":
        optimizer = torch.optim.Adagrad(param_groups(row, net), lr=1e-2)
    elif row.optimizer == "client_sgd":
        optimizer = torch.optim.SGD(param_groups(row, net), lr=5e-2, momentum=0.9)
    elif row.optimizer == "client_plain_sgd":
        optimizer = torch.optim.SGD(param_groups(row, net), lr=5e-2)
    scheduler = None
    if row.scheduler == "lambda":
        if optimizer is not None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)
        else:
            scheduler = _make_lambda
    return optimizer, scheduler


def _decay(epoch: int) -> float:
    return 0.9 ** (epoch % 11)


def _make_lambda(optimizer: Any) -> Any:
    import torch

    return torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)


def ds_config(row: Row, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a row, without the plugin's section."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_MICRO // world,
        "gradient_accumulation_steps": row.gas,
        "gradient_clipping": row.clip,
        "zero_optimization": {"stage": row.stage, **dict(row.zero)},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if row.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif row.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 4, "hysteresis": 1}
    if row.optimizer in ("torch_adamw", "cpu_adam", "fused"):
        params: dict[str, Any] = {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-8, "weight_decay": 0.05}
        if row.optimizer == "torch_adamw":
            params["torch_adam"] = True
        config["optimizer"] = {"type": "AdamW", "params": params}
    if row.stage and row.optimizer.startswith("client"):
        config["zero_allow_untested_optimizer"] = True
    if row.scheduler == "warmup":
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-2, "warmup_num_steps": 6, "total_num_steps": 40},
        }
    config.update(dict(row.config))
    return config


def batch(row: Row, *, step: int, micro: int, rank: int, world: int, seed: int) -> tuple[Any, Any]:
    """This rank's share of a global micro-batch; the global batch does not depend on the world."""
    import torch

    generator = torch.Generator().manual_seed(_hash(f"data|{seed}|{step}|{micro}"))
    tokens = torch.randint(0, VOCAB, (GLOBAL_MICRO, SEQ + 1), generator=generator)
    # A learnable rule, so that the loss falls.
    target = (tokens[:, :-1] * 3 + 1) % VOCAB
    share = GLOBAL_MICRO // world
    mine = slice(rank * share, (rank + 1) * share)
    return tokens[mine, :-1], target[mine]
