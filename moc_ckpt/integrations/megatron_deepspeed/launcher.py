"""Decides which concerns apply to a checkout, says so once, and installs them."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moc_ckpt.errors import ConfigError, UnsupportedError
from moc_ckpt.integrations.deepspeed.hooks import log_to_stderr
from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine
from moc_ckpt.integrations.megatron_deepspeed.hooks import HOOKS
from moc_ckpt.integrations.megatron_deepspeed.shims import SHIMS

__all__ = ["ENVIRONMENT", "Decision", "decide", "install", "switched_off", "table"]

logger = logging.getLogger("moc_ckpt")

#: Names of shims that are off, as --moc-no-shim has them.
ENVIRONMENT = "MOC_NO_SHIM"
_ALL = "all"
# What a checkout imports and pip has; nothing here stands in for it.
_PACKAGES = {"transformers": "transformers", "six": "six", "regex": "regex", "nltk": "nltk", "pybind11": "pybind11"}


@dataclass(frozen=True, slots=True)
class Decision:
    """One concern of one checkout.

    Attributes:
        concern: the shim or hook.
        finding: what it found.
        off: it was switched off.
    """

    concern: Concern
    finding: Finding
    off: bool

    @property
    def status(self) -> str:
        """In a word: `on`, `off`, `not needed` or `NOT FOUND`."""
        if self.off:
            return "off"
        return {"needed": "on", "not needed": "not needed", "not found": "NOT FOUND"}[self.finding.state]


def switched_off(names: Iterable[str]) -> frozenset[str]:
    """Returns the names of the shims that are off, by the command line or the environment.

    Args:
        names: values of --moc-no-shim, each a name, several with commas between, or `all`.

    Raises:
        ConfigError: if there is no such shim.
    """
    given = [name.strip() for value in (*names, os.environ.get(ENVIRONMENT, "")) for name in value.split(",")]
    known = [shim.name for shim in SHIMS]
    wrong = [name for name in given if name and name not in (*known, _ALL)]
    if wrong:
        raise ConfigError(
            f"there is no shim {wrong[0]!r}",
            where=f"--moc-no-shim, or the environment variable {ENVIRONMENT}",
            fix=f"known are {', '.join(known)}, and {_ALL}",
        )
    return frozenset(known) if _ALL in given else frozenset(name for name in given if name)


def decide(checkout: Checkout, off: Collection[str], machine: Machine | None = None) -> list[Decision]:
    """Returns what becomes of every concern; imports nothing of the checkout."""
    machine = machine or Machine()
    return [Decision(each, each.find(checkout, machine), each.name in off) for each in (*HOOKS, *SHIMS)]


def table(decisions: Iterable[Decision]) -> str:
    """Returns a table of the decisions, for people."""
    rows = [("kind", "name", "status", "because")]
    notes = []
    for each in decisions:
        kind = "shim" if each.concern.optional else "hook"
        rows.append((kind, each.concern.name, each.status, each.finding.note))
        notes.append((each.concern.name, each.concern))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in rows
    ]
    lines.append("")
    for name, concern in notes:
        text = f"{name}: {concern.why} (since {concern.since}). Replaces {concern.replaces}."
        lines += textwrap.wrap(text.replace(" (since -)", ""), 110, subsequent_indent="    ")
    return "\n".join(lines)


def install(checkout: Checkout, off: Collection[str], machine: Machine | None = None) -> list[Decision]:
    """Installs what the checkout needs. Called before anything of the checkout is imported.

    Raises:
        UnsupportedError: if code that would be replaced is not what was expected, or a package is missing.
    """
    machine = machine or Machine()
    decisions = decide(checkout, off, machine)
    lost = [each for each in decisions if each.status == "NOT FOUND"]
    if lost:
        optional = [each.concern.name for each in lost if each.concern.optional]
        fix = "use a checkout that has it"
        if len(optional) == len(lost):
            fix += f", or if this one does not need it, --moc-no-shim {','.join(optional)}"
        raise UnsupportedError(
            "; ".join(f"{each.concern.name}: {each.finding.note}" for each in lost), where=str(checkout.root), fix=fix
        )
    _check_packages(checkout, machine)
    for each in decisions:
        if each.status == "on":
            each.concern.install(checkout)
    if os.environ.get("RANK", "0") == "0":
        log_to_stderr()
        for each in decisions:
            if each.concern.optional and each.status != "not needed":
                logger.info("shim %s %s: %s", each.concern.name, each.status, each.finding.note)
    return decisions


def _check_packages(checkout: Checkout, machine: Machine) -> None:
    used = {
        name.split(".")[0]
        for module in ("megatron.tokenizer.tokenizer", "megatron.tokenizer.gpt2_tokenization")
        for name in checkout.imports(module)
    }
    missing = [pip for name, pip in _PACKAGES.items() if name in used and not machine.has(name)]
    if missing:
        raise UnsupportedError(
            f"the checkout imports packages that are not installed: {', '.join(missing)}",
            where=str(checkout.root),
            fix=f"pip install {' '.join(missing)}",
        )
