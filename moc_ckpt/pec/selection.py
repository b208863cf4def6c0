"""Which experts a save takes, beside the rotation: load-aware, filling up, and what a persist takes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.pec.rotation import Experts

__all__ = ["Held", "choose_persist", "fill", "load_aware"]

_Ints = npt.NDArray[np.int64]

# Load-aware selection may pass over an expert for at most this many cycles: half of the slots are then free for the
# busiest ones. Within one cycle there would be no choice left at all.
_CYCLES = 2


def load_aware(unsaved: Sequence[_Ints], ages: Sequence[_Ints], k: Sequence[int]) -> Experts:
    """Selects the K experts of each layer with the most unsaved tokens (MoC-System, section 3.2).

    No expert waits longer than twice its layer's cycle: those whose time has come go first.

    Args:
        unsaved: per layer, [experts] tokens that the live state has learnt and the newest saved version has not.
        ages: per layer, [experts] saves since each expert was saved; 0 if it was in the last one.
        k: K of each layer.
    """
    return tuple(
        _load_aware(layer, np.asarray(tokens), np.asarray(age), count)
        for layer, (tokens, age, count) in enumerate(zip(unsaved, ages, k, strict=True))
    )


def _load_aware(layer: int, unsaved: _Ints, ages: _Ints, k: int) -> tuple[int, ...]:
    experts = len(unsaved)
    limit = _CYCLES * -(-experts // k)
    # Saves that may come before this expert must be among the selected, this one included.
    slack = np.maximum(limit - ages, 1)
    horizon = np.arange(1, limit + 1)
    due = np.searchsorted(np.sort(slack), horizon, side="right")
    # Earliest deadline first: what cannot wait, so that every later deadline is met at k experts per save.
    forced = int(np.clip(np.max(due - k * (horizon - 1)), 0, k))
    # Equal loads (as at the start) would select the same experts, so the same ranks, in every layer.
    place = (np.arange(experts) - layer * k) % experts
    by_deadline = np.lexsort((place, -unsaved, slack))
    by_load = np.lexsort((place, -ages, -unsaved))
    first = by_deadline[:forced]
    others = by_load[~np.isin(by_load, first)][: k - forced]
    return tuple(sorted(int(expert) for expert in np.concatenate([first, others])))


def fill(
    ownership: Ownership, units: Collection[int], order: Iterable[int], limit: int | None = None
) -> tuple[int, ...]:
    """Adds whole experts where every rank that owns a part of them has room below the bottleneck.

    A save takes as long as its most loaded rank, so what is added costs no time (DESIGN section 6).

    Args:
        ownership: who writes what.
        units: selected experts, as units of the ownership.
        order: candidates, the most wanted (stalest) first; those selected already are stepped over.
        limit: bytes that a rank may write; None takes the most loaded rank of `units`.

    Returns:
        All selected units, ascending.
    """
    chosen = set(units)
    loads = ownership.loads(chosen)
    room = (int(loads.max(initial=0)) if limit is None else limit) - loads
    # Most have no room from the start, and room only shrinks: a training step waits for this.
    fits = ownership.nbytes <= room[ownership.rank]
    without = set(ownership.unit[~fits].tolist())
    first = np.searchsorted(ownership.unit, np.arange(ownership.offsets[-1] + 1)).tolist()
    for unit in order:
        if unit in chosen or unit in without:
            continue
        shares = slice(first[unit], first[unit + 1])
        ranks, nbytes = ownership.rank[shares], ownership.nbytes[shares]
        if np.all(room[ranks] >= nbytes):
            room[ranks] -= nbytes
            chosen.add(unit)
    return tuple(sorted(chosen))


@dataclass(frozen=True, slots=True)
class Held:
    """One expert in storage and in memory.

    Attributes:
        expert: its id in the layer.
        stored_step: step of its newest committed version; None if there is none.
        held_step: step of its newest whole version in memory, not after the persist's; None if there is none.
        failed: it was in a save that failed since.
    """

    expert: int
    stored_step: int | None
    held_step: int | None
    failed: bool = False


def choose_persist(layer: Sequence[Held], k: int) -> tuple[int, ...]:
    """Returns the experts of one layer that a persist takes, each at its newest version in memory.

    Those that storage does not have at all come in any case (invariant I5). Then up to K: those of a failed save, then
    the stalest in storage; ties go to the version that is newest in memory, then to the lower id. An expert that
    memory has nothing newer of is left out.

    Args:
        layer: the experts of the layer.
        k: K of the persist.
    """
    newer = [
        item
        for item in layer
        if item.held_step is not None and (item.stored_step is None or item.held_step > item.stored_step)
    ]
    absent = [item.expert for item in newer if item.stored_step is None]
    rest = sorted(
        (item for item in newer if item.stored_step is not None),
        key=lambda item: (not item.failed, item.stored_step, -(item.held_step or 0), item.expert),
    )
    return tuple(sorted(absent + [item.expert for item in rest[: max(k - len(absent), 0)]]))
