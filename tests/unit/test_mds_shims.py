"""Shims and hooks: what they recognise, what they refuse, and what the launcher says about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moc_ckpt import launch
from moc_ckpt.errors import ConfigError, UnsupportedError
from moc_ckpt.integrations.megatron_deepspeed import launcher
from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout, find_checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Machine
from moc_ckpt.integrations.megatron_deepspeed.hooks import HOOKS
from moc_ckpt.integrations.megatron_deepspeed.shims import SHIMS

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests" / "mds" / "mini"


class Here(Machine):
    """A machine as a test wants it."""

    def __init__(
        self, device: str = "cpu", version: tuple[int, ...] = (0, 19, 8), nvcc: int | None = None, has: str = ""
    ):
        # Stand before the cached properties of the class.
        self.__dict__.update(device=device, deepspeed=version, nvcc=nvcc)
        self._has = has.split()

    def has(self, module: str) -> bool:
        return module in self._has


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    shutil.copytree(MINI, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(autouse=True)
def started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.delenv("MOC_NO_SHIM", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def states(root: Path, machine: Machine) -> dict[str, str]:
    return {each.concern.name: each.status for each in launcher.decide(Checkout(root), (), machine)}


def change(root: Path, module: str, old: str, new: str) -> None:
    path = Checkout(root).path(module)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CPU = {
    "device-count",
    "masked-softmax-fusion",
    "gradient-accumulation-fusion",
    "vision-import",
    "compression-import",
    "attention-view",
    "loader-rng",
    "kill-switch",
    "scripted-fusion",
    "universal-checkpoint-info",
    "expert-keys",
}


def test_names_are_unique_and_everything_is_said() -> None:
    names = [each.name for each in (*HOOKS, *SHIMS)]
    assert len(set(names)) == len(names)
    for each in SHIMS:
        assert each.why and each.since and each.replaces and each.optional


def test_what_applies_where(tree: Path) -> None:
    on = {name for name, state in states(tree, Here()).items() if state == "on"}
    assert on == CPU | {hook.name for hook in HOOKS}
    cuda = {name for name, state in states(tree, Here("cuda")).items() if state == "on"}
    assert "fused-kernels" in cuda and "device-count" not in cuda
    assert "apex" not in cuda, "the miniature imports none of it"
    new = {name for name, state in states(tree, Here("cuda", nvcc=13)).items() if state == "on"}
    assert {"fused-kernels", "masked-softmax-fusion"} <= new
    old = {name for name, state in states(tree, Here("cuda", nvcc=12)).items() if state == "on"}
    assert not {"fused-kernels", "masked-softmax-fusion"} & old


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("vision-import", Here(has="torchvision")),
        ("compression-import", Here(has="deepspeed.compression.compress")),
        ("gradient-accumulation-fusion", Here(has="fused_weight_gradient_mlp_cuda")),
        ("universal-checkpoint-info", Here(version=(0, 19, 1))),
        ("expert-keys", Here(version=(0, 18, 9))),
    ],
)
def test_only_where_the_machine_has_the_problem(tree: Path, name: str, machine: Machine) -> None:
    assert states(tree, machine)[name] == "not needed"
    assert states(tree, Here())[name] == "on"


FIXED = [
    ("vision-import", "megatron.training", "from megatron.model.vision.knn_monitor import compute_feature_bank", "#"),
    ("compression-import", "megatron.training", "from deepspeed.compression.compress import init", "import math  #"),
    ("gradient-accumulation-fusion", "megatron.arguments", '"--no-gradient-accumulation-fusion"', '"--other"'),
    ("scripted-fusion", "megatron.arguments", '"--no-bias-dropout-fusion"', '"--another"'),
    ("masked-softmax-fusion", "megatron.arguments", '"--no-masked-softmax-fusion"', '"--other"'),
    ("attention-view", "megatron.model.transformer", "_layer.view(", "_layer.reshape("),
    ("kill-switch", "megatron.arguments", '"--kill-switch-file"', '"--end-file"'),
    ("kill-switch", "megatron.utils", "file = get_args()", "file = dist.all_reduce(get_args())"),
    (
        "expert-keys",
        "megatron.model.language_model",
        "moe_state_dict[self._encoder_key + key]",
        'moe_state_dict[f"language_model.{self._encoder_key}.{key}"]',
    ),
    ("universal-checkpoint-info", "megatron.checkpointing", "def _universal_checkpoint_info", "def _other"),
]


@pytest.mark.parametrize(("name", "module", "old", "new"), FIXED, ids=[f"{row[0]}-{n}" for n, row in enumerate(FIXED)])
def test_only_where_the_checkout_has_the_problem(tree: Path, name: str, module: str, old: str, new: str) -> None:
    change(tree, module, old, new)
    assert states(tree, Here())[name] == "not needed"


LOST = [
    ("attention-view", "megatron.model.transformer", "class CoreAttention", "class Attention"),
    ("expert-keys", "megatron.model.language_model", "def state_dict_for_save_checkpoint", "def state_for_save"),
    ("expert-keys", "megatron.model.language_model", "moe_state_dict[self._encoder_key + key]", "experts[key]"),
    ("expert-keys", "megatron.model.language_model", "moe_state_dict[self._encoder_key + key]", "moe_state_dict[key]"),
    ("loader-rng", "megatron.training", "def build_train_valid_test_data_iterators", "def build_iterators"),
    ("kill-switch", "megatron.utils", "def found_kill_switch", "def kill_switch"),
    ("gradient-accumulation-fusion", "megatron.arguments", "extra_args_provider", "provider"),
    ("arguments", "megatron.arguments", "def parse_args", "def parse"),
    ("ds-config", "megatron.training", "def _create_ds_config_dict", "def _settings"),
    ("steps", "megatron.training", "def train_step", "def one_step"),
    ("steps", "megatron.training", "losses = train_step(", "losses = other.step("),
    ("save", "megatron.checkpointing", 'state_dict["tokens"]', 'state_dict["token"]'),
    ("save", "megatron.checkpointing", "= 3.0", "= 4.0"),
    ("load", "megatron.checkpointing", "args.no_load_rng", "args.no_rng"),
]


@pytest.mark.parametrize(("name", "module", "old", "new"), LOST, ids=[f"{row[0]}-{n}" for n, row in enumerate(LOST)])
def test_where_the_expected_code_is_not_found_it_refuses(
    tree: Path, name: str, module: str, old: str, new: str
) -> None:
    change(tree, module, old, new)
    assert states(tree, Here())[name] == "NOT FOUND"
    with pytest.raises(UnsupportedError, match=name) as caught:
        launcher.install(Checkout(tree), (), Here())
    assert caught.value.where == str(tree)
    if name in {shim.name for shim in SHIMS} and "arguments:" not in caught.value.what:
        assert f"--moc-no-shim {name}" in caught.value.fix


def test_apex(tree: Path) -> None:
    (tree / "megatron" / "utils.py").write_text(
        "from apex.multi_tensor_apply import multi_tensor_applier\nimport amp_C\n"
    )
    assert states(tree, Here("cuda"))["apex"] == "on"
    assert states(tree, Here("cpu"))["apex"] == "not needed"
    assert states(tree, Here("cuda", has="apex amp_C"))["apex"] == "not needed"
    (tree / "megatron" / "utils.py").write_text("from apex.transformer import something\n")
    assert states(tree, Here("cuda"))["apex"] == "NOT FOUND"


def test_missing_packages_are_named(tree: Path) -> None:
    (tree / "megatron" / "tokenizer").mkdir()
    (tree / "megatron" / "tokenizer" / "tokenizer.py").write_text(
        "from transformers import AutoTokenizer\nimport six\n"
    )
    with pytest.raises(UnsupportedError, match="transformers, six") as caught:
        launcher.install(Checkout(tree), (), Here())
    assert caught.value.fix == "pip install transformers six"


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.switched_off([]) == frozenset()
    assert launcher.switched_off(["apex,loader-rng", "expert-keys"]) == {"apex", "loader-rng", "expert-keys"}
    assert launcher.switched_off(["all"]) == {shim.name for shim in SHIMS}
    monkeypatch.setenv("MOC_NO_SHIM", "vision-import, apex")
    assert launcher.switched_off(["loader-rng"]) == {"vision-import", "apex", "loader-rng"}
    with pytest.raises(ConfigError, match="apexx") as caught:
        launcher.switched_off(["apexx"])
    assert "expert-keys" in caught.value.fix


def test_what_is_no_checkout(tmp_path: Path, tree: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    assert find_checkout(script) is None
    (tree / "examples").mkdir()
    assert find_checkout(tree / "examples" / "x.py").root == tree  # type: ignore[union-attr]
    # Megatron-LM has the same files, but does not train with DeepSpeed.
    path = tree / "megatron" / "training.py"
    path.write_text(path.read_text().replace("import deepspeed\n", "").replace("from deepspeed.compression", "from x"))
    assert find_checkout(tree / "pretrain_gpt.py") is None


def test_a_file_that_is_no_python(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "megatron" / "training.py").write_text("def")
    assert launch.main([str(tree / "pretrain_gpt.py")]) == 2
    assert "training.py" in capsys.readouterr().err


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **env}
    command = [sys.executable, "-m", "moc_ckpt.launch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_table(tree: Path) -> None:
    shown = run("--moc-list-shims", "--moc-no-shim", "loader-rng", str(tree / "pretrain_gpt.py"))
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[1]: line.split() for line in shown.stdout.splitlines() if line.startswith(("shim ", "hook "))}
    assert set(rows) == {each.name for each in (*HOOKS, *SHIMS)}
    assert (
        rows["loader-rng"][2] == "off" and rows["attention-view"][2] == "on" and rows["apex"][2:4] == ["not", "needed"]
    )
    change(tree, "megatron.model.transformer", "class CoreAttention", "class Attention")
    lost = run("--moc-list-shims", str(tree / "pretrain_gpt.py"))
    assert lost.returncode == 1 and "NOT FOUND" in lost.stdout


def test_a_broken_checkout_is_not_run(tree: Path) -> None:
    (tree / "pretrain_gpt.py").write_text("print('ran')")
    change(tree, "megatron.model.transformer", "class CoreAttention", "class Attention")
    refused = run(str(tree / "pretrain_gpt.py"))
    assert refused.returncode == 2 and "ran" not in refused.stdout
    assert "attention-view" in refused.stderr and "what to do" in refused.stderr
    spared = run("--moc-no-shim", "attention-view", str(tree / "pretrain_gpt.py"))
    assert spared.returncode == 0 and "ran" in spared.stdout


def test_the_script_sees_its_own_arguments(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import sys; print(sys.argv[1:], sys.path[0])")
    shown = run("--local_rank=3", str(script), "--moc-no-shim", "x", "--a")
    # A script of another kind gets everything.
    assert shown.stdout.startswith(f"['--local_rank=3', '--moc-no-shim', 'x', '--a'] {tmp_path}")


def test_options_of_the_launcher_after_the_script(tree: Path) -> None:
    (tree / "pretrain_gpt.py").write_text("import sys; print(sys.argv[1:])")
    shown = run("--local_rank", "1", str(tree / "pretrain_gpt.py"), "--lr", "1", "--moc-no-shim=all", "--moc-enabled")
    assert shown.stdout.strip().endswith("['--local_rank', '1', '--lr', '1', '--moc-enabled']"), shown.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["--moc-enabled", "x.py"], ["nowhere.py"], ["--moc-no-shim"], ["--moc-list-shims", __file__]],
)
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


def test_an_unknown_shim(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert launch.main(["--moc-no-shim", "nobody", str(tree / "pretrain_gpt.py")]) == 2
    assert "nobody" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ single shims


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, ModuleType], None]:
    """Installs a shim whose module is given here, in place of the one that would be imported."""

    def install(shim_module: Any, name: str, module: Any) -> None:
        waiting: dict[str, list[Callable[[Any], None]]] = {}
        monkeypatch.setattr(shim_module, "after_import", lambda where, what: waiting.setdefault(where, []).append(what))
        shim_module.SHIM.install(Checkout(MINI))
        for what in waiting[name]:
            what(module)

    return install


def test_experts_get_their_modules_names(hook: Any) -> None:
    from moc_ckpt.integrations.megatron_deepspeed.shims import expert_keys

    class TransformerLanguageModel:
        _encoder_key = "encoder"

        def state_dict_for_save_checkpoint(self, prefix: str = "") -> dict[str, Any]:
            return {"encoder": {}, "moe_state_dict": {"encoderlayers.1.mlp.x": 1, "other": 2}}

    module = SimpleNamespace(TransformerLanguageModel=TransformerLanguageModel)
    hook(expert_keys, "megatron.model.language_model", module)
    state = TransformerLanguageModel().state_dict_for_save_checkpoint(prefix="")
    assert state["moe_state_dict"] == {"language_model.encoder.layers.1.mlp.x": 1, "other": 2}


def test_the_reserved_key_moves_for_the_time_of_a_save(hook: Any) -> None:
    from moc_ckpt.integrations.megatron_deepspeed.shims import universal_info

    class Module:
        def universal_checkpoint_info(self) -> str:
            return "method"

    class DeepSpeedEngine:
        def __init__(self) -> None:
            self.module, self.moc, self.seen = Module(), None, []

        def save_checkpoint(
            self, save_dir: str, tag: Any = None, client_state: Any = None, save_latest: bool = True
        ) -> bool:
            info = self.module.universal_checkpoint_info
            self.seen.append((save_dir, tag, client_state, save_latest, None if callable(info) else dict(info)))
            if save_dir == "full":
                raise OSError
            return True

    hook(universal_info, "deepspeed.runtime.engine", SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine))
    engine = DeepSpeedEngine()
    state = {"iteration": 1, "universal_checkpoint_info": {"a": 1}}
    assert engine.save_checkpoint("d", client_state=state, save_latest=False)
    assert engine.seen[-1] == ("d", None, {"iteration": 1}, False, {"a": 1})
    assert state["universal_checkpoint_info"] == {"a": 1}, "the caller's dict was changed"
    assert engine.module.universal_checkpoint_info() == "method"
    with pytest.raises(OSError):
        engine.save_checkpoint("full", "t", state)
    assert engine.module.universal_checkpoint_info() == "method"
    engine.save_checkpoint("d", "t", {"x": 1})
    assert engine.seen[-1] == ("d", "t", {"x": 1}, True, None)
    engine.moc = object()  # type: ignore[assignment]
    engine.save_checkpoint("d", "t", state)
    assert engine.seen[-1][2] == state, "the plugin keeps the key"


def test_loaders_leave_the_generators_alone(hook: Any) -> None:
    import torch

    from moc_ckpt.integrations.megatron_deepspeed.shims import loader_rng

    class Repeating:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

    def build(repeat: bool) -> Any:
        loader = torch.utils.data.DataLoader(list(range(4)))  # type: ignore[arg-type]
        return Repeating(loader) if repeat else loader

    samplers = SimpleNamespace(build_pretraining_data_loader=build)

    def iterators() -> Any:
        torch.rand(1)
        return samplers.build_pretraining_data_loader(True), samplers.build_pretraining_data_loader(False)

    training = SimpleNamespace(build_train_valid_test_data_iterators=iterators)
    hook(loader_rng, "megatron.data.data_samplers", samplers)
    hook(loader_rng, "megatron.training", training)
    before = torch.get_rng_state()
    repeating, plain = training.build_train_valid_test_data_iterators()
    assert list(iter(repeating.loader)) == list(iter(plain))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kill_switch_is_shared_only_where_one_is_named(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/mds has the ranks that share it."""
    from moc_ckpt.integrations.megatron_deepspeed.shims import kill_switch

    given = SimpleNamespace(kill_switch_file="switch")
    asked: list[bool] = []
    monkeypatch.setattr(kill_switch, "megatron_args", lambda: given)
    monkeypatch.setattr(kill_switch, "_on_any_rank", lambda found: asked.append(found) or True)
    module = SimpleNamespace(found_kill_switch=lambda: False)
    hook(kill_switch, "megatron.utils", module)
    assert module.found_kill_switch() is True and asked == [False]
    given.kill_switch_file = None
    assert module.found_kill_switch() is False and asked == [False]


def test_attention_gets_contiguous_inputs(hook: Any) -> None:
    import torch

    from moc_ckpt.integrations.megatron_deepspeed.shims import attention_view

    class CoreAttention:
        def forward(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
            return [item.view(-1) for item in (query, key, value)], mask

    hook(attention_view, "megatron.model.transformer", SimpleNamespace(CoreAttention=CoreAttention))
    whole = torch.arange(24.0).view(2, 2, 6)
    slices = whole.split(2, -1)
    with pytest.raises(RuntimeError):
        slices[0].view(-1)
    viewed, mask = CoreAttention().forward(*slices, "mask")
    assert mask == "mask"
    assert [item.tolist() for item in viewed] == [item.reshape(-1).tolist() for item in slices]


def test_stubs_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from moc_ckpt.integrations.megatron_deepspeed.shims import compression, vision

    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    for shim in (compression.SHIM, vision.SHIM):
        shim.install(Checkout(MINI))
    stub = sys.modules["deepspeed.compression.compress"]
    with pytest.raises(UnsupportedError, match="compression"):
        stub.init_compression(None)
    with pytest.raises(UnsupportedError, match="vision"):
        sys.modules["megatron.model.vision.knn_monitor"].compute_feature_bank(None)
