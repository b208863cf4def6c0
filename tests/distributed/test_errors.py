"""Bad input, damaged files and failing ranks: every rank raises, none hangs, nothing was touched (I8)."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.harness import ON
from distributed.pool import Pool
from distributed.zoo import Layer

pytestmark = pytest.mark.distributed

ROW = "z1_bf16"
#: Hangs show here as a failure after this many seconds, not after the rendezvous deadline.
DEADLINE = 45.0


def untouched(ctx: Any, engine: Any, call: Callable[[], Any]) -> dict[str, Any]:
    """Make a call that should fail; what it raised, what it changed, and whether training goes on."""
    before = harness.snapshot(ctx, engine)
    done = harness.attempt(call)
    done.pop("value", None)
    changed = harness.differences(before, harness.snapshot(ctx, engine))
    losses = [float.fromhex(x) for x in harness.train(engine, 1)]
    return {**done, "changed": changed, "trains on": all(x == x and abs(x) < 50 for x in losses)}


def assert_all_raised(results: list[dict[str, Any]], *words: str, kind: str = "MocError") -> None:
    """All ranks raised `kind`, nothing changed, training goes on, and some rank's text has all the words."""
    for rank, result in enumerate(results):
        assert result["raised"] is not None, f"rank {rank} did not raise; others: {[r['raised'] for r in results]}"
        assert result["changed"] == [], f"rank {rank}"
        assert result["trains on"], f"rank {rank}"
        assert kind in result["mro"], f"rank {rank} raised {result['raised']}: {result['text']}"
        for word in words:
            assert word.lower() in result["text"].lower(), f"rank {rank}: {word!r} is not in: {result['text']}"


# ------------------------------------------------------------------------------------ damaged files


def damage_delete(file: Path) -> None:
    file.unlink()


def damage_truncate(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def case_damage(ctx: Any, path: str, pattern: str, how: str) -> dict[str, Any]:
    """Rank 0 damages the largest file that a pattern finds; then all ranks load that tag."""
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="t")
    marker = _marker(engine)
    harness.train(engine, 1)
    if ctx.rank == 0:
        files = [
            f for found in Path(path, "t").glob(pattern) for f in ([found] if found.is_file() else found.rglob("*"))
        ]
        files = sorted((f for f in files if f.is_file()), key=lambda f: (-f.stat().st_size, str(f)))
        assert files, f"nothing matches {pattern}: {sorted(str(p) for p in Path(path).rglob('*'))}"
        if how == "flip":
            _flip(files[0], marker)
        else:
            {"delete": damage_delete, "truncate": damage_truncate, "empty": damage_empty}[how](files[0])
    ctx.barrier()
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path, tag="t"))


def _marker(engine: Any) -> bytes:
    """Some bytes of rank 0's own master, to be found in its pack."""
    import torch

    master = engine.optimizer.single_partition_of_fp32_groups[0].detach()
    return master[4:7].contiguous().view(torch.uint8).numpy().tobytes()


def _flip(file: Path, marker: bytes) -> None:
    data = bytearray(file.read_bytes())
    at = data.find(marker)
    data[at + 5 if at >= 0 else len(data) // 3] ^= 0x10
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["delete", "flip", "truncate", "empty"])
@pytest.mark.parametrize("pattern", ["*/packs/rank_00000.dense", "*/packs/rank_00001.experts", "*/packs/rank_00003*"])
def test_damaged_pack(pool: Pool, ckpt_dir: str, pattern: str, how: str) -> None:
    results = pool.run(4, case_damage, path=ckpt_dir, pattern=pattern, how=how, deadline=DEADLINE)
    assert_all_raised(results, "rank_0000", kind="CorruptionError")


def test_checksum_mismatch_says_everything(pool: Pool, ckpt_dir: str) -> None:
    """File, unit, the checksum that was expected and the one that was found."""
    results = pool.run(4, case_damage, path=ckpt_dir, pattern="*/packs/rank_00000.dense", how="flip", deadline=DEADLINE)
    assert_all_raised(results, "rank_00000.dense", "dense/", "crc32c", kind="CorruptionError")
    for result in results:
        sums = set(re.findall(r"\b[0-9a-f]{8}\b", result["text"].partition("where:")[0]))
        assert len(sums) == 2, f"two checksums should be told: {result['text']}"


