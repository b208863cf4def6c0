from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import ArraySource, make_store, random_bytes, save

from moc_ckpt.errors import CheckpointNotFoundError
from moc_ckpt.state.unit_text import compact_units, number_ranges
from moc_ckpt.storage.checkpoint import manifest_key
from moc_ckpt.storage.manifest import FragmentTable, Manifest, PackRecord, TensorRecord, UnitRecord, encode_manifest
from moc_ckpt.storage.pack import plan_pack, write_pack
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import verify


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request.param, tmp_path)


def flip(store: Store, key: str, position: int) -> None:
    data = bytearray(store.read(key) or b"")
    data[position] ^= 1
    store.write(key, bytes(data))


def rewrite(store: Store, manifest: Manifest, **changes: object) -> None:
    store.write(manifest_key(manifest.tag), encode_manifest(msgspec.structs.replace(manifest, **changes)))


def test_an_intact_checkpoint(store: Store) -> None:
    save(store, "a", 10)
    manifest = save(store, "b", 20, experts=[(0, 0)])
    seen: list[tuple[int, int]] = []
    report = verify(store, "b", lambda done, total: seen.append((done, total)))
    total = sum(pack.nbytes for pack in manifest.packs)
    assert report.ok and report.problems == []
    assert (report.packs, report.fragments, report.nbytes) == (len(manifest.packs), len(manifest.fragments), total)
    assert seen == sorted(seen) and seen[-1] == (total, total)


def test_every_problem_is_listed(store: Store) -> None:
    manifest = save(store, "a", 10)
    prefix = f"a/{manifest.save_id}"
    flip(store, f"{prefix}/packs/rank_00000.dense/c/0", 0)
    store.delete(f"{prefix}/packs/rank_00001.dense/c/0")
    store.delete(f"{prefix}/packs/rank_00001.experts/zarr.json")
    flip(store, f"{prefix}/extra/rng/0", 3)
    report = verify(store, "a")
    by_file: dict[str, list[str]] = {}
    for problem in report.problems:
        by_file.setdefault(problem.file.partition(",")[0], []).append(problem.what)
        assert (problem.unit != "") == ("packs" in problem.file) == (problem.units != ()) and problem.fix
    # Small packs are one sub-chunk: a damaged one concerns all fragments in it, each named once. A file that is
    # missing altogether is one problem.
    assert {file: len(whats) for file, whats in by_file.items()} == {
        store.locate(f"{prefix}/extra/rng/0"): 1,
        store.locate(f"{prefix}/packs/rank_00000.dense/c/0"): 2,
        store.locate(f"{prefix}/packs/rank_00001.dense/c/0"): 1,
        store.locate(f"{prefix}/packs/rank_00001.experts/zarr.json"): 1,
    }
    experts = next(problem for problem in report.problems if problem.file.endswith("experts/zarr.json"))
    assert experts.units == tuple(f"expert/{layer}/{expert}" for layer in range(2) for expert in range(4))
    assert experts.unit == "expert/0-1/0-3" and experts.tensor == ""
    # The packs are of this checkpoint itself: no other one is named.
    assert not any("needs packs" in problem.what for problem in report.problems)
    assert not report.ok and report.fragments == len(manifest.fragments)


def test_a_wrong_fragment_in_an_intact_pack_is_found(store: Store) -> None:
    manifest = save(store, "a", 10)
    rows = list(manifest.fragments)
    rows[3] = rows[3]._replace(crc32c=rows[3].crc32c ^ 1)
    rewrite(store, manifest, fragments=FragmentTable.from_rows(rows))
    (problem,) = verify(store, "a").problems
    assert "not those that were saved" in problem.what
    assert problem.expected == f"{rows[3].crc32c:08x}" and problem.found == f"{rows[3].crc32c ^ 1:08x}"
    assert problem.unit == manifest.units[rows[3].unit].name
    assert manifest.tensors[rows[3].tensor].fqn in problem.tensor


def test_holes_in_the_manifest_are_found(store: Store) -> None:
    manifest = save(store, "a", 10)
    rewrite(store, manifest, fragments=FragmentTable.from_rows(list(manifest.fragments)[1:]))
    (problem,) = verify(store, "a").problems
    assert "hole" in problem.what and problem.file == store.locate("a/manifest.json")


