"""The campaign of damaged files: every load is exact, or older with the loss said, or refused with the file named."""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaign_tools.damage import copy_directory, damage, file_kind
from campaign_tools.worlds import World, build, is_scrambled, make_worlds, scramble, wrong

__all__ = ["BAD", "GOOD", "run", "table"]

GOOD = ("exact", "recovered", "refused")
BAD = ("wrong_tensors", "unhandled", "hangs", "lost_commits", "needless", "silent", "unnamed", "touched_live_state")
"""`needless`: older although the newer is whole. `silent`: older without a word. `unnamed`: refused, no file named."""
_SHOWN = 20


class _Hang(BaseException):
    """A load is not over in time."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _Hang

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Log(logging.Handler):
    """Keeps what the package says while a load runs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Campaign:
    """Cases one after the other, on one engine.

    Args:
        ctx: the context of this process: a world of one rank.
        worlds: the directories.
        work: where copies of them are damaged.
        seed: of all cases.
        deadline: seconds for a load.
        verbose: show what is logged.
    """

    def __init__(self, ctx: Any, worlds: list[World], work: Path, seed: int, deadline: float, verbose: bool) -> None:
        self._ctx = ctx
        self._worlds = worlds
        self._work = work
        self._seed = seed
        self._deadline = deadline
        self._verbose = verbose
        self._log = _Log()
        logger = logging.getLogger("moc_ckpt")
        self._engine = self._new_engine()
        # Thousands of loads that are damaged on purpose would fill the screen.
        logger.handlers = [*(logger.handlers if verbose else []), self._log]
        self.bad: list[dict[str, Any]] = []

    def _new_engine(self) -> Any:
        engine = build(self._ctx, 1, 9)
        report, self._found = engine.moc.report, None
        original = report.recovered

        def recovered(found: Any, *args: Any, **kwargs: Any) -> None:
            self._found = found
            original(found, *args, **kwargs)

        report.recovered = recovered
        return engine

    def case(self, number: int) -> list[tuple[str, list[tuple[str, str]]]]:
        """Runs one case: two loads of one damaged directory. Returns the outcome of each, and what was damaged."""
        rng = random.Random(f"{self._seed}/{number}")
        world = rng.choice(self._worlds)
        root = self._work / "c"
        shutil.rmtree(root, ignore_errors=True)
        copy_directory(world.root, root, world.files)
        done = damage(root, world.files, rng)
        touched = {name for _, name in done}
        explicit = rng.choice(sorted(world.bodies))
        out = []
        for tag in (None, explicit):
            outcome, text = self._load(world, root, tag, touched, number)
            if self._verbose:
                print(f"{world.name} {done} {tag}: {outcome} {text}\n{self._log.lines}", file=sys.stderr)
            if outcome in BAD:
                detail = {"case": number, "world": world.name, "damage": done, "tag": tag, "outcome": outcome}
                self.bad.append({**detail, "text": text[-1500:]})
                self._engine = self._new_engine()
            out.append((outcome, done))
        return out

    def _load(self, world: World, root: Path, tag: str | None, touched: set[str], number: int) -> tuple[str, str]:
        from moc_ckpt.errors import MocError

        filler = 1.0 + number % 7
        scramble(self._engine, filler)
        self._found = None
        self._log.lines.clear()
        try:
            with _deadline(self._deadline):
                where, _ = self._engine.load_checkpoint(str(root), tag=tag)
        except MocError as error:
            return self._refused(world, tag, touched, str(error), filler)
        except _Hang:
            return "hangs", traceback.format_exc()
        except Exception:
            return "unhandled", traceback.format_exc()
        if where is None or self._found is None:
            return "lost_commits", "nothing was loaded"
        return self._loaded(world, Path(where).name, tag, touched)

    def _refused(self, world: World, tag: str | None, touched: set[str], text: str, filler: float) -> tuple[str, str]:
        if not is_scrambled(self._engine, filler):
            return "touched_live_state", text
        candidates = [tag] if tag is not None else self._past(world)
        if any(file_kind(name) == "attempt" for name in touched):
            # Which versions belong together is not known then: whole checkpoints must load all the same.
            must = [
                item for item in candidates if not self._needs(world, item) & touched and item in (tag, world.latest)
            ]
        else:
            must = [item for item in candidates if world.restorable(item, touched)]
        if must:
            return "lost_commits", f"{must} should load: {text}"
        if not any(name in text or name.rpartition("/c/")[0] + "/" in text + "/" for name in touched):
            gone = [name.partition("/")[0] for name in touched]
            if not any(f"{tag}" in text for tag in gone):
                return "unnamed", text
        return "refused", text

    def _past(self, world: World) -> list[str]:
        """What a load without a tag may come to."""
        return [tag for tag in world.bodies if world.belongs(world.order(tag), world.latest)]

    def _needs(self, world: World, tag: str) -> frozenset[str]:
        return world.frame(tag).union(*world.unit_files(tag).values())

    def _loaded(self, world: World, loaded: str, tag: str | None, touched: set[str]) -> tuple[str, str]:
        claimed = {name: tuple(version) for name, version in self._found.manifest.versions().items()}
        differences = wrong(self._ctx, self._engine, world, loaded, claimed)
        if differences:
            return "wrong_tensors", "\n".join(differences)
        wanted = tag if tag is not None else world.latest
        pristine, files = world.versions(loaded), world.unit_files(loaded)
        older = [name for name, version in claimed.items() if version != pristine[name]]
        if loaded == wanted and not older:
            return "exact", ""
        said = "\n".join(self._log.lines)
        if tag is not None and loaded != tag:
            return "wrong_tensors", f"{loaded} was loaded"
        for name in older:
            if not files[name] & touched:
                return "needless", f"{name} is {claimed[name]}, not {pristine[name]}"
            if not world.belongs(claimed[name], loaded):
                return "wrong_tensors", f"{name} is of {claimed[name]}, which was given up"
            if name not in said:
                return "silent", f"{name}: {said}"
        if loaded != wanted:
            if "latest" not in touched and not world.frame(wanted) & touched:
                return "needless", f"{loaded} instead of {wanted}"
            if "DAMAGED" not in said and "`latest`" not in said:
                return "silent", f"{loaded}: {said}"
        return "recovered", ""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the directories, runs the cases; returns what happened."""
    from distributed import _worker
    from distributed.pool import Pool, free_port, worker_env

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    top = Path(tempfile.mkdtemp(prefix="moc_campaign_", dir=arguments.work_dir or memory))
    shared = top / "shm"
    shared.mkdir(mode=0o700)
    os.environ.update(worker_env(MOC_SHM_DIR=str(shared)))
    begin = time.monotonic()
    try:
        pool = Pool()
        try:
            _worker.prepare()
            _worker.join(0, 1, free_port())
            ctx = _worker.Context(0, 1)
            worlds = make_worlds(ctx, top, pool)
        finally:
            pool.close()
        _say(f"{len(worlds)} directories after {time.monotonic() - begin:.0f} s")
        work = top / "work"
        work.mkdir()
        verbose = arguments.only is not None
        campaign = Campaign(ctx, worlds, work, arguments.seed, arguments.deadline, verbose)
        return _cases(campaign, arguments)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _cases(campaign: Campaign, arguments: argparse.Namespace) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    by_damage: dict[str, Counter[str]] = {}
    by_file: dict[str, Counter[str]] = {}
    begin = last = time.monotonic()
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    done = 0
    for done, number in enumerate(numbers, 1):
        for outcome, damaged in campaign.case(number):
            outcomes[outcome] += 1
            for kind in {kind for kind, _ in damaged} or {"nothing"}:
                by_damage.setdefault(kind, Counter())[outcome] += 1
            for kind in {file_kind(name) for _, name in damaged} or {"nothing"}:
                by_file.setdefault(kind, Counter())[outcome] += 1
        if time.monotonic() - begin > arguments.seconds:
            break
        if time.monotonic() - last > 5:
            last = time.monotonic()
            bad = sum(outcomes[name] for name in BAD)
            _say(f"{done} of {len(numbers)} cases, {done / (last - begin):.0f} per second, {bad} bad")
    seconds = time.monotonic() - begin
    return {
        "campaign": "corruptions",
        "seed": arguments.seed,
        "cases": done,
        "loads": 2 * done,
        **{name: outcomes[name] for name in (*GOOD, *BAD)},
        "by_damage": {kind: dict(counts) for kind, counts in sorted(by_damage.items())},
        "by_file": {kind: dict(counts) for kind, counts in sorted(by_file.items())},
        "seconds": round(seconds, 1),
        "bad_cases": campaign.bad[:_SHOWN],
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result for people, as a Markdown table."""
    names = [*GOOD, *(name for name in BAD if result[name])]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows = [("all", result), *result["by_damage"].items(), *result["by_file"].items()]
    lines += [f"| {kind} | {' | '.join(str(counts.get(name, 0)) for name in names)} |" for kind, counts in rows]
    lines += [str(item) for item in result["bad_cases"]]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
