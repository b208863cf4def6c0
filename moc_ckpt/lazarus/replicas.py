"""The optimizer of experts that have replicas: gradients are summed over them, and all copies get the same update."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.lazarus.replica_exchange import Interval, ReplicaExchange, split_evenly, split_first
from moc_ckpt.lazarus.types import Placement

__all__ = ["ExpertParam", "LayerReplicas", "ReplicaOptimizer", "StateShard", "sibling_optimizer"]

State = Literal["replicated", "sharded"]

# Elements of what stands in for a param group of which this rank has nothing, so that the group has state on all ranks.
_STAND_IN = 2


class ExpertParam(NamedTuple):
    """One parameter of a local expert.

    Attributes:
        name: within the expert's module.
        param: the model's parameter.
        group: index of its param group; None: it is frozen.
    """

    name: str
    param: Tensor
    group: int | None


class LayerReplicas(NamedTuple):
    """The local experts of one layer.

    Attributes:
        where: the layer's name, for messages.
        placement: which ranks hold which experts; places are ranks.
        experts: parameters by global expert id, in the order of the expert's module.
    """

    where: str
    placement: Placement
    experts: Mapping[int, Sequence[ExpertParam]]


class StateShard(NamedTuple):
    """The part of one expert parameter whose optimizer state this rank has; fields as in `ParamShard`."""

    param: Tensor
    start: int
    stop: int
    master: Tensor
    group: int
    state_key: Tensor
    state_offset: int
    holders: tuple[int, ...]
    replicas: tuple[int, ...]


@dataclass(slots=True)
class _Master:
    """The fp32 copy of an interval of one expert that lies in one param group.

    Attributes:
        group: index of the param group.
        interval: elements [start, stop) of the flattened expert.
        tensor: the copy, [stop - start].
    """

    group: int
    interval: Interval
    tensor: Tensor


@dataclass(slots=True)
class _Expert:
    """One local expert, flattened: its parameters one after the other, those of one param group together.

    Attributes:
        holders: the ranks that hold it, ascending.
        params: in the order in which they lie.
        offsets: where each begins.
        segments: (param group, elements) of each run of one group.
        grad: fp32 [numel], what backward passes have added up; a part of the layer's buffer.
        masters: this rank's, ascending.
    """

    holders: tuple[int, ...]
    params: list[ExpertParam]
    offsets: list[int]
    segments: list[tuple[int, int]]
    grad: Tensor
    masters: list[_Master] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return self.grad.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].param.dtype

    @property
    def placed(self) -> Iterator[tuple[ExpertParam, int]]:
        """Its parameters, and where each begins."""
        return zip(self.params, self.offsets, strict=True)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part of a flat tensor [numel], in the parameter's shape."""
        return [flat[offset : offset + item.param.numel()].view(item.param.shape) for item, offset in self.placed]


@dataclass(slots=True)
class _Layer:
    """The local experts of a layer, and the exchanges with other holders.

    Attributes:
        experts: by global id, ascending; without those that are frozen as a whole.
        grads: fp32, all experts' gradients one after the other.
        even: shares gradients (and sharded state) out evenly.
        reduced: this rank's shares of the summed gradients, between `reduce` and `step`.
    """

    experts: dict[int, _Expert]
    grads: Tensor
    even: ReplicaExchange
    reduced: dict[int, Tensor] = field(default_factory=dict)


