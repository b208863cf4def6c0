#!/usr/bin/env python3
"""Accuracy of partial experts checkpointing: validation loss against PLT (MoC-System, figure 5), on two CPU cores.

    nice python scripts/experiments/plt_accuracy.py --out runs/plt_accuracy
    python scripts/experiments/plt_accuracy.py --out runs/plt_quick --quick
    python scripts/experiments/plt_accuracy.py --report-only

A GPT with 2 MoE layers of 8 experts learns the Python standard library. One fault comes at mid-training, right at a
checkpoint; training restarts from checkpoints with K experts per layer, taken every so many steps, and goes on to
the end. Each seed trains one first half, which writes the checkpoints of all combinations, and one second half for
each. Finished runs are kept in OUT/results.jsonl, so that a cut experiment goes on with --resume. docs/accuracy.md
has the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue as queues
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
for _path in (str(SCRIPTS), str(SCRIPTS / "experiments")):
    if _path not in sys.path:
        sys.path.insert(0, _path)

from _plt_design import CONTINUED, DesignError, Results, Run, Settings, plan_runs, smaller  # noqa: E402
from _plt_figure import figure  # noqa: E402
from _plt_report import Analysis, collect, replace_section, section  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

DOCS = SCRIPTS.parent / "docs"
RESULTS = "results.jsonl"
NUMBERS, PLOT, REPORT = "plt_accuracy.json", "plt_accuracy.svg", "accuracy.md"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        argv: the arguments; the process's own if None.

    Returns:
        A namespace with `settings` beside the options.
    """
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plt_accuracy"), help="results and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute or two; its numbers say nothing")
    parser.add_argument("--seeds", type=_numbers, metavar="S,S,...", help=f"(default {_shown(defaults.seeds)})")
    parser.add_argument(
        "--intervals", type=_numbers, metavar="I,I,...", help=f"steps (default {_shown(defaults.intervals)})"
    )
    parser.add_argument(
        "--ks", type=_experts(defaults.experts), metavar="K,K,...", help="experts per layer and save (default 1,2,4,N)"
    )
    parser.add_argument("--steps", type=int, help=f"steps of a whole training (default {defaults.steps})")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one core each (default 2)")
    parser.add_argument("--resume", action="store_true", help="go on where a cut experiment in OUT ended")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints (by default they go with their seed)")
    parser.add_argument("--publish", action="store_true", help="put the finished results into docs/")
    parser.add_argument("--report-only", action="store_true", help="redo docs/ from the numbers there")
    args = parser.parse_args(argv)
    names = ("seeds", "intervals", "ks", "steps")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        args.settings = replace(smaller(defaults) if args.quick else defaults, **given)
        if args.jobs < 1:
            raise DesignError(f"--jobs {args.jobs}: at least 1")
        if args.publish and args.quick:
            raise DesignError("--publish does not go with --quick, whose numbers say nothing")
    except DesignError as error:
        parser.error(str(error))
    return args


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them") from error


def _experts(count: int) -> Callable[[str], tuple[int, ...]]:
    def convert(text: str) -> tuple[int, ...]:
        return _numbers(",".join(str(count) if part.strip().upper() == "N" else part for part in text.split(",")))

    return convert


