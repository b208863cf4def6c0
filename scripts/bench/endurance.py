#!/usr/bin/env python3
"""Does anything grow over a thousand checkpoints? Memory, descriptors and threads of trainers and agent.

    python scripts/bench/endurance.py                      # 1,000 checkpoints, 2 ranks: a few minutes on two cores
    python scripts/bench/endurance.py --checkpoints 200 --json

Trains a small MoE model with a snapshot and a persist at every step (`on_busy` wait, so none is left out) and looks at
/proc every `--every` checkpoints. The first fifth is warm-up; growth is what comes after it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _stall import process
from _stall.agents import agents_of, end_job

NAMES = ("rss_bytes", "descriptors", "threads")


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", type=int, default=1000, help="default 1000")
    add("--every", type=int, default=50, help="checkpoints between two looks (default 50)")
    add("--ranks", type=int, default=2)
    add("--k", type=int, default=1, help="experts per layer and checkpoint (default 1)")
    add("--hidden", type=int, default=32)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=8)
    add("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    return parser


def main() -> int:
    """Starts the ranks, or runs as one of them."""
    arguments = build_parser().parse_args()
    if "RANK" in os.environ:
        return worker(arguments)
    root = Path(tempfile.mkdtemp(prefix="moc_endurance_"))
    job = f"endurance-{os.getpid()}"
    folder = Path(os.environ.get("MOC_SHM_DIR") or "/dev/shm") / f"moc_ckpt-{os.getuid()}" / job
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MOC_JOB_ID": job, "MOC_BENCH_DIR": str(root)}
    if not shutil.which("nvidia-smi"):
        env.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    try:
        status = subprocess.run([*command, __file__, *sys.argv[1:]], env=env, stdout=sys.stderr, check=False).returncode
        file = root / "report.json"
        if status or not file.exists():
            return status or 1
        report = json.loads(file.read_text())
    finally:
        end_job(folder)
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(report) if arguments.json else text(report))
    return 0


def worker(arguments: argparse.Namespace) -> int:
    """One rank."""
    import torch.distributed as dist
    from _stall.training import Training

    from moc_ckpt.config import parse_config
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint
    from moc_ckpt.snapshot.places import job_dir

    root = Path(os.environ["MOC_BENCH_DIR"])
    shape = {"model": "blocks", "ep": arguments.ranks, "expert_interval": 1, "top_k": 1, "gas": 1, "stage": 2}
    sizes = {"micro_batch": 1, "seq": 16, "dtype": "bf16"}
    training = Training(argparse.Namespace(**vars(arguments), **shape, **sizes))
    section = {
        "enabled": True,
        "snapshot_interval": 1,
        "persist_interval": 1,
        "k_snapshot": arguments.k,
        "dynamic_k": False,
        "save_dir": str(root / "checkpoints"),
        "host": {"on_busy": "wait", "linger_s": 5.0},
    }
    training.engine.moc = moc = MocCheckpoint(training.engine, parse_config(section))
    moc.register_state(dict)
    assert moc.pipeline is not None
    need, arena = moc.pipeline.host, moc.pipeline.host.arena
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for number in range(1, arguments.checkpoints + 1):
        training.step()
        if number % arguments.every == 0:
            moc.wait()
            rows.append({"checkpoints": number, "trainer": look([os.getpid()])})
            if dist.get_rank() == 0:
                rows[-1]["agent"] = look(sorted(agents_of(job_dir(need.job, create=False))))
                print(f"{number} checkpoints, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    moc.wait()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    if dist.get_rank() == 0:
        report = {
            "checkpoints": arguments.checkpoints,
            "committed": len(list((root / "checkpoints").glob("*/manifest.json"))),
            "skipped": moc.pipeline.tuner.skipped,
            "seconds": round(time.perf_counter() - begin, 1),
            "arena_bytes": arena.spec.reserved,
            "trainers": [growth([row["trainer"] for row in one]) for one in everyone],
            "agent": growth([row["agent"] for row in everyone[0]]),
            "rows": everyone[0],
        }
        (root / "report.json").write_text(json.dumps(report))
    dist.barrier()
    moc.close()
    training.engine.moc = None
    dist.destroy_process_group()
    return 0


def look(pids: list[int]) -> dict[str, int]:
    """Returns memory, descriptors and threads of processes together."""
    return {
        "rss_bytes": sum(map(process.resident_bytes, pids)),
        "descriptors": sum(map(process.descriptors, pids)),
        "threads": sum(map(process.threads, pids)),
    }


def growth(rows: list[dict[str, int]]) -> dict[str, Any]:
    """Returns what is there after the warm-up and at the end, and the most that there was after it."""
    later = rows[len(rows) // 5 :] or rows
    return {
        name: {"from": later[0][name], "to": later[-1][name], "most": max(r[name] for r in later)} for name in NAMES
    }


def text(report: dict[str, Any]) -> str:
    """Returns the report for people."""
    lines = [f"{report['checkpoints']} checkpoints in {report['seconds']} s, {report['skipped']} skipped"]
    for who, one in [*((f"trainer {i}", one) for i, one in enumerate(report["trainers"])), ("agent", report["agent"])]:
        rss = {key: value / 2**20 for key, value in one["rss_bytes"].items()}
        lines.append(
            f"{who:10} memory {rss['from']:.1f} -> {rss['to']:.1f} MiB (most {rss['most']:.1f}), "
            f"descriptors {one['descriptors']['from']} -> {one['descriptors']['to']}, "
            f"threads {one['threads']['from']} -> {one['threads']['to']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
