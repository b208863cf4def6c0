"""Structural patches: what goes in, that it is recognised, and that it comes out byte for byte."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patch_samples import Style, read, sources, write

from moc_ckpt.errors import ConfigError, StorageError, UnsupportedError
from moc_ckpt.patching.files import replace
from moc_ckpt.patching.marks import Hunk, parse, render, split, unmark, without
from moc_ckpt.patching.targets import DEEPSPEED, MEGATRON_DEEPSPEED, TARGETS
from moc_ckpt.patching.tree import APPLICABLE, APPLIED, HALF_APPLIED, NOT_FOUND, NOT_NEEDED, Change, Tree

REAL = os.environ.get("MEGATRON_DEEPSPEED_DIR", "")
NAMES = [patch.name for patch in MEGATRON_DEEPSPEED.patches]
TRAINING = "megatron/training.py"


def tree(root: Path) -> Tree:
    return Tree(MEGATRON_DEEPSPEED, root)


def do(root: Path, change: Change) -> Change:
    replace(root, change.before, change.after)
    return change


def apply(root: Path, *only: str) -> Change:
    return do(root, tree(root).apply(only))


def revert(root: Path, *only: str) -> Change:
    return do(root, tree(root).revert(only))


def statuses(root: Path) -> dict[str, str]:
    return {state.name: state.status for state in tree(root).states()}


def problems(root: Path, name: str) -> str:
    (state,) = tree(root).states([name])
    assert state.status == HALF_APPLIED
    return "\n".join(state.problems)


def edit(root: Path, file: str, change: Callable[[str], str]) -> None:
    path = root / file
    before = path.read_text()
    after = change(before)
    assert after != before
    path.write_text(after)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "tree", sources())


# ------------------------------------------------------------------------------------------------ marked lines

texts = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=12)
ends = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def files_and_hunks(draw: st.DrawFn) -> tuple[bytes, list[Hunk]]:
    lines = draw(st.lists(st.tuples(texts, ends), min_size=1, max_size=8))
    data = "".join(text + end for text, end in lines) + draw(texts)
    # A \r before a \n would be one line end; the lines are then others, and that is fine as well.
    base = split(data.encode("latin-1"))
    hunks: list[Hunk] = []
    taken: set[int] = set()
    for name in draw(st.lists(st.sampled_from(["a", "b-c", "d2"]), unique=True)):
        at = draw(st.integers(0, len(base) - 1))
        removed = draw(st.integers(0, min(2, len(base) - at)))
        if taken.isdisjoint(range(at, at + removed)):
            taken |= set(range(at, at + removed))
            hunks.append(
                Hunk(name, at, tuple(draw(st.lists(st.sampled_from(["x = 1", "\tif y:", "  z"]), max_size=3))), removed)
            )
    return data.encode("latin-1"), hunks


@given(files_and_hunks())
def test_marks_are_exact_both_ways(given: tuple[bytes, list[Hunk]]) -> None:
    data, hunks = given
    base = split(data)
    assert "".join(line.text + line.end for line in base).encode("latin-1") == data
    patched = render(base, hunks)
    again, lines = parse(patched)
    assert again == base
    assert all(line.intact for line in lines)
    assert len(lines) == sum(len(hunk.added) + hunk.removed for hunk in hunks)
    assert without(patched, {hunk.patch for hunk in hunks}) == data
    # One by one, in any order, as if the others had been alone.
    for hunk in hunks:
        assert without(patched, [hunk.patch]) == render(base, [other for other in hunks if other is not hunk])


def test_an_edit_of_a_marked_line_is_seen() -> None:
    base = split(b"one\ntwo\n")
    patched = render(base, [Hunk("p", 1, ("added()",), 1)]).decode()
    for old, new in (("added()", "added(1)"), ("| two", "| twos")):
        _, lines = parse(patched.replace(old, new).encode())
        assert [line.intact for line in lines].count(False) == 1
    # Another indentation is none.
    _, lines = parse(("    " + patched.replace("\n", "\n    ")).encode())
    assert all(line.intact for line in lines)


def test_two_patches_do_not_remove_the_same_line() -> None:
    with pytest.raises(ValueError, match="both remove line 1"):
        render(split(b"one\n"), [Hunk("a", 0, (), 1), Hunk("b", 0, (), 1)])


# ------------------------------------------------------------------------------------------------ trees in any style

styles = st.builds(
    Style,
    newline=st.sampled_from(["\n", "\r\n"]),
    indent=st.sampled_from(["    ", "  ", "\t"]),
    final=st.booleans(),
    decorators=st.booleans(),
    extra=st.booleans(),
    query=st.sampled_from(["query_layer", "q"]),
    encoding=st.sampled_from(["utf-8", "latin-1"]),
    bom=st.booleans(),
    seed=st.integers(0, 50),
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(style=styles, data=st.data())
def test_any_style_is_patched_once_and_reverted_byte_for_byte(style: Style, data: st.DataObject) -> None:
    original = sources(style)
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder), original)
        assert set(statuses(root).values()) == {APPLICABLE}
        apply(root)
        patched = read(root)
        assert set(statuses(root).values()) == {APPLIED}
        assert apply(root).after == {}
        assert read(root) == patched
        for file, content in patched.items():
            compile(content, file, "exec")
        # Some of them leave, and what is left is as if they never came.
        going = data.draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
        revert(root, *going)
        some = read(root)
        with tempfile.TemporaryDirectory() as second:
            other = write(Path(second), original)
            staying = [name for name in NAMES if name not in going]
            for part in (staying[1::2], staying[::2]):
                if part:
                    apply(other, *part)
            assert read(other) == some
        apply(root)
        assert read(root) == patched
        revert(root)
        assert read(root) == original


def test_what_is_written_where(root: Path) -> None:
    """The meaning of the inserted lines, read by Python's own parser and not by libcst."""
    apply(root)
    functions = {
        node.name: node
        for file in (
            TRAINING,
            "megatron/checkpointing.py",
            "megatron/data/data_samplers.py",
            "megatron/arguments.py",
            "megatron/utils.py",
        )
        for node in ast.walk(ast.parse((root / file).read_bytes()))
        if isinstance(node, ast.FunctionDef)
    }
    decorated = {name: ast.unparse(node.decorator_list[0]) for name, node in functions.items() if node.decorator_list}
    ours = ["setup_model_and_optimizer", "train_step", "train", "save_checkpoint", "load_checkpoint"]
    ours += ["build_pretraining_data_loader", "build_train_valid_test_data_iterators", "found_kill_switch"]
    expected = {name: f"moc_patched.{name}" for name in ours} | {"_create_ds_config_dict": "moc_patched.ds_config"}
    assert decorated == expected

    body = [ast.unparse(node) for node in functions["parse_args"].body]
    where = body.index("moc_patched.arguments(parser)")
    assert body[where - 2].startswith("parser = ")
    assert body[-2].startswith("if ignore_unknown_args")
    assert "parser.set_defaults(bias_gelu_fusion=False)" in "".join(body[where:-2])

    kept = ast.unparse(functions["pretrain"])
    assert kept.index("from deepspeed.compression.compress import redundancy_clean\n") < kept.index("redundancy_clean(")
    setup = ast.unparse(functions["setup_model_and_optimizer"])
    assert "from deepspeed.compression.compress import init_compression\n" in setup
    bank = functions["evaluate"].body[0].orelse[0].body
    assert ast.unparse(bank[0]) == "from megatron.model.vision.knn_monitor import compute_feature_bank"
    top = [ast.unparse(node) for node in ast.parse((root / TRAINING).read_bytes()).body]
    assert not any(line.startswith(("from deepspeed.compression", "from megatron.model.vision")) for line in top)

    save = next(node for node in functions["save_checkpoint"].body if isinstance(node, ast.If)).body
    at = next(index for index, node in enumerate(save) if "model[0].save_checkpoint" in ast.unparse(node))
    assert ast.unparse(save[at - 1]) == (
        "if moc_reserved and INFO in state_dict:\n    vars(model[0].module)[INFO] = state_dict.pop(INFO)"
    )
    assert ast.unparse(save[at + 1]) == "if moc_reserved:\n    vars(model[0].module).pop(INFO, None)"

    package = ast.parse((root / "megatron/__init__.py").read_bytes()).body
    assert [ast.unparse(node) for node in package[:3]] == [
        "from __future__ import annotations",
        "from moc_ckpt.integrations.megatron_deepspeed import patched as moc_patched",
        "moc_patched.apex()",
    ]


