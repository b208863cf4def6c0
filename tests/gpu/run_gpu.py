"""Exactness on GPUs: `python tests/gpu/run_gpu.py --json out.json [--gpus N] [--only NAME ...] [--native]`.

Starts one process per GPU, all in one NCCL job, which run every case in turn: train, save, train on; then a
new engine with another seed loads and must repeat losses and state bit for bit. fp16 cases overflow on
purpose before the save and after it, so that the loss scaler's state matters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _path in (str(HERE.parent.parent), str(HERE.parent)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

BEFORE, AFTER = 6, 8
#: Steps (of the whole run) whose gradients overflow in fp16 cases: one before the save, one after it.
OVERFLOWS = (2, 8)


def rows(gpus: int) -> dict[str, Any]:
    """The engine configurations, for a number of GPUs."""
    from distributed.zoo import Layer, Row

    wide = min(gpus, 4)
    two = min(gpus, 2)
    layers = (Layer(ep=two), Layer(ep=wide, k=2), Layer(ep=1, residual=True))
    accumulate = (("data_types", {"grad_accum_dtype": "fp32"}),)
    offload = (("offload_optimizer", {"device": "cpu", "pin_memory": True}),)
    common = {"world": gpus, "layers": layers}
    out = [
        Row("z2_bf16_fused", optimizer="fused", **common),
        Row("z2_bf16_torch", optimizer="torch_adamw", **common),
        Row("z1_bf16_fused", stage=1, optimizer="fused", **common),
        Row("z1_bf16_fp32acc_fused", stage=1, optimizer="fused", config=accumulate, **common),
        # Without clipping: DeepSpeed's replicas drift apart at stage 0 with it (its own checkpoints as well).
        Row("z0_bf16_fused", stage=0, optimizer="fused", clip=0.0, **common),
        Row("z2_fp16_fused", dtype="fp16", optimizer="fused", **common),
        Row("z1_fp16_torch", dtype="fp16", stage=1, optimizer="torch_adamw", **common),
        Row("z0_fp16_fused", dtype="fp16", stage=0, optimizer="fused", **common),
        Row("z0_fp16_unfused", dtype="fp16", stage=0, optimizer="torch_adamw", **common),
        Row("z2_bf16_cpu_adam", optimizer="cpu_adam", zero=offload, **common),
        Row("z2_fp16_cpu_adam", dtype="fp16", optimizer="cpu_adam", zero=offload, **common),
        Row("z2_fp32_fused", dtype="fp32", optimizer="fused", **common),
    ]
    return {row.name: row.with_model(poison=OVERFLOWS if row.dtype == "fp16" else ()) for row in out}


#: Rows that are also saved one expert per layer at a time, as cases with this prefix.
PARTIAL = ("z2_bf16_fused", "z0_bf16_fused", "z2_fp16_fused", "z2_bf16_cpu_adam")
PREFIX = "pec_"
#: Rows that also take a snapshot at every step, with copies that the next update would overtake if it could.
ASYNC = (
    "z2_bf16_fused",
    "z1_bf16_fp32acc_fused",
    "z0_bf16_fused",
    "z2_fp16_fused",
    "z2_bf16_cpu_adam",
    "z2_fp32_fused",
)
ASYNC_PREFIX = "async_"
#: Rows that also go to DeepSpeed's own format and come from it, as cases with this prefix.
NATIVE = ("z2_bf16_fused", "z1_bf16_fused", "z2_fp16_fused")
NATIVE_PREFIX = "native_"


def cases(gpus: int) -> dict[str, Any]:
    """Name -> row of every case; those of partial checkpoints and of snapshots come last."""
    found = rows(gpus)
    partly = {PREFIX + name: found[name] for name in PARTIAL}
    beside = {ASYNC_PREFIX + name: found[name] for name in ASYNC}
    return {**found, **partly, **beside, **{NATIVE_PREFIX + name: found[name] for name in NATIVE}}


# ------------------------------------------------------------------------------------------- one rank


class Context:
    """As the pool's context, for the oracle."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather(self, obj: Any) -> list[Any]:
        import torch.distributed as dist

        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, obj)
        return out

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.gather(None)


