"""Readies the memory of a run that is over while the next one is still starting.

A load then finds it pinned and its checksums computed, and is little more than a copy.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from moc_ckpt.errors import MocError
from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.recovery.pinning import Pins

__all__ = ["Ahead"]

logger = logging.getLogger("moc_ckpt")

_MOST_THREADS = 4


class Ahead:
    """Works in the background on what one rank will most likely want. Belongs to one thread; not collective.

    What it does not get done, a load does itself.

    Args:
        held: the memory.
        rank: the rank whose memory it is, in the run that is over.
        device: where the bytes are going.
    """

    def __init__(self, held: HeldMemory, rank: int, device: torch.device) -> None:
        self._held = held
        self._rank = rank
        self._pins = Pins(device)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moc-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until it is done."""
        self._thread.join()

    def close(self) -> None:
        """Stops it and gives the pinned memory back; copies from there must be over."""
        self._stop.set()
        self._thread.join()
        self._pins.close()

    def _run(self) -> None:
        try:
            slots = self._held.newest(self._rank)
            views = [view for slot in slots for view in self._held.views(self._rank, slot)]
            # In one call: pages next to each other become one registration, which no copy then crosses.
            self._pins.add((int(view.ctypes.data), len(view)) for view in views)
            with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "moc-ahead") as workers:
                for _ in workers.map(self._digest, slots):
                    pass
        except Exception as error:
            logger.info("the memory of the last run is not readied: %s", error)

    def _digest(self, slot: tuple[str, int]) -> None:
        if not self._stop.is_set():
            try:
                self._held.digest(self._rank, slot)
            except MocError as error:
                logger.debug("%s", error)  # the load says so if it wants the slot