@pytest.mark.parametrize("how", ["delete", "flip", "truncate"])
def test_damaged_extra(pool: Pool, ckpt_dir: str, how: str) -> None:
    results = pool.run(4, case_damage, path=ckpt_dir, pattern="*/extra", how=how, deadline=DEADLINE)
    assert_all_raised(results, "extra", kind="StorageError")


@pytest.mark.parametrize("how", ["flip", "truncate", "empty"])
def test_damaged_manifest(pool: Pool, ckpt_dir: str, how: str) -> None:
    results = pool.run(4, case_damage, path=ckpt_dir, pattern="manifest.json", how=how, deadline=DEADLINE)
    assert_all_raised(results, "manifest", kind="StorageError")


def case_manifest_gone(ctx: Any, path: str, tag: str | None) -> dict[str, Any]:
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="t")
    ctx.barrier()
    if ctx.rank == 0:
        Path(path, "t", "manifest.json").unlink()
    ctx.barrier()
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path, tag=tag))


@pytest.mark.parametrize("tag", ["t", None], ids=["by tag", "by latest"])
def test_missing_manifest(pool: Pool, ckpt_dir: str, tag: str | None) -> None:
    """`latest` names a tag that is no checkpoint: never a silent start from scratch."""
    results = pool.run(2, case_manifest_gone, path=ckpt_dir, tag=tag, deadline=DEADLINE)
    assert_all_raised(results, "t", kind="StorageError")


def crc32c(data: bytes, value: int = 0) -> int:
    """Castagnoli's CRC, bit by bit: independent of any library."""
    value ^= 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def case_newer_format(ctx: Any, path: str, sealed: bool) -> dict[str, Any]:
    """A manifest from the future, with its own checksum right or left as it was."""
    engine = harness.build("w1", world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="t")
    file = Path(path, "t", "manifest.json")
    text = file.read_text()
    head, _, rest = text.partition('"body":')
    header = json.loads(head.rstrip().rstrip(",") + "}")["moc_ckpt"]
    body = rest.rstrip()[:-1]
    header["format_version"] = 999
    if sealed:
        header["crc32c"] = f"{crc32c(body.encode(), crc32c(b'999:')):08x}"
    file.write_text(json.dumps({"moc_ckpt": header})[:-1] + ',"body":' + body + "}")
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path, tag="t"))


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "edited"])
def test_newer_format_version(pool: Pool, ckpt_dir: str, sealed: bool) -> None:
    results = pool.run(1, case_newer_format, path=ckpt_dir, sealed=sealed)
    assert_all_raised(results, "manifest.json", kind="StorageError")
    if sealed:
        assert_all_raised(results, "999", "upgrade", kind="FormatError")


def case_native_directory(ctx: Any, path: str, tag: str | None) -> dict[str, Any]:
    engine = harness.build(ROW, world=ctx.world, seed=1)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="t")
    harness.discard(engine)
    harness.reset()
    engine = harness.build(ROW, world=ctx.world, seed=2, plugin=ON)
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path, tag=tag))


@pytest.mark.parametrize("tag", ["t", None], ids=["by tag", "by latest"])
def test_native_directory(pool: Pool, ckpt_dir: str, tag: str | None) -> None:
    results = pool.run(2, case_native_directory, path=ckpt_dir, tag=tag, deadline=DEADLINE)
    assert_all_raised(results, "DeepSpeed", "moc_checkpoint.enabled")


# ------------------------------------------------------------------------------------ another model


def case_other_model(ctx: Any, path: str, source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON, model=source)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="t")
    harness.discard(engine)
    harness.reset()
    engine = harness.build(ROW, world=ctx.world, seed=2, plugin=ON, model=target)
    harness.train(engine, 1)
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path))


