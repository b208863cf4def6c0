"""A launch script with a real checkout of Megatron-DeepSpeed: killed, restarted by the supervisor, resumed.

    MEGATRON_DEEPSPEED_DIR=… python -m pytest -s tests/mds/test_launch_script.py

On GPUs it is GPT-125M-8E in bf16 on all of them (EP as large as it goes); without, a tiny model in fp32 on two ranks.
The runs and their losses are printed as a table, and written to the file named by MOC_MEGATRON_REPORT.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

torch = pytest.importorskip("torch")

import agent_tools  # noqa: E402

from mds import runs  # noqa: E402
from moc_ckpt.snapshot.places import agent_lock_path  # noqa: E402

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not runs.REAL, reason=runs.NO_REAL),
]

ROOT = Path(__file__).resolve().parents[2]
GPUS = torch.cuda.device_count()
WORLD = GPUS or 2
WORDS = shlex.split("--moc-host-on-busy wait --seed 7")
if not GPUS:
    WORDS += shlex.split("--num-layers 2 --hidden-size 32 --num-attention-heads 2")
    CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "SEQ_LENGTH": "64", "PRECISION": "fp32"}
else:
    CPU = {}
STEPS, SAVE_EVERY, KILL_AFTER = 20, 5, 13
_LOSS = re.compile(r"^ iteration +(\d+)/ +\d+ \|.*lm loss: ([^ ]+) ", re.MULTILINE)
_RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")


class Place:
    """Where the runs of this module live; every run has a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, runs.real(folder).arguments[-1]
        self.shared = Path("/dev/shm") / f"moc_mds-{uuid.uuid4().hex[:8]}"
        self.shared.mkdir(mode=0o700)
        self.seconds: dict[str, float] = {}

    def run(
        self, name: str, *words: str, kill_after: int = 0, wipe: bool = False, folder: str = "", **settings: str
    ) -> str:
        """Runs the launch script to its end and returns what it printed.

        Args:
            name: of the run and its log.
            *words: more arguments of the training script.
            kill_after: the iteration after which all trainers are killed, once.
            wipe: kill the agent with them and remove what memory holds, as if the node were lost.
            folder: where it saves, if not under its name.
            **settings: of the launch script.
        """
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MOC_", "MASTER_"))}
        packages = os.environ.get("MEGATRON_DEEPSPEED_PYTHONPATH", "")
        env |= {
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), packages, env.get("PYTHONPATH", "")])),
            "MOC_SHM_DIR": str(self.shared),
            "MOC_JOB_ID": folder or name,
            "MEGATRON": runs.REAL,
            "DATA_PATH": self.corpus,
            "SAVE": str(self.folder / (folder or name)),
            "TRAIN_ITERS": str(STEPS),
            "GPUS": str(WORLD),
            "GLOBAL_BATCH": "32",
            "LOG_INTERVAL": "1",
            "EVAL_ITERS": "1",
            "WARMUP_ITERS": "4",
            "SAVE_INTERVAL": str(SAVE_EVERY),
            "K_SNAPSHOT": "8",
            "K_PERSIST": "1",
            "MAX_RESTARTS": "1",
            "BACKOFF": "1",
            **CPU,
            **settings,
        }
        log = self.folder / f"{name}.log"
        begun = time.monotonic()
        command = [str(ROOT / "scripts/launch/gpt_125m_8e.sh"), *WORDS, *words]
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            if kill_after:
                mark = re.compile(rf"^ iteration +{kill_after}/", re.MULTILINE)
                agent_tools.wait_until(
                    lambda: mark.search(log.read_text(errors="replace")) or process.poll() is not None,
                    f"iteration {kill_after} of {name}",
                    400.0,
                )
                agents = [int(lock.read_text()) for lock in self.locks(env["MOC_JOB_ID"])] if wipe else []
                for victim in [*agents, *trainers(process.pid)]:
                    with suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                if wipe:
                    for found in self.shared.rglob(env["MOC_JOB_ID"]):
                        shutil.rmtree(found)
            code = process.wait(400.0)
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()
            process.kill()
            process.wait()
        self.seconds[name] = time.monotonic() - begun
        text = log.read_text(errors="replace")
        assert code == 0, f"{name}: exit status {code}\n{text[-6000:]}"
        return text

    def locks(self, job: str) -> list[Path]:
        """The lock files of the agents of a job, which hold their numbers."""
        return [lock for lock in self.shared.rglob(agent_lock_path(Path()).name) if job in lock.parts]


