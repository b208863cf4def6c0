"""Local search over a schedule: experts change windows until no load is above a cap. Pure."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from moc_ckpt.pec._grid import Grid, Slots

__all__ = ["improve"]

_Ints = npt.NDArray[np.int64]
_NEVER = 2**62
_TRIED = 16  # experts of an overloaded place that are tried in a round, at most
_ROUND_WORK = 2000  # what a round costs beside the cells it looks at


def improve(grid: Grid, cap: int, work: int, seed: int = 0) -> int:
    """Lowers the loads above `cap`; the grid is left with the best schedule seen.

    Tabu search. Each round takes an overloaded (step, rank), and of all ways to move an expert away from there, into a
    window with room or in exchange for another expert of its layer, the one that leaves the fewest bytes above the
    cap, also if they are more than before. What just moved stays for some rounds, so the search leaves local optima.
    Deterministic: the generator is seeded, and effort is counted, not timed.

    Args:
        grid: a schedule in which every expert has a window.
        cap: bytes.
        work: effort, roughly in cells looked at (1e8 is about four seconds).
        seed: of the random choices.

    Returns:
        The effort that was spent.
    """
    return _Search(grid, cap, seed).run(work)


class _Search:
    def __init__(self, grid: Grid, cap: int, seed: int) -> None:
        self.grid = grid
        self.cap = cap
        self.random = random.Random(seed)
        self.round = 0
        self.spent = 0
        # Until which round an expert may not go back to a window.
        self.tabu = [np.zeros((layer.size, layer.cycle), dtype=np.int64) for layer in grid.layers]
        self.mine = np.zeros(grid.world + 1, dtype=bool)

    def run(self, work: int) -> int:
        grid, world = self.grid, self.grid.world
        excess = np.maximum(grid.loads[:, :world] - self.cap, 0)
        total, worst = int(excess.sum()), int(excess.max(initial=0))
        best: tuple[int, int] = (worst, total)
        kept: Slots = grid.copy_slots()
        fewest = total
        hot = np.flatnonzero(excess)
        while total > 0 and self.spent < work:
            self.round += 1
            self.spent += _ROUND_WORK + len(hot)
            step, rank = divmod(self._place(hot), world)
            move = self._best_move(step, rank, total, fewest)
            if move is None:
                continue
            change, layer, expert, slot, partner = move
            touched = self._apply(layer, expert, slot, partner)
            total += change
            fewest = min(fewest, total)
            hot = np.union1d(hot, touched)
            over = self._over(hot)
            hot, over = hot[over > 0], over[over > 0]
            found = (int(over.max(initial=0)), total)
            if found < best:
                best, kept = found, grid.copy_slots()
        if total > 0:
            grid.place(kept)
        return self.spent

    def _over(self, places: _Ints) -> _Ints:
        """Returns the bytes above the cap at places (step * ranks + rank)."""
        found: _Ints = self.grid.loads[places // self.grid.world, places % self.grid.world] - self.cap
        return found

    def _pick(self, number: int) -> int:
        return int(self.random.random() * number)

    def _place(self, hot: _Ints) -> int:
        """Returns the most overloaded place, or every other round any overloaded one."""
        return int(hot[self._pick(len(hot)) if self.round % 2 else self._over(hot).argmax()])

    def _best_move(self, step: int, rank: int, total: int, fewest: int) -> tuple[int, int, int, int, int] | None:
        """Returns (change of the excess, layer, expert, window, partner or -1) of the best permitted move."""
        grid = self.grid
        owners = []
        for layer, plan in enumerate(grid.layers):
            slot = step % plan.cycle if grid.repeat else step
            column = int(np.searchsorted(plan.columns, rank))
            if plan.cycle == 1 or slot >= plan.cycle or column == len(plan.columns) or plan.columns[column] != rank:
                continue
            here = np.flatnonzero((grid.slots[layer] == slot) & (plan.table[:, column] > 0))
            owners += [(layer, expert) for expert in here.tolist()]
        while len(owners) > _TRIED:
            owners.pop(self._pick(len(owners)))
        chosen: tuple[int, int, int, int, int] | None = None
        equals = 0
        for layer, expert in owners:
            moves, swaps = self._changes(layer, expert)
            slots, tabu = grid.slots[layer], self.tabu[layer]
            own = int(slots[expert])
            # A forbidden move is made after all if it leads below everything seen.
            moves[(tabu[expert] > self.round) & (total + moves >= fewest)] = _NEVER
            recent = (tabu[expert][slots] > self.round) | (tabu[:, own] > self.round)
            swaps[recent & (total + swaps >= fewest)] = _NEVER
            for kind, changes in enumerate((moves, swaps)):
                low = int(changes.min(initial=_NEVER))
                if low >= _NEVER or (chosen is not None and low > chosen[0]):
                    continue
                alike = np.flatnonzero(changes == low)
                equals = len(alike) + (equals if chosen is not None and low == chosen[0] else 0)
                # One of all that are equally good, each with the same chance.
                if chosen is None or low < chosen[0] or self._pick(equals) < len(alike):
                    one = int(alike[self._pick(len(alike))])
                    chosen = (low, layer, expert, int(slots[one]), one) if kind else (low, layer, expert, one, -1)
        return chosen

    def _changes(self, layer: int, expert: int) -> tuple[_Ints, _Ints]:
        """Returns by how much the excess changes if the expert moves to each window, and with each partner."""
        grid, cap = self.grid, self.cap
        plan, view, slots = grid.layers[layer], grid.views[layer], grid.slots[layer]
        own = int(slots[expert])
        used = plan.nbytes[expert] > 0
        ranks, nbytes = plan.ranks[expert][used], plan.nbytes[expert][used]
        self.spent += view.shape[0] * (plan.size * (plan.nbytes.shape[1] + len(ranks)) + plan.cycle * len(ranks))
        here = view[:, own, ranks] - cap
        there = view[:, : plan.cycle, ranks] - cap
        now = np.maximum(there, 0).sum(axis=(0, 2))
        moves = np.maximum(there + nbytes, 0).sum(axis=(0, 2)) - now
        moves += (np.maximum(here - nbytes, 0) - np.maximum(here, 0)).sum()
        moves[grid.counts[layer] >= plan.limit] = _NEVER
        moves[own] = _NEVER
        # Partners: first the ranks of this expert, where the partner may have bytes as well, then the partner's others.
        theirs = plan.table[:, np.searchsorted(plan.columns, ranks)]
        swaps = np.maximum(here[:, None] - nbytes + theirs, 0).sum(axis=(0, 2)) - now[own]
        swaps += np.maximum(there[:, slots] + nbytes - theirs, 0).sum(axis=(0, 2)) - now[slots]
        self.mine[ranks] = True
        others = np.where(self.mine[plan.ranks], 0, plan.nbytes)
        self.mine[ranks] = False
        here = view[:, own][:, plan.ranks] - cap
        there = view[:, slots[:, None], plan.ranks] - cap
        rise = np.maximum(here + others, 0) - np.maximum(here, 0)
        swaps += (rise + np.maximum(there - others, 0) - np.maximum(there, 0)).sum(axis=(0, 2))
        swaps[slots == own] = _NEVER
        return moves, swaps

    def _apply(self, layer: int, expert: int, slot: int, partner: int) -> _Ints:
        """Makes a move; returns the places whose load may have changed."""
        grid, plan = self.grid, self.grid.layers[layer]
        own = int(grid.slots[layer][expert])
        until = self.round + 5 + self._pick(10)
        self.tabu[layer][expert, own] = until
        grid.shift(layer, expert, slot)
        ranks = plan.ranks[expert]
        if partner >= 0:
            self.tabu[layer][partner, slot] = until
            grid.shift(layer, partner, own)
            ranks = np.concatenate([ranks, plan.ranks[partner]])
        ranks = ranks[ranks < grid.world]
        steps = np.concatenate(
            [np.arange(one, grid.period, plan.cycle if grid.repeat else grid.period) for one in (own, slot)]
        )
        places: _Ints = (steps[:, None] * grid.world + ranks).ravel()
        return places
