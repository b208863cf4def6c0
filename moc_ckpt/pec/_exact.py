"""Branch and bound over the windows of experts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._grid import Grid, Layer, Slots

__all__ = ["Tree"]

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Branch:
    """A node on the path: the expert placed there, the windows to try, those tried, and what to put back."""

    unit: int
    ahead: list[list[int]]
    twins: _Ints
    allowed: _Bools
    tried: list[list[int]] = field(default_factory=list)


class Tree:
    """Looks for a schedule below a cap, or proves that there is none. Used once; not thread-safe.

    The expert with the fewest windows that still fit is placed next. A branch ends when an expert fits nowhere, or
    when some rank's free bytes over the period are fewer than what its open experts need. Skipped, because another
    branch stands for them: windows that differ from a tried one only in their number, and experts that equal a tried
    one.
    """

    def __init__(self, layers: Sequence[Layer], base: _Ints, period: int, repeat: bool) -> None:
        self._grid = Grid(layers, base, period, repeat)
        self._layers = self._grid.layers
        self._steps = max((layer.cycle for layer in layers), default=0)
        self._home = np.array([index for index, layer in enumerate(layers) for _ in range(layer.size)], dtype=np.int64)
        self._spot = np.array([spot for layer in layers for spot in range(layer.size)], dtype=np.int64)
        world, units = self._grid.world, len(self._home)
        # [units, ranks] bytes of each expert; [units, windows] what is not yet known to lead nowhere.
        self._table = np.zeros((units, world), dtype=np.int64)
        self._allowed = np.zeros((units, self._steps), dtype=bool)
        self._limits = np.array([layer.limit for layer in layers], dtype=np.int64)
        self._counts = np.zeros((len(layers), self._steps), dtype=np.int64)
        # How many rows a window of the expert's layer has.
        self._times = np.zeros(units, dtype=np.int64)
        for index, layer in enumerate(layers):
            mine = np.flatnonzero(self._home == index)
            self._table[np.ix_(mine, layer.columns)] = layer.table
            self._allowed[mine, : layer.cycle] = True
            self._times[mine] = period // layer.cycle if repeat else 1
        self._cycles = np.array([layer.cycle for layer in layers], dtype=np.int64)
        self._twins = self._find_twins()
        # Loads from the layers of one cycle length alone, to tell windows that differ in their number only.
        self._kinds = sorted(set(self._cycles.tolist())) if repeat else [self._steps]
        self._kind = [self._kinds.index(int(cycle)) if repeat else 0 for cycle in self._cycles]
        self._members = [np.flatnonzero(np.array(self._kind) == kind) for kind in range(len(self._kinds))]
        self._apart = [np.zeros((cycle, world), dtype=np.int64) for cycle in self._kinds]
        self._open = np.ones(units, dtype=bool)
        self._cap = self._left = 0
        self.nodes = 0

    def run(self, cap: int, nodes: int) -> tuple[str, Slots]:
        """Searches.

        Args:
            cap: no load may be above it, bytes.
            nodes: the most nodes to look at.

        Returns:
            "found" with a schedule, "none" if it is certain that there is none, "limit" if the nodes ran out. `nodes`
            of the tree says how many it took.
        """
        self._cap, self._left = cap, nodes
        found = bool((self._grid.base <= cap).all()) and self._walk()
        self.nodes = nodes - self._left
        if found:
            return "found", self._grid.copy_slots()
        return ("limit" if self._left <= 0 else "none"), []

    def _walk(self) -> bool:
        """Goes through the tree, depth first; returns whether it came to a full schedule, which is then in the grid."""
        path: list[_Branch] = []
        while True:
            self._left -= 1
            chosen = self._choose()
            if chosen is not None:
                unit, slots = chosen
                if unit < 0:
                    return True
                twins = self._twins[unit]
                path.append(_Branch(unit, self._distinct(unit, slots), twins, self._allowed[twins].copy()))
                self._open[unit] = False
            while path:
                last = path[-1]
                if last.tried:
                    same = last.tried[-1]
                    self._shift(last.unit, same[0], back=True)
                    # No schedule below this node has the expert, or a twin, in any of these windows.
                    self._allowed[last.twins[:, None], same] = False
                if last.ahead and self._left > 0:
                    last.tried.append(last.ahead.pop(0))
                    self._shift(last.unit, last.tried[-1][0])
                    break
                self._open[last.unit] = True
                self._allowed[last.twins] = last.allowed
                path.pop()
            if not path:
                return False

    def _find_twins(self) -> list[_Ints]:
        """Returns, per expert, the experts of its layer with the same shares, itself included."""
        groups: dict[tuple[int, bytes], list[int]] = {}
        keys = [(int(home), row.tobytes()) for home, row in zip(self._home, self._table, strict=True)]
        for unit, key in enumerate(keys):
            groups.setdefault(key, []).append(unit)
        return [np.array(groups[key], dtype=np.int64) for key in keys]

    def _choose(self) -> tuple[int, _Ints] | None:
        """Returns the expert to place next and the windows where it fits; -1 if all are placed, None at a dead end."""
        units = np.flatnonzero(self._open)
        if len(units) == 0:
            return -1, units
        room = self._cap - self._grid.loads[:, : self._grid.world]
        table = self._table[units]
        # A row whose room is below the smallest open share of a rank takes nothing more there.
        smallest = np.where(table > 0, table, np.iinfo(np.int64).max).min(axis=0)
        free = np.where(room >= smallest, room, 0).sum(axis=0)
        if np.any((table * self._times[units][:, None]).sum(axis=0) > free):
            return None
        fits = self._allowed[units]
        for kind, cycle in enumerate(self._kinds):
            mine = np.flatnonzero(np.isin(self._home[units], self._members[kind]))
            if len(mine) == 0:
                continue
            least = room.reshape(-1, cycle, room.shape[1]).min(axis=0)
            fits[mine, :cycle] &= (table[mine][:, None, :] <= least[None]).all(axis=2)
        fits &= self._counts[self._home[units]] < self._limits[self._home[units]][:, None]
        options = fits.sum(axis=1)
        if options.min() == 0:
            return None
        pick = int(np.lexsort((-table.max(axis=1, initial=0), options))[0])
        return int(units[pick]), np.flatnonzero(fits[pick])

    def _shift(self, unit: int, slot: int, back: bool = False) -> None:
        """Puts an expert into a window, or takes it out again."""
        home = int(self._home[unit])
        sign = -1 if back else 1
        self._grid.shift(home, int(self._spot[unit]), -1 if back else slot)
        self._counts[home, slot] += sign
        self._apart[self._kind[home]][slot] += sign * self._table[unit]

    def _distinct(self, unit: int, slots: _Ints) -> list[list[int]]:
        """Returns windows to try, each with those that stand for the same, in the order of their loads."""
        kind = self._kind[int(self._home[unit])]
        apart, members, cycle = self._apart[kind], self._members[kind], self._kinds[kind]
        others = [other for other in self._kinds if other != cycle] if self._grid.repeat else []
        # Windows s and s' meet the same windows of the other layers if s = s' modulo what the cycles have in common.
        step = math.gcd(cycle, math.lcm(*others)) if others else 1
        groups: dict[tuple[object, ...], list[int]] = {}
        for slot in slots.tolist():
            active = () if self._grid.repeat else tuple(np.flatnonzero(self._cycles > slot).tolist())
            key = (slot % step, active, apart[slot].tobytes(), self._counts[members, slot].tobytes())
            groups.setdefault(key, []).append(slot)
        # Translations: at the very first expert all windows are alike.
        if not self._counts.any() and self._grid.repeat:
            merged = [slot for same in groups.values() for slot in same]
            groups = {(): sorted(merged)}
        return sorted(groups.values(), key=lambda same: (int(apart[same[0]].sum()), same[0]))
