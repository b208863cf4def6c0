"""How many tokens each expert processed, read off the gates while the model trains (MoC-System section 3, eq. 7).

DeepSpeed's gates return exp_counts, the assignments of the local tokens to all experts of the layer before the
capacity cuts them. A hook keeps a reference to it and nothing else; the arithmetic waits until somebody takes the
counts, and adds all layers, micro-batches and steps with a few kernels, or on the host in another thread.

What is processed of c assignments is min(c, capacity). For top-1 and top-2 gates that is what DeepSpeed
dispatches (top-1 with random token selection can drop a token more, once in 2**24, where its random number is
exactly 0). For top-k gates it is so from the DeepSpeed that ranks tokens by probability; older ones rank by logit and
drop tokens below the capacity too, so where the gate returns its dispatch mask (they all do) the mask is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.state.unit import MoELayer

__all__ = ["CountLayout", "LayerTokens", "TokenCounter"]

#: Gate calls that are kept until they are added up, so that many micro-batches do not pin memory.
_MAX_PENDING = 1024


class LayerTokens(NamedTuple):
    """Counts of one MoE layer.

    Attributes:
        processed: tokens that each expert processed, by global expert id; assignments over capacity are left out.
        routed: assignments to all experts before any were dropped: tokens times top-k.
    """

    processed: tuple[int, ...]
    routed: int


@dataclass(frozen=True, slots=True)
class CountLayout:
    """Where each layer's counts lie in the vector of `TokenCounter.take`. Pure.

    Per layer, in the order of the ordinals: processed tokens of expert 0, 1, ..., then the routed assignments.

    Attributes:
        experts: number of experts of each MoE layer.
    """

    experts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements of the vector."""
        return sum(self.experts) + len(self.experts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer starts."""
        return tuple(accumulate((count + 1 for count in self.experts[:-1]), initial=0)) if self.experts else ()

    def split(self, vector: Sequence[int]) -> tuple[LayerTokens, ...]:
        """Splits a vector of counts, of one rank or summed over ranks, into layers.

        Args:
            vector: `size` integers, such as `tensor.tolist()` gives.

        Raises:
            ValueError: if the length is another.
        """
        if len(vector) != self.size:
            raise ValueError(f"{len(vector)} counts for {len(self.experts)} MoE layers, which have {self.size}")
        return tuple(
            LayerTokens(tuple(vector[at : at + count]), vector[at + count])
            for at, count in zip(self.offsets, self.experts, strict=True)
        )


class _Call(NamedTuple):
    """What one call of a gate left behind.

    Attributes:
        layer: ordinal of the MoE layer.
        routed: int64 [experts], assignments before the drop; not copied.
        capacity: most tokens that one expert takes of this call; None: no limit, or `kept` says it.
        kept: int64 [experts], assignments after the drop, where the capacity does not tell.
    """

    layer: int
    routed: torch.Tensor
    capacity: int | None
    kept: torch.Tensor | None


class TokenCounter:
    """Counts the tokens of the training steps of this rank; the sum over ranks is the caller's.

    Counted is every gate call in a forward pass of `engine.module` that runs in training mode with gradients
    enabled. Not counted are evaluation, passes under no_grad, passes that raise, steps that are skipped, and what
    activation checkpointing computes again (that happens in backward, outside of any forward pass). The first pass
    of reentrant checkpointing runs under no_grad inside the model's forward pass, and is counted there.

    Nothing that the model computes changes: no random number is drawn, no tensor of the model is written. Code that
    changes a gate's exp_counts in place changes the counts.

    Not thread-safe: all calls and forward passes belong to the training thread. Nothing here is collective.

    Args:
        engine: a DeepSpeed engine.
        layers: all its MoE layers, in the order of their ordinals.

    Raises:
        UnsupportedError: if a layer is neither LazarusMoE nor DeepSpeed's MoE with its TopKGate; no hook is installed
            then.
    """

    def __init__(self, engine: Any, layers: Sequence[MoELayer]) -> None:
        self.layout = CountLayout(tuple(layer.num_experts for layer in layers))
        self._offsets = self.layout.offsets
        model = engine.module
        gates = [_find_gate(model, layer) for layer in layers]
        self._device = torch.device(engine.device)
        #: Calls of steps that are done, and what was added up of earlier ones; None: nothing.
        self._finished: list[_Call] = []
        self._total: torch.Tensor | None = None
        #: Calls of the step that is under way; those that were too many to keep are in `_early`.
        self._pending: list[_Call] = []
        self._early: torch.Tensor | None = None
        self._depth = 0
        self._counting = False
        self._returned = False
        self._start = 0
        self._handles = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._return),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for ordinal, gate in enumerate(gates):
            self._handles.append(gate.register_forward_hook(functools.partial(self._record, ordinal)))

    def step_done(self, skipped: bool) -> None:
        """Takes in the micro-batches since the last call, at the end of an optimizer step; no host synchronisation.

        Args:
            skipped: the step overflowed and changed nothing, so its tokens are lost: they are dropped.
        """
        if self._counting:  # an interrupt (no Exception) left a forward pass, without its hooks
            del self._pending[self._start :]
        self._depth, self._counting = 0, False
        calls, early = self._pending, self._early
        self._pending, self._early = [], None
        if skipped:
            return
        self._finished += calls
        if early is not None:
            self._total = early if self._total is None else self._total + early
        if len(self._finished) >= _MAX_PENDING:
            self._total = self._take()

    def take(self) -> torch.Tensor:
        """Returns the counts of all steps done since the last call and starts again at zero; no host synchronisation.

        Micro-batches of a step that is under way are left for later.

        Returns:
            int64 [layout.size] on the engine's device, the caller's own; see `layout`.
        """
        taken, self._total = self._take(), None
        return taken

    def take_to_host(self) -> Callable[[], npt.NDArray[np.int64]]:
        """Takes what `take` does, at the least cost for the training thread: one kernel and one copy.

        Returns:
            What adds up and returns the counts, int64 [layout.size]. It waits for the device; any thread may call it.
        """
        calls, total = self._finished, self._total
        self._finished, self._total = [], None
        both = (tensor for call in calls for tensor in (call.routed, call.kept) if tensor is not None)
        parts = [tensor for tensor in both if _is_on(tensor, self._device)]
        if total is not None:
            parts.append(total)
        copied = _to_host(parts)

        def add_up() -> npt.NDArray[np.int64]:
            here = iter(copied())
            fetched = [
                call._replace(
                    routed=next(here) if _is_on(call.routed, self._device) else call.routed,
                    kept=next(here) if call.kept is not None and _is_on(call.kept, self._device) else call.kept,
                )
                for call in calls
            ]
            counts = torch.zeros(self.layout.size, dtype=torch.int64) if total is None else next(here).clone()
            self._add(fetched, counts)
            return counts.numpy()

        return add_up

    def reset(self) -> None:
        """Forgets everything since the last `take`: after a restore the tokens belong to a timeline that is gone."""
        self._pending, self._early = [], None
        self._depth, self._counting = 0, False
        self._finished, self._total = [], None

    def close(self) -> None:
        """Removes the hooks. Counts that were not taken stay; doing it again changes nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------------------------------- hooks

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._counting = module.training and torch.is_grad_enabled()
            self._returned = False
            self._start = len(self._pending)

    def _record(self, layer: int, gate: Any, args: Any, output: Any) -> None:
        # Inside of backward a forward pass can only be a repetition, also if the model calls autograd in its forward.
        if not self._counting or torch._C._current_graph_task_id() != -1:
            return
        capacity, kept = _limit(gate, output)
        self._pending.append(_Call(layer, output[-1], capacity, kept))

    def _return(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._returned = True

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Runs also where the forward pass raised."""
        self._depth = max(self._depth - 1, 0)
        if self._depth or not self._counting:
            self._returned = False
            return
        self._counting = False
        if not self._returned:
            del self._pending[self._start :]
        elif len(self._pending) >= _MAX_PENDING:
            calls, self._pending = self._pending, []
            if self._early is None:
                self._early = self._zeros()
            self._add(calls, self._early)

    # ------------------------------------------------------------------------------------------ adding up

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self.layout.size, dtype=torch.int64, device=self._device)

    def _take(self) -> torch.Tensor:
        """Adds up the calls of finished steps, on the device."""
        calls, self._finished = self._finished, []
        total = self._zeros() if self._total is None else self._total
        self._add(calls, total)
        return total

    def _add(self, calls: Sequence[_Call], total: torch.Tensor) -> None:
        """Adds calls to a vector of counts, with a number of kernels that does not grow with the calls."""
        # Calls of a layer with one capacity are one block; layers with like blocks are stacked and added together.
        blocks: dict[tuple[int, int | None, bool], list[_Call]] = {}
        for call in calls:
            blocks.setdefault((call.layer, call.capacity, call.kept is None), []).append(call)
        alike: dict[tuple[int, int | None, bool, int, torch.device], dict[int, list[_Call]]] = {}
        for (layer, capacity, clamped), block in sorted(blocks.items(), key=lambda item: item[0][0]):
            key = (self.layout.experts[layer], capacity, clamped, len(block), block[0].routed.device)
            alike.setdefault(key, {})[layer] = block
        for (experts, capacity, clamped, times, _), members in alike.items():
            shape = (len(members), times, experts)
            flat = [call for block in members.values() for call in block]
            routed = torch.stack([call.routed for call in flat]).view(shape)
            if not clamped:
                processed = torch.stack([call.kept for call in flat if call.kept is not None]).view(shape)
            else:
                processed = routed if capacity is None else routed.clamp(max=capacity)
            processed = processed.sum(1, dtype=torch.int64).to(total.device, non_blocking=True)
            assigned = routed.sum((1, 2), dtype=torch.int64).to(total.device, non_blocking=True)
            for at, first, count in _runs(tuple(members), self.layout.experts):
                start = self._offsets[first]
                rows = total[start : start + count * (experts + 1)].view(count, experts + 1)
                rows[:, :experts].add_(processed[at : at + count])
                rows[:, experts].add_(assigned[at : at + count])


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type


def _to_host(parts: Sequence[torch.Tensor]) -> Callable[[], Sequence[torch.Tensor]]:
    """Begins to copy int64 vectors to the host, together.

    Returns:
        What waits for the copy and returns them.
    """
    if not parts or not parts[0].is_cuda:
        return lambda: parts
    flat = torch.cat([part.reshape(-1) for part in parts])
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    sizes = [part.numel() for part in parts]

    def fetched() -> Sequence[torch.Tensor]:
        copied.synchronize()
        return host.split(sizes)

    return fetched


def _find_gate(model: torch.nn.Module, layer: MoELayer) -> torch.nn.Module:
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import TopKGate

    from moc_ckpt.lazarus.layer import LazarusMoE

    try:
        module = model.get_submodule(layer.prefix)
    except AttributeError:
        module = None
    if isinstance(module, LazarusMoE):
        return module.deepspeed_moe  # its last output, too, is the counts
    gate = module.deepspeed_moe.gate if isinstance(module, MoE) else None
    if not isinstance(gate, TopKGate):
        found = "is no deepspeed.moe.layer.MoE" if gate is None else f"routes with a {type(gate).__name__}"
        raise UnsupportedError(
            f"MoE layer {layer.ordinal} {found}, whose token counts are not known to moc_ckpt",
            where=layer.prefix or "the model",
            fix="use deepspeed.moe.layer.MoE with its own gate (TopKGate)",
        )
    return gate


def _limit(gate: Any, output: Any) -> tuple[int | None, torch.Tensor | None]:
    """Finds what the capacity left of a gate's call, never asking the device.

    Returns:
        The capacity on the host (None: nothing is dropped), or the tokens that each expert kept, int64 [experts].
    """
    if not getattr(gate, "drop_tokens", False):  # LazarusMoE drops none
        return None, None
    second = output[1]
    if not isinstance(second, torch.Tensor):
        return int(second), None
    if second.dim() == 3:  # combine weights [tokens, experts, capacity], then the dispatch mask of that shape
        return (second.shape[2], None) if gate.k <= 2 else (None, output[2].sum((0, 2), dtype=torch.int64))
    if second.device.type == "cpu":
        return int(second), None
    return None, torch.minimum(output[-1], second)


def _runs(layers: Sequence[int], experts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Splits ascending layers with equally many experts into runs that lie side by side in the vector.

    Yields:
        Index of the run's first layer in `layers`, that layer, and the number of layers in the run.
    """
    at = 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or layers[index] != layers[index - 1] + 1:
            yield at, layers[at], index - at
            at = index
