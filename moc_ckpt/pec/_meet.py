"""Which steps of layers with different cycles meet, and the largest loads that come of it. Pure.

A window s of cycle c and a window s' of cycle c' are in one step at some time if and only if s = s' modulo gcd(c, c')
(Chinese remainder theorem), and windows of any number of layers are in one step if each two of them can be. So with
`common` a multiple of all these gcds, everything that meets is alike modulo `common`, and within one residue of it
every combination comes up: the largest load of a rank in the residue is the sum of the largest ones of each cycle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_PERIOD", "coprime_groups", "fold", "meeting_modulus", "others_at"]

_Ints = npt.NDArray[np.int64]

MAX_PERIOD = 4096
"""Steps: what meets is not followed any further apart than this."""


def coprime_groups(cycles: Sequence[int]) -> list[list[int]]:
    """Returns the places of the cycles in groups such that those of different groups have no common divisor.

    Every combination of one step per group comes up, so what a rank writes at most is the sum over the groups.

    Args:
        cycles: lengths of cycles, above 0.
    """
    groups: list[tuple[int, list[int]]] = []
    for index, cycle in enumerate(cycles):
        period, members = cycle, [index]
        apart = []
        for other, others in groups:
            if math.gcd(other, cycle) == 1:
                apart.append((other, others))
            else:
                period, members = math.lcm(period, other), others + members
        groups = [*apart, (period, members)]
    return sorted(sorted(members) for _, members in groups)


def meeting_modulus(cycles: Sequence[int]) -> int:
    """Returns the least common multiple of the greatest common divisors of each two cycles; 1 for a single one."""
    return math.lcm(*(math.gcd(a, b) for place, a in enumerate(cycles) for b in cycles[:place]))


def fold(loads: _Ints, common: int) -> _Ints:
    """Returns [gcd(steps, common), ranks] the largest loads of steps that are alike modulo `common`.

    Args:
        loads: [steps, ranks] bytes.
        common: the modulus.
    """
    steps, world = loads.shape
    alike = math.gcd(steps, common)
    found: _Ints = loads.reshape(steps // alike, alike, world).max(axis=0)
    return found


def others_at(total: _Ints, own: _Ints, steps: int) -> _Ints:
    """Returns [steps, ranks] the most that all but one of the cycles add to each step of that one.

    Args:
        total: [common, ranks] the largest loads of all together, base included.
        own: [gcd(steps, common), ranks] those of the one, as `fold` returns them.
        steps: length of its cycle.
    """
    rest = total - np.tile(own, (len(total) // len(own), 1))
    return np.tile(fold(rest, len(own)), (steps // len(own), 1))
