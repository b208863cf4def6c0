"""Models with replicated experts, engines for them, and a reference that has each expert once.

The reference is written here from the formulas: plain torch in double precision on one process, every rank's
micro-batches one after the other, the mean over ranks, torch's own clipping and AdamW.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any

from distributed import harness, oracle

VOCAB, SEQ, BATCH = 23, 6, 3
EXPERTS = 5
#: Random placements of 5 experts in 3 slots on each of 4 ranks; rank 3 of the second has one expert twice.
PLACEMENTS = (
    ((0, 3, 4), (1, 2, 3), (0, 2, 4), (1, 3, 4)),
    ((2, 3, 4), (0, 1, 4), (0, 2, 3), (1, 1, 3)),
)
#: Another one, and one without any replica of expert 0.
OTHERS = (
    ((0, 1, 2), (2, 3, 4), (0, 1, 4), (1, 2, 3)),
    ((0, 1, 2), (1, 2, 3), (2, 3, 4), (1, 4, 4)),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model under one engine."""

    placements: tuple[tuple[tuple[int, ...], ...], ...] | None = PLACEMENTS
    dtype: str = "fp32"
    stage: int = 2
    gas: int = 1
    clip: float = 0.5
    state: str = "replicated"
    hidden: int = 12
    ffn: int = 7
    k: int = 1
    #: DeepSpeed's own MoE layer instead, with 4 experts over this many ranks.
    ep: int = 0
    experts: int = EXPERTS
    #: Ranks give their parameters to the optimizer in different orders.
    shuffled: bool = False
    #: Groups as DeepSpeed's split_params_into_different_moe_groups_for_optimizer makes them.
    split: bool = False
    client: bool = False
    #: DeepSpeed's FusedAdam, which compiles a kernel.
    fused: bool = False
    #: A schedule of torch's, which keeps lists with one entry per param group.
    decay: bool = False
    noise: str | None = None
    buffers: bool = False
    #: Experts that are not trained, in both layers.
    frozen: tuple[int, ...] = ()
    config: tuple[tuple[str, Any], ...] = ()

    def with_(self, **changes: Any) -> Setting:
        return dataclasses.replace(self, **changes)


def build_model(setting: Setting, seed: int) -> Any:
    """The model; each parameter is a function of (global name, seed) only."""
    import torch
    from torch import nn

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(setting.hidden, setting.ffn)
            self.down = nn.Linear(setting.ffn, setting.hidden, bias=False)
            self.gain = nn.Parameter(torch.ones(setting.ffn), requires_grad=False)
            if setting.buffers:
                self.register_buffer("offset", torch.zeros(3))

        def forward(self, x: Any) -> Any:
            return self.down(torch.tanh(self.up(x)) * self.gain)

    class Block(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(setting.hidden)
            self.dense = nn.Linear(setting.hidden, setting.hidden)
            self.moe = make_moe(setting, index, Expert)

        def forward(self, x: Any) -> tuple[Any, Any]:
            h = torch.tanh(self.dense(self.norm(x)))
            out, aux, _ = self.moe(h)
            return x + out, aux

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, setting.hidden)
            self.blocks = nn.ModuleList(Block(index) for index in range(2))
            self.head = nn.Linear(setting.hidden, VOCAB)
            if setting.buffers:
                self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, tokens: Any, target: Any) -> Any:
            x = self.embed(tokens)
            if setting.buffers and self.training:
                self.seen.add_(1)
            aux = 0.0
            for block in self.blocks:
                x, one = block(x)
                aux = aux + one
            loss = nn.functional.cross_entropy(self.head(x).float().view(-1, VOCAB), target.view(-1))
            return loss + 0.01 * aux

    net = Net()
    names = global_names(net, setting)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            tensor.copy_(initial(names[name], tuple(tensor.shape), seed))
            if is_frozen(names[name], setting):
                tensor.requires_grad_(False)
    return net


