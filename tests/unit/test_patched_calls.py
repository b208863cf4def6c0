"""What patched trees call is what the launcher does: the same names, the same functions."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from types import ModuleType
from typing import Any

import pytest

from moc_ckpt.integrations.megatron_deepspeed import patched
from moc_ckpt.patching import megatron_fixes, megatron_hooks
from moc_ckpt.patching.targets import MEGATRON_DEEPSPEED

hooks = pytest.importorskip("moc_ckpt.integrations.megatron_deepspeed.hooks")
shims = pytest.importorskip("moc_ckpt.integrations.megatron_deepspeed.shims")

LAUNCHER = "moc_ckpt.integrations.megatron_deepspeed.launcher"
ROOM = "moc_ckpt.integrations.megatron_deepspeed"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the launcher, which other tests may have imported."""
    monkeypatch.delitem(sys.modules, LAUNCHER, raising=False)


def test_every_concern_of_the_launcher_has_its_patch() -> None:
    assert {patch.name for patch in MEGATRON_DEEPSPEED.patches} == {each.name for each in (*hooks.HOOKS, *shims.SHIMS)}


def test_every_call_that_is_inserted_exists() -> None:
    text = inspect.getsource(megatron_hooks) + inspect.getsource(megatron_fixes)
    called = set(re.findall(r"moc_patched\.([a-z_]+)", text))
    assert called and called <= set(patched.__all__)


def test_the_stand_ins_cover_the_same() -> None:
    from moc_ckpt.integrations.megatron_deepspeed.shims import apex

    assert (megatron_fixes._COVERED, megatron_fixes._OPTIONAL) == (apex._COVERED, apex._OPTIONAL)


@pytest.mark.parametrize(
    ("room", "change", "names"),
    [
        ("hooks", "_wrap_steps", ["setup_model_and_optimizer", "train_step", "train"]),
        ("hooks", "_wrap_save", ["save_checkpoint"]),
        ("hooks", "_wrap_load", ["load_checkpoint"]),
        ("shims.loader_rng", "_give_generators", ["build_pretraining_data_loader"]),
        ("shims.loader_rng", "_keep_generators", ["build_train_valid_test_data_iterators"]),
    ],
)
@pytest.mark.usefixtures("alone")
def test_decorators_do_what_the_hooks_do(
    room: str, change: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that a hook puts into a module, and the decorated one, have the same code."""
    import importlib

    engines: list[bool] = []
    monkeypatch.setattr(patched, "_change_engine", lambda: engines.append(True))
    module = ModuleType("like_megatron_training")
    originals: dict[str, Any] = {}
    for name in names:
        exec(f"def {name}(*args): return args", originals)
        setattr(module, name, originals[name])
    getattr(importlib.import_module(f"{ROOM}.{room}"), change)(module)
    for name in names:
        decorated = getattr(patched, name)(originals[name])
        assert decorated is not originals[name]
        assert decorated.__wrapped__ is originals[name] and decorated.__name__ == name
        assert decorated.__code__ is getattr(module, name).__code__
    assert bool(engines) is (names[0] in ("save_checkpoint", "load_checkpoint"))


@pytest.mark.usefixtures("alone")
def test_arguments_are_those_of_the_launcher() -> None:
    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    patched.arguments(ours)
    from moc_ckpt.integrations.megatron_deepspeed.arguments import add_arguments

    add_arguments(theirs)
    assert ours.format_help() == theirs.format_help()


def test_under_the_launcher_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LAUNCHER, ModuleType(LAUNCHER))

    def original() -> None:
        pass

    takes_parser = {"arguments", "masked_softmax_fusion"}
    parser = argparse.ArgumentParser()
    before = parser.format_help()
    for name in takes_parser:
        getattr(patched, name)(parser)
    assert parser.format_help() == before and parser.get_default("masked_softmax_fusion") is None
    patched.apex()
    assert "apex" not in sys.modules
    for name in set(patched.__all__) - takes_parser - {"apex"}:
        assert getattr(patched, name)(original) is original
