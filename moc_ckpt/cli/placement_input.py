"""What `moc-ckpt placement` is given: loads, replicas, racks, an old plan."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc_ckpt.cli.common import choose_tag
from moc_ckpt.errors import ConfigError, MocError
from moc_ckpt.events import EventKind, read_events
from moc_ckpt.lazarus.types import Placement
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.storage.checkpoint import load_manifest
from moc_ckpt.storage.store import open_store

__all__ = [
    "PlannedPlacements",
    "parse_numbers",
    "parse_racks",
    "read_checkpoint",
    "read_loads",
    "read_plan",
    "read_planned",
    "skewed",
]

_KEYS = ("loads", "processed")


def parse_numbers(text: str, option: str) -> list[int]:
    """Returns whole numbers of a list such as `5,3,1,1`.

    Raises:
        ConfigError: if it is not such a list.
    """
    try:
        return [int(item) for item in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}", where=option, fix="give whole numbers, such as 5,3,1,1") from None


def read_loads(text: str) -> list[list[float]]:
    """Returns the loads of each MoE layer: those of a list, or of a file.

    Args:
        text: numbers with commas, or the path of a file: JSON (a list, a list of lists, or an object with `loads` or
            `processed`), or text with one line of numbers for each layer.

    Raises:
        ConfigError: if it is neither.
    """
    path = Path(text)
    if not os.path.isfile(text):  # noqa: PTH113 (Path.is_file raises where a list is longer than a name may be)
        try:
            return [list(map(_number, text.replace(",", " ").split()))]
        except ConfigError:
            if any(char.isalpha() or char in "/\\" for char in text):
                what = f"there is no file {text!r}"
                raise ConfigError(what, where="--loads", fix="give numbers, or a file of them") from None
            raise
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the loads cannot be read: {error}", where=f"--loads {text}") from None
    if content.lstrip()[:1] not in ("[", "{"):
        lines = [line.partition("#")[0].replace(",", " ").split() for line in content.splitlines()]
        found: Any = [line for line in lines if line]
    else:
        try:
            found = json.loads(content)
        except ValueError as error:
            raise ConfigError(f"the loads are not JSON: {error}", where=f"--loads {text}") from None
    if isinstance(found, dict):
        found = next((found[key] for key in _KEYS if key in found), None)
    if isinstance(found, list) and found and not isinstance(found[0], list):
        found = [found]
    if not isinstance(found, list) or not found or not all(isinstance(layer, list) for layer in found):
        raise ConfigError(
            "the file has no loads",
            where=f"--loads {text}",
            fix='give a list, a list of lists, or an object with "loads"',
        )
    return [list(map(_number, layer)) for layer in found]


def _number(item: Any) -> float:
    if isinstance(item, int | float) and not isinstance(item, bool):
        return item
    try:
        return int(item)
    except (TypeError, ValueError):
        pass
    try:
        return float(item)
    except (TypeError, ValueError):
        raise ConfigError(f"a load is {item!r}", where="--loads", fix="give numbers of tokens") from None


def read_checkpoint(url: str, tag: str | None) -> list[list[float]]:
    """Returns per MoE layer the tokens that each expert processed, from the ledger of a checkpoint.

    Raises:
        CheckpointNotFoundError: if there is none.
        ConfigError: if it has no ledger.
    """
    store = open_store(url)
    manifest = load_manifest(store, choose_tag(store, tag))
    if manifest.ledger is None:
        raise ConfigError(
            "the checkpoint has no ledger of routed tokens",
            where=f"{manifest.tag} in {store.url}",
            fix="give --loads: the checkpoint has no MoE layers, or is from an older version",
        )
    return [[int(count) for count in layer] for layer in Ledger.from_data(manifest.ledger).processed]


@dataclass(frozen=True, slots=True)
class PlannedPlacements:
    """A placement that a run wants after a restart.

    Attributes:
        step: at which it was decided.
        ranks_per_node: as of `history.plan_rebalance`.
        placements: of ranks, for each MoE layer.
    """

    step: int
    ranks_per_node: int
    placements: tuple[Placement, ...]


def read_planned(url: str) -> PlannedPlacements | None:
    """Returns what the newest REBALANCE_PLANNED event of a directory says; None if there is none.

    Raises:
        ConfigError: if it cannot be read.
    """
    found = [event for event in read_events(open_store(url)) if event.event == EventKind.REBALANCE_PLANNED.value]
    if not found:
        return None
    event = found[-1]
    try:
        placements = tuple(
            Placement(1 + max(map(max, slots)), tuple(tuple(map(int, held)) for held in slots))
            for slots in event.fields["placements"]
        )
        return PlannedPlacements(int(event.step or 0), int(event.fields["ranks_per_node"]), placements)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the event {EventKind.REBALANCE_PLANNED.value} of step {event.step} cannot be read: {error}",
            where=f"events of {url}, node {event.node}",
            fix="give loads instead of the directory",
        ) from None


def skewed(ratio: float, experts: int) -> list[list[float]]:
    """Returns loads of one layer in which one expert has `ratio` times the mean, and the others the rest alike.

    Raises:
        ConfigError: if that is not possible.
    """
    if experts < 1 or not 1 <= ratio <= experts:
        raise ConfigError(
            f"--skew {ratio:g} of {experts} experts",
            where="--skew, --experts",
            fix="give a ratio from 1 (all alike) to the number of experts (one gets everything)",
        )
    scale = 1_000_000
    first = round(ratio * scale)
    rest = experts * scale - first
    return [
        [
            first,
            *((rest * (index + 1)) // (experts - 1) - rest * index // (experts - 1) for index in range(experts - 1)),
        ]
    ]


def parse_racks(text: str, nodes: int) -> tuple[int, ...]:
    """Returns the failure domain of each node.

    Args:
        text: one number of equal racks of consecutive nodes, or the rack of each node with commas.
        nodes: N.

    Raises:
        ConfigError: if it is neither.
    """
    numbers = parse_numbers(text, "--racks")
    if len(numbers) == 1 and nodes > 1:
        racks = numbers[0]
        if not 1 <= racks <= nodes:
            raise ConfigError(f"{racks} racks for {nodes} nodes", where="--racks", fix=f"give 1 to {nodes}")
        return tuple(node * racks // nodes for node in range(nodes))
    if len(numbers) != nodes:
        raise ConfigError(
            f"--racks names the racks of {len(numbers)} nodes, and there are {nodes}",
            where="--racks",
            fix="give the number of racks, or one rack for each node",
        )
    names = {name: index for index, name in enumerate(sorted(set(numbers)))}
    return tuple(names[name] for name in numbers)


def read_plan(path: Path) -> dict[int, Placement]:
    """Returns the placements of an earlier `moc-ckpt placement --json` by MoE layer.

    Raises:
        ConfigError: if the file is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        layers: Sequence[Any] = data.get("layers", [data])
        # A plan that was itself a migration: its nodes have taken their places since.
        moved = data.get("migration", {}).get("placement")
        slots = moved if moved is not None else [layer["placement"] for layer in layers]
        found = {
            int(layer.get("layer", ordinal)): Placement(
                len(layer["replicas"]), tuple(tuple(map(int, held)) for held in held_by_node)
            )
            for ordinal, (layer, held_by_node) in enumerate(zip(layers, slots, strict=True))
        }
        if not found:
            raise ValueError("it has no MoE layer")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MocError) as error:
        what = error.what if isinstance(error, MocError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the old plan cannot be read: {what}",
            where=f"--old {path}",
            fix="give what an earlier `moc-ckpt placement --json` printed",
        ) from None
