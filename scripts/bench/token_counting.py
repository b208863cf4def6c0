#!/usr/bin/env python3
"""What counting tokens costs: step time with the gates' hooks and without, on the same engine, in one run.

    python scripts/bench/token_counting.py --ranks 1
    python scripts/bench/token_counting.py --ranks 2 --check-sync        # two GPUs, and: does the counter ever wait?

Every round trains one block of steps with the hooks (`counted`) and two without (`plain`, `again`), in random order.
A round's ratio is its median counted step over the mean of its two plain medians; shown are the median over rounds and
its 95 % bootstrap interval. `again` over `plain` says what the same code against itself gives: ratios that lie within
its interval are noise. Apart from that, the host time inside of the counter is measured directly.

Steps are timed with CUDA events on a GPU, else by wall clock; beside that stands the CPU time of the process, which
other programs on the machine disturb less. Rank 0 reports.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: Sizes where none are given: (GPU, CPU). The GPU's take about a minute on one H100.
SIZES = {
    "hidden": (1024, 128),
    "layers": (12, 4),
    "experts": (16, 8),
    "micro_batch": (8, 4),
    "seq": (1024, 128),
    "rounds": (12, 24),
    "block": (8, 8),
}
ARMS = ("plain", "counted", "again")


def main() -> int:
    """Parses arguments; starts the ranks, or runs as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    for name, (gpu, cpu) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {gpu} on a GPU, {cpu} on a CPU")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--gas", type=int, default=1, help="micro-batches per step (default 1)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first round (default 10)")
    parser.add_argument("--take-every", type=int, default=10, help="steps per take of the counts (default 10)")
    parser.add_argument(
        "--check-sync", action="store_true", help="also check, on a GPU, that the counter never waits for the device"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return worker(arguments)
    folder = Path(tempfile.mkdtemp(prefix="moc_bench_"))
    report_file = folder / "report.json"
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    env["MOC_BENCH_REPORT"] = str(report_file)
    if not shutil.which("nvidia-smi"):
        env.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    try:
        result = subprocess.run([*command, __file__, *sys.argv[1:]], env=env, stdout=subprocess.PIPE, check=False)
        if result.returncode or not report_file.exists():
            sys.stderr.write(result.stdout.decode(errors="replace")[-2000:])
            return result.returncode or 1
        report = json.loads(report_file.read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report) if arguments.json else table(report))
    return exit_status(report)


def exit_status(report: dict) -> int:
    """1 if the counter was found to wait for the device."""
    return int(not report.get("check_sync", {}).get("passed", True))


