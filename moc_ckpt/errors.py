"""Every error this package raises on purpose.

An error says three things: what is wrong, where, and what to do about it. Each class is one kind
of problem, so callers can tell bad input from damaged storage without reading messages.
"""

from __future__ import annotations

__all__ = [
    "CheckpointNotFoundError",
    "ClientStateError",
    "ConfigError",
    "CorruptionError",
    "CoverageError",
    "FormatError",
    "MocError",
    "ModelMismatchError",
    "NewerFormatError",
    "NotPlainError",
    "RankError",
    "RendezvousTimeoutError",
    "StaleAttemptError",
    "StorageError",
    "UnsupportedError",
]


class MocError(RuntimeError):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the file, key, rank or tensor concerned; may be empty.
        fix: what the reader can do about it; may be empty.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"where: {self.where}")
        if self.fix:
            parts.append(f"what to do: {self.fix}")
        return "\n  ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(cls: type[MocError], what: str, where: str, fix: str) -> MocError:
    return cls(what, where=where, fix=fix)


class ConfigError(MocError):
    """The `moc_checkpoint` section, or an argument, is wrong."""


class UnsupportedError(MocError):
    """The engine uses a feature that this package does not support yet; refused at start."""


class StorageError(MocError):
    """A directory or object store cannot be read or written."""


class CheckpointNotFoundError(StorageError):
    """There is no such checkpoint."""


class FormatError(StorageError):
    """A file is not in this package's format, or in a newer version of it."""


class NewerFormatError(FormatError):
    """A file is whole, but of a newer version of the format."""


class CorruptionError(StorageError):
    """Stored bytes are missing, truncated or differ from their checksum."""


class CoverageError(MocError):
    """The fragments do not cover every logical tensor exactly once (invariant I1)."""


class ModelMismatchError(MocError):
    """The checkpoint belongs to another model."""


class NotPlainError(MocError):
    """An object is not plain data; the message has its path and type."""


class ClientStateError(MocError):
    """client_state holds an object that could not be loaded again."""


class StaleAttemptError(MocError):
    """A newer attempt owns the directory; this one may not publish (DESIGN section 2)."""


class RendezvousTimeoutError(MocError):
    """Some ranks did not arrive within the deadline; the message names them."""


class RankError(MocError):
    """Another rank failed; its message is carried along so that every rank can show it."""
