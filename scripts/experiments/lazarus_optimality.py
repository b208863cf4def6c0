#!/usr/bin/env python3
"""Compares `mro` and `mro_paper` with all placements of small cases, by enumeration.

    python scripts/experiments/lazarus_optimality.py                    # N <= 5, c <= 3, E <= 5: minutes
    python scripts/experiments/lazarus_optimality.py --publish          # and write the tables of docs/
    python scripts/experiments/lazarus_optimality.py --nodes 6 --slots 2 --experts 7

For every allocation (vacant slots allowed) all placements are looked at. `mro` must be the best at every number of
failed nodes; where no placement is, it must be dominated by none. Exit status 1 if not, or if the bound is exceeded.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import comb
from pathlib import Path

from _placement_oracle import allocations, cases, survivals

from moc_ckpt.lazarus.allocation import allocate
from moc_ckpt.lazarus.placement import PLACEMENTS, mro, mro_paper
from moc_ckpt.lazarus.probability import count_recoverable, probabilities, recoverable_bound

TARGET = Path(__file__).resolve().parents[2] / "docs" / "lazarus-placement.md"
# GPT-S, M and L of the paper on its 10 nodes of 6 slots, and a larger cluster. One expert has four times the mean load.
TABLES = ((8, 10, 6), (12, 10, 6), (16, 10, 6), (64, 32, 10))


def main() -> int:
    """Enumerates, prints, and writes the tables if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=5, help="N at most (default 5)")
    parser.add_argument("--slots", type=int, default=3, help="c at most (default 3)")
    parser.add_argument("--experts", type=int, default=5, help="E at most (default 5)")
    parser.add_argument("--publish", action="store_true", help="write the tables into docs/lazarus-placement.md")
    args = parser.parse_args()
    begin = time.monotonic()
    count = without_best = tight = 0
    wrong: list[str] = []
    worse: list[tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
    for nodes, slots, experts in cases(args.nodes, args.slots, args.experts):
        for replicas in allocations(nodes, slots, experts):
            count += 1
            found = survivals(replicas, nodes, slots)
            peak = tuple(map(max, zip(*found, strict=True)))
            without_best += peak not in found
            ours = count_recoverable(mro(replicas, nodes, slots))
            bound = recoverable_bound(replicas, nodes, slots)
            dominated = any(other != ours and all(a >= b for a, b in zip(other, ours, strict=True)) for other in found)
            if dominated or (peak in found and ours != peak):
                wrong.append(f"N = {nodes}, c = {slots}, r = {replicas}: {ours}, of {peak}")
            if any(most > limit for most, limit in zip(peak, bound, strict=True)):
                wrong.append(f"N = {nodes}, c = {slots}, r = {replicas}: bound {bound}, reached {peak}")
            tight += bound == peak
            published = count_recoverable(mro_paper(replicas, nodes, slots))
            if published != ours:
                worse.append((nodes, slots, replicas, published, ours))
    full = sum(sum(replicas) == nodes * slots for nodes, slots, replicas, _, _ in worse)
    lines = [
        f"{count} allocations (N <= {args.nodes}, c <= {args.slots}, E <= {args.experts}); in {without_best} of them "
        f"no placement is the best at every number of failed nodes.",
        f"`mro` is not optimal in {len(wrong)}; `mro_paper` is worse than `mro` in {len(worse)} "
        f"({full} of them with all slots in use).",
        f"The upper bound is reached at every number of failed nodes in {tight}.",
    ]
    print("\n".join([*lines, *wrong, f"{time.monotonic() - begin:.0f} s"]))
    if args.publish:
        text = TARGET.read_text(encoding="utf-8")
        text = replace(text, "optimality", lines)
        text = replace(text, "counterexamples", counterexamples(worse))
        text = replace(text, "survival", survival_table())
        TARGET.write_text(text, encoding="utf-8")
    return bool(wrong)


def counterexamples(worse: list[tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """Returns the table of the cases where the published construction is not optimal."""
    rows = ["| N | c | replicas | slots vacant | failed nodes | mro_paper | mro |", "|---|---|---|---|---|---|---|"]
    for nodes, slots, replicas, published, ours in worse:
        differ = [k for k in range(nodes + 1) if published[k] != ours[k]]
        vacant = nodes * slots - sum(replicas)
        cells = [", ".join(f"{counts[k]}/{comb(nodes, k)}" for k in differ) for counts in (published, ours)]
        numbers, failed = (", ".join(map(str, items)) for items in (replicas, differ))
        rows.append(f"| {nodes} | {slots} | {numbers} | {vacant or ''} | {failed} | {cells[0]} | {cells[1]} |")
    return rows


def survival_table() -> list[str]:
    """Returns the chances of the placements on examples."""
    rows = []
    for experts, nodes, slots in TABLES:
        loads = [4 * (experts - 1), *[experts - 4] * (experts - 1)]
        replicas = allocate(loads, nodes, slots, 2).replicas
        values = {
            name: probabilities(count_recoverable(place(replicas, nodes, slots))) for name, place in PLACEMENTS.items()
        }
        values["upper bound"] = probabilities(recoverable_bound(replicas, nodes, slots))
        last = next(k for k in range(nodes + 1) if values["mro"][k] < 5e-4)
        shown = range(1, last + 1) if last < 10 else range(1, last + 1, 2)
        rows += [
            f"{experts} experts, {nodes} nodes of {slots} slots: {max(replicas)} replicas of the popular expert, "
            f"{min(replicas)} to {sorted(replicas)[-2]} of the others.",
            "",
            f"| failed nodes | {' | '.join(map(str, shown))} |",
            f"|---|{'---|' * len(shown)}",
            *(f"| {name} | {' | '.join(f'{chances[k]:.3f}' for k in shown)} |" for name, chances in values.items()),
            "",
        ]
    return rows[:-1]


def replace(text: str, name: str, rows: list[str]) -> str:
    """Puts lines between the markers of this name."""
    begin, end = f"<!-- {name}: generated by scripts/experiments/lazarus_optimality.py -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{TARGET} lacks the markers of {name}")
    return "\n".join([head + begin, *rows, end]) + tail


if __name__ == "__main__":
    sys.exit(main())
