#!/usr/bin/env python3
"""Forward and backward of one MoE layer: DeepSpeed's without token dropping against LazarusMoE, on all GPUs of a node.

    python scripts/bench/moe_layer.py --json out.json
    python scripts/bench/moe_layer.py --quick                 # two gloo ranks, to see that it runs

Arms, in turns within one run; medians over --rounds of the slowest rank's time per iteration:

    balanced/deepspeed       all experts get alike many tokens
    balanced/lazarus         the same layout of experts as DeepSpeed's, E / ranks slots on a rank
    balanced/lazarus+slots   --slots on every rank, replicas spread evenly
    balanced/grouped         as balanced/lazarus, experts by grouped GEMM (balanced/loop: one by one)
    skewed/deepspeed         the busiest expert gets --skew times the tokens of the idlest, by real routing
    skewed/before            LazarusMoE as in balanced/lazarus+slots
    skewed/after             LazarusMoE, placed by the planner for these loads
    skewed/shares            the same placement, with tokens shared so that the ranks' loads are even
    skewed/after_mro         the same replicas and survival, before experts with equally many replicas change places

The gradients of replicas are not summed in the timed part: that is the engine's work, as it is with DeepSpeed's layer.
What it costs is timed apart (`replica_reduction_ms`, one all-reduce per expert that more than one rank has).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _ranks import rank_environments


def main() -> int:
    """Parses arguments; starts the ranks, or runs as one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: all GPUs, or 2")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="per rank")
    parser.add_argument(
        "--slots", type=int, help="per rank (default: those of DeepSpeed's layout and half as many more)"
    )
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--skew", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=6, help="per arm and round")
    parser.add_argument("--arms", nargs="+", help="names of arms, or what they begin with (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--timeout", type=float, default=280.0, help="seconds for everything")
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    if arguments.quick:
        small = {"hidden": 32, "ffn": 64, "tokens": 256, "rounds": 2, "iterations": 2}
        for name, value in small.items():
            setattr(arguments, name, value)
    if "RANK" in os.environ:
        return rank_main(arguments)
    return launch(arguments)


def launch(arguments: argparse.Namespace) -> int:
    """Starts the ranks and waits for them."""
    import torch

    gpus = 0 if arguments.quick else torch.cuda.device_count()
    extra = {} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:]]
    environments = rank_environments(arguments.ranks or gpus or 2)
    ranks = [subprocess.Popen(command, env={**env, **extra}) for env in environments]
    deadline = time.monotonic() + arguments.timeout
    try:
        while any(process.poll() is None for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.poll()]
            if failed or time.monotonic() > deadline:
                late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
                why = f"ranks {failed} failed" if failed else f"ranks {late} did not end in {arguments.timeout:g} s"
                print(why, file=sys.stderr)
                return 1
            time.sleep(0.1)
        return max(abs(process.returncode) for process in ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


def rank_main(arguments: argparse.Namespace) -> int:
    """One rank; rank 0 prints the report."""
    import logging

    import deepspeed
    import torch
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available() and not arguments.quick
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    began = time.perf_counter()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "dtype": "bfloat16" if cuda else "float32",
        **{name: value for name, value in vars(arguments).items() if name not in ("json", "quick", "timeout", "arms")},
        "ranks": torch.distributed.get_world_size(),
        "top": {},
    }
    for k in arguments.top_k:
        report["top"][str(k)] = Bench(arguments, k, rank, device).run()
        if cuda:
            torch.cuda.empty_cache()
    report["seconds"] = round(time.perf_counter() - began, 1)
    if rank == 0:
        text = json.dumps(report, indent=1)
        if arguments.json:
            arguments.json.write_text(text + "\n")
        print(text)
        print(table(report), file=sys.stderr)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