def trainers(pid: int) -> list[int]:
    """The processes below one that train: torchrun's workers."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if "moc_ckpt.launch" in (words := child.cmdline()) and "torch.distributed.run" not in words:
                found.append(child.pid)
    assert found, "no trainer runs"
    return found


def losses(text: str) -> dict[int, str]:
    """The loss of every iteration as printed, the last time that it was."""
    return {int(found[1]): found[2] for found in _LOSS.finditer(text)}


def furthest(left: dict[int, str], right: dict[int, str], since: int) -> float:
    """The largest relative difference between the losses of two runs after an iteration."""
    both = [step for step in left if step > since and step in right]
    assert both
    return max(abs(float(left[step]) - float(right[step])) / abs(float(left[step])) for step in both)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("mds"))
    yield found
    for lock in found.shared.rglob(agent_lock_path(Path()).name):
        with suppress(OSError, ValueError):
            agent_tools.end_agent(int(lock.read_text()), lock.parent)
    subprocess.run(["rm", "-rf", str(found.shared)], check=True)


def test_killed_and_resumed(place: Place) -> None:
    """Losses of a resumed run: those of the uninterrupted one, or no further from them than two equal runs are."""
    whole = place.run("whole")
    again = place.run("again")
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    spread = furthest(losses(whole), losses(again), 0)

    crashed = place.run("crashed", kill_after=KILL_AFTER)
    assert re.search(r"flushed step 1[234] and \d+ experts newer than storage", crashed)
    resumed = int(_RESUMED.findall(crashed)[-1])
    assert resumed >= KILL_AFTER - 1, "memory was not used"
    from_memory = furthest(losses(whole), losses(crashed), resumed)

    # Storage has all dense state of step 10, and one expert per layer of each save since the first.
    stored = place.run("stored", "--moc-no-dynamic-k", kill_after=KILL_AFTER, wipe=True)
    assert int(_RESUMED.findall(stored)[-1]) == 10
    from_storage = furthest(losses(whole), losses(stored), 10)

    # The same with every expert in every save: exact again.
    full = place.run("full", kill_after=KILL_AFTER, wipe=True, K_PERSIST="8")
    assert int(_RESUMED.findall(full)[-1]) == 10
    from_full = furthest(losses(whole), losses(full), 10)

    table = {
        "device": f"{GPUS} x {torch.cuda.get_device_name()}" if GPUS else "CPU, 2 ranks",
        "versions": {"torch": torch.__version__},
        "seconds": {name: round(value, 1) for name, value in place.seconds.items()},
        "resumed": {"memory": resumed, "storage": 10, "storage, all experts": 10},
        "furthest": {
            "two equal runs": spread,
            "resumed from memory": from_memory,
            "resumed from storage, K 8": from_full,
            "resumed from storage, K 1": from_storage,
        },
        "losses": {
            name: losses(text)
            for name, text in {
                "whole": whole,
                "again": again,
                "crashed": crashed,
                "full": full,
                "stored": stored,
            }.items()
        },
        "said": [line for line in crashed.splitlines() if line.startswith(("[moc_ckpt]", "moc-ckpt"))],
    }
    print(json.dumps(table, indent=1))
    if os.environ.get("MOC_MEGATRON_REPORT"):
        Path(os.environ["MOC_MEGATRON_REPORT"]).write_text(json.dumps(table, indent=1))
    assert from_memory <= spread, f"{from_memory:.3g} off, two equal runs differ by {spread:.3g}"
    assert from_full <= spread, f"{from_full:.3g} off, two equal runs differ by {spread:.3g}"
    assert from_storage < 0.05, "older experts cost more than they can in five steps"


@pytest.mark.skipif(WORLD < 2, reason="one GPU: nothing to resize to")
def test_moved_to_one_rank(place: Place) -> None:
    """A checkpoint of all ranks goes on at world 1, EP 1, with the next samples."""
    place.run("wide", K_PERSIST="8", TRAIN_ITERS="6")
    more = ["--override-opt_param-scheduler"]
    moved = place.run("moved", *more, folder="wide", K_PERSIST="8", TRAIN_ITERS="9", GPUS="1")
    assert int(_RESUMED.findall(moved)[-1]) == 6
    assert list(losses(moved)) == [7, 8, 9]
