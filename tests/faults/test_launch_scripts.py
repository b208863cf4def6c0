"""The launch scripts: what they refuse, what they start, and a drill that kills what they started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
# The model's shape is the script's; these make it one that two CPU ranks train in milliseconds.
TINY = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"]


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOC_", "SLURM_", "MASTER_"))}
    shared = Path("/dev/shm", f"moc_t{os.getpid()}_{tmp_path.name[-12:]}")
    shared.mkdir(mode=0o700)
    yield {
        **kept,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MOC_SHM_DIR": str(shared),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GPUS": "2",
        "PRECISION": "fp32",
        "SEQ_LENGTH": "64",
        "GLOBAL_BATCH": "8",
        "SAVE": str(tmp_path / "run"),
    }
    for folder in shared.glob("*/*"):
        stop(folder)
    subprocess.run(["rm", "-rf", str(shared)], check=True)


def stop(folder: Path) -> None:
    """Ends the agent of a job, if there is one."""
    command = [sys.executable, "-m", "moc_ckpt.cli.main", "agent", "stop", "--dir", str(folder)]
    subprocess.run(command, capture_output=True, timeout=60, check=False)


def run(script: str, env: dict[str, str], *words: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"EP": "3"}, "EP=3 does not divide the 2 ranks (1 nodes of 2)"),
        ({"EP": "16", "GPUS": "16", "GLOBAL_BATCH": "64"}, "EP=16 does not divide the 8 experts"),
        ({"GLOBAL_BATCH": "9"}, "GLOBAL_BATCH=9 is no multiple of MICRO_BATCH x ranks = 8"),
        ({"NNODES": "2", "GLOBAL_BATCH": "16"}, "NNODES=2: set MASTER_ADDR"),
        ({"MEGATRON": "/nowhere"}, "MEGATRON=/nowhere has no pretrain_gpt.py"),
        ({"VOCAB_FILE": "/nowhere"}, "VOCAB_FILE and MERGE_FILE must both be files"),
        ({"PRECISION": "fp8"}, "PRECISION=fp8: bf16, fp16 or fp32"),
        ({"GPUS": "0"}, "GPUS=0: no process to start"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    env: dict[str, str], tmp_path: Path, more: dict[str, str], said: str
) -> None:
    done = run("gpt_125m_8e.sh", {**env, **more})
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_megatron_needs_data(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").write_text("")
    done = run("gpt_350m_16e.sh", {**env, "MEGATRON": str(tmp_path)})
    assert done.returncode == 2 and "DATA_PATH must name the data" in done.stderr


@pytest.mark.parametrize("script, experts", [("gpt_125m_8e.sh", 8), ("gpt_350m_16e.sh", 16)])
def test_what_is_started(env: dict[str, str], tmp_path: Path, script: str, experts: int) -> None:
    """On several nodes the script becomes torchrun; a stub in its place says with what."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nif [ "$1" = - ]; then exec {sys.executable} "$@"; fi\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o700)
    (tmp_path / "pretrain_gpt.py").write_text("")
    more = {
        "PYTHON": str(stub),
        "NNODES": "3",
        "NODE_RANK": "2",
        "GPUS": "8",
        "MASTER_ADDR": "n0",
        "GLOBAL_BATCH": "96",
    }
    more |= {
        "MEGATRON": str(tmp_path),
        "DATA_PATH": "/data/x",
        "MOC_JOB_ID": "j",
        "PRECISION": "bf16",
        "K_SNAPSHOT": "2",
    }
    done = run(script, {**env, **more}, "--seed", "5")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")[:-1]

    def value(name: str) -> str:
        return words[words.index(name) + 1]

    assert words[:2] == ["-m", "torch.distributed.run"]
    assert (value("--nnodes"), value("--node-rank"), value("--nproc-per-node")) == ("3", "2", "8")
    assert (value("--rdzv-endpoint"), value("--rdzv-id")) == ("n0:29500", "j")
    assert words[words.index(str(tmp_path / "pretrain_gpt.py")) - 2 :][:2] == ["-m", "moc_ckpt.launch"]
    assert value("--num-experts") == str(experts) and value("--moe-expert-parallel-size") == "8"
    assert words[-2:] == ["--seed", "5"] and "--create-moe-param-group" in words and "--bf16" in words
    config = json.loads(Path(value("--deepspeed_config")).read_text())
    assert config["train_batch_size"] == 96 and config["zero_optimization"] == {"stage": 2}
    assert config["bf16"] == {"enabled": True}
    assert config["moc_checkpoint"] == {
        "enabled": True,
        "save_dir": value("--save"),
        "snapshot_interval": 1,
        "k_snapshot": 2,
        "k_persist": "auto",
    }


