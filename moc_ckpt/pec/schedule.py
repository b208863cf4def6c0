"""The rotation of experts over saves that keeps the most loaded rank as low as possible. Pure.

MoC-System (arXiv 2408.04307, section 3.2) saves K experts of each layer in turn, in windows of consecutive experts.
Which experts share a save decides how evenly the ranks write, and ZeRO cuts the experts at arbitrary places, so here
the windows are chosen from the real ownership.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._meet import MAX_PERIOD, fold, meeting_modulus
from moc_ckpt.pec._problem import build_problem
from moc_ckpt.pec._solve import solve
from moc_ckpt.pec.ownership import Ownership

__all__ = ["CyclePlan", "cycle_length", "plan_cycle", "schedule_bottleneck"]

_Ints = npt.NDArray[np.int64]

Windows = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class CyclePlan:
    """Which experts each step of a cycle saves.

    Attributes:
        windows: [layer][step of the layer's cycle] the experts, ascending. Every pending expert is in one window.
        bottleneck_bytes: bytes of the most loaded rank over all steps, dense state included.
        lower_bound_bytes: no schedule of these experts and K has a lower bottleneck.
    """

    windows: Windows
    bottleneck_bytes: int
    lower_bound_bytes: int

    @property
    def proven(self) -> bool:
        """Whether no schedule can be better."""
        return self.bottleneck_bytes == self.lower_bound_bytes


def cycle_length(experts: int, k: int) -> int:
    """Returns how many saves of K experts it takes to save all: ceil(N / K)."""
    return -(-experts // k)


def plan_cycle(ownership: Ownership, k: Sequence[int], pending: Sequence[Sequence[int]] | None = None) -> CyclePlan:
    """Chooses the windows of a cycle so that the most loaded rank writes as little as possible.

    A layer's cycle has ceil(pending / K) windows of at most K experts. Without `pending` all experts are scheduled and
    windows repeat: step t saves window t mod cycle of each layer, so layers with different cycles meet in all
    combinations that the common period has. With `pending` every window is saved once: step t has window t of the
    layers that have one. The bottleneck is taken over all these steps.

    Collective: no, but deterministic: all ranks come to the same plan. Thread-safe.

    Args:
        ownership: who writes how many bytes of what.
        k: K of each layer, at least 1.
        pending: per layer, the experts to schedule; none for all.

    Returns:
        The plan. `bottleneck_bytes` is what `schedule_bottleneck` says; `lower_bound_bytes` is certified in any case.

    Raises:
        ValueError: if K is below 1 or a pending expert does not exist or is named twice.
    """
    chosen = _checked(ownership, k, pending)
    cycles = [cycle_length(len(experts), limit) for experts, limit in zip(chosen, k, strict=True)]
    problem = build_problem(ownership, chosen, cycles, k, repeat=pending is None)
    solution = solve(problem)
    windows: list[tuple[tuple[int, ...], ...]] = [()] * len(chosen)
    for layer, slots in zip(problem.ordinals, solution.slots, strict=True):
        members = np.array(chosen[layer], dtype=np.int64)
        windows[layer] = tuple(tuple(members[slots == slot].tolist()) for slot in range(cycles[layer]))
    plan = tuple(windows)
    return CyclePlan(plan, schedule_bottleneck(ownership, plan, repeat=pending is None), solution.bound)


def schedule_bottleneck(
    ownership: Ownership, windows: Sequence[Sequence[Sequence[int]]], *, repeat: bool = True
) -> int:
    """Returns the bytes of the most loaded rank over all steps, dense state included.

    The steps of the common period are not gone through: windows of different cycles meet if they are alike modulo the
    common divisor, so only the residues modulo the common divisors are (exact). If even these are more than 4096, every
    window is taken to meet every window of another cycle length, which gives an upper bound.

    Args:
        ownership: who writes how many bytes of what.
        windows: [layer][step of its cycle] the experts.
        repeat: whether windows repeat (`plan_cycle` without `pending`) or run once.

    Raises:
        ValueError: if an expert does not exist, or the number of layers is not that of the ownership.
    """
    if len(windows) != len(ownership.experts):
        raise ValueError(f"windows of {len(windows)} layers, the ownership has {len(ownership.experts)}")
    loads = _loads_by_cycle(ownership, windows)
    cycles = sorted(loads)
    highest = np.zeros(ownership.world, dtype=np.int64)
    if not repeat:
        for step in range(max(cycles, default=0)):
            np.maximum(highest, sum(loads[cycle][step] for cycle in cycles if cycle > step), out=highest)
        return int((ownership.dense + highest).max(initial=0))
    common = meeting_modulus(cycles)
    common = common if common <= MAX_PERIOD else 1
    folded = [fold(loads[cycle], common) for cycle in cycles]
    for residue in range(common):
        np.maximum(highest, sum(part[residue % len(part)] for part in folded), out=highest)
    return int((ownership.dense + highest).max(initial=0))


def _loads_by_cycle(ownership: Ownership, windows: Sequence[Sequence[Sequence[int]]]) -> dict[int, _Ints]:
    """Returns, for each length of cycle, the bytes [step, rank] of the layers that have it."""
    step_of = np.full(ownership.offsets[-1], -1, dtype=np.int64)
    cycle_of = np.zeros(ownership.offsets[-1], dtype=np.int64)
    for layer, steps in enumerate(windows):
        for step, window in enumerate(steps):
            for expert in window:
                _check_expert(ownership, layer, expert)
                step_of[ownership.offsets[layer] + expert] = step
        cycle_of[ownership.offsets[layer] : ownership.offsets[layer + 1]] = len(steps)
    found = {}
    for cycle in sorted({len(steps) for steps in windows} - {0}):
        mask = (cycle_of[ownership.unit] == cycle) & (step_of[ownership.unit] >= 0)
        found[cycle] = np.zeros((cycle, ownership.world), dtype=np.int64)
        np.add.at(found[cycle], (step_of[ownership.unit[mask]], ownership.rank[mask]), ownership.nbytes[mask])
    return found


def _check_expert(ownership: Ownership, layer: int, expert: int) -> None:
    if not 0 <= expert < ownership.experts[layer]:
        raise ValueError(f"layer {layer} has {ownership.experts[layer]} experts, there is no expert {expert}")


def _checked(ownership: Ownership, k: Sequence[int], pending: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    """Returns the experts to schedule, ascending, after looking at the arguments."""
    layers = len(ownership.experts)
    if len(k) != layers or (pending is not None and len(pending) != layers):
        given = f"K of {len(k)} layers" + ("" if pending is None else f" and pending experts of {len(pending)}")
        raise ValueError(f"{given}, the ownership has {layers}")
    for layer, limit in enumerate(k):
        if limit < 1:
            raise ValueError(f"K of layer {layer} is {limit}, it must be at least 1")
    if pending is None:
        return [tuple(range(count)) for count in ownership.experts]
    for layer, experts in enumerate(pending):
        for expert in experts:
            _check_expert(ownership, layer, expert)
        if len(set(experts)) != len(experts):
            raise ValueError(f"layer {layer} names a pending expert twice: {sorted(experts)}")
    return [tuple(sorted(experts)) for experts in pending]
