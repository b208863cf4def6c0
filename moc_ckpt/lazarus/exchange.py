"""Tokens to the experts' replicas and back, with gradients: one all-to-all there and one home, in each direction.

The host must know the split sizes of an all-to-all, and waits for nothing else: the counts of all ranks, the plan, the
copy of its sizes to pinned memory (on a stream of its own) and the packing of the send buffer are queued before it
waits for that copy, so the device has work meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moc_ckpt.lazarus import rows as torch_rows
from moc_ckpt.lazarus.dispatcher import Plan
from moc_ckpt.lazarus.shares import Shares, slot_shares
from moc_ckpt.lazarus.types import Placement

__all__ = ["Exchange", "Routes", "combine", "dispatch"]

# Newer versions of torch have another name for it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Exchange:
    """What all exchanges of one layer share. Not thread-safe; used in the same order on all ranks.

    Args:
        placement: one place per rank of the group.
        rank: of this process in the group.
        group: process group; None where this process has the layer for itself.

    Attributes:
        mark: called with the name of a phase at its end, for measurements; None for no such calls.
        use_kernels: whether Triton moves rows on a GPU; the plain torch path has the same results.
    """

    def __init__(self, placement: Placement, rank: int, group: Any) -> None:
        self.placement = placement
        self.rank = rank
        self.group = group
        self.ranks = len(placement.slots)
        self.mark: Callable[[str], None] | None = None
        self.use_kernels = True
        # With one sender, or one expert, rows arrive in the experts' order.
        self.sorts = self.ranks > 1 and len(placement.distinct(rank)) > 1
        self._on_device: dict[torch.device, Tensor] = {}
        self._shares: Tensor | None = None
        self.set_shares(slot_shares(placement))
        self._host = _HostCopy()

    def begin(self, experts: Tensor) -> Routes:
        """Counts routes and starts telling all ranks; collective. `Routes.plan` goes on.

        Args:
            experts: [T, k] int64, global ids, -1 for a route that goes nowhere.
        """
        ops = self._operations(experts.device)
        experts = experts.contiguous()
        counts, seen = ops.count_routes(experts, self.placement.num_experts)
        every = counts[None]
        work = None
        if self.ranks > 1:
            every = counts.new_empty(self.ranks * self.placement.num_experts)
            work = _all_gather(every, counts.contiguous(), group=self.group, async_op=True)
            every = every.view(self.ranks, -1)
        return Routes(self, ops, experts, seen, counts, every, work)

    def set_shares(self, shares: Shares) -> None:
        """Sets the weight of every rank and expert; the same on all ranks."""
        table = torch.tensor(shares, dtype=torch.int64)
        if self._shares is None or not torch.equal(table, self._shares):
            self._shares = table
            self._on_device.clear()

    def shares(self, device: torch.device) -> Tensor:
        """Returns the weight of every rank and expert, [N, E] int64."""
        if device not in self._on_device:
            assert self._shares is not None
            self._on_device[device] = self._shares.to(device)
        return self._on_device[device]

    def swap(self, rows: Tensor, incoming: list[int], outgoing: list[int]) -> Tensor:
        """Sends rows to all ranks and returns what came from them; collective.

        Args:
            rows: [sum of outgoing, hidden], contiguous.
            incoming: rows from every rank.
            outgoing: rows to every rank.
        """
        if self.ranks == 1:
            return rows
        out = rows.new_empty(sum(incoming), rows.shape[1])
        dist.all_to_all_single(out, rows, incoming, outgoing, group=self.group)
        return out

    def copy_sizes(self, sizes: Tensor) -> Callable[[], list[int]]:
        """Starts copying sizes to the host; returns what waits for them."""
        return self._host.start(sizes)

    def marked(self, phase: str) -> None:
        """Notes the end of a phase."""
        if self.mark is not None:
            self.mark(phase)

    def _operations(self, device: torch.device) -> Any:
        if device.type == "cuda" and self.use_kernels:
            kernels = _kernels()
            if kernels is not None:
                return kernels
        return torch_rows


class Routes:
    """The routes of one forward pass, from `Exchange.begin` to the end of its backward pass.

    Attributes:
        counts: [E] int64, this rank's routes per expert.
        of_expert: [E] int64 on the device, rows that this rank's experts get (0 for those it lacks); after `plan`.
        local: the same on the host, of the local experts alone; after `dispatch`.
    """

    def __init__(
        self, exchange: Exchange, ops: Any, experts: Tensor, seen: Any, counts: Tensor, every: Tensor, work: Any
    ) -> None:
        self.exchange = exchange
        self.ops = ops
        self.experts = experts
        self.counts = counts
        self.local: list[int] = []
        self.sent: list[int] = []
        self.received: list[int] = []
        self.places: Tensor | None = None
        self.order: Tensor | None = None
        self._seen, self._every, self._work = seen, every, work

    def plan(self) -> Plan:
        """Makes the plan and starts copying its sizes to the host."""
        exchange = self.exchange
        if self._work is not None:
            self._work.wait()  # on a GPU the stream waits, not the host
            self._work = None
        plan: Plan = self.ops.make_plan(self._every, exchange.shares(self._every.device), exchange.rank)
        self._sizes = exchange.copy_sizes(plan.sizes)
        self.of_expert = plan.sizes[2 * exchange.ranks :]
        return plan

    def send(self, tokens: Tensor) -> Tensor:
        """Forward: [T, hidden] -> rows in the experts' order."""
        exchange = self.exchange
        plan = self.plan()
        exchange.marked("plan")
        buffer, self.places = self.ops.send_rows(tokens.contiguous(), self.experts, self._seen, plan)
        sizes = self._sizes()
        ranks = exchange.ranks
        self.sent, self.received = sizes[:ranks], sizes[ranks : 2 * ranks]
        self.local = [sizes[2 * ranks + expert] for expert in exchange.placement.distinct(exchange.rank)]
        exchange.marked("pack")
        received = exchange.swap(buffer[: sum(self.sent)], self.received, self.sent)
        exchange.marked("exchange")
        if exchange.sorts:
            received, self.order = self.ops.sort_rows(received, plan)
        exchange.marked("sort")
        self._seen = None  # the backward pass needs places and order alone
        return received

    def send_back(self, grad: Tensor) -> Tensor:
        """Backward of `send`."""
        self.exchange.marked("backward experts")
        grad = self._unsorted(grad)
        self.exchange.marked("backward sort")
        home = self.exchange.swap(grad, self.sent, self.received)
        self.exchange.marked("backward exchange")
        out = self.ops.combine_rows(home, self.places, None)
        self.exchange.marked("backward pack")
        return out

    def bring(self, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Forward: the experts' rows -> [T, hidden], and the rows as they came home."""
        outputs = self._unsorted(outputs)
        self.exchange.marked("unsort")
        home = self.exchange.swap(outputs, self.sent, self.received)
        self.exchange.marked("exchange home")
        out = self.ops.combine_rows(home, self.places, weights)
        self.exchange.marked("combine")
        return out, home

    def bring_back(self, grad: Tensor, home: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Backward of `bring`."""
        self.exchange.marked("backward rest")
        rows, weight_grad = self.ops.weigh_rows(grad.contiguous(), home, self.places, weights)
        self.exchange.marked("backward combine")
        there = self.exchange.swap(rows, self.received, self.sent)
        self.exchange.marked("backward exchange home")
        if self.order is not None:
            there = self.ops.scatter_rows(there, self.order)
        self.exchange.marked("backward unsort")
        return there, weight_grad

    def _unsorted(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        return rows if self.order is None else self.ops.gather_rows(rows, self.order)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return routes.send(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.routes.send_back(grads[0]), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, routes: Routes, rows: Tensor) -> Tensor:
        ctx.routes = routes
        weights = weights.contiguous()
        out, home = routes.bring(outputs, weights)
        ctx.save_for_backward(home, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        home, weights = ctx.saved_tensors
        rows, weight_grad = ctx.routes.bring_back(grads[0], home, weights)
        return rows, weight_grad, None, None


def dispatch(tokens: Tensor, routes: Routes) -> Tensor:
    """Sends tokens to the experts; collective, as its backward pass is.

    Args:
        tokens: [T, hidden].
        routes: of these tokens.

    Returns:
        [rows, hidden], the rows for this rank's experts, sorted by expert; `routes.local` has the numbers.
    """
    out: Tensor = _Dispatch.apply(tokens, routes)
    return out


def combine(outputs: Tensor, weights: Tensor, routes: Routes, rows: Tensor) -> Tensor:
    """Brings the experts' outputs home and sums them per token; collective, as its backward pass is.

    Args:
        outputs: [rows, hidden], in the order that `dispatch` returned.
        weights: [T, k], of the routes.
        routes: those that `dispatch` used.
        rows: what `dispatch` returned. Through it the backward pass of `dispatch`, which is collective, takes place on
            every rank, also where no output depends on a row: experts may return a constant for no rows.

    Returns:
        [T, hidden] in the dtype of `outputs`.
    """
    if torch.is_grad_enabled() and not outputs.requires_grad and not weights.requires_grad:
        # Experts of other ranks may be trained where this rank's are frozen: all ranks take part in backward, or none.
        outputs = outputs.detach().requires_grad_()
    out: Tensor = _Combine.apply(outputs, weights, routes, rows)
    return out


# The stream of these copies on each device, for all layers.
_streams: dict[torch.device, Any] = {}


class _HostCopy:
    """Copies a few integers to the host without stopping the device."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None

    def start(self, sizes: Tensor) -> Callable[[], list[int]]:
        if sizes.device.type != "cuda":
            return sizes.tolist
        if self._pinned is None:
            self._pinned = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
        if sizes.device not in _streams:
            _streams[sizes.device] = torch.cuda.Stream(sizes.device)
        pinned, stream = self._pinned, _streams[sizes.device]
        stream.wait_stream(torch.cuda.current_stream(sizes.device))
        with torch.cuda.stream(stream):
            pinned.copy_(sizes, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()

        def wait() -> list[int]:
            copied.synchronize()
            del sizes_alive[:]  # until now the other stream was reading it
            values: list[int] = pinned.tolist()
            return values

        sizes_alive = [sizes]
        return wait


def _kernels() -> ModuleType | None:
    """Returns the kernels, or None where there is no Triton."""
    try:
        from moc_ckpt.lazarus import kernels
    except ImportError:
        return None
    return kernels
