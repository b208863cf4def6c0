"""One rank of the benchmark: trains blocks of steps with every arm and without, and measures them."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from _stall import process
from _stall.agents import agents_of, job_folder
from _stall.arms import PEERS, Arm, ArmError, blocks
from _stall.numbers import Block, merge_ranks, summarise
from _stall.raw_write import raw_write
from _stall.report import FIRST_STEPS, period
from _stall.runners import Runner, make_runner
from _stall.training import Training

__all__ = ["Bench"]


class Bench:
    """Runs all arms on one engine.

    One engine serves them all: its state is most of a device's memory, and all arms then save the very same tensors.
    Every block of an arm stands beside a block without checkpointing, so a machine that slows down meets both.

    Args:
        arguments: of the program.
        arms: what to compare.
        root: directory for checkpoints, the same on all ranks.
    """

    def __init__(self, arguments: argparse.Namespace, arms: Sequence[Arm], root: Path) -> None:
        self._arguments, self._arms, self._root = arguments, arms, root
        self._training = Training(arguments)
        self._first_local = int(os.environ["LOCAL_RANK"]) == 0
        self._seen: dict[int, float] = {}
        self._blocks: list[Block] = []
        self._facts: dict[str, dict[str, Any]] = {}
        self._not_run: dict[str, str] = {}
        self._begin = time.perf_counter()

    def run(self) -> Iterator[dict[str, Any]]:
        """Yields the report after every arm, on rank 0 alone; all ranks must go on to the end."""
        arguments = self._arguments
        for _ in range(arguments.warmup):
            self._training.step()
        if arguments.budget:
            arguments.pairs = arguments.explicit_pairs = self._affordable_pairs()
        order = blocks(self._arms, arguments.pairs, arguments.rounds, explicit_pairs=arguments.explicit_pairs)
        for number, entry in enumerate(order):
            for arm, with_arms in entry:
                self._note(f"round {number + 1}/{len(order)}, {arm.name}")
                self._run_arm(arm, with_arms)
                report = self._report()
                if report is not None:
                    yield report

    def _report(self) -> dict[str, Any] | None:
        """Returns what is known so far on rank 0, None elsewhere; collective."""
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self._blocks, self._training.state_bytes, self._facts))
        if dist.get_rank():
            return None
        merged = merge_ranks([one[0] for one in ranks])
        facts = {name: merge_facts([one[2].get(name, {}) for one in ranks]) for name in self._facts}
        return {
            **self._description([one[1] for one in ranks]),
            "seconds": round(time.perf_counter() - self._begin, 1),
            "arms": summarise(merged, [arm.name for arm in self._arms if arm.name in facts], facts),
            "labels": {arm.name: arm.label() for arm in self._arms},
            "not_run": self._not_run,
        }

    def _affordable_pairs(self) -> int:
        """Returns how many pairs of blocks fit into the budget; equal on all ranks."""
        arguments = self._arguments
        dist.barrier()
        self._training.synchronize()
        begin = time.perf_counter()
        for _ in range(3):
            self._training.step()
        self._training.synchronize()
        steps = arguments.budget / max(1e-6, (time.perf_counter() - begin) / 3)
        # Beside its pairs an arm has steps for its first checkpoint and to get into phase.
        found = [int((steps / len(self._arms) / arguments.rounds - 20) / (2 * arguments.block))]
        dist.broadcast_object_list(found, src=0)
        return min(max(2, found[0]), arguments.pairs)

    def _description(self, state_bytes: list[int]) -> dict[str, Any]:
        import deepspeed
        import torch

        arguments, training = self._arguments, self._training
        names = ("layers", "hidden", "experts", "ep", "expert_interval", "top_k", "micro_batch", "seq", "gas")
        return {
            "device": torch.cuda.get_device_name() if training.cuda else f"CPU, {os.cpu_count()} cores",
            "ranks": dist.get_world_size(),
            "model": training.model,
            **{name: getattr(arguments, name) for name in names},
            "dtype": arguments.dtype,
            "stage": arguments.stage,
            "parameters": training.parameters,
            "state_bytes_per_rank": max(state_bytes),
            "k": arguments.k,
            "k_persist": arguments.k_persist,
            "persist_interval": arguments.persist_interval,
            "block": arguments.block,
            "pairs": arguments.pairs,
            "rounds": arguments.rounds,
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        }

    def _run_arm(self, arm: Arm, with_arms: Sequence[bool]) -> None:
        arguments = self._arguments
        try:
            runner = make_runner(arm, self._training, arguments, self._root)
            runner.start()
        except (ArmError, ImportError) as error:
            if arm.kind not in PEERS:
                raise
            self._not_run[arm.name] = str(error)
            return
        self._note(f"  {arm.name}: set up")
        self._align(arm)
        self._block(runner, True, FIRST_STEPS, first=True)
        self._note(f"  {arm.name}: first checkpoint done")
        for with_arm in with_arms:
            self._align(arm)
            self._block(runner, with_arm, arguments.block)
            if with_arm and arm.persist and arguments.raw_write:
                self._raw(runner)
        self._note(f"  {arm.name}: blocks done")
        runner.stop()
        self._facts[arm.name] = {**self._facts.get(arm.name, {}), **runner.facts()}

    def _align(self, arm: Arm) -> None:
        """Trains on until an automatic checkpoint would follow the next step: so none is left over at a block's end."""
        every = period(arm, self._arguments.persist_interval)
        while (self._training.engine.global_steps + 1) % every:
            self._training.step()

    def _block(self, runner: Runner, with_arm: bool, steps: int, *, first: bool = False) -> None:
        training, arm = self._training, runner.arm
        if with_arm:
            runner.resume()
        else:
            runner.park()
        runner.inside()
        dist.barrier()
        training.synchronize()
        self._others(arm)
        cpu = time.process_time()
        times, inside = [], []
        begin = time.perf_counter()
        for number in range(steps):
            times.append(training.timed_step())
            inside.append(runner.inside())
            if with_arm and runner.explicit and number == 0:
                inside[-1] += runner.save()
        training.synchronize()
        wall = time.perf_counter() - begin
        memory = process.resident_bytes(os.getpid())
        shared = process.shared_bytes(job_folder(arm)) if self._first_local else 0
        begin = time.perf_counter()
        if with_arm:
            runner.drain()
        drain = time.perf_counter() - begin
        cpu = time.process_time() - cpu
        cpu_others, rss_others = self._others(arm)
        calls = [sum(inside)] if runner.explicit else [sum(part) for part in _chunks(inside, arm.interval)]
        self._blocks.append(
            Block(
                arm=arm.name,
                with_arm=with_arm,
                steps=[seconds() for seconds in times],
                wall=wall,
                calls=calls if with_arm else [],
                drain=drain,
                cpu=cpu,
                cpu_others=cpu_others,
                rss=memory,
                rss_others=rss_others,
                shared=shared,
                first=first,
            )
        )
        runner.park()
        if with_arm:
            runner.clean()

    def _others(self, arm: Arm) -> tuple[float, int]:
        """Returns processor seconds of agents and helper processes since the last call, and their memory."""
        if not self._first_local:
            return 0.0, 0
        pids = process.descendants(os.getpid()) | agents_of(job_folder(arm))
        now = {pid: process.cpu_seconds(pid) for pid in pids}
        used = sum(max(0.0, seconds - self._seen.get(pid, 0.0)) for pid, seconds in now.items())
        self._seen = now
        return used, sum(process.resident_bytes(pid) for pid in pids)

    def _raw(self, runner: Runner) -> None:
        """Writes as much as the last persist did, plainly, while training goes on: the storage's own speed."""
        nbytes, seconds = runner.last_persist()
        if not nbytes:
            return
        result: list[float | None] = []
        target = self._root / f"raw_rank{dist.get_rank()}"
        thread = threading.Thread(target=lambda: result.append(raw_write(target, nbytes)))
        dist.barrier()
        thread.start()
        for _ in range(self._arguments.block):
            self._training.step()
        self._training.synchronize()
        thread.join()
        dist.barrier()
        fact = self._facts.setdefault(runner.arm.name, {})
        fact.setdefault("persists", []).append((nbytes, seconds, result[0]))

    def _note(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - self._begin:7.1f} s  {text}", file=sys.stderr, flush=True)