EIGHT = {"layers": (Layer(experts=8, ep=2), Layer(experts=4, ep=2, k=2))}
EP4 = {"layers": (Layer(experts=6, ep=2), Layer(experts=4, ep=2, k=2))}


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ({}, {"extra_layer": True}, ["extra_dense.weight", "extra_dense.bias"]),
        ({"extra_layer": True}, {}, ["extra_dense.weight", "extra_dense.bias"]),
        ({}, {"ffn": 9}, ["up.weight", "[9, 12]", "[7, 12]"]),
        ({}, {"expert_bias_extra": True}, ["extra"]),
        ({}, EIGHT, ["blocks.0.moe", "8", "4", "expert"]),
        (EP4, {}, ["blocks.0.moe", "6", "4", "expert"]),
        ({}, {"frozen": False}, ["gain"]),
    ],
    ids=["new layer", "lost layer", "shapes", "new expert tensor", "4 to 8 experts", "6 to 4 experts", "unfrozen"],
)
def test_other_model(
    pool: Pool, ckpt_dir: str, source: dict[str, Any], target: dict[str, Any], words: list[str]
) -> None:
    results = pool.run(4, case_other_model, path=ckpt_dir, source=source, target=target, deadline=DEADLINE)
    assert_all_raised(results, *words, kind="ModelMismatchError")


def case_other_optimizer(ctx: Any, path: str) -> dict[str, Any]:
    engine = harness.build("z2_bf16_sgd", world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    engine.save_checkpoint(path)
    harness.discard(engine)
    harness.reset()
    engine = harness.build("z2_bf16_client_adamw", world=ctx.world, seed=2, plugin=ON)
    harness.train(engine, 1)
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path))


def test_other_optimizer(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(4, case_other_optimizer, path=ckpt_dir, deadline=DEADLINE)
    assert_all_raised(results, "exp_avg", "optimizer", kind="ModelMismatchError")


# ------------------------------------------------------------------------------------ failing saves


def case_save_fails_on_one_rank(ctx: Any, path: str, victim: int, function: str) -> dict[str, Any]:
    """One rank's file system says no in the middle of a save."""
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 2)
    engine.save_checkpoint(path, tag="old")
    old = harness.snapshot(ctx, engine)
    harness.train(engine, 1)
    hits: list[str] = []
    original = getattr(os, function)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        hits.append(function)
        raise OSError(errno.ENOSPC, "No space left on device")

    if ctx.rank == victim:
        setattr(os, function, refuse)
    try:
        result = untouched(ctx, engine, lambda: engine.save_checkpoint(path, tag="new"))
    finally:
        setattr(os, function, original)
    everyone = ctx.gather(len(hits))
    result["hits"] = everyone[victim]
    result["manifest"] = Path(path, "new", "manifest.json").exists()
    ctx.barrier()
    engine.load_checkpoint(path)
    result["old loads"] = harness.differences(old, harness.snapshot(ctx, engine))
    engine.save_checkpoint(path, tag="new")
    result["saves again"] = Path(path, "latest").read_text()
    return result


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("victim", [0, 2])
def test_save_fails_on_one_rank(pool: Pool, ckpt_dir: str, victim: int, function: str) -> None:
    results = pool.run(
        4, case_save_fails_on_one_rank, path=ckpt_dir, victim=victim, function=function, deadline=DEADLINE
    )
    assert results[0]["hits"], f"os.{function} was never called on rank {victim}: inject elsewhere"
    assert_all_raised(results, "space")
    for result in results:
        assert result["manifest"] is False
        assert result["old loads"] == []
        assert result["saves again"] == "new"


def case_unwritable(ctx: Any, path: str) -> dict[str, Any]:
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    return untouched(ctx, engine, lambda: engine.save_checkpoint(path, tag="t"))


