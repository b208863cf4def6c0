"""`--lazarus`: MoE layers whose experts have replicas, and where those go."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from gpt_moe.model import ExpertMlp, MoeInterface
from moc_ckpt.lazarus.allocation import allocate
from moc_ckpt.lazarus.layer import LazarusMoE
from moc_ckpt.lazarus.placement import mro
from moc_ckpt.lazarus.ranks import split
from moc_ckpt.lazarus.types import Placement

__all__ = ["ReplicatedMoeMlp", "place_experts"]


class ReplicatedMoeMlp(MoeInterface, LazarusMoE):
    """LazarusMoE with the interface of a megatron-core MLP.

    Args:
        config: of the transformer.
        args: settled arguments.
        layer: ordinal of the MoE layer, from 0.
        placement: where its experts go.
    """

    def __init__(
        self, config: TransformerConfig, args: argparse.Namespace, layer: int, placement: Placement, **_: Any
    ) -> None:
        super().__init__(
            hidden_size=config.hidden_size,
            expert=lambda: ExpertMlp(config),
            num_experts=args.num_experts,
            k=args.topk,
            placement=placement,
            seed=args.seed,  # the weights are set later anyway
            name=f"MoE layer {layer}",
        )


def place_experts(args: argparse.Namespace, layers: int) -> list[Placement]:
    """Return a placement for each MoE layer; the same on all ranks.

    Experts get replicas by the tokens in `--lazarus-loads`, or all alike. With several nodes their slots are shared out
    first, so that the replicas of an expert are on different nodes; on one node its ranks take their place.

    Args:
        args: settled arguments.
        layers: number of MoE layers.
    """
    world = torch.distributed.get_world_size()
    found: list[Any] = [_loads(args, layers) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    ranks = ranks if world % ranks == 0 and world > ranks else 1
    placements = []
    for layer, loads in enumerate(found[0]):
        slots = args.lazarus_slots * ranks
        allocation = allocate(loads, world // ranks, slots, args.lazarus_fault_threshold, layer=layer)
        if allocation.note and not layer and torch.distributed.get_rank() == 0:
            print(f" lazarus: {allocation.note}", flush=True)
        nodes = mro(allocation.replicas, world // ranks, slots, layer=layer)
        placements.append(split(nodes, ranks, args.lazarus_slots) if ranks > 1 else nodes)
    return placements


def _loads(args: argparse.Namespace, layers: int) -> list[list[float]]:
    """Return the tokens of each expert by layer."""
    if args.lazarus_loads is None:
        return [[1.0] * args.num_experts] * layers
    from moc_ckpt.cli.placement_input import read_checkpoint, read_loads

    if os.path.isdir(args.lazarus_loads):  # noqa: PTH112 (it may be a URL)
        loads = read_checkpoint(args.lazarus_loads, None)
    else:
        loads = read_loads(args.lazarus_loads)
    if len(loads) not in (1, layers) or any(len(row) != args.num_experts for row in loads):
        shown = f"{len(loads)} layers of {', '.join(sorted({str(len(row)) for row in loads}))} experts"
        raise SystemExit(f"--lazarus-loads {args.lazarus_loads} has {shown}: not those of this model")
    return [list(map(float, row)) for row in (loads if len(loads) == layers else loads * layers)]
