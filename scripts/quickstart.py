#!/usr/bin/env python3
"""Show in a few minutes, on any machine, that a killed MoE training run resumes bit for bit.

Started by quickstart.sh. Trains the tiny preset of pretrain_gpt.py on this Python's own standard library, four times:

    1. reference   4 processes, never interrupted
    2. killed      the same, with one checkpoint; SIGKILL to every process in the middle of a later step
    3. resumed     from that checkpoint, 4 processes: every loss on every rank must equal the reference, bit for bit
    4. elastic     from that checkpoint, 2 processes, same global batch: the loss must continue closely

Dropout, token dropping and random token selection are on. The exit status is 0 only if all of this is so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SCRIPT = Path(__file__).resolve().parent / "pretrain_gpt.py"
LAST, SAVED, KILLED = 30, 15, 19
RANKS, FEWER_RANKS = 4, 2
CLOSE = 0.02  # relative difference of the mean loss that other dropout and routing draws may cause
TIME_LIMIT_S = 300


class QuickstartError(Exception):
    """Something is not as promised; the message says what."""


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Attributes:
        name: reference, killed, resumed or elastic.
        ranks: number of processes.
        seconds: wall time, with start-up.
        losses: for each rank, iteration -> (loss, all of the iteration's exact values).
        output: what it printed.
    """

    name: str
    ranks: int
    seconds: float
    losses: tuple[Mapping[int, tuple[float, tuple[str, ...]]], ...]
    output: str

    def mean(self, iteration: int) -> float:
        """Return the mean loss over the ranks.

        Args:
            iteration: which one.
        """
        return sum(rank[iteration][0] for rank in self.losses) / self.ranks


