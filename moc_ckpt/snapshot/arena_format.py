"""What an arena's file looks like: its header, its identity and its regions (pure).

    page 0    what the file is and where its regions are; the clock of the slot table
    pages 1-2 identity, twice: an update writes the older copy, so one of them is always whole
    records   one per slot
    dense, experts            reserved and populated at start
    descriptors, extra        sparse: only written with pwrite, so a full file system is an error and not a signal

The first 8 bytes are stored when everything else is ready; until then the file is no arena.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from moc_ckpt.errors import CorruptionError, FormatError
from moc_ckpt.snapshot.records import GRAIN, RECORD_BYTES, Region, page_rounded
from moc_ckpt.storage.checksum import crc32c

__all__ = [
    "ARENA_VERSION",
    "CLOCK_AT",
    "HEADER_BYTES",
    "IDENTITY_AT",
    "ArenaSpec",
    "Identity",
    "pack_header",
    "pack_identity",
    "unpack_header",
    "unpack_identity",
]

ARENA_VERSION = 1
"""Version of the file's format that this package writes and reads; arenas do not outlive an upgrade."""

CLOCK_AT = 2048
IDENTITY_AT = (GRAIN, 2 * GRAIN)

_MAGIC = b"MOCARENA"
_HEADER = struct.Struct("<8sIIQQQQQ")  # magic, version, crc32c of all with 0 here, slots, then the regions' bytes
_IDENTITY = struct.Struct("<QII")  # number of the update, bytes, crc32c of both and the bytes
_RECORDS_AT = 3 * GRAIN
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class ArenaSpec:
    """Sizes of an arena, in bytes where not said otherwise.

    Attributes:
        dense: region of dense state.
        experts: region of experts.
        extra: region of everything else; costs only what is written there.
        slots: number of slots over all regions.
        descriptors: region of the slots' descriptors; costs only what is written there.
    """

    dense: int
    experts: int
    extra: int
    slots: int
    descriptors: int = 64 << 20

    def __post_init__(self) -> None:
        for name in ("dense", "experts", "extra", "slots", "descriptors"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of an arena is {getattr(self, name)}, which is negative")

    def regions(self) -> dict[str, Region]:
        """Returns where the records and regions lie in the file, in this order."""
        at, found = _RECORDS_AT, {}
        for name, nbytes in (
            ("records", self.slots * RECORD_BYTES),
            ("dense", self.dense),
            ("experts", self.experts),
            ("descriptors", self.descriptors),
            ("extra", self.extra),
        ):
            found[name] = Region(at, nbytes if name == "records" else page_rounded(nbytes))
            at += page_rounded(nbytes)
        return found

    @property
    def reserved(self) -> int:
        """Bytes at the start of the file that are reserved and populated."""
        return self.regions()["descriptors"].start

    @property
    def nbytes(self) -> int:
        """Size of the file, sparse regions included."""
        extra = self.regions()["extra"]
        return extra.start + extra.nbytes


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Whose arena it is.

    Attributes:
        job: the job key.
        run: the run that made it.
        rank: the rank whose state it holds.
        world: number of ranks of the run.
        pid: process that made it.
        node: name of its node.
        url: the save_dir that the attempt belongs to, once there is one.
        attempt: the attempt, once it is open.
        created: seconds since 1970.
    """

    job: str
    run: str
    rank: int
    world: int
    pid: int
    node: str
    url: str | None
    attempt: int | None
    created: float


def pack_header(spec: ArenaSpec) -> bytes:
    """Returns the start of a file with these sizes."""
    sizes = (spec.slots, spec.dense, spec.experts, spec.extra, spec.descriptors)
    crc = crc32c(_HEADER.pack(_MAGIC, ARENA_VERSION, 0, *sizes))
    return _HEADER.pack(_MAGIC, ARENA_VERSION, crc, *sizes)


def unpack_header(data: bytes, file_bytes: int, where: str) -> ArenaSpec:
    """Returns the sizes of an arena.

    Args:
        data: the first `HEADER_BYTES` bytes of the file, or fewer if it is shorter.
        file_bytes: size of the file.
        where: its name, for messages.

    Raises:
        FormatError: if it is no arena, not finished or of another version.
        CorruptionError: if it is damaged or truncated.
    """
    if len(data) < HEADER_BYTES or data[:8] == bytes(8):
        raise FormatError(
            "the arena was not finished: its maker died, or is at it",
            where=where,
            fix="nothing can be restored from it; if its process is gone, remove the file",
        )
    magic, version, _, slots, dense, experts, extra, descriptors = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise FormatError("the file is not an arena", where=where, fix="check the path; nothing was changed")
    if version != ARENA_VERSION:
        raise FormatError(
            f"the arena has format version {version}; this moc_ckpt knows version {ARENA_VERSION}",
            where=where,
            fix="use the version of moc_ckpt that made it, or remove the file",
        )
    spec = ArenaSpec(dense=dense, experts=experts, extra=extra, slots=slots, descriptors=descriptors)
    if pack_header(spec) != data or file_bytes != spec.nbytes:
        raise CorruptionError(
            "the arena is damaged or truncated", where=where, fix="remove the file; it cannot be used"
        )
    return spec


def pack_identity(number: int, identity: Identity) -> bytes:
    """Returns the copy of an identity that update `number` (from 1) writes.

    Raises:
        ValueError: if it does not fit into a page.
    """
    blob = msgspec.msgpack.encode(identity)
    if _IDENTITY.size + len(blob) > GRAIN:
        raise ValueError(f"the identity takes {len(blob)} bytes, more than {GRAIN - _IDENTITY.size}")
    return _IDENTITY.pack(number, len(blob), _identity_sum(number, blob)) + blob


def unpack_identity(page: bytes) -> tuple[int, Identity] | None:
    """Returns the number and the identity of a copy, None if it is not whole."""
    number, nbytes, crc = _IDENTITY.unpack_from(page)
    blob = page[_IDENTITY.size : _IDENTITY.size + nbytes]
    if not number or crc != _identity_sum(number, blob):
        return None
    try:
        return number, msgspec.msgpack.decode(blob, type=Identity)
    except msgspec.MsgspecError:
        return None


def _identity_sum(number: int, blob: bytes) -> int:
    return int(crc32c(blob, crc32c(struct.pack("<QI", number, len(blob)))))
