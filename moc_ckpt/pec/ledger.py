"""The lost-token ledger and PLT, the proportion of lost tokens (MoC-System, section 3.1, equation 7). Pure.

Tokens are counted as the experts see them: a token that the gate sends to k experts counts once for each of them, and
one that an expert drops for lack of capacity does not count for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import FormatError

__all__ = ["Ledger", "Recovery", "expected_plt"]

_Ints = npt.NDArray[np.int64]
_PerExpert = tuple[_Ints, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """One restore of a training state.

    Attributes:
        attempt: attempt that saved the state.
        step: engine.global_steps of its dense part.
        lost: tokens lost in each MoE layer.
        plt: cumulative PLT right after it.
    """

    attempt: int
    step: int
    lost: tuple[int, ...]
    plt: float


@dataclass(frozen=True, eq=False)
class Ledger:
    """What each expert has processed and lost. Immutable: every change returns a new ledger.

    An expert's state is the result of `learnt` tokens: those that it processed, less those whose updates a recovery
    gave up. Every saved version carries the `learnt` of its step. Restoring version v instead of the state of step t
    therefore loses learnt(t) - learnt(v), whatever v is and whatever was lost before: nothing is charged twice.

    Attributes:
        top_k: experts per token, for each MoE layer.
        processed: per layer, [experts] cumulative tokens processed.
        lost: per layer, [experts] cumulative tokens lost.
        routed: per layer, cumulative assignments (tokens * top-k), drops included.
        recoveries: all recoveries of this timeline, the oldest first.
        floor: what Dynamic-K demands at least; 0 for nothing.
        total_tokens: tokens of the whole training, where the user gave them.
    """

    top_k: tuple[int, ...]
    processed: _PerExpert
    lost: _PerExpert
    routed: tuple[int, ...]
    recoveries: tuple[Recovery, ...] = ()
    floor: int = 0
    total_tokens: float | None = None

    @classmethod
    def start(cls, experts: Sequence[int], top_k: Sequence[int], total_tokens: float | None = None) -> Ledger:
        """Returns the ledger of a training that has not begun.

        Args:
            experts: number of experts of each MoE layer.
            top_k: experts per token, for each.
            total_tokens: tokens of the whole training (`plt_total_tokens`); None if unknown.
        """
        zeros = tuple(np.zeros(count, dtype=np.int64) for count in experts)
        none = (0,) * len(experts)
        return cls(tuple(top_k), zeros, zeros, none, total_tokens=total_tokens)

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return tuple(len(counts) for counts in self.processed)

    @property
    def learnt(self) -> _PerExpert:
        """Per layer, [experts] tokens whose updates the live state holds."""
        return tuple(done - gone for done, gone in zip(self.processed, self.lost, strict=True))

    @property
    def plt(self) -> float:
        """The cumulative proportion of lost tokens, 0 to 1, averaged over the MoE layers (equation 7)."""
        return self._plt([sum(item.lost[layer] for item in self.recoveries) for layer in range(len(self.routed))])

    def _plt(self, lost: Sequence[float]) -> float:
        shares = [gone / total if total else 0.0 for gone, total in zip(lost, self._totals(), strict=True)]
        return sum(shares) / len(shares) if shares else 0.0

    def _totals(self) -> list[float]:
        """Equation 7's denominators: tokens of the whole training, else those so far, times top-k."""
        if self.total_tokens is None:
            return [float(count) for count in self.routed]
        return [self.total_tokens * k for k in self.top_k]

    def add(self, processed: Sequence[Sequence[int] | _Ints], routed: Sequence[int]) -> Ledger:
        """Returns the ledger after more training.

        Args:
            processed: per layer, [experts] tokens processed since the last call, over all ranks.
            routed: per layer, assignments since the last call, over all ranks.

        Raises:
            ValueError: if the shapes are not those of this model.
        """
        new = tuple(np.asarray(counts, dtype=np.int64) for counts in processed)
        if tuple(map(len, new)) != self.experts or len(routed) != len(self.routed):
            raise ValueError(f"counts of {tuple(map(len, new))} experts for layers of {self.experts}")
        return replace(
            self,
            processed=tuple(old + more for old, more in zip(self.processed, new, strict=True)),
            routed=tuple(old + int(more) for old, more in zip(self.routed, routed, strict=True)),
        )

    def recover(self, learnt: Sequence[Sequence[int | None]], *, attempt: int, step: int) -> Ledger:
        """Returns the ledger after a restore.

        Called on the ledger that was saved with the dense state.

        Args:
            learnt: per layer, for each expert the `learnt` that its restored version carries; None if that version
                is of the dense state's own step.
            attempt: attempt that saved the dense state.
            step: its step.
        """
        lost, totals = [], []
        for now, then, gone in zip(self.learnt, learnt, self.lost, strict=True):
            versions = np.array([have if want is None else want for want, have in zip(then, now, strict=True)])
            lost.append(gone + now - versions)
            # A version that is ahead (one that was unreadable at an earlier recovery) loses nothing.
            totals.append(int(np.maximum(now - versions, 0).sum()))
        record = Recovery(attempt, step, tuple(totals), 0.0)
        found = replace(self, lost=tuple(lost), recoveries=(*self.recoveries, record))
        return replace(found, recoveries=(*self.recoveries, replace(record, plt=found.plt)))

    def forecast(self, k: int, interval: Sequence[float]) -> float:
        """Returns the PLT that the next fault is expected to add.

        Args:
            k: experts saved per layer and checkpoint.
            interval: tokens that each layer processes between two saves.
        """
        factors = [(-(-count // max(k, 1)) - 1) / 2 for count in self.experts]
        return self._plt([factor * tokens for factor, tokens in zip(factors, interval, strict=True)])

    def to_data(self) -> dict[str, Any]:
        """Returns plain data for a manifest."""
        return {
            "top_k": list(self.top_k),
            "processed": [counts.tolist() for counts in self.processed],
            "lost": [counts.tolist() for counts in self.lost],
            "routed": list(self.routed),
            "recoveries": [
                {"attempt": item.attempt, "step": item.step, "lost": list(item.lost), "plt": item.plt}
                for item in self.recoveries
            ],
            "floor": self.floor,
            "plt": self.plt,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], total_tokens: float | None = None) -> Ledger:
        """Reads what `to_data` returned.

        Args:
            data: the plain data.
            total_tokens: as for `start`; the present configuration decides, not the saved one.

        Raises:
            FormatError: if it is not a ledger.
        """
        try:
            found = cls(
                top_k=tuple(int(k) for k in data["top_k"]),
                processed=tuple(np.array(counts, dtype=np.int64) for counts in data["processed"]),
                lost=tuple(np.array(counts, dtype=np.int64) for counts in data["lost"]),
                routed=tuple(int(count) for count in data["routed"]),
                recoveries=tuple(
                    Recovery(int(item["attempt"]), int(item["step"]), tuple(map(int, item["lost"])), float(item["plt"]))
                    for item in data["recoveries"]
                ),
                floor=int(data["floor"]),
                total_tokens=total_tokens,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"the ledger of the checkpoint cannot be read: {type(error).__name__}: {error}",
                where="manifest.json, ledger",
                fix="it was written by another version; load with the version that wrote it",
            ) from error
        lengths = {len(column) for column in (found.top_k, found.lost, found.routed)}
        if lengths != {len(found.processed)} or [len(x) for x in found.lost] != [len(x) for x in found.processed]:
            raise FormatError("the ledger of the checkpoint is not consistent", where="manifest.json, ledger")
        return found


def expected_plt(experts: Sequence[int], k: int, interval: float, total_steps: float) -> float:
    """Returns the PLT that a fault is expected to cost under uniform load (DESIGN section 6).

    An expert's newest version is 0 to cycle - 1 checkpoints old when the fault comes, (cycle - 1) / 2 on average.

    Args:
        experts: number of experts of each MoE layer.
        k: experts saved per layer and checkpoint.
        interval: steps between checkpoints.
        total_steps: steps of the whole training.
    """
    if not experts:
        return 0.0
    return sum((-(-count // k) - 1) / 2 for count in experts) / len(experts) * interval / total_steps
