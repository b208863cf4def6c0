"""The jobs that have an agent or memory on this node."""

from __future__ import annotations

from pathlib import Path

from moc_ckpt.errors import CheckpointNotFoundError, ConfigError
from moc_ckpt.snapshot.places import job_dir, job_key

__all__ = ["find_jobs"]


def find_jobs(save_dir: str | None, job: str | None, folder: Path | None) -> list[Path]:
    """Returns the directories of the jobs that are meant: the one that is named, else all of this user.

    Args:
        save_dir: the job's save_dir.
        job: its key.
        folder: its directory itself.

    Raises:
        ConfigError: if more than one of them is given, or the key makes no sense.
        CheckpointNotFoundError: if the job that is named has no directory here.
        StorageError: if the directories are not this user's own.
    """
    if sum(item is not None for item in (save_dir, job, folder)) > 1:
        raise ConfigError("the job is named twice", fix="give one of DIR, --job and --dir")
    if folder is None and save_dir is None and job is None:
        top = job_dir("any", create=False).parent
        return sorted(path for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    if folder is None:
        try:
            folder = job_dir(job if job is not None else job_key(save_dir), create=False)
        except ValueError as error:
            raise ConfigError(str(error), fix="`moc-ckpt agent status` without arguments lists the jobs") from error
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            "no such job has an agent or memory on this node",
            where=str(folder),
            fix="`moc-ckpt agent status` lists the jobs of this node; a run with MOC_JOB_ID goes by that",
        )
    return [folder.absolute()]
