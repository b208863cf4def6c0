"""The dispatcher on a GPU, in Triton: `rows` in fewer and larger steps, with the same integers.

One kernel counts routes, one makes the whole plan, one looks every route up in the plan and moves its row in the same
breath. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moc_ckpt.lazarus import dispatcher
from moc_ckpt.lazarus.dispatcher import Plan

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

# Routes that one program counts.
_BLOCK = 128
# Ranks x experts of which one program keeps a plan in registers; larger plans are made in torch, on the device too.
_ONE_PROGRAM = 8192


@triton.jit
def _count(experts, within, counts, routes, E, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    block = tl.program_id(0)
    route = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + route, mask=route < routes, other=-1)
    column = tl.arange(0, E_PAD)
    hit = (expert[:, None] == column[None, :]).to(tl.int32)
    ahead = tl.sum((tl.cumsum(hit, axis=0) - 1) * hit, axis=1)
    tl.store(within + route, ahead, mask=route < routes)
    tl.store(counts + block * E + column, tl.sum(hit, axis=0).to(tl.int64), mask=column < E)


@triton.jit
def _plan(
    counts,
    slots,
    send_last,
    send_shift,
    recv_last,
    recv_shift,
    sizes,
    rank,
    N,
    E,
    N_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
):
    row = tl.arange(0, N_PAD)
    column = tl.arange(0, E_PAD)
    j = row[:, None]
    e = column[None, :]
    inside = (j < N) & (e < E)
    at = j * E + e
    count = tl.load(counts + at, mask=inside, other=0)
    slot = tl.load(slots + at, mask=inside, other=0)
    # Targets, what stays, what is left over and where there is room.
    total = tl.sum(count, axis=0)[None, :]
    every = tl.maximum(tl.sum(slot, axis=0), 1)[None, :]
    upto = tl.cumsum(slot, axis=0)
    target = total * upto // every - total * (upto - slot) // every
    kept = tl.minimum(count, target)
    surplus = count - kept
    room = target - kept
    surplus_from = tl.cumsum(surplus, axis=0) - surplus
    room_from = tl.cumsum(room, axis=0) - room
    room_from = room_from - tl.sum(tl.where(j == e % N, room_from, 0), axis=0)[None, :]
    room_from = tl.where(room_from < 0, room_from + tl.sum(room, axis=0)[None, :], room_from)
    surplus_to = surplus_from + surplus
    room_to = room_from + room
    # This rank's row and column of the matrix.
    me = j == rank
    my_from = tl.sum(tl.where(me, surplus_from, 0), axis=0)[None, :]
    my_to = tl.sum(tl.where(me, surplus_to, 0), axis=0)[None, :]
    my_room_from = tl.sum(tl.where(me, room_from, 0), axis=0)[None, :]
    my_room_to = tl.sum(tl.where(me, room_to, 0), axis=0)[None, :]
    own = tl.where(me, kept, 0)
    send = tl.maximum(tl.minimum(my_to, room_to) - tl.maximum(my_from, room_from), 0) + own
    recv = tl.maximum(tl.minimum(surplus_to, my_room_to) - tl.maximum(surplus_from, my_room_from), 0) + own
    # Where rows lie.
    last = tl.cumsum(send, axis=0)
    to_rank = tl.sum(send, axis=1)
    send_from = (tl.cumsum(to_rank, axis=0) - to_rank)[:, None] + tl.cumsum(send, axis=1) - send
    tl.store(send_last + at, last, mask=inside)
    tl.store(send_shift + at, send_from - (last - send), mask=inside)
    from_rank = tl.sum(recv, axis=1)
    of_expert = tl.sum(recv, axis=0)
    recv_to = (tl.cumsum(from_rank, axis=0) - from_rank)[:, None] + tl.cumsum(recv, axis=1)
    sorted_from = (tl.cumsum(of_expert, axis=0) - of_expert)[None, :] + tl.cumsum(recv, axis=0) - recv
    tl.store(recv_last + at, recv_to, mask=inside)
    tl.store(recv_shift + at, sorted_from - (recv_to - recv), mask=inside)
    tl.store(sizes + row, to_rank, mask=row < N)
    tl.store(sizes + N + row, from_rank, mask=row < N)
    tl.store(sizes + 2 * N + column, of_expert, mask=column < E)


@triton.jit
def _copy_row(source, target, hidden: tl.constexpr, wanted, H_BLOCK: tl.constexpr):
    for start in range(0, hidden, H_BLOCK):
        column = start + tl.arange(0, H_BLOCK)
        tl.store(target + column, tl.load(source + column, mask=column < hidden), mask=(column < hidden) & wanted)


@triton.jit
def _send(
    tokens,
    experts,
    within,
    before,
    send_last,
    send_shift,
    buffer,
    places,
    hidden: tl.constexpr,
    N,
    E,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    N_PAD: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, N_PAD)
    for choice in tl.static_range(K):
        route = token * K + choice
        expert = tl.load(experts + route)
        wanted = expert >= 0
        expert = tl.maximum(expert, 0)
        position = tl.load(before + (route // BLOCK) * E + expert) + tl.load(within + route)
        last = tl.load(send_last + rank * E + expert, mask=rank < N, other=2**62)
        to = tl.minimum(tl.sum((last <= position).to(tl.int32), axis=0), N - 1)
        place = position + tl.load(send_shift + to * E + expert)
        tl.store(places + route, tl.where(wanted, place, -1))
        _copy_row(tokens + token * hidden, buffer + place * hidden, hidden, wanted, H_BLOCK)


@triton.jit
def _sort(
    received,
    recv_last,
    recv_shift,
    out,
    places,
    hidden: tl.constexpr,
    segments,
    STEPS: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low = row * 0
    high = low + segments
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        after = tl.load(recv_last + middle, mask=middle < segments, other=2**62) <= row
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
    place = row + tl.load(recv_shift + low)
    tl.store(places + row, place)
    _copy_row(received + row * hidden, out + place * hidden, hidden, place >= 0, H_BLOCK)


@triton.jit
def _move(rows, places, out, hidden: tl.constexpr, GATHER: tl.constexpr, H_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row)
    if GATHER:
        _copy_row(rows + place * hidden, out + row * hidden, hidden, place >= 0, H_BLOCK)
    else:
        _copy_row(rows + row * hidden, out + place * hidden, hidden, place >= 0, H_BLOCK)


@triton.jit
def _combine(
    rows,
    places,
    weights,
    out,
    hidden: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    for start in range(0, hidden, H_BLOCK):
        column = start + tl.arange(0, H_BLOCK)
        total = tl.zeros([H_BLOCK], dtype=wide)
        for choice in tl.static_range(K):
            place = tl.load(places + token * K + choice)
            value = tl.load(rows + place * hidden + column, mask=(column < hidden) & (place >= 0), other=0).to(wide)
            if WEIGHTED:
                value = value * tl.load(weights + token * K + choice)
            total += value
        tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


@triton.jit
def _weigh(
    grad,
    rows,
    places,
    weights,
    row_grad,
    weight_grad,
    hidden: tl.constexpr,
    K: tl.constexpr,
    DOUBLE: tl.constexpr,
    H_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        weight = tl.load(weights + token * K + choice)
        total = tl.zeros([H_BLOCK], dtype=wide)
        for start in range(0, hidden, H_BLOCK):
            column = start + tl.arange(0, H_BLOCK)
            inside = (column < hidden) & (place >= 0)
            given = tl.load(grad + token * hidden + column, mask=inside, other=0).to(wide)
            total += given * tl.load(rows + place * hidden + column, mask=inside, other=0).to(wide)
            tl.store(row_grad + place * hidden + column, (given * weight).to(row_grad.dtype.element_ty), mask=inside)
        tl.store(weight_grad + token * K + choice, tl.sum(total, axis=0))


def count_routes(experts: Tensor, num_experts: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `rows.count_routes`; what `send_rows` wants to know is the routes counted before, and within, each block."""
    routes = experts.numel()
    blocks = max(1, triton.cdiv(routes, _BLOCK))
    within = torch.empty(routes, dtype=torch.int32, device=experts.device)
    counts = torch.empty(blocks, num_experts, dtype=torch.int64, device=experts.device)
    _count[(blocks,)](experts, within, counts, routes, num_experts, BLOCK=_BLOCK, E_PAD=_padded(num_experts))
    upto = counts.cumsum(0)
    return upto[-1], (upto - counts, within)


