"""Partial experts checkpointing of one engine: token counts, the ledger, and the selection of each save."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from moc_ckpt.config import MocConfig
from moc_ckpt.errors import UnsupportedError
from moc_ckpt.integrations.deepspeed.token_counts import TokenCounter
from moc_ckpt.pec.dynamic_k import lower_k, raise_k
from moc_ckpt.pec.k_values import AUTO, K, check_k, layer_k
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.selector import SaveHistory, Selection, select
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.state.unit import MoELayer, expert_unit, parse_expert_unit
from moc_ckpt.storage.manifest import Manifest

__all__ = ["OwnedBytes", "PartialExperts", "Restored", "owned_bytes"]

logger = logging.getLogger("moc_ckpt")


class OwnedBytes(NamedTuple):
    """What one rank holds, in bytes; small and picklable.

    Attributes:
        sole: (layer, expert, rank, bytes) of what only this rank holds.
        shared: (layer, expert, holders) -> bytes of what it is the first of several holders of.
        dense: bytes of dense state that only this rank holds.
        shared_dense: holders -> bytes of dense state that it is the first of several holders of.
    """

    sole: list[tuple[int, int, int, int]]
    shared: dict[tuple[int, int, tuple[int, ...]], int]
    dense: int
    shared_dense: dict[tuple[int, ...], int]


def owned_bytes(catalog: Catalog) -> OwnedBytes:
    """Sums up a rank's catalog. Not collective."""
    sole: dict[tuple[int, int], int] = {}
    shared: dict[tuple[int, int, tuple[int, ...]], int] = {}
    dense = 0
    shared_dense: dict[tuple[int, ...], int] = {}
    for entry in catalog.entries:
        place, nbytes = parse_expert_unit(entry.unit), entry.fragment.nbytes
        if entry.holders == (catalog.rank,):
            if place is None:
                dense += nbytes
            else:
                sole[place] = sole.get(place, 0) + nbytes
        elif entry.holders[0] == catalog.rank:
            if place is None:
                shared_dense[entry.holders] = shared_dense.get(entry.holders, 0) + nbytes
            else:
                key = (*place, entry.holders)
                shared[key] = shared.get(key, 0) + nbytes
    return OwnedBytes([(*place, catalog.rank, nbytes) for place, nbytes in sole.items()], shared, dense, shared_dense)


def _evenly(nbytes: int, ranks: Sequence[int]) -> list[tuple[int, int]]:
    share, rest = divmod(nbytes, len(ranks))
    return [(rank, share + (place < rest)) for place, rank in enumerate(ranks)]


class Restored(NamedTuple):
    """What a checkpoint says about the experts: the ledger with the loss of its restore, and the saves so far."""

    ledger: Ledger
    history: SaveHistory