def is_frozen(name: str, setting: Setting) -> bool:
    """Whether a parameter, by its global name, is not trained."""
    frozen = any(f".deepspeed_experts.{expert}." in name for expert in setting.frozen)
    return frozen or name.endswith("gain")


def make_moe(setting: Setting, index: int, expert: Any) -> Any:
    if setting.placements is None:
        from deepspeed.moe.layer import MoE

        return MoE(
            setting.hidden,
            expert(),
            num_experts=setting.experts,
            ep_size=setting.ep,
            k=setting.k,
            drop_tokens=False,
            use_rts=False,
            noisy_gate_policy=setting.noise,
            top2_2nd_expert_sampling=False,
        )
    from moc_ckpt.lazarus.layer import LazarusMoE
    from moc_ckpt.lazarus.types import Placement

    return LazarusMoE(
        setting.hidden,
        expert,
        num_experts=setting.experts,
        k=setting.k,
        top2_2nd_expert_sampling=False,
        noisy_gate_policy=setting.noise,
        placement=Placement(setting.experts, setting.placements[index]),
        seed=index,
        name=f"layer {index}",
    )


def initial(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """Initial values of a parameter, float32."""
    import torch

    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))
    return 1.0 + 0.1 * noise if name.endswith(("norm.weight", "gain")) else 0.3 * noise


def global_names(net: Any, setting: Setting) -> dict[str, str]:
    """Local -> global names of parameters and buffers, from the placements alone (or DeepSpeed's layout)."""
    import torch.distributed as dist

    rank, out = dist.get_rank(), {}
    for name, _ in [*net.named_parameters(), *net.named_buffers()]:
        head, mark, rest = name.partition(".deepspeed_experts.")
        if mark:
            local, _, tail = rest.partition(".")
            if setting.placements is None:
                count = setting.experts // setting.ep
                expert = rank % setting.ep * count + int(local)
            else:
                layer = int(name.split(".")[1])
                expert = sorted(set(setting.placements[layer][rank]))[int(local)]
            out[name] = f"{head}{mark}{expert}.{tail}"
        else:
            out[name] = name
    return out


def groups_of(setting: Setting, net: Any, rank: int) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; in an order of the rank's own if the setting says so."""
    decay = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in net.parameters() if p.requires_grad and p.ndim < 2]
    if setting.shuffled:
        # Dense parameters keep their order, which DeepSpeed needs; each rank has its experts in another one.
        for members in (decay, plain):
            experts = [p for p in members if hasattr(p, "lazarus")]
            random.Random(rank).shuffle(experts)
            dense = [p for p in members if not hasattr(p, "lazarus")]
            members[:] = [*experts, *dense] if rank % 2 else [*dense, *experts]
    groups = [
        {"params": decay, "name": "decay", "weight_decay": 0.1},
        {"params": plain, "name": "plain", "weight_decay": 0.0, "lr": 2e-2},
    ]
    if setting.placements is None or setting.split:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        return split_params_into_different_moe_groups_for_optimizer(groups)
    return groups


LR, BETAS, EPS = 1e-2, (0.8, 0.95), 1e-8


def build(
    setting: Setting,
    *,
    seed: int = 1,
    plugin: dict[str, Any] | None = None,
) -> Any:
    """The engine of a setting; its model's parameters follow from `seed`."""
    import deepspeed
    import numpy as np
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    for seeding in (random.seed, np.random.seed, torch.manual_seed):
        seeding(seed * 100 + rank)
    net = build_model(setting, seed)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": setting.gas,
        "gradient_clipping": setting.clip,
        "zero_optimization": {"stage": setting.stage},
        "steps_per_print": 10**9,
        "lazarus": {"optimizer_state": setting.state},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": LR, "warmup_num_steps": 6, "total_num_steps": 80},
        },
    }
    if setting.dtype != "fp32":
        config[setting.dtype] = {"enabled": True}
    groups = groups_of(setting, net, rank)
    optimizer = None
    if setting.client:
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
        config["zero_allow_untested_optimizer"] = True
    else:
        options = {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": 0.05, "torch_adam": not setting.fused}
        config["optimizer"] = {"type": "AdamW", "params": options}
    if plugin is not None:
        config["moc_checkpoint"] = {"save_mode": "durable", **plugin}
    if setting.decay:
        del config["scheduler"]
    config.update(dict(setting.config))
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else groups,
        lr_scheduler=_schedule if setting.decay else None,
        config=config,
        dist_init_required=False,
    )
    harness._ENGINES.append(engine)
    engine.setting = setting
    assert world == 1 or setting.placements is None or len(setting.placements[0]) == world
    return engine


