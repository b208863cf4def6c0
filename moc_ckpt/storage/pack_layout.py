"""The byte layout of a pack: a one-dimensional uint8 zarr3 array, sharded, with a checksum per sub-chunk (pure).

A sub-chunk of `chunk` bytes and its 4 checksum bytes form a frame. In big packs a frame is a multiple of 4096 bytes,
so frames can be written with O_DIRECT and nothing lies between them. See docs/format.md.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from moc_ckpt.errors import CorruptionError, FormatError

__all__ = [
    "ALIGNMENT",
    "MAX_FRAME",
    "METADATA_FILE",
    "PACK_FORMAT_VERSION",
    "REMOTE_SHARD_BYTES",
    "SHARD_BYTES",
    "PackLayout",
    "decode_metadata",
    "encode_metadata",
    "plan_pack",
]

PACK_FORMAT_VERSION = 1
ALIGNMENT = 4096
MAX_FRAME = 8 << 20
"""Bytes of the largest frame: the grain of range reads, and the size of a staging buffer."""
SHARD_BYTES = 1 << 30
"""Bytes of the largest object: S3 has no multipart upload in TensorStore, and one PUT carries at most 5 GB."""
REMOTE_SHARD_BYTES = 256 << 20
"""The same in object stores, where a whole object has to be in memory to be uploaded."""
METADATA_FILE = "zarr.json"
_CRC_BYTES = 4
_SMALL_PACK = 4 << 20
_EMPTY_ENTRY = 0xFFFF_FFFF_FFFF_FFFF
_CRC_PLACEHOLDER = "00000000"


@dataclass(frozen=True, slots=True)
class PackLayout:
    """Where each byte of a pack lies.

    Attributes:
        nbytes: payload bytes of the pack.
        chunk: payload bytes of one sub-chunk; the last one is padded with zeros.
        chunks_per_shard: sub-chunks in one object (the last object may hold fewer).
    """

    nbytes: int
    chunk: int
    chunks_per_shard: int

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
        """Stored bytes of one sub-chunk with its checksum."""
        return self.chunk + _CRC_BYTES

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
        entries = [value for i in range(count) for value in (i * self.frame, self.frame)]
        entries += [_EMPTY_ENTRY] * (2 * (self.chunks_per_shard - count))
        data = struct.pack(f"<{len(entries)}Q", *entries)
        return data + struct.pack("<I", crc32c(data))


def plan_pack(nbytes: int, *, shard_bytes: int = SHARD_BYTES) -> PackLayout:
    """Chooses sub-chunks that divide the pack evenly, so that little is lost to padding.

    Args:
        nbytes: payload bytes; 0 gives a layout without objects.
        shard_bytes: size limit of one object in bytes.

    Returns:
        The layout: one sub-chunk without padding below 4 MiB, else frames of 4 to 8 MiB on 4096-byte boundaries.

    Raises:
        ValueError: if nbytes is negative or the limit is not positive.
    """
    if nbytes < 0 or shard_bytes <= 0:
        raise ValueError(f"nbytes {nbytes} and shard_bytes {shard_bytes} must be positive")
    if nbytes < _SMALL_PACK:
        return PackLayout(nbytes, max(nbytes, 1), 1)
    count = -(-nbytes // (MAX_FRAME - _CRC_BYTES))
    frame = -(-(-(-nbytes // count) + _CRC_BYTES) // ALIGNMENT) * ALIGNMENT
    chunk = frame - _CRC_BYTES
    count = -(-nbytes // chunk)
    limit = max(1, (shard_bytes - _CRC_BYTES) // (frame + 16))
    shards = -(-count // limit)
    return PackLayout(nbytes, chunk, -(-count // shards))


def encode_metadata(layout: PackLayout) -> bytes:
    """Returns the pack's `zarr.json`, which carries a crc32c of itself among its attributes."""
    plain = _metadata(layout, _CRC_PLACEHOLDER)
    return _metadata(layout, f"{crc32c(plain):08x}")


def _metadata(layout: PackLayout, crc: str) -> bytes:
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
        "attributes": {"moc_ckpt": {"format_version": PACK_FORMAT_VERSION, "crc32c": crc}},
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
        FormatError: if it is intact but of a newer format version.
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
            raise FormatError(
                f"the pack has format version {version}; this moc_ckpt reads versions up to {PACK_FORMAT_VERSION}",
                where=where,
                fix="upgrade moc_ckpt",
            )
        chunk = meta["codecs"][0]["configuration"]["chunk_shape"][0]
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        return PackLayout(meta["shape"][0], chunk, shard // chunk)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        raise damaged from None
