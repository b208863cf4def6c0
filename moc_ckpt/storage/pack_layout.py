"""The byte layout of a pack: a one-dimensional uint8 zarr3 array, sharded, with a checksum per sub-chunk (pure).

A sub-chunk of `chunk` bytes and a tail, whose first 4 bytes are its crc32c, form a frame. In big packs chunk and tail
are multiples of 4096 bytes, so O_DIRECT writes take the payload straight from shared memory. See docs/format.md.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from moc_ckpt.errors import CorruptionError, NewerFormatError

__all__ = [
    "ALIGNMENT",
    "MAX_CHUNK",
    "METADATA_FILE",
    "PACK_FORMAT_VERSION",
    "REMOTE_SHARD_BYTES",
    "SHARD_BYTES",
    "PackLayout",
    "decode_metadata",
    "encode_metadata",
    "plan_pack",
]

PACK_FORMAT_VERSION = 2
ALIGNMENT = 4096
MAX_CHUNK = 16 << 20
"""Payload bytes of the largest sub-chunk: the grain of range reads, and the size of a staging buffer."""
SHARD_BYTES = 1 << 30
"""Bytes of the largest object: S3 has no multipart upload in TensorStore, and one PUT carries at most 5 GB."""
REMOTE_SHARD_BYTES = 256 << 20
"""The same in object stores, where a whole object has to be in memory to be uploaded."""
METADATA_FILE = "zarr.json"
_CRC_BYTES = 4
_SMALL_PACK = 4 << 20
_LEAST_BLOCKS = (8 << 20) // ALIGNMENT
_EMPTY_ENTRY = 0xFFFF_FFFF_FFFF_FFFF
_CRC_PLACEHOLDER = "00000000"


@dataclass(frozen=True, slots=True)
class PackLayout:
    """Where each byte of a pack lies.

    Attributes:
        nbytes: payload bytes of the pack.
        chunk: payload bytes of one sub-chunk; the last one is padded with zeros.
        chunks_per_shard: sub-chunks in one object (the last object may hold fewer).
        tail: bytes between a sub-chunk's payload and the next sub-chunk: its crc32c, then zeros.
    """

    nbytes: int
    chunk: int
    chunks_per_shard: int
    tail: int = _CRC_BYTES

    @property
    def chunks(self) -> int:
        """Number of sub-chunks."""
        return -(-self.nbytes // self.chunk) if self.nbytes else 0

    @property
    def shards(self) -> int:
        """Number of objects that hold data."""
        return -(-self.chunks // self.chunks_per_shard) if self.nbytes else 0

    @property
    def frame(self) -> int:
        """Bytes from one sub-chunk to the next."""
        return self.chunk + self.tail

    @property
    def aligned(self) -> bool:
        """True if every sub-chunk and every tail is a multiple of 4096 bytes, so that O_DIRECT can write it."""
        return self.chunk % ALIGNMENT == 0 and self.tail % ALIGNMENT == 0

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of each object."""
        return 16 * self.chunks_per_shard + _CRC_BYTES

    @property
    def stored_bytes(self) -> int:
        """Bytes of all objects, metadata included."""
        if not self.nbytes:
            return 0
        return self.chunks * self.frame + self.shards * self.index_bytes + len(encode_metadata(self))

    def shard_chunks(self, shard: int) -> int:
        """Returns the number of sub-chunks in object `shard`."""
        return min(self.chunks_per_shard, self.chunks - shard * self.chunks_per_shard)

    def shard_bytes(self, shard: int) -> int:
        """Returns the size of object `shard` in bytes."""
        return self.shard_chunks(shard) * self.frame + self.index_bytes

    def chunk_bytes(self, chunk: int) -> int:
        """Returns the payload bytes in sub-chunk `chunk`, padding not counted."""
        return min(self.chunk, self.nbytes - chunk * self.chunk)

    def index(self, shard: int) -> bytes:
        """Returns the index of object `shard`: (offset, length) per sub-chunk, then their crc32c."""
        count = self.shard_chunks(shard)
        entries = [value for i in range(count) for value in (i * self.frame, self.chunk + _CRC_BYTES)]
        entries += [_EMPTY_ENTRY] * (2 * (self.chunks_per_shard - count))
        data = struct.pack(f"<{len(entries)}Q", *entries)
        return data + struct.pack("<I", crc32c(data))