def worker(arguments: argparse.Namespace) -> int:
    """One rank."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from moc_ckpt.integrations.deepspeed.layouts import find_layers
    from moc_ckpt.integrations.deepspeed.token_counts import TokenCounter

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    for name, (gpu, cpu) in SIZES.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, gpu if cuda else cpu)
    arguments.dtype = arguments.dtype or ("bf16" if cuda else "fp32")
    if arguments.check_sync and not cuda:
        print("--check-sync needs a CUDA device: there is nothing to wait for on a CPU", file=sys.stderr)
        return 2
    engine = build(arguments)
    layers = find_layers(engine)[0]
    generator = torch.Generator(device=engine.device).manual_seed(dist.get_rank())
    shape = (arguments.micro_batch, arguments.seq, arguments.hidden)
    batch = torch.randn(shape, generator=generator, device=engine.device, dtype=next(engine.module.parameters()).dtype)

    def train(counter: TokenCounter | None) -> None:
        skipped = engine.skipped_steps
        for _ in range(arguments.gas):
            engine.backward(engine(batch))
            engine.step()
        if counter is not None:
            counter.step_done(engine.skipped_steps > skipped)
            if engine.global_steps % arguments.take_every == 0:
                counter.take()

    def block(arm: str) -> dict[str, float]:
        counter = TokenCounter(engine, layers) if arm == "counted" else None
        dist.barrier()
        busy = time.process_time()
        seconds = time_steps(lambda: train(counter), arguments.block, cuda)
        busy = time.process_time() - busy
        if counter is not None:
            counter.close()
        return {"step": statistics.median(seconds), "cpu": busy / arguments.block}

    for _ in range(arguments.warmup):
        train(None)
    for arm in ARMS:
        block(arm)
    order = random.Random(0)  # the same on every rank
    rounds = [{arm: block(arm) for arm in order.sample(ARMS, len(ARMS))} for _ in range(arguments.rounds)]
    inside = seconds_inside(TokenCounter, engine, layers, train, 2 * arguments.block)
    report = {
        "ranks": dist.get_world_size(),
        "stage": arguments.stage,
        "dtype": arguments.dtype,
        **{name: getattr(arguments, name) for name in SIZES},
        "top_k": arguments.top_k,
        "gas": arguments.gas,
        "take_every": arguments.take_every,
        "parameters": sum(
            p.numel() * (1 if getattr(p, "allreduce", True) else dist.get_world_size())
            for p in engine.module.parameters()
        ),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        **{clock: summary(rounds, clock) for clock in ("step", "cpu")},
        "inside_s_per_step": inside,
    }
    report["inside_share"] = inside / report["step"]["median_s"]["plain"]
    if arguments.check_sync:
        report["check_sync"] = check_sync(TokenCounter, engine, layers, batch, train)
    # No rank's counter may wait.
    verdicts: list = [None] * dist.get_world_size()
    dist.all_gather_object(verdicts, report.get("check_sync", {}).get("passed", True))
    if arguments.check_sync:
        report["check_sync"]["passed"] = all(verdicts)
    if dist.get_rank() == 0:
        if "MOC_BENCH_REPORT" in os.environ:
            Path(os.environ["MOC_BENCH_REPORT"]).write_text(json.dumps(report))
        else:
            print(json.dumps(report) if arguments.json else table(report), flush=True)
    dist.barrier()
    return 0 if "MOC_BENCH_REPORT" in os.environ else exit_status(report)


def build(arguments: argparse.Namespace):
    """Builds an engine over a stack of attention and MoE layers, without embeddings (a short step)."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(get_accelerator().communication_backend_name())
    hidden, heads = arguments.hidden, max(1, arguments.hidden // 64)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(hidden), torch.nn.LayerNorm(hidden)
            self.qkv, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden)
            expert = torch.nn.Sequential(
                torch.nn.Linear(hidden, 4 * hidden), torch.nn.GELU(), torch.nn.Linear(4 * hidden, hidden)
            )
            self.moe = MoE(
                hidden, expert, num_experts=arguments.experts, ep_size=dist.get_world_size(), k=arguments.top_k
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            size = x.shape
            q, k, v = (part.view(*size[:2], heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(size))
            y, aux, _ = self.moe(self.norm2(x))
            return x + y, aux

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(arguments.layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = 0.0
            for block in self.blocks:
                x, aux = block(x)
                total = total + aux
            return x.float().pow(2).mean() + 0.01 * total

    torch.manual_seed(0)
    with torch.device(get_accelerator().current_device_name()):
        model = Model()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "params"}
    )
    config = {
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "zero_optimization": {"stage": arguments.stage},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def time_steps(step, count: int, cuda: bool) -> list[float]:
    """Seconds of each of `count` steps; nothing waits between them on a GPU."""
    import torch

    if not cuda:
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def summary(rounds: list[dict[str, dict[str, float]]], clock: str) -> dict:
    """Medians in seconds per step and ratios of one clock."""
    times = [{arm: one[arm][clock] for arm in ARMS} for one in rounds]
    return {
        "median_s": {arm: statistics.median(one[arm] for one in times) for arm in ARMS},
        "ratio": interval([2 * one["counted"] / (one["plain"] + one["again"]) for one in times]),
        "ratio_of_noise": interval([one["again"] / one["plain"] for one in times]),
    }


def interval(values: list[float]) -> dict[str, float]:
    """The median and its 95 % bootstrap interval (2000 resamples, fixed seed)."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return {"median": statistics.median(values), "low": medians[49], "high": medians[1949]}


def with_every_method(counter_class: type, around) -> type:
    """A subclass whose methods and hooks all run inside of `around`."""

    def wrap(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            return around(lambda: method(self, *args, **kwargs))

        return run

    methods = {name: wrap(f) for name, f in vars(counter_class).items() if inspect.isfunction(f) and name != "__init__"}
    return type(counter_class.__name__, (counter_class,), methods)


def seconds_inside(counter_class: type, engine, layers, train, steps: int) -> float:
    """Host seconds per step in the counter's hooks and methods, measuring included; median of the steps."""
    inside, depth = [0.0], [0]

    def around(call):
        depth[0] += 1
        begin = time.perf_counter()
        try:
            return call()
        finally:
            depth[0] -= 1
            if not depth[0]:
                inside[0] += time.perf_counter() - begin

    counter = with_every_method(counter_class, around)(engine, layers)
    found = []
    for _ in range(steps):
        inside[0] = 0.0
        train(counter)
        found.append(inside[0])
    counter.close()
    return statistics.median(found)


def check_sync(counter_class: type, engine, layers, batch, train) -> dict:
    """Whether the counter ever waits for the device, found out in two ways.

    torch raises an error where code inside of the counter synchronises; and with half a second of work queued on
    the device, `step_done` and `take` return before it is done.
    """
    import torch

    calls = [0]

    def around(call):
        calls[0] += 1
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    result: dict = {"error": ""}
    counter = with_every_method(counter_class, around)(engine, layers)
    try:
        for _ in range(3):
            train(counter)
        counter.take()
    except RuntimeError as error:
        result["error"] = str(error)
    result["calls"] = calls[0]
    # The check itself is checked: reading a count on the host must be caught.
    try:
        around(lambda: counter.take().sum().item())
        result["catches_a_read"] = False
    except RuntimeError:
        result["catches_a_read"] = True
    counter.close()

    counter = counter_class(engine, layers)
    for _ in range(2):  # the second time nothing is allocated or loaded any more
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        torch.cuda.synchronize()
        torch.cuda._sleep(10**9)  # cycles
        queued = torch.cuda.Event()
        queued.record()
        begin = time.perf_counter()
        counter.step_done(False)
        counts = counter.take()
        result["returned_s"] = time.perf_counter() - begin
        result["returned_before_device"] = not queued.query()
        torch.cuda.synchronize()
        result["device_busy_s"] = time.perf_counter() - begin
    tokens = batch.shape[0] * batch.shape[1]
    expected = [tokens * engine.module.get_submodule(layer.prefix).deepspeed_moe.gate.k for layer in layers]
    result["counts_right"] = [layer.routed for layer in counter.layout.split(counts.tolist())] == expected
    counter.close()
    result["passed"] = not result["error"] and all(
        result[name] for name in ("catches_a_read", "returned_before_device", "counts_right")
    )
    return result


def table(report: dict) -> str:
    """The report for a person."""
    rows = [
        f"{report['parameters'] / 1e6:.1f} M parameters ({report['layers']} layers, hidden {report['hidden']}, "
        f"{report['experts']} experts, top-{report['top_k']}), micro-batch {report['micro_batch']} x {report['seq']}, "
        f"gas {report['gas']}, {report['dtype']}, ZeRO-{report['stage']}",
        f"{report['ranks']} ranks, {report['device']}, torch {report['versions']['torch']}, "
        f"deepspeed {report['versions']['deepspeed']}, {report['rounds']} rounds of 3 x {report['block']} steps",
    ]
    for clock, name in (("step", "step time"), ("cpu", "CPU time")):
        times = report[clock]["median_s"]
        rows.append(f"{name:22}{'median':>12}{'ratio':>10}   95 % interval")
        rows.append(f"{'  without hooks':22}{times['plain'] * 1e3:>9.2f} ms")
        for arm, label, key in (("again", "without hooks again", "ratio_of_noise"), ("counted", "with hooks", "ratio")):
            ratio = report[clock][key]
            rows.append(
                f"{'  ' + label:22}{times[arm] * 1e3:>9.2f} ms{ratio['median']:>10.4f}   "
                f"{ratio['low']:.4f} .. {ratio['high']:.4f}"
            )
    rows.append(
        f"{'time in the counter':22}{report['inside_s_per_step'] * 1e3:>9.3f} ms"
        f"{100 * report['inside_share']:>9.3f} % of a step"
    )
    if "check_sync" in report:
        check = report["check_sync"]
        rows.append(
            f"{'waits for the device':22}{'never' if check['passed'] else 'YES, or the check failed'}: "
            f"{check['calls']} guarded calls{', ' + check['error'] if check['error'] else ''}; returned after "
            f"{check['returned_s'] * 1e3:.2f} ms with {check['device_busy_s'] * 1e3:.0f} ms queued"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
