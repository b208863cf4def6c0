"""K and the intervals of snapshot and persist, from what was measured (MoC-System, sections 2.3, 5.3 and 6.2.5). Pure.

A snapshot's copy runs beside the forward and backward pass of the next step and must end before its update; what does
not fit in is a stall (equation 10). So K is the largest whose copy hides. Per step, checkpointing every I steps costs

    o(I) = O_save / I + lambda * (O_restart + I / 2 * T_step)          lambda = T_step / MTBF faults per step

which is equation 4 with equation 11, divided by the steps of the training, in seconds. The interval is the integer that
minimises o, never below what persists sustain. Everything is a function of its arguments alone, without clocks or
random numbers: equal inputs give equal decisions on every rank (invariant I7).
"""

from __future__ import annotations

import math
from dataclasses import fields

from moc_ckpt.pec.k_values import AUTO
from moc_ckpt.plan._adaptive_text import why_k, why_persist, why_snapshot
from moc_ckpt.plan.adaptive_model import (
    Decision,
    Interval,
    KChoice,
    Measured,
    Overhead,
    Settings,
    WindowBytes,
    check_mtbf,
)

__all__ = [
    "MAX_INTERVAL",
    "Decision",
    "Interval",
    "KChoice",
    "Measured",
    "Overhead",
    "Settings",
    "WindowBytes",
    "best_interval",
    "choose_k",
    "choose_persist_interval",
    "choose_snapshot_interval",
    "decide",
    "overhead_per_step",
    "reconsider",
]

#: Steps; no interval is chosen above it.
MAX_INTERVAL = 1_000_000
#: A copy must end within this share of forward and backward less than all of it: measured times scatter.
MARGIN = 0.1
#: Without an MTBF, stalls may take this share of the training time.
MAX_STALL = 0.01
#: Steps; the interval of persists until one was measured. A persist that is not done in time makes the next one skip.
UNMEASURED_INTERVAL = 10


def overhead_per_step(
    interval: int, *, save_s: float, step_s: float, mtbf_s: float | None = None, restart_s: float = 0.0
) -> float:
    """Returns the expected overhead, s per step: equation 4 with equation 11, divided by the number of steps.

    Args:
        interval: steps between two checkpoints, at least 1.
        save_s: s that one checkpoint costs (O_save).
        step_s: s per step.
        mtbf_s: mean time between faults, s; None: no faults.
        restart_s: s per restart (O_restart).
    """
    faults = 0.0 if mtbf_s is None else step_s / mtbf_s
    return save_s / interval + faults * (restart_s + interval * step_s / 2)


def best_interval(save_s: float, step_s: float, mtbf_s: float, *, least: int = 1, most: int = MAX_INTERVAL) -> int:
    """Returns the interval in [least, most] that minimises `overhead_per_step`; of equal ones the smallest.

    The overhead is convex, and I + 1 beats I exactly while I (I + 1) < 2 save_s MTBF / step_s^2: the optimum is where
    that ends. (The real-valued one is sqrt(2 save_s MTBF) / step_s: Young, CACM 17(9), 1974.)

    Args:
        save_s: s that one checkpoint costs, at least 0.
        step_s: s per step.
        mtbf_s: mean time between faults, s.
        least: steps, at least 1.
        most: steps, at least `least`.
    """
    limit = 2 * save_s * mtbf_s / step_s / step_s
    if limit >= float(most) * (most + 1):
        return most
    best = max(1, math.ceil((math.sqrt(1 + 4 * limit) - 1) / 2))
    while best > 1 and (best - 1) * best >= limit:  # rounding of the root, either way
        best -= 1
    while best * (best + 1) < limit:
        best += 1
    return min(max(best, least), most)


def choose_k(
    window_bytes: WindowBytes, measured: Measured, k_min: int, k_max: int, *, margin: float = MARGIN
) -> KChoice:
    """Returns the largest K whose copy hides behind forward and backward, else k_min with what is exposed.

    Every K from the top is looked at: a schedule's bottleneck may fall where K grows, so nothing is assumed of it.

    Args:
        window_bytes: bytes of the most loaded rank by K; asked from k_max downwards until one hides.
        measured: bandwidth and time of the slowest rank.
        k_min: smallest K, at least 0.
        k_max: largest K; N.
        margin: share of forward and backward that is left free, 0 to below 1.

    Raises:
        ValueError: if the range is empty, the margin is outside [0, 1), or bytes are negative or missing.
    """
    if not 0 <= k_min <= k_max:
        raise ValueError(f"no K between {k_min} and {k_max}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}; it must be at least 0 and below 1")
    choice = None
    for k in range(k_max, k_min - 1, -1):
        choice = _cost(k, window_bytes, measured, margin)
        if choice.hides:
            break
    assert choice is not None
    return choice


