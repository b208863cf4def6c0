"""The directories that are ready for saves beside training; each is one, however callers spell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moc_ckpt.integrations.deepspeed.host import Host
from moc_ckpt.integrations.deepspeed.in_flight import Directory
from moc_ckpt.integrations.deepspeed.pipeline_report import PipelineReport
from moc_ckpt.pec.holdings import DirectoryVersions
from moc_ckpt.pec.selector import SaveHistory
from moc_ckpt.storage.store import open_store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["OpenDirectories"]


class OpenDirectories:
    """Directories by URL. Belongs to the training thread.

    Args:
        moc: the engine's plugin.
        report: hears where events belong.
        host: its arena says where its versions belong.
        experts: number of experts of each MoE layer.
    """

    def __init__(self, moc: MocCheckpoint, report: PipelineReport, host: Host, experts: Sequence[int]) -> None:
        self._moc = moc
        self._report = report
        self._host = host
        self._experts = experts
        self._urls: dict[str, str] = {}
        self._open: dict[str, Directory] = {}

    def __len__(self) -> int:
        return len(self._open)

    def is_open(self, save_dir: str) -> bool:
        """Tells whether ranks need not meet for it any more."""
        return self._url(save_dir) in self._open

    def open(self, save_dir: str) -> Directory:
        """Returns a directory that is ready for saves; collective the first time.

        Raises:
            MocError: on all ranks, if it cannot be written, or another live run writes into it.
        """
        url = self._url(save_dir)
        if url not in self._open:
            opened = self._moc.directories.open_directory(save_dir)
            history = self._moc.pec.history(opened.store.url) or SaveHistory.start(self._experts)
            versions = DirectoryVersions(history, dict(opened.stored))
            self._open[url] = Directory(opened.store, opened.attempt, opened.run_prefix, versions)
            self._report.opened(opened.store.url, opened.attempt)
            self._host.arena.update_identity(url=opened.store.url, attempt=opened.attempt)
        return self._open[url]

    def forget(self, save_dir: str) -> None:
        """Forgets what a directory holds."""
        self._open.pop(self._url(save_dir), None)

    def clear(self) -> None:
        """Forgets all: the live state belongs to no attempt of theirs any more."""
        if self._open:
            self._host.arena.update_identity(url=None, attempt=None)
        self._open.clear()

    def _url(self, save_dir: str) -> str:
        if save_dir not in self._urls:
            self._urls[save_dir] = open_store(save_dir).url
        return self._urls[save_dir]
