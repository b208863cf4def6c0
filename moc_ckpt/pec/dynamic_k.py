"""Dynamic-K: more experts per save as the budget of lost tokens runs out (MoC-System, section 5.3). Pure.

The paper's K only grows. Here it also comes down again: without `plt_total_tokens` the PLT of past faults shrinks as
training goes on, and a longer distance between faults pays for a smaller K.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["lower_k", "raise_k"]

# A halved K must leave room for this many faults, or the next fault would double it again.
_FAULTS_AHEAD = 2


def raise_k(k: int, most: int, plt: float, forecast: Callable[[int], float], max_plt: float) -> int:
    """Returns K after a recovery: doubled while the forecast PLT of the next fault passes the limit.

    Args:
        k: the present K, at least 1.
        most: experts of the largest layer, where K ends.
        plt: cumulative PLT, this recovery included.
        forecast: PLT that one more fault is expected to add at a given K.
        max_plt: the limit.
    """
    while k < most and plt + forecast(k) > max_plt:
        k = min(2 * k, most)
    return k


def lower_k(k: int, least: int, plt: float, forecast: Callable[[int], float], max_plt: float) -> int:
    """Returns K at a save: halved once if even then two more faults are expected to stay within the limit.

    Args:
        k: the present K, at least 1.
        least: the configured K, where it ends.
        plt: cumulative PLT.
        forecast: PLT that one more fault is expected to add at a given K.
        max_plt: the limit.
    """
    lower = max(-(-k // 2), least)
    return lower if lower < k and plt + _FAULTS_AHEAD * forecast(lower) <= max_plt else k
