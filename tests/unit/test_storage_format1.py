"""Packs of format 1, made by a writer of their own, stay readable."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from storage_samples import make_store, random_bytes
from test_storage_pack import read_with_tensorstore

from moc_ckpt.errors import CorruptionError
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.pack import PackReader
from moc_ckpt.storage.pack_layout import decode_metadata, encode_metadata, plan_pack
from moc_ckpt.storage.store import Store

# As an older version wrote it: 1,000 bytes in one sub-chunk.
KEPT = (
    b'{"zarr_format":3,"node_type":"array","shape":[1000],"data_type":"uint8","chunk_grid":{"name":"regular",'
    b'"configuration":{"chunk_shape":[1000]}},"chunk_key_encoding":{"name":"default","configuration":{"separator":"/"}},'
    b'"fill_value":0,"codecs":[{"name":"sharding_indexed","configuration":{"chunk_shape":[1000],"codecs":[{"name":'
    b'"bytes"},{"name":"crc32c"}],"index_codecs":[{"name":"bytes","configuration":{"endian":"little"}},{"name":'
    b'"crc32c"}],"index_location":"end"}}],"attributes":{"moc_ckpt":{"format_version":1,"crc32c":"cd5cb974"}}}'
)


def write_format_1(store: Store, key: str, data: np.ndarray, chunk: int, per_shard: int) -> None:
    """Frames of `chunk` bytes and 4 of checksum, nothing between them, the index at the end of each object."""
    chunks = -(-len(data) // chunk)
    padded = np.zeros(chunks * chunk, np.uint8)
    padded[: len(data)] = data
    for shard in range(-(-chunks // per_shard)):
        body, index = b"", b""
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            if number < chunks:
                index += struct.pack("<QQ", len(body), chunk + 4)
                frame = padded[number * chunk : (number + 1) * chunk].tobytes()
                body += frame + struct.pack("<I", crc32c(frame))
            else:
                index += b"\xff" * 16
        store.write(f"{key}/c/{shard}", body + index + struct.pack("<I", crc32c(index)))
    meta = json.loads(KEPT)
    meta["shape"] = [len(data)]
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [chunk * per_shard]
    meta["codecs"][0]["configuration"]["chunk_shape"] = [chunk]
    meta["attributes"]["moc_ckpt"]["crc32c"] = "00000000"
    text = json.dumps(meta, separators=(",", ":")).encode()
    store.write(f"{key}/zarr.json", text.replace(b'"00000000"', b'"%08x"' % crc32c(text)))


CASES = [(1000, 1000, 1), (10_000, 4092, 2), (10_000, 4092, 3), (9 << 20, (5 << 20) - 4, 4)]


@pytest.mark.parametrize(("nbytes", "chunk", "per_shard"), CASES)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_it_reads(kind: str, nbytes: int, chunk: int, per_shard: int, tmp_path: Path) -> None:
    store, data = make_store(kind, tmp_path), random_bytes(nbytes)
    write_format_1(store, "pack", data, chunk, per_shard)
    np.testing.assert_array_equal(read_with_tensorstore(store), data)
    reader = PackReader(store, "pack", nbytes)
    reader.check()
    np.testing.assert_array_equal(reader.read(0, nbytes), data)
    np.testing.assert_array_equal(reader.read(nbytes // 2, nbytes // 3), data[nbytes // 2 :][: nbytes // 3])
    assert reader.grain == chunk
    np.testing.assert_array_equal(np.concatenate([chunk.copy() for _, chunk in reader.scan()]), data)


@pytest.mark.parametrize(("nbytes", "chunk", "per_shard"), CASES)
def test_damage_in_it_is_found(nbytes: int, chunk: int, per_shard: int, tmp_path: Path) -> None:
    store, data = make_store("memory", tmp_path), random_bytes(nbytes)
    write_format_1(store, "pack", data, chunk, per_shard)
    good = store.read("pack/c/0") or b""
    for position in (0, chunk - 1, chunk, chunk + 3, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[position] ^= 0x20
        store.write("pack/c/0", bytes(bad))
        with pytest.raises(CorruptionError):
            PackReader(store, "pack", nbytes).read(0, nbytes)
    store.write("pack/c/0", good[:-1])
    with pytest.raises(CorruptionError, match="truncated"):
        PackReader(store, "pack", nbytes).check()


def test_small_packs_are_still_of_format_1() -> None:
    """So readers that know only that read them as well."""
    text = encode_metadata(plan_pack(1000))
    assert text == KEPT
    assert decode_metadata(text, "").tail == 4
    assert json.loads(encode_metadata(plan_pack(9 << 20)))["attributes"]["moc_ckpt"]["format_version"] == 2
