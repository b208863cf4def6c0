"""`--lazarus`: MoE layers whose experts have replicas, and where those go."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from gpt_moe.model import ExpertMlp, MoeInterface
from moc_ckpt.errors import CheckpointNotFoundError, MocError
from moc_ckpt.lazarus.allocation import allocate
from moc_ckpt.lazarus.evenness import even_out
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

    Where `--lazarus-loads` is a directory whose run planned a placement that fits, that is carried out. Otherwise
    experts get replicas by the tokens in `--lazarus-loads`, or all alike. With several nodes their slots are shared out
    first, so that the replicas of an expert are on different nodes; on one node its ranks take their place.

    Args:
        args: settled arguments; `lazarus_notes` becomes what rank 0 should say about it.
        layers: number of MoE layers.

    Raises:
        SystemExit: on all ranks, if the loads cannot be read or the experts do not fit.
    """
    args.lazarus_notes = []
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [_placements(args, layers)]
        except (MocError, SystemExit) as error:
            found = [str(error)]
        except Exception as error:
            found = [f"--lazarus: no placement: {type(error).__name__}: {error}"]
    # Also an error: the other ranks would wait for the placements of one that is gone.
    torch.distributed.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise SystemExit(found[0])
    placements: list[Placement] = found[0]
    return placements


def _placements(args: argparse.Namespace, layers: int) -> list[Placement]:
    """Return a placement for each MoE layer; for one rank, which tells the others."""
    world = torch.distributed.get_world_size()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    ranks = ranks if world % ranks == 0 and world > ranks else 1
    planned = _planned(args, layers, world, ranks)
    if planned is not None:
        return planned
    placements = []
    for layer, loads in enumerate(_loads(args, layers)):
        slots = args.lazarus_slots * ranks
        allocation = allocate(loads, world // ranks, slots, args.lazarus_fault_threshold, layer=layer)
        if allocation.note and not layer:
            args.lazarus_notes.append(allocation.note)
        nodes = even_out(mro(allocation.replicas, world // ranks, slots, layer=layer), loads)
        placements.append(split(nodes, ranks, args.lazarus_slots, loads) if ranks > 1 else nodes)
    return placements


def _planned(args: argparse.Namespace, layers: int, world: int, ranks_per_node: int) -> list[Placement] | None:
    """Return the placement of each layer that a run planned (REBALANCE_PLANNED); None if there is none to use."""
    if args.lazarus_loads is None or not _is_directory(args.lazarus_loads):
        return None
    from moc_ckpt.cli.placement_input import read_planned

    plan = read_planned(args.lazarus_loads)
    if plan is None:
        return None
    least = min(args.lazarus_fault_threshold, args.lazarus_slots * world // args.num_experts)
    fits = (
        plan.ranks_per_node == ranks_per_node
        and len(plan.placements) == layers
        and all(
            [len(held) for held in placement.slots] == [args.lazarus_slots] * world
            and placement.num_experts == args.num_experts
            and min(placement.replicas()) >= least
            for placement in plan.placements
        )
    )
    where = f"the placement planned at step {plan.step} in {args.lazarus_loads}"
    args.lazarus_notes.append(
        f"{where} {'is carried out' if fits else 'is for another run: experts are placed by load'}"
    )
    return list(plan.placements) if fits else None


def _is_directory(given: str) -> bool:
    """Tell whether `--lazarus-loads` is a directory of checkpoints, and no numbers or file of numbers."""
    return "://" in given or Path(given).is_dir()


def _loads(args: argparse.Namespace, layers: int) -> list[list[float]]:
    """Return the tokens of each expert by layer."""
    even = [[1.0] * args.num_experts] * layers
    if args.lazarus_loads is None:
        return even
    from moc_ckpt.cli.placement_input import read_checkpoint, read_loads

    own = args.lazarus_loads in (args.load, args.save)
    if own or _is_directory(args.lazarus_loads):
        try:
            loads = read_checkpoint(args.lazarus_loads, None)
        except CheckpointNotFoundError:
            if not own:
                raise
            args.lazarus_notes.append(f"{args.lazarus_loads} has no checkpoint yet: all experts are placed alike")
            return even
    else:
        loads = read_loads(args.lazarus_loads)
    if len(loads) not in (1, layers) or any(len(row) != args.num_experts for row in loads):
        shown = f"{len(loads)} layers of {', '.join(sorted({str(len(row)) for row in loads}))} experts"
        raise SystemExit(f"--lazarus-loads {args.lazarus_loads} has {shown}: not those of this model")
    return [list(map(float, row)) for row in (loads if len(loads) == layers else loads * layers)]