def exact(ctx: Context, row: Any, path: str, *, native: bool) -> dict[str, Any]:
    """One configuration: what differed (all empty when it is exact) and how many steps were skipped."""
    from distributed import harness, oracle

    plugin = None if native else {"enabled": True}
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, BEFORE)
    before = harness.snapshot(ctx, engine)
    skipped = engine.skipped_steps
    engine.save_checkpoint(path, tag="t", client_state={"pos": 1})
    disturbed = harness.differences(before, harness.snapshot(ctx, engine))
    losses = harness.train(engine, AFTER)
    end = harness.snapshot(ctx, engine)
    optimizer = type(engine.optimizer).__name__
    harness.discard(engine)
    harness.reset()

    engine = harness.build(row, world=ctx.world, seed=2, plugin=plugin)
    harness.train(engine, 2, data_seed=99)
    engine.load_checkpoint(path, tag="t")
    if native:
        oracle.restore_by_hand(engine, before["local"])
    restored = harness.differences(before, harness.snapshot(ctx, engine))
    again = harness.train(engine, AFTER)
    finish = harness.differences(end, harness.snapshot(ctx, engine))
    harness.discard(engine)
    harness.reset()

    engine = harness.build(row, world=ctx.world, seed=1)
    harness.train(engine, BEFORE)
    reference = harness.train(engine, AFTER)
    wrong = {
        "disturbed": disturbed,
        "restored": restored,
        "losses": [] if losses == again else [f"{x} != {y}" for x, y in zip(losses, again, strict=True) if x != y][:3],
        "end": finish,
        "without the plugin": [] if losses == reference else ["losses differ"],
    }
    return {
        "wrong": {name: found for name, found in wrong.items() if found},
        "skipped_before": skipped,
        "skipped": end["local"]["counters"]["skipped_steps"],
        "scale": end["local"]["scaler"].get("cur_scale", end["local"]["scaler"].get("optimizer.cur_scale")),
        "optimizer": optimizer,
    }


def partial(ctx: Context, row: Any, path: str) -> dict[str, Any]:
    """One configuration at K = 1: mixed versions restore exactly, and the counted tokens are those of the data."""
    from distributed import harness
    from distributed.pec_tools import Diary, build, manifest, versions

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, row, 1, storage={"keep_last": 0})
    saves = 2 + max(layer.experts for layer in row.layers)
    for _ in range(saves):
        harness.train(engine, 1)
        diary.save(engine)
    ledger, skipped = engine.moc.ledger, engine.skipped_steps
    routed = list(ledger.routed)
    optimizer = type(engine.optimizer).__name__
    engine = build(ctx, row, 1, seed=2)
    harness.train(engine, 2, data_seed=99)
    restored = diary.load(engine)
    found = set(versions(manifest(diary.path)).values())
    harness.train(engine, 2)
    counts = {step for _, step in found}
    tokens = (saves - skipped) * row.gas * _tokens_per_step(row)
    wrong = {
        "restored": restored,
        "versions": [] if len(counts) == max(layer.experts for layer in row.layers) else [str(sorted(counts))],
        "routed": [] if routed == [tokens * layer.k for layer in row.layers] else [f"{routed}, {tokens} tokens"],
        "plt": [] if 0 < engine.moc.plt < 1 else [str(engine.moc.plt)],
    }
    return {
        "wrong": {name: lines for name, lines in wrong.items() if lines},
        "skipped_before": skipped,
        "skipped": skipped,
        "plt": engine.moc.plt,
        "optimizer": optimizer,
    }


def beside_training(ctx: Context, row: Any, path: str) -> dict[str, Any]:
    """One configuration with a snapshot at every step: losses are those without, every checkpoint is exact."""
    from distributed.test_pipeline import case_every_step

    steps, every = 10, 2
    found = case_every_step(ctx, path, row, 1, steps, every, 0.2, {})
    tags = [f"global_step{step}" for step in range(1, steps + 1) if step % every == 0]
    wrong = {
        "restored": found["wrong"],
        "losses": [] if found["losses"] == found["expected"] else [f"{found['losses']} != {found['expected']}"],
        "tags": [] if set(found["tags"]) == set(tags) else [str(found["tags"])],
        "skipped": [] if found["skipped"] == 0 else [str(found["skipped"])],
        "versions": [] if max(found["versions"]) > 1 else [str(found["versions"])],
    }
    return {
        "wrong": {name: lines for name, lines in wrong.items() if lines},
        "skipped_before": found["overflows"],
        "skipped": found["overflows"],
    }


def both_formats(ctx: Context, row: Any, path: str) -> dict[str, Any]:
    """One configuration: DeepSpeed alone goes on from an export as we do, and we from DeepSpeed's own as it does."""
    from distributed import harness
    from distributed.test_native import case_resume, case_save, uniform

    row = row.with_model(layers=uniform(min(ctx.world, 2)), rank_buffers=False, frozen=False)
    on = {"enabled": True}

    def convert(verb: str, source: str, target: str, *more: str) -> None:
        if ctx.rank == 0:
            command = [sys.executable, "-m", "moc_ckpt.cli.main", verb, f"{path}/{source}", f"{path}/{target}", *more]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
        ctx.barrier()

    def resume(source: str, plugin: Any, ref: str, *, compare: bool) -> dict[str, Any]:
        found = case_resume(ctx, row, f"{path}/{source}", plugin, f"{path}/{ref}", compare)
        harness.reset()
        return found

    case_save(ctx, row, f"{path}/ours", on)
    harness.reset()
    convert("export", "ours", "exported", "--to", "deepspeed")
    mine = resume("ours", on, "ref1.pt", compare=False)
    theirs = resume("exported", None, "ref1.pt", compare=True)
    case_save(ctx, row, f"{path}/native", None)
    harness.reset()
    convert("import", "native", "imported")
    original = resume("native", None, "ref2.pt", compare=False)
    ours = resume("imported", on, "ref2.pt", compare=True)
    wrong = {
        "exported": theirs["wrong"],
        "exported, run": [] if {**theirs, "wrong": []} == mine else [f"{theirs} != {mine}"],
        "imported": ours["wrong"],
        "imported, run": [] if {**ours, "wrong": []} == original else [f"{ours} != {original}"],
    }
    skipped = mine["steps"][2]
    return {
        "wrong": {name: lines for name, lines in wrong.items() if lines},
        "skipped_before": skipped,
        "skipped": skipped + 1,
    }


