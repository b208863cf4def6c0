"""What the accuracy experiment consists of: its settings, its runs, what a fault loses, and the file of results. Pure.

Terms are DESIGN section 2's. A fault comes right after the checkpoint of the middle step, so no step is repeated and
nothing but experts' updates is lost: PLT is exactly what partial checkpoints cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt_moe.arguments import parse_args

__all__ = [
    "CONTINUED",
    "MODEL",
    "ORDER",
    "RESTART",
    "ROUTING",
    "DesignError",
    "Results",
    "Run",
    "Settings",
    "checkpoint_steps",
    "expected_plt",
    "lost_tokens",
    "plan_runs",
    "proportion_lost",
    "restored_versions",
    "schedule",
    "window_means",
]

RESTART = "restart"  # a fault at mid-training, recovery from the checkpoints of one (K, interval)
CONTINUED = "continued"  # no fault: the engine of the first half simply goes on
ROUTING = "routing"  # as K = N, with other random numbers after the fault (which tokens a full expert drops)
ORDER = "order"  # as K = N, with other training samples after the fault

# From the preset `tiny`, but with experts in every layer and top-2 routing, whose two gate values add up to 1. In
# the preset itself (every second layer, top-1) the model learns to live without its experts within the few steps
# that two cores can do, and whatever happens to them costs nothing. Dropout is off: every byte of text is seen
# once, and the only random numbers of training are then those of the routing.
MODEL = (
    *("--preset", "tiny", "--num-layers", "2", "--expert-interval", "1", "--topk", "2"),
    *("--micro-batch-size", "8", "--split", "94,6,0", "--init-method-std", "0.06"),
    *("--lr", "3e-3", "--min-lr", "3e-4", "--lr-warmup-iters", "40"),
    *("--hidden-dropout", "0", "--attention-dropout", "0"),
    *("--moe-train-capacity-factor", "1.25", "--moe-eval-capacity-factor", "2"),
)

_WINDOWS = 40


class DesignError(ValueError):
    """The experiment cannot be run or continued like this."""


@dataclass(frozen=True)
class Settings:
    """What is measured. Equal settings give equal numbers.

    Attributes:
        steps: optimizer steps of a whole training; the fault comes after half of them.
        seeds: seeds of weights, data order and routing; one first half each.
        ks: experts per MoE layer that a checkpoint stores; the largest must be all of them.
        intervals: steps between checkpoints.
        routing_repeats: runs per seed that differ from K = N in the routing's random numbers after the fault.
        order_repeats: runs per seed that differ from K = N in the training samples after the fault.
        eval_batches: batches of held-out text per evaluation; the same for all runs.
        model: arguments as scripts/pretrain_gpt.py takes them.
    """

    steps: int = 800
    seeds: tuple[int, ...] = (1, 2, 3)
    ks: tuple[int, ...] = (1, 2, 4, 8)
    intervals: tuple[int, ...] = (10, 20, 40)
    routing_repeats: int = 2
    order_repeats: int = 1
    eval_batches: int = 64
    model: tuple[str, ...] = MODEL

    def __post_init__(self) -> None:
        problems = [
            (self.steps < 4 or self.steps % 2, f"--steps {self.steps}: an even number of at least 4 is needed"),
            (not self.seeds or len(set(self.seeds)) < len(self.seeds), f"--seeds {self.seeds}: distinct seeds"),
            (
                any(not 1 <= k <= self.experts for k in self.ks),
                f"--ks {self.ks}: a layer has {self.experts} experts, so 1 to {self.experts} or N",
            ),
            (self.experts not in self.ks, f"--ks {self.ks}: N ({self.experts}) must be among them, as the baseline"),
            (
                any(not 1 <= interval <= self.fault for interval in self.intervals) or not self.intervals,
                f"--intervals {self.intervals}: each from 1 to the {self.fault} steps before the fault",
            ),
            (self.eval_batches < 1, f"--eval-batches {self.eval_batches}: at least 1"),
        ]
        if found := [text for wrong, text in problems if wrong]:
            raise DesignError("; ".join(found))

    @cached_property
    def _args(self) -> argparse.Namespace:
        return parse_args(self.model)

    def arguments(self, seed: int) -> list[str]:
        """Returns the command line of one seed's training.

        Args:
            seed: the seed.
        """
        return [
            *self.model,
            *("--seed", str(seed), "--train-iters", str(self.steps), "--eval-iters", str(self.eval_batches)),
        ]

    @property
    def fault(self) -> int:
        """The step after which the fault comes."""
        return self.steps // 2

    @property
    def experts(self) -> int:
        """Experts of each MoE layer, N."""
        return int(self._args.num_experts)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self._args.topk)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, before routing."""
        return int(self._args.global_batch_size * self._args.seq_length)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole training: the denominator of equation 7, times top-k."""
        return self.steps * self.tokens_per_step

    @property
    def window(self) -> int:
        """Steps of the second half whose training losses are recorded as one mean."""
        return max(1, (self.steps - self.fault) // _WINDOWS)

    def to_data(self) -> dict[str, Any]:
        """Returns plain data, as JSON gives it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """Reads what `to_data` returned.

        Args:
            data: the plain data.
        """
        values: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in data.items()}
        return cls(**values)


