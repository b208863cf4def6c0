"""Train, save, kill, recover, resume, resize: on the miniature tree, and on a real checkout where one is named."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.pool import free_port, worker_env

from mds import runs
from mds.runs import Place, Run, Tree

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3000)]

STEPS = 12
#: Every step in memory, every expert in it, and nothing left out on a busy machine.
ON = shlex.split(
    "--moc-enabled --moc-snapshot-interval 1 --moc-k-snapshot 4 --moc-k-persist 4 --moc-host-on-busy wait "
    "--moc-host-linger-s 300 --moc-timeouts-rendezvous-s 300"
)


def train(here: Place, directory: Path, *more: str, steps: int = STEPS, **options: object) -> Run:
    where = ["--save", str(directory), "--load", str(directory), "--save-interval", "4"]
    if steps != STEPS:
        where += here.tree.other_length
    return here.run("--train-iters", str(steps), *where, *more, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "dtype"), [(2, "fp32"), (2, "bf16"), (4, "fp32"), (4, "bf16")])
def test_kill_and_resume_exactly(here: Place, tree: Tree, world: int, dtype: str) -> None:
    """Dropout, noise in the gates and token dropping are on."""
    if tree.root.name == "mini" and (world, dtype) not in ((2, "fp32"), (4, "bf16")):
        pytest.skip("the miniature runs two of the four")
    kind = {"world": world, "dtype": dtype}
    whole, cut, stored = (here.folder / name for name in ("whole", "cut", "stored"))
    full = train(here, whole, *ON, **kind).ok()
    assert list(full.losses) == list(range(1, STEPS + 1))
    assert len(set(full.losses.values())) > STEPS // 2
    runs.settled(whole, f"global_step{STEPS}")

    killed = train(here, cut, *ON, at=(7, "kill"), **kind)
    assert set(killed.codes) == {-9}
    runs.settled(cut, "global_step4")
    # Only what storage has: without the directories in memory, which a copy of save_dir has nothing to do with.
    shutil.copytree(cut, stored)
    for tag in stored.glob("global_step[5-9]"):
        shutil.rmtree(tag)
    (stored / "latest").write_text("global_step4")

    again = train(here, cut, *ON, **kind).ok()
    assert again.loaded is not None and 5 <= again.loaded <= 8, "memory was not used"
    assert "from the memory of the last run" in again.log
    assert again.since(again.loaded) == full.since(again.loaded)
    runs.settled(cut, f"global_step{STEPS}")

    cold = train(here, stored, *ON, "--moc-no-recovery-memory", **kind).ok()
    assert cold.loaded == 4
    assert cold.since(4) == full.since(4)
    runs.settled(stored, f"global_step{STEPS}")
    for other in (cut, stored):
        assert (
            runs.differences(runs.tensors(whole, f"global_step{STEPS}"), runs.tensors(other, f"global_step{STEPS}"))
            == []
        )


@pytest.mark.parametrize(("world", "ep", "new_world", "new_ep"), [(2, 2, 2, 1), (2, 2, 4, 4), (4, 2, 2, 2)])
def test_resize(here: Place, world: int, ep: int, new_world: int, new_ep: int) -> None:
    """Bit for bit the same state in another layout, and training goes on."""
    first, second = here.folder / "first", here.folder / "second"
    before = train(here, first, *ON, steps=6, world=world, ep=ep).ok()
    runs.settled(first, "global_step6")
    where = ["--load", str(first), "--save", str(second), "--save-interval", "4", *here.tree.other_length]
    moved = here.run("--train-iters", "6", *where, *ON, world=new_world, ep=new_ep).ok()
    assert moved.loaded == 6
    runs.settled(second, "global_step6")
    assert runs.differences(runs.tensors(first, "global_step6"), runs.tensors(second, "global_step6")) == []
    after = train(here, first, *ON, steps=9, world=new_world, ep=new_ep).ok()
    assert after.loaded == 6
    assert [int(samples) for samples, _ in after.rates.values()] == [28, 32, 36]
    assert all(
        abs(float(loss) - float(before.losses[6])) < 0.5 * float(before.losses[6]) for loss in after.losses.values()
    )


def test_partial_experts(here: Place) -> None:
    """With K_persist 1 a resume is not exact, and says what it lost; the last checkpoint has every expert."""
    directory = here.folder / "pec"
    partial = ["--moc-enabled", "--moc-k-snapshot", "1", "--moc-k-persist", "1", "--moc-balance", "none"]
    partial += ["--moc-no-dynamic-k", "--moc-no-recovery-memory"]
    killed = train(here, directory, *partial, steps=30, at=(10, "kill"))
    assert set(killed.codes) == {-9}
    runs.settled(directory, "global_step8")
    resumed = train(here, directory, *partial, *here.tree.other_length).ok()
    assert resumed.loaded == 8
    units = runs.load_manifest(runs.open_store(str(directory)), "global_step8").units
    experts = [unit.step for unit in units if unit.name.startswith("expert/")]
    assert sorted(experts) == [4, 4, 4, 8], "one expert of the layer is new"
    assert {unit.step for unit in units if not unit.name.startswith("expert/")} == {8}
    assert "3 experts from older steps" in resumed.log
    manifest = runs.load_manifest(runs.open_store(str(directory)), f"global_step{STEPS}")
    assert {unit.step for unit in manifest.units} == {STEPS}


def test_switched_off_it_trains_as_the_stock_script(here: Place) -> None:
    arguments = ["--train-iters", "6"]
    stock = here.run(*arguments, launcher=[str(Path(__file__).with_name("stock.py"))], world=4)
    stock = stock.ok()
    # With stock loaders: they draw from the generator that dropout draws from.
    ours = here.run(*arguments, before=["--moc-no-shim", "loader-rng,scripted-fusion"], world=4).ok()
    assert len(stock.losses) == 6
    assert ours.losses == stock.losses
    assert ours.validation == stock.validation
    off = here.run(
        *arguments,
        section={"enabled": False, "k_persist": 1},
        before=["--moc-no-shim", "loader-rng,scripted-fusion"],
        world=4,
    )
    assert off.ok().losses == stock.losses


def test_native_checkpoints_save_and_resume(here: Place) -> None:
    """Without the plugin: what the shims for DeepSpeed's own checkpoints are for."""
    whole, parts = here.folder / "whole", here.folder / "parts"
    full = train(here, whole, steps=8).ok()
    train(here, parts, "--exit-interval", "4", steps=8).ok()
    resumed = train(here, parts, steps=8).ok()
    assert resumed.loaded == 4
    assert resumed.since(4) == full.since(4)