def test_a_slurm_job_starts_every_node_and_requeues_itself(env: dict[str, str], tmp_path: Path) -> None:
    """With stubs for SLURM's commands: `srun` runs its command once per node, one after the other."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then echo n7; echo n8; else echo "$@" >> {tmp_path}/requeued; fi\n'
    )
    (bin_ / "srun").write_text(
        '#!/bin/bash\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done\n'
    )
    script = tmp_path / "model.sh"
    script.write_text(
        f'echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $MOC_JOB_ID $*" >> {tmp_path}/said\nexit "$STATUS"\n'
    )
    for file in bin_.iterdir():
        file.chmod(0o700)
    slurm = {"SLURM_JOB_ID": "40001", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}
    environ = {**env, **slurm, "PATH": f"{bin_}:{env['PATH']}"}
    done = run("slurm.sbatch", {**environ, "STATUS": "0"}, str(script), "--seed", "5")
    assert done.returncode == 0, done.stderr
    lines = [f"2 {node} n7 20001 slurm-40001 --seed 5" for node in (0, 1)]
    assert (tmp_path / "said").read_text().splitlines() == lines
    assert not (tmp_path / "requeued").exists()
    assert run("slurm.sbatch", {**environ, "STATUS": "143"}, str(script)).returncode == 143
    assert (tmp_path / "requeued").read_text() == "requeue 40001\n"
    assert run("slurm.sbatch", {**environ, "STATUS": "1", "MAX_REQUEUES": "0"}, str(script)).returncode == 1
    assert (tmp_path / "requeued").read_text() == "requeue 40001\n"
    assert run("slurm.sbatch", environ, "nothing.sh").returncode == 2


def drill(env: dict[str, str], tmp_path: Path, *words: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "crash_drill.sh"), "--log", str(tmp_path / "log"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_drill_kills_a_run_and_sees_it_come_back(env: dict[str, str], tmp_path: Path) -> None:
    more = {"TRAIN_ITERS": "100000", "SAVE_INTERVAL": "60", "LOG_INTERVAL": "1000"}
    words = ["--json", "--timeout", "240", "--drills", "trainers,node", str(tmp_path / "run" / "checkpoints")]
    command = ["--", str(LAUNCH / "gpt_125m_8e.sh"), *TINY]
    done = drill({**env, **more}, tmp_path, *words, *command, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log").read_text()[-3000:]
    found = json.loads(done.stdout)
    trainers, node = found["drills"]
    assert (trainers["drill"], node["drill"]) == ("trainers", "node")
    assert trainers["trainers"] == node["trainers"] == 2
    assert trainers["resumed"] == trainers["memory"] > trainers["storage"]
    assert trainers["from_memory"] > 0 and trainers["from_storage"] == 0
    assert node["memory"] is None and node["resumed"] == node["storage"] > trainers["resumed"]
    assert node["from_memory"] == 0 and node["from_storage"] > 0


def test_a_drill_says_what_it_cannot_do(env: dict[str, str], tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    assert "name the command" in drill(env, tmp_path, folder, timeout=60).stderr
    assert "no such drill: x" in drill(env, tmp_path, "--drills", "x", folder, "--", "true", timeout=60).stderr
    ended = drill(env, tmp_path, folder, "--", "true", timeout=60)
    assert ended.returncode == 1 and "the run has come to its end" in ended.stdout
    absent = drill(env, tmp_path, folder, "--", "/nowhere/x", timeout=60)
    assert absent.returncode == 1 and "the command cannot be started" in absent.stdout
    failing = drill(env, tmp_path, folder, "--", "sh", "-c", "echo broken; exit 3", timeout=60)
    assert failing.returncode == 1
    assert "the command ends with 3 as soon as it is started" in failing.stdout and "broken" in failing.stdout
