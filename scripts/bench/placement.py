#!/usr/bin/env python3
"""How long planning replicas takes on one core: allocation and placement; beside them the transfers and the counting.

    python scripts/bench/placement.py                       # 128 nodes (1,024 GPUs), 256 experts, 60 layers
    python scripts/bench/placement.py --nodes 32 --experts 64 --slots 10 --json

Layers have different loads: tokens ~ rank^-a with a from 0 to 1.2 and noise, experts in random order. Slots per node
are tried one after the other; 24 and 48 do not divide 256 experts: there the published construction may be improved.
Shown are wall time and CPU time of this process, the median over rounds; the first round warms up. Limits are for the
planning of all layers (--max-all) and of the slowest layer (--max-layer): exit status 1 if CPU time passes one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moc_ckpt.lazarus.allocation import allocate
from moc_ckpt.lazarus.evenness import even_out
from moc_ckpt.lazarus.migration import migrate
from moc_ckpt.lazarus.placement import closed_form_mro, mro
from moc_ckpt.lazarus.probability import count_recoverable


def main() -> int:
    """Measures, prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=128)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 24, 32, 48], help="of a node")
    parser.add_argument("--fault-threshold", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-layer", type=float, default=0.050, help="seconds (default 0.05)")
    parser.add_argument("--max-all", type=float, default=1.0, help="seconds for all layers (default 1)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = [measure(args, slots) for slots in args.slots]
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(f"{args.nodes} nodes, {args.experts} experts, {args.layers} layers; CPU ms (wall ms)")
        names = ("layer", "slowest", "all", "migrate", "count")
        titles = ("a layer", "slowest", "all layers", "transfers", "counting")
        print(f"{'slots':>5} {'irregular':>9} " + " ".join(f"{title:>16}" for title in titles))
        for item in results:
            cells = [f"{item[name]['cpu'] * 1e3:.1f} ({item[name]['wall'] * 1e3:.1f})" for name in names]
            print(f"{item['slots']:>5} {item['irregular']:>9} " + " ".join(f"{cell:>16}" for cell in cells))
    slow = [item for item in results if item["slowest"]["cpu"] > args.max_layer or item["all"]["cpu"] > args.max_all]
    for item in slow:
        print(f"{item['slots']} slots: too slow", file=sys.stderr)
    return bool(slow)


def measure(args: argparse.Namespace, slots: int) -> dict[str, Any]:
    """Plans all layers several times; returns seconds."""
    rng = np.random.default_rng(slots)
    loads = []
    for layer in range(args.layers):
        shape = np.arange(1, args.experts + 1) ** -(1.2 * layer / max(args.layers - 1, 1))
        loads.append(rng.permutation(shape * rng.uniform(0.8, 1.25, args.experts) * 1e6).astype(int).tolist())

    def plan(tokens: list[int]) -> Any:
        placed = mro(allocate(tokens, args.nodes, slots, args.fault_threshold).replicas, args.nodes, slots)
        return even_out(placed, tokens)

    rounds: list[list[tuple[float, float]]] = []
    plans: list[Any] = []
    for _ in range(args.rounds + 1):
        timed = [clock(lambda tokens=tokens: plan(tokens)) for tokens in loads]
        plans = [found for found, _, _ in timed]
        rounds.append([(cpu, wall) for _, cpu, wall in timed])
    rounds = rounds[1:]
    by_layer = [
        [statistics.median(times[layer][kind] for times in rounds) for kind in (0, 1)] for layer in range(args.layers)
    ]
    totals = [statistics.median(sum(layer[kind] for layer in times) for times in rounds) for kind in (0, 1)]
    other = [plan([tokens[-1], *tokens[:-1]]) for tokens in loads]
    _, *moving = clock(lambda: migrate(plans, other, failed=[3], joined=1, allow_checkpoint=True))
    _, *counting = clock(lambda: [count_recoverable(item) for item in plans])
    return {
        "slots": slots,
        "irregular": sum(closed_form_mro(item.replicas(), args.nodes, slots) is None for item in plans),
        "layer": {
            "cpu": statistics.median(cpu for cpu, _ in by_layer),
            "wall": statistics.median(w for _, w in by_layer),
        },
        "slowest": {"cpu": max(cpu for cpu, _ in by_layer), "wall": max(wall for _, wall in by_layer)},
        "all": {"cpu": totals[0], "wall": totals[1]},
        "migrate": {"cpu": moving[0], "wall": moving[1]},
        "count": {"cpu": counting[0], "wall": counting[1]},
    }


def clock(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Returns the result, CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    sys.exit(main())
