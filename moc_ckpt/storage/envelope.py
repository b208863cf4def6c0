"""The frame around every metadata file: JSON with a format version and a crc32c of the body."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from moc_ckpt.errors import CorruptionError, FormatError, NewerFormatError
from moc_ckpt.storage.checksum import crc32c

__all__ = ["FORMAT_VERSION", "open_envelope", "seal_envelope"]

FORMAT_VERSION = 2
"""Version of the checkpoint format that this package writes; it reads this one and older ones."""

_T = TypeVar("_T")


class _Header(msgspec.Struct, frozen=True):
    format_version: int
    crc32c: str


class _Envelope(msgspec.Struct, frozen=True):
    moc_ckpt: _Header
    body: msgspec.Raw


class _Foreign(msgspec.Struct, frozen=True):
    moc_ckpt: msgspec.Raw | None = None


def _checksum(version: int, body: bytes) -> str:
    return f"{crc32c(body, crc32c(f'{version}:'.encode())):08x}"


def seal_envelope(body: object) -> bytes:
    """Returns the file for a msgspec Struct."""
    raw = msgspec.json.encode(body)
    return msgspec.json.encode(_Envelope(_Header(FORMAT_VERSION, _checksum(FORMAT_VERSION, raw)), msgspec.Raw(raw)))


def open_envelope(data: bytes, body_type: type[_T], where: str) -> _T:
    """Returns the body of a metadata file.

    Args:
        data: the file.
        body_type: the msgspec Struct that it should hold.
        where: path or URL of the file, for messages.

    Raises:
        CorruptionError: if it is truncated or damaged.
        FormatError: if it is not this package's, or of a newer format version.
    """
    fix = "restore from another checkpoint; `moc-ckpt inspect` lists them"
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
    except msgspec.MsgspecError as exc:
        if _is_foreign(data):
            raise FormatError(
                "the file is not in the format of moc_ckpt", where=where, fix="check the path; nothing was changed"
            ) from exc
        raise CorruptionError(f"the file is truncated or damaged: {exc}", where=where, fix=fix) from exc
    except UnicodeDecodeError as exc:
        raise CorruptionError("the file is damaged: it is not text", where=where, fix=fix) from exc
    header, raw = envelope.moc_ckpt, bytes(envelope.body)
    actual = _checksum(header.format_version, raw)
    if header.format_version > FORMAT_VERSION:
        if any(header.crc32c == _checksum(version, raw) for version in range(1, FORMAT_VERSION + 1)):
            raise CorruptionError(
                f"the file is damaged: it says format version {header.format_version}, its checksum is of an older one",
                where=where,
                fix=fix,
            )
        # Before the checksum, whose definition a newer version may have changed.
        raise NewerFormatError(
            f"the file has format version {header.format_version}; this moc_ckpt reads versions up to {FORMAT_VERSION}",
            where=where,
            fix="upgrade moc_ckpt" + ("" if header.crc32c == actual else ", unless the file is damaged"),
        )
    if header.crc32c != actual:
        raise CorruptionError(
            f"checksum mismatch: stored crc32c {header.crc32c}, data has {actual}", where=where, fix=fix
        )
    try:
        return msgspec.json.decode(raw, type=body_type)
    except msgspec.MsgspecError as exc:
        raise FormatError(
            f"the file does not describe a {body_type.__name__}: {exc}",
            where=where,
            fix="it was written by an incompatible version of moc_ckpt; use that version",
        ) from exc


def _is_foreign(data: bytes) -> bool:
    """Tells whether the bytes are whole JSON of someone else."""
    try:
        return msgspec.json.decode(data, type=_Foreign).moc_ckpt is None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return data.lstrip()[:1] != b"{" and bool(data)
