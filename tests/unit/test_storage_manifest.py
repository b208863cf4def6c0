from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import DENSE, EXPERTS, LAYERS, commit_info, make_store, write_rank

from moc_ckpt.errors import CorruptionError, CoverageError, FormatError, StorageError
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import (
    FragmentRow,
    FragmentTable,
    Manifest,
    Part,
    TensorRecord,
    UnitRecord,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from moc_ckpt.storage.merge import merge_parts, missing_experts

replace = msgspec.structs.replace


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    store = make_store("memory", tmp_path)
    return [write_rank(store, "tag", "save", rank, step=30, attempt=1) for rank in range(2)]


def merge(parts: list[Part], **options: object) -> Manifest:
    return merge_parts(parts, created=1.5, **options)  # type: ignore[arg-type]


# ---- encoding ----


def test_round_trip(parts: list[Part]) -> None:
    info = commit_info(ledger={"C": [[0.1, 1e300]], "cursor": 2**60})
    manifest = merge([replace(parts[0], commit=info), parts[1]])
    assert decode_manifest(encode_manifest(manifest), "x") == manifest
    assert decode_part(encode_part(parts[0]), "x") == parts[0]
    assert manifest.ledger == {"C": [[0.1, 1e300]], "cursor": 2**60}


def test_every_byte_of_the_file_is_guarded(parts: list[Part]) -> None:
    for data, decode in ((encode_manifest(merge(parts)), decode_manifest), (encode_part(parts[0]), decode_part)):
        for position in [*range(120), *range(120, len(data), 37), len(data) - 1]:
            for bit in (position % 8, 5):
                bad = bytearray(data)
                bad[position] ^= 1 << bit
                with pytest.raises((CorruptionError, FormatError)) as info:
                    decode(bytes(bad), "the/file")
                assert info.value.where == "the/file" and info.value.fix
                assert "upgrade" not in info.value.fix


def test_truncated_files_are_damaged(parts: list[Part]) -> None:
    data = encode_manifest(merge(parts))
    for length in (0, 1, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptionError, match="truncated"):
            decode_manifest(data[:length], "x")
    with pytest.raises(CorruptionError):
        decode_manifest(data + b"}", "x")


@pytest.mark.parametrize("data", [b'{"a": 1}', b"[1, 2]", b"PK\x03\x04zip", b"\x80\x02pickle"])
def test_foreign_files_are_told_apart(data: bytes) -> None:
    with pytest.raises(FormatError, match="not in the format of moc_ckpt"):
        decode_manifest(data, "x")


def test_a_newer_format_version_asks_for_an_upgrade(parts: list[Part]) -> None:
    body = b'{"something":"new"}'
    crc = crc32c(b"3:" + body)
    data = b'{"moc_ckpt":{"format_version":3,"crc32c":"%08x","more":1},"body":%s}' % (crc, body)
    with pytest.raises(FormatError, match=r"format version 3; this moc_ckpt reads versions up to 2") as info:
        decode_manifest(data, "x")
    assert info.value.fix == "upgrade moc_ckpt"
    # A newer version may define the checksum anew, so the version decides; unless the checksum is that of an older one:
    # then it is a flipped bit.
    good = encode_manifest(merge(parts))
    with pytest.raises(CorruptionError, match="format version 4"):
        decode_manifest(good.replace(b'"format_version":2', b'"format_version":4', 1), "x")
    with pytest.raises(FormatError, match="format version 4") as info:
        decode_manifest(
            good.replace(b'"format_version":2', b'"format_version":4', 1).replace(b'"step":', b'"stop":', 1), "x"
        )
    assert "damaged" in info.value.fix
    with pytest.raises(CorruptionError, match="checksum mismatch"):
        decode_manifest(good.replace(b'"format_version":2', b'"format_version":1', 1), "x")


def test_older_format_versions_are_read(parts: list[Part]) -> None:
    manifest = replace(merge(parts), format_version=1)
    body = msgspec.json.encode(manifest)
    data = b'{"moc_ckpt":{"format_version":1,"crc32c":"%08x"},"body":%s}' % (crc32c(b"1:" + body), body)
    assert decode_manifest(data, "x") == manifest


def test_a_part_is_not_a_manifest(parts: list[Part]) -> None:
    with pytest.raises(FormatError, match="does not describe a Manifest"):
        decode_manifest(encode_part(parts[0]), "x")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("unit", 99, "refers to nothing"),
        ("tensor", -1, "refers to nothing"),
        ("pack", 99, "refers to nothing"),
        ("start", 10**6, "refers to nothing"),
        ("offset", -1, "refers to nothing"),
        ("offset", 10**6, "ends behind its pack"),
    ],
)
def test_tables_that_make_no_sense_are_refused(parts: list[Part], column: str, value: int, message: str) -> None:
    table = parts[0].fragments
    bad = replace(table, **{column: [value, *getattr(table, column)[1:]]})
    with pytest.raises(FormatError, match=message):
        decode_part(encode_part(replace(parts[0], fragments=bad)), "x")