@dataclass(frozen=True, order=True, slots=True)
class Run:
    """The second half of one training.

    Attributes:
        seed: whose first half it continues.
        kind: RESTART, CONTINUED, ROUTING or ORDER.
        k: experts per layer in the checkpoints it restarts from.
        interval: steps between them; 0 where all experts are in the last one.
        variant: number of the repeat, from 1; 0 where there is only one.
    """

    seed: int
    kind: str
    k: int
    interval: int = 0
    variant: int = 0

    @property
    def directory(self) -> str:
        """Name of the directory of the checkpoints it restarts from, below the seed's own."""
        return f"k{self.k}_every{self.interval}" if self.interval else "full"


def plan_runs(settings: Settings) -> list[Run]:
    """Returns all second halves, seed by seed; the baseline of a seed comes first.

    Only the first seed has a CONTINUED run: it shows that a restart from K = N equals no fault, bit for bit.

    Args:
        settings: the settings.
    """
    runs = []
    for seed in settings.seeds:
        every = settings.experts
        runs.append(Run(seed, RESTART, every))
        if seed == settings.seeds[0]:
            runs.append(Run(seed, CONTINUED, every))
        runs += [Run(seed, ROUTING, every, variant=number + 1) for number in range(settings.routing_repeats)]
        runs += [Run(seed, ORDER, every, variant=number + 1) for number in range(settings.order_repeats)]
        runs += [Run(seed, RESTART, k, interval) for k in settings.ks if k < every for interval in settings.intervals]
    return runs


def checkpoint_steps(fault: int, interval: int) -> list[int]:
    """Returns the steps of the checkpoints up to the fault, ascending; the last is the fault's own.

    Args:
        fault: the step after which the fault comes.
        interval: steps between checkpoints.
    """
    return list(range(fault, 0, -interval))[::-1]


def schedule(settings: Settings) -> dict[int, list[tuple[int, int]]]:
    """Returns the partial checkpoints of a first half: step -> (K, interval) of those that are due.

    Args:
        settings: the settings.
    """
    due: dict[int, list[tuple[int, int]]] = {}
    for k in settings.ks:
        if k < settings.experts:
            for interval in settings.intervals:
                for step in checkpoint_steps(settings.fault, interval):
                    due.setdefault(step, []).append((k, interval))
    return dict(sorted(due.items()))


