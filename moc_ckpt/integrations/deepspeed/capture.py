"""What a snapshot takes beside tensors: RNG, optimizer scalars, counters, schedulers, buffers (DESIGN section 8).

Taking must cost the training loop next to nothing, so values are copied at the step boundary and encoded later, in
the background.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moc_ckpt.integrations.deepspeed.engine_state import capture_engine
from moc_ckpt.integrations.deepspeed.native_record import NATIVE, describe
from moc_ckpt.integrations.deepspeed.rng import capture_rng
from moc_ckpt.integrations.deepspeed.view import EngineView
from moc_ckpt.snapshot.sources import UnitSource
from moc_ckpt.snapshot.stager import Piece
from moc_ckpt.state.catalog import Catalog, Entry
from moc_ckpt.state.fragment import WEIGHT
from moc_ckpt.state.plain import encode_plain
from moc_ckpt.state.scalars import CapturedScalars, ScalarReader
from moc_ckpt.state.unit import EXPERTS_MARK

__all__ = ["Captured", "StateReader"]


@dataclass(slots=True)
class Captured:
    """The state of one step boundary, on the way into a snapshot.

    Attributes:
        rng: every generator's state.
        scalars: the optimizer's scalars and options.
        state: counters, schedulers and scaler, encoded.
        buffers: clones of this rank's persistent buffers, by name.
        ready: event on the training stream behind the clones; None without a device.
    """

    rng: dict[str, Any]
    scalars: CapturedScalars
    state: bytes
    buffers: dict[str, torch.Tensor]
    ready: Any = None

    def wait(self) -> None:
        """Waits until the clones are made; other threads have other streams, which do not."""
        if self.ready is not None:
            self.ready.synchronize()


class StateReader:
    """Reads one engine's state again and again; what to read is found once. Not thread-safe.

    Args:
        view: the engine.
        catalog: its catalog; build a new reader once `addresses` differ.
    """

    def __init__(self, view: EngineView, catalog: Catalog) -> None:
        self._view = view
        self._engine = view.engine
        self._scalars = ScalarReader(catalog, view.state_of)
        # Only rank 0's is stored.
        self._native = describe(view) if catalog.rank == 0 else b""
        self._weights = {item.fqn: item.tensor for item in catalog.weights} | {
            shard.fqn: shard.param for shard in catalog.shards
        }
        wanted = {id(item.tensor): item.fqn for item in catalog.buffers()}
        self._buffers: list[tuple[str, torch.nn.Module, str]] = []
        for module in self._engine.module.modules():
            for name, buffer in module._buffers.items():
                fqn = wanted.pop(id(buffer), None) if buffer is not None else None
                if fqn is not None:
                    self._buffers.append((fqn, module, name))
        self._names = frozenset(fqn for fqn, _, _ in self._buffers)
        # A rank whose own differs from the first replica's keeps it, for a restart in an equal world.
        self.shared_buffers = tuple(sorted(fqn for fqn in self._names if EXPERTS_MARK not in fqn))
        stored = [entry.fragment.fqn for entry in catalog.entries if entry.fragment.kind == WEIGHT]
        self._on_device = torch.device(self._engine.device).type == "cuda"
        self._stored = [self._weights[fqn] for fqn in stored if fqn not in self._names]

    @property
    def may_change(self) -> bool:
        """Tells whether there is state that changes without an update: buffers, and what callers may write to."""
        return bool(self._buffers or self._stored)

    def is_volatile(self, entry: Entry) -> bool:
        """Tells whether an entry may change before the next update: buffers change in forward."""
        return entry.fragment.kind == WEIGHT and entry.fragment.fqn in self._names

    def addresses(self) -> tuple[int, ...]:
        """Returns where the tensors are now: other addresses mean that views on them are stale.

        Microseconds per tensor: under ZeRO there are a few flat partitions.
        """
        found: list[int] = []
        for optimizer in self._view.optimizers:
            for group in optimizer.param_groups:
                for key in group["params"]:
                    found.append(key.data_ptr())
                    found += [
                        value.data_ptr()
                        for value in optimizer.state.get(key, {}).values()
                        if isinstance(value, torch.Tensor) and value.dim()
                    ]
        found += [tensor.data_ptr() for tensor in self._stored]
        return tuple(found)

    def capture(self, underived: Collection[str] = ()) -> Captured:
        """Copies the state of this moment. Not collective; waits for no device.

        Args:
            underived: parameters whose weights are stored because they are not their masters' casts.

        Raises:
            NotPlainError: if a scheduler has state that is not plain data.
        """
        state = {
            "engine": capture_engine(self._engine),
            "underived": sorted(underived),
            "excluded_frozen": False,
            NATIVE: self._native,
        }
        captured = Captured(
            rng=capture_rng(),
            scalars=self._scalars.capture(),
            # Schedulers hand out their live lists, so these few numbers are encoded at once.
            state=encode_plain(state, "state"),
            buffers={fqn: module._buffers[name].detach().clone() for fqn, module, name in self._buffers},  # type: ignore[union-attr]
        )
        if self._on_device:
            captured.ready = torch.cuda.Event()
            captured.ready.record()
        return captured

    def pieces(self, source: UnitSource, captured: Captured) -> tuple[Piece, ...]:
        """Returns what to copy of a unit: live memory, and clones of what may change before the next update."""
        if not source.volatile:
            return source.pieces
        clones = []
        for item in source.volatile:
            whole = captured.buffers.get(item.fqn)
            if whole is None:
                # Not a view of memory in row-major order, so its bytes in order are a copy anyway.
                whole = captured.buffers[item.fqn] = self._weights[item.fqn].detach().clone()
            flat = whole.reshape(-1)[item.start : item.stop]
            clones.append(Piece(flat.view(torch.uint8), item.offset))
        return (*source.pieces, *clones)

    def optimizer_blob(self, captured: Captured) -> bytes:
        """Encodes the optimizer's scalars as a part carries them; any thread."""
        return encode_plain(self._scalars.records(captured.scalars), "optimizer")

    def own_buffers(self, captured: Captured, rank: int, sources: Mapping[str, int], *, same: bool) -> dict[str, Any]:
        """Returns the buffers that this rank keeps for itself.

        Args:
            captured: the clones.
            rank: this rank.
            sources: the rank whose buffer counts for everybody, by name.
            same: all ranks' dense buffers are equal.
        """
        shared = set(self.shared_buffers)
        return {
            fqn: tensor.cpu()
            for fqn, tensor in captured.buffers.items()
            if fqn in self._names and sources[fqn] != rank and not (same and fqn in shared)
        }
