"""`--moc-*` arguments, derived from the configuration's model so that they cannot diverge from it."""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moc_ckpt.config import CONFIG_KEY, MocConfig, parse_config
from moc_ckpt.errors import ConfigError

__all__ = ["Option", "add_arguments", "merge", "options"]

# A null on the command line; None is "not given".
_NULLS = ("null", "none")


@dataclass(frozen=True, slots=True)
class Option:
    """One key of the configuration as a command-line option.

    Attributes:
        path: of the key, such as `("storage", "keep_last")`.
        field: its declaration.
    """

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def dest(self) -> str:
        """Name in the parsed arguments."""
        return "_".join(("moc", *self.path))

    @property
    def flag(self) -> str:
        """The option string."""
        return "--" + self.dest.replace("_", "-")

    @property
    def off_flag(self) -> str:
        """The option string that turns a switch off."""
        return "--" + "_".join(("moc", "no", *self.path)).replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Tells whether it takes no value."""
        return self.field.annotation is bool

    def value(self, text: str) -> Any:
        """Returns what the text on the command line means; the model checks it afterwards."""
        kinds = _kinds(self.field.annotation)
        if type(None) in kinds and text.lower() in _NULLS:
            return None
        if kinds & {int, float, bool}:
            try:
                number = json.loads(text)
            except ValueError:
                return text
            return number if isinstance(number, int | float) else text
        return text


def options() -> Iterator[Option]:
    """Yields an option for every key of the configuration."""
    yield from _options(MocConfig, ())


def _options(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _options(annotation, (*path, name))
        else:
            yield Option((*path, name), field)


def _kinds(annotation: Any) -> set[type]:
    """Returns the types that an annotation consists of; those of the values, where it lists values."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        parts = typing.get_args(annotation)
        return set().union(*map(_kinds, parts[:1] if origin is typing.Annotated else parts))
    return {annotation} if isinstance(annotation, type) else set()


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds all options to a parser, in a group of their own; what is not given is None."""
    group = parser.add_argument_group(
        title="moc_ckpt", description=f"override the keys of {CONFIG_KEY!r} in the ds_config"
    )
    for option in options():
        text = (option.field.description or "").replace("%", "%%")
        if option.is_switch:
            group.add_argument(option.flag, dest=option.dest, action="store_const", const=True, help=text)
            group.add_argument(
                option.off_flag, dest=option.dest, action="store_const", const=False, help=argparse.SUPPRESS
            )
        else:
            group.add_argument(option.flag, dest=option.dest, type=str, metavar="VALUE", help=text)
    return parser


def merge(
    section: Any, arguments: argparse.Namespace, *, save: str | None, own_signal: bool = False
) -> dict[str, Any] | None:
    """Returns the section of a ds_config with the arguments over it.

    Args:
        section: what the ds_config has under the key; None if nothing.
        arguments: the parsed arguments.
        save: the script's own `--save`: where automatic checkpoints go unless `save_dir` says otherwise.
        own_signal: the script handles SIGTERM itself, so `preempt_save` is off unless something says otherwise.

    Returns:
        The section; None if neither the ds_config nor the arguments have anything.

    Raises:
        ConfigError: naming the option, if the result is not a valid configuration.
    """
    if section is not None and not isinstance(section, Mapping):
        parse_config(section)  # raises
    given = {option: getattr(arguments, option.dest, None) for option in options()}
    given = {option: value for option, value in given.items() if value is not None}
    if section is None and not given:
        return None
    result = json.loads(json.dumps(dict(section or {})))
    for option, raw in given.items():
        place = result
        for part in option.path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                parse_config(result)  # raises
        place[option.path[-1]] = option.value(raw) if isinstance(raw, str) else raw
    if result.get("enabled") and result.get("save_dir") is None and save:
        result["save_dir"] = save
    if result.get("enabled") and own_signal:
        result.setdefault("preempt_save", False)
    try:
        parse_config(result)
    except ConfigError as error:
        flags = ", ".join(option.flag for option in given)
        where = f"{error.where}; arguments given: {flags}" if flags else error.where
        raise ConfigError(error.what, where=where, fix=error.fix) from None
    return result