def choose_snapshot_interval(
    save_s: float,
    measured: Measured,
    *,
    mtbf_s: float | None = None,
    persist_interval: int = 0,
    max_stall: float = MAX_STALL,
) -> int:
    """Returns steps between two snapshots.

    With an MTBF the interval that minimises the overhead; without, the smallest at which stalls stay within
    `max_stall` of the training time. A snapshot that costs nothing is taken at every step.

    Args:
        save_s: s that one snapshot costs, at least 0.
        measured: step time of the slowest rank.
        mtbf_s: mean time between faults, s.
        persist_interval: steps, where it is fixed. A persist brings its own snapshot, so only its divisors are chosen.
        max_stall: share of the training time, above 0.
    """
    check_mtbf(mtbf_s)
    step = measured.step_s
    if mtbf_s is None:
        stalls = save_s / (max_stall * step)
        wanted = max(1, math.ceil(min(stalls, MAX_INTERVAL)))
    else:
        wanted = best_interval(save_s, step, mtbf_s)
    if persist_interval < 1:
        return wanted
    divisors = _divisors(persist_interval)
    if mtbf_s is None:
        return next((one for one in divisors if one >= wanted), persist_interval)
    return min(divisors, key=lambda one: (overhead_per_step(one, save_s=save_s, step_s=step, mtbf_s=mtbf_s), one))