def _schedule(optimizer: Any) -> Any:
    import torch

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9 ** (step % 11))


def batch(step: int, micro: int, rank: int, seed: int = 7) -> tuple[Any, Any]:
    """One rank's micro-batch."""
    import torch

    digest = hashlib.sha256(f"{seed}|{step}|{micro}|{rank}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    return tokens, (tokens * 3 + 1) % VOCAB


def train(engine: Any, steps: int, *, seed: int = 7) -> tuple[list[str], list[float], list[list[float]]]:
    """Trains; this rank's losses as `float.hex` (one per micro-step), and of every step the norm and the rates."""
    import torch.distributed as dist

    losses, norms, lrs = [], [], []
    engine.train()
    for _ in range(steps):
        step = engine.global_steps
        lrs.append(engine.get_lr())
        for micro in range(engine.setting.gas):
            loss = engine(*(tensor.to(engine.device) for tensor in batch(step, micro, dist.get_rank(), seed)))
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()).hex())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, lrs


# ------------------------------------------------------------------------------------------- the state


def rank_state(engine: Any) -> dict[str, dict[str, Any]]:
    """What this rank has of the experts: global name -> weight, and intervals of master and moments."""
    names = {id(p): n for n, p in _named_globally(engine)}
    out: dict[str, dict[str, Any]] = {}
    for shard in engine.lazarus.replicas.shards():
        state = engine.lazarus.replicas.optimizer.state[shard.state_key]
        at = slice(shard.state_offset, shard.state_offset + shard.stop - shard.start)
        pieces = {"master": shard.master.cpu().clone()}
        pieces |= {kind: state[kind].view(-1)[at].cpu().clone() for kind in ("exp_avg", "exp_avg_sq") if kind in state}
        out[names[id(shard.param)]] = {
            "weight": shard.param.detach().cpu().clone(),
            "interval": (shard.start, shard.stop),
            "step": step_of(state, engine.lazarus.replicas.optimizer.param_groups[shard.group]),
            **pieces,
        }
    return out


def step_of(state: dict[str, Any], group: dict[str, Any]) -> float | None:
    """The step count, which FusedAdam keeps in the group."""
    found = state.get("step", group.get("step"))
    return None if found is None else float(found)


def _named_globally(engine: Any) -> list[tuple[str, Any]]:
    names = global_names(engine.module, engine.setting)
    return [(names[name], param) for name, param in engine.module.named_parameters()]


