"""Exports and imports stream: a checkpoint of eight times as many experts takes no more memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pool import ROOT, Pool, worker_env
from distributed.zoo import Layer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORLD = 2
MIB = 1 << 20
EXPERTS = (16, 128)
#: What one verb may take beside its imports: an expert has 6 MiB of state here, and 32 or 64 MiB are read at once.
MOST = 192 * MIB


def row_of(experts: int) -> zoo.Row:
    return zoo.ROWS["z2_bf16"].with_model(
        layers=(Layer(experts=experts, ep=2, noise=None),),
        hidden=256,
        ffn=1024,
        gas=1,
        frozen=False,
        rank_buffers=False,
    )


def case_save(ctx: Any, experts: int, path: str) -> None:
    engine = harness.build(row_of(experts), world=ctx.world, seed=1)
    harness.train(engine, 1)
    engine.save_checkpoint(path, tag="t")


def used(*arguments: object) -> tuple[int, int]:
    """Runs a verb; the peak of its anonymous memory beyond the imports, and of all that was resident."""
    script = [sys.executable, str(ROOT / "tests/distributed/memory_script.py"), *map(str, arguments)]
    done = subprocess.run(script, env=worker_env(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, peak, resident = done.stdout.splitlines()[-1].split()
    return int(peak), int(resident)


def size_of(top: Path) -> int:
    return sum(item.stat().st_size for item in top.rglob("*") if item.is_file())


def test_memory_does_not_grow_with_the_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """Small ones are read at once and take less. What can be mapped from files is not counted."""
    found: dict[str, list[int]] = {}
    sizes = []
    for experts in EXPERTS:
        top = tmp_path / str(experts)
        native, ours = top / "native", top / "ours"
        pool.run(WORLD, case_save, experts=experts, path=str(native))
        sizes.append(size_of(native))
        verbs = {"import": ("import", native, ours)}
        verbs |= {to: ("export", ours, top / to, "--to", to) for to in ("moc", "safetensors", "deepspeed")}
        verbs["deepspeed, one rank"] = ("export", ours, top / "one", "--to", "deepspeed", "--world", "1", "--ep", "1")
        for name, arguments in verbs.items():
            peak, resident = used(*arguments)
            print(f"{name}: {sizes[-1] / MIB:.0f} MiB: peak {peak / MIB:.0f} MiB, resident {resident / MIB:.0f} MiB")
            found.setdefault(name, []).append(peak)
            if arguments[0] == "export":
                shutil.rmtree(arguments[2])
        shutil.rmtree(top)
    assert sizes[1] > 7 * sizes[0] and sizes[1] > 4 * MOST
    assert {name: peaks for name, peaks in found.items() if max(peaks) > MOST} == {}
