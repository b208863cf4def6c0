"""What one save takes of the experts, and what the next one needs to know about it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moc_ckpt.errors import FormatError
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.rotation import Experts, Rotation, advance
from moc_ckpt.pec.selection import load_aware

__all__ = ["Method", "SaveHistory", "Selection", "after_save", "select"]

_Ints = npt.NDArray[np.int64]

# Distances between saves that `interval` is the mean of, and one.
_MARKS = 17

Method = Literal["sequential", "load_aware", "full"]


@dataclass(frozen=True, eq=False)
class SaveHistory:
    """What the saves into one directory have taken so far. Immutable.

    Attributes:
        rotation: where each layer is in its cycle.
        ages: per layer, [experts] saves since each expert was saved; 0 if it was in the last one.
        saved: per layer, [experts] the `learnt` tokens of each expert's newest saved version.
        marks: for each of the last saves, the oldest first: tokens that each layer had processed.
    """

    rotation: Rotation
    ages: tuple[_Ints, ...]
    saved: tuple[_Ints, ...]
    marks: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def start(cls, experts: Sequence[int]) -> SaveHistory:
        """Returns the history of a directory without saves, for layers of so many experts."""
        zeros = tuple(np.zeros(count, dtype=np.int64) for count in experts)
        return cls(Rotation(), zeros, zeros)

    @property
    def interval(self) -> tuple[float, ...]:
        """Tokens that each layer processes between two saves, the mean over the last ones; zeros while unknown.

        A mean, because a rotation takes as many saves whatever the distance of each is.
        """
        if len(self.marks) < 2:
            return (0.0,) * len(self.ages)
        first, last = self.marks[0], self.marks[-1]
        return tuple((new - old) / (len(self.marks) - 1) for old, new in zip(first, last, strict=True))

    def with_saved(self, tokens: Mapping[tuple[int, int], int]) -> SaveHistory:
        """Returns the history with newer versions of some experts stored, by a save that does not count as one.

        Args:
            tokens: (layer, expert) -> `learnt` tokens of the version.
        """
        saved = tuple(values.copy() for values in self.saved)
        for (layer, expert), count in tokens.items():
            saved[layer][expert] = count
        return SaveHistory(self.rotation, self.ages, saved, self.marks)

    def to_data(self) -> dict[str, Any]:
        """Returns plain data for a manifest."""
        return {
            "rotation": self.rotation.to_data(),
            "ages": [ages.tolist() for ages in self.ages],
            "saved": [saved.tolist() for saved in self.saved],
            "marks": [list(mark) for mark in self.marks],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], experts: Sequence[int]) -> SaveHistory:
        """Reads what `to_data` returned.

        Args:
            data: the plain data.
            experts: number of experts of each MoE layer.

        Raises:
            FormatError: if it is not a history of such layers.
        """
        try:
            ages = tuple(np.array(values, dtype=np.int64) for values in data["ages"])
            saved = tuple(np.array(values, dtype=np.int64) for values in data["saved"])
            marks = tuple(tuple(int(count) for count in mark) for mark in data["marks"])
            rotation = data["rotation"]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"the save history of the checkpoint cannot be read: {type(error).__name__}: {error}",
                where="manifest.json, ledger",
            ) from error
        for column in (ages, saved):
            if tuple(map(len, column)) != tuple(experts):
                raise FormatError(
                    f"the save history is of layers of {tuple(map(len, column))} experts, not {tuple(experts)}",
                    where="manifest.json, ledger",
                )
        if any(len(mark) != len(experts) for mark in marks):
            raise FormatError("the save history is not consistent", where="manifest.json, ledger")
        return cls(Rotation.from_data(rotation, experts), ages, saved, marks)


@dataclass(frozen=True, eq=False)
class Selection:
    """The experts of one save.

    Attributes:
        experts: per layer, ascending.
        k: how many of each layer were to be taken.
        after: the history once the save is committed; the old one stays valid if it is not.
    """

    experts: Experts
    k: tuple[int, ...]
    after: SaveHistory

    @property
    def places(self) -> list[tuple[int, int]]:
        """(layer, expert) of every selected expert."""
        return [(layer, expert) for layer, experts in enumerate(self.experts) for expert in experts]


def select(
    history: SaveHistory,
    ledger: Ledger,
    ownership: Ownership,
    method: Method,
    k: Sequence[int],
    forced: Collection[tuple[int, int]] = (),
) -> Selection:
    """Selects the experts of the next save; a pure function, so every rank finds the same.

    Args:
        history: what this directory's saves have taken so far.
        ledger: what the live state has learnt.
        ownership: who writes what.
        method: `sequential`, `load_aware` or `full`.
        k: K of each layer, from 1 to its number of experts.
        forced: (layer, expert) of those that the directory does not have in a version that may be used
            (invariant I5); they are taken in any case.
    """
    counts, learnt = ownership.experts, ledger.learnt
    rotation = history.rotation
    everything = tuple(tuple(range(count)) for count in counts)
    must = set(forced)
    chosen: Experts
    if method == "full" or tuple(k) == counts or len(must) == sum(counts):
        # Everybody is up to date after it, so the rotation has nothing to do and stays where it is.
        chosen, k = everything, counts
    else:
        if method == "load_aware":
            unsaved = [now - then for now, then in zip(learnt, history.saved, strict=True)]
            picked = load_aware(unsaved, history.ages, k)
        else:
            picked, rotation = advance(rotation, ownership, k)
        chosen = tuple(
            tuple(sorted({*experts, *(expert for place, expert in must if place == layer)}))
            for layer, experts in enumerate(picked)
        )
    return Selection(chosen, tuple(k), after_save(history, rotation, chosen, learnt, ledger))


def after_save(
    history: SaveHistory, rotation: Rotation, experts: Experts, learnt: Sequence[_Ints], ledger: Ledger
) -> SaveHistory:
    """Returns the history once a save is committed.

    Args:
        history: the history before it.
        rotation: where the rotation is after it.
        experts: what it took, per layer.
        learnt: per layer, [experts] what the versions that it took have learnt, in tokens.
        ledger: tokens at its step.
    """
    ages, saved = [], []
    for layer, taken in enumerate(experts):
        age, tokens = history.ages[layer] + 1, history.saved[layer].copy()
        age[list(taken)] = 0
        tokens[list(taken)] = learnt[layer][list(taken)]
        ages.append(age)
        saved.append(tokens)
    mark = tuple(int(tokens.sum()) for tokens in ledger.processed)
    # Two saves at one step say nothing about the distance between saves.
    marks = history.marks if mark in history.marks[-1:] else (*history.marks, mark)[-_MARKS:]
    return SaveHistory(rotation, tuple(ages), tuple(saved), marks)
