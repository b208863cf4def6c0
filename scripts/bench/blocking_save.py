#!/usr/bin/env python3
"""Blocking save and load against DeepSpeed's own, on the same engine, in one run.

    python scripts/bench/blocking_save.py --ranks 2 --parameters 60e6

Arms are interleaved; medians over --repeats. DeepSpeed does not sync what it writes, so its save is
timed as it is and once more together with a sync of the file system; ours is durable when it returns.
Loads are timed from a cold page cache and again warm, after one that is not timed: it brings the files of both
arms into whatever caches lie below the page cache (a hypervisor's, a disk's).
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
from pathlib import Path

HIDDEN = 512
EXPERTS = 8


def main() -> int:
    """Parses arguments; starts the ranks, or runs as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parameters", type=float, default=60e6, help="parameters of the model (default 60e6)")
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return worker(arguments)
    root = Path(tempfile.mkdtemp(prefix="moc_bench_", dir=arguments.dir))
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "MOC_BENCH_DIR": str(root)}
    if not shutil.which("nvidia-smi"):
        env.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    try:
        result = subprocess.run([*command, __file__, *sys.argv[1:]], env=env, stdout=subprocess.PIPE, check=False)
        report_file = root / "report.json"
        if result.returncode or not report_file.exists():
            return result.returncode or 1
        report = json.loads(report_file.read_text())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def worker(arguments: argparse.Namespace) -> int:
    """One rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    import moc_ckpt  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine = build(arguments)
    rank, root = dist.get_rank(), Path(os.environ["MOC_BENCH_DIR"])
    native_save = type(engine).save_checkpoint.__wrapped__
    native_load = type(engine).load_checkpoint.__wrapped__

    def timed(work, cold: Path | None = None, after=None) -> float:
        if cold is not None:
            drop_cache(cold, rank)
        dist.barrier()
        begin = time.perf_counter()
        work()
        if after is not None:
            after()
        dist.barrier()
        return time.perf_counter() - begin

    arms: dict[str, list[float]] = {}

    def record(name: str, seconds: float) -> None:
        arms.setdefault(name, []).append(seconds)

    sizes = {}
    for repeat in range(arguments.repeats + 1):
        native, ours = root / f"native{repeat}", root / f"ours{repeat}"
        order = ("native", "native_synced", "ours") if repeat % 2 else ("ours", "native_synced", "native")
        found = {}
        for arm in order:
            os.sync()
            if arm == "ours":
                found[arm] = timed(lambda ours=ours: engine.save_checkpoint(str(ours)))
            else:
                target = native if arm == "native" else root / f"synced{repeat}"
                after = os.sync if arm == "native_synced" else None
                found[arm] = timed(lambda target=target: native_save(engine, str(target)), after=after)
        loads = {}
        for arm, target in (("native", native), ("ours", ours)):
            load = (lambda d: native_load(engine, d)) if arm == "native" else engine.load_checkpoint
            load(str(target))
            loads[f"{arm}_cold"] = timed(lambda load=load, target=target: load(str(target)), cold=target)
            loads[f"{arm}_warm"] = timed(lambda load=load, target=target: load(str(target)))
        if rank == 0:
            sizes = {"native_bytes": tree_bytes(native), "ours_bytes": tree_bytes(ours)}
        dist.barrier()
        if rank == 0:
            for folder in (native, ours, root / f"synced{repeat}"):
                shutil.rmtree(folder)
        # The first round warms up: staging buffers, lazily built state, the allocator.
        if repeat:
            for name, seconds in {**found, **{f"load_{k}": v for k, v in loads.items()}}.items():
                record(name, seconds)
    if rank == 0:
        parameters = sum(p.numel() for p in engine.module.parameters() if getattr(p, "allreduce", True))
        experts = sum(p.numel() for p in engine.module.parameters() if not getattr(p, "allreduce", True))
        total = parameters + experts * arguments.ranks
        medians = {name: statistics.median(values) for name, values in arms.items()}
        report = {
            "ranks": arguments.ranks,
            "stage": arguments.stage,
            "parameters": total,
            "repeats": arguments.repeats,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
            **sizes,
            "native_bytes_per_parameter": sizes["native_bytes"] / total,
            "ours_bytes_per_parameter": sizes["ours_bytes"] / total,
            "median_s": medians,
            "ratio": {
                "save": medians["ours"] / medians["native"],
                "save_to_native_synced": medians["ours"] / medians["native_synced"],
                "load_cold": medians["load_ours_cold"] / medians["load_native_cold"],
                "load_warm": medians["load_ours_warm"] / medians["load_native_warm"],
            },
        }
        (root / "report.json").write_text(json.dumps(report))
    dist.barrier()
    return 0


def build(arguments: argparse.Namespace):
    """Builds an engine over a stack of MoE layers of about the wanted size, and takes a step."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    deepspeed.init_distributed(get_accelerator().communication_backend_name())
    world = dist.get_world_size()
    per_expert = 8 * HIDDEN * HIDDEN
    layers = max(1, round(arguments.parameters / (per_expert * EXPERTS + 4 * HIDDEN * HIDDEN)))

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Sequential(torch.nn.Linear(HIDDEN, 2 * HIDDEN), torch.nn.Linear(2 * HIDDEN, HIDDEN))
            expert = torch.nn.Sequential(torch.nn.Linear(HIDDEN, 4 * HIDDEN), torch.nn.Linear(4 * HIDDEN, HIDDEN))
            self.moe = MoE(HIDDEN, expert, num_experts=EXPERTS, ep_size=world, k=1)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.moe(self.dense(hidden))[0]

    model = torch.nn.Sequential(*[Block() for _ in range(layers)])
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "params"}
    )
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": arguments.stage},
        "moc_checkpoint": {"enabled": True, "storage": {"keep_last": 0}},
    }
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
    data = torch.randn(8, HIDDEN, dtype=torch.bfloat16, device=engine.device)
    engine.backward(engine(data).float().pow(2).mean())
    engine.step()
    return engine


def drop_cache(folder: Path, rank: int) -> None:
    """Asks the kernel to forget the files' pages."""
    if rank == 0:
        os.sync()
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(report: dict) -> str:
    """The report for a person."""
    s = report["median_s"]
    rows = [
        f"{report['parameters'] / 1e6:.1f} M parameters, {report['ranks']} ranks, ZeRO-{report['stage']}, "
        f"{report['device']}, torch {report['versions']['torch']}, deepspeed {report['versions']['deepspeed']}, "
        f"medians of {report['repeats']}",
        f"{'':14}{'DeepSpeed':>12}{'moc_ckpt':>12}{'ratio':>9}",
        f"{'save':14}{s['native']:>10.2f} s{s['ours']:>10.2f} s{report['ratio']['save']:>9.2f}",
        f"{'save, synced':14}{s['native_synced']:>10.2f} s{s['ours']:>10.2f} s"
        f"{report['ratio']['save_to_native_synced']:>9.2f}",
    ]
    for kind in ("cold", "warm"):
        native, ours = s[f"load_native_{kind}"], s[f"load_ours_{kind}"]
        rows.append(f"{'load, ' + kind:14}{native:>10.2f} s{ours:>10.2f} s{ours / native:>9.2f}")
    rows.append(
        f"{'bytes/param':14}{report['native_bytes_per_parameter']:>12.3f}{report['ours_bytes_per_parameter']:>12.3f}"
        f"{report['ours_bytes'] / report['native_bytes']:>9.2f}"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
