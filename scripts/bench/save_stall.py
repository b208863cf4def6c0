#!/usr/bin/env python3
"""What checkpointing costs a training: stalls, slower steps, bytes, processor time and memory, in one run.

    python scripts/bench/save_stall.py --ranks 2                         # every arm
    python scripts/bench/save_stall.py --ranks 2 --arms native dcp pec/1 pec/10+persist --raw-write
    python scripts/bench/save_stall.py --quick --json                    # a small model, three arms, one JSON object
    python scripts/bench/save_stall.py --from report.json --plot docs/benchmarks/save_stall.svg

Arms: `native` (DeepSpeed's save_checkpoint), `dcp` (torch DCP async_save with its asynchronous stager, every rank),
`full/N` and `pec/N` (moc_ckpt, a snapshot every N steps, of all experts or of K per layer; `+persist`: also written to
storage), `durable` (moc_ckpt, blocking); peers, if installed: lm_resiliency/N, nvrx, dlrover. See docs/benchmarks.

One engine serves all arms. Every block of steps with an arm stands beside one without any checkpointing, in random
order; before the next block everything that was begun is waited for. `calls` is the host time inside of the
checkpointing's code, `lost` all that the training loop lost by checkpoint: wall time above the block beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _stall import report as reports
from _stall.agents import end_job
from _stall.arms import Arm, ArmError, all_arms, parse_arm

#: Sizes where none are given: (GPU, CPU).
SIZES = {
    "hidden": (1024, 384),
    "layers": (12, 4),
    "micro_batch": (8, 4),
    "seq": (1024, 128),
    "warmup": (10, 4),
    "block": (20, 10),
    "pairs": (6, 6),
}
#: What --quick sets, unless given.
QUICK = {
    "arms": ["native", "dcp", "pec/5+persist"],
    "hidden": 256,
    "layers": 2,
    "micro_batch": 2,
    "pairs": 6,
    "budget": 20.0,
    "block": 10,
    "warmup": 2,
    "k": 1,
    "model": "blocks",
}
OURS_QUICK = "pec/5+persist"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes, one per GPU (default 2)")
    add("--arms", nargs="+", metavar="ARM", help="default: all but the peers")
    add("--quick", action="store_true", help="a small model and three arms, below a minute on two cores")
    add("--model", choices=("auto", "gpt", "blocks"), help="gpt: scripts/gpt_moe (needs megatron-core); default auto")
    for name, (gpu, cpu) in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, help=f"default: {gpu} on a GPU, {cpu} on a CPU")
    add("--experts", type=int, help="per MoE layer (default 8 on a CPU, 8 for each rank on GPUs)")
    add("--ep", type=int, help="expert-parallel size (default: the ranks)")
    add("--expert-interval", type=int, default=1, help="every n-th layer has experts (default 1)")
    add("--top-k", type=int, default=1)
    add("--gas", type=int, default=1, help="micro-batches per step (default 1)")
    add("--stage", type=int, default=2, choices=(1, 2))
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--k", type=_k, help="k_snapshot of pec (default auto)")
    add("--k-persist", type=_k, default="auto", help="k_persist of pec (default auto)")
    add("--persist-interval", type=int, default=10, help="steps between persists of +persist arms (default 10)")
    add("--explicit-pairs", type=int, help="pairs of arms that save explicitly (native, dcp, durable; default: pairs)")
    add("--rounds", type=int, default=1, help="how often all arms are gone through (default 1)")
    add("--budget", type=float, help="s of training; where it would take longer, fewer pairs are run")
    add("--settle", type=int, default=40, help="steps before the blocks in which `auto` decides (default 40)")
    add("--raw-write", action="store_true", help="also write the bytes of each persist plainly, O_DIRECT and fsync")
    add("--dir", type=Path, help="where checkpoints go (default: a temporary directory)")
    add("--json", action="store_true", help="print one JSON object, and everything else on stderr")
    add("--markdown", action="store_true", help="print the table for a document")
    add("--out", type=Path, help="also write the report as JSON")
    add("--plot", type=Path, help="also draw it (needs matplotlib)")
    add("--from", dest="source", type=Path, help="show, or plot, a report of before; nothing is run")
    add("--timeout", type=float, default=3600.0, help="s until a run is ended (default 3600)")
    return parser


def main() -> int:
    """Parses arguments; starts the ranks, or runs as one of them."""
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        arms = settle(arguments, gpu=bool(shutil.which("nvidia-smi")))
    except ArmError as error:
        parser.error(str(error))
    if "RANK" in os.environ:
        return worker(arguments, arms)
    if arguments.source:
        report = json.loads(arguments.source.read_text())
    else:
        found = launch(arguments)
        if isinstance(found, int):
            return found
        report = found
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        reports.plot(report, arguments.plot)
    if arguments.json:
        print(json.dumps({**quick_summary(report), "report": report} if arguments.quick else report))
    elif arguments.markdown:
        print(f"{reports.headline(report)}\n\n{reports.markdown(report)}")
    else:
        reports.table(report)
    return 0


def settle(arguments: argparse.Namespace, *, gpu: bool) -> list[Arm]:
    """Fills in what was not given; returns the arms.

    Raises:
        ArmError: if an argument cannot be.
    """
    if arguments.quick:
        for name, value in QUICK.items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
    for name, (on_gpu, on_cpu) in SIZES.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_gpu if gpu else on_cpu)
    arguments.model = arguments.model or "auto"
    arguments.k = arguments.k or "auto"
    arguments.ep = arguments.ep or arguments.ranks
    arguments.experts = arguments.experts or (8 * arguments.ranks if gpu else 8)
    arguments.dtype = arguments.dtype or ("bf16" if gpu else "fp32")
    arguments.explicit_pairs = arguments.explicit_pairs or arguments.pairs
    arms = [parse_arm(name) for name in arguments.arms] if arguments.arms else all_arms()
    if len(set(arms)) < len(arms):
        raise ArmError("an arm is named twice")
    for name in ("ranks", "pairs", "explicit_pairs", "rounds", "persist_interval", "block"):
        if getattr(arguments, name) < 1:
            raise ArmError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.experts % arguments.ep or arguments.ranks % arguments.ep:
        raise ArmError(f"--ep {arguments.ep} must divide --experts {arguments.experts} and --ranks {arguments.ranks}")
    reports.check_blocks(arms, arguments.block, arguments.persist_interval)
    return arms


def launch(arguments: argparse.Namespace) -> dict[str, Any] | int:
    """Starts the ranks, on this machine alone; returns their report, or an exit status."""
    root = Path(tempfile.mkdtemp(prefix="moc_stall_", dir=arguments.dir))
    report_file = root / "report.json"
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    env |= {"MOC_BENCH_REPORT": str(report_file), "MOC_BENCH_DIR": str(root), "MOC_BENCH_JOB": f"bench-{os.getpid()}"}
    if not shutil.which("nvidia-smi"):
        env.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    shared = Path(env.get("MOC_SHM_DIR") or "/dev/shm") / f"moc_ckpt-{os.getuid()}"
    # Ended from outside, it must still end the ranks and clean up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # The ranks' stdout goes to our stderr: stdout is for the report.
    ranks = subprocess.Popen([*command, __file__, *sys.argv[1:]], env=env, stdout=sys.stderr)
    try:
        try:
            status = ranks.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            print(f"ended after {arguments.timeout:.0f} s (--timeout)", file=sys.stderr)
            status = 1
        if not report_file.exists():
            return status or 1
        report = json.loads(report_file.read_text())
        if status:
            print("the run did not end well: the report has only the arms that were done", file=sys.stderr)
        return {**report, "complete": not status}
    finally:
        if ranks.poll() is None:
            ranks.terminate()  # it passes this on to the ranks
            try:
                ranks.wait(30)
            except subprocess.TimeoutExpired:
                ranks.kill()
        shutil.rmtree(root, ignore_errors=True)
        for folder in shared.glob(f"{env['MOC_BENCH_JOB']}-*"):  # what a failed run left behind
            end_job(folder)


def worker(arguments: argparse.Namespace, arms: list[Arm]) -> int:
    """One rank."""
    import torch.distributed as dist
    from _stall.run import Bench

    bench = Bench(arguments, arms, Path(os.environ["MOC_BENCH_DIR"]))
    for report in bench.run():  # after every arm: a run that is cut off, whatever ends it, has what was done
        for target in filter(None, (Path(os.environ["MOC_BENCH_REPORT"]), arguments.out)):
            new = target.with_name(target.name + ".new")
            new.write_text(json.dumps({**report, "complete": False}, indent=1) + "\n")
            new.replace(target)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def quick_summary(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the few numbers of --quick: the first of our arms against DeepSpeed's own save and DCP."""
    arms = report["arms"]
    ours = next(entry for name, entry in arms.items() if name.partition("/")[0] in ("full", "pec", "durable"))
    native, dcp = arms.get("native", {}), arms.get("dcp", {})
    return {
        "stall_ms": ours["calls_ms"],
        "native_stall_ms": native.get("calls_ms"),
        "dcp_stall_ms": dcp.get("calls_ms"),
        "stall_ratio_to_native": ours["calls_ms"] / native["calls_ms"] if native else None,
        "lost_ms": ours["lost_ms"],
        "native_lost_ms": native.get("lost_ms"),
        "dcp_lost_ms": dcp.get("lost_ms"),
        "step_ratio": ours["step_ratio"],
        "bytes": ours["bytes"],
        "native_bytes": native.get("bytes"),
    }


def _k(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isdigit() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError('must be a number of experts, at least 1, or "auto"')


if __name__ == "__main__":
    sys.exit(main())
