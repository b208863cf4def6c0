"""The report as a table and as a plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _stall.arms import Arm, ArmError

__all__ = ["check_blocks", "headline", "period", "plot", "table"]

#: The first checkpoint of an arm is measured in a block of its own, of so many steps.
FIRST_STEPS = 2


def period(arm: Arm, persist_interval: int) -> int:
    """Returns after how many steps an arm's checkpoints repeat: blocks are whole multiples of it."""
    return math.lcm(max(1, arm.interval), persist_interval if arm.persist else 1)


def check_blocks(arms: Sequence[Arm], block: int, persist_interval: int) -> None:
    """Refuses blocks that do not hold whole cycles of an arm's checkpoints.

    Raises:
        ArmError: naming the arm.
    """
    for arm in arms:
        every = period(arm, persist_interval)
        if block % every or block < FIRST_STEPS:
            raise ArmError(f"--block {block} is no multiple of {every} steps, after which {arm.name} repeats")


def headline(report: dict[str, Any]) -> str:
    """Returns what was run, in one sentence."""
    return (
        f"{report['parameters'] / 1e6:.1f} M parameters ({report['model']}, {report['layers']} layers, hidden "
        f"{report['hidden']}, {report['experts']} experts, top-{report['top_k']}), {report['dtype']}, "
        f"ZeRO-{report['stage']}, EP {report['ep']}, {report['ranks']} ranks, {report['device']}; "
        f"{report['state_bytes_per_rank'] / 1e9:.2f} GB of optimizer state per rank; torch "
        f"{report['versions']['torch']}, deepspeed {report['versions']['deepspeed']}; {report['rounds']} x "
        f"{report['pairs']} pairs of blocks of {report['block']} steps per arm, {report['seconds']:.0f} s"
    )


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("K", lambda one: str(one.get("k", ""))),
    ("calls ms", lambda one: f"{one['calls_ms']:.2f}"),
    ("p99", lambda one: f"{one['calls_p99_ms']:.2f}"),
    ("lost ms", lambda one: f"{one['lost_ms']:.1f}"),
    ("quartiles", lambda one: f"{one['lost_low_ms']:.1f} to {one['lost_high_ms']:.1f}"),
    ("first ms", lambda one: f"{one['first_ms']:.0f}" if "first_ms" in one else ""),
    ("step", lambda one: f"{one['step_ratio']:.3f}"),
    ("p99 step", lambda one: f"{one['p99_ratio']:.3f}"),
    ("drain ms", lambda one: f"{one['drain_ms']:.0f}"),
    ("copied MB", lambda one: f"{one['snapshot_bytes'] / 1e6:.0f}" if one.get("snapshot_bytes") else ""),
    ("written MB", lambda one: f"{_written(one) / 1e6:.0f}" if _written(one) else ""),
    ("CPU s", lambda one: f"{one['cpu_s']:.2f} + {one['cpu_others_s']:.2f}"),
    ("memory MB", lambda one: f"{(one['rss_bytes'] + one['rss_others_bytes']) / 1e6:.0f}"),
    ("shared MB", lambda one: f"{one['shared_bytes'] / 1e6:.0f}" if one["shared_bytes"] else ""),
    ("of raw", lambda one: f"{one['persist_to_raw']:.2f}" if one.get("persist_to_raw") else ""),
)


def _written(entry: dict[str, Any]) -> int:
    return entry.get("persist_bytes", entry.get("bytes", 0))


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Returns the table's rows, the header first."""
    body = [[report["labels"][name], *(cell(entry) for _, cell in _COLUMNS)] for name, entry in report["arms"].items()]
    return [["", *(title for title, _ in _COLUMNS)], *body]


def markdown(report: dict[str, Any]) -> str:
    """Returns the table for a document."""
    header, *body = rows(report)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(report: dict[str, Any]) -> None:
    """Prints the report for a person."""
    from rich.console import Console
    from rich.table import Table

    header, *body = rows(report)
    shown = Table(title=headline(report), title_justify="left")
    for number, title in enumerate(header):
        shown.add_column(title, justify="right" if number else "left")
    for line in body:
        shown.add_row(*line)
    # In a pipe or file the whole table is wanted, however wide.
    console = Console(width=None if sys.stdout.isatty() else 230)
    console.print(shown)
    console.print(
        "calls: host time inside the checkpointing's code, by checkpoint; lost: all that the training loop lost by it, "
        "against the block beside; step, p99 step: ratios to steps without checkpointing; drain: background work left "
        "at a block's end; copied, written: bytes of one checkpoint, all ranks; CPU s: trainers above the block beside "
        "+ agents; of raw: persist bandwidth to a plain O_DIRECT write in the same run",
        soft_wrap=True,
    )
    for name, reason in report.get("not_run", {}).items():
        console.print(f"{name} was not run: {reason}", soft_wrap=True)


def plot(report: dict[str, Any], target: Path) -> None:
    """Draws stall by checkpoint and step time by arm.

    Args:
        report: of a run.
        target: the file; its ending chooses the format.

    Raises:
        SystemExit: if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib: pip install matplotlib ({error})") from error
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "moc_ckpt", "font.size": 9})
    from matplotlib import pyplot

    names = list(report["arms"])[::-1]
    labels = [report["labels"][name] for name in names]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.32 * len(names)), sharey=True)
    places = range(len(names))
    for offset, key, text, colour in (
        (0.2, "calls_ms", "inside calls", "#0072b2"),
        (-0.2, "lost_ms", "lost", "#d55e00"),
    ):
        values = [max(report["arms"][name][key], 1e-3) for name in names]
        left.barh([place + offset for place in places], values, height=0.38, color=colour, label=text)
    left.set_xscale("log")
    left.set_xlabel("ms per checkpoint (median; log scale)")
    left.set_yticks(list(places), labels)
    left.legend(loc="best", frameon=False)
    for key, text, marker in (("step_ratio", "median step", "o"), ("p99_ratio", "p99 step", "d")):
        right.plot([report["arms"][name][key] for name in names], list(places), marker, label=text)
    right.axvline(1.0, color="#888888", linewidth=0.8)
    right.set_xlabel("step time / without checkpointing")
    right.legend(loc="best", frameon=False)
    figure.suptitle(headline(report), fontsize=7, wrap=True)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)