def _chunks(values: list[float], size: int) -> list[list[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def merge_facts(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns an arm's facts of the job; rank 0's, but sizes are sums and rates the slowest rank's.

    Args:
        ranks: facts of each rank; single persists are (bytes, seconds, seconds of the raw write or None).
    """
    fact = {**ranks[0]}
    for name in ("setup_s",):
        fact[name] = max(one.get(name, 0.0) for one in ranks)
    for name in ("snapshot_bytes", "persist_bytes"):
        if name in fact:
            fact[name] = sum(one[name] for one in ranks)
    if "snapshot_bytes" in fact:
        fact["bytes"] = fact["persist_bytes"] or fact["snapshot_bytes"]
        fact["copy_bytes_per_s"] = min(one["copy_bytes_per_s"] for one in ranks)
    rows = list(zip(*(one.get("persists", []) for one in ranks), strict=True))
    fact.pop("persists", None)
    if not rows:
        return fact
    # All bytes over the slowest rank.
    ours = [sum(n for n, _, _ in row) / max(s for _, s, _ in row) for row in rows]
    fact["persist_bytes_per_s"] = sorted(ours)[len(ours) // 2]
    if all(raw is not None for row in rows for _, _, raw in row):
        plain = [sum(n for n, _, _ in row) / max(raw for _, _, raw in row) for row in rows]
        ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
        fact["raw_bytes_per_s"] = sorted(plain)[len(plain) // 2]
        fact["persist_to_raw"] = ratios[len(ratios) // 2]
    else:
        fact["persist_to_raw"] = None
    return fact