@pytest.mark.parametrize("place", ["file", "file/under/it", "null"])
def test_save_dir_cannot_be_a_directory(pool: Pool, ckpt_dir: str, place: str) -> None:
    Path(ckpt_dir, "file").write_text("I was here first")
    target = "/dev/null/checkpoints" if place == "null" else f"{ckpt_dir}/{place}"
    results = pool.run(2, case_unwritable, path=target, deadline=DEADLINE)
    assert_all_raised(results, target.rsplit("/", 1)[0], kind="StorageError")
    assert Path(ckpt_dir, "file").read_text() == "I was here first"


def case_ranks_disagree(ctx: Any, path: str, what: str) -> dict[str, Any]:
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    call = {
        "tag": lambda: engine.save_checkpoint(path, tag=f"t{ctx.rank}"),
        "save_dir": lambda: engine.save_checkpoint(f"{path}/{ctx.rank}", tag="t"),
        "empty": lambda: engine.save_checkpoint(path if ctx.rank else "", tag="t"),
        "bad tag": lambda: engine.save_checkpoint(path, tag="../escape"),
    }[what]
    return untouched(ctx, engine, call)


@pytest.mark.parametrize("what", ["tag", "save_dir", "bad tag"])
def test_ranks_disagree(pool: Pool, ckpt_dir: str, what: str) -> None:
    results = pool.run(2, case_ranks_disagree, path=f"{ckpt_dir}/c", what=what, deadline=DEADLINE)
    assert_all_raised(results, what.split()[-1])
    assert not Path(ckpt_dir, "escape").exists()


def case_one_rank_cannot_read(ctx: Any, path: str, victim: int) -> dict[str, Any]:
    """One rank's reads fail while the others' succeed (a broken mount, say)."""
    engine = harness.build(ROW, world=ctx.world, seed=1, plugin=ON)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="t")
    harness.train(engine, 1)
    import builtins
    import io

    originals = (builtins.open, io.open, os.open)

    def wrap(original: Any) -> Any:
        def opener(file: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, (str, os.PathLike)) and "/packs/" in os.fspath(file):
                raise OSError(errno.EIO, "Input/output error", os.fspath(file))
            return original(file, *args, **kwargs)

        return opener

    if ctx.rank == victim:
        builtins.open, io.open, os.open = (wrap(original) for original in originals)
    try:
        return untouched(ctx, engine, lambda: engine.load_checkpoint(path, tag="t"))
    finally:
        builtins.open, io.open, os.open = originals


@pytest.mark.parametrize("victim", [0, 3])
def test_one_rank_cannot_read(pool: Pool, ckpt_dir: str, victim: int) -> None:
    results = pool.run(4, case_one_rank_cannot_read, path=ckpt_dir, victim=victim, deadline=DEADLINE)
    assert_all_raised(results, kind="MocError")


def case_absent(ctx: Any, path: str, absent: int, what: str) -> dict[str, Any]:
    """One rank never comes to a collective call."""
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin={**ON, "timeouts": {"rendezvous_s": 3}})
    engine.save_checkpoint(path, tag="old")
    before = harness.snapshot(ctx, engine)
    call = {"save": lambda: engine.save_checkpoint(path, tag="t"), "load": lambda: engine.load_checkpoint(path)}[what]
    began = time.monotonic()
    done = {"raised": None} if ctx.rank == absent else harness.attempt(call)
    done.pop("value", None)
    seconds = time.monotonic() - began
    local = oracle.local_differences(before["local"], oracle.local_state(engine))
    return {**done, "seconds": seconds, "changed": local, "manifest": Path(path, "t", "manifest.json").exists()}


@pytest.mark.parametrize(("what", "absent"), [("save", 1), ("save", 0)])
def test_absent_rank_is_named_before_the_deadline_of_the_group(
    pool: Pool, ckpt_dir: str, what: str, absent: int
) -> None:
    results = pool.run(2, case_absent, path=ckpt_dir, absent=absent, what=what, deadline=DEADLINE, fresh_after=True)
    for rank, result in enumerate(results):
        assert result["changed"] == []
        assert not result["manifest"]
        if rank != absent:
            assert result["raised"] == "RendezvousTimeoutError", result
            assert result["seconds"] < 20
            assert "rendezvous_s" in result["text"]
            if rank == 0:
                assert re.search(rf"(?i)ranks? {absent}\b", result["text"]), result["text"]