def test_tables_of_unequal_columns_and_unknown_dtypes_are_refused(parts: list[Part]) -> None:
    short = replace(parts[0].fragments, stop=[1])
    with pytest.raises(FormatError, match="differ in length"):
        decode_part(encode_part(replace(parts[0], fragments=short)), "x")
    odd = [TensorRecord("x", "master", "float12", (1,)), *parts[0].tensors[1:]]
    with pytest.raises(FormatError, match="unknown dtype 'float12'"):
        decode_part(encode_part(replace(parts[0], tensors=odd)), "x")


@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * 7), max_size=5))
def test_table_rows(rows: list[tuple[int, int, int, int, int, int, int]]) -> None:
    table = FragmentTable.from_rows(rows)
    assert len(table) == len(rows)
    assert list(table) == [FragmentRow(*row) for row in rows]


# ---- helpers ----


def test_sizes_and_versions(parts: list[Part]) -> None:
    manifest = merge(parts)
    dense, expert = 35 * 4, 30 * 4
    assert manifest.nbytes == 2 * (dense + 8 * expert)
    assert manifest.bytes_by_kind() == {"master": manifest.nbytes // 2, "exp_avg": manifest.nbytes // 2}
    assert manifest.bytes_by_unit()["expert/1/3"] == 2 * expert
    assert sum(manifest.bytes_by_unit().values()) == manifest.nbytes
    assert manifest.version_of("expert/1/3") == Version(1, 30)
    with pytest.raises(KeyError):
        manifest.version_of("expert/9/9")
    assert manifest.pack_paths == {f"tag/save/packs/rank_0000{r}.{w}" for r in (0, 1) for w in ("dense", "experts")}
    assert set(manifest.extra) == {"rng/0", "rng/1"}


# ---- merging ----


def test_merge_does_not_depend_on_the_order_of_parts(parts: list[Part]) -> None:
    assert merge(parts) == merge(parts[::-1])


def test_missing_and_unexpected_ranks_are_named(parts: list[Part]) -> None:
    with pytest.raises(CoverageError, match="no rank has finished"):
        merge([])
    with pytest.raises(CoverageError, match="1 of 2 ranks have not finished their part: 0"):
        merge(parts[1:])
    with pytest.raises(CoverageError, match="unexpected ranks"):
        merge([*parts, parts[0]])


@pytest.mark.parametrize(
    ("field", "value"), [("save_id", "other"), ("tag", "other"), ("step", 31), ("attempt", 2), ("world", 3)]
)
def test_parts_of_different_saves_are_refused(parts: list[Part], field: str, value: object) -> None:
    with pytest.raises(CoverageError, match=f"parts of different saves: {field}"):
        merge([parts[0], replace(parts[1], **{field: value})])


def test_a_fragment_that_a_rank_did_not_write_is_a_hole(parts: list[Part]) -> None:
    rows = list(parts[1].fragments)
    dropped = parts[1].tensors[rows[0].tensor]
    with pytest.raises(CoverageError, match=rf"{dropped.fqn} \({dropped.kind}\): hole"):
        merge([parts[0], replace(parts[1], fragments=FragmentTable.from_rows(rows[1:]))])


def test_what_two_ranks_wrote_is_an_overlap(parts: list[Part]) -> None:
    row = next(iter(parts[1].fragments))
    wide = FragmentTable.from_rows([row._replace(start=row.start - 1), *list(parts[1].fragments)[1:]])
    with pytest.raises(CoverageError, match="overlap"):
        merge([parts[0], replace(parts[1], fragments=wide)])


def test_disagreements_are_named(parts: list[Part]) -> None:
    tensors = [replace(parts[1].tensors[0], shape=(7, 5)), *parts[1].tensors[1:]]
    with pytest.raises(CoverageError, match=rf"disagree about {DENSE[0]} \(master\)"):
        merge([parts[0], replace(parts[1], tensors=tensors)])
    units = [UnitRecord(unit.name, 1, 20, unit.tokens) if "1/2" in unit.name else unit for unit in parts[1].units]
    with pytest.raises(CoverageError, match=r"different versions of expert/1/2: step 30 .* step 20"):
        merge([parts[0], replace(parts[1], units=units)])
    extra = {"rng/0": parts[1].extra["rng/1"]}
    with pytest.raises(StorageError, match="different extra files named 'rng/0'"):
        merge([parts[0], replace(parts[1], extra=extra)])
    packs = [replace(parts[0].packs[0], nbytes=1 << 20), *parts[1].packs[1:]]
    with pytest.raises(StorageError, match="two records of one pack"):
        merge([parts[0], replace(parts[1], packs=packs)])


@pytest.mark.parametrize(("unit", "step"), [("dense/h.0.attn", 20), ("dense/h.0.attn", 40), ("expert/0/1", 31)])
def test_versions_that_break_dense_consistency_are_refused(parts: list[Part], unit: str, step: int) -> None:
    def change(part: Part) -> Part:
        units = [replace(item, step=step) if item.name == unit else item for item in part.units]
        return replace(part, units=units)

    with pytest.raises(CoverageError, match=f"{unit} is from step {step}"):
        merge([change(part) for part in parts])


def test_an_older_expert_in_a_part_is_fine(parts: list[Part]) -> None:
    def change(part: Part) -> Part:
        units = [replace(item, step=12) if item.name == "expert/0/1" else item for item in part.units]
        return replace(part, units=units)

    assert merge([change(part) for part in parts]).version_of("expert/0/1") == Version(1, 12)


def test_an_expert_that_no_rank_declared_is_named(parts: list[Part]) -> None:
    mark = ".deepspeed_experts.2.w"
    cut = [
        replace(
            part,
            declared=[item for item in part.declared if not (mark in item.fqn and "h.1" in item.fqn)],
            units=[item for item in part.units if item.name != "expert/1/2"],
            fragments=FragmentTable.from_rows(
                row._replace(unit=row.unit - (part.units[row.unit].name > "expert/1/2"))
                for row in part.fragments
                if part.units[row.unit].name != "expert/1/2"
            ),
        )
        for part in parts
    ]
    with pytest.raises(CoverageError, match="no state of expert 2"):
        merge(cut)


# ---- references to older checkpoints ----


def base(tmp_path: Path, step: int, attempt: int = 1) -> Manifest:
    store = make_store("memory", tmp_path)
    return merge([write_rank(store, f"t{step}", f"s{attempt}", rank, step=step, attempt=attempt) for rank in range(2)])


def some(tmp_path: Path, step: int, experts: list[tuple[int, int]], attempt: int = 1) -> list[Part]:
    store = make_store("memory", tmp_path)
    return [write_rank(store, "new", "s", rank, step=step, attempt=attempt, experts=experts) for rank in range(2)]


def test_experts_that_were_not_saved_come_from_the_newest_admissible_base(tmp_path: Path) -> None:
    saved = [(0, 0), (1, 1)]
    parts = some(tmp_path, 40, saved)
    assert missing_experts(parts, LAYERS) == {f"expert/{a}/{b}" for a, b in EXPERTS if (a, b) not in saved}
    manifest = merge(parts, base=[base(tmp_path, 10), base(tmp_path, 30), base(tmp_path, 20), base(tmp_path, 50)])
    for layer, expert in EXPERTS:
        step = 40 if (layer, expert) in saved else 30  # 50 is after the save
        assert manifest.version_of(f"expert/{layer}/{expert}") == Version(1, step)
    assert {path.partition("/")[0] for path in manifest.pack_paths} == {"new", "t30"}
    assert not any(".dense" in path for path in manifest.pack_paths if path.startswith("t30"))
    manifest = merge(
        parts, base=[base(tmp_path, 10), base(tmp_path, 30)], is_admissible=lambda version: version.step <= 20
    )
    assert manifest.version_of("expert/0/1") == Version(1, 10)


def test_without_an_admissible_base_the_hole_is_named(tmp_path: Path) -> None:
    parts = some(tmp_path, 40, [(0, 0)])
    with pytest.raises(CoverageError, match="hole"):
        merge(parts)
    with pytest.raises(CoverageError, match="hole"):
        merge(parts, base=[base(tmp_path, 30)], is_admissible=lambda version: False)


def test_an_expert_half_saved_is_never_completed_from_an_older_version(tmp_path: Path) -> None:
    full, partial = some(tmp_path, 40, EXPERTS), some(tmp_path, 40, [place for place in EXPERTS if place != (0, 2)])
    with pytest.raises(CoverageError, match=r"h.0.*deepspeed_experts.2.w \(master\): hole"):
        merge([full[0], partial[1]], base=[base(tmp_path, 30)])
