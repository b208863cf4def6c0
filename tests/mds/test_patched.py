"""A patched tree trains, saves and resumes as the launcher makes the pristine tree do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moc_ckpt.patching.files import replace
from moc_ckpt.patching.targets import MEGATRON_DEEPSPEED
from moc_ckpt.patching.tree import APPLIED, NOT_NEEDED
from moc_ckpt.patching.tree import Tree as Sources

runs = pytest.importorskip("mds.runs")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, HALF = 20, 10
ON = ["--moc-enabled", "--moc-snapshot-interval", "1", "--moc-k-persist", "4", "--moc-host-on-busy", "wait"]


def patched(tree: object, folder: Path) -> object:
    """A patched copy of a tree."""
    root = folder / "patched"
    shutil.copytree(tree.root, root, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    sources = Sources(MEGATRON_DEEPSPEED, root)
    change = sources.apply()
    replace(root, change.before, change.after)
    states = {state.name: state.status for state in Sources(MEGATRON_DEEPSPEED, root).states()}
    assert set(states.values()) <= {APPLIED, NOT_NEEDED}, states
    return runs.Tree(root, tree.arguments, tree.python_path)


def train(here: object, directory: Path, *more: str, **options: object) -> object:
    where = ["--save", str(directory), "--load", str(directory), "--save-interval", "5"]
    return here.run("--train-iters", str(STEPS), *where, *more, **options).ok()


KINDS = {"moc": (True, 2, "fp32"), "native": (False, 2, "fp32"), "moc-4-bf16": (True, 4, "bf16")}


@pytest.mark.parametrize("kind", KINDS)
def test_patched_tree_behaves_as_the_launcher(here: object, tree: object, kind: str) -> None:
    """Dropout and token dropping are on; the same losses, saved and resumed, with our saves and with DeepSpeed's."""
    enabled, world, dtype = KINDS[kind]
    if tree.root.name == "mini" and world > 2:
        pytest.skip("the miniature runs the small ones")
    switches, options = ON if enabled else [], {"world": world, "dtype": dtype}
    launched = train(here, here.folder / "launched", *switches, **options)
    assert list(launched.losses) == list(range(1, STEPS + 1))
    assert len(set(launched.losses.values())) > STEPS // 2

    here.tree = patched(tree, here.folder)
    half = train(here, here.folder / "patched_run", *switches, "--exit-interval", str(HALF), launcher=(), **options)
    assert ("COMMITTED" in half.log) is enabled
    assert half.since(0) == {step: told for step, told in launched.since(0).items() if step <= HALF}
    rest = train(here, here.folder / "patched_run", *switches, launcher=(), **options)
    assert rest.loaded == HALF
    if enabled:
        assert rest.since(HALF) == launched.since(HALF)
    else:
        # Natively every rank goes on with rank 0's generators: equal to the launcher's own resume, not to the whole.
        here.tree = tree
        train(here, here.folder / "launched_half", "--exit-interval", str(HALF))
        again = train(here, here.folder / "launched_half")
        assert again.loaded == HALF
        assert rest.since(HALF) == again.since(HALF)


def test_the_launcher_on_a_patched_tree(here: object, tree: object) -> None:
    """Both at once are as one of them: what the patches insert stands back."""
    launched = train(here, here.folder / "launched", *ON)
    here.tree = patched(tree, here.folder)
    both = train(here, here.folder / "both", *ON)
    assert both.since(0) == launched.since(0)