def _tokens_per_step(row: Any) -> int:
    """Tokens of all ranks in one micro-step."""
    from distributed import zoo

    return zoo.GLOBAL_MICRO * zoo.SEQ


def worker(only: list[str], out: str, native: bool) -> None:
    """One rank of the job."""
    import logging

    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not native:
        import moc_ckpt  # noqa: F401

    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    deepspeed.init_distributed("nccl")
    from distributed import harness

    ctx = Context()
    results = {}
    for name, row in cases(ctx.world).items():
        if (only and name not in only) or (native and name.startswith((PREFIX, ASYNC_PREFIX, NATIVE_PREFIX))):
            continue
        began = time.monotonic()
        path = ctx.gather(tempfile.mkdtemp(prefix="moc_gpu_") if ctx.rank == 0 else None)[0]
        try:
            mine: dict[str, Any]
            if name.startswith(PREFIX):
                mine = partial(ctx, row, path)
            elif name.startswith(NATIVE_PREFIX):
                mine = both_formats(ctx, row, path)
            elif name.startswith(ASYNC_PREFIX):
                mine = beside_training(ctx, row, path)
            else:
                mine = exact(ctx, row, path, native=native)
        except Exception:
            mine = {"wrong": {"error": traceback.format_exc()}}
        with contextlib.suppress(Exception):
            harness.reset()
        everyone = ctx.gather(mine)
        if ctx.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            wrong = {str(rank): result["wrong"] for rank, result in enumerate(everyone) if result["wrong"]}
            results[name] = {**mine, "wrong": wrong, "ok": not wrong, "seconds": round(time.monotonic() - began, 1)}
            print(f"{'ok  ' if not wrong else 'FAIL'} {name} {results[name]['seconds']} s", flush=True)
            # Written after every case: a crash or a deadline loses only the case it hits.
            report = {
                "gpus": ctx.world,
                "device": torch.cuda.get_device_name(0),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "python": sys.version.split()[0],
                "native": native,
                "cases": results,
            }
            Path(out).write_text(json.dumps(report, indent=1))
    ctx.gather(None)
    sys.stdout.flush()
    os._exit(0)


# --------------------------------------------------------------------------------------------- launcher


def launch(gpus: int, only: list[str], out: str, *, native: bool = False, timeout: float = 540.0) -> int:
    """Start one process per GPU; the exit status of the first that failed, or 0."""
    from distributed.pool import free_port

    env = dict(os.environ)
    env.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        WORLD_SIZE=str(gpus),
        LOCAL_WORLD_SIZE=str(gpus),
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        NCCL_NVLS_ENABLE="0",
        TORCH_EXTENSIONS_DIR=env.get("TORCH_EXTENSIONS_DIR") or tempfile.mkdtemp(prefix="moc_gpu_ext_"),
    )
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--json", out]
    command += ["--native"] if native else []
    command += ["--only", *only] if only else []
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True)
        for rank in range(gpus)
    ]
    end = time.monotonic() + timeout
    status = 0
    try:
        while any(process.poll() is None for process in processes):
            status = next((p.returncode for p in processes if p.returncode), 0)
            if status or time.monotonic() > end:
                return status or 124
            time.sleep(0.5)
        return next((p.returncode for p in processes if p.returncode), 0)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def main() -> int:
    """Entry point of launcher and worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="gpu.json", help="where the report goes")
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs; default all")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--native", action="store_true", help="DeepSpeed's own checkpoints instead of the plugin")
    parser.add_argument("--timeout", type=float, default=540.0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.only, args.json, args.native)
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    out = str(Path(args.json).resolve())
    Path(out).unlink(missing_ok=True)
    status = launch(args.gpus or torch.cuda.device_count(), args.only, out, native=args.native, timeout=args.timeout)
    report = json.loads(Path(out).read_text()) if Path(out).exists() else {"cases": {}}
    failed = [name for name, case in report["cases"].items() if not case["ok"]]
    print(f"{len(report['cases'])} cases, {len(failed)} failed {failed}, exit status {status}")
    return 1 if failed or status or not report["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())
