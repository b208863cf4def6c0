"""What people see of saves and restores: the log, DeepSpeed's monitor, and the event log. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moc_ckpt.events import EventKind, EventLog
from moc_ckpt.storage.store import Store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.fallback import Found
    from moc_ckpt.integrations.deepspeed.pec import PartialExperts
    from moc_ckpt.integrations.deepspeed.save import SaveResult

__all__ = ["Reporter", "bytes_text", "shorten"]

logger = logging.getLogger("moc_ckpt")

_SHOWN = 8


class Reporter:
    """Reports for one engine. Not collective: every rank may call it, rank 0 reports. Not thread-safe.

    Args:
        engine: the engine, for its step, its samples and its monitor.
        pec: the experts' side of its checkpoints.
        rank: this rank.
    """

    def __init__(self, engine: Any, pec: PartialExperts, rank: int) -> None:
        self._engine = engine
        self._pec = pec
        self._first = rank == 0
        self._logs: dict[str, EventLog] = {}

    def committed(self, result: SaveResult, seconds: float) -> None:
        """Reports a committed checkpoint and how long the save took."""
        if not self._first:
            return
        pec, total = self._pec, sum(self._pec.ledger.experts)
        step, plt = self._engine.global_steps, pec.ledger.plt
        partial = f", {result.experts} of {total} experts, PLT {100 * plt:.2f} %" if result.experts < total else ""
        logger.info(
            "COMMITTED %s: step %d, %s%s in %.2f s, at %s",
            result.tag,
            step,
            bytes_text(result.nbytes),
            partial,
            seconds,
            result.store.url,
        )
        self._log(result.store).write(
            EventKind.COMMITTED,
            attempt=result.attempt,
            step=step,
            tag=result.tag,
            bytes=result.nbytes,
            seconds=seconds,
            experts=result.experts,
            k=list(result.k),
            plt=plt,
        )
        found = {"k": max(result.k, default=0), "checkpoint_bytes": result.nbytes, "checkpoint_seconds": seconds}
        self.monitor(found)

    def failed(self, store: Store, tag: str, error: Exception) -> None:
        """Reports a save that failed after its directory was opened."""
        if self._first:
            step = self._engine.global_steps
            self._log(store).write(EventKind.FAILED, step=step, tag=tag, reason=str(error))

    def recovered(self, found: Found, world: int, seconds: float, *, goes_on: bool) -> None:
        """Reports a restore and what it lost.

        Args:
            found: what was restored, and what damage cost.
            world: ranks that loaded it.
            seconds: how long that took.
            goes_on: the run continues the saved one; else nothing is written into the directory.
        """
        if not self._first:
            return
        store, manifest, setback = found.store, found.manifest, found.setback
        if setback.passed_over:
            logger.warning(
                "DAMAGED: %s cannot be restored; the run goes back to %s, step %d",
                shorten(setback.passed_over),
                manifest.tag,
                manifest.step,
            )
        if setback.replaced:
            logger.warning(
                "DAMAGED: %d experts go back to older versions: %s; this costs %.4f %% PLT more. The next save into %s "
                "takes them",
                len(setback.replaced),
                shorten(
                    [
                        f"{item.unit} from step {item.wanted.step} to {item.version.step} ({item.lost:,} tokens lost)"
                        for item in setback.replaced
                    ]
                ),
                100 * found.plt_cost,
                store.url,
            )
        ledger = self._pec.ledger
        lost = sum(ledger.recoveries[-1].lost) if ledger.recoveries else 0
        older = sum(unit.step != manifest.step for unit in manifest.units)
        text = (
            f", {older} experts from older steps, {lost:,} tokens lost, PLT {100 * ledger.plt:.2f} %" if older else ""
        )
        sources = found.memory.nbytes
        if sources.memory or sources.peers:
            peers = f", {bytes_text(sources.peers)} from that of other nodes" if sources.peers else ""
            text += f"; {bytes_text(sources.memory)} from memory{peers}, {bytes_text(sources.storage)} from storage"
        logger.info(
            "RECOVERED %s: step %d, saved by %d ranks, loaded by %d in %.2f s%s",
            manifest.tag,
            manifest.step,
            manifest.topology.world,
            world,
            seconds,
            text,
        )
        if not goes_on:
            return
        self._log(store).write(
            EventKind.RECOVERED,
            attempt=manifest.attempt,
            step=manifest.step,
            tag=manifest.tag,
            seconds=seconds,
            world=world,
            older_experts=older,
            lost=list(ledger.recoveries[-1].lost) if ledger.recoveries else [],
            memory_bytes=sources.memory,
            peer_bytes=sources.peers,
            storage_bytes=sources.storage,
            k=list(self._pec.k),
            plt=ledger.plt,
            damaged=[
                {"unit": item.unit, "from": item.wanted.step, "to": item.version.step, "lost": item.lost}
                for item in setback.replaced
            ],
            damage_plt=found.plt_cost,
            passed_over=list(setback.passed_over),
        )
        self.monitor({"k": max(self._pec.k, default=0), "lost_tokens": lost})

    def _log(self, store: Store) -> EventLog:
        if store.url not in self._logs:
            self._logs[store.url] = EventLog(store)
        return self._logs[store.url]

    def monitor(self, values: dict[str, float]) -> None:
        """Hands PLT and `values` to DeepSpeed's monitor, by samples as its own curves."""
        monitor = getattr(self._engine, "monitor", None)
        if monitor is None or not getattr(monitor, "enabled", False):
            return
        found = {"plt": self._pec.ledger.plt, **values}
        samples = self._engine.global_samples
        try:
            monitor.write_events([(f"Train/MoC/{name}", value, samples) for name, value in found.items()])
        except Exception as error:  # a dashboard that is away must not end a run that has just been saved
            logger.warning("DeepSpeed's monitor failed: %s: %s", type(error).__name__, error)


def shorten(names: Sequence[str]) -> str:
    """Returns the first of many names."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def bytes_text(count: int) -> str:
    """Returns a number of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}"