def plan_pack(nbytes: int, *, shard_bytes: int = SHARD_BYTES) -> PackLayout:
    """Chooses sub-chunks that divide the pack evenly, so that little is lost to padding.

    Args:
        nbytes: payload bytes; 0 gives a layout without objects.
        shard_bytes: size limit of one object in bytes.

    Returns:
        The layout: one sub-chunk without padding below 4 MiB, else one of up to 16 MiB or several of 8 to 16 MiB, in
        multiples of 4096 bytes. Less than 0.1 % is padding from 8 MiB on (0.2 % from 4 MiB).

    Raises:
        ValueError: if nbytes is negative or the limit is not positive.
    """
    if nbytes < 0 or shard_bytes <= 0:
        raise ValueError(f"nbytes {nbytes} and shard_bytes {shard_bytes} must be positive")
    if nbytes < _SMALL_PACK:
        return PackLayout(nbytes, max(nbytes, 1), 1)
    most = max(1, min(MAX_CHUNK, shard_bytes - 2 * ALIGNMENT) // ALIGNMENT)
    blocks = -(-nbytes // ALIGNMENT)
    # Each costs a tail and at most one block of padding: of 2048 blocks or more that is less than 0.1 %.
    count = max(blocks // _LEAST_BLOCKS, -(-blocks // most))
    chunk = -(-blocks // count) * ALIGNMENT
    count = -(-nbytes // chunk)
    limit = max(1, (shard_bytes - _CRC_BYTES) // (chunk + ALIGNMENT + 16))
    shards = -(-count // limit)
    return PackLayout(nbytes, chunk, -(-count // shards), ALIGNMENT)


def encode_metadata(layout: PackLayout) -> bytes:
    """Returns the pack's `zarr.json`, which carries a crc32c of itself among its attributes."""
    plain = _metadata(layout, _CRC_PLACEHOLDER)
    return _metadata(layout, f"{crc32c(plain):08x}")


def _metadata(layout: PackLayout, crc: str) -> bytes:
    own: dict[str, Any] = {"format_version": 1 if layout.tail == _CRC_BYTES else PACK_FORMAT_VERSION}
    if layout.tail != _CRC_BYTES:
        own["tail"] = layout.tail
    own["crc32c"] = crc
    checked: list[dict[str, Any]] = [
        {"name": "bytes"},
        {"name": "crc32c"},
    ]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [layout.chunk],
            "codecs": checked,
            "index_codecs": index,
            "index_location": "end",
        },
    }
    data = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.nbytes],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout.chunk * layout.chunks_per_shard]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [sharding],
        "attributes": {"moc_ckpt": own},
    }
    return json.dumps(data, separators=(",", ":")).encode()


def decode_metadata(data: bytes, where: str) -> PackLayout:
    """Reads a pack's `zarr.json`.

    Args:
        data: the file.
        where: its path or URL, for messages.

    Returns:
        The layout.

    Raises:
        CorruptionError: if it is damaged.
        NewerFormatError: if it is intact but of a newer format version.
    """
    damaged = CorruptionError(
        "the metadata of a pack is damaged", where=where, fix="restore from another checkpoint (`moc-ckpt inspect`)"
    )
    try:
        meta = json.loads(data)
        own = meta["attributes"]["moc_ckpt"]
        version, stored = own["format_version"], own["crc32c"]
        mark = f'"crc32c":"{stored}"'.encode()
        plain = data.replace(mark, f'"crc32c":"{_CRC_PLACEHOLDER}"'.encode())
        if data.count(mark) != 1 or f"{crc32c(plain):08x}" != stored:
            raise damaged
        if version > PACK_FORMAT_VERSION:
            raise NewerFormatError(
                f"the pack has format version {version}; this moc_ckpt reads versions up to {PACK_FORMAT_VERSION}",
                where=where,
                fix="upgrade moc_ckpt",
            )
        chunk = meta["codecs"][0]["configuration"]["chunk_shape"][0]
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        return PackLayout(meta["shape"][0], chunk, shard // chunk, own.get("tail", _CRC_BYTES))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        raise damaged from None
