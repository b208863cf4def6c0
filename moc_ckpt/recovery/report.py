"""What a restore from a checkpoint gives up: how far each expert goes back, and what that costs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.storage.manifest import Manifest

__all__ = ["LayerLoss", "RestoreCost", "RestoreCosts", "restore_cost"]


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """What one MoE layer gives up.

    Attributes:
        layer: its ordinal.
        prefix: its module.
        experts: number of its experts.
        behind: expert -> steps that its version is behind the checkpoint; those that are not behind are left out.
        tokens: tokens lost; None if the checkpoint does not say.
        processed: tokens that the layer's experts have processed; None likewise.
    """

    layer: int
    prefix: str
    experts: int
    behind: dict[int, int]
    tokens: int | None
    processed: int | None

    @property
    def share(self) -> float | None:
        """What part of the processed tokens is lost; None likewise."""
        return self.share_of(self.tokens)

    def share_of(self, tokens: int | None) -> float | None:
        """Returns which part of the processed tokens so many are; None where either is unknown."""
        if tokens is None or self.processed is None:
            return None
        return tokens / self.processed if self.processed else 0.0


@dataclass(frozen=True, slots=True)
class RestoreCost:
    """What a restore gives up.

    Attributes:
        layers: by MoE layer.
        tokens: tokens lost in all; None if the checkpoint does not say.
        plt_before: cumulative PLT without this restore; None likewise.
        plt: cumulative PLT with it; None likewise.
    """

    layers: Sequence[LayerLoss]
    tokens: int | None
    plt_before: float | None
    plt: float | None


@dataclass(frozen=True, slots=True)
class RestoreCosts:
    """What a restore gives up, and what damage has to do with it.

    Attributes:
        now: with the versions that are restored.
        plain: if nothing of the checkpoint were damaged.
    """

    now: RestoreCost
    plain: RestoreCost

    @property
    def damage_tokens(self) -> int | None:
        """Tokens lost to damage; None if the checkpoint does not say."""
        return _more(self.now.tokens, self.plain.tokens)

    @property
    def damage_plt(self) -> float | None:
        """How much more PLT damage costs; None likewise."""
        return _more(self.now.plt, self.plain.plt)

    @property
    def damage_by_layer(self) -> dict[int, int | None]:
        """Tokens lost to damage by ordinal of the MoE layer; None likewise."""
        pairs = zip(self.now.layers, self.plain.layers, strict=True)
        return {now.layer: _more(now.tokens, plain.tokens) for now, plain in pairs}


_Number = TypeVar("_Number", int, float)


def _more(now: _Number | None, plain: _Number | None) -> _Number | None:
    return None if now is None or plain is None else now - plain


def restore_cost(manifest: Manifest, total_tokens: float | None = None) -> RestoreCost:
    """Returns what a restore from a checkpoint gives up, against the state of its step (MoC-System, equation 7).

    Args:
        manifest: the checkpoint.
        total_tokens: tokens of the whole training, where they are known (`plt_total_tokens`).

    Raises:
        FormatError: if its ledger cannot be read.
    """
    behind: dict[int, dict[int, int]] = {layer.ordinal: {} for layer in manifest.moe_layers}
    learnt: list[list[int | None]] = [[None] * layer.num_experts for layer in manifest.moe_layers]
    for unit in manifest.units:
        place = parse_expert_unit(unit.name)
        if place is None:
            continue
        if unit.step != manifest.step:
            behind[place[0]][place[1]] = manifest.step - unit.step
        if unit.version != manifest.version:
            learnt[place[0]][place[1]] = unit.tokens or 0
    ledger = after = None
    if manifest.ledger is not None and manifest.moe_layers:
        ledger = Ledger.from_data(manifest.ledger, total_tokens)
        after = ledger.recover(learnt, attempt=manifest.attempt, step=manifest.step)
    lost = after.recoveries[-1].lost if after is not None else None
    layers = []
    for number, layer in enumerate(manifest.moe_layers):
        tokens = lost[number] if lost is not None else None
        processed = int(ledger.processed[number].sum()) if ledger is not None else None
        ages = dict(sorted(behind[layer.ordinal].items()))
        layers.append(LayerLoss(layer.ordinal, layer.prefix, layer.num_experts, ages, tokens, processed))
    return RestoreCost(
        layers,
        sum(lost) if lost is not None else None,
        ledger.plt if ledger is not None else None,
        after.plt if after is not None else None,
    )