class ReplicaOptimizer:
    """Trains the experts of all layers. Methods are collective where they say so; not thread-safe.

    Backward passes add to fp32 buffers (`param.grad` is taken and set to None), so that micro-batches add up without
    rounding and a reduction happens once per step. `reduce` sums over the replicas in the order of the ranks, on one
    rank per element, so that all holders get the same bits. Building it is collective: all copies of an expert get its
    first holder's values.

    Args:
        layers: every layer with replicas, in the same order on all ranks.
        like: an optimizer whose class and settings to use; it is not changed. Its update must be elementwise.
        groups: options of the param groups, without `params`; the same on all ranks.
        state: `replicated`: every holder has all state of an expert and does the whole update; `sharded`: the holders
            share the state out evenly, and gather the weights after the update.
        group: the process group over whose ranks the layers are placed.
        divisor: what the sums of gradients are divided by.

    Attributes:
        optimizer: does the update of the masters; its param groups follow `groups`.
        state: as given.
    """

    def __init__(
        self,
        layers: Sequence[LayerReplicas],
        like: torch.optim.Optimizer,
        groups: Sequence[Mapping[str, Any]],
        *,
        state: State,
        group: Any,
        divisor: float,
    ) -> None:
        self.state = state
        self._group = group
        self._rank = dist.get_rank(group)
        self._divisor = divisor
        for layer in layers:
            self._share_weights(layer)
        self._layers = [self._build(layer) for layer in layers]
        members: list[list[Tensor]] = [[] for _ in groups]
        for master in self._masters():
            members[master.group].append(master.tensor)
        device = self._layers[0].grads.device
        for found in members:
            if not found:
                found.append(torch.zeros(_STAND_IN, device=device, requires_grad=True))
        self.optimizer = sibling_optimizer(
            like, [{**options, "params": found} for options, found in zip(groups, members, strict=True)]
        )
        self._hooks = [
            item.param.register_post_accumulate_grad_hook(_adder(view))
            for layer in self._layers
            for expert in layer.experts.values()
            for item, view in zip(expert.params, expert.views(expert.grad), strict=True)
        ]

    # ------------------------------------------------------------------------------------------ one step

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums the gradients of every expert over its replicas; collective, one exchange per layer (two if replicated).

        Afterwards backward passes add to gradients that are not of this step: call `step` or `discard` before them.
        """
        for layer in self._layers:
            layer.reduced = layer.even.reduce({index: expert.grad for index, expert in layer.experts.items()})
            for share in layer.reduced.values():
                share.div_(self._divisor)
            if self.state == "replicated":
                layer.even.gather(layer.reduced, {index: expert.grad for index, expert in layer.experts.items()})

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Returns this rank's part of the squared norm of the summed gradients, a float64 scalar on the device.

        Over all ranks every element of every expert is counted once. Not collective; between `reduce` and `step`.
        """
        norms = [
            torch.linalg.vector_norm(share, dtype=torch.float64)
            for layer in self._layers
            for share in layer.reduced.values()
            if share.numel()
        ]
        return torch.stack(norms).square().sum() if norms else self._layers[0].grads.new_zeros((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, scale: Tensor | float) -> None:
        """Updates masters and weights with the gradients of `reduce`; collective if sharded.

        Args:
            scale: what gradients are multiplied with first; the same bits on all ranks.
        """
        whole = self.state == "replicated"
        for layer in self._layers:
            if layer.experts and (not isinstance(scale, float) or scale != 1.0):
                torch._foreach_mul_([layer.grads] if whole else list(layer.reduced.values()), scale)
            for index, expert in layer.experts.items():
                flat = expert.grad if whole else layer.reduced[index]
                at = 0
                for master in expert.masters:
                    start, stop = master.interval
                    at = start if whole else at
                    master.tensor.grad = flat[at : at + stop - start]
                    at += stop - start
        for options in self.optimizer.param_groups:
            for tensor in options["params"]:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
        self.optimizer.step()
        for options in self.optimizer.param_groups:
            for tensor in options["params"]:
                tensor.grad = None
        self.discard()
        self.derive_weights()

    @torch.no_grad()
    def discard(self) -> None:
        """Forgets the gradients of this step; not collective."""
        for layer in self._layers:
            layer.grads.zero_()
            layer.reduced = {}

    @torch.no_grad()
    def derive_weights(self) -> None:
        """Casts the masters into the weights; collective if sharded, which gathers them."""
        for layer in self._layers:
            if self.state == "replicated":
                parts = [self._shard(expert, *item) for expert in layer.experts.values() for item in expert.placed]
                if parts:
                    torch._foreach_copy_(
                        [part.param for part in parts], [part.master.view(part.param.shape) for part in parts]
                    )
                continue
            shares = {
                index: torch.cat([master.tensor.to(expert.dtype) for master in expert.masters])
                if expert.masters
                else torch.empty(0, dtype=expert.dtype, device=layer.grads.device)
                for index, expert in layer.experts.items()
            }
            flats = {
                index: torch.empty(expert.numel, dtype=expert.dtype, device=layer.grads.device)
                for index, expert in layer.experts.items()
            }
            layer.even.gather(shares, flats)
            for index, expert in layer.experts.items():
                torch._foreach_copy_([item.param for item in expert.params], expert.views(flats[index]))

    def close(self) -> None:
        """Takes the hooks off the parameters; not collective, may be repeated."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ------------------------------------------------------------------------------------------ its state

    def shards(self) -> Iterator[StateShard]:
        """Yields every trainable expert parameter of this rank with the part of its state that this rank has."""
        for layer in self._layers:
            for expert in layer.experts.values():
                for item, offset in expert.placed:
                    yield self._shard(expert, item, offset)

    def _shard(self, expert: _Expert, item: ExpertParam, offset: int) -> StateShard:
        holders = expert.holders if self.state == "replicated" else (self._rank,)
        assert item.group is not None
        numel = item.param.numel()
        for master in expert.masters:
            start, stop = (min(max(edge - offset, 0), numel) for edge in master.interval)
            if start < stop:
                at = offset + start - master.interval[0]
                view = master.tensor.detach().narrow(0, at, stop - start)
                return StateShard(item.param, start, stop, view, item.group, master.tensor, at, holders, expert.holders)
        key = self.optimizer.param_groups[item.group]["params"][0]
        return StateShard(item.param, 0, 0, key.detach()[:0], item.group, key, 0, holders, expert.holders)

    # ------------------------------------------------------------------------------------------ building

    def _masters(self) -> Iterator[_Master]:
        return (master for layer in self._layers for expert in layer.experts.values() for master in expert.masters)

    def _build(self, layer: LayerReplicas) -> _Layer:
        plans = {index: _flatten(layer.experts[index]) for index in sorted(layer.experts)}
        plans = {index: plan for index, plan in plans.items() if plan[0]}  # the others are frozen
        sizes = [sum(item.param.numel() for item in params) for params, _ in plans.values()]
        device = next(item.param.device for params in layer.experts.values() for item in params)
        grads = torch.zeros(sum(sizes), device=device)
        experts = {}
        for (index, (params, segments)), grad in zip(plans.items(), grads.split(sizes), strict=True):
            if len({item.param.dtype for item in params}) != 1:
                raise UnsupportedError(
                    f"expert {index} has parameters of several dtypes",
                    where=layer.where,
                    fix="give all parameters of an expert one dtype",
                )
            offsets = list(accumulate((item.param.numel() for item in params[:-1]), initial=0))
            experts[index] = _Expert(layer.placement.holders(index), params, offsets, segments, grad)
        even = {
            index: split_evenly(expert.holders, [numel for _, numel in expert.segments])
            for index, expert in experts.items()
        }
        for index, expert in experts.items():
            begins = accumulate((numel for _, numel in expert.segments), initial=0)
            whole = [(begin, begin + numel) for begin, (_, numel) in zip(begins, expert.segments, strict=False)]
            intervals = whole if self.state == "replicated" else even[index].share_of(self._rank)
            expert.masters = [
                _Master(group, interval, torch.empty(interval[1] - interval[0], device=device, requires_grad=True))
                for (group, _), interval in zip(expert.segments, intervals, strict=True)
                if interval[0] < interval[1]
            ]
        for expert in experts.values():
            for master in expert.masters:
                self._read_weights(expert, master)
        return _Layer(experts, grads, ReplicaExchange(even, self._group, device))

    @staticmethod
    @torch.no_grad()
    def _read_weights(expert: _Expert, master: _Master) -> None:
        flat = torch.cat([item.param.detach().reshape(-1) for item in expert.params])
        master.tensor.copy_(flat[slice(*master.interval)])

    @torch.no_grad()
    def _share_weights(self, layer: LayerReplicas) -> None:
        """Gives all copies of an expert its first holder's values, of frozen parameters too; collective."""
        flats, splits = {}, {}
        for index, params in layer.experts.items():
            parts = [item.param.detach().reshape(-1).view(torch.uint8) for item in params if item.param.numel()]
            flats[index] = torch.cat(parts)
            splits[index] = split_first(layer.placement.holders(index), flats[index].numel())
        own = {index: flat if splits[index].holders[0] == self._rank else flat[:0] for index, flat in flats.items()}
        ReplicaExchange(splits, self._group).gather(own, flats)
        for index, params in layer.experts.items():
            at = 0
            for item in params:
                nbytes = item.param.numel() * item.param.element_size()
                # A copy of its own: views of another dtype must begin at a multiple of its size.
                values = flats[index][at : at + nbytes].clone().view(item.param.dtype)
                item.param.copy_(values.view(item.param.shape))
                at += nbytes


def sibling_optimizer(like: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns an optimizer of the same class and settings with other param groups and no state.

    Settings that a class keeps in attributes, beside its param groups, are shared with `like`.
    """
    found = object.__new__(type(like))
    # Schedulers put their own `step` on an instance, to count its calls.
    found.__dict__.update({name: value for name, value in like.__dict__.items() if name != "step"})
    for name, value in like.__dict__.items():
        if name.startswith("_optimizer_") and isinstance(value, OrderedDict):
            found.__dict__[name] = OrderedDict()
    found.param_groups = groups
    found.state = defaultdict(dict)
    return found


def _flatten(params: Sequence[ExpertParam]) -> tuple[list[ExpertParam], list[tuple[int, int]]]:
    """Orders an expert's trained parameters by param group; returns them and the (group, elements) of each run."""
    members: dict[int, list[ExpertParam]] = {}
    for item in params:
        if item.group is not None and item.param.numel():
            members.setdefault(item.group, []).append(item)
    groups = sorted(members)
    ordered = [item for group in groups for item in members[group]]
    return ordered, [(group, sum(item.param.numel() for item in members[group])) for group in groups]


def _adder(total: Tensor) -> Any:
    def add(param: Tensor) -> None:
        if param.grad is not None:
            total.add_(param.grad)
            param.grad = None

    return add
