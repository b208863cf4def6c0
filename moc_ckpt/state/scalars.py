"""Scalar state of the optimizer, made layout-free: hyper-parameters and step counts per parameter name.

ZeRO keeps one `step` per flat partition, a raw optimizer one per parameter, FusedAdam one per group.
A record therefore says, for a set of parameters, what their group's options and their own scalars are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from moc_ckpt.errors import ModelMismatchError
from moc_ckpt.state.catalog import Catalog
from moc_ckpt.state.plain import encode_plain

__all__ = [
    "LAYOUT_KEYS",
    "CapturedScalars",
    "ScalarReader",
    "ScalarRecord",
    "apply_scalars",
    "collect_scalars",
    "index_scalars",
    "join_scalars",
]

logger = logging.getLogger(__name__)

ScalarRecord = dict[str, Any]
"""`{"fqns": [...], "options": {...}, "scalars": {...}}`, plain data."""

# What names the group, or picks an implementation, belongs to the run that loads, not to the training.
LAYOUT_KEYS = frozenset({"params", "name", "moe", "foreach", "fused", "capturable", "differentiable"})
"""Options of a param group that no record has."""


class CapturedScalars(NamedTuple):
    """What `ScalarReader.capture` copied: per set of parameters (group, names, scalars), and the options per group."""

    scalars: list[tuple[int, list[str], dict[str, Any]]]
    options: dict[int, dict[str, Any]]


class ScalarReader:
    """Reads the scalars of a catalog's parameters, as often as wanted; not collective.

    Looking at every parameter takes milliseconds in a large model, so what to read is found once: under ZeRO it is
    one set per flat partition.

    Args:
        catalog: this rank's catalog; the reader is of no use once the optimizer's tensors were replaced.
        state_of: returns the optimizer's state under a key.
    """

    def __init__(self, catalog: Catalog, state_of: Callable[[torch.Tensor], Mapping[str, Any]]) -> None:
        self._state_of = state_of
        self._groups = catalog.groups
        self._kinds = catalog.moment_kinds
        found: dict[tuple[int, int], tuple[int, torch.Tensor, list[str]]] = {}
        for shard in catalog.shards:
            if shard.replicas[0] == catalog.rank:
                key = (shard.group, id(shard.state_key))
                found.setdefault(key, (shard.group, shard.state_key, []))[2].append(shard.fqn)
        self._sets = list(found.values())

    def capture(self) -> CapturedScalars:
        """Copies the values of this moment, those on a device without waiting for it."""
        scalars = [
            (
                group,
                names,
                {name: _copied(value) for name, value in self._state_of(key).items() if name not in self._kinds[group]},
            )
            for group, key, names in self._sets
        ]
        options = {
            group: {
                name: _copied(value) for name, value in self._groups[group].options.items() if name not in LAYOUT_KEYS
            }
            for group in {group for group, _, _ in self._sets}
        }
        return CapturedScalars(scalars, options)

    def records(self, captured: CapturedScalars) -> list[ScalarRecord]:
        """Turns captured values into records; may be called from any thread.

        Raises:
            NotPlainError: if a group has an option that is not plain data.
        """
        options = {group: _on_host(values) for group, values in captured.options.items()}
        for group, values in options.items():
            encode_plain(values, f"optimizer.param_groups[{group}]")
        records: dict[tuple[int, bytes], ScalarRecord] = {}
        for group, names, found in captured.scalars:
            values = _on_host(found)
            encoded = encode_plain(values, f"optimizer.state[{names[0]}]")
            record = records.setdefault((group, encoded), {"fqns": [], "options": options[group], "scalars": values})
            record["fqns"].extend(names)
        return list(records.values())


def collect_scalars(catalog: Catalog, state_of: Callable[[torch.Tensor], Mapping[str, Any]]) -> list[ScalarRecord]:
    """Returns the records of the parameters of which this rank is the first replica.

    Args:
        catalog: this rank's catalog.
        state_of: returns the optimizer's state under a key.

    Raises:
        NotPlainError: if a group has an option that is not plain data.
    """
    reader = ScalarReader(catalog, state_of)
    return reader.records(reader.capture())


def index_scalars(records: Iterable[ScalarRecord]) -> dict[str, ScalarRecord]:
    """Returns the record of each parameter name."""
    return {fqn: record for record in records for fqn in record["fqns"]}


def join_scalars(records: Iterable[ScalarRecord]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options and the scalars of parameters that share one flat partition.

    Args:
        records: those of all of the parameters; at least one.

    Raises:
        ModelMismatchError: if they differ in more than the step count.
    """
    distinct: list[ScalarRecord] = []
    for record in records:
        if all(record is not other for other in distinct):
            distinct.append(record)
    options, scalars = (
        {name: _latest(name, [record[part].get(name) for record in distinct]) for name in distinct[0][part]}
        for part in ("options", "scalars")
    )
    return options, scalars