def namespace(root: Path, file: str, **known: Any) -> dict[str, Any]:
    """What a patched file defines, with everything that it imports given."""
    code = re.sub(r"(?m)^(from|import) .*$", "", unmark((root / file).read_bytes()).decode())
    exec(compile(code, file, "exec"), known)
    return known


def test_what_the_fixes_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched functions, run on their own."""
    for name in ("attention-view", "expert-keys", "fused-kernels", "device-count"):
        apply(root, name)

    code = unmark((root / "megatron/model/language_model.py").read_bytes()).decode()
    code = code.replace("return state\n", "return state, moe_state_dict\n")
    known: dict[str, Any] = {"Module": object}
    exec(compile(re.sub(r"(?m)^from .*$", "", code), "language_model", "exec"), known)
    model = known["TransformerLanguageModel"]()
    model._encoder_key = "encoder"
    weights = {"layers.0.experts.w": 1, "layers.0.bias": 2}
    model.encoder = type("Encoder", (), {"state_dict": lambda self: weights})()
    state, experts = model.state_dict_for_save_checkpoint()
    assert (state, experts) == ({"layers.0.bias": 2}, {"language_model.encoder.layers.0.experts.w": 1})

    built: list[str] = []
    extension = type("X", (), {"load": staticmethod(lambda name, **_: built.append(name))})
    load = namespace(root, "megatron/fused_kernels/__init__.py", cpp_extension=extension)["load"]
    for on in (False, True):
        load(type("A", (), {"masked_softmax_fusion": on}))
        assert built == ["softmax"] * on

    class Strided(str):
        def contiguous(self) -> Strided:
            return Strided(self + "!")

        def view(self, *_: int) -> Strided:
            assert self.endswith("!")
            return self

        def __matmul__(self, other: str) -> str:
            return self + other

    attention = namespace(root, "megatron/model/transformer.py", Module=object, torch=None)["CoreAttention"]
    assert attention.forward(None, Strided("q"), Strided("k"), Strided("v"), None) == "q!k!"

    args = type("A", (), {"rank": 5, "local_rank": 1})
    accelerator = {"device_count": lambda _: int(os.environ.get("LOCAL_SIZE", "1")), "device_name": lambda _: "cpu"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_SIZE", "")  # it is put back afterwards
    monkeypatch.delenv("LOCAL_SIZE")
    known = {"get_args": lambda: args, "get_accelerator": type("Accelerator", (), accelerator)}
    namespace(root, "megatron/initialize.py", **known)["_initialize_distributed"]()
    assert os.environ["LOCAL_SIZE"] == "4"


# ------------------------------------------------------------------------------------------------ not found, not needed


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "expected"),
    [
        ("arguments", "megatron/arguments.py", "def parse_args", "def parse", "parse_args: expected this function"),
        ("arguments", "megatron/arguments.py", "parser.parse_", "p.q.parse_", "one variable whose parse_args"),
        ("ds-config", TRAINING, "_create_ds_config_dict", "_config", "_create_ds_config_dict: expected this function"),
        ("ds-config", TRAINING, "return read(", "read(", "a return of the settings"),
        ("steps", TRAINING, "\t\ttrain_step(", "\t\tstep(", "train: expected a call of train_step"),
        ("steps", TRAINING, "return model, None, None", "return model", "setup_model_and_optimizer: expected a return"),
        ("steps", "megatron/global_vars.py", "get_args", "args", "get_args: expected this function"),
        ("save", "megatron/checkpointing.py", "['tokens']", "['words']", "something saved as tokens"),
        ("save", "megatron/checkpointing.py", "= 3.0", "= 4.0", "checkpoint_version 3.0"),
        (
            "save",
            "megatron/checkpointing.py",
            "(iteration, model, optimizer",
            "(step, model, iteration",
            "iteration and",
        ),
        (
            "load",
            "megatron/checkpointing.py",
            "no_load_rng",
            "keep_rng",
            "load_checkpoint: expected something with .no",
        ),
        ("apex", "megatron/optimizer/__init__.py", "apex.optimizers", "apex.mlp", "apex.mlp, which has no stand-in"),
        (
            "fused-kernels",
            "megatron/fused_kernels/__init__.py",
            "if args.masked_softmax_fusion",
            "if True",
            "only under",
        ),
        ("vision-import", TRAINING, "knn_monitor import compute_feature_bank", "knn_monitor import *", "with names"),
        ("compression-import", TRAINING, "'''Trains.'''", "f = lambda: init_compression", "in functions only"),
        ("attention-view", "megatron/model/transformer.py", "CoreAttention", "Attention", "CoreAttention.forward: exp"),
        ("loader-rng", "megatron/data/data_samplers.py", "DataLoader(", "Loader(", "expected a DataLoader"),
        ("universal-checkpoint-info", "megatron/checkpointing.py", "client_state=state", "state=state", "client_state"),
        ("expert-keys", "megatron/model/language_model.py", "_key+key", "_key % key", "an attribute plus a variable"),
        ("expert-keys", "megatron/model/language_model.py", "moe_state_dict[", "x[", "put into moe_state_dict"),
        ("kill-switch", "megatron/utils.py", "def found_kill_switch", "def kill_switch", "found_kill_switch: exp"),
        (
            "masked-softmax-fusion",
            "megatron/arguments.py",
            "dest='masked_",
            "dest='",
            "--no-masked-softmax-fusion with",
        ),
    ],
)
def test_structure_not_found_is_named(root: Path, name: str, file: str, old: str, new: str, expected: str) -> None:
    text = old.replace("\t", "    ")
    edit(root, file, lambda content: content.replace(text, new.replace("\t", "    ")))
    before = read(root)
    (state,) = tree(root).states([name])
    assert state.status == NOT_FOUND
    assert state.missing is not None and state.missing.file == file
    assert expected in state.note
    with pytest.raises(UnsupportedError, match="does not find its structure"):
        tree(root).apply([name])
    assert read(root) == before
    # The others do not mind.
    rest = {other for other, status in statuses(root).items() if status == APPLICABLE}
    assert set(apply(root).names) == rest
    revert(root)
    assert read(root) == before


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("vision-import", TRAINING, "from megatron.model.vision.knn_monitor import compute_feature_bank", ""),
        ("gradient-accumulation-fusion", "megatron/arguments.py", "--no-gradient-acc", "--gradient-acc"),
        ("attention-view", "megatron/model/transformer.py", ".view(", ".reshape("),
        ("expert-keys", "megatron/model/language_model.py", "[self._enc", "['language_model.' + self._enc"),
        ("universal-checkpoint-info", "megatron/checkpointing.py", "_universal_checkpoint_info", "_info"),
        ("kill-switch", "megatron/arguments.py", "--kill-switch-file", "--end-file"),
        ("kill-switch", "megatron/utils.py", "args = get_args()", "args = broadcast.all_reduce(get_args())"),
        ("device-count", "megatron/initialize.py", "get_accelerator().device", "torch.cuda.device"),
        ("apex", "megatron/optimizer/__init__.py", "apex.optimizers", "torch.optim"),
    ],
)
def test_not_needed(root: Path, name: str, file: str, old: str, new: str) -> None:
    edit(root, file, lambda content: content.replace(old, new))
    assert statuses(root)[name] == NOT_NEEDED
    assert name not in apply(root).names


def test_two_functions_of_a_name_are_not_guessed_at(root: Path) -> None:
    edit(root, TRAINING, lambda text: text + "\nif True:\n    def train():\n        pass\n")
    assert "one function of this name, not 2" in tree(root).states(["steps"])[0].note


def test_line_ends_of_another_age(root: Path) -> None:
    before = write(root, {TRAINING: sources(Style(newline="\r"))[TRAINING]})
    (state,) = tree(before).states(["steps"])
    assert state.note == TRAINING + r": expected line ends that are \n or \r\n"


def test_a_file_that_is_not_python(root: Path) -> None:
    edit(root, TRAINING, lambda text: text + "\nif (\n")
    assert {name for name, status in statuses(root).items() if status == NOT_FOUND} == {
        *("ds-config", "steps", "vision-import", "compression-import", "loader-rng")
    }


# ------------------------------------------------------------------------------------------------ half-applied


def test_half_applied_trees_are_named(root: Path) -> None:
    original = read(root)
    apply(root)
    patched = read(root)

    def again() -> None:
        write(root, patched)

    edit(root, TRAINING, lambda text: re.sub(r"@moc_patched\.train  #.*\n", "", text))
    assert problems(root, "steps") == f"{TRAINING}: a line is missing: @moc_patched.train"
    with pytest.raises(StorageError, match="steps is half-applied"):
        tree(root).apply()
    assert revert(root, "steps").names == ("steps",)
    apply(root, "steps")
    assert read(root) == patched

    # One of its files is the old one.
    (root / "megatron/data/data_samplers.py").write_bytes(original["megatron/data/data_samplers.py"])
    assert "a line is missing: @moc_patched.build_pretraining_data_loader" in problems(root, "loader-rng")
    again()

    edit(root, TRAINING, lambda text: re.sub(r"# moc-ckpt- vision-import \w+ \| ", "", text))
    assert problems(root, "vision-import").startswith(f"{TRAINING}: a line is not commented out: from megatron")
    again()

    edit(root, TRAINING, lambda text: text.replace("@moc_patched.train  #", "@moc_patched.train_all  #"))
    assert f"{TRAINING}:" in problems(root, "steps") and "this line was edited" in problems(root, "steps")
    again()

    # The structure went after the patch came.
    edit(root, TRAINING, lambda text: text.replace("def train_step(", "def step("))
    assert "train_step: expected this function" in problems(root, "steps")
    again()

    # Somebody took the marks away.
    edit(root, "megatron/__init__.py", lambda text: re.sub(r"  # moc-ckpt\+.*", "", text))
    assert "the same lines without marks" in problems(root, "apex")
    again()

    # By a version that knew another patch.
    base, _ = parse(patched["megatron/__init__.py"])
    (root / "megatron/__init__.py").write_bytes(render(base, [Hunk("of-old", 1, ("import os",))]))
    assert statuses(root)["of-old"] == HALF_APPLIED
    assert revert(root, "of-old").names == ("of-old",)
    again()

    revert(root)
    assert read(root) == original


def test_edits_stay_when_the_patch_goes(root: Path) -> None:
    def edited(text: str) -> str:
        text = text.replace("def train_step(", "# about steps\ndef train_step(", 1)
        text = text.replace("for _ in range(10):", "for _ in range(20):")
        return text.replace("import torch\n", "import torch\nimport os\n", 1) + "\nDONE = True\n"

    edit(root, TRAINING, edited)
    wanted = read(root)
    (root / TRAINING).write_bytes(sources()[TRAINING])
    apply(root)
    edit(root, TRAINING, edited)
    revert(root)
    assert read(root) == wanted


def test_an_edit_of_an_inserted_line_is_not_lost(root: Path) -> None:
    apply(root)
    edit(root, TRAINING, lambda text: text.replace("@moc_patched.train  #", "@moc_patched.train_all  #"))
    before = read(root)
    with pytest.raises(StorageError, match="was edited, and the edit would be lost") as caught:
        tree(root).revert()
    number = int(caught.value.where.rpartition(":")[2])
    assert "train_all" in (root / TRAINING).read_text().splitlines()[number - 1]
    assert read(root) == before
    # As the message says.
    edit(root, TRAINING, lambda text: re.sub(r"(@moc_patched.train_all)  # .*", r"\1", text))
    revert(root)
    assert "@moc_patched.train_all\ndef train(" in (root / TRAINING).read_text()


def test_a_revert_that_would_break_the_file_is_refused(root: Path) -> None:
    apply(root, "fused-kernels")
    edit(root, "megatron/fused_kernels/__init__.py", lambda text: text[: text.index("    flags")] + "\n")
    edit(root, "megatron/fused_kernels/__init__.py", lambda text: text.replace("    # How to compile.\n", ""))
    before = read(root)
    with pytest.raises(StorageError, match="would not be Python"):
        tree(root).revert()
    assert read(root) == before


# ------------------------------------------------------------------------------------------------ files


def test_what_may_not_be_replaced_is_refused_before_anything_is_touched(root: Path, tmp_path: Path) -> None:
    before = read(root)

    def refused(match: str) -> None:
        with pytest.raises(StorageError, match=match):
            tree(root).apply()
        assert read(root) == before

    language = root / "megatron/model/language_model.py"
    language.chmod(0o444)
    refused("the file is read-only")
    language.chmod(0o644)

    language.parent.chmod(0o555)
    refused("the directory is read-only")
    language.parent.chmod(0o755)

    elsewhere = tmp_path / "elsewhere.py"
    language.rename(elsewhere)
    language.symlink_to(elsewhere)
    refused("the file is a symbolic link")
    language.unlink()
    elsewhere.rename(language)

    model = root / "megatron/model"
    model.rename(tmp_path / "model")
    model.symlink_to(tmp_path / "model")
    before = read(root)
    refused("its directory is a symbolic link")

    # A link that leads to the tree as a whole is fine.
    model.unlink()
    (tmp_path / "model").rename(model)
    (tmp_path / "link").symlink_to(root)
    apply(tmp_path / "link")
    assert set(statuses(root).values()) == {APPLIED}


def test_modes_stay(root: Path) -> None:
    (root / TRAINING).chmod(0o750)
    apply(root)
    assert stat.S_IMODE((root / TRAINING).stat().st_mode) == 0o750
    revert(root)
    assert stat.S_IMODE((root / TRAINING).stat().st_mode) == 0o750


def test_all_files_change_or_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(root)
    change = tree(root).apply()
    assert len(change.after) > 5
    original, calls = Path.replace, iter(range(100))

    def failing(self: Path, target: Path) -> Path:
        if next(calls) == 3:
            raise OSError(28, "No space left on device", str(target))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(StorageError, match="No space left"):
        do(root, change)
    assert read(root) == before
    monkeypatch.undo()

    # Somebody edits the tree between reading and writing.
    (root / TRAINING).write_bytes(before[TRAINING] + b"\n# mine\n")
    before = read(root)
    with pytest.raises(StorageError, match="meanwhile"):
        do(root, change)
    assert read(root) == before


def test_what_is_no_tree(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tree of megatron-deepspeed: there is no megatron/training\.py"):
        tree(tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        tree(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no patch 'step'"):
        tree(root).apply(["step"])


# ------------------------------------------------------------------------------------------------ the real ones


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Path]:
    if not REAL:
        pytest.skip("MEGATRON_DEEPSPEED_DIR names no checkout of Megatron-DeepSpeed")
    shutil.copytree(Path(REAL) / "megatron", tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    yield tmp_path


def test_real_checkout(real: Path) -> None:
    if "applied" in statuses(real).values():
        pytest.skip("MEGATRON_DEEPSPEED_DIR is patched already")
    before = read(real)
    found = statuses(real)
    assert set(found.values()) <= {APPLICABLE, NOT_NEEDED}, found
    apply(real)
    assert set(statuses(real).values()) <= {APPLIED, NOT_NEEDED}
    for file, content in read(real).items():
        if content != before[file]:
            compile(content, file, "exec")
    assert apply(real).after == {}
    for name in NAMES[::2]:
        revert(real, name)
    revert(real)
    assert read(real) == before


@pytest.fixture
def deepspeed(tmp_path: Path) -> Path:
    import importlib.util

    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("deepspeed is not installed")
    package = Path(spec.origin).parent
    for file in ("__init__.py", "runtime/engine.py", "runtime/config.py"):
        (tmp_path / "deepspeed" / file).parent.mkdir(exist_ok=True)
        shutil.copy(package / file, tmp_path / "deepspeed" / file)
    shutil.copytree(package / "runtime/checkpoint_engine", tmp_path / "deepspeed/runtime/checkpoint_engine")
    return tmp_path


def test_deepspeed_loads_a_named_engine(deepspeed: Path) -> None:
    import importlib.util

    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    before = read(deepspeed)
    do(deepspeed, Tree(DEEPSPEED, deepspeed).apply())
    assert [state.status for state in Tree(DEEPSPEED, deepspeed).states()] == [APPLIED]
    # The patched module, as a part of the installed package.
    spec = importlib.util.spec_from_file_location(
        "deepspeed.runtime.checkpoint_engine.utils_patched", deepspeed / "deepspeed/runtime/checkpoint_engine/utils.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Config:
        datastates_config = type("D", (), {"enabled": False})

        def __init__(self, **section: object) -> None:
            self._param_dict = {"checkpoint": section} if section else {}
            self.checkpoint_config = {"writer": None, "checkpoint_serialization": True}

    def create(config: object) -> object:
        return module.create_checkpoint_engine(config, None, 2, True, False)

    assert type(create(None)) is type(create(Config())) is type(create(Config(tag_validation="WARN")))
    assert type(create(None)) is TorchCheckpointEngine
    config = Config(engine=f"{__name__}:NamedEngine", engine_config={"rate": 3})
    engine = create(config)
    assert type(engine).__name__ == "NamedEngine"
    assert engine.config is config and engine.rate == 3
    for wrong in ("no_such_module:X", f"{__name__}:Nothing", __name__, 5, ":X", "os:"):
        with pytest.raises(ValueError, match=re.escape(f"not {wrong!r}")):
            create(Config(engine=wrong))
    for other in ("os:getcwd", "pathlib:Path"):
        with pytest.raises(TypeError, match="no subclass of CheckpointEngine"):
            create(Config(engine=other))

    do(deepspeed, Tree(DEEPSPEED, deepspeed).revert())
    assert read(deepspeed) == before


def __getattr__(name: str) -> object:
    if name != "NamedEngine":
        raise AttributeError(name)
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class NamedEngine(TorchCheckpointEngine):
        def __init__(self, config_params: object, rate: int) -> None:
            super().__init__(config_params)
            self.config, self.rate = config_params, rate

    return NamedEngine


def test_deepspeed_structure_not_found(deepspeed: Path) -> None:
    factory = deepspeed / "deepspeed/runtime/checkpoint_engine/utils.py"
    factory.write_text(factory.read_text().replace("def create_checkpoint_engine", "def make_engine"))
    (state,) = Tree(DEEPSPEED, deepspeed).states()
    assert state.status == NOT_FOUND and "create_checkpoint_engine: expected this function" in state.note


def test_every_patch_is_described() -> None:
    for target in TARGETS.values():
        for patch in target.patches:
            assert re.fullmatch(r"[a-z0-9-]+", patch.name) and patch.why and patch.does