def expert_state(engine: Any, ctx: Any) -> dict[str, dict[str, Any]]:
    """All experts, put together from all ranks; fails unless replicas agree to the last bit and nothing is missing."""
    import torch

    from distributed.oracle import bits_equal

    out: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, str], Any] = {}
    for rank, mine in enumerate(ctx.gather(rank_state(engine))):
        for name, item in mine.items():
            weight = item["weight"]
            entry = out.setdefault(name, {"weight": weight})
            assert bits_equal(entry["weight"], weight), (
                f"{name}: the weight of rank {rank} differs from another replica's"
            )
            if item["step"] is not None and item["interval"][0] < item["interval"][1]:
                assert entry.setdefault("step", item["step"]) == item["step"], f"{name}: step of rank {rank}"
            start, stop = item["interval"]
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                if kind not in item:
                    continue
                whole = entry.setdefault(kind, torch.zeros(weight.numel()))
                known = seen.setdefault((name, kind), torch.zeros(weight.numel(), dtype=torch.bool))
                old = known[start:stop]
                same = bits_equal(whole[start:stop][old], item[kind][old])
                assert same, f"{name} {kind}: rank {rank} differs from another replica"
                whole[start:stop] = item[kind]
                known[start:stop] = True
    for (name, kind), known in seen.items():
        assert bool(known.all()), f"{name} {kind}: {int((~known).sum())} elements are on no rank"
    for name, entry in out.items():
        cast = entry["master"].to(entry["weight"].dtype).view(entry["weight"].shape)
        assert bits_equal(cast, entry["weight"]), f"{name}: the weight is not its master's cast"
    return out


def whole_state(engine: Any, ctx: Any) -> dict[str, dict[str, Any]] | None:
    """Masters, moments, step counts and options of the whole model by global name, on rank 0; replicas compared.

    Dense state, and all of an engine with DeepSpeed's own layers, is read by the oracle from DeepSpeed's structures.
    """
    if engine.lazarus is None:
        return oracle.global_state(engine, ctx)
    import copy

    by_id = {id(param): name for name, param in _named_globally(engine)}
    mine = []
    for param, start, stop, master, tensors, scalars in oracle._pieces(engine):
        pieces = {"master": master.cpu().clone(), **{kind: value.cpu().clone() for kind, value in tensors.items()}}
        mine.append((by_id[id(param)], tuple(param.shape), start, stop, pieces, scalars))
    optimizer = engine.lazarus.replicas.optimizer
    for shard in engine.lazarus.replicas.shards():
        state, group = optimizer.state[shard.state_key], optimizer.param_groups[shard.group]
        at = slice(shard.state_offset, shard.state_offset + shard.stop - shard.start)
        pieces = {"master": shard.master.cpu().clone()}
        pieces |= {kind: state[kind].view(-1)[at].cpu().clone() for kind in ("exp_avg", "exp_avg_sq")}
        hyper = {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "step")}
        scalars = {"step": step_of(state, group), "hyper": hyper}
        name, shape = by_id[id(shard.param)], tuple(shard.param.shape)
        mine.append((name, shape, shard.start, shard.stop, pieces, scalars))
    everyone = ctx.gather(mine)
    return oracle.assemble(everyone) if ctx.rank == 0 else None


def local_weights(engine: Any) -> dict[str, Any]:
    """This rank's weights and buffers by global name, copied."""
    names = global_names(engine.module, engine.setting)
    both = [*engine.module.named_parameters(), *engine.module.named_buffers()]
    return {names[name]: tensor.detach().cpu().clone() for name, tensor in both}


def would_deadlock(orders: list[list[Any]]) -> bool:
    """Whether collectives over the holders of each item block for ever if every rank makes its own in its own order."""
    waiting = [list(order) for order in orders]
    while any(waiting):
        heads = [order[0] if order else None for order in waiting]
        ready = [
            item
            for item in {head for head in heads if head is not None}
            if all(head == item for order, head in zip(waiting, heads, strict=True) if item in order)
        ]
        if not ready:
            return True
        for order in waiting:
            if order and order[0] in ready:
                order.pop(0)
    return False


# --------------------------------------------------------------------------------------- the reference