def test_fragments_over_many_sub_chunks(tmp_path: Path) -> None:
    """One damaged sub-chunk of a big pack: only the fragments in it are named."""
    store = make_store("local", tmp_path)
    manifest = save(store, "a", 10)
    nbytes = 32 << 20
    data = random_bytes(nbytes)
    layout = plan_pack(nbytes)
    cuts = [0, layout.chunk - 400, layout.chunk * 2 + 100, layout.chunk * 2 + 500, nbytes // 4 * 4]
    spans = list(pairwise(cuts))
    result = write_pack(store, "a/big", nbytes, [(low, high - low) for low, high in spans], ArraySource(data))
    unit, tensor, pack = len(manifest.units), len(manifest.tensors), len(manifest.packs)
    rows = [(unit + i, tensor + i, pack, 0, high - low, low, result.crc32c[i]) for i, (low, high) in enumerate(spans)]
    manifest = msgspec.structs.replace(
        manifest,
        units=[*manifest.units, *(UnitRecord(f"dense/u{i}", 1, 10) for i in range(4))],
        tensors=[
            *manifest.tensors,
            *(TensorRecord(f"t{i}", "master", "uint8", (high - low,)) for i, (low, high) in enumerate(spans)),
        ],
        packs=[*manifest.packs, PackRecord("a/big", nbytes, result.stored_bytes)],
        fragments=FragmentTable.from_rows([*manifest.fragments, *rows]),
    )
    rewrite(store, manifest)
    assert verify(store, "a").ok
    flip(store, "a/big/c/0", layout.frame + 5)
    assert [problem.unit for problem in verify(store, "a").problems] == ["dense/u1"]
    flip(store, "a/big/c/0", layout.frame * 2 + 5)
    problems = verify(store, "a").problems
    assert [problem.unit for problem in problems] == ["dense/u1", "dense/u2", "dense/u3"]


def test_a_missing_file_of_a_pack_of_many_sub_chunks_is_one_problem(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    manifest = save(store, "a", 10)
    nbytes = 40 << 20
    size = nbytes // 40
    spans = [(low, size) for low in range(0, nbytes, size)]
    result = write_pack(store, "a/big", nbytes, spans, ArraySource(random_bytes(nbytes)))
    unit, tensor, pack = len(manifest.units), len(manifest.tensors), len(manifest.packs)
    rows = [(unit + i, tensor + i, pack, 0, size, low, result.crc32c[i]) for i, (low, _) in enumerate(spans)]
    rewrite(
        store,
        manifest,
        units=[*manifest.units, *(UnitRecord(f"expert/{i % 4}/{100 + i // 4}", 1, 10) for i in range(40))],
        tensors=[*manifest.tensors, *(TensorRecord(f"t{i}", "master", "uint8", (size,)) for i in range(40))],
        packs=[*manifest.packs, PackRecord("a/big", nbytes, result.stored_bytes)],
        fragments=FragmentTable.from_rows([*manifest.fragments, *rows]),
    )
    assert verify(store, "a").ok
    store.delete("a/big/c/0")
    (problem,) = verify(store, "a").problems
    assert problem.file == store.locate("a/big/c/0") and problem.what == "a file of a pack is missing"
    assert problem.unit == "expert/0-3/100-109" and len(problem.units) == 40


@given(
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 12))),
    st.sets(st.sampled_from(["dense/a", "dense/b.c", "dense/"])),
    st.integers(1, 20),
)
def test_compact_units_name_every_unit(experts: set[tuple[int, int]], dense: set[str], most: int) -> None:
    names = [f"expert/{layer}/{expert}" for layer, expert in experts] + sorted(dense)
    text = compact_units(iter(names), most)
    groups = text.split("; ") if text else []
    rest = 0
    if groups and (more := re.fullmatch(r"and (\d+) more", groups[-1])):
        rest = int(more[1])
        groups = groups[:-1]
        assert rest and len(groups) == most
    assert len(groups) <= most

    def numbers(ranges: str) -> list[int]:
        ends = [list(map(int, part.split("-"))) for part in ranges.split(",")]
        return [number for end in ends for number in range(end[0], end[-1] + 1)]

    found: list[str] = []
    for group in groups:
        if group.startswith("dense/"):
            found.append(group)
        else:
            _, layers, ids = group.split("/")
            found += [f"expert/{layer}/{expert}" for layer in numbers(layers) for expert in numbers(ids)]
    assert len(found) == len(set(found)) and set(found) <= set(names)
    assert len(found) + rest == len(names)


def test_compact_units_of_a_big_model_are_short() -> None:
    names = [f"expert/{layer}/{expert}" for layer in range(60) for expert in range(32, 64)]
    assert compact_units(names) == "expert/0-59/32-63"
    assert compact_units(["expert/0/2", "expert/0/3", "expert/1/0"]) == "expert/0/2-3; expert/1/0"
    assert number_ranges([7, 0, 1, 2, 3, 2]) == "0-3, 7" and number_ranges([]) == ""


def test_without_a_manifest_there_is_nothing_to_verify(store: Store) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(store, "a")
