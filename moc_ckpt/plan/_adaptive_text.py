"""What is logged of an adaptive decision: a sentence for each value, with its numbers. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moc_ckpt.pec.k_values import AUTO

if TYPE_CHECKING:
    from moc_ckpt.plan.adaptive_model import KChoice, Measured, Settings

__all__ = ["why_k", "why_persist", "why_snapshot"]


def why_k(choice: KChoice, settings: Settings, measured: Measured, margin: float) -> str:
    """Returns the sentence on K.

    Args:
        choice: what was chosen and what it costs.
        settings: what was configured.
        measured: what was measured.
        margin: share of forward and backward that is left free.
    """
    copied = (
        f"K {choice.k} of {settings.experts}{'' if settings.k_snapshot == AUTO else ' (configured)'}: the copy of "
        f"{_bytes(choice.nbytes)} takes {_time(choice.copy_s)} at {_bytes(measured.copy_bytes_per_s)}/s, forward and "
        f"backward {_time(measured.forward_backward_s)}"
    )
    if choice.exposed_s:
        return f"{copied}: {_time(choice.exposed_s)} of each snapshot stall the training"
    if not choice.hides:
        return f"{copied}: it hides, but not with a margin of {margin:.0%}"
    return f"{copied}: it hides (margin {margin:.0%})"


def why_snapshot(chosen: int, settings: Settings, save_s: float, max_stall: float) -> str:
    """Returns the sentence on the snapshot interval.

    Args:
        chosen: steps.
        settings: what was configured.
        save_s: s that one snapshot costs.
        max_stall: share of the training time that stalls may take.
    """
    if settings.snapshot_interval != AUTO:
        return f"snapshots {_configured(chosen)}"
    if not save_s:
        why = "they cost nothing"
    elif settings.mtbf_s is None:
        why = f"each costs {_time(save_s)}, at most {max_stall:.0%} of the training time"
    else:
        why = f"each costs {_time(save_s)}, a fault every {_time(settings.mtbf_s)}: least stalls plus lost work"
    fixed = settings.persist_interval
    if fixed != AUTO and fixed:
        why += f"; a divisor of the persist interval {fixed}"
    return f"snapshots {_every(chosen)}: {why}"


def why_persist(written: int, snapshot: int, nbytes: int, settings: Settings, measured: Measured, margin: float) -> str:
    """Returns the sentence on the persist interval.

    Args:
        written: steps.
        snapshot: steps between snapshots.
        nbytes: of a persist's most loaded rank.
        settings: what was configured.
        measured: what was measured.
        margin: a persist is taken to last that share longer.
    """
    if settings.persist_interval != AUTO:
        return (
            f"persists {_every(written)} (configured)" if written else "persists with save_checkpoint only (configured)"
        )
    bandwidth = measured.persist_bytes_per_s
    if bandwidth is None:
        return f"persists {_every(written)}: until one is measured"
    seconds = nbytes / bandwidth
    why = (
        f"{_bytes(nbytes)} take {_time(seconds)} at {_bytes(bandwidth)}/s, "
        f"{seconds / measured.step_s:.1f} steps (margin {margin:.0%})"
    )
    if measured.persist_cost_s and settings.mtbf_s is not None:
        why += f", cost {_time(measured.persist_cost_s)} of training, a fault every {_time(settings.mtbf_s)}"
    if snapshot > 1:
        why += f"; a multiple of the snapshot interval {snapshot}"
    return f"persists {_every(written)}: {why}"


def _configured(interval: int) -> str:
    return f"{_every(interval) if interval else 'with save_checkpoint only'} (configured)"


def _every(interval: int) -> str:
    return "never" if not interval else "at every step" if interval == 1 else f"every {interval} steps"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 1000:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
