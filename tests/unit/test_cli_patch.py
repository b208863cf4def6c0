"""`moc-ckpt patch`: what it prints, its exit status, and that it needs nothing but libcst."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patch_samples import read, sources, write
from typer.testing import CliRunner

from moc_ckpt.cli.main import app

runner = CliRunner()
TARGET = "megatron-deepspeed"
TRAINING = "megatron/training.py"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    return write(tmp_path / "tree", sources())


def run(*args: object, code: int = 0) -> Any:
    result = runner.invoke(app, ["patch", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def data(*args: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json", code=code).stdout)
    return found


def test_apply_check_revert(root: Path) -> None:
    before = read(root)
    assert "applicable" in run(TARGET, root, "--check").stdout
    assert read(root) == before
    assert "applied: arguments, ds-config" in run(TARGET, root).stdout
    checked = data(TARGET, root, "--check")
    assert {patch["status"] for patch in checked["patches"]} == {"applied"}
    assert checked["target"] == TARGET and "applied" not in checked
    assert "nothing to be applied" in run(TARGET, root).stdout
    assert data(TARGET, root, "--revert", "--only", "steps", "--only", "save")["reverted"] == ["steps", "save"]
    assert "reverted" in run(TARGET, root, "--revert").stdout
    assert read(root) == before
    assert "nothing to be reverted" in run(TARGET, root, "--revert").stdout


def test_check_says_what_was_not_found(root: Path) -> None:
    path = root / TRAINING
    path.write_text(path.read_text().replace("def _create_ds_config_dict", "def _config"))
    before = read(root)
    assert f"{TRAINING}, _create_ds_config_dict: expected this function" in run(TARGET, root, "--check", code=1).stdout
    found = {patch["name"]: patch for patch in data(TARGET, root, "--check", code=1)["patches"]}
    assert found["ds-config"]["status"] == "structure not found"
    assert found["ds-config"]["missing"] == {
        "file": TRAINING,
        "function": "_create_ds_config_dict",
        "expected": "this function",
    }
    assert read(root) == before
    # By name it is an error, and nothing changes; else what can be applied is.
    assert "does not find its structure" in run(TARGET, root, "--only", "ds-config", code=2).stderr
    assert read(root) == before
    assert "ds-config" not in data(TARGET, root, code=1)["applied"]
    run(TARGET, root, "--revert")
    assert read(root) == before


def test_check_says_what_is_half_applied(root: Path) -> None:
    run(TARGET, root)
    path = root / TRAINING
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("@moc_patched.train_step")))
    before = read(root)
    assert "a line is missing: @moc_patched.train_step" in run(TARGET, root, "--check", code=1).stdout
    assert "patch steps is half-applied" in run(TARGET, root, code=1).stderr
    assert read(root) == before
    run(TARGET, root, "--revert", "--only", "steps")
    assert data(TARGET, root)["applied"] == ["steps"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_diff_is_that_of_this_very_tree(root: Path) -> None:
    before = read(root)
    diff = run(TARGET, root, "--diff").stdout_bytes
    undo_nothing = run(TARGET, root, "--revert", "--diff").stdout_bytes
    plain = run(TARGET, root, "--diff", "--plain").stdout_bytes
    assert undo_nothing == b"" and read(root) == before
    assert data(TARGET, root, "--diff")["diff"].encode() == diff

    def git(patch: bytes) -> None:
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        subprocess.run(command, input=patch, cwd=root, check=True, env={"GIT_CEILING_DIRECTORIES": str(root.parent)})

    git(diff)
    by_git = read(root)
    write(root, before)
    run(TARGET, root)
    assert read(root) == by_git != before
    git(run(TARGET, root, "--revert", "--diff").stdout_bytes)
    assert read(root) == before
    # For a pull request: nothing in it speaks of marks.
    assert b"# moc-ckpt" not in plain and b"+@moc_patched.train\n" in plain
    assert b"-from megatron.model.vision.knn_monitor import compute_feature_bank\n" in plain
    git(plain)
    for file, content in read(root).items():
        compile(content, file, "exec")


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["megatron", "."], "no patches for 'megatron'"),
        ([TARGET, "nowhere"], "no such directory"),
        ([TARGET, "{root}/megatron/model"], "no tree of megatron-deepspeed"),
        ([TARGET, "{root}", "--only", "step"], "no patch 'step'"),
        ([TARGET, "{root}", "--check", "--revert"], "--check does not go with"),
        ([TARGET, "{root}", "--plain"], "--plain goes with --diff only"),
    ],
)
def test_wrong_use(root: Path, args: list[str], match: str) -> None:
    before = read(root)
    assert match in run(*[arg.format(root=root) for arg in args], code=2).stderr
    assert read(root) == before


def test_the_package_names_the_tree_as_well(root: Path) -> None:
    assert data(TARGET, root / "megatron", "--check")["directory"] == str(root)


def test_without_libcst(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libcst", None)
    assert "pip install libcst" in run(TARGET, root, code=2).stderr
    assert data(TARGET, root, code=2)["error"]["what"] == "this needs libcst, which is not installed"


def test_imports_neither_torch_nor_deepspeed(root: Path) -> None:
    code = (
        "import sys\nfrom moc_ckpt.cli.main import app\n"
        f"try: app(['patch', {TARGET!r}, {str(root)!r}])\nexcept SystemExit as end: assert not end.code\n"
        "print({'torch', 'deepspeed', 'megatron'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