@pytest.mark.parametrize("way", ["exit_interval", "exit_duration", "kill_switch", "signal", "preempt"])
def test_every_exit_saves_every_expert(here: Place, way: str) -> None:
    if way == "exit_duration" and here.tree.root.name == "mini":
        pytest.skip("the miniature has no --exit-duration-in-mins")
    directory = here.folder / "exits"
    settings = ["--moc-enabled", "--moc-k-snapshot", "1", "--moc-k-persist", "1", "--moc-balance", "none"]
    options: dict[str, object] = {}
    if way == "exit_interval":
        settings += ["--exit-interval", "6"]
    elif way == "exit_duration":
        settings += ["--exit-duration-in-mins", "1"]
    elif way == "kill_switch":
        # Ranks work in directories of their own: one finds the file, as where it appears between two looks.
        settings += ["--kill-switch-file", "switch"]
        options["at"] = (6, "switch")
    else:
        # With the script's own handler, the plugin leaves the signal to it.
        settings += ["--exit-signal-handler"] if way == "signal" else []
        options["at"] = (6, "term")
    left = train(here, directory, *settings, steps=4000, **options)
    assert set(left.codes) == ({143} if way == "preempt" else {0}), left.log[-4000:]
    last = max(left.losses)
    tag = (directory / "latest").read_text()
    manifest = runs.load_manifest(runs.open_store(str(directory)), tag)
    assert tag == f"global_step{last}"
    assert {unit.step for unit in manifest.units} == {last}
    resumed = train(here, directory, *settings[:7], steps=last + 1).ok()
    assert resumed.loaded == last


def test_torchrun(tree: Tree, here: Place) -> None:
    """As the documents say to start it."""
    directory = here.folder / "torchrun"
    config = here.ds_config(2, "fp32", {"enabled": True, "selection": "full"})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "moc_ckpt.launch", "--moc-no-shim", "loader-rng", str(tree.script), *tree.arguments]
    command += ["--moe-expert-parallel-size", "2", "--deepspeed_config", str(config), "--micro-batch-size", "2"]
    command += ["--train-iters", "2", "--save", str(directory), "--save-interval", "2"]
    env = worker_env(MOC_SHM_DIR=str(here.shared))
    root = str(runs.HERE.parent.parent)
    env["PYTHONPATH"] = f"{root}:{tree.python_path}" if tree.python_path else root
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=runs.PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (directory / "latest").read_text() == "global_step2"
    assert "shim loader-rng off" in done.stderr
    assert done.stderr.count("shim device-count on") == 1, "said by more than one rank"


@pytest.mark.skipif(not runs.REAL, reason=runs.NO_REAL)
def test_it_imports_as_on_cuda() -> None:
    """Without a GPU: all that imports apex or compiles kernels gets the stand-ins."""
    env = worker_env(LOCAL_WORLD_SIZE="1")
    env["PYTHONPATH"] = f"{runs.HERE.parent.parent}:{os.environ.get('MEGATRON_DEEPSPEED_PYTHONPATH', '')}"
    command = [sys.executable, str(runs.HERE / "as_on_cuda.py"), runs.REAL]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=runs.PATIENCE_S, check=False)
    assert done.returncode == 0 and "as on CUDA: ok" in done.stdout, done.stderr[-4000:]