def make_plan(counts: Tensor, slots: Tensor, rank: int) -> Plan:
    """As `dispatcher.make_plan`."""
    ranks, experts = counts.shape
    if _padded(ranks) * _padded(experts) > _ONE_PROGRAM:
        return dispatcher.make_plan(counts, slots, rank)
    tables = torch.empty(4, ranks, experts, dtype=torch.int64, device=counts.device)
    sizes = torch.empty(2 * ranks + experts, dtype=torch.int64, device=counts.device)
    _plan[(1,)](
        counts,
        slots,
        *tables,
        sizes,
        rank,
        ranks,
        experts,
        N_PAD=_padded(ranks),
        E_PAD=_padded(experts),
        num_warps=min(16, max(1, _padded(ranks) * _padded(experts) // 256)),
    )
    return Plan(tables[0], tables[1], tables[2].view(-1), tables[3].view(-1), sizes)


def send_rows(tokens: Tensor, experts: Tensor, seen: tuple[Tensor, Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    """As `rows.send_rows`."""
    before, within = seen
    hidden = tokens.shape[1]
    buffer = tokens.new_empty(experts.numel(), hidden)
    places = torch.empty_like(experts)
    ranks, number = plan.send_last.shape
    if len(tokens):
        _send[(len(tokens),)](
            tokens,
            experts,
            within,
            before,
            plan.send_last,
            plan.send_shift,
            buffer,
            places,
            hidden,
            ranks,
            number,
            K=experts.shape[1],
            BLOCK=_BLOCK,
            N_PAD=_padded(ranks),
            H_BLOCK=_columns(hidden),
        )
    return buffer, places


def sort_rows(received: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """As `rows.sort_rows`."""
    out = torch.empty_like(received)
    places = torch.empty(len(received), dtype=torch.int64, device=received.device)
    segments = plan.recv_last.numel()
    if len(received):
        _sort[(len(received),)](
            received,
            plan.recv_last,
            plan.recv_shift,
            out,
            places,
            received.shape[1],
            segments,
            STEPS=segments.bit_length(),
            H_BLOCK=_columns(received.shape[1]),
        )
    return out, places


def gather_rows(rows: Tensor, places: Tensor) -> Tensor:
    """As `rows.gather_rows`."""
    return _moved(rows, places, gather=True)


def scatter_rows(rows: Tensor, places: Tensor) -> Tensor:
    """As `rows.scatter_rows`."""
    return _moved(rows, places, gather=False)


def combine_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """As `rows.combine_rows`."""
    hidden = rows.shape[1]
    out = rows.new_empty(len(places), hidden)
    if len(places):
        _combine[(len(places),)](
            rows,
            places,
            rows if weights is None else weights,
            out,
            hidden,
            K=places.shape[1],
            WEIGHTED=weights is not None,
            DOUBLE=rows.dtype == torch.float64,
            H_BLOCK=_columns(hidden),
        )
    return out


def weigh_rows(grad: Tensor, rows: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `rows.weigh_rows`."""
    hidden = rows.shape[1]
    row_grad, weight_grad = torch.empty_like(rows), torch.empty_like(weights)
    if len(places):
        _weigh[(len(places),)](
            grad,
            rows,
            places,
            weights,
            row_grad,
            weight_grad,
            hidden,
            K=places.shape[1],
            DOUBLE=rows.dtype == torch.float64,
            H_BLOCK=_columns(hidden),
        )
    return row_grad, weight_grad


def _moved(rows: Tensor, places: Tensor, *, gather: bool) -> Tensor:
    out = torch.empty_like(rows)
    if len(rows):
        _move[(len(rows),)](rows, places, out, rows.shape[1], GATHER=gather, H_BLOCK=_columns(rows.shape[1]))
    return out


def _padded(number: int) -> int:
    """Returns the power of two, at least 2, that a block of so many has."""
    return max(2, triton.next_power_of_2(number))


def _columns(hidden: int) -> int:
    """Returns how many columns of a row a program moves at once."""
    return min(2048, _padded(hidden))