class Bench:
    """All arms for one k."""

    def __init__(self, arguments: argparse.Namespace, k: int, rank: int, device: Any) -> None:
        import _moe_skew as skew
        import torch
        import torch.distributed as dist

        from moc_ckpt.lazarus.layer import even_placement
        from moc_ckpt.lazarus.shares import even_shares

        self.arguments, self.k, self.rank, self.device = arguments, k, rank, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.world = dist.get_world_size()
        experts, own = arguments.experts, arguments.experts // self.world
        slots = arguments.slots or own + max(1, own // 2)
        self.batch = skew.tokens(arguments.tokens, arguments.hidden, rank, device, self.dtype).requires_grad_()
        self.grad = torch.randn_like(self.batch)
        self.gates, self.loads = {}, {}
        for name, ratio in (("balanced", 1.0), ("skewed", arguments.skew)):
            gate = skew.calibrated_gate(self.batch.detach(), experts, k, ratio, self.dtype)
            dist.broadcast(gate, 0)  # the first rank's, for all
            loads = torch.tensor(skew.expert_loads(self.batch.detach(), gate, k), device=device)
            dist.all_reduce(loads)
            self.gates[name], self.loads[name] = gate, loads.tolist()
        after = skew.replaced(self.loads["skewed"], self.world, slots)
        placements = {
            "lazarus": even_placement(experts, self.world, own),
            "slots": even_placement(experts, self.world, slots),
            "after": after,
            "after_mro": skew.replaced(self.loads["skewed"], self.world, slots, even=False),
        }
        # arm -> (layer, how its experts compute)
        arms = {
            "balanced/deepspeed": ("deepspeed", ""),
            "balanced/lazarus": ("lazarus", "auto"),
            "balanced/lazarus+slots": ("slots", "auto"),
            "balanced/loop": ("lazarus", "loop"),
            "balanced/grouped": ("lazarus", "grouped"),
            "skewed/deepspeed": ("deepspeed", ""),
            "skewed/before": ("slots", "auto"),
            "skewed/after": ("after", "auto"),
            "skewed/shares": ("after", "auto"),
            "skewed/after_mro": ("after_mro", "auto"),
        }
        self.shares = {"skewed/shares": even_shares(self.loads["skewed"], after)}
        chosen = arguments.arms or list(arms)
        self.arms = {name: arm for name, arm in arms.items() if any(name.startswith(begin) for begin in chosen)}
        wanted = {layer for layer, _ in self.arms.values()}
        self.placements = {name: placement for name, placement in placements.items() if name in wanted}
        self.layers = {name: self.lazarus(placement) for name, placement in self.placements.items()}
        if "deepspeed" in wanted:
            self.layers["deepspeed"] = self.deepspeed()
            # The same layout of the same experts, so that all arms must compute the same.
            source = self.layers.get("lazarus") or self.lazarus(placements["lazarus"])
            self.layers["deepspeed"].load_state_dict(source.state_dict())

    def expert(self) -> Any:
        """Returns an expert on the device."""
        from torch import nn

        hidden, ffn = self.arguments.hidden, self.arguments.ffn
        made = nn.Sequential(
            nn.Linear(hidden, ffn, device=self.device),
            nn.GELU(approximate="tanh"),
            nn.Linear(ffn, hidden, device=self.device),
        )
        return made.to(self.dtype)

    def lazarus(self, placement: Any) -> Any:
        """Returns a layer of ours."""
        from moc_ckpt.lazarus.layer import LazarusMoE

        made = LazarusMoE(
            self.arguments.hidden,
            self.expert,
            self.arguments.experts,
            k=self.k,
            top2_2nd_expert_sampling=False,
            placement=placement,
            seed=1,
        ).to(self.device, self.dtype)
        made.deepspeed_moe.experts.pack()
        return made

    def deepspeed(self) -> Any:
        """Returns a layer of DeepSpeed's."""
        from deepspeed.moe.layer import MoE

        made = MoE(
            self.arguments.hidden,
            self.expert(),
            self.arguments.experts,
            ep_size=self.world,
            k=self.k,
            drop_tokens=False,
            use_rts=False,
            min_capacity=0,
            top2_2nd_expert_sampling=False,
        )
        made.set_deepspeed_parallelism()
        return made.to(self.device, self.dtype)

    def use(self, arm: str) -> Any:
        """Returns the arm's layer, its gate and experts set."""
        import torch

        layer, compute = self.arms[arm]
        made = self.layers[layer]
        with torch.no_grad():
            made.deepspeed_moe.gate.wg.weight.copy_(self.gates[arm.split("/")[0]])
        if compute:
            made.deepspeed_moe.experts.compute = compute
            made.set_shares(self.shares.get(arm))
        return made

    def iterate(self, layer: Any) -> None:
        """One forward and backward pass."""
        import torch

        output, loss, _ = layer(self.batch)
        torch.autograd.backward([output, loss], [self.grad, torch.ones_like(loss)])
        layer.zero_grad(set_to_none=True)
        self.batch.grad = None

    def run(self) -> dict[str, Any]:
        """Measures everything."""
        import torch

        times: dict[str, list[float]] = {arm: [] for arm in self.arms}
        for arm in self.arms:
            layer = self.use(arm)
            for _ in range(2):
                self.iterate(layer)
        differences = self.differences()
        peak: dict[str, float] = {}
        order = list(self.arms)
        for number in range(self.arguments.rounds):
            for arm in order if number % 2 else reversed(order):
                layer = self.use(arm)
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times[arm].append(self.timed(lambda layer=layer: self.iterate(layer), self.arguments.iterations))
                if self.device.type == "cuda":
                    peak[arm] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        median = {arm: statistics.median(values) for arm, values in times.items()}
        return {
            "ms": {arm: round(1e3 * value, 3) for arm, value in median.items()},
            "ms_all": {arm: [round(1e3 * value, 3) for value in values] for arm, values in times.items()},
            "ratios": ratios(median),
            "differences": differences,
            "loads": self.loads,
            "placement": {name: placement.slots for name, placement in self.placements.items()},
            "largest_rank_load_over_mean": self.imbalance(),
            "breakdown_ms": {arm: self.breakdown(arm) for arm in self.arms if not arm.endswith("deepspeed")},
            "replica_reduction_ms": {name: self.reduction(name) for name in self.placements},
            "peak_gib_of_rank_0": peak,
        }

    def differences(self) -> dict[str, dict[str, float]]:
        """Returns how far each arm is from the first one with its gate, relative to the largest value; collective."""
        import torch
        import torch.distributed as dist

        first: dict[str, dict[str, Any]] = {}
        found = {}
        for arm in self.arms:
            layer = self.use(arm)
            output, loss, _ = layer(self.batch)
            torch.autograd.backward([output, loss], [self.grad, torch.ones_like(loss)])
            experts = layer.deepspeed_moe.experts.deepspeed_experts
            own = self.arguments.experts // self.world
            ids = getattr(layer, "expert_ids", range(self.rank * own, (self.rank + 1) * own))
            # The gradient of one small parameter of every expert, summed over its replicas.
            summed = torch.zeros(self.arguments.experts, self.arguments.hidden, device=self.device)
            for expert, module in zip(ids, experts, strict=True):
                summed[expert] = module[2].bias.grad.float()
            gate = layer.deepspeed_moe.gate.wg.weight.grad.float()
            for values in (summed, gate):
                dist.all_reduce(values)
            values = {"output": output, "input gradient": self.batch.grad, "experts": summed, "gate": gate}
            mine = {name: value.detach().float() for name, value in values.items()}
            layer.zero_grad(set_to_none=True)
            self.batch.grad = None
            base = first.setdefault(arm.split("/")[0], mine)
            spans = torch.stack([(mine[name] - base[name]).abs().max() / base[name].abs().max() for name in mine])
            dist.all_reduce(spans, dist.ReduceOp.MAX)
            found[arm] = {name: float(f"{value:.3g}") for name, value in zip(mine, spans.tolist(), strict=True)}
        return found

    def timed(self, work: Any, times: int) -> float:
        """Returns the seconds of one call, on the slowest rank; collective."""
        import torch
        import torch.distributed as dist

        dist.barrier()
        self.settle()
        begin = time.perf_counter()
        for _ in range(times):
            work()
        self.settle()
        taken = torch.tensor([(time.perf_counter() - begin) / times], device=self.device, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    def settle(self) -> None:
        """Waits until the device is idle."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def imbalance(self) -> dict[str, float]:
        """Returns how much more than the mean the busiest rank computes in each arm."""
        import _moe_skew as skew

        from moc_ckpt.lazarus.shares import slot_shares

        found = {}
        for arm, (layer, _) in self.arms.items():
            placement = self.placements.get(layer)
            if placement is not None:
                loads = skew.rank_loads(self.loads[arm.split("/")[0]], self.shares.get(arm) or slot_shares(placement))
                found[arm] = round(max(loads) * len(loads) / sum(loads), 4)
        return found

    def breakdown(self, arm: str, times: int = 5) -> dict[str, float]:
        """Returns the milliseconds of each phase, the mean over iterations on the rank where it is longest; collective.

        A phase that waits for other ranks holds their lateness as well.
        """
        import torch
        import torch.distributed as dist

        layer = self.use(arm)
        exchange = layer.deepspeed_moe.exchange
        marks: list[tuple[str, Any]] = []

        def mark(name: str) -> None:
            if self.device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks.append((name, event))
            else:
                marks.append((name, time.perf_counter()))

        exchange.mark = mark
        try:
            for _ in range(times):
                mark("")
                self.iterate(layer)
                mark("backward gate")
            self.settle()
        finally:
            exchange.mark = None
        total: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(marks):
            if name:
                span = before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
                total[name] = total.get(name, 0.0) + span / times
        values = torch.tensor(list(total.values()), device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return {name: round(value, 3) for name, value in zip(total, values.tolist(), strict=True)}

    def reduction(self, name: str) -> float:
        """Returns the milliseconds that summing the gradients of all replicas takes in this placement; collective."""
        import torch
        import torch.distributed as dist

        placement = self.placements[name]
        groups: dict[tuple[int, ...], Any] = {}
        size = sum(parameter.numel() for parameter in self.expert().parameters())
        work = []
        for expert in range(placement.num_experts):
            holders = placement.holders(expert)
            if len(holders) < 2:
                continue
            if holders not in groups:  # made by all ranks in the same order
                groups[holders] = dist.new_group(list(holders))
            if self.rank in holders:
                work.append((groups[holders], torch.zeros(size, device=self.device, dtype=self.dtype)))

        def reduce() -> None:
            for group, gradient in work:
                dist.all_reduce(gradient, group=group)

        reduce()
        return round(1e3 * self.timed(reduce, 3), 3)


def ratios(median: dict[str, float]) -> dict[str, float]:
    """Returns the throughputs that the project promises, as ratios; above 1 the first one is faster."""
    wanted = {
        "balanced: lazarus / deepspeed": ("balanced/lazarus", "balanced/deepspeed"),
        "balanced: lazarus+slots / deepspeed": ("balanced/lazarus+slots", "balanced/deepspeed"),
        "balanced: grouped / loop": ("balanced/grouped", "balanced/loop"),
        "lazarus: skewed before / balanced": ("skewed/before", "balanced/lazarus+slots"),
        "lazarus: skewed after / balanced": ("skewed/after", "balanced/lazarus+slots"),
        "lazarus: skewed shares / balanced": ("skewed/shares", "balanced/lazarus+slots"),
        "lazarus: skewed after_mro / balanced": ("skewed/after_mro", "balanced/lazarus+slots"),
        "deepspeed: skewed / balanced": ("skewed/deepspeed", "balanced/deepspeed"),
        "skewed: lazarus after / deepspeed": ("skewed/after", "skewed/deepspeed"),
        "skewed: lazarus shares / deepspeed": ("skewed/shares", "skewed/deepspeed"),
    }
    return {
        name: round(median[other] / median[one], 4)
        for name, (one, other) in wanted.items()
        if one in median and other in median
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    rows = [
        f"{report['ranks']} x {report['device']}, torch {report['torch']}, deepspeed {report['deepspeed']}, "
        f"hidden {report['hidden']}, ffn {report['ffn']}, {report['experts']} experts, "
        f"{report['tokens']} tokens per rank, {report['dtype']}, {report['seconds']} s"
    ]
    for k, found in report["top"].items():
        rows.append(f"top-{k}")
        rows += [f"  {arm:26}{value:>10.3f} ms" for arm, value in found["ms"].items()]
        rows += [f"  {name:42}{value:>8.4f}" for name, value in found["ratios"].items()]
        worst = max(value for arm in found["differences"].values() for value in arm.values())
        rows.append(f"  {'largest relative difference between arms':42}{worst:>8.2g}")
        for arm, phases in found["breakdown_ms"].items():
            rows.append(f"  {arm}: " + ", ".join(f"{name} {value:g}" for name, value in phases.items()))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