# -------------------------------------------------------------------------------------- client_state


class Custom:
    """A class of the user's own: picklable, not plain."""

    def __init__(self, value: int) -> None:
        self.value = value


def case_client_state(ctx: Any, path: str, state: str, only: int | None, trust: bool) -> dict[str, Any]:
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin={**ON, "recovery": {"trust_client_state": trust}})
    harness.train(engine, 1)
    bad: Any = {"lambda": lambda: None, "custom": Custom(7), "file": None}[state]
    client = {"good": 1, "outer": {"list": [0, {"inner": bad}]}}
    if only is not None and ctx.rank != only:
        client = {"good": 1}
    result = untouched(ctx, engine, lambda: engine.save_checkpoint(path, tag="t", client_state=client))
    result["exists"] = Path(path, "t", "manifest.json").exists()
    if result["exists"]:
        _, back = engine.load_checkpoint(path, tag="t")
        result["value"] = back["outer"]["list"][1]["inner"].value if "outer" in back else None
    return result


@pytest.mark.parametrize("state", ["custom", "lambda"])
def test_unloadable_client_state_is_refused_when_saved(pool: Pool, ckpt_dir: str, state: str) -> None:
    results = pool.run(2, case_client_state, path=ckpt_dir, state=state, only=None, trust=False, deadline=DEADLINE)
    # Trusting helps against a class of one's own, not against what nothing can pickle.
    hint = ["trust_client_state"] if state == "custom" else []
    assert_all_raised(results, "outer", "list", "1", "inner", *hint)
    assert not any(result["exists"] for result in results)


def test_unloadable_client_state_on_one_rank(pool: Pool, ckpt_dir: str) -> None:
    """Only rank 0's client_state is saved (as natively), so rank 0's must stop all ranks."""
    results = pool.run(2, case_client_state, path=ckpt_dir, state="custom", only=0, trust=False, deadline=DEADLINE)
    assert_all_raised(results, "inner")


def test_trusted_client_state_round_trips(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, case_client_state, path=ckpt_dir, state="custom", only=None, trust=True, deadline=DEADLINE)
    for result in results:
        assert result["raised"] is None, result["text"]
        assert result["value"] == 7


def test_trusted_client_state_that_cannot_be_pickled(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, case_client_state, path=ckpt_dir, state="lambda", only=None, trust=True, deadline=DEADLINE)
    assert_all_raised(results, "client_state")


def case_untrusted_reader(ctx: Any, path: str) -> dict[str, Any]:
    """Saved with trust, loaded without: refused, not executed."""
    section = {**ON, "recovery": {"trust_client_state": True}}
    engine = harness.build("w2_ep1", world=ctx.world, seed=1, plugin=section)
    engine.save_checkpoint(path, tag="t", client_state={"x": Custom(1)})
    harness.discard(engine)
    harness.reset()
    engine = harness.build("w2_ep1", world=ctx.world, seed=2, plugin=ON)
    harness.train(engine, 1)
    return untouched(ctx, engine, lambda: engine.load_checkpoint(path, tag="t"))


def test_untrusted_reader_refuses(pool: Pool, ckpt_dir: str) -> None:
    results = pool.run(2, case_untrusted_reader, path=ckpt_dir, deadline=DEADLINE)
    assert_all_raised(results, "trust_client_state")


# -------------------------------------------------------------------------------------- configuration


