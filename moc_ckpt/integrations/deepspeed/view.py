"""One engine as the rest of the package sees it: its catalog, and its underived weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moc_ckpt.integrations.deepspeed.layouts import (
    ModelNames,
    base_optimizer,
    model_weights,
    param_shards,
    state_groups,
)
from moc_ckpt.plan.sharding import Replicated
from moc_ckpt.state.catalog import Catalog, build_catalog
from moc_ckpt.state.moments import materialise_state

__all__ = ["EngineView", "replicated_items"]


class EngineView:
    """Reads the state of one DeepSpeed engine. Not thread-safe; not collective.

    Args:
        engine: the engine; its optimizer gets zero moments where it has none yet.

    Attributes:
        engine: the engine.
        names: its names.
        optimizer: DeepSpeed's, that does the update.
        optimizers: all that do: DeepSpeed's, and that of experts with replicas.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.names = ModelNames(engine)
        self.optimizer = base_optimizer(engine)
        replicas = [] if engine.lazarus is None else [engine.lazarus.replicas.optimizer]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (self.optimizer, *replicas)
        self._materialise()

    def _materialise(self) -> None:
        for optimizer in self.optimizers:
            materialise_state(optimizer)

    def state_of(self, key: torch.Tensor) -> dict[str, Any]:
        """Returns the live state of the optimizer that has a key; empty if none has."""
        for optimizer in self.optimizers:
            if key in optimizer.state:
                return optimizer.state[key]
        return {}

    def catalog(self, rank: int, stored_weights: Iterable[str] = ()) -> Catalog:
        """Builds the catalog from the live tensors; cheap enough to do for every save and load."""
        # DeepSpeed's own load_checkpoint and offload_states replace tensors, so views are never kept.
        self._materialise()
        return build_catalog(
            rank=rank,
            shards=param_shards(self.engine, self.names),
            weights=model_weights(self.engine, self.names),
            groups=state_groups(self.engine),
            state_of=self.state_of,
            layers=self.names.layers,
            stored_weights=stored_weights,
        )

    def trainable(self) -> list[str]:
        """Returns the names of all trainable parameters of this rank's model."""
        return [shard.fqn for shard in param_shards(self.engine, self.names)]

    def underived(self) -> set[str]:
        """Returns the parameters of which this rank holds a weight that is not its master's cast, bit for bit."""
        differ = set()
        for shard in param_shards(self.engine, self.names):
            if shard.start == shard.stop or shard.master.data_ptr() == shard.param.data_ptr():
                continue
            weight = shard.param.detach().view(-1)[shard.start : shard.stop]
            cast = shard.master.to(device=weight.device, dtype=weight.dtype)
            if not _same_bits(cast, weight):
                differ.add(shard.fqn)
        return differ

    @property
    def partitioned(self) -> bool:
        """Tells whether DeepSpeed partitions the masters, so that deriving weights is collective."""
        return hasattr(self.engine.optimizer, "update_lp_params")

    def with_aliases(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `tensors`, by the module's own names, with the further names of tied ones added."""
        first = {id(tensor): name for name, tensor in self.engine.module.named_parameters()}
        found = dict(tensors)
        for name, tensor in self.engine.module.state_dict(keep_vars=True).items():
            known = first.get(id(tensor), name)
            if known in tensors:
                found[name] = tensors[known]
        return found

    def derive_weights(self) -> None:
        """Casts the masters into the model's weights; collective under ZeRO, which gathers the partitions."""
        if self.engine.lazarus is not None:
            self.engine.lazarus.replicas.derive_weights()
        if self.partitioned:
            self.engine.optimizer.update_lp_params()
            return
        with torch.no_grad():
            for shard in param_shards(self.engine, self.names):
                if shard.master.data_ptr() != shard.param.data_ptr():
                    shard.param.copy_(shard.master.view(shard.param.shape))


def replicated_items(catalog: Catalog, *, skip_frozen: bool) -> list[Replicated]:
    """Returns the replicated tensors of which this rank is the first holder."""
    return [
        Replicated(entry.fragment.key, entry.fragment.nbytes, entry.holders, entry.fragment.numel)
        for entry in catalog.entries
        if len(entry.holders) > 1 and entry.holders[0] == catalog.rank and not (skip_frozen and entry.frozen)
    ]


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As integers: NaN equals itself and the zeros of either sign differ.
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))
