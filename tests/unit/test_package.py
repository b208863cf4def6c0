"""Importing the package, and running scripts with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moc_ckpt import launch
from moc_ckpt.errors import CorruptionError, UnsupportedError
from moc_ckpt.integrations.deepspeed import preflight


def run(code, *args):
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=False)


def test_import_needs_neither_torch_nor_deepspeed():
    result = run("import sys, moc_ckpt; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ["import moc_ckpt, deepspeed", "import deepspeed, moc_ckpt"])
def test_either_import_order_hooks_the_engine(order):
    show = "print(E._moc_ckpt_wrapped, E.save_checkpoint.__wrapped__.__module__)"
    code = f"{order}\nfrom deepspeed.runtime.engine import DeepSpeedEngine as E\n{show}"
    result = run(code)
    assert result.stdout.splitlines()[-1] == "True deepspeed.runtime.engine", result.stderr


def test_errors_cross_processes_whole():
    import pickle

    error = pickle.loads(pickle.dumps(CorruptionError("what", where="here", fix="do")))
    assert (error.what, error.where, error.fix) == ("what", "here", "do")
    assert str(error).splitlines() == ["what", "  where: here", "  what to do: do"]


def test_launch_runs_a_script_as_main_with_its_arguments(tmp_path, capsys, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text("import sys\nimport helper\nprint(__name__, sys.argv[1:], helper.X)\n")
    (tmp_path / "helper.py").write_text("X = 5\n")
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert launch.main(["--local_rank=3", str(script), "--lr", "1"]) == 0
    assert capsys.readouterr().out == "__main__ ['--local_rank=3', '--lr', '1'] 5\n"


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["/no/such.py"], 2), (["--help"], 0)])
def test_launch_wrong_use(arguments, status, capsys):
    assert launch.main(arguments) == status
    assert "usage:" in capsys.readouterr().err


class Engine:
    save_checkpoint = load_checkpoint = step = zero_optimization_stage = gradient_accumulation_steps = None


class Groups:
    _get_expert_parallel_rank = _get_expert_data_parallel_group = None


def test_versions():
    preflight.check_version("0.17.0", Engine, Groups)
    preflight.check_version("0.19.8+local", Engine, Groups)
    with pytest.warns(RuntimeWarning, match=r"99\.1"):
        preflight.check_version("99.1", Engine, Groups)
    with pytest.raises(UnsupportedError, match=r"0\.16\.9 is too old"):
        preflight.check_version("0.16.9", Engine, Groups)
    with pytest.raises(UnsupportedError, match=r"lacks DeepSpeedEngine\.save_checkpoint"):
        preflight.check_version("0.19.8", object, Groups)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO-3"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "NVMe offload"),
        ({"torch_autocast": {"enabled": True}}, "torch autocast"),
        ({"expert_parallel": {"enabled": True}}, "AutoEP"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings, name):
    with pytest.raises(UnsupportedError, match=name.replace("(", r"\(")):
        preflight.check_settings(settings)


def test_supported_settings_pass():
    preflight.check_settings({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {}})


def test_every_module_is_below_the_size_that_wants_splitting():
    root = Path(launch.__file__).parent
    long = {str(p.relative_to(root)): n for p in root.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}
