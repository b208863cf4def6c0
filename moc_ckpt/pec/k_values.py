"""K as the user gives it, and K as each layer has it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moc_ckpt.errors import ConfigError

__all__ = ["AUTO", "K", "check_k", "layer_k"]

AUTO: Literal["auto"] = "auto"
K = int | Literal["auto"]
"""Experts per MoE layer and save; `auto` is all of them until bandwidths are measured."""


def check_k(k_snapshot: K, k_persist: K, experts: Sequence[int], *, where: str) -> None:
    """Refuses values of K that this model cannot have; the configuration has checked all else.

    A K above a smaller layer's number of experts means all experts there.

    Args:
        k_snapshot: K of snapshots.
        k_persist: K of persists.
        experts: number of experts of each MoE layer; empty for a model without any.
        where: what the user wrote it in, for messages.

    Raises:
        ConfigError: naming the layer and the numbers.
    """
    for name, k in (("k_snapshot", k_snapshot), ("k_persist", k_persist)):
        if k == AUTO:
            continue
        if experts and k > max(experts):
            layer = max(range(len(experts)), key=lambda ordinal: experts[ordinal])
            raise ConfigError(
                f"{name} is {k}, but the largest MoE layer (layer {layer}) has {experts[layer]} experts",
                where=where,
                fix=f'set {name} to at most {experts[layer]}, or to "auto" for all experts',
            )


def layer_k(k: K, experts: Sequence[int], *, floor: int = 0, most: K = AUTO) -> tuple[int, ...]:
    """Returns the K of each layer.

    Args:
        k: K as configured.
        experts: number of experts of each MoE layer.
        floor: what Dynamic-K demands at least.
        most: `auto` may not pass this (k_snapshot, for a persist).
    """
    wanted = most if k == AUTO else k
    if wanted == AUTO:
        return tuple(experts)
    return tuple(min(count, max(wanted, floor)) for count in experts)
