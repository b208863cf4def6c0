"""Tokens and gates whose real routing has a wanted skew, and placements for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moc_ckpt.lazarus.shares import Shares
from moc_ckpt.lazarus.types import Placement

__all__ = ["calibrated_gate", "expert_loads", "rank_loads", "replaced", "tokens"]


def tokens(number: int, hidden: int, seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns random tokens whose first coordinate is 1: what the gate gives it is a bias of the expert."""
    made = torch.randn(number, hidden, generator=torch.Generator().manual_seed(seed))
    made[:, 0] = 1.0
    return made.to(device, dtype)


def wanted_loads(experts: int, skew: float) -> torch.Tensor:
    """Returns shares of tokens that fall by equal factors from expert 0 to the last one, which has 1 / skew of it."""
    shares = skew ** -(torch.arange(experts) / max(1, experts - 1))
    return shares / shares.sum()


def calibrated_gate(sample: torch.Tensor, experts: int, k: int, skew: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns gate weights [experts, hidden] that route tokens like the sample with the wanted skew.

    Args:
        sample: [tokens, hidden], with a first coordinate of 1.
        experts: E.
        k: experts per token.
        skew: load of the busiest expert over that of the idlest.
        dtype: of the gate; the weights are rounded to it.
    """
    sample = sample.float()
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(experts, sample.shape[1], generator=generator) / sample.shape[1] ** 0.5
    weights = weights.to(sample.device)
    weights[:, 0] = 0
    logits = sample @ weights.to(dtype).float().t()
    wanted = wanted_loads(experts, skew).to(sample.device)
    bias = torch.zeros(experts, device=sample.device)
    for step in range(300):
        chosen = (logits + bias.to(dtype).float()).topk(k, dim=1).indices
        share = torch.bincount(chosen.reshape(-1), minlength=experts).float() / chosen.numel()
        bias += (0.5 if step < 200 else 0.1) * (wanted.log() - share.clamp(min=1e-6).log())
    weights[:, 0] = bias
    return weights.to(dtype)


def expert_loads(batch: torch.Tensor, gate: torch.Tensor, k: int) -> list[int]:
    """Returns how many of these tokens go to each expert."""
    chosen = (batch.float() @ gate.float().t()).topk(k, dim=1).indices
    found: list[int] = torch.bincount(chosen.reshape(-1), minlength=len(gate)).tolist()
    return found


def rank_loads(loads: Sequence[int], shares: Shares) -> list[float]:
    """Returns the rows that each rank works on."""
    whole = [sum(column) for column in zip(*shares, strict=True)]
    return [sum(load * share / every for load, share, every in zip(loads, row, whole, strict=True)) for row in shares]


def replaced(loads: Sequence[int], ranks: int, slots: int, *, even: bool = True) -> Placement:
    """Returns the planner's placement for these loads; `even` as it is used, else as it is placed by survival alone."""
    from moc_ckpt.lazarus.allocation import allocate
    from moc_ckpt.lazarus.evenness import even_out
    from moc_ckpt.lazarus.placement import mro

    placed = mro(allocate(loads, ranks, slots).replicas, ranks, slots)
    return even_out(placed, loads) if even else placed