def case_build(ctx: Any, plugin: Any, config: dict[str, Any], row: zoo.Row) -> dict[str, Any]:
    done = harness.attempt(harness.build, row, world=ctx.world, seed=1, plugin=plugin, config=config)
    done.pop("value", None)
    return done


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"enabled": True, "save_weight": "derive"}, ["save_weight", "save_weights"]),
        ({"enabled": True, "storage": {"keep_lats": 3}}, ["storage.keep_lats", "keep_last"]),
        ({"enabled": True, "keep_last": 3}, ["keep_last", "storage.keep_last"]),
        ({"enabled": "maybe"}, ["enabled", "maybe"]),
        ({"enabled": True, "storage": {"keep_last": -1}}, ["storage.keep_last", "-1"]),
        ({"enabled": True, "storage": {"keep_last": "three"}}, ["storage.keep_last", "three"]),
        ({"enabled": True, "storage": 3}, ["storage"]),
        ({"enabled": True, "save_weights": "both"}, ["save_weights", "derive", "sharded"]),
        ({"enabled": True, "storage": {"checksum": "md5"}}, ["storage.checksum", "crc32c"]),
        ({"enabled": True, "timeouts": {"rendezvous_s": 0}}, ["timeouts.rendezvous_s"]),
        ({"enabled": True, "recovery": {"require_resume": "yes please"}}, ["recovery.require_resume"]),
        ({"enabled": False, "stroage": {}}, ["stroage", "storage"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_configuration_errors(pool: Pool, section: dict[str, Any], words: list[str]) -> None:
    results = pool.run(1, case_build, plugin=section, config={}, row=zoo.ROWS["w1"])
    for result in results:
        assert result["raised"] == "ConfigError", result
        for word in words:
            assert word in result["text"], result["text"]


def test_configuration_error_on_all_ranks(pool: Pool) -> None:
    section = {"enabled": True, "nonsense": 1}
    for result in pool.run(2, case_build, plugin=section, config={}, row=zoo.ROWS["w2_ep1"], deadline=DEADLINE):
        assert result["raised"] == "ConfigError"


DENSE = zoo.ROWS["w1"].with_model(layers=(), stage=3, groups=1, empty=False, tied=False, scheduler="none")


@pytest.mark.parametrize(
    ("name", "row", "config"),
    [
        ("ZeRO-3", DENSE, {}),
        ("NVMe", DENSE, {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}),
        (
            "autocast",
            zoo.ROWS["w1"],
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": False}},
        ),
        ("ZenFlow", zoo.ROWS["w1"], {"zero_optimization": {"zenflow": {"topk_ratio": 0.1, "update_interval": 4}}}),
        ("tensor parallel", DENSE.with_model(stage=1), {"tensor_parallel": {"autotp_size": 2}}),
        ("sequence parallel", DENSE.with_model(stage=1), {"sequence_parallel_size": 2}),
        ("universal", zoo.ROWS["w1"], {"checkpoint": {"load_universal": True}}),
        # It has several param groups, of which ZeRO leaves Adagrad one.
        ("Adagrad", zoo.ROWS["w1"].with_model(optimizer="client_adagrad"), {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_features_are_refused_by_name(pool: Pool, name: str, row: zoo.Row, config: dict[str, Any]) -> None:
    for result in pool.run(1, case_build, plugin=ON, config=config, row=row, deadline=DEADLINE):
        assert result["raised"] == "UnsupportedError", result
        assert name.lower() in result["text"].lower(), result["text"]


def case_pipeline(ctx: Any) -> dict[str, Any]:
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    net = PipelineModule([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.MSELoss())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "moc_checkpoint": ON,
    }
    done = harness.attempt(
        deepspeed.initialize,
        model=net,
        model_parameters=list(net.parameters()),
        config=config,
        dist_init_required=False,
    )
    done.pop("value", None)
    return done


def test_pipeline_is_refused_by_name(pool: Pool) -> None:
    for result in pool.run(1, case_pipeline, deadline=DEADLINE):
        assert result["raised"] == "UnsupportedError", result
        assert "pipeline" in result["text"].lower()


def test_pool_is_still_sound(pool: Pool, ckpt_dir: str) -> None:
    """After all these refusals the same processes still save and load."""
    from distributed import test_exactness

    results = pool.run(1, test_exactness.case_exact, row="w1", path=ckpt_dir, plugin=ON)
    test_exactness._assert_exact(results)
    shutil.rmtree(ckpt_dir, ignore_errors=True)