def expected_plt(settings: Settings, k: int, interval: int) -> float:
    """Returns the PLT of the fault under uniform load without dropped tokens (DESIGN section 6).

    The first checkpoint of a directory is full, so where a cycle does not fit before the fault no expert is older
    than that one.

    Args:
        settings: the settings.
        k: experts per layer in a checkpoint.
        interval: steps between checkpoints; 0 where nothing is lost.
    """
    if k >= settings.experts or not interval:
        return 0.0
    last = len(checkpoint_steps(settings.fault, interval)) - 1
    ages = [min(expert // k, last) for expert in range(settings.experts)]
    return sum(ages) / len(ages) * interval / settings.steps


def restored_versions(
    restored: Sequence[Sequence[str]], history: Mapping[int, Sequence[Sequence[str]]]
) -> list[list[int]]:
    """Tells from the content of the restored experts of which steps they are.

    Args:
        restored: per layer, for each expert a digest of its weights right after the restore.
        history: step -> the same of the live model at that step.

    Returns:
        Per layer, for each expert the newest step at which it had that content.

    Raises:
        DesignError: if an expert is of none of these steps.
    """
    versions: list[list[int]] = []
    for layer, experts in enumerate(restored):
        versions.append([])
        for expert, digest in enumerate(experts):
            found = [step for step, then in history.items() if then[layer][expert] == digest]
            if not found:
                raise DesignError(f"the restored expert {layer}/{expert} is as it was at no checkpoint")
            versions[-1].append(max(found))
    return versions


def lost_tokens(
    counts: Mapping[int, Sequence[Sequence[int]]], fault: int, versions: Sequence[Sequence[int]]
) -> list[int]:
    """Returns the tokens lost in each MoE layer.

    Args:
        counts: step -> per layer, for each expert the tokens it has processed up to then.
        fault: step of the fault.
        versions: per layer, for each expert the step whose state was restored.
    """
    return [
        sum(counts[fault][layer][expert] - counts[step][layer][expert] for expert, step in enumerate(steps))
        for layer, steps in enumerate(versions)
    ]


def proportion_lost(lost: Sequence[int], total_tokens: int, top_k: int) -> float:
    """Returns PLT, 0 to 1: the mean over the MoE layers of lost / (tokens * top-k) (MoC-System, equation 7).

    Args:
        lost: tokens lost in each MoE layer.
        total_tokens: tokens of the whole training.
        top_k: experts per token.
    """
    return sum(count / (total_tokens * top_k) for count in lost) / len(lost)


def window_means(losses: Sequence[float], window: int) -> list[float]:
    """Returns the means of consecutive windows; a rest that fills no window is left out.

    Args:
        losses: one value per step.
        window: steps of a window.
    """
    whole = len(losses) // window
    return [round(sum(losses[at * window : (at + 1) * window]) / window, 6) for at in range(whole)]


class Results:
    """The file of results: JSON lines, the settings first, then what is finished, in the order it finished.

    A line that was cut off by a crash is dropped when the file is continued. Not thread-safe; one process writes.

    Args:
        path: the file.
        settings: those of this experiment.
        resume: continue an existing file; otherwise there must be none.

    Attributes:
        halves: seed -> record of its first half.
        runs: run -> record.
        controls: seed -> record of what its experts are worth.

    Raises:
        DesignError: if the file exists and resume is False, or if it is of other settings.
    """

    def __init__(self, path: Path, settings: Settings, *, resume: bool) -> None:
        self.halves: dict[int, dict[str, Any]] = {}
        self.runs: dict[Run, dict[str, Any]] = {}
        self.controls: dict[int, dict[str, Any]] = {}
        self._path = path
        header = {"settings": settings.to_data()}
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(header)
            return
        if not resume:
            raise DesignError(f"{path} exists: continue it with --resume, or give another --out")
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0] != header:
            raise DesignError(f"{path} is of other settings: give another --out, or the same options as then")
        if torn:
            path.write_bytes(whole + b"\n")
        for record in lines[1:]:
            self._take(record)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Returns those of the runs that are not finished.

        Args:
            runs: the runs.
        """
        return [run for run in runs if run not in self.runs]

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a record and takes it in.

        Args:
            record: {"half": seed, ...}, {"control": seed, ...} or {"run": the run as plain data, ...}.
        """
        self._append(record)
        self._take(json.loads(json.dumps(record)))

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _take(self, record: dict[str, Any]) -> None:
        if "half" in record:
            for name in ("counts", "digests"):
                record[name] = {int(step): value for step, value in record[name].items()}
            self.halves[record["half"]] = record
        elif "control" in record:
            self.controls[record["control"]] = record
        else:
            self.runs[Run(**record["run"])] = record


def smaller(settings: Settings) -> Settings:
    """Returns the settings of --quick: a smoke test of a minute or two, whose numbers mean nothing.

    Args:
        settings: those of the whole experiment.
    """
    return replace(
        settings, steps=80, seeds=(1,), ks=(1, settings.experts), intervals=(4,), routing_repeats=1, order_repeats=0
    )
