"""An MoE layer on one process, token by token, and what connects a LazarusMoE on many ranks with it."""

from __future__ import annotations

import random
from typing import Any


def random_placement(seed: int, ranks: int, experts: int, slots: int) -> Any:
    """A placement with every expert somewhere; the same on all ranks that use one seed."""
    from moc_ckpt.lazarus.types import Placement

    draw = random.Random(seed)
    filled = list(range(experts)) + [draw.randrange(experts) for _ in range(ranks * slots - experts)]
    draw.shuffle(filled)
    return Placement(experts, tuple(tuple(filled[rank * slots : (rank + 1) * slots]) for rank in range(ranks)))


def expert_module(hidden: int, wide: int, bias: bool = True) -> Any:
    """A two-layer MLP."""
    from torch import nn

    return nn.Sequential(nn.Linear(hidden, wide, bias=bias), nn.GELU(), nn.Linear(wide, hidden, bias=bias))


def all_experts(ctx: Any, layer: Any) -> list[dict[str, Any]]:
    """The parameters of every expert, by global id; raises where two copies differ in a bit."""
    import torch

    mine = {
        expert: {name: value.detach().clone() for name, value in module.named_parameters()}
        for expert, module in zip(layer.expert_ids, layer.deepspeed_moe.experts.deepspeed_experts, strict=True)
    }
    found: dict[int, dict[str, Any]] = {}
    for rank, theirs in enumerate(ctx.gather(mine)):
        for expert, values in theirs.items():
            for name, value in values.items():
                if expert in found and not torch.equal(found[expert][name], value):
                    raise AssertionError(f"rank {rank} has another copy of expert {expert}: {name}")
            found.setdefault(expert, values)
    return [found[expert] for expert in range(layer.num_experts)]


def summed_gradients(ctx: Any, layer: Any) -> list[dict[str, Any]]:
    """The gradients of every expert, summed over its replicas, on every rank."""
    mine = {
        expert: {name: value.grad for name, value in module.named_parameters()}
        for expert, module in zip(layer.expert_ids, layer.deepspeed_moe.experts.deepspeed_experts, strict=True)
    }
    total: dict[int, dict[str, Any]] = {}
    for theirs in ctx.gather(mine):
        for expert, values in theirs.items():
            into = total.setdefault(expert, dict.fromkeys(values, 0))
            for name, value in values.items():
                into[name] = into[name] + value
    return [total[expert] for expert in range(layer.num_experts)]


def reference(
    batches: list[Any], gate: Any, experts: list[dict[str, Any]], k: int, used: list[Any] | None = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """The whole layer on the concatenated batch, one token at a time.

    Args:
        batches: the tokens of every rank, [tokens, hidden].
        gate: [E, hidden].
        experts: parameters of every expert, as of `expert_module`.
        k: experts per token.
        used: for every rank which of its tokens are routed.

    Returns:
        For every rank the outputs, the auxiliary loss and the tokens per expert.
    """
    import torch
    import torch.nn.functional as F

    number = len(experts)
    outputs, losses, counts = [], [], []
    for rank, batch in enumerate(batches):
        rows, first_choices = [], torch.zeros(number, dtype=batch.dtype)
        probabilities = torch.zeros(number, dtype=batch.dtype)
        every = [0] * number
        for place, token in enumerate(batch):
            chance = torch.softmax(gate @ token, 0)
            probabilities = probabilities + chance
            if used is not None and not used[rank][place]:
                rows.append(token * 0)
                continue
            chosen = sorted(range(number), key=lambda index: -float(chance[index].detach()))[:k]
            weights = [chance[index] for index in chosen]
            if k > 1:
                weights = [weight / sum(weights) for weight in weights]
            row = token * 0
            for index, weight in zip(chosen, weights, strict=True):
                p = experts[index]
                inner = F.gelu(p["0.weight"] @ token + p["0.bias"])
                row = row + weight * (p["2.weight"] @ inner + p["2.bias"])
                every[index] += 1
            for index in chosen if k > 2 else chosen[:1]:
                first_choices[index] += 1
            rows.append(row)
        tokens = max(1, len(batch))
        loss = number * (probabilities / tokens * first_choices / tokens).sum() / (k if k > 2 else 1)
        outputs.append(torch.stack(rows) if rows else batch * 0)
        losses.append(loss)
        counts.append(every)
    return outputs, losses, counts
