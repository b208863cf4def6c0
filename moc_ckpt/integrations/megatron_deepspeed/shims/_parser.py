"""Changes to the parser of `megatron.arguments.parse_args`, shared by what needs one."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Finding, after_import, not_found, require

__all__ = ["change_parser", "needs_provider", "set_default"]

MODULE = "megatron.arguments"


def needs_provider(checkout: Checkout) -> Finding | None:
    """Returns why the parser cannot be reached; None if it can."""
    missing = require(checkout, MODULE, "parse_args")
    if missing is not None:
        return missing
    found = checkout.find(MODULE, "parse_args")
    assert found is not None
    if "extra_args_provider" not in [argument.arg for argument in found.args.args]:
        return not_found(f"{MODULE}.parse_args takes no extra_args_provider")
    return None


def change_parser(change: Callable[[argparse.ArgumentParser], object]) -> None:
    """Lets `change` see the parser after all of the script's own arguments were added."""

    def wrap(module: ModuleType) -> None:
        original = module.parse_args

        @functools.wraps(original)
        def parse_args(extra_args_provider: Any = None, *args: Any, **kwargs: Any) -> Any:
            def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
                if extra_args_provider is not None:
                    parser = extra_args_provider(parser)
                change(parser)
                return parser

            return original(provider, *args, **kwargs)

        module.parse_args = parse_args  # type: ignore[attr-defined]

    after_import(MODULE, wrap)


def set_default(dest: str, value: object) -> None:
    """Gives an argument another default; what the command line says still counts."""
    change_parser(lambda parser: parser.set_defaults(**{dest: value}))
