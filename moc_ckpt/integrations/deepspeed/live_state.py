"""Where the state lies that one rank copies into its arena, and how large everybody's slots are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moc_ckpt.integrations.deepspeed.capture import StateReader
from moc_ckpt.integrations.deepspeed.save import declared_parameters
from moc_ckpt.integrations.deepspeed.view import EngineView, replicated_items
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.plan.sharding import Replicated, Share, plan_shares
from moc_ckpt.snapshot.records import page_rounded
from moc_ckpt.snapshot.sources import Sources, build_sources
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.state.fragment import TensorKey

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["LiveState", "StateFinder"]


@dataclass(frozen=True, slots=True)
class LiveState:
    """Where everything lies that this rank copies; of no use once tensors were replaced.

    Attributes:
        catalog: the rank's catalog.
        reader: reads what is not in slots.
        sources: what goes into slots.
        first_holders: for each persistent buffer the rank whose value counts, as in DeepSpeed.
        parameters: number of parameters of which this rank is the first replica.
        addresses: where the tensors were.
    """

    catalog: Catalog
    reader: StateReader
    sources: Sources
    first_holders: Mapping[str, int]
    parameters: int
    addresses: tuple[int, ...]

    @classmethod
    def find(
        cls, view: EngineView, catalog: Catalog, shares: Mapping[TensorKey, tuple[Share, ...]], parameters: int
    ) -> LiveState:
        """Finds everything. Not collective.

        Args:
            view: the engine.
            catalog: its catalog.
            shares: who writes what of the tensors that several ranks hold.
            parameters: number of parameters of which this rank is the first replica.
        """
        reader = StateReader(view, catalog)
        return cls(
            catalog=catalog,
            reader=reader,
            sources=build_sources(catalog, shares, is_volatile=reader.is_volatile),
            first_holders={item.fqn: item.replicas[0] for item in catalog.buffers()},
            parameters=parameters,
            addresses=reader.addresses(),
        )

    def slot_rows(self) -> tuple[int, list[tuple[int, int, int, int]]]:
        """Returns the bytes of the dense slot, and (layer, expert, rank, bytes) of every expert's slot, in pages."""
        dense = self.sources.dense.nbytes if self.sources.dense is not None else 0
        rows = [
            (*place, self.catalog.rank, page_rounded(source.nbytes)) for place, source in self.sources.experts.items()
        ]
        return page_rounded(dense), rows


class StateFinder:
    """Finds the state of one engine. Not thread-safe.

    Args:
        moc: the engine's plugin.

    Attributes:
        stored: names of trainable parameters whose weights are stored too, as of the last time.
    """

    def __init__(self, moc: MocCheckpoint) -> None:
        self._moc = moc
        self._replicated: list[Replicated] | None = None
        self.stored: frozenset[str] = frozenset()

    def find(self) -> LiveState:
        """Finds everything; collective the first time and after the set of stored weights has changed.

        Raises:
            NotPlainError: if there is state beside tensors that is not plain data.
        """
        moc = self._moc
        stored = moc.stored_weights()
        catalog = moc.view.catalog(moc.comm.rank, stored)
        if self._replicated is None or stored != self.stored:
            found = moc.comm.exchange("reading replicated state", lambda: replicated_items(catalog, skip_frozen=False))
            self._replicated = [item for reply in found for item in reply]
            self.stored = stored
        everyone = [(layer, expert) for layer, count in enumerate(moc.pec.full_k) for expert in range(count)]
        shares = plan_shares(self._replicated, moc.pec.sole_loads(everyone), mode=moc.config.sharding)
        live = LiveState.find(moc.view, catalog, shares, declared_parameters(catalog))
        # What cannot be encoded is refused here, and not at some snapshot.
        live.reader.optimizer_blob(live.reader.capture())
        return live

    def slot_ownership(self, live: LiveState) -> Ownership:
        """Returns the bytes of all ranks' slots, in whole pages; collective."""
        rows = self._moc.comm.exchange("reading the sizes of slots", live.slot_rows)
        return Ownership.from_rows(
            self._moc.pec.full_k,
            self._moc.comm.world,
            (row for _, own in rows for row in own),
            [dense for dense, _ in rows],
        )

    def is_stale(self, live: LiveState, *, may_meet: bool) -> bool:
        """Tells whether tensors were replaced, or (where ranks may meet) need not be stored any more."""
        return live.reader.addresses() != live.addresses or (may_meet and self._moc.weights_may_be_derived)