def _shown(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


class Experiment:
    """Runs what is missing, several trainings at a time.

    Args:
        settings: what is measured.
        out: directory of results and checkpoints.
        results: what is there already; completed in place.
        console: for the story.
        keep: keep checkpoints.
    """

    def __init__(self, settings: Settings, out: Path, results: Results, console: Console, *, keep: bool) -> None:
        self._settings = settings
        self._out = out
        self._results = results
        self._console = console
        self._keep = keep
        self._pending: dict[Future[Any], tuple[str, int]] = {}
        self._began = time.perf_counter()

    def run(self, jobs: int) -> None:
        """Runs everything that is missing; results are appended as they come.

        Args:
            jobs: trainings at a time.
        """
        import _plt_training as training

        todo = self._results.missing(plan_runs(self._settings))
        total = self._steps(todo)
        if all(self._is_done(seed) for seed in self._settings.seeds):
            return
        self._console.print(f"{len(todo)} runs, {total:,} training steps, {jobs} at a time", highlight=False)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        bar = Progress(
            *(TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=training.start_worker, initargs=(queue,))
        task = bar.add_task("", total=total)
        with pool, bar:
            try:
                for seed in self._settings.seeds:
                    self._begin(pool, training, seed)
                while self._pending:
                    done, _ = wait(self._pending, timeout=1, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._finished(pool, training, future)
                    while not queue.empty():
                        try:
                            bar.advance(task, queue.get_nowait())
                        except queues.Empty:
                            break
                    self._left = self._remaining(bar, task, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _folder(self, seed: int) -> Path:
        return self._out / "checkpoints" / f"seed{seed}"

    def _todo(self, seed: int) -> list[Run]:
        return self._results.missing(run for run in plan_runs(self._settings) if run.seed == seed)

    def _is_done(self, seed: int) -> bool:
        return not self._todo(seed) and seed in self._results.controls

    def _begin(self, pool: ProcessPoolExecutor, training: Any, seed: int) -> None:
        """Starts with a seed's first half, or with its second halves if the first is there."""
        if self._is_done(seed):
            return
        todo, folder = self._todo(seed), self._folder(seed)
        needed = {run.directory for run in todo if run.kind != CONTINUED}
        if seed not in self._results.controls:
            needed.add(Run(seed, CONTINUED, self._settings.experts).directory)
        there = seed in self._results.halves and all((folder / name / "latest").is_file() for name in needed)
        continued = any(run.kind == CONTINUED for run in todo)
        if there and not continued:
            self._second_halves(pool, training, seed)
        else:
            future = pool.submit(training.first_half, self._settings, seed, folder, continued)
            self._pending[future] = ("half", seed)

    def _second_halves(self, pool: ProcessPoolExecutor, training: Any, seed: int) -> None:
        half, folder = self._results.halves[seed], self._folder(seed)
        if seed not in self._results.controls:
            self._pending[pool.submit(training.control, self._settings, seed, folder)] = ("control", seed)
        for run in self._todo(seed):
            future = pool.submit(training.second_half, self._settings, run, folder, half)
            self._pending[future] = ("run", seed)

    def _finished(self, pool: ProcessPoolExecutor, training: Any, future: Future[Any]) -> None:
        what, seed = self._pending.pop(future)
        records = future.result() if what == "half" else [future.result()]
        for record in records:
            self._results.add(record)
            if "run" in record:
                self._tell(record)
        if what == "half":
            self._second_halves(pool, training, seed)
        if not self._keep and self._is_done(seed):
            shutil.rmtree(self._folder(seed), ignore_errors=True)

    def _tell(self, record: dict[str, Any]) -> None:
        run = Run(**record["run"])
        what = f"K {run.k} every {run.interval}" if run.interval else f"all experts, {run.kind}"
        done = len(self._results.runs)
        minutes = (time.perf_counter() - self._began) / 60
        self._console.print(
            f"{done:3}/{len(plan_runs(self._settings))}  seed {run.seed}, {what:20} PLT {100 * record['plt']:6.3f} %  "
            f"loss after the fault {record['after_fault']:.4f}, at the end {record['final']:.4f}  "
            f"[dim]{minutes:.1f} min, about {self._left:.0f} min left[/]",
            highlight=False,
        )

    _left = float("nan")

    def _remaining(self, bar: Progress, task: Any, total: float) -> float:
        done = bar.tasks[0].completed
        return (time.perf_counter() - self._began) / 60 * (total / done - 1) if done else float("nan")

    def _steps(self, todo: Sequence[Run]) -> int:
        """Training steps of what is missing, evaluations included at a third of a step per batch."""
        fault = self._settings.fault
        evaluation = self._settings.eval_batches / 3
        halves = {run.seed for run in todo}
        second = len(todo) * (self._settings.steps - fault + 2 * evaluation)
        controls = sum(seed not in self._results.controls for seed in self._settings.seeds)
        return round(second + len(halves) * (fault + evaluation) + controls * 3 * evaluation)


def write_numbers(folder: Path, data: dict[str, Any]) -> None:
    """Writes the numbers, one run a line.

    Args:
        folder: where to.
        data: what `collect` returned.
    """
    rows = [f'  "{name}": {json.dumps(data[name])}' for name in ("settings", "environment")]
    rows += [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(item)}" for item in data[name]) + "\n  ]"
        for name in ("halves", "controls", "runs")
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NUMBERS).write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def report(folder: Path, document: Path | None) -> str:
    """Redoes the plot, and the table in a document, from the numbers.

    Args:
        folder: where the numbers are and the plot goes.
        document: whose generated part is replaced; None for none.

    Returns:
        The table.
    """
    analysis = Analysis(json.loads((folder / NUMBERS).read_text(encoding="utf-8")))
    (folder / PLOT).write_text(figure(analysis), encoding="utf-8")
    text = section(analysis)
    if document is not None:
        document.write_text(replace_section(document.read_text(encoding="utf-8"), text), encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; the process's own if None.
    """
    args = parse(argv)
    console = Console(soft_wrap=True)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    try:
        if args.report_only:
            report(DOCS / "figures", DOCS / REPORT)
            return 0
        results = Results(args.out / RESULTS, args.settings, resume=args.resume)
        Experiment(args.settings, args.out, results, console, keep=args.keep).run(args.jobs)
        data = collect(args.settings, results.halves, results.controls, results.runs.values())
        write_numbers(args.out, data)
        console.print("\n".join(report(args.out, None).splitlines()[1:-1]), highlight=False, markup=False)
        if args.publish:
            write_numbers(DOCS / "figures", data)
            report(DOCS / "figures", DOCS / REPORT)
    except DesignError as error:
        console.print(f"plt_accuracy.py: {error}", style="red", highlight=False)
        return 2
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        console.print(f"cut off ({type(error).__name__}); go on with --resume", style="red", highlight=False)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
