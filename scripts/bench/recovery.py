#!/usr/bin/env python3
"""How long a run is away after a crash: from memory, from storage, and beside a cold start of the same script.

Each round: a run trains with a snapshot at every step and is killed with SIGKILL on all ranks; then the same script
starts three times: `memory` restores what the killed run left on the node, `storage` restores the same checkpoint with
recovery.memory off and a cold page cache, `cold` loads nothing. All three build the same engine and arena, and end
after one step.

    python scripts/bench/recovery.py --ranks 2 --rounds 3 --out recovery.json
    python scripts/bench/recovery.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _ranks import rank_environments

_HERE = Path(__file__).resolve().parent
_ARMS = ("memory", "storage", "cold")
_BLOCK = 8 << 20
_TIMES = ("ready_s", "look_s", "flush_s", "load_s", "check_s", "read_s", "copy_s", "first_step_s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that the killed run trains")
    parser.add_argument("--arms", nargs="+", choices=_ARMS, default=list(_ARMS), help="what restarts do")
    parser.add_argument("--k", default="1", help="experts per layer and snapshot, or auto")
    parser.add_argument("--folder", default=None, help="where checkpoints go (default: a temporary directory)")
    parser.add_argument("--out", default=None, help="JSON file")
    parser.add_argument("--json", action="store_true", help="print the report as one object")
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds for one process")
    for name, default in {"hidden": 256, "layers": 2, "experts": 8, "ep": 1, "micro-batch": 2, "seq": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds = 1
    return arguments


# ---------------------------------------------------------------------------------------------- one rank


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank of one run; prints what it measured as JSON into its file."""
    begun = float(os.environ["MOC_BENCH_BEGUN"])
    sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1])]
    from _stall.training import Training

    arguments.model, arguments.gas, arguments.stage, arguments.top_k = "blocks", 1, 2, 1
    arguments.expert_interval = 1
    import torch

    arguments.dtype = "bf16"
    training = Training(arguments)

    from moc_ckpt.config import parse_config
    from moc_ckpt.integrations.deepspeed import load as loading
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint
    from moc_ckpt.integrations.deepspeed.predecessor import Predecessor

    spent: dict[str, float] = {}

    def timed(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - begin

        setattr(owner, name, wrapper)

    timed(Predecessor, "start", "look_s")
    timed(Predecessor, "finish", "flush_s")
    timed(loading, "split_plan", "check_s")
    timed(loading, "_stage", "read_s")
    timed(loading, "_apply", "copy_s")
    engine = training.engine
    config = {
        "enabled": True,
        "k_snapshot": arguments.k if arguments.k == "auto" else int(arguments.k),
        "snapshot_interval": 1,
        "persist_interval": 4,
        "save_dir": arguments.folder if arguments.arm != "cold" else f"{arguments.folder}-cold",
        "max_plt": 0.9,
        "dynamic_k": False,  # a few steps lose a large share of all tokens, and a larger K needs a larger arena
        "recovery": {"memory": arguments.arm != "storage"},
    }
    engine.moc = MocCheckpoint(engine, parse_config(config))
    engine.moc.register_state(dict)
    facts: dict[str, Any] = {"ready_s": time.time() - begun}
    if arguments.arm == "victim":
        for _ in range(arguments.steps):
            training.step()
        engine.moc.wait()
        training.step()
        engine.moc.pipeline.host.votes.idle(60)
        engine.moc.pipeline.host.stager.join()
        Path(os.environ["MOC_BENCH_FACTS"]).write_text(json.dumps({"step": engine.global_steps, **facts}))
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    if arguments.arm != "cold":
        begin = time.perf_counter()
        found: list[Any] = []
        report, original = engine.moc.report, engine.moc.report.recovered

        def recovered(what: Any, *args: Any, **kwargs: Any) -> None:
            found.append(what)
            original(what, *args, **kwargs)

        report.recovered = recovered
        engine.load_checkpoint(arguments.folder)
        training.synchronize()
        facts["load_s"] = time.perf_counter() - begin
        sources = found[0].memory.nbytes
        facts["memory_bytes"], facts["storage_bytes"] = sources.memory, sources.storage
        facts["packs"] = [pack.path for pack in found[0].manifest.packs]
        facts["own_bytes"] = sum(found[0].memory.nbytes) / arguments.ranks
        facts["step"] = engine.global_steps
    training.step()
    training.synchronize()
    facts["first_step_s"] = time.time() - begun
    if training.cuda:
        facts["bus_bytes_per_s"] = bus_rate(torch)
        facts["device"] = torch.cuda.get_device_name()
    Path(os.environ["MOC_BENCH_FACTS"]).write_text(json.dumps({**facts, **spent}))
    torch.distributed.barrier()
    os._exit(0)  # nothing more to save: the next run starts from the same checkpoint


def bus_rate(torch: Any) -> float:
    """Returns the bytes per second of a copy from pinned memory to this device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(source.nbytes / (time.perf_counter() - begin))
    return max(rates)


# ---------------------------------------------------------------------------------------------- all of them


def run(arguments: argparse.Namespace, arm: str, folder: Path) -> list[dict[str, Any]]:
    """Runs one arm on all ranks; returns what each measured."""
    options = [*sys.argv[1:], "--arm", arm, "--folder", str(folder)]
    processes, facts = [], []
    begun = time.time()
    for rank, env in enumerate(rank_environments(arguments.ranks)):
        facts.append(folder.parent / f"facts{rank}.json")
        facts[-1].unlink(missing_ok=True)
        env |= {
            "MOC_JOB_ID": f"moc-bench-recovery-{os.getpid()}{'-cold' if arm == 'cold' else ''}",
            "MOC_BENCH_BEGUN": repr(begun),
            "MOC_BENCH_FACTS": str(facts[-1]),
        }
        processes.append(subprocess.Popen([sys.executable, __file__, *options], env=env, stdout=sys.stderr))
    deadline = time.monotonic() + arguments.timeout
    for process in processes:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise SystemExit(f"{arm}: not done after {arguments.timeout:g} s") from None
    wanted = -signal.SIGKILL if arm == "victim" else 0
    if any(process.returncode != wanted for process in processes):
        raise SystemExit(f"{arm}: exit status {[process.returncode for process in processes]}")
    return [json.loads(path.read_text()) for path in facts]


def raw_read(paths: list[Path], threads: int) -> tuple[int, float]:
    """Reads files with O_DIRECT where the file system has it; returns bytes and seconds."""
    work = [(path, at) for path in paths for at in range(0, path.stat().st_size, _BLOCK)]
    lock, total = threading.Lock(), [0]

    def reader() -> None:
        import mmap

        buffer = mmap.mmap(-1, _BLOCK)
        while True:
            with lock:
                if not work:
                    return
                path, at = work.pop()
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                fd = os.open(path, os.O_RDONLY)
            try:
                count = os.preadv(fd, [buffer], at)
            finally:
                os.close(fd)
            with lock:
                total[0] += count

    begin = time.perf_counter()
    workers = [threading.Thread(target=reader) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return total[0], time.perf_counter() - begin


def forget_pages(folder: Path) -> None:
    """Drops a directory's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def clear_memory(arguments: argparse.Namespace) -> None:
    """Removes arenas and agents of this benchmark's jobs."""
    sys.path[:0] = [str(_HERE), str(_HERE.parents[1])]
    from _stall.runners import end_job

    from moc_ckpt.snapshot.places import job_dir

    for suffix in ("", "-cold"):
        end_job(job_dir(f"moc-bench-recovery-{os.getpid()}{suffix}", create=False))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds."""
    base = Path(arguments.folder or tempfile.mkdtemp(prefix="moc_recovery_"))
    base.mkdir(parents=True, exist_ok=True)
    rounds: list[dict[str, Any]] = []
    try:
        for number in range(arguments.rounds):
            folder = base / f"round{number}"
            victim = run(arguments, "victim", folder)
            one: dict[str, Any] = {"victim_step": victim[0]["step"]}
            for arm in arguments.arms:
                if arm == "storage":
                    forget_pages(folder)
                one[arm] = run(arguments, arm, folder)
                print(f"round {number}, {arm}: {summary(one[arm])}", file=sys.stderr, flush=True)
            if "storage" in one:
                packs = [
                    path for name in one["storage"][0]["packs"] for path in (folder / name).rglob("*") if path.is_file()
                ]
                forget_pages(folder)
                one["raw_bytes"], one["raw_s"] = raw_read(packs, 4 * arguments.ranks)
            rounds.append(one)
            shutil.rmtree(folder, ignore_errors=True)
            if arguments.out:
                Path(arguments.out).write_text(json.dumps(report(arguments, rounds), indent=1))
    finally:
        clear_memory(arguments)
        shutil.rmtree(base, ignore_errors=True)
    return report(arguments, rounds)


def summary(ranks: list[dict[str, Any]]) -> str:
    """Returns one line about a run."""
    found = {name: max(rank.get(name, 0.0) for rank in ranks) for name in _TIMES}
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.items() if seconds)


def report(arguments: argparse.Namespace, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over rounds, of the slowest rank of each."""

    def median(arm: str, name: str) -> float:
        return statistics.median(max(rank.get(name, 0.0) for rank in one[arm]) for one in rounds)

    first = rounds[0]
    found: dict[str, Any] = {"ranks": arguments.ranks, "rounds": len(rounds), "steps": {"victim": first["victim_step"]}}
    for arm in arguments.arms:
        found[arm] = {name: median(arm, name) for name in _TIMES}
        found[arm]["first_steps_s"] = [max(rank["first_step_s"] for rank in one[arm]) for one in rounds]
        found["device"] = first[arm][0].get("device", "cpu")
        if arm != "cold":
            found["steps"][arm] = first[arm][0]["step"]
            for place in ("memory", "storage"):
                found[arm][f"{place}_bytes"] = first[arm][0][f"{place}_bytes"]
    if "memory" in found and "cold" in found:
        pairs = zip(found["memory"]["first_steps_s"], found["cold"]["first_steps_s"], strict=True)
        found["restart_to_cold"] = statistics.median(memory / cold for memory, cold in pairs)
    if "memory" in found and "bus_bytes_per_s" in first["memory"][0]:
        own = max(rank["own_bytes"] for rank in first["memory"])
        found["bus_bytes_per_s"] = median("memory", "bus_bytes_per_s")
        found["copy_to_bus"] = own / found["memory"]["copy_s"] / found["bus_bytes_per_s"]
        found["load_to_bus"] = own / found["memory"]["load_s"] / found["bus_bytes_per_s"]
    if "storage" in found:
        raw = [one["raw_bytes"] / one["raw_s"] for one in rounds]
        found["raw_read_bytes_per_s"] = statistics.median(raw)
        for name, label in (("read_s", "read_to_raw"), ("load_s", "load_to_raw")):
            rates = [one["storage"][0]["storage_bytes"] / max(rank[name] for rank in one["storage"]) for one in rounds]
            found[label] = statistics.median(rate / pace for rate, pace in zip(rates, raw, strict=True))
    return found


def main() -> None:
    """Runs the benchmark, or one rank of it."""
    arguments = parse()
    if arguments.arm:
        rank_main(arguments)
        return
    found = measure(arguments)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1))
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
