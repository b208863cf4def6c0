"""`pretrain_gpt.py --lazarus`: all ranks are killed in the middle of a step, and the run resumes from memory."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import agent_tools
import pytest
from distributed.pool import ROOT, TIME_SCALE, worker_env

from moc_ckpt.snapshot.places import agent_lock_path

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.faults,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

MEMORY = {"snapshot_interval": 1, "k_snapshot": 8, "host": {"on_busy": "wait", "linger_s": 600.0}}


@pytest.fixture
def shared() -> Iterator[Path]:
    """Shared memory of this test alone; short, for a socket's path has 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="moc_t", dir="/dev/shm"))
    yield path
    for lock in path.rglob(agent_lock_path(Path()).name):
        with suppress(OSError, ValueError):
            agent_tools.end_agent(int(lock.read_text()), lock.parent)
    shutil.rmtree(path, ignore_errors=True)


def pretrain(top: Path, shared: Path, name: str, *more: str) -> tuple[int, str, dict[int, dict[str, Any]]]:
    """Runs the script with 4 ranks; exit status, output, and the loss log by iteration."""
    log = top / f"{name}.jsonl"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *(str(ROOT / "scripts" / "pretrain_gpt.py"), "--preset", "tiny", "--num-layers", "2", "--seq-length", "32"),
        *("--bf16", "--eval-iters", "0", "--train-iters", "8", "--save-interval", "4", "--lazarus"),
        *("--lazarus-slots", "4", "--lazarus-fault-threshold", "2", "--loss-log", str(log), *more),
    ]
    done = subprocess.run(
        command,
        env=worker_env(MOC_SHM_DIR=str(shared)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240 * TIME_SCALE,
        check=False,
    )
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stdout + done.stderr, {row["iteration"]: row for row in rows}


@pytest.mark.parametrize("state", ["replicated", "sharded"])
def test_killed_in_a_step_resumes_from_memory_bit_for_bit(tmp_path: Path, shared: Path, state: str) -> None:
    common = ("--lazarus-optimizer-state", state, "--moc-checkpoint")
    quiet = json.dumps({"snapshot_interval": 0})
    status, text, expected = pretrain(tmp_path, shared, "whole", "--save", str(tmp_path / "whole"), *common, quiet)
    assert status == 0, text[-3000:]
    assert sorted(expected) == list(range(1, 9))
    section = json.dumps({**MEMORY, "save_dir": str(tmp_path / "c")})
    place = ("--save", str(tmp_path / "c"), "--load", str(tmp_path / "c"))
    status, text, first = pretrain(tmp_path, shared, "killed", *place, *common, section, "--fault-at-iter", "7")
    assert status != 0
    assert max(first) == 6, text[-3000:]
    status, text, rest = pretrain(tmp_path, shared, "resumed", *place, *common, section)
    assert status == 0, text[-3000:]
    # The copy of step 6 may have been under way; storage has step 4.
    assert min(rest) in (6, 7), text[-3000:]
    assert {**first, **rest}.keys() == expected.keys()
    for iteration, row in {**first, **rest}.items():
        same = {key: (row[key], expected[iteration][key]) for key in ("loss_hex", "moe_loss_hex", "grad_norm")}
        assert all(one == two for one, two in same.values()), f"iteration {iteration}: {same}"
