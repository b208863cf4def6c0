"""Which of its tokens each rank sends to which replica: the integers of Lazarus' flexible dispatch (algorithm 1).

From the counts of all ranks every rank computes, for itself alone, the same plan as all others: nothing is negotiated.
Everything is int64 and vectorised over ranks and experts. `kernels` computes the same in one GPU kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "make_plan", "rank_flows", "targets"]


class Plan(NamedTuple):
    """One rank's part in an exchange of rows, of N ranks and E experts; all int64, on the device of the counts.

    The rows that a rank sends are ordered by (receiver, expert, position among the rank's rows of the expert); those
    that it receives by (sender, expert, position); the experts work on them in the order (expert, sender, position).

    Attributes:
        send_last: [N, E], rows of expert e that go to ranks 0 to j.
        send_shift: [N, E], what is added to a row's position among the rank's rows of expert e to get its place in
            the send buffer, if it goes to rank j.
        recv_last: [N * E], rows received from senders 0 to i, of the last one up to expert e; not descending.
        recv_shift: [N * E], what is added to a received row's place to get the one in the experts' order.
        sizes: [2 * N + E], rows sent to every rank, rows received from every rank, rows received of every expert. All
            that the host must know.
    """

    send_last: Tensor
    send_shift: Tensor
    recv_last: Tensor
    recv_shift: Tensor
    sizes: Tensor


def targets(counts: Tensor, slots: Tensor) -> Tensor:
    """Returns how many rows of each expert each rank should work on: its share of slots, within one row.

    Shares are rounded by the rule floor(total * slots up to this rank / all slots), taken from rank to rank, so that
    they add up exactly.

    Args:
        counts: [N, E] int64, rows of expert e on rank i.
        slots: [N, E] int64, slots of expert e on rank j; every expert has one somewhere.

    Returns:
        [N, E] int64.
    """
    total = counts.sum(0)
    every = slots.sum(0).clamp(min=1)
    upto = slots.cumsum(0)
    ends = torch.div(total * upto, every, rounding_mode="floor")
    starts = torch.div(total * (upto - slots), every, rounding_mode="floor")
    return ends - starts


def rank_flows(counts: Tensor, slots: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns what one rank sends and receives, [N, E] int64 each: to rank j, and from rank i, of expert e.

    A rank first keeps what its own target has room for. The rows that are left are laid end to end in the order of
    their ranks, and so is the room that is left, beginning at rank e mod N: row n goes where place n is. That conserves
    by construction, and a rank needs its own row and column of the matrix alone, O(N * E).

    Args:
        counts: [N, E] int64, rows of expert e on rank i.
        slots: [N, E] int64, slots of expert e on rank j.
        rank: whose flows.
    """
    ranks, experts = counts.shape
    target = targets(counts, slots)
    kept = torch.minimum(counts, target)
    surplus, room = counts - kept, target - kept
    surplus_from = surplus.cumsum(0) - surplus
    room_from = room.cumsum(0) - room
    # Else the first ranks would be served first by every expert.
    first = torch.arange(experts, device=counts.device).remainder(ranks)
    room_from = room_from - room_from.gather(0, first[None])
    room_from = torch.where(room_from < 0, room_from + room.sum(0), room_from)
    surplus_to, room_to = surplus_from + surplus, room_from + room
    send = torch.minimum(surplus_to[rank], room_to) - torch.maximum(surplus_from[rank], room_from)
    recv = torch.minimum(surplus_to, room_to[rank]) - torch.maximum(surplus_from, room_from[rank])
    send, recv = send.clamp(min=0), recv.clamp(min=0)
    send[rank] += kept[rank]
    recv[rank] += kept[rank]
    return send, recv


def make_plan(counts: Tensor, slots: Tensor, rank: int) -> Plan:
    """Returns one rank's part in the exchange; arguments as of `rank_flows`."""
    send, recv = rank_flows(counts, slots, rank)
    send_last = send.cumsum(0)
    send_from = (send.reshape(-1).cumsum(0) - send.reshape(-1)).view_as(send)
    recv_last = recv.reshape(-1).cumsum(0)
    by_expert = recv.t().reshape(-1)
    sorted_from = (by_expert.cumsum(0) - by_expert).view(recv.shape[1], recv.shape[0]).t().reshape(-1)
    return Plan(
        send_last,
        send_from - (send_last - send),
        recv_last,
        sorted_from - (recv_last - recv.reshape(-1)),
        torch.cat([send.sum(1), recv.sum(1), recv.sum(0)]),
    )
