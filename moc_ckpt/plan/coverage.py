"""Invariant I1: the fragments cover every logical tensor exactly once (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from moc_ckpt.errors import CoverageError
from moc_ckpt.state.fragment import MASTER, WEIGHT, TensorKey
from moc_ckpt.state.unit import EXPERTS_MARK

__all__ = ["check_coverage", "check_experts", "coverage_problems", "expert_problems"]

_SHOWN = 5


class _Layer(Protocol):
    """What `check_experts` needs to know of an MoE layer."""

    @property
    def ordinal(self) -> int: ...
    @property
    def prefix(self) -> str: ...
    @property
    def num_experts(self) -> int: ...


def coverage_problems(
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]], fragments: Iterable[tuple[TensorKey, int, int]]
) -> list[str]:
    """Returns what keeps the fragments from covering every declared tensor exactly once, a line each.

    Args:
        declared: dtype and shape of every logical tensor that must exist.
        fragments: (tensor, first element, one past the last) in the row-major flattened tensor.
    """
    holes, overlaps = [], []
    spans: dict[TensorKey, list[tuple[int, int]]] = {}
    for key, start, stop in fragments:
        spans.setdefault(key, []).append((start, stop))
    others = [f"{key.fqn} ({key.kind}): has fragments but no rank declared it" for key in spans if key not in declared]
    for key, (_, shape) in declared.items():
        name = f"{key.fqn} ({key.kind})"
        numel, end = math.prod(shape), 0
        for start, stop in sorted(spans.get(key, ())):
            if not 0 <= start <= stop <= numel:
                others.append(f"{name}: fragment [{start}, {stop}) is outside the tensor's [0, {numel})")
                continue
            if start == stop:
                continue
            if start > end:
                holes.append(f"{name}: hole [{end}, {start})")
            if start < end:
                overlaps.append(f"{name}: overlap [{start}, {min(stop, end)})")
            end = max(end, stop)
        if end < numel:
            holes.append(f"{name}: hole [{end}, {numel})" + (" (the whole tensor)" if end == 0 else ""))
    return holes + overlaps + others


def check_coverage(
    declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]], fragments: Iterable[tuple[TensorKey, int, int]]
) -> None:
    """Raises unless the fragments cover every declared tensor exactly once.

    Tensors without elements need no fragment. Fragments without elements are ignored.

    Args:
        declared: dtype and shape of every logical tensor that must exist.
        fragments: (tensor, first element, one past the last) in the row-major flattened tensor.

    Raises:
        CoverageError: naming the first holes, overlaps and tensors that nobody declared.
    """
    _raise("the fragments do not cover every tensor exactly once", coverage_problems(declared, fragments))


def expert_problems(layers: Sequence[_Layer], declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Returns where a layer's experts differ in what was declared for them, a line each.

    Args:
        layers: the model's MoE layers (`MoELayer` or the manifest's record of it).
        declared: dtype and shape of every logical tensor.
    """
    known = {layer.prefix: layer for layer in layers}
    found: dict[str, dict[int, dict[tuple[str, str], tuple[str, tuple[int, ...]]]]] = {prefix: {} for prefix in known}
    problems = []
    for key, (dtype, shape) in declared.items():
        prefix, mark, rest = key.fqn.partition(EXPERTS_MARK)
        if not mark:
            continue
        number, _, name = rest.partition(".")
        if prefix not in known or not number.isdigit() or int(number) >= known[prefix].num_experts:
            problems.append(f"{key.fqn} ({key.kind}): belongs to no expert of the known MoE layers")
            continue
        found[prefix].setdefault(int(number), {})[name, key.kind] = (dtype, tuple(shape))
    for prefix, layer in known.items():
        experts = found[prefix]
        missing = [expert for expert in range(layer.num_experts) if expert not in experts]
        if missing:
            shown = ", ".join(map(str, missing[:_SHOWN])) + (", …" if len(missing) > _SHOWN else "")
            problems.append(f"MoE layer {layer.ordinal} ({prefix}): no state of expert {shown}")
        if not experts:
            continue
        everything = {name: spec for tensors in experts.values() for name, spec in tensors.items()}
        trained = {name for name, kind in everything if kind == MASTER}
        for expert, tensors in sorted(experts.items()):
            for (name, kind), spec in everything.items():
                # A weight beside its master is stored only where it cannot be derived, expert by expert.
                if kind == WEIGHT and name in trained and (name, kind) not in tensors:
                    continue
                if tensors.get((name, kind)) != spec:
                    what = "lacks" if (name, kind) not in tensors else "has another shape or dtype of"
                    problems.append(f"MoE layer {layer.ordinal} ({prefix}): expert {expert} {what} {name} ({kind})")
    return problems


def check_experts(layers: Sequence[_Layer], declared: Mapping[TensorKey, tuple[str, tuple[int, ...]]]) -> None:
    """Raises unless every MoE layer has the same tensors, with the same shapes, for all its experts.

    This finds an expert that no rank declared at all, which coverage alone cannot.

    Args:
        layers: the model's MoE layers (`MoELayer` or the manifest's record of it).
        declared: dtype and shape of every logical tensor.

    Raises:
        CoverageError: naming the first experts and tensors that are missing.
    """
    _raise("the experts of a layer are not complete", expert_problems(layers, declared))


def _raise(what: str, problems: list[str]) -> None:
    if not problems:
        return
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise CoverageError(
        f"{what} ({len(problems)} problem{'s' if len(problems) > 1 else ''})",
        where="; ".join(problems[:_SHOWN]) + more,
        fix="nothing was committed or changed; if all ranks run the same model and configuration, report this",
    )
