"""DeepSpeed's own checkpoint files: their names, and reading and writing them one at a time."""

from __future__ import annotations

import contextlib
import enum
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from moc_ckpt.errors import CheckpointNotFoundError, ConfigError, CorruptionError
from moc_ckpt.integrations.deepspeed.client_state import refused_type
from moc_ckpt.integrations.deepspeed.preflight import TESTED, version_tuple

__all__ = [
    "MODEL_FILE",
    "Scratch",
    "expert_file",
    "import_deepspeed",
    "optimizer_file",
    "read_file",
    "write_file",
    "write_latest",
]

MODEL_FILE = "mp_rank_00_model_states.pt"


def expert_file(layer: int, expert: int) -> str:
    """Returns the file name of one expert's weights."""
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def optimizer_file(rank: int, *, bf16: bool) -> str:
    """Returns the file name of one rank's optimizer state."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def import_deepspeed() -> str:
    """Imports DeepSpeed, whose classes are in its files, without a word on stdout; returns its version.

    Raises:
        ConfigError: if it is not installed, or not the version whose files are known.
    """
    # Without an accelerator DeepSpeed would look for one, and files are all that is wanted of it here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported: {error}",
            where="the Python environment of moc-ckpt",
            fix="install deepspeed beside moc_ckpt: its files hold objects of its classes",
        ) from error
    found = str(deepspeed.__version__)
    if version_tuple(found)[:2] != TESTED[:2]:
        known = ".".join(map(str, TESTED[:2]))
        raise ConfigError(
            f"native checkpoints of DeepSpeed {found} are not known to moc_ckpt",
            where="the installed deepspeed package",
            fix=f"run this with DeepSpeed {known}",
        )
    return found


class Scratch:
    """Memory in files without a name, which the kernel can write to disk and take back when it needs the room.

    Args:
        folder: a directory on the disk to use.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".scratch"

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns zeros of shape (numel,); the file goes with them.

        Raises:
            OSError: if the disk has no room for them.
        """
        if not numel:
            return torch.zeros(0, dtype=dtype)
        try:
            with self._path.open("xb") as file:
                # All of it now: a page that finds no room later kills the process.
                os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            return torch.from_file(str(self._path), shared=True, size=numel, dtype=dtype)
        finally:
            self._path.unlink()


def write_file(path: Path, data: Any) -> int:
    """Writes one file, durably; returns its bytes."""
    with path.open("xb") as out:
        torch.save(data, out)
        out.flush()
        os.fsync(out.fileno())
        return out.tell()


def write_latest(path: Path, tag: str) -> None:
    """Writes the file that names the newest tag, durably."""
    with path.open("x") as out:
        out.write(tag)
        out.flush()
        os.fsync(out.fileno())


def read_file(path: Path, *, trust: bool) -> Any:
    """Reads one file; tensors stay on disk until they are used.

    Args:
        path: the file.
        trust: unpickle whatever it holds, which may run code from it. Otherwise plain data, tensors and the few
            classes that DeepSpeed itself puts there.

    Raises:
        CheckpointNotFoundError: if there is no such file.
        ConfigError: if it holds something that needs trust.
        CorruptionError: if it cannot be read.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(
            "a file of the DeepSpeed checkpoint is missing",
            where=str(path),
            fix="import another tag, or restore the file",
        )
    # Files of torch before 1.6 cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_known_classes()):
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"the file needs unpickling of {refused_type(error)}, which may run code from it",
            where=str(path),
            fix="if everybody who could write it is trusted, say --trust",
        ) from error
    except Exception as error:
        raise CorruptionError(
            f"the file cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(path),
            fix="import another tag, or restore the file from a copy",
        ) from error


def _known_classes() -> list[Any]:
    """Returns what DeepSpeed itself pickles: none of it does anything when it is unpickled."""
    from collections import OrderedDict, defaultdict

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [OrderedDict, defaultdict, torch.Size, LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    return [*classes, _enum_member]


def _enum_member(owner: Any, name: str) -> Any:
    """Stands in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of an enum, and does only that."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL builtins.getattr")
    return owner[name]


# The names by which files ask for it.
_enum_member.__module__, _enum_member.__name__, _enum_member.__qualname__ = "builtins", "getattr", "getattr"
