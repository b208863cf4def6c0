"""Replicated experts under an engine on GPUs: `python tests/gpu/run_lazarus.py [--json out.json] [--cpu 2]`.

One process per GPU, all in one NCCL job (or gloo processes), runs every case in turn: training against the reference in
double precision, replicas compared bit by bit, sharded against replicated state, checkpoints to and from DeepSpeed's
layer, and what a step costs beside DeepSpeed's. Exit status 1 if a case fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _path in (str(HERE.parent.parent), str(HERE.parent), str(HERE.parent.parent / "scripts" / "bench")):
    if _path not in sys.path:
        sys.path.insert(0, _path)

TWO = (((0, 1, 2), (2, 3, 4)), ((0, 1, 3, 4), (0, 2, 2, 4)))
TWO_OTHERS = (((0, 1, 2, 3), (0, 2, 4, 4)), ((0, 3, 4), (1, 2, 4)))
#: As many experts as DeepSpeed's layer can have over two ranks.
TWO_NATIVE = (((0, 1, 2), (0, 2, 3)), ((0, 1, 3, 3), (0, 1, 2, 3)))


class Context:
    """What a case gets."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def gather(self, obj: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, obj)
        return found


def spread(world: int, pattern: Any) -> Any:
    """A placement of two ranks, repeated over a world."""
    return tuple(tuple(layer[rank % 2] for rank in range(world)) for layer in pattern)


def cases(ctx: Context, top: str, cuda: bool) -> dict[str, Any]:
    """Runs everything; by case what it found, or the error."""
    from distributed import harness, oracle
    from distributed import test_lazarus_checkpoints as checkpoints
    from distributed import test_lazarus_engine as engines
    from distributed.lazarus_tools import Setting

    base = Setting(placements=spread(ctx.world, TWO))
    found: dict[str, Any] = {}

    def run(name: str, work: Any) -> None:
        try:
            found[name] = {"ok": True, **work()}
        except Exception:
            found[name] = {"ok": False, "error": traceback.format_exc()}
        harness.reset()
        # A rank that failed alone would leave the others waiting in the next case.
        if not all(ctx.gather(found[name]["ok"])):
            found[name]["ok"] = False

    def reference(setting: Setting, steps: int, off: float) -> dict[str, Any]:
        result = engines.case_reference(ctx, setting, steps)
        numbers = {key: value for key, value in result.items() if key.endswith("off") or key in ("fell", "clipped")}
        assert numbers.get("loss off", 0.0) < off, numbers
        assert numbers.get("first norm off", 0.0) < 0.02, numbers
        return numbers

    def same_bits(one: Setting, two: Setting) -> dict[str, Any]:
        results = []
        for setting in (one, two):
            results.append(engines.case_orders(ctx, setting, 6))
            harness.reset()
        assert results[0]["losses"] == results[1]["losses"]
        assert results[0]["norms"] == results[1]["norms"]
        assert engines._differences(results[0]["state"], results[1]["state"]) == []
        return {"norms": results[0]["norms"]}

    def there_and_back(name: str, one: Setting, two: Setting) -> dict[str, Any]:
        path, ref = f"{top}/{name}", f"{top}/{name}.pt"
        source = checkpoints.case_save(ctx, one, f"{path}/a", ref, harness.ON)
        harness.reset()
        for setting, read, written in ((two, "a", "b"), (one, "b", None)):
            again = None if written is None else f"{path}/{written}"
            result = checkpoints.case_load(ctx, setting, f"{path}/{read}", ref, again, harness.ON)
            assert result["wrong"] == [], result["wrong"][:5]
            harness.reset()
        assert result["losses"] == source["losses"]
        assert result["norms"] == source["norms"]
        assert oracle.global_differences(source["end"], result["end"]) == []
        return {"losses": source["losses"][-2:]}

    wide = base.with_(hidden=64, ffn=256, dtype="bf16", gas=2)
    run("fp32 replicated", lambda: reference(base, 20, 1e-3))
    run("fp32 sharded", lambda: reference(base.with_(state="sharded", gas=2, k=2), 20, 1e-3))
    run("bf16 replicated", lambda: reference(base.with_(dtype="bf16", gas=2), 20, 0.15))
    run("bf16 sharded = replicated", lambda: same_bits(wide, wide.with_(state="sharded")))
    if cuda:
        fused = wide.with_(fused=True)
        run("bf16 FusedAdam", lambda: reference(base.with_(dtype="bf16", fused=True), 20, 0.15))
        run("bf16 FusedAdam sharded = replicated", lambda: same_bits(fused, fused.with_(state="sharded")))
    checked = base.with_(dtype="bf16", gas=2, buffers=True)
    other = checked.with_(placements=spread(ctx.world, TWO_OTHERS), state="sharded")
    run("checkpoints between placements", lambda: there_and_back("between", checked, other))
    native = checked.with_(placements=None, ep=2, experts=4, fused=cuda)
    ours = native.with_(placements=spread(ctx.world, TWO_NATIVE), ep=0)
    run("checkpoints from DeepSpeed's layer and back", lambda: there_and_back("native", native, ours))
    run("time of a step", lambda: times(ctx, cuda))
    return found