class PartialExperts:
    """The experts' side of one engine's checkpoints. Methods are collective where they say so; not thread-safe.

    Building it is not collective; `set_ownership` completes it.

    Args:
        engine: the engine; forward hooks are put on its gates.
        config: the validated configuration.
        layers: the model's MoE layers.

    Attributes:
        ledger: tokens processed and lost as of the last save or restore; equal on all ranks.
        sole: bytes that ZeRO gives each rank: what nobody else can write.
        ownership: the same with replicated state spread evenly over its holders, which schedules are made for.

    Raises:
        ConfigError: if K does not fit the model.
    """

    def __init__(self, engine: Any, config: MocConfig, layers: Sequence[MoELayer]) -> None:
        self._config = config
        self._experts = tuple(layer.num_experts for layer in layers)
        check_k(config.k_snapshot, config.k_persist, self._experts, where="ds_config, moc_checkpoint")
        self._counter: TokenCounter | None = None
        self._top_k = (1,) * len(layers)
        try:
            self._counter = TokenCounter(engine, layers)
        except UnsupportedError as error:
            if self._scalar_k is not None:
                raise
            # Full checkpoints need no counts.
            logger.warning("tokens are not counted, PLT stays at 0: %s", error.what)
        else:
            gates = [engine.module.get_submodule(layer.prefix).deepspeed_moe.gate for layer in layers]
            self._top_k = tuple(int(gate.k) for gate in gates)
        self._layers = tuple(layers)
        self.ledger = self._new_ledger()
        self.sole = self.ownership = Ownership.from_rows(self._experts, dist.get_world_size(), ())
        self._histories: dict[str, SaveHistory] = {}

    def _new_ledger(self) -> Ledger:
        return Ledger.start(self._experts, self._top_k, self._config.plt_total_tokens)

    def set_ownership(self, replies: Sequence[OwnedBytes]) -> None:
        """Takes in what every rank owns, in rank order."""
        world = len(replies)
        dense = [reply.dense for reply in replies]
        self.sole = Ownership.from_rows(
            self._experts, world, chain.from_iterable(reply.sole for reply in replies), dense
        )
        for reply in replies:
            for holders, nbytes in reply.shared_dense.items():
                for rank, share in _evenly(nbytes, holders):
                    dense[rank] += share
        spread = [
            (layer, expert, rank, share)
            for reply in replies
            for (layer, expert, holders), nbytes in reply.shared.items()
            for rank, share in _evenly(nbytes, holders)
        ]
        rows = chain(*(reply.sole for reply in replies), spread)
        self.ownership = Ownership.from_rows(self._experts, world, rows, dense)

    @property
    def k(self) -> tuple[int, ...]:
        """Experts that a checkpoint stores anew, for each MoE layer; Dynamic-K included."""
        config = self._config
        return layer_k(config.k_persist, self._experts, floor=self.ledger.floor, most=config.k_snapshot)

    @property
    def full_k(self) -> tuple[int, ...]:
        """The number of experts of each MoE layer."""
        return self._experts

    def snapshot_k(self, k: K, most: int | None = None) -> tuple[int, ...]:
        """Returns the K of each layer in a snapshot; Dynamic-K included.

        Args:
            k: K of snapshots; `auto` means all.
            most: what memory has room for.
        """
        found = layer_k(k, self._experts, floor=self.ledger.floor)
        return found if most is None else tuple(min(count, most) for count in found)

    def persist_k(self, k: K) -> tuple[int, ...]:
        """Returns the K of each layer in a persist, with K of snapshots given; Dynamic-K included."""
        return layer_k(self._config.k_persist, self._experts, floor=self.ledger.floor, most=k)

    @property
    def partial(self) -> bool:
        """Tells whether a save leaves experts to older checkpoints."""
        return self._config.selection != "full" and self.k != self._experts

    def step_done(self, skipped: bool) -> None:
        """Takes in the counts of one optimizer step. Not collective; launches work on the device, waits for nothing.

        Args:
            skipped: the step overflowed and changed nothing.
        """
        if self._counter is not None:
            self._counter.step_done(skipped)

    def reduce(self) -> None:
        """Adds up the token counts of all ranks since the last time; collective, one all-reduce."""
        if self._counter is None or not self._experts:
            return
        vector = self._counter.take()
        dist.all_reduce(vector)
        self.ledger = self.add_counts(self.ledger, vector.cpu().numpy())

    @property
    def counts_size(self) -> int:
        """Length of the vector of token counts."""
        return self._counter.layout.size if self._counter is not None and self._experts else 0

    def take_counts(self) -> Callable[[], npt.NDArray[np.int64]]:
        """Takes this rank's token counts since the last time; not collective, waits for nothing.

        Returns:
            What returns them, int64 [counts_size]; it waits for the device and may be called once, from any thread.
        """
        if not self.counts_size or self._counter is None:
            return lambda: np.zeros(0, dtype=np.int64)
        return self._counter.take_to_host()

    def add_counts(self, ledger: Ledger, counts: npt.NDArray[np.int64]) -> Ledger:
        """Returns a ledger after more training.

        Args:
            ledger: the ledger before it.
            counts: int64 [counts_size] tokens of all ranks.
        """
        if self._counter is None or not len(counts):
            return ledger
        layers = self._counter.layout.split(counts.tolist())
        return ledger.add([layer.processed for layer in layers], [layer.routed for layer in layers])

    def select(self, url: str, forced: Collection[tuple[int, int]], *, full: bool) -> Selection:
        """Selects the experts of a save. Not collective; may take seconds once, for a large model (`plan_cycle`).

        Args:
            url: the directory.
            forced: (layer, expert) of those that it has no usable version of.
            full: take all.
        """
        history = self._histories.get(url) or SaveHistory.start(self._experts)
        method = "full" if full else self._config.selection
        return select(history, self.ledger, self.ownership, method, self.k, forced)

    def begin_save(self, selection: Selection, ledger: Ledger | None = None) -> Ledger:
        """Returns the ledger that goes into a save; Dynamic-K may come down with it.

        Args:
            selection: what the save takes.
            ledger: tokens at its step; None for the present ones.
        """
        ledger, least = self.ledger if ledger is None else ledger, self._scalar_k
        if not (self._config.dynamic_k and ledger.floor and least is not None):
            return ledger
        forecast = partial(ledger.forecast, interval=selection.after.interval)
        lower = lower_k(max(ledger.floor, least), least, ledger.plt, forecast, self._config.max_plt)
        return replace(ledger, floor=lower if lower > least else 0)

    def saved(self, url: str, selection: Selection, ledger: Ledger) -> None:
        """Takes in that a save was committed."""
        self.lower_floor(ledger.floor)
        self.ledger = ledger
        self._histories[url] = selection.after

    def lower_floor(self, floor: int) -> None:
        """Takes in what a committed save says about Dynamic-K: its floor may have come down."""
        if floor != self.ledger.floor:
            if dist.get_rank() == 0:
                logger.info("Dynamic-K: K comes down to %d", floor or self._scalar_k)
            self.ledger = replace(self.ledger, floor=floor)

    def history(self, url: str) -> SaveHistory | None:
        """Returns what the saves into a directory have taken so far; None if nothing is known of any."""
        return self._histories.get(url)

    def keep_history(self, url: str, history: SaveHistory) -> None:
        """Takes in what a directory's saves have taken."""
        self._histories[url] = history

    def manifest_data(self, selection: Selection, ledger: Ledger) -> dict[str, Any]:
        """Returns what a manifest says about the experts, as plain data."""
        return {**ledger.to_data(), "k": list(selection.k), "history": selection.after.to_data()}

    def loads(self, selection: Selection) -> list[int]:
        """Returns the bytes that each rank writes of what nobody else holds, by rank."""
        return self.sole_loads(selection.places)

    def sole_loads(self, places: Collection[tuple[int, int]]) -> list[int]:
        """Returns the bytes that each rank alone holds of these experts and of dense state, by rank."""
        offsets = self.sole.offsets
        return [int(load) for load in self.sole.loads([offsets[layer] + expert for layer, expert in places])]

    def tokens(self, selection: Selection, ledger: Ledger) -> dict[str, int]:
        """Returns what each selected expert unit has learnt, in tokens."""
        learnt = ledger.learnt
        return {expert_unit(layer, expert): int(learnt[layer][expert]) for layer, expert in selection.places}

    def read(self, manifest: Manifest) -> Restored | None:
        """Reads what a checkpoint says about the experts, without changing anything. Not collective.

        Returns:
            None if it says nothing: it is older than ledgers, or of another model.

        Raises:
            FormatError: if it cannot be read.
        """
        if manifest.ledger is None or manifest.layers != self._layers or not self._layers:
            return None
        ledger = Ledger.from_data(manifest.ledger, self._config.plt_total_tokens)
        learnt: list[list[int | None]] = [[None] * count for count in self._experts]
        for unit in manifest.units:
            place = parse_expert_unit(unit.name)
            if place is not None:
                # An older version without a count is from before counting began.
                learnt[place[0]][place[1]] = unit.tokens if unit.version == manifest.version else unit.tokens or 0
        ledger = ledger.recover(learnt, attempt=manifest.attempt, step=manifest.step)
        history = SaveHistory.from_data(manifest.ledger.get("history", {}), self._experts)
        # Where damage made an expert older than the checkpoint had it, the directory has no more of it than that.
        saved = tuple(tokens.copy() for tokens in history.saved)
        for layer, experts in enumerate(learnt):
            for expert, tokens in enumerate(experts):
                if tokens is not None:
                    saved[layer][expert] = min(saved[layer][expert], tokens)
        history = replace(history, saved=saved)
        return Restored(replace(ledger, top_k=self._top_k), history)

    def forget(self) -> None:
        """Forgets the past: the live state is about to become another one. Not collective; done on all ranks."""
        if self._counter is not None:
            self._counter.reset()
        self._histories.clear()
        self.ledger = self._new_ledger()

    def restored(self, url: str, found: Restored | None) -> None:
        """Takes in that the engine goes on from a checkpoint. Not collective; equal on all ranks.

        Args:
            url: its directory.
            found: what `read` returned.
        """
        if found is not None:
            self.ledger = found.ledger
            self._histories[url] = found.history
            self._raise_k(found.history.interval)

    def _raise_k(self, interval: Sequence[float]) -> None:
        config, least = self._config, self._scalar_k
        if not config.dynamic_k or least is None:
            # The run that saved may have had it.
            self.ledger = replace(self.ledger, floor=0)
            return
        present, most = max(least, self.ledger.floor), max(self._experts)
        forecast = partial(self.ledger.forecast, interval=interval)
        raised = raise_k(present, most, self.ledger.plt, forecast, config.max_plt)
        self.ledger = replace(self.ledger, floor=raised if raised > least else 0)
        if raised > present and dist.get_rank() == 0:
            logger.info(
                "Dynamic-K: K is %d instead of %d: with PLT %.2f %% so far the next fault would pass %.2f %%",
                raised,
                present,
                100 * self.ledger.plt,
                100 * config.max_plt,
            )

    @property
    def _scalar_k(self) -> int | None:
        """The configured K of checkpoints; None if they are full."""
        k = self._config.k_persist if self._config.k_persist != AUTO else self._config.k_snapshot
        return None if k == AUTO or self._config.selection == "full" else k

    def close(self) -> None:
        """Removes the hooks."""
        if self._counter is not None:
            self._counter.close()
