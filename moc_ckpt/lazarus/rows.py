"""Moving rows between the orders of a Plan, in plain torch: on the CPU, and the meaning of the kernels on a GPU.

A route is one (token, choice) pair; T tokens with k choices have T * k of them, in this order. `kernels` has functions
of the same names, arguments and results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moc_ckpt.lazarus.dispatcher import Plan, make_plan

__all__ = [
    "combine_rows",
    "count_routes",
    "gather_rows",
    "make_plan",
    "scatter_rows",
    "send_rows",
    "sort_rows",
    "weigh_rows",
]


def count_routes(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Counts routes per expert.

    Args:
        experts: [T, k] int64, -1 for a route that goes nowhere.
        num_experts: E.

    Returns:
        Counts [E] int64, and what `send_rows` wants to know: [T * k] int64, every route's position among those of its
        expert.
    """
    key = experts.reshape(-1).remainder(num_experts + 1)  # nowhere comes last
    order = key.argsort(stable=True)
    counts = key.new_zeros(num_experts + 1).scatter_add_(0, key, torch.ones_like(key))
    first = counts.cumsum(0) - counts
    ahead = torch.arange(len(key), device=key.device) - first[key[order]]
    return counts[:-1], torch.empty_like(key).scatter_(0, order, ahead)


def send_rows(tokens: Tensor, experts: Tensor, seen: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Puts every route's token in its place in the send buffer.

    Args:
        tokens: [T, hidden].
        experts: [T, k] int64.
        seen: from `count_routes`.
        plan: the rank's.

    Returns:
        The send buffer [T * k, hidden], whose rows behind the last one in use are undefined; and every route's place in
        it, [T, k] int64, -1 for none.
    """
    flat = experts.reshape(-1)
    known = flat.clamp(min=0)
    to = (plan.send_last.t()[known] <= seen[:, None]).sum(1).clamp(max=len(plan.send_last) - 1)
    places = torch.where(flat < 0, -1, seen + plan.send_shift[to, known])
    source = torch.zeros(len(flat) + 1, dtype=torch.int64, device=flat.device)
    source.scatter_(0, places.remainder(len(flat) + 1), torch.arange(len(flat), device=flat.device))
    return tokens.index_select(0, source[:-1] // experts.shape[1]), places.view_as(experts)


def sort_rows(received: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Puts received rows into the experts' order.

    Args:
        received: [rows, hidden].
        plan: the rank's.

    Returns:
        The rows in that order, and the place of every received row in it, [rows] int64.
    """
    here = torch.arange(len(received), device=received.device)
    places = here + plan.recv_shift[torch.searchsorted(plan.recv_last, here, right=True)]
    return scatter_rows(received, places), places


def gather_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Returns rows[places]."""
    return rows.index_select(0, places)


def scatter_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Returns `out` with out[places] = rows; places are a permutation."""
    return torch.empty_like(rows).index_copy_(0, places, rows)


def combine_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """Sums the rows of every token, in single precision or better.

    Args:
        rows: [rows, hidden].
        places: [T, k] int64, -1 for none.
        weights: [T, k], or None for ones.

    Returns:
        [T, hidden] in the dtype of `rows`.
    """
    if not len(rows):
        return rows.new_zeros(len(places), rows.shape[1])
    picked = rows.index_select(0, places.clamp(min=0).reshape(-1)).view(*places.shape, -1)
    picked = picked.to(torch.promote_types(rows.dtype, torch.float32)) * (places >= 0)[..., None]
    if weights is not None:
        picked = picked * weights[..., None]
    return picked.sum(1).to(rows.dtype)


def weigh_rows(grad: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The backward pass of `combine_rows`.

    Args:
        grad: [T, hidden], of its result.
        rows: as there.
        places: as there.
        weights: as there.

    Returns:
        The gradients of rows and weights.
    """
    precise = torch.promote_types(rows.dtype, torch.float32)
    wide = grad.to(precise)
    out = rows.new_zeros(len(rows) + 1, rows.shape[1])  # the last one is for routes that went nowhere
    out.index_copy_(
        0,
        places.remainder(len(rows) + 1).reshape(-1),
        (wide[:, None] * weights[..., None]).to(rows.dtype).flatten(0, 1),
    )
    if not len(rows):
        return out[:-1], torch.zeros_like(weights)
    picked = rows.index_select(0, places.clamp(min=0).reshape(-1)).view(*places.shape, -1).to(precise)
    return out[:-1], ((picked * wide[:, None]).sum(-1) * (places >= 0)).to(weights.dtype)