def choose_persist_interval(
    nbytes: int,
    measured: Measured,
    *,
    cost_s: float = 0.0,
    mtbf_s: float | None = None,
    multiple_of: int = 1,
    margin: float = MARGIN,
) -> int:
    """Returns steps between two persists: never fewer than the storage sustains.

    That bound is the paper's: a persist hides behind training, but its duration bounds the interval from below
    (section 5.3). With an MTBF and a persist that costs training time, more steps may be better.

    Args:
        nbytes: bytes of the most loaded rank.
        measured: persist bandwidth and step time of the slowest rank; unmeasured gives `UNMEASURED_INTERVAL`.
        cost_s: s of training that one persist costs, with the snapshot that it needs if none is taken anyway.
        mtbf_s: mean time between faults, s.
        multiple_of: steps between snapshots; the interval is a multiple of it.
        margin: a persist is taken to last that share longer than measured.

    Raises:
        ValueError: if bytes are negative or `multiple_of` is below 1.
    """
    check_mtbf(mtbf_s)
    if nbytes < 0 or multiple_of < 1:
        raise ValueError(f"{nbytes} bytes every multiple of {multiple_of} steps")
    if measured.persist_bytes_per_s is None:
        return _round_up(UNMEASURED_INTERVAL, multiple_of)
    seconds = nbytes / measured.persist_bytes_per_s * (1 + margin)
    least = _round_up(max(1, math.ceil(min(seconds / measured.step_s, MAX_INTERVAL))), multiple_of)
    if mtbf_s is None:
        return least
    best = best_interval(cost_s, measured.step_s, mtbf_s)
    if best <= least:
        return least
    # The overhead is convex, so the best multiple is a neighbour of the best integer.
    below, above = max(least, best // multiple_of * multiple_of), _round_up(best, multiple_of)

    def cost(interval: int) -> tuple[float, int]:
        return overhead_per_step(interval, save_s=cost_s, step_s=measured.step_s, mtbf_s=mtbf_s), interval

    return min(below, above, key=cost)


def decide(
    measured: Measured,
    settings: Settings,
    window_bytes: WindowBytes,
    persist_bytes: WindowBytes | None = None,
    *,
    margin: float = MARGIN,
    max_stall: float = MAX_STALL,
) -> Decision:
    """Decides everything that is `auto`; what is fixed is kept, and its cost reported.

    Args:
        measured: the worst of all ranks.
        settings: what is fixed and what is not.
        window_bytes: bytes of the most loaded rank's snapshot by K.
        persist_bytes: the same for a persist; None: as a snapshot's.
        margin: see `choose_k`.
        max_stall: see `choose_snapshot_interval`.
    """
    choice = _choose(measured, settings, window_bytes, margin)
    save_s = choice.exposed_s + measured.stall_s
    k_persist = choice.k if settings.k_persist == AUTO else min(settings.k_persist, choice.k)
    nbytes = _look_up(window_bytes if persist_bytes is None else persist_bytes, k_persist)

    snapshot, persist = settings.snapshot_interval, settings.persist_interval
    mtbf = settings.mtbf_s
    fixed_persist = 0 if persist == AUTO else persist
    if snapshot == AUTO:
        chosen = choose_snapshot_interval(
            save_s, measured, mtbf_s=mtbf, persist_interval=fixed_persist, max_stall=max_stall
        )
    else:
        chosen = snapshot
    # Where snapshots are taken anyway, a persist pays only for itself.
    persist_cost = measured.persist_cost_s + (0.0 if chosen else save_s)
    if persist == AUTO:
        written = choose_persist_interval(
            nbytes, measured, cost_s=persist_cost, mtbf_s=mtbf, multiple_of=max(1, chosen), margin=margin
        )
    else:
        written = persist
    return Decision(
        k=choice.k,
        snapshot_interval=chosen,
        persist_interval=written,
        choice=choice,
        settings=settings,
        inputs=measured,
        overhead=_overhead(measured, mtbf, chosen, written, save_s),
        reasons=(
            why_k(choice, settings, measured, margin),
            why_snapshot(chosen, settings, save_s, max_stall),
            why_persist(written, chosen, nbytes, settings, measured, margin),
        ),
    )


def reconsider(previous: Decision, measured: Measured, threshold: float = 0.2) -> bool:
    """Says whether to decide again: an input changed by more than the threshold, or became known.

    Costs per checkpoint count only where they changed by more than 1 % of a step as well: they are small and scatter.
    The restart time and costs count only where they are used.

    Args:
        previous: the decision in force.
        measured: what is measured now, the worst of all ranks.
        threshold: relative change.
    """
    for field in fields(Measured):
        old, new = getattr(previous.inputs, field.name), getattr(measured, field.name)
        if new is None or (field.name == "restart_s" and previous.settings.mtbf_s is None):
            continue
        if old is None:
            return True
        small = field.name in ("stall_s", "persist_cost_s") and abs(new - old) <= 0.01 * previous.inputs.step_s
        if abs(new - old) > threshold * old and not small:
            return True
    return False


def _choose(measured: Measured, settings: Settings, window_bytes: WindowBytes, margin: float) -> KChoice:
    most = settings.experts
    if settings.k_snapshot == AUTO:
        return choose_k(window_bytes, measured, min(settings.k_min, most), most, margin=margin)
    return _cost(min(max(settings.k_snapshot, settings.k_min), most), window_bytes, measured, margin)


def _cost(k: int, window_bytes: WindowBytes, measured: Measured, margin: float) -> KChoice:
    nbytes = _look_up(window_bytes, k)
    seconds = nbytes / measured.copy_bytes_per_s
    window = measured.forward_backward_s
    return KChoice(k, nbytes, seconds, max(0.0, seconds - window), seconds <= window * (1 - margin))


def _look_up(window_bytes: WindowBytes, k: int) -> int:
    if callable(window_bytes):
        nbytes = window_bytes(k)
    elif k < len(window_bytes):
        nbytes = window_bytes[k]
    else:
        raise ValueError(f"bytes are given for K up to {len(window_bytes) - 1}, not for {k}")
    if nbytes < 0:
        raise ValueError(f"{nbytes} bytes with K {k}")
    return nbytes


def _overhead(measured: Measured, mtbf_s: float | None, snapshot: int, persist: int, save_s: float) -> Overhead:
    step = measured.step_s
    faults = 0.0 if mtbf_s is None else step / mtbf_s
    # Persists between two snapshots bring a snapshot each.
    extra = 0.0
    if persist and not (snapshot and persist % snapshot == 0):
        extra = 1 / persist - (1 / math.lcm(persist, snapshot) if snapshot else 0.0)
    taken = (1 / snapshot if snapshot else 0.0) + extra
    in_memory = min((one for one in (snapshot, persist) if one), default=0)
    return Overhead(
        step_s=step,
        save_s=save_s * taken,
        persist_s=measured.persist_cost_s / persist if persist else 0.0,
        restart_s=faults * (measured.restart_s or 0.0),
        lost_memory_s=faults * in_memory * step / 2,
        lost_storage_s=faults * persist * step / 2,
    )


def _divisors(number: int) -> list[int]:
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def _round_up(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of
