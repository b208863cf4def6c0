"""An MoE layer whose experts have replicas: DeepSpeed's MoE to its caller, without capacity."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moc_ckpt.errors import ConfigError, UnsupportedError
from moc_ckpt.lazarus.exchange import Exchange, Routes, combine, dispatch
from moc_ckpt.lazarus.experts import LocalExperts
from moc_ckpt.lazarus.gate import TopKGate
from moc_ckpt.lazarus.shares import Shares, check_shares, slot_shares
from moc_ckpt.lazarus.types import Placement

__all__ = ["LazarusMoE", "even_placement"]

logger = logging.getLogger(__name__)


class LazarusMoE(nn.Module):
    """A mixture of experts in which every expert may have replicas on several ranks.

    To its caller it is deepspeed.moe.layer.MoE with `drop_tokens=False`: the same names of arguments and parameters,
    the same gating, auxiliary loss and outputs. A token goes to any replica of its expert, so that all ranks get their
    share of the work; none is dropped and nothing is padded.

    Expert parameters carry `allreduce = False`, `lazarus = True` and `expert_id` (global). Their gradients are those of
    this rank's tokens: **whoever trains the layer sums them over the replicas of each expert**.

    Making the layer is collective over `group` when `seed` is None. Forward and backward are collective over it.

    Args:
        hidden_size: of a token, in and out.
        expert: a module, or a function that makes one; see LocalExperts for how copies get their initial values. The
            module maps [rows, hidden_size] to the same shape, or to a tuple that begins with that.
        num_experts: E, of the whole layer.
        ep_size: only the number of slots follows from it where neither `slots_per_rank` nor `placement` is given:
            num_experts / ep_size per rank, which together with the default placement is DeepSpeed's layout.
        k: experts per token.
        capacity_factor: has no meaning without dropping; taken so that a call need not change.
        eval_capacity_factor: as `capacity_factor`.
        min_capacity: as `capacity_factor`.
        use_residual: adds a dense expert, weighted by a learnt coefficient.
        noisy_gate_policy: None, "None", "Jitter" or "RSample" (which DeepSpeed uses with k = 1 alone).
        drop_tokens: False; True is refused.
        use_rts: which tokens would be dropped first; has no meaning here, as `capacity_factor`.
        use_tutel: False; True is refused.
        enable_expert_tensor_parallelism: False; True is refused.
        top2_2nd_expert_sampling: with k = 2, whether the second expert is drawn rather than the second best.
        slots_per_rank: shares of work that a rank has; a slot holds one expert.
        fault_threshold: the number of ranks that every expert is on at least. Where there are too few slots for that,
            the largest feasible number is used, and logged.
        placement: which experts the ranks of `group` hold, one place per rank; None spreads all alike.
        shares: how replicas share an expert's tokens, see `set_shares`.
        group: process group of the ranks that share the layer; None for all, or for this process where
            torch.distributed is not initialised.
        seed: of the experts' initial values, the same on all ranks but another in every layer; None for one that the
            group's first rank draws from its default generator (every rank draws one number).
        name: of the layer, for messages.

    Attributes:
        expert_ids: global ids of the local experts, ascending; `deepspeed_moe.experts.deepspeed_experts[i]` is number i
            of them.
        placement: the placement in force.

    Raises:
        ConfigError: an argument is wrong, or the placement is one for another layer or world.
        UnsupportedError: an argument asks for what this layer does not do.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module | Callable[[], nn.Module],
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = False,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        slots_per_rank: int | None = None,
        fault_threshold: int = 1,
        placement: Placement | None = None,
        shares: Shares | None = None,
        group: Any = None,
        seed: int | None = None,
        name: str = "MoE layer",
    ) -> None:
        super().__init__()
        for argument, value, why in (
            ("drop_tokens", drop_tokens, "no token is ever dropped"),
            ("use_tutel", use_tutel, "it has a dispatcher of its own"),
            ("enable_expert_tensor_parallelism", enable_expert_tensor_parallelism, "experts are not cut"),
        ):
            if value:
                raise UnsupportedError(
                    f"LazarusMoE cannot do {argument}=True: {why}", where=name, fix=f"pass {argument}=False"
                )
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ConfigError(
                f"rank {dist.get_rank()} is not in the layer's group",
                where=name,
                fix="make the layer on the ranks of its group alone",
            )
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.num_experts = num_experts
        self.use_residual = use_residual
        self.name = name
        self.placement = _checked(
            placement, num_experts, self.ranks, ep_size, slots_per_rank, fault_threshold, where=name
        )
        self.expert_ids = self.placement.distinct(self.rank)
        self.num_local_experts = len(self.expert_ids)
        gate = TopKGate(
            hidden_size,
            num_experts,
            k=k,
            noisy_gate_policy=noisy_gate_policy,
            top2_2nd_expert_sampling=top2_2nd_expert_sampling,
            where=name,
        )
        experts = LocalExperts(expert, self.expert_ids, seed=_agreed_seed(seed, group), group=group)
        self.deepspeed_moe = _Core(gate, experts, Exchange(self.placement, self.rank, group))
        self.set_shares(shares)
        if use_residual:
            self.mlp = expert if isinstance(expert, nn.Module) else expert()
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_shares(self, shares: Shares | None) -> None:
        """Sets how replicas share the tokens of an expert from the next forward pass on.

        No parameter moves and no result changes; all ranks must be given the same shares at the same step.

        Args:
            shares: a weight for every rank of the group and every expert, as of `shares.even_shares`; None for one
                share per slot.

        Raises:
            ConfigError: if they do not fit the placement.
        """
        if shares is not None:
            check_shares(shares, self.placement, where=self.name)
        self.deepspeed_moe.exchange.set_shares(shares or slot_shares(self.placement))

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Routes tokens to experts and combines what those return; collective over the layer's group.

        Args:
            hidden_states: [..., hidden_size].
            used_token: mask over the tokens, k = 1 only: a token whose entry is 0 goes to no expert.

        Returns:
            The output, of the shape and dtype of `hidden_states`; the auxiliary loss of this rank's tokens (a scalar);
            the tokens that this rank routed to each expert, [num_experts] int64.
        """
        output, loss, counts = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            dense = self.mlp(hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense
            share = F.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., :1] + dense * share[..., 1:]
        return output, loss, counts


class _Core(nn.Module):
    """Gate and experts, under the names that DeepSpeed's parameters have."""

    def __init__(self, gate: TopKGate, experts: LocalExperts, exchange: Exchange) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.exchange = exchange

    def forward(self, hidden_states: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        begun: list[Routes] = []
        # Counts travel while the gate computes weights and loss.
        routing = self.gate(tokens, used_token, lambda experts: begun.append(self.exchange.begin(experts)))
        routes = begun[0]
        self.exchange.marked("gate")
        rows = dispatch(tokens, routes)
        outputs = self.experts(rows, routes.local, routes.of_expert)
        self.exchange.marked("experts")
        output = combine(outputs, routing.weights, routes, rows)
        return output.view(hidden_states.shape), routing.loss, routes.counts


def even_placement(num_experts: int, ranks: int, slots_per_rank: int) -> Placement:
    """Returns the placement in which all experts have alike many replicas.

    Slot s of rank r holds expert (r * slots_per_rank + s) mod E. With slots_per_rank = E / ep_size that is DeepSpeed's
    layout.

    Args:
        num_experts: E.
        ranks: that share the layer.
        slots_per_rank: of each.
    """
    rows = (range(rank * slots_per_rank, (rank + 1) * slots_per_rank) for rank in range(ranks))
    return Placement(num_experts, tuple(tuple(slot % num_experts for slot in row) for row in rows))


def _checked(
    placement: Placement | None,
    num_experts: int,
    ranks: int,
    ep_size: int,
    slots_per_rank: int | None,
    fault_threshold: int,
    *,
    where: str,
) -> Placement:
    """Returns the placement to use, or says why there is none."""
    if num_experts < 1 or ep_size < 1 or num_experts % ep_size:
        raise ConfigError(
            f"{num_experts} experts cannot be split over ep_size={ep_size}",
            where=where,
            fix="use an ep_size that divides num_experts",
        )
    if slots_per_rank is not None and slots_per_rank < 1:
        raise ConfigError(f"slots_per_rank={slots_per_rank}: a rank has at least one slot", where=where)
    if placement is None:
        placement = even_placement(num_experts, ranks, slots_per_rank or num_experts // ep_size)
        slots = len(placement.slots[0]) * ranks
        if slots < num_experts:
            raise ConfigError(
                f"{ranks} ranks have {slots} slots, too few for {num_experts} experts: expert {slots} would be nowhere",
                where=where,
                fix="raise slots_per_rank (or lower ep_size)",
            )
    if placement.num_experts != num_experts:
        raise ConfigError(
            f"the placement is for {placement.num_experts} experts, the layer has {num_experts}",
            where=where,
            fix="plan a placement for this layer",
        )
    if len(placement.slots) != ranks:
        raise ConfigError(
            f"the placement is for {len(placement.slots)} ranks, {ranks} share the layer",
            where=where,
            fix="plan a placement for this world: one place per rank of the layer's group",
        )
    for rank, slots_of in enumerate(placement.slots):
        if not slots_of or len(slots_of) != (slots_per_rank or len(slots_of)):
            raise ConfigError(
                f"the placement gives rank {rank} {len(slots_of)} slots, not {slots_per_rank or 'one or more'}",
                where=where,
                fix="plan with the slots_per_rank of the layer",
            )
    if not 1 <= fault_threshold <= ranks:
        raise ConfigError(
            f"fault_threshold={fault_threshold}: an expert is on 1 to {ranks} ranks",
            where=where,
            fix=f"use 1 to {ranks}",
        )
    feasible = sum(map(len, placement.slots)) // num_experts
    if 0 < feasible < fault_threshold:
        logger.warning(
            "%s: too few slots for %d replicas of %d experts; fault_threshold is %d",
            where,
            fault_threshold,
            num_experts,
            feasible,
        )
        fault_threshold = feasible
    for index in range(num_experts):
        holders = placement.holders(index)
        if not holders:
            raise ConfigError(
                f"no rank holds expert {index}", where=where, fix="plan a placement that has every expert"
            )
        if len(holders) < fault_threshold:
            raise ConfigError(
                f"expert {index} is on {len(holders)} ranks {list(holders)}, fault_threshold is {fault_threshold}",
                where=where,
                fix="plan the placement with this fault_threshold",
            )
    return placement


def _agreed_seed(seed: int | None, group: Any) -> int:
    """Returns the layer's seed: the given one, or one that the group's first rank draws; every rank draws a number."""
    if seed is not None:
        return seed
    drawn = torch.randint(2**62, (1,), dtype=torch.int64)
    if group is not None and dist.get_world_size(group) > 1:
        if dist.get_backend(group) == "nccl":
            drawn = drawn.cuda()
        dist.broadcast(drawn, dist.get_global_rank(group, 0), group=group)
    return int(drawn)