class Reference:
    """The model with each expert once, in double precision, trained by the formulas."""

    def __init__(self, setting: Setting, world: int, seed: int = 1) -> None:
        import torch

        self.setting, self.world = setting, world
        self.params: dict[str, Any] = {}
        for name, shape in self._shapes():
            value = initial(name, shape, seed)
            if setting.dtype == "bf16":
                value = value.to(torch.bfloat16)
            self.params[name] = value.double().requires_grad_(not is_frozen(name, setting))
        trained = [p for p in self.params.values() if p.requires_grad]
        decay = [p for p in trained if p.ndim > 1]
        plain = [p for p in trained if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            lr=LR,
            betas=BETAS,
            eps=EPS,
        )

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        s = self.setting
        found = [("embed.weight", (VOCAB, s.hidden)), ("head.weight", (VOCAB, s.hidden)), ("head.bias", (VOCAB,))]
        for layer in range(2):
            head = f"blocks.{layer}"
            found += [(f"{head}.norm.weight", (s.hidden,)), (f"{head}.norm.bias", (s.hidden,))]
            found += [(f"{head}.dense.weight", (s.hidden, s.hidden)), (f"{head}.dense.bias", (s.hidden,))]
            found.append((f"{head}.moe.deepspeed_moe.gate.wg.weight", (s.experts, s.hidden)))
            for expert in range(s.experts):
                stem = f"{head}.moe.deepspeed_moe.experts.deepspeed_experts.{expert}"
                found += [(f"{stem}.up.weight", (s.ffn, s.hidden)), (f"{stem}.up.bias", (s.ffn,))]
                found += [(f"{stem}.down.weight", (s.hidden, s.ffn)), (f"{stem}.gain", (s.ffn,))]
        return found

    def loss(self, tokens: Any, target: Any) -> Any:
        import torch
        import torch.nn.functional as F

        p = self.params
        x, aux = F.embedding(tokens, p["embed.weight"]), 0.0
        for layer in range(2):
            head = f"blocks.{layer}"
            width = (self.setting.hidden,)
            h = F.layer_norm(x, width, p[f"{head}.norm.weight"], p[f"{head}.norm.bias"])
            h = torch.tanh(F.linear(h, p[f"{head}.dense.weight"], p[f"{head}.dense.bias"]))
            rows = h.reshape(-1, self.setting.hidden)
            chance = torch.softmax(rows @ p[f"{head}.moe.deepspeed_moe.gate.wg.weight"].T, dim=1)
            best = chance.topk(self.setting.k, dim=1).indices
            weight = chance.gather(1, best)
            if self.setting.k > 1:
                weight = weight / weight.sum(1, keepdim=True)
            first = F.one_hot(best[:, 0], self.setting.experts).double()
            aux = aux + self.setting.experts * (chance.mean(0) * first.mean(0)).sum()
            out = torch.zeros_like(rows)
            for expert in range(self.setting.experts):
                stem = f"{head}.moe.deepspeed_moe.experts.deepspeed_experts.{expert}"
                y = torch.tanh(F.linear(rows, p[f"{stem}.up.weight"], p[f"{stem}.up.bias"])) * p[f"{stem}.gain"]
                share = (weight * (best == expert)).sum(1, keepdim=True)
                out = out + share * F.linear(y, p[f"{stem}.down.weight"])
            x = x + out.view_as(x)
        logits = F.linear(x, p["head.weight"], p["head.bias"])
        return F.cross_entropy(logits.view(-1, VOCAB), target.view(-1)) + 0.01 * aux

    def train(self, lrs: list[list[float]]) -> tuple[list[list[float]], list[float]]:
        """One step per entry, the rates of both groups; losses [step x micro][rank] and every step's norm."""
        import torch

        losses, norms = [], []
        for step, lr in enumerate(lrs):
            self.optimizer.zero_grad()
            for micro in range(self.setting.gas):
                found = [self.loss(*batch(step, micro, rank)) for rank in range(self.world)]
                (torch.stack(found).mean() / self.setting.gas).backward()
                losses.append([float(one.detach()) for one in found])
            trained = [p for p in self.params.values() if p.requires_grad]
            limit = self.setting.clip or float("inf")
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, limit)))
            for group, value in zip(self.optimizer.param_groups, lr, strict=True):
                group["lr"] = value
            self.optimizer.step()
        return losses, norms