def apply_scalars(
    catalog: Catalog,
    records: Mapping[str, ScalarRecord],
    state_of: Callable[[torch.Tensor], dict[str, Any]],
    *,
    check_only: bool = False,
) -> None:
    """Restores options and scalars into this rank's optimizer.

    Args:
        catalog: this rank's catalog.
        records: from `index_scalars`; parameters that it lacks are left alone.
        state_of: returns the optimizer's live state under a key.
        check_only: raise what would be raised, but touch nothing.

    Raises:
        ModelMismatchError: if parameters of one group had different options when they were saved.
    """
    by_group: dict[int, list[ScalarRecord]] = {}
    by_key: dict[int, tuple[torch.Tensor, list[ScalarRecord]]] = {}
    for shard in catalog.shards:
        record = records.get(shard.fqn)
        if record is None:
            continue
        known = by_group.setdefault(shard.group, [])
        if all(record is not other for other in known):
            known.append(record)
        sources = by_key.setdefault(id(shard.state_key), (shard.state_key, []))[1]
        if all(record is not other for other in sources):
            sources.append(record)
    for index, found in by_group.items():
        first = found[0]
        for other in found[1:]:
            differ = [
                name for name in first["options"] if not _equal(first["options"][name], other["options"].get(name))
            ]
            # `step` is a count, not an option, though FusedAdam keeps it there.
            differ = [name for name in differ if name != "step"]
            if differ:
                raise ModelMismatchError(
                    f"param group {index} joins parameters that were saved with different {', '.join(differ)}",
                    where=f"{first['fqns'][0]} and {other['fqns'][0]}",
                    fix="group the parameters as in the run that saved the checkpoint",
                )
    for _, sources in by_key.values():
        for name in sources[0]["scalars"]:
            _latest(name, [record["scalars"].get(name) for record in sources])
    if check_only:
        return
    for index, found in by_group.items():
        options = catalog.groups[index].options
        for name in found[0]["options"]:
            if name in options or name == "initial_lr":
                _assign(options, name, _latest(name, [record["options"].get(name) for record in found]))
    for key, sources in by_key.values():
        state = state_of(key)
        for name in sources[0]["scalars"]:
            if name in state and name != "step":
                _assign(state, name, _latest(name, [record["scalars"].get(name) for record in sources]))
        _apply_step(catalog, key, state, sources)


def _apply_step(catalog: Catalog, key: torch.Tensor, state: dict[str, Any], sources: list[ScalarRecord]) -> None:
    """Restores the step count: torch keeps it in the state, FusedAdam in the group; either may have saved it."""
    counts = [record["scalars"].get("step", record["options"].get("step")) for record in sources]
    counts = [count for count in counts if count is not None]
    if not counts:
        return
    count = _latest("step", counts)
    if "step" in state:
        _assign(state, "step", count)
    else:
        group = next(group for group in catalog.groups if any(key is other for other in group.keys))
        group.options["step"] = int(count)


def _latest(name: str, values: list[Any]) -> Any:
    """One value for a key that covers several parameters: equal values, or the largest count."""
    first = values[0]
    if all(_equal(first, other) for other in values[1:]):
        return first
    if name == "step":
        # Parameters that never had a gradient count 0; their moments are zeros, so the bias correction is moot.
        logger.info("parameters with different step counts share optimizer state now: the largest count is used")
        return max((value for value in values if value is not None), key=float)
    raise ModelMismatchError(f"parameters that share optimizer state now were saved with different {name!r}: {values}")


def _assign(target: dict[str, Any], name: str, value: Any) -> None:
    current = target.get(name)
    if isinstance(current, torch.Tensor):
        current.copy_(torch.as_tensor(value, dtype=current.dtype))
    elif isinstance(value, torch.Tensor):
        # A scalar saved as a tensor, kept as a number here (torch and DeepSpeedCPUAdam keep `step` differently).
        number = value.item() if value.numel() == 1 else value.clone()
        target[name] = type(current)(number) if isinstance(current, (int, float)) else value.clone()
    else:
        target[name] = value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _on_host(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return left is not None and right is not None and torch.equal(torch.as_tensor(left), torch.as_tensor(right))
    return bool(left == right)
