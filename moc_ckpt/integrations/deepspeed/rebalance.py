"""When another placement of replicated experts would pay: decided beside training, carried out at a restart."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moc_ckpt.config import LAZARUS_KEY, LazarusConfig
from moc_ckpt.errors import ConfigError, RankError
from moc_ckpt.events import EventKind
from moc_ckpt.integrations.deepspeed.rounds import digest
from moc_ckpt.lazarus.evenness import imbalance
from moc_ckpt.lazarus.history import (
    Costs,
    LoadHistory,
    Rebalance,
    as_lists,
    layer_seconds,
    plan_rebalance,
    slots_per_place,
)
from moc_ckpt.lazarus.layer import LazarusMoE
from moc_ckpt.lazarus.types import Placement
from moc_ckpt.votes import Ballot, Votes

__all__ = ["Rebalancer", "ranks_per_node"]

logger = logging.getLogger("moc_ckpt")

_TIMED_STEPS = 64  # the median of so many is what a step takes, whatever saves and evaluations take between them
_STATE_BYTES = 12  # of a parameter: master and two moments in fp32
_Counts = tuple[tuple[int, ...], ...]


def ranks_per_node(nodes: Sequence[str]) -> int:
    """Returns how many ranks that follow one another share a node; 1 if ranks take the place of nodes.

    That is so on a single node, and where nodes have different numbers of ranks, or ranks in another order.

    Args:
        nodes: for each rank the name of its node.
    """
    count = len(nodes) // len(set(nodes))
    regular = len(nodes) % count == 0 and all(
        len(set(nodes[at : at + count])) == 1 for at in range(0, len(nodes), count)
    )
    return count if regular and count < len(nodes) else 1


@dataclass(frozen=True, slots=True)
class _Look:
    """What one decision is about.

    Attributes:
        step: engine.global_steps.
        counts: the ledger's tokens per layer and expert.
        anew: the ledger as it was when training went on from elsewhere since the last decision; None if it did not.
        step_s: seconds that this rank's steps take.
    """

    step: int
    counts: Sequence[Any]
    anew: tuple[int, Sequence[Any]] | None
    step_s: float


class Rebalancer:
    """Decides every `rebalance_interval` steps whether another placement pays. Building it is collective.

    The training thread hands the ledger's counts, which are equal on all ranks, to a thread that does everything else:
    one vote, in which the ranks agree about what a step takes, and the same plan on every rank.

    Args:
        engine: a built engine.
        layers: its layers with replicas.
        settings: the section of the ds_config.
        nodes: for each rank the name of its node.
        deadline_s: seconds after which a decision gives up on ranks that do not take part.

    Attributes:
        plan: the plan that a restart should carry out, equal on all ranks; None as long as moving does not pay.

    Raises:
        ConfigError: if there are fewer nodes than the fault threshold, or ranks have different numbers of slots.
    """

    def __init__(
        self,
        engine: Any,
        layers: Sequence[LazarusMoE],
        settings: LazarusConfig,
        nodes: Sequence[str],
        deadline_s: float,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._ranks_per_node = ranks_per_node(nodes)
        places = len(nodes) // self._ranks_per_node
        if settings.fault_threshold > places:
            what = "nodes" if self._ranks_per_node > 1 else "ranks"
            raise ConfigError(
                f"{LAZARUS_KEY}.fault_threshold is {settings.fault_threshold}, and there are {places} {what}",
                where="ds_config",
                fix=f"use at most {places}",
            )
        self._current: list[Placement] = [layer.placement for layer in layers]
        for ordinal, placement in enumerate(self._current):
            slots_per_place(placement, layer=ordinal)
        self._sizes = _sizes(engine.module, layers)
        self.plan: Rebalance | None = None
        self._history = LoadHistory.start([placement.num_experts for placement in self._current])
        self._durations: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._last_step, self._last_time = int(engine.global_steps), time.perf_counter()
        self._anew: tuple[int, Sequence[Any]] | None = None
        self._submitted = self._begun = 0
        self._compared = False
        #: An event that no log has yet, because this run has opened no directory so far.
        self._unwritten: tuple[int, dict[str, Any]] | None = None
        self._votes = Votes(deadline_s=deadline_s)

    def step_done(self) -> None:
        """Is called after every optimizer step, on all ranks; waits for nothing, neither rank nor device."""
        step, now = int(self._engine.global_steps), time.perf_counter()
        if step == self._last_step + 1:
            self._durations.append(now - self._last_time)
        else:  # a restore: what was counted before is not what these placements did
            self._anew = (step, self._engine.moc.ledger.processed)
        self._last_step, self._last_time = step, now
        if step % self._settings.rebalance_interval:
            return
        took = median(self._durations) if self._durations else 0.0
        look, self._anew = _Look(step, self._engine.moc.ledger.processed, self._anew, took), None
        self._submitted += 1
        result = self._votes.submit("planning a placement", (5, 2), lambda: self._ballot(look), _of(self, look))
        result.add_done_callback(_log_failure)

    def wait(self, timeout_s: float) -> bool:
        """Waits until every decision that is due is made; tells whether it is. Not collective."""
        return self._votes.idle(timeout_s)

    def close(self) -> None:
        """Ends the thread. Not collective; may be repeated."""
        self._votes.close()

    # ------------------------------------------------------------------------------------------ the votes' thread

    def _ballot(self, look: _Look) -> Ballot:
        self._begun += 1
        behind = self._begun < self._submitted
        ledger = digest(_plain(look.counts), look.anew is None)
        sums = [behind, round(1e6 * look.step_s), *self._sizes]
        return Ballot(np.array(sums, dtype=np.int64), np.array([ledger, -ledger], dtype=np.int64))

    def decide(self, look: _Look, totals: Ballot) -> None:
        """Makes the decision that all ranks make; in the votes' thread."""
        if totals.mins[0] != -totals.mins[1]:
            raise RankError(
                f"ranks have counted different tokens at step {look.step}",
                where="planning a placement",
                fix="look for an earlier error on one of the ranks",
            )
        if look.anew is not None:
            step, counts = look.anew
            self._history = LoadHistory(self._history.window, ((step, _plain(counts)),))
        counts = _plain(look.counts)
        # Counts come with snapshots and saves; without any since the last decision there is nothing new to decide.
        if counts != self._history.samples[-1][1]:
            self._history = self._history.observe(look.step, counts)
            if not totals.sums[0]:  # a rank that lags behind makes all wait for the next one
                self._plan(look.step, totals)
        self._write()

    def _plan(self, step: int, totals: Ballot) -> None:
        settings, world = self._settings, dist.get_world_size()
        step_us, dense, active, nbytes = (float(total) / world for total in totals.sums[1:])
        loads = self._history.loads
        uneven = [imbalance(now, tokens) for now, tokens in zip(self._current, loads, strict=True)]
        found = plan_rebalance(
            self._current,
            loads,
            slots=None,
            fault_threshold=settings.fault_threshold,
            steps=settings.rebalance_interval,
            costs=Costs(
                layer_s=layer_seconds(step_us / 1e6, dense, active, uneven),
                expert_bytes=nbytes,
                bandwidth=1e9 * settings.bandwidth_gb_s,
                fixed_s=settings.restart_s,
            ),
            ranks_per_node=self._ranks_per_node,
        )
        before, self.plan = self.plan, found if found.worth_it else None
        placements = None if self.plan is None else self.plan.placements
        same = placements == (None if before is None else before.placements)
        if dist.get_rank() == 0 and not (same and (placements is not None or self._is_newest(self._current))):
            logger.info("%s; %s", found.text, "a restart carries it out" if found.worth_it else "experts stay")
            data = found.to_data()
            if not found.worth_it:
                data |= {"placements": as_lists(self._current), "transfers": []}
            self._unwritten = (step, {**data, "ranks_per_node": self._ranks_per_node})
            self._compared = True

    def _is_newest(self, placements: Sequence[Placement]) -> bool:
        """Tells whether the directory has no plan of an earlier run, or one that is in force; asked until it is known.

        A run may have gone on in another placement than the one that was planned: a restart must not go back to that.
        """
        if not self._compared:
            plans = self._engine.moc.events_of(EventKind.REBALANCE_PLANNED)
            if plans is None:  # no directory yet
                return True
            self._compared = True
            if plans:
                return bool(plans[-1].fields.get("placements") == as_lists(placements))
        return True

    def _write(self) -> None:
        if self._unwritten is not None:
            step, data = self._unwritten
            if self._engine.moc.log_event(EventKind.REBALANCE_PLANNED, step, data):
                self._unwritten = None


def _of(rebalancer: Rebalancer, look: _Look) -> Any:
    return lambda totals: rebalancer.decide(look, totals)


def _log_failure(result: Future[Any]) -> None:
    error = result.exception()
    if error is not None:
        logger.warning("no placement was planned: %s", error)


def _plain(counts: Sequence[Any]) -> _Counts:
    return tuple(tuple(map(int, layer)) for layer in counts)


def _sizes(model: torch.nn.Module, layers: Sequence[LazarusMoE]) -> tuple[int, int, int]:
    """Returns, as this rank sees them and in the mean over layers, what a step and a migration follow from.

    Returns:
        Parameters that every token passes; parameters of one layer's experts that a token passes; bytes of one copy of
        an expert with its optimizer state.
    """
    dense = sum(param.numel() for param in model.parameters() if not getattr(param, "lazarus", False))
    active = nbytes = 0
    for layer in layers:
        params = list(layer.deepspeed_moe.experts.deepspeed_experts[0].parameters())
        active += layer.deepspeed_moe.gate.k * sum(param.numel() for param in params)
        nbytes += sum(param.numel() * (param.element_size() + _STATE_BYTES) for param in params)
    return dense, active // len(layers), nbytes // len(layers)
