"""`--moc-*` arguments follow the configuration's model, and override the ds_config."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from pydantic import BaseModel

from moc_ckpt.config import MocConfig, parse_config
from moc_ckpt.errors import ConfigError
from moc_ckpt.integrations.megatron_deepspeed.arguments import add_arguments, merge, options


def parse(*words: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)


def section(*words: str, base: Any = None, save: str | None = None) -> Any:
    return merge(base, parse(*words), save=save)


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for name, value in model().model_dump().items():
        sub = model.model_fields[name].annotation
        found |= leaves(sub, (*path, name)) if isinstance(value, dict) else {(*path, name)}  # type: ignore[arg-type]
    return found


def test_there_is_an_option_for_every_key_and_no_other() -> None:
    assert {option.path for option in options()} == leaves(MocConfig)
    flags = [option.flag for option in options()]
    assert len(set(flags)) == len(flags)
    assert {"--moc-enabled", "--moc-k-persist", "--moc-max-plt", "--moc-storage-keep-last"} <= set(flags)


def test_every_default_can_be_written_as_an_option() -> None:
    default = MocConfig().model_dump()
    for option in options():
        value = default
        for part in option.path:
            value = value[part]
        if option.is_switch:
            words = [option.flag if value else option.off_flag]
        else:
            words = [option.flag, "null" if value is None else str(value)]
        result: Any = section(*words)
        assert parse_config(result) == MocConfig(), option.flag


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--moc-enabled"], {"enabled": True}),
        (["--moc-no-enabled"], {"enabled": False}),
        (["--moc-k-persist", "3"], {"k_persist": 3}),
        (["--moc-k-persist", "auto"], {"k_persist": "auto"}),
        (["--moc-max-plt", "0.01"], {"max_plt": 0.01}),
        (["--moc-save-dir", "12"], {"save_dir": "12"}),
        (["--moc-plt-total-tokens", "1e9"], {"plt_total_tokens": 1e9}),
        (["--moc-mtbf-s", "null"], {"mtbf_s": None}),
        (["--moc-host-linger-s", "5", "--moc-host-on-busy", "wait"], {"host": {"linger_s": 5, "on_busy": "wait"}}),
        (["--moc-no-recovery-memory"], {"recovery": {"memory": False}}),
    ],
)
def test_values(words: list[str], expected: dict[str, Any]) -> None:
    assert section(*words) == expected


def test_arguments_win_over_the_ds_config() -> None:
    base = {"enabled": True, "k_persist": 2, "host": {"linger_s": 9.0, "writer_threads": 3}}
    before = {**base, "host": dict(base["host"])}  # type: ignore[call-overload]
    merged = section("--moc-k-persist", "1", "--moc-host-linger-s", "1", base=base)
    assert merged == {"enabled": True, "k_persist": 1, "host": {"linger_s": 1, "writer_threads": 3}}
    assert base == before, "the ds_config was changed"
    assert section(base=base) == base
    assert section() is None


def test_save_dir_is_where_the_script_saves() -> None:
    assert section("--moc-enabled", save="runs/a")["save_dir"] == "runs/a"
    assert section("--moc-enabled", "--moc-save-dir", "b", save="runs/a")["save_dir"] == "b"
    assert "save_dir" not in section("--moc-enabled")
    assert "save_dir" not in section("--moc-k-persist", "1", save="runs/a"), "it is not enabled"


def test_a_script_that_handles_the_signal_keeps_it() -> None:
    assert merge(None, parse("--moc-enabled"), save=None, own_signal=True) == {"enabled": True, "preempt_save": False}
    both = merge(None, parse("--moc-enabled", "--moc-preempt-save"), save=None, own_signal=True)
    assert both == {"enabled": True, "preempt_save": True}
    assert merge({"enabled": True}, parse(), save=None, own_signal=False) == {"enabled": True}


@pytest.mark.parametrize(
    "words",
    [
        ["--moc-k-persist", "0"],
        ["--moc-k-persist", "many"],
        ["--moc-selection", "best"],
        ["--moc-max-plt", "1"],
        ["--moc-k-snapshot", "1", "--moc-k-persist", "2"],
        ["--moc-storage-keep-last", "null"],
    ],
)
def test_wrong_values_are_refused_by_name(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[-2]):
        section(*words)


@pytest.mark.parametrize("base", [[], "on", {"host": 3}])
def test_a_section_of_another_kind_is_refused(base: Any) -> None:
    with pytest.raises(ConfigError):
        section("--moc-host-linger-s", "3", base=base)


def test_unknown_keys_of_the_ds_config_are_refused_too() -> None:
    with pytest.raises(ConfigError, match="k_persists"):
        section("--moc-enabled", base={"k_persists": 1})
