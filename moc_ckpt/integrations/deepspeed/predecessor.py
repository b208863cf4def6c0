"""What the last run of a job left in the memory of this node: brought to storage, shown to a load, then let go."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from moc_ckpt.config import MocConfig
from moc_ckpt.errors import StorageError
from moc_ckpt.recovery.flush import flush_job, wait_for_agent
from moc_ckpt.recovery.held import HeldMemory
from moc_ckpt.snapshot.arena import forsaken, writer_pid
from moc_ckpt.snapshot.places import find_arenas

__all__ = ["Predecessor"]

logger = logging.getLogger("moc_ckpt")

# Of what is free in shared memory, what new arenas may take beside the ones of the last run.
_ROOM_SHARE = 0.9


class Predecessor:
    """The memory of the runs before this one, on one node. What it does is not collective.

    Args:
        folder: the job's directory in shared memory.
        config: the validated configuration.
        own: arenas of this process: asking who writes one would let go of its lock.

    Attributes:
        held: what a load may read from; None: nothing.
    """

    def __init__(self, folder: Path, config: MocConfig, own: Collection[Path]) -> None:
        self._folder = folder
        self._config = config
        self._own = own
        self.held: HeldMemory | None = None

    def rescue(self) -> None:
        """Brings what memory has newer than storage there; done by one rank of the node. Never raises for it."""
        # The other ranks wait for this one as long as for a commit.
        deadline_s = self._config.timeouts.commit_s / 2
        over = self._over()
        if not over or not self._config.recovery.memory:
            with suppress(StorageError):
                wait_for_agent(self._folder, deadline_s, _tell_waiting)
            return
        try:
            flush, manifest = flush_job(self._folder, only=over, deadline_s=deadline_s, waiting=_tell_waiting)
        except Exception as error:  # the run that is over must not keep this one from starting
            logger.warning("what memory held of the last run is given up: %s", str(error).replace("\n  ", "; "))
            return
        if flush is not None and manifest is not None:
            logger.info(
                "RECOVERED from the memory of the last run: step %d and %d experts newer than storage are now %s",
                manifest.step,
                len(flush.experts),
                manifest.tag,
            )

    def hold(self) -> None:
        """Maps the arenas, so that a load finds them even after `remove`; done by every rank, before any is removed."""
        if not self._config.recovery.memory:
            return
        try:
            self.held = HeldMemory.open(self._folder, self._over())
        except Exception as error:  # storage has all of it
            logger.warning("the memory of the last run is not read: %s", error)

    def remove(self) -> None:
        """Removes the files of runs that are over; done by one rank of the node, once all of its ranks hold them."""
        for path in self._over():
            logger.info("removing %s of a run that is over", path.name)
            path.unlink(missing_ok=True)
        for folder in forsaken(self._folder.parent, self._own):
            logger.info("removing %s, which no run can find any more", folder)
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that become free once all ranks of the node have let go."""
        return self.held.nbytes if self.held is not None else 0

    def leaves_room(self, need: int) -> bool:
        """Tells whether new arenas fit beside the held ones.

        Args:
            need: bytes of all new arenas of this node.
        """
        return self.held is None or need <= _ROOM_SHARE * shutil.disk_usage(self._folder).free

    def let_go(self) -> None:
        """Gives the memory back: it was restored, or nobody wants it. Doing it again changes nothing."""
        if self.held is not None:
            self.held.close()
            self.held = None

    def _over(self) -> list[Path]:
        return [path for path in find_arenas(self._folder) if path not in self._own and writer_pid(path) is None]


def _tell_waiting(ranks: list[int]) -> None:
    logger.info("waiting for the agent to write what ranks %s of the last run left", ranks)
