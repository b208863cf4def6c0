"""`moc-ckpt export`: every value is where it belongs, and nothing half-written counts."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import storage_samples
import torch
from storage_samples import (
    DENSE,
    EXPERT_SHAPE,
    EXPERTS,
    LAYERS,
    TOPOLOGY,
    ArraySource,
    each_file,
    expert_name,
    flip,
    make_store,
    save,
    tensor_values,
)
from typer.testing import CliRunner

from moc_ckpt.cli.main import app
from moc_ckpt.errors import ConfigError, CorruptionError, StorageError
from moc_ckpt.recovery.resolver import Stored, StoredTensor, resolve
from moc_ckpt.state.fragment import Fragment, TensorKey
from moc_ckpt.storage import output
from moc_ckpt.storage.attempts import current_attempt, open_attempt
from moc_ckpt.storage.checkpoint import latest_tag, list_tags, load_manifest, manifest_key, read_extra
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.export import export_checkpoint
from moc_ckpt.storage.manifest import (
    FragmentTable,
    Manifest,
    PackRecord,
    TensorRecord,
    UnitRecord,
    encode_manifest,
)
from moc_ckpt.storage.pack import PackReader, write_pack
from moc_ckpt.storage.retention import apply_retention
from moc_ckpt.storage.store import Store, open_store
from moc_ckpt.storage.verify import verify
from moc_ckpt.storage.weights import export_weights, parse_size

runner = CliRunner()
FRESH = [(0, 0), (0, 1), (1, 3)]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three checkpoints; the newest one refers to both others."""
    store = make_store("local", tmp_path)
    save(store, "t10", 10)
    save(store, "t20", 20, experts=EXPERTS[2:4])
    save(store, "t30", 30, experts=FRESH)
    return store


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(*args: object, code: int = 0) -> str:
    result = runner.invoke(app, ["export", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def as_json(*args: object) -> dict[str, Any]:
    return json.loads(run(*args, "--json"))


def step_of(place: tuple[int, int]) -> int:
    return 30 if place in FRESH else 20 if place in EXPERTS[2:4] else 10


def expected(kind: str) -> dict[str, np.ndarray]:
    """What t30 of the fixture holds, from the values that went in."""
    values = {
        expert_name(*place): tensor_values(expert_name(*place), kind, EXPERT_SHAPE, 1, step_of(place))
        for place in EXPERTS
    }
    return {DENSE[0]: tensor_values(DENSE[0], kind, DENSE[1], 1, 30), **values}


def read_back(store: Store, tag: str, kind: str) -> dict[str, np.ndarray]:
    """Reads whole tensors the way a restore does."""
    manifest = load_manifest(store, tag)
    groups: dict[TensorKey, list[Stored]] = {tensor.key: [] for tensor in manifest.tensors}
    for row in manifest.fragments:
        groups[manifest.tensors[row.tensor].key].append(Stored(row.start, row.stop, row.pack, row.offset, row.crc32c))
    tensors = {
        tensor.key: StoredTensor(tensor.dtype, tensor.shape, tuple(sorted(groups[tensor.key])))
        for tensor in manifest.tensors
    }
    found = {}
    for tensor in manifest.tensors:
        if tensor.kind != kind:
            continue
        numel = math.prod(tensor.shape)
        plan = resolve(tensors, [Fragment(tensor.fqn, kind, tensor.dtype, tensor.shape, 0, numel)])
        data = np.empty(numel * 4, np.uint8)
        for read in plan.reads:
            pack = manifest.packs[read.pack]
            for piece in read.pieces:
                data[piece.at : piece.at + piece.nbytes] = PackReader(store, pack.path, pack.nbytes).read(
                    piece.offset, piece.nbytes
                )
        found[tensor.fqn] = data.view(np.float32).reshape(tensor.shape)
    return found


def same(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


# ---- a checkpoint of its own ----


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_copy_needs_no_older_tag(store: Store, kind: str, tmp_path: Path) -> None:
    there = make_store(kind, tmp_path / "copy")
    done = export_checkpoint(store, "t30", there.url)
    assert done.older_tags == ("t10", "t20") and list_tags(there) == ["t30"] and latest_tag(there) == "t30"
    old, new = load_manifest(store, "t30"), load_manifest(there, "t30")
    assert all(path.startswith(f"t30/{new.save_id}/packs/") for path in new.pack_paths)
    assert new.save_id != old.save_id and new.units == old.units and new.tensors == old.tensors
    assert (new.step, new.attempt, new.created, new.ledger) == (old.step, old.attempt, old.created, old.ledger)
    assert (
        done.stored_bytes
        == new.stored_bytes
        == sum(len(there.read(key) or b"") for key in there.list(f"t30/{new.save_id}"))
    )
    # Of older packs only what is needed came along.
    assert new.nbytes == old.nbytes
    stored = b"".join(there.read(key) or b"" for key in there.list())
    for step, held in ((10, False), (20, True)):
        value = tensor_values(expert_name(0, 3), "master", EXPERT_SHAPE, 1, step).reshape(-1)[:15].tobytes()
        assert (value in stored) == held
    for each in ("master", "exp_avg"):
        assert same(read_back(there, "t30", each), expected(each))
    assert {name: read_extra(there, record) for name, record in new.extra.items()} == {
        name: read_extra(store, record) for name, record in old.extra.items()
    }
    report = verify(there, "t30")
    assert report.ok and report.fragments == len(old.fragments)


def test_the_copy_stands_alone_on_the_command_line(store: Store, out: Path) -> None:
    data = as_json(store.url, out, "--to", "moc")
    assert (data["tag"], data["step"], data["older_tags"]) == ("t30", 30, ["t10", "t20"])
    assert store.local_path is not None
    shutil.rmtree(store.local_path)
    result = runner.invoke(app, ["verify", str(out), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["ok"]
    shown = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert shown["older_tags"] == [] and [tag["tag"] for tag in shown["tags"]] == ["t30"]
    # A copy of the copy is the same again.
    text = run(out, out.with_name("again"), "--to", "moc", "--tag", "t30")
    assert "t30 (step 30)" in text and "taken from" not in text
    assert same(read_back(open_store(out.with_name("again")), "t30", "master"), expected("master"))


def test_a_run_continues_the_copy_and_refers_to_it(store: Store, out: Path) -> None:
    """Saves after a restore from the copy take what they do not save anew from it, as they could in the source."""
    export_checkpoint(store, "t30", str(out))
    copy = open_store(out)
    assert current_attempt(copy) == current_attempt(store)
    attempt = open_attempt(copy, parent=1, forked_at_step=30)
    manifest = save(copy, "t40", 40, experts=EXPERTS[:1], attempt=attempt.attempt)
    assert {path.partition("/")[0] for path in manifest.pack_paths} == {"t30", "t40"} and verify(copy, "t40").ok
    apply_retention(copy, keep_last=1)
    assert list_tags(copy) == ["t40"] and verify(copy, "t40").ok


def test_a_copy_without_its_attempts_records(store: Store, out: Path) -> None:
    store.write("attempts/000001.json", b"{")
    export_checkpoint(store, "t30", str(out))
    assert verify(open_store(out), "t30").ok and current_attempt(open_store(out)) is None


def test_a_checkpoint_saved_aside_is_an_ordinary_one_in_the_copy(store: Store, out: Path) -> None:
    assert save(store, "aside", 35, save_latest=False).kept
    export_checkpoint(store, "aside", str(out))
    assert not load_manifest(open_store(out), "aside").kept and latest_tag(open_store(out)) == "aside"


# ---- damage, refusals, kills ----


@pytest.mark.parametrize("to", ["moc", "safetensors"])
def test_damage_is_named_and_nothing_is_left(store: Store, out: Path, to: str) -> None:
    assert store.local_path is not None
    victim = next(store.local_path.glob("t10/*/packs/rank_00001.experts/c/0"))
    before = victim.read_bytes()
    flip(victim, 1000)
    error = run(store.url, out, "--to", to, code=1)
    assert str(victim) in error and "checksum mismatch" in error and "needs packs of checkpoint t10" in error
    assert not out.exists()
    victim.write_bytes(before[:-1])
    assert str(victim) in run(store.url, out, "--to", to, code=1) and not out.exists()
    victim.unlink()
    out.mkdir()
    assert "missing" in run(store.url, out, "--to", to, code=1) and list(out.iterdir()) == []
    victim.write_bytes(before)
    run(store.url, out, "--to", to)


@pytest.mark.parametrize("to", ["moc", "safetensors"])
def test_bytes_that_are_not_those_of_the_manifest_are_found(store: Store, out: Path, to: str) -> None:
    """A pack that is intact in itself, but is not what was saved."""
    manifest = load_manifest(store, "t30")
    row = next(i for i, row in enumerate(manifest.fragments) if manifest.tensors[row.tensor] == manifest.tensors[0])
    table = msgspec.structs.replace(manifest.fragments, crc32c=list(manifest.fragments.crc32c))
    table.crc32c[row] ^= 1
    store.write(manifest_key("t30"), encode_manifest(msgspec.structs.replace(manifest, fragments=table)))
    error = run(store.url, out, "--to", to, code=1)
    assert f"{DENSE[0]} (master)" in error and manifest.packs[manifest.fragments.pack[row]].path in error
    assert not out.exists()


def test_a_checkpoint_with_a_hole_is_refused(store: Store, out: Path) -> None:
    manifest = load_manifest(store, "t30")
    table = FragmentTable.from_rows(list(manifest.fragments)[1:])
    store.write(manifest_key("t30"), encode_manifest(msgspec.structs.replace(manifest, fragments=table)))
    assert "not complete" in run(store.url, out, "--to", "moc", code=1) and not out.exists()


def test_wrong_use_is_refused_before_anything_is_touched(store: Store, out: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert "pickle" in run(store.url, out, "--to", "pickle", code=2)
    assert "an older moc_ckpt saved it" in run(store.url, out, "--to", "deepspeed", code=2)
    assert "Missing option" in run(store.url, out, code=2)
    assert "there is no checkpoint 'x'" in run(store.url, out, "--to", "moc", "--tag", "x", code=2)
    assert "not a dtype" in run(store.url, out, "--to", "safetensors", "--dtype", "int8", code=2)
    assert "not a size" in run(store.url, out, "--to", "safetensors", "--shard-size", "0GB", code=2)
    assert "are for --to safetensors" in run(store.url, out, "--to", "moc", "--dtype", "bf16", code=2)
    assert "object store" in run(store.url, "memory://x", "--to", "safetensors", code=2)
    assert "does not exist" in run(tmp_path / "nothing", out, "--to", "moc", code=2)
    inside = Path(store.url) / "export"
    assert "checkpoint directory itself" in run(store.url, inside, "--to", "moc", code=2)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    error = run(store.url, tmp_path / "full", "--to", "moc", code=2)
    assert "not empty" in error and "what to do" in error and (tmp_path / "full/x").read_text() == "mine"
    assert "is a file" in run(store.url, tmp_path / "full/x", "--to", "safetensors", code=2)
    assert "path is a file" in run(store.url, tmp_path / "full/x/y", "--to", "safetensors", code=2)


def test_a_disk_that_is_too_small_is_found_beforehand(store: Store, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for to in ("moc", "safetensors"):
        error = run(store.url, out, "--to", to, code=1)
        assert "not enough space" in error and "1,000 bytes free" in error and not out.exists()


def test_a_write_that_fails_leaves_nothing(store: Store, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moc_ckpt.storage.weights.os.pwrite", fail)
    with pytest.raises(StorageError, match="writing the weights failed"):
        export_weights(store, "t30", str(out))
    assert not out.exists()


KILLED = """
import os, sys
from pathlib import Path
left = [int(sys.argv.pop(1))]
real = Path.replace
def replace(self, target):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    return real(self, target)
Path.replace = replace
from moc_ckpt.cli.main import main
main()
"""


@pytest.mark.parametrize("to", ["moc", "safetensors"])
def test_a_kill_after_any_file_leaves_no_half_of_it_that_counts(store: Store, out: Path, to: str) -> None:
    assert store.local_path is not None
    before = {path: path.read_bytes() for path in each_file(store.local_path)}
    more = ["--shard-size", "300B"] if to == "safetensors" else []
    # The last files are those that matter most: manifest, `latest`, index.
    for count in [*range(0, 20, 5), *range(20, 60)] if to == "moc" else range(60):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(count), "export", store.url, str(out), "--to", to, *more],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode in (0, 9), done.stderr
        if to == "moc":
            tags = list_tags(open_store(out))
            assert tags in ([], ["t30"]) and all(verify(open_store(out), tag).ok for tag in tags)
            assert done.returncode == 9 or tags
        else:
            assert (out / "model.safetensors.index.json").exists() == (done.returncode == 0)
        if done.returncode == 0:
            break
        # What was left is refused, and can be removed.
        assert "not empty" in run(store.url, out, "--to", to, code=2)
        shutil.rmtree(out)
    assert 2 < count < 59
    assert {path: path.read_bytes() for path in each_file(store.local_path)} == before


# ---- safetensors ----

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file by its specification alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert data[8:9] == b"{" and length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    body, end, found = data[8 + length :], 0, {}
    for name, item in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = item["data_offsets"]
        assert start == end, "holes are not allowed"
        end = stop
        dtype = TORCH[item["dtype"]]
        assert start % dtype.itemsize == 0 and stop - start == math.prod(item["shape"]) * dtype.itemsize
        found[name] = (
            torch.frombuffer(bytearray(body[start:stop]) or bytearray(8), dtype=torch.uint8)[: stop - start]
            .view(dtype)
            .reshape(item["shape"])
        )
    assert end == len(body)
    return found


def read_all(out: Path) -> dict[str, torch.Tensor]:
    index = out / "model.safetensors.index.json"
    if not index.exists():
        assert [path.name for path in out.iterdir()] == ["model.safetensors"]
        return read_file(out / "model.safetensors")
    data = json.loads(index.read_text())
    files = sorted(set(data["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, index.name])
    found: dict[str, torch.Tensor] = {}
    for name in files:
        some = read_file(out / name)
        assert {key for key, file in data["weight_map"].items() if file == name} == some.keys()
        found |= some
    assert data["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def alike(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        ours, theirs = (item.contiguous().reshape(-1).view(torch.uint8) for item in (found[name], tensor))
        assert torch.equal(ours, theirs), name


def cast(values: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).to(dtype) for name, value in values.items()}


@pytest.mark.parametrize(
    ("args", "dtype"),
    [
        ([], torch.bfloat16),  # the run's precision
        (["--dtype", "bf16"], torch.bfloat16),
        (["--dtype", "float16"], torch.float16),
        (["--dtype", "float32"], torch.float32),
        (["--dtype", "fp64"], torch.float64),
        (["--dtype", "float8_e4m3fn"], torch.float8_e4m3fn),
    ],
)
def test_weights_are_the_cast_masters(store: Store, out: Path, args: list[str], dtype: torch.dtype) -> None:
    data = as_json(store.url, out, "--to", "safetensors", *args)
    alike(read_all(out), cast(expected("master"), dtype))
    assert data["tensors"] == 9 and data["bytes"] == 275 * dtype.itemsize and data["older_experts"] == 5
    assert data["files"] == [{"name": "model.safetensors", "bytes": (out / "model.safetensors").stat().st_size}]
    assert data["overflowed"] == []


def test_large_models_are_split_and_another_tag_can_be_named(store: Store, out: Path) -> None:
    data = as_json(store.url, out, "--to", "safetensors", "--shard-size", "150B", "--tag", "t10")
    values = {
        DENSE[0]: tensor_values(DENSE[0], "master", DENSE[1], 1, 10),
        **{expert_name(*p): tensor_values(expert_name(*p), "master", EXPERT_SHAPE, 1, 10) for p in EXPERTS},
    }
    alike(read_all(out), cast(values, torch.bfloat16))
    assert len(data["files"]) == 5  # of 60 bytes two experts fit into one, as do 70 of the dense tensor and one expert
    assert data["older_experts"] == 0 and "model-00001-of-00005" in run(
        store.url, out.with_name("b"), "--to", "safetensors", "--shard-size", "150B", "--tag", "t10"
    )


def test_the_library_reads_it(store: Store, out: Path) -> None:
    from safetensors import torch as library

    run(store.url, out, "--to", "safetensors", "--shard-size", "150B")
    found = {name: value for path in out.glob("*.safetensors") for name, value in library.load_file(path).items()}
    alike(found, cast(expected("master"), torch.bfloat16))


def test_stored_weights_win_over_masters(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_samples, "KINDS", ("weight", "master", "exp_avg"))
    store = make_store("local", tmp_path)
    save(store, "t10", 10)
    run(store.url, out, "--to", "safetensors", "--dtype", "float32")
    place = EXPERTS[5]
    found = read_all(out)[expert_name(*place)]
    assert np.array_equal(found.numpy(), tensor_values(expert_name(*place), "weight", EXPERT_SHAPE, 1, 10))


def custom(store: Store, tensors: Mapping[tuple[str, str], torch.Tensor], cuts: int = 3) -> Manifest:
    """Writes a checkpoint of any tensors, each in `cuts` fragments that are dealt to two packs in falling order."""
    open_attempt(store)
    payloads: list[bytearray] = [bytearray(), bytearray()]
    rows: list[list[int]] = []
    for index, tensor in enumerate(tensors.values()):
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        borders = [tensor.numel() * i // cuts for i in range(cuts + 1)]
        for number in reversed(range(cuts)):
            start, stop = borders[number], borders[number + 1]
            bytes_ = data[start * tensor.itemsize : stop * tensor.itemsize]
            pack = payloads[number % 2]
            rows.append([0, index, number % 2, start, stop, len(pack), crc32c(bytes_)])
            pack += bytes_ + b"\0" * (-len(bytes_) % 8)
    packs = []
    for rank, payload in enumerate(payloads):
        path = f"big/s/packs/rank_{rank:05d}.dense"
        result = write_pack(store, path, len(payload), [], ArraySource(np.frombuffer(bytes(payload), np.uint8)))
        packs.append(PackRecord(path, len(payload), result.stored_bytes))
    manifest = Manifest(
        tag="big",
        save_id="s",
        attempt=1,
        step=1,
        created=0.0,
        topology=TOPOLOGY,
        moe_layers=[],
        parameters=0,
        units=[UnitRecord("dense/m", 1, 1)],
        tensors=[
            TensorRecord(fqn, kind, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for (fqn, kind), tensor in tensors.items()
        ],
        packs=packs,
        fragments=FragmentTable.from_rows([tuple(row) for row in rows]),  # type: ignore[misc]
    )
    store.write(manifest_key("big"), encode_manifest(manifest))
    return manifest


def test_dtypes_scalars_empty_tensors_and_names_in_order(tmp_path: Path, out: Path) -> None:
    store = make_store("local", tmp_path)
    torch.manual_seed(0)
    tensors = {
        ("m.10.w", "master"): torch.randn(3, 5),
        ("m.2.w", "master"): torch.randn(7),
        ("m.half", "weight"): torch.randn(9).half(),
        ("m.bf", "weight"): torch.randn(4, 3).bfloat16(),
        ("m.scalar", "weight"): torch.tensor(2.5),
        ("m.empty", "weight"): torch.empty(0, 4),
        ("m.mask", "weight"): torch.rand(2, 11) > 0.5,
        ("m.position", "weight"): torch.arange(6),
        ("m.10.w", "exp_avg_sq"): torch.randn(3, 5),
    }
    custom(store, tensors)
    run(store.url, out, "--to", "safetensors", "--tag", "big", "--dtype", "float32")
    wanted = {
        fqn: tensor.float() if tensor.is_floating_point() else tensor
        for (fqn, kind), tensor in tensors.items()
        if kind != "exp_avg_sq"
    }
    alike(read_all(out), wanted)
    export_weights(store, "big", str(out.with_name("split")), shard_bytes=50)
    weight_map = json.loads((out.with_name("split") / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map["m.2.w"] < weight_map["m.10.w"] or weight_map["m.2.w"] == weight_map["m.10.w"]
    alike(
        read_all(out.with_name("split")),
        {fqn: tensor.bfloat16() if tensor.is_floating_point() else tensor for fqn, tensor in wanted.items()},
    )
    assert export_checkpoint(store, "big", str(out.with_name("copy"))).packs == 2
    assert verify(open_store(out.with_name("copy")), "big").ok


def test_rounding_and_values_that_do_not_fit(tmp_path: Path, out: Path) -> None:
    store = make_store("local", tmp_path)
    torch.manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32).view(torch.float32)
    bits = torch.where(torch.isnan(bits), torch.tensor(1.0), bits)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65504.0, 65520.0, 1e-8, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
    custom(store, {("m.a", "master"): torch.cat([bits, special]), ("m.b", "master"): torch.tensor([math.inf, 1.0])})
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        where = out.with_name(name)
        data = as_json(store.url, where, "--to", "safetensors", "--tag", "big", "--dtype", name)
        wanted = torch.cat([bits, special]).to(dtype)
        alike(read_all(where), {"m.a": wanted, "m.b": torch.tensor([math.inf, 1.0]).to(dtype)})
        assert data["overflowed"] == ["m.a"]
    assert "cannot hold: m.a" in run(store.url, out, "--to", "safetensors", "--tag", "big", "--dtype", "fp16")


def test_memory_stays_small_and_every_byte_is_read_about_once(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    torch.manual_seed(2)
    tensors = {(f"m.{i}.w", "master"): torch.randn(6_000_001) for i in range(8)}
    tensors |= {(f"m.{i}.b", "master"): torch.randn(33) for i in range(200)}
    custom(store, tensors)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        export_weights(store, "big", str(tmp_path / "st"), progress=lambda *now: seen.append(now))
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 110 << 20 < whole
        tracemalloc.reset_peak()
        export_checkpoint(store, "big", str(tmp_path / "copy"), lambda *now: seen.append(now))
        assert tracemalloc.get_traced_memory()[1] < 110 << 20
    finally:
        tracemalloc.stop()
    assert seen[-1][0] == seen[-1][1] >= whole and (whole, whole) in seen
    alike(read_all(tmp_path / "st"), {fqn: tensor.bfloat16() for (fqn, _), tensor in tensors.items()})
    assert verify(open_store(tmp_path / "copy"), "big").ok


def test_what_safetensors_cannot_hold_and_checkpoints_without_weights(tmp_path: Path, out: Path) -> None:
    store = make_store("local", tmp_path)
    custom(store, {("m.c", "weight"): torch.ones(3, dtype=torch.complex128)})
    assert "no dtype complex128" in run(store.url, out, "--to", "safetensors", "--tag", "big", code=2)
    other = make_store("local", tmp_path / "b")
    custom(other, {("m.c", "exp_avg"): torch.ones(3)})
    assert "holds no weights" in run(other.url, out, "--to", "safetensors", "--tag", "big", code=1)
    assert not out.exists()


def test_sizes() -> None:
    sizes = [parse_size(text) for text in ("5GB", "5 GiB", "1.5MB", "700", "700b", "2KiB")]
    assert sizes == [5_000_000_000, 5 << 30, 1_500_000, 700, 700, 2048]
    for wrong in ("", "GB", "-1GB", "5XB", "0.1B"):
        with pytest.raises(ConfigError):
            parse_size(wrong)


def test_a_copy_that_is_interrupted_is_removed(store: Store, out: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(store, "t30", str(out), stop)
    assert not out.exists()
    memory = make_store("memory", out)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(store, "t30", memory.url, stop)
    assert memory.list() == []
    memory.write("x", b"mine")
    with pytest.raises(ConfigError, match="not empty"):
        export_checkpoint(store, "t30", memory.url)


def test_a_pack_that_vanishes_meanwhile_is_an_error(store: Store, out: Path) -> None:
    assert store.local_path is not None
    victim = next(store.local_path.glob("t10/*/packs/rank_00001.experts"))

    def vanish(done: int, total: int) -> None:
        shutil.rmtree(victim, ignore_errors=True)

    with pytest.raises(CorruptionError, match="needs packs of checkpoint t10"):
        export_checkpoint(store, "t30", str(out), vanish)
    assert not out.exists() and list_tags(store) == ["t10", "t20", "t30"] and len(LAYERS) == 2


def test_help_is_quick() -> None:
    script = (
        "import sys\nfrom moc_ckpt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    bad = sorted({'torch', 'deepspeed', 'tensorstore', 'ml_dtypes'} & set(sys.modules))\n"
        "    sys.exit(f'imported {bad}' if bad else end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "export", "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "safetensors" in done.stdout and "--shard-size" in done.stdout and "deepspeed" in done.stdout


# ---- directories that get their name at the end ----


def test_two_at_once_and_what_a_killed_one_left(store: Store, out: Path) -> None:
    forsaken, other, mine = (
        out.parent / name for name in (".out.tmp-1-0123abcd", ".out2.tmp-1-0123abcd", ".out.tmp-x")
    )
    for path in (forsaken, other, mine):
        path.mkdir(parents=True)
        (path / "file").touch()
    with pytest.raises(StorageError, match="writing the directory"), output.staged_directory(str(out), store, 1) as one:
        assert not forsaken.exists() and other.exists() and mine.exists()
        with output.staged_directory(str(out), store, 1) as two:
            (two / "of the second").touch()
            assert one.exists() and one != two  # the first one is not taken for forsaken
        assert [item.name for item in out.iterdir()] == ["of the second"]
    # The first one had its name taken away; nothing of it is left.
    assert {item.name for item in out.parent.iterdir()} >= {"out", other.name, mine.name} and not one.exists()
    assert [item.name for item in out.iterdir()] == ["of the second"]


@pytest.mark.parametrize("late", [False, True])
def test_a_directory_that_is_cleared_before_it_is_locked(
    store: Store, out: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    real, met = output._lock, []

    def lock(fd: int) -> bool:
        if not met:
            met.append(Path(f"/proc/self/fd/{fd}").readlink())
            if late:
                raise BlockingIOError  # another call has the lock, and is about to remove it
            shutil.rmtree(met[0])
        return real(fd)

    monkeypatch.setattr(output, "_lock", lock)
    with output.staged_directory(str(out), store, 1) as hidden:
        assert hidden != met[0]
    assert out.is_dir()


def test_a_mount_point_cannot_be_replaced(store: Store, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out.resolve())
    with pytest.raises(ConfigError, match="mount point"), output.staged_directory(str(out), store, 1):
        pass
    assert list(out.iterdir()) == []
