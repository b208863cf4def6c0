"""SIGKILL in the middle of an export or import: nobody takes what is left for a checkpoint, and a second try works."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agent_tools import ROOT
from distributed import harness
from distributed.harness import ON
from distributed.pool import Pool, worker_env
from distributed.test_native import case_save as case_train_and_save
from distributed.test_native import refusal, row_of, verb

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROW = row_of("w2_ep1")
WORLD = 2
STEP = 5
WAIT_S = 120.0
#: Where in its writing calls it dies: 0 before the first, 1 before the last.
POINTS = (0.0, 0.3, 0.7, 0.9, 0.97, 1.0)
#: And at so many moments of which nobody knows what they are.
MOMENTS = 2


@pytest.fixture(scope="module")
def sources(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of ours and one of DeepSpeed's own."""
    top = tmp_path_factory.mktemp("sources")
    pool.run(WORLD, case_train_and_save, row=ROW, path=str(top / "ours"), plugin=ON)
    pool.run(WORLD, case_train_and_save, row=ROW, path=str(top / "native"), plugin=None)
    return {"ours": top / "ours", "native": top / "native"}


def tree(top: Path) -> dict[str, bytes | None]:
    """All files with their bytes, and all directories."""
    return {
        str(item.relative_to(top)): item.read_bytes() if item.is_file() else None for item in sorted(top.rglob("*"))
    }


@dataclass(frozen=True)
class Verb:
    """One verb: which checkpoint it reads, its arguments, and who reads what it writes."""

    source: str
    arguments: tuple[str, ...]
    ours: bool = False
    native: bool = False

    def command(self, source: Path, out: Path) -> list[str]:
        return [self.arguments[0], str(source), str(out), *self.arguments[1:]]


VERBS = {
    "moc": Verb("ours", ("export", "--to", "moc"), ours=True),
    "safetensors": Verb("ours", ("export", "--to", "safetensors", "--shard-size", "5KB")),
    "deepspeed": Verb("ours", ("export", "--to", "deepspeed", "--world", "2"), native=True),
    "import": Verb("native", ("import",), ours=True),
}


def start(command: Sequence[str], fatal: int = -1) -> subprocess.Popen[str]:
    """Starts the verb in a process of its own, and waits until it begins."""
    script = [sys.executable, str(ROOT / "tests/faults/export_script.py"), str(fatal), *command]
    process = subprocess.Popen(script, env=worker_env(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for the end; exit status, and the last line."""
    text, _ = process.communicate(timeout=WAIT_S)
    lines = [line for line in text.splitlines() if line.startswith("end ")]
    return process.returncode, lines[-1] if lines else ""


def case_load(ctx: Any, paths: list[str], plugin: dict[str, Any] | None) -> list[int]:
    """The step that a job goes on from in each directory: 0 without a checkpoint, -1 if the load is refused."""
    found = []
    for path in paths:
        engine = harness.build(ROW, world=ctx.world, seed=2, plugin=plugin)
        done = harness.attempt(engine.load_checkpoint, path)
        assert done["raised"] is None or done["moc"], done
        found.append(-1 if done["raised"] else engine.global_steps)
        harness.reset()
    return found


@pytest.mark.parametrize("name", VERBS)
def test_killed_half_way(pool: Pool, sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    what, source = VERBS[name], sources[VERBS[name].source]
    before = tree(source)
    dry = tmp_path / "dry" / "out"
    status, last = finish(start(what.command(source, dry)))
    assert status == 0 and [item.name for item in dry.parent.iterdir()] == ["out"]
    _, seconds, names = last.split(" ")
    calls = names.split(",")
    outs: dict[str, Path] = {}

    for where in POINTS:
        fatal = round(where * (len(calls) - 1))
        out = outs[f"before {calls[fatal]}, call {fatal} of {len(calls)}"] = tmp_path / f"call{fatal}" / "out"
        assert finish(start(what.command(source, out), fatal))[0] == -9
    chance = random.Random(name)
    for number in range(MOMENTS):
        out = tmp_path / f"moment{number}" / "out"
        process = start(what.command(source, out))
        try:
            process.wait(chance.random() * float(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
        finish(process)
        outs[f"at moment {number}"] = out
    assert tree(source) == before

    # Who looks at what is left: copies, since a run that finds nothing may begin to save there.
    whole = {label: is_whole(what, out) for label, out in outs.items()}
    # Of those that are not there, or empty, one is enough.
    chosen = {tuple(tree(out)) or ("nothing",): label for label, out in outs.items()}.values()
    copies = {label: tmp_path / "copies" / str(number) for number, label in enumerate(chosen)}
    for label, copy in copies.items():
        copy.mkdir(parents=True)
        if outs[label].exists():
            shutil.copytree(outs[label], copy, dirs_exist_ok=True)
    for reader, plugin in ((what.ours, ON), (what.native, None)):
        if reader:
            for rank in pool.run(WORLD, case_load, paths=list(map(str, copies.values())), plugin=plugin):
                for label, step in zip(copies, rank, strict=True):
                    assert step == STEP if whole[label] else step in (0, -1), label

    for label, out in outs.items():
        if whole[label]:
            status, text = refusal(*what.command(source, out))
            assert status == 2 and "not empty" in text, label
        elif out.exists() and any(out.iterdir()):
            status, text = refusal(*what.command(source, out))
            assert status == 2 and "not empty" in text and "remove this one if an export was cut off there" in text
            shutil.rmtree(out)
        if not whole[label]:
            verb(*what.command(source, out))
        assert [item.name for item in out.parent.iterdir()] == ["out"], label
        assert is_whole(what, out), label
        if name in ("safetensors", "deepspeed"):
            assert tree(out).keys() == tree(dry).keys(), label
        if name == "safetensors":
            assert tree(out) == tree(dry), label
    assert tree(source) == before


def is_whole(what: Verb, out: Path) -> bool:
    """Whether the directory claims to be a finished one; if it does it must be one to `verify`, too."""
    if what.ours:
        status, _ = refusal("verify", str(out))
        claims = any(out.glob("*/manifest.json"))
        assert (status == 0) == claims
        return claims
    if what.native:
        return (out / "latest").exists()
    return (out / "model.safetensors.index.json").exists()
