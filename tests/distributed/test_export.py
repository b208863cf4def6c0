"""Exports of a real run: the copy restores and goes on as the original does, and the weights are the model's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, oracle
from distributed.pec_tools import DEADLINE, Diary, build, everyone, manifest, row_experts, verified, written
from distributed.pool import Pool

pytestmark = pytest.mark.distributed

ROW = "z2_bf16"


def case_copy(ctx: Any, path: str) -> dict[str, Any]:
    """Save partially, export, load the copy into another engine, and go on saving into the copy."""
    from moc_ckpt.storage.export import export_checkpoint
    from moc_ckpt.storage.weights import export_weights

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, 1, storage={"keep_last": 0})
    for _ in range(3):
        harness.train(engine, 1)
        diary.save(engine)
    if ctx.rank == 0:
        tag = manifest(diary.path)["tag"]
        export_checkpoint(_open(diary.path), tag, f"{path}/copy")
        export_weights(_open(diary.path), tag, f"{path}/weights")
    ctx.barrier()
    copy = Diary(ctx, f"{path}/copy", f"{path}/kept")
    original = build(ctx, ROW, 1, seed=2, storage={"keep_last": 0})
    wrong = diary.load(original)
    before = harness.snapshot(ctx, original)
    weights = oracle.local_state(original)["weights"]
    engine = build(ctx, ROW, 1, seed=3, storage={"keep_last": 0})
    wrong += copy.load(engine)
    wrong += harness.differences(before, harness.snapshot(ctx, engine))
    harness.train(engine, 1)
    body = copy.save(engine)
    wrong += verified(copy.path, body["tag"])
    engine = build(ctx, ROW, 1, seed=4, storage={"keep_last": 0})
    wrong += copy.load(engine)
    return {
        "wrong": wrong,
        "weights": weights,
        "took": written(body),
        "packs": [pack["path"] for pack in body["packs"]],
    }


def _open(path: str) -> Any:
    from moc_ckpt.storage.store import open_store

    return open_store(path)


def test_the_copy_restores_and_goes_on_as_the_original(pool: Pool, ckpt_dir: str) -> None:
    import torch

    results = pool.run(4, case_copy, path=ckpt_dir, deadline=DEADLINE)
    experts = everyone(row_experts(ROW))
    source, copy = Path(ckpt_dir, "c"), Path(ckpt_dir, "copy")
    exported = manifest(str(copy), "global_step3")
    assert {pack["path"].split("/")[0] for pack in manifest(str(source))["packs"]} > {"global_step3"}
    assert {pack["path"].split("/")[0] for pack in exported["packs"]} == {"global_step3"}
    data = Path(ckpt_dir, "weights", "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    seen = set()
    for rank, result in enumerate(results):
        assert result["wrong"] == [], f"rank {rank}"
        # A run that goes on in the copy takes only some of the experts anew, and the others from it.
        assert result["took"] < experts
        assert {path.split("/")[0] for path in result["packs"]} == {"global_step3", "global_step4"}
        for name, weight in result["weights"].items():
            start, stop = header[name]["data_offsets"]
            found = torch.frombuffer(bytearray(data), dtype=torch.uint8)[8 + length + start : 8 + length + stop]
            found = found.clone().view(torch.bfloat16)
            assert header[name]["dtype"] == "BF16" and header[name]["shape"] == list(weight.shape)
            assert oracle.bits_equal(found.view(weight.shape), weight), name
            seen.add(name)
    names = {name for name, item in header.items() if item.get("dtype") == "BF16"}
    assert seen <= names and len([name for name in seen if "experts" in name]) >= len(experts)