def run_training(name: str, ranks: int, folder: Path, extra: Sequence[str], dies: bool = False) -> Run:
    """Run pretrain_gpt.py under torchrun and read its loss logs.

    Args:
        name: of the run and its files.
        ranks: number of processes.
        folder: where logs and checkpoints go.
        extra: more arguments.
        dies: whether it is meant to be killed.

    Raises:
        QuickstartError: if it ends otherwise than it should.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SCRIPT)]
    command += ["--preset", "tiny", "--moe-expert-parallel-size", "2", "--zero-stage", "2", "--seed", "1234"]
    command += ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--eval-iters", "0", "--log-interval", "5"]
    command += ["--train-iters", str(LAST), "--loss-log", str(folder / f"{name}.loss.{{rank}}.jsonl"), *extra]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    log = folder / f"{name}.log"
    started = time.perf_counter()
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            status: int | None = child.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            stop(child)
    seconds = time.perf_counter() - started
    output = log.read_text(errors="replace")
    if status is None or (status != 0) != dies or (dies and "SIGKILL" not in output):
        ended = f"took more than {TIME_LIMIT_S} s" if status is None else f"ended with status {status}"
        tail = "\n".join(output.splitlines()[-25:])
        raise QuickstartError(f"the run '{name}' {ended}; the end of {log}:\n{tail}")
    losses = tuple(read_losses(folder / f"{name}.loss.{rank}.jsonl") for rank in range(ranks))
    return Run(name, ranks, seconds, losses, output)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End torchrun if it still runs; asked politely it ends its workers, which have sessions of their own.

    Args:
        child: the launcher.
    """
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def read_losses(path: Path) -> dict[int, tuple[float, tuple[str, ...]]]:
    """Read one rank's loss log.

    Args:
        path: the file that --loss-log wrote.

    Returns:
        iteration -> (loss, exact values of loss, load-balancing loss and gradient norm).
    """
    rows: dict[int, tuple[float, tuple[str, ...]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        exact = (row["loss_hex"], row["moe_loss_hex"], float(row["grad_norm"]).hex())
        rows[row["iteration"]] = (row["loss"], exact)
    return rows


def differences(one: Run, other: Run, iterations: Sequence[int]) -> list[str]:
    """Name every (rank, iteration) where two runs of the same size are not bit-identical.

    Args:
        one: a run.
        other: another run.
        iterations: what to compare; a missing iteration is a difference.
    """
    found = []
    for rank, (left, right) in enumerate(zip(one.losses, other.losses, strict=True)):
        for iteration in iterations:
            a, b = left.get(iteration), right.get(iteration)
            if a is None or b is None or a[1] != b[1]:
                shown = [value[0] if value else None for value in (a, b)]
                found.append(f"rank {rank}, iteration {iteration}: {one.name} {shown[0]}, {other.name} {shown[1]}")
    return found


def check(reference: Run, killed: Run, resumed: Run, elastic: Run) -> float:
    """Check everything that is promised.

    Args:
        reference: the uninterrupted run.
        killed: the run that was killed.
        resumed: the run that continued on as many processes.
        elastic: the run that continued on fewer.

    Returns:
        The largest relative difference between the mean losses of elastic and reference.

    Raises:
        QuickstartError: naming the first difference.
    """
    after = range(SAVED + 1, LAST + 1)
    before = range(1, KILLED)
    for run, iterations in ((killed, before), (resumed, after)):
        if found := differences(reference, run, iterations):
            raise QuickstartError(f"{len(found)} losses differ. First: {found[0]}")
    if any(min(rank) != SAVED + 1 for run in (resumed, elastic) for rank in run.losses):
        raise QuickstartError("a resumed run did not continue at the iteration after the checkpoint")
    worst = max(abs(elastic.mean(at) - reference.mean(at)) / reference.mean(at) for at in after)
    if worst > CLOSE:
        raise QuickstartError(f"on {FEWER_RANKS} processes the loss strays by {worst:.1%}, more than {CLOSE:.0%}")
    return worst


def summarise(runs: Sequence[Run], folder: Path, worst: float) -> dict[str, Any]:
    """Collect the numbers for people and for --json.

    Args:
        runs: reference, killed, resumed, elastic.
        folder: where the files lie.
        worst: from `check`.
    """
    reference, _killed, resumed, _elastic = runs
    checkpoint = folder / "checkpoint" / f"global_step{SAVED}"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    match = re.search(r"([\d,]+) parameters \(([\d,]+) in experts\)", reference.output)
    parameters, in_experts = (int(text.replace(",", "")) for text in match.groups()) if match else (0, 0)
    step_ms = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", reference.output)
    return {
        "ok": True,
        "identical_iterations": LAST - SAVED,
        "identical_ranks": resumed.ranks,
        "largest_relative_difference_on_fewer_ranks": worst,
        "parameters": parameters,
        "parameters_in_experts": in_experts,
        "checkpoint": str(checkpoint),
        "checkpoint_bytes": size,
        "bytes_per_parameter": round(size / parameters, 3) if parameters else None,
        "ms_per_iteration": float(step_ms[-1]) if step_ms else None,
        "seconds": {run.name: round(run.seconds, 1) for run in runs},
        "folder": str(folder),
    }


def loss_table(reference: Run, resumed: Run, elastic: Run) -> Table:
    """Lay the losses side by side.

    Args:
        reference: the uninterrupted run.
        resumed: the run on as many processes.
        elastic: the run on fewer.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("iter", justify="right")
    table.add_column("reference", justify="right")
    table.add_column("resumed", justify="right")
    table.add_column("resumed, exact", justify="right", style="dim")
    table.add_column("equal", justify="center")
    table.add_column(f"mean of {RANKS}", justify="right")
    table.add_column(f"mean of {FEWER_RANKS}", justify="right", style="cyan")
    for at in range(SAVED + 1, LAST + 1):
        equal = RANKS - len({text.split(",")[0] for text in differences(reference, resumed, [at])})
        left, right = reference.losses[0][at], resumed.losses[0][at]
        mark = f"[green]{equal}/{RANKS} ✓[/]" if equal == RANKS else f"[red]{equal}/{RANKS} ✗[/]"
        means = (f"{reference.mean(at):.4f}", f"{elastic.mean(at):.4f}")
        table.add_row(str(at), f"{left[0]:.6f}", f"{right[0]:.6f}", re.sub("0+p", "p", right[1][0]), mark, *means)
    return table


def narrate(console: Console, folder: Path) -> tuple[list[Run], float]:
    """Run everything, telling what happens.

    Args:
        console: where to tell it.
        folder: where files go.

    Returns:
        The four runs, and the result of `check`.
    """
    checkpoint = str(folder / "checkpoint")
    plan = [
        ("reference", RANKS, "never interrupted", ["--save-interval", "0"], False),
        (
            "killed",
            RANKS,
            f"checkpoint at {SAVED}, all killed in the middle of {KILLED}",
            ["--save", checkpoint, "--save-interval", str(SAVED), "--fault-at-iter", str(KILLED)],
            True,
        ),
        ("resumed", RANKS, f"continues from iteration {SAVED}", ["--load", checkpoint], False),
        ("elastic", FEWER_RANKS, "the same checkpoint on half the processes", ["--load", checkpoint], False),
    ]
    runs: list[Run] = []
    for number, (name, ranks, what, extra, dies) in enumerate(plan, 1):
        text = f"[bold]{number}. {name}[/]  {ranks} processes, {what}"
        with console.status(text) if console.is_terminal else nullcontext():
            run = run_training(name, ranks, folder, extra, dies)
        runs.append(run)
        console.print(f"[green]✓[/] {text}  [dim]{run.seconds:.0f} s[/]", highlight=False)
    worst = check(*runs)
    return runs, worst


def show(console: Console, runs: Sequence[Run], summary: Mapping[str, Any], kept: bool) -> None:
    """Print the results.

    Args:
        console: where to.
        runs: reference, killed, resumed, elastic.
        summary: from `summarise`.
        kept: whether the files stay.
    """
    reference, _killed, resumed, elastic = runs
    console.print()
    console.rule("[bold]the losses after the checkpoint", align="left")
    console.print(loss_table(reference, resumed, elastic))
    console.print(
        "[bold]reference[/] and [bold]resumed[/] are rank 0's. [bold]equal[/] counts the ranks whose loss, "
        "load-balancing loss and gradient norm are [bold green]identical bit for bit[/], with dropout, token dropping "
        f"and random token selection on. [bold]mean of {FEWER_RANKS}[/] continues on {FEWER_RANKS} processes, where "
        f"those draw other numbers: within {summary['largest_relative_difference_on_fewer_ranks']:.2%} of the mean of "
        f"{RANKS}.",
        highlight=False,
    )
    console.print()
    console.rule("[bold]the checkpoint", align="left")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row(
        "model", f"{summary['parameters']:,} parameters, {summary['parameters_in_experts']:,} in 2 x 8 experts"
    )
    facts.add_row(
        "size", f"{summary['checkpoint_bytes'] / 1e6:.1f} MB, {summary['bytes_per_parameter']} bytes/parameter"
    )
    facts.add_row("", "[dim]12 are needed: float32 master, first and second moment[/]")
    facts.add_row("step", f"{summary['ms_per_iteration']} ms per iteration on {RANKS} processes")
    facts.add_row("files", f"{summary['folder']}{'' if kept else '  (removed now; --keep DIR keeps them)'}")
    console.print(facts, highlight=False)
    console.print()
    console.rule("[bold]what to try next", align="left")
    moc, torchrun = Path(sys.executable).with_name("moc-ckpt"), "torchrun --standalone --nproc-per-node"
    console.print(
        f"source {Path(sys.executable).parent / 'activate'}\n"
        f"{torchrun} 4 scripts/pretrain_gpt.py --preset tiny --moe-expert-parallel-size 2 --train-iters 300 "
        "--save runs/tiny --load runs/tiny --save-interval 50\n"
        f"{torchrun} 8 scripts/pretrain_gpt.py --preset gpt-125m-8e --bf16 --moe-expert-parallel-size 8 "
        "--save runs/125m --load runs/125m   [dim]# GPUs[/]\n"
        f"{moc.name} --help",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put logs and checkpoints here and keep them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the story")
    args = parser.parse_args()
    console = Console(quiet=args.json)
    if args.keep and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: the directory is not empty")
    folder = args.keep.absolute() if args.keep else Path(tempfile.mkdtemp(prefix="moc_quickstart_"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    kept = args.keep is not None
    console.rule("[bold]moc_ckpt quickstart", align="left")
    console.print(
        "A GPT with 2 MoE layers of 8 experts learns Python's standard library, byte by byte, on this CPU: "
        f"expert parallelism 2, ZeRO-2, {LAST} iterations.\n",
        highlight=False,
    )
    try:
        runs, worst = narrate(console, folder)
        summary = {**summarise(runs, folder, worst), "total_seconds": round(time.perf_counter() - started, 1)}
        show(console, runs, summary, kept)
        console.print(f"\n[bold green]All as promised[/] in {summary['total_seconds']:.0f} s.", highlight=False)
        if args.json:
            print(json.dumps(summary, indent=2))
    except QuickstartError as error:
        kept = True
        if args.json:
            print(json.dumps({"ok": False, "error": str(error), "folder": str(folder)}, indent=2))
        else:
            console.print(f"\n[bold red]Not as promised:[/] {escape(str(error))}", highlight=False)
            console.print(f"Logs and checkpoints are in {folder}", highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
