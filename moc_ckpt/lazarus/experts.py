"""The experts that one rank holds: made alike wherever they are, and applied to their tokens."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moc_ckpt.lazarus.grouped import Mlp, apply_grouped, as_mlp, can_group, pack_weights

__all__ = ["LocalExperts", "expert_seed"]

# Rows of one expert from which a GEMM of its own keeps a GPU busy.
_FILLS_A_GPU = 1024


def expert_seed(seed: int, expert: int) -> int:
    """Returns the seed of an expert's initial values, a function of the layer's seed and the expert's global id."""
    digest = hashlib.blake2b(f"{seed}/{expert}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class LocalExperts(nn.Module):
    """One copy of every distinct expert of a rank.

    Every copy of an expert starts from the same bytes, whatever rank and placement it is on: its initial values are
    drawn inside of a fork of torch's default generators (of the CPU and the current GPU) that is seeded with
    `expert_seed(seed, expert)`. What the default generators draw afterwards does not depend on how many experts were
    made. (CPU and GPU draw different numbers from one seed, so make them on the same kind of device on all ranks.)

    Args:
        expert: a module, or a function without arguments that makes one. A module is copied, and in every copy all
            submodules with a `reset_parameters` draw their parameters anew, children before their parents; other
            parameters keep the module's values, those of the group's first rank.
        expert_ids: the global ids of the experts, ascending.
        seed: the layer's seed, the same on all ranks of the group.
        group: the ranks that share the layer; None for this process alone. Making the experts is collective over it
            if `expert` is a module.

    Attributes:
        compute: "loop" calls one expert after the other; "grouped" uses torch's grouped GEMM where `grouped.can_group`;
            "auto" does on a GPU, unless the experts have so many rows that each keeps it busy.
    """

    def __init__(
        self,
        expert: nn.Module | Callable[[], nn.Module],
        expert_ids: Sequence[int],
        *,
        seed: int,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.expert_ids = tuple(expert_ids)
        if isinstance(expert, nn.Module):
            expert = _as_factory(expert, group)
        made = []
        for index in self.expert_ids:
            made.append(_drawn(expert, expert_seed(seed, index)))
            for parameter in made[-1].parameters():
                # The first is how DeepSpeed marks parameters that are not alike on all ranks; by the second its
                # split_params_into_different_moe_groups_for_optimizer names their param group.
                vars(parameter).update(allreduce=False, group_name="lazarus", lazarus=True, expert_id=index)
        self.deepspeed_experts = nn.ModuleList(made)
        self.compute = "auto"
        self._ids: dict[torch.device, Tensor] = {}

    def forward(self, tokens: Tensor, counts: Sequence[int], of_expert: Tensor) -> Tensor:
        """Applies every expert to its tokens.

        Args:
            tokens: [rows, hidden], sorted by expert.
            counts: rows of each local expert, in the order of `expert_ids`.
            of_expert: [E] int64, the same on the device, for every global id.

        Returns:
            [rows, hidden]. An expert without tokens takes part in the graph as well, so that its gradient is zeros.
        """
        mlps = self._grouping(tokens)
        if mlps:
            if tokens.device not in self._ids:
                self._ids[tokens.device] = torch.tensor(self.expert_ids, device=tokens.device)
            return apply_grouped(tokens, mlps, counts, of_expert.index_select(0, self._ids[tokens.device]))
        outputs = []
        for part, module in zip(tokens.split(list(counts)), self.deepspeed_experts, strict=True):
            output = module(part)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs)

    def pack(self) -> None:
        """Lays weights out for the grouped GEMM, which else copies them together at every call.

        Only of plain two-layer MLPs, others are left alone. Call it after the last `to(...)`, before an optimizer is
        made.
        """
        mlps = [as_mlp(module) for module in self.deepspeed_experts]
        if all(mlps):
            pack_weights([mlp for mlp in mlps if mlp])

    def _grouping(self, tokens: Tensor) -> list[Mlp]:
        """Returns the experts as MLPs for the grouped GEMM; nothing where it cannot, or had better not, be used."""
        number = len(self.deepspeed_experts)
        if self.compute == "loop" or (
            self.compute == "auto" and (not tokens.is_cuda or number == 1 or len(tokens) > _FILLS_A_GPU * number)
        ):
            return []
        mlps = [mlp for mlp in map(as_mlp, self.deepspeed_experts) if mlp]
        return mlps if len(mlps) == number and can_group(tokens, mlps) else []


def _drawn(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Calls `make` with default generators (of the CPU and the current GPU) that start from a seed; restores them.

    Not torch.manual_seed: where CUDA is not yet initialised it leaves a seed behind that the fork does not undo.
    """
    while True:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            module = make()
        if bool(devices) == torch.cuda.is_initialized():
            return module
        # The first module on a GPU has just initialised it, and was drawn from a generator that nobody seeded.


def _as_factory(template: nn.Module, group: Any) -> Callable[[], nn.Module]:
    """Returns what makes copies of a module with parameters drawn anew from the default generators."""
    # Also of submodules that are drawn anew: their own method may leave some of them alone.
    _share(template.parameters(), group)

    def make() -> nn.Module:
        module = copy.deepcopy(template)
        # Children first, as constructors do it: what a parent sets in them afterwards stays.
        for part in reversed(list(module.modules())):
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        return module

    return make


@torch.no_grad()
def _share(parameters: Iterable[Tensor], group: Any) -> None:
    """Gives all ranks of a group the values of its first rank."""
    if group is None or dist.get_world_size(group) == 1:
        return
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    for parameter in parameters:
        value = parameter.detach().to(device, copy=True)
        dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
        parameter.copy_(value)