def times(ctx: Context, cuda: bool) -> dict[str, Any]:
    """Milliseconds of a step, the slowest rank's median: 8 experts in 6 slots per rank against DeepSpeed's 4."""
    import torch
    from distributed import harness
    from distributed import lazarus_tools as tools
    from distributed.lazarus_tools import Setting

    size = {"hidden": 1024, "ffn": 4096} if cuda else {"hidden": 64, "ffn": 128}
    pair = (((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 6, 7)),) * 2
    lazarus = Setting(placements=spread(ctx.world, pair), experts=8, dtype="bf16", fused=cuda, **size)
    arms = {
        "deepspeed": lazarus.with_(placements=None, ep=2),
        "replicated": lazarus,
        "sharded": lazarus.with_(state="sharded"),
    }
    found: dict[str, Any] = {}
    for name, setting in arms.items():
        engine = tools.build(setting)
        tools.train(engine, 3)
        marks: dict[str, list[float]] = {"step": []}
        if engine.lazarus is not None:
            for part in ("reduce", "step"):
                _timed(engine.lazarus.replicas, part, marks.setdefault(f"experts' {part}", []), cuda)
        _timed(engine, "step", marks["step"], cuda)
        tools.train(engine, 12)
        slowest = ctx.gather({part: statistics.median(values) for part, values in marks.items()})
        found[name] = {part: round(max(rank[part] for rank in slowest), 3) for part in marks}
        found[name]["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None
        harness.reset()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


def _timed(owner: Any, name: str, into: list[float], cuda: bool) -> None:
    import torch

    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        into.append((time.perf_counter() - begin) * 1e3)
        return result

    setattr(owner, name, timed)


def work(arguments: argparse.Namespace) -> int:
    """One rank."""
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    rank, cuda = int(os.environ["RANK"]), not arguments.cpu
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import moc_ckpt  # noqa: F401

    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    found = cases(Context(rank, dist.get_world_size()), arguments.work, cuda)
    failed = [name for name, result in found.items() if not result["ok"]]
    if failed:
        print("".join(f"rank {rank}: {name}\n{found[name].get('error', '')}" for name in failed), file=sys.stderr)
    if rank == 0:
        device = torch.cuda.get_device_name() if cuda else "cpu"
        report = {"device": device, "ranks": dist.get_world_size(), "torch": torch.__version__, "cases": found}
        print(json.dumps(report, indent=1, default=str))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1, default=str))
    dist.barrier()
    dist.destroy_process_group()
    return 1 if failed else 0


def main() -> int:
    """Starts the ranks, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument("--cpu", type=int, metavar="RANKS", help="gloo processes instead of GPUs; an even number")
    parser.add_argument("--timeout", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments)
    from _ranks import rank_environments

    listed = ["nvidia-smi", "-L"]
    gpus = arguments.cpu or len(subprocess.run(listed, capture_output=True, check=True).stdout.splitlines())
    top = tempfile.mkdtemp(prefix="moc_lazarus_")
    extra = {"MOC_SHM_DIR": tempfile.mkdtemp(prefix="moc_l", dir="/dev/shm")}
    if arguments.cpu:
        extra |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, *sys.argv[1:], "--work", top]
    ranks = [
        subprocess.Popen(command, env={**environment, **extra}) for environment in rank_environments(gpus - gpus % 2)
    ]
    end = time.monotonic() + arguments.timeout
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() not in (None, 0) for rank in ranks):
                end = min(end, time.monotonic() + 30)
            time.sleep(0.2)
        late = [number for number, rank in enumerate(ranks) if rank.poll() is None]
        if late:
            print(f"ranks {late} did not end", file=sys.stderr)
        return 1 if late or any(rank.returncode for rank in ranks) else 0
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        shutil.rmtree(top, ignore_errors=True)
        shutil.rmtree(extra["MOC_SHM_DIR"], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
