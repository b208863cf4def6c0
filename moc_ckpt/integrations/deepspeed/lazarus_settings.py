"""The section `lazarus` of a ds_config."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.replicas import State

__all__ = ["LAZARUS_KEY", "LazarusSettings", "read_settings"]

LAZARUS_KEY = "lazarus"
"""Section of a ds_config."""


@dataclass(frozen=True, slots=True)
class LazarusSettings:
    """How replicated experts are trained, and when another placement is planned.

    Attributes:
        optimizer_state: `replicated`: every holder has all state of an expert; `sharded`: the holders share it out.
        rebalance_interval: steps between two decisions about another placement; 0 for none.
        fault_threshold: nodes (on a single node: ranks) that a plan puts every expert on at least.
        restart_s: seconds that a restart takes, which a plan has to save.
        bandwidth_gb_s: 10^9 bytes per second that a node sends, and receives at the same time.
    """

    optimizer_state: State = "replicated"
    rebalance_interval: int = 0
    fault_threshold: int = 1
    restart_s: float = 60.0
    bandwidth_gb_s: float = 10.0


def read_settings(settings: Mapping[str, Any]) -> LazarusSettings:
    """Returns the section of a ds_config.

    Raises:
        ConfigError: for a wrong value, or an unknown key of the section.
    """
    section = settings.get(LAZARUS_KEY, {})
    known = [field.name for field in fields(LazarusSettings)]
    unknown = [key for key in section if key not in known] if isinstance(section, Mapping) else [str(section)]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        raise ConfigError(
            f"unknown key {LAZARUS_KEY}.{unknown[0]}",
            where=f"ds_config, key {LAZARUS_KEY!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}",
        )
    found = LazarusSettings(**section)
    wrong = {
        "optimizer_state": (
            found.optimizer_state not in get_args(State),
            f"choose {' or '.join(get_args(State))}",
        ),
        "rebalance_interval": (
            not _is_count(found.rebalance_interval, 0),
            "give a number of steps, or 0 for no rebalancing",
        ),
        "fault_threshold": (not _is_count(found.fault_threshold, 1), "give a number of nodes, 1 or more"),
        "restart_s": (not _is_number(found.restart_s), "give seconds, 0 or more"),
        "bandwidth_gb_s": (
            not _is_number(found.bandwidth_gb_s) or found.bandwidth_gb_s == 0,
            "give 10^9 bytes per second, more than 0",
        ),
    }
    for name, (refused, fix) in wrong.items():
        if refused:
            raise ConfigError(f"{LAZARUS_KEY}.{name} is {getattr(found, name)!r}", where="ds_config", fix=fix)
    return found


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
