"""Takes hooks of somebody else off a model and an optimizer and puts them back, and times them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["AddedHooks", "Clock"]

_MODULE = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTIMIZER = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Clock:
    """Adds up the host time inside of wrapped functions; calls within calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begin

        return timed

    def take(self) -> float:
        """Returns the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class AddedHooks:
    """The hooks that were added to a model and its optimizer since this object was made.

    A plugin's hooks would otherwise run, and cost time, in the blocks without it.

    Args:
        model: the module tree.
        optimizer: the torch optimizer.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._before = {(id(table), key) for table in self._tables() for key in table}
        self._parked: list[tuple[Any, Any, Any]] = []

    def _tables(self) -> Iterator[Any]:
        for module in self._model.modules():
            for name in _MODULE:
                yield getattr(module, name)
        for name in _OPTIMIZER:
            yield getattr(self._optimizer, name)

    def _added(self) -> list[tuple[Any, Any]]:
        return [(table, key) for table in self._tables() for key in table if (id(table), key) not in self._before]

    def time_optimizer_hooks(self, clock: Clock) -> int:
        """Lets a clock run in the added hooks of the optimizer; returns how many there are."""
        tables = [getattr(self._optimizer, name) for name in _OPTIMIZER]
        mine = [(table, key) for table, key in self._added() if any(table is one for one in tables)]
        for table, key in mine:
            table[key] = clock.wrap(table[key])
        return len(mine)

    def park(self) -> None:
        """Takes the added hooks off; doing it again changes nothing."""
        self._parked += [(table, key, table.pop(key)) for table, key in self._added()]

    def resume(self) -> None:
        """Puts them back, in their order."""
        for table, key, hook in self._parked:
            table[key] = hook
        self._parked.clear()
