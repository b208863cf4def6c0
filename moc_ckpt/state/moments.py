"""Materialising optimizer state before the first step, so that the catalog never changes shape.

Most optimizers create their moments lazily. DESIGN section 2 defines a moment that does not exist yet
as zeros at step 0. Whether an optimizer agrees is not assumed but tried, on a scratch parameter.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moc_ckpt.errors import UnsupportedError

__all__ = ["materialise_state"]

_PROBE_NUMEL = 8
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def materialise_state(optimizer: torch.optim.Optimizer) -> int:
    """Creates zero moments and step 0 for every tensor that has no state yet.

    Neither `step` nor any bit of training changes: the optimizer itself takes one step on a scratch
    parameter from no state and one from zero state, and both must give the same bits. Not collective;
    call it while no step is running.

    Args:
        optimizer: the optimizer that does the update (not DeepSpeed's wrapper).

    Returns:
        The number of tensors that got state.

    Raises:
        UnsupportedError: if this optimizer does not treat zero state as no state.
    """
    created = 0
    for index, group in enumerate(optimizer.param_groups):
        missing = [p for p in group["params"] if p.requires_grad and p.numel() and not optimizer.state.get(p)]
        if not missing:
            continue
        templates: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}
        for param in missing:
            where = (param.device, param.dtype)
            if where not in templates:
                templates[where] = _probe(optimizer, index, param)
            template = templates[where]
            if template:
                optimizer.state[param] = {
                    name: make(param) if callable(make) else copy.deepcopy(make) for name, make in template.items()
                }
                created += 1
    return created


def _probe(optimizer: torch.optim.Optimizer, index: int, like: torch.Tensor) -> dict[str, Any]:
    """Returns, per state key, a value for step 0 or a function of the parameter that makes it."""
    gradient = torch.linspace(-1.0, 1.0, _PROBE_NUMEL, device=like.device).to(like.dtype)
    fresh_param, fresh_state = _scratch_step(optimizer, index, like, gradient, None)
    template: dict[str, Any] = {}
    for name, value in fresh_state.items():
        if isinstance(value, torch.Tensor) and value.numel() == _PROBE_NUMEL:
            template[name] = _zeros(value.dtype)
        elif isinstance(value, torch.Tensor):
            template[name] = torch.zeros_like(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            template[name] = type(value)(0)
        else:
            template[name] = value
    if not template:
        return template
    zero_state = {
        name: torch.zeros_like(fresh_state[name]) if callable(make) else copy.deepcopy(make)
        for name, make in template.items()
    }
    param, state = _scratch_step(optimizer, index, like, gradient, zero_state)
    same = torch.equal(param, fresh_param) and all(_same(state.get(name), fresh_state[name]) for name in fresh_state)
    if not same:
        raise UnsupportedError(
            f"{type(optimizer).__name__} starts differently from zero state than from no state, "
            "so its state cannot be created ahead of the first step",
            where=f"param group {index}",
            fix="take one optimizer step before the engine is used, or use an Adam-family optimizer",
        )
    return template


def _zeros(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(param: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        # Offloaded masters are pinned, and their moments are read by the same copies.
        return zeros.pin_memory() if param.device.type == "cpu" and param.is_pinned() else zeros

    return make


def _scratch_step(
    optimizer: torch.optim.Optimizer,
    index: int,
    like: torch.Tensor,
    gradient: torch.Tensor,
    state: Mapping[str, Any] | None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Lets the optimizer itself take one step on a scratch parameter; everything it owns is put back."""
    group = optimizer.param_groups[index]
    scratch = torch.linspace(0.5, 1.5, _PROBE_NUMEL, device=like.device).to(like.dtype).requires_grad_(True)
    scratch.grad = gradient.clone()
    probe_group = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    probe_group["params"] = [scratch]
    # As from the first step on: FusedAdam keeps its count in the group.
    if isinstance(probe_group.get("step"), (int, float)):
        probe_group["step"] = 0
    saved_groups, saved_state = optimizer.param_groups, optimizer.state
    hooks = {name: getattr(optimizer, name, None) for name in _HOOKS}
    optimizer.param_groups = [probe_group]
    optimizer.state = defaultdict(dict)
    if state is not None:
        optimizer.state[scratch] = dict(state)
    try:
        for name, value in hooks.items():
            if value is not None:
                setattr(optimizer, name, type(value)())
        with torch.no_grad():
            type(optimizer).step(optimizer)
        result = dict(optimizer.state.get(scratch, {}))
    finally:
        optimizer.param_groups, optimizer.state = saved_groups, saved_state
        for name, value in hooks.items():
            if value is not None:
                setattr(optimizer, name, value)
    return scratch.detach(), result


def _same(left: Any, right: Any) -> bool:
    if isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and torch.equal(left, right)
    return bool(left == right)
