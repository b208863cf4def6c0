"""Takes the parameters of experts with replicas out of what DeepSpeed's optimizer gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moc_ckpt.errors import UnsupportedError

__all__ = ["ExpertGroups", "separate"]

# What tells groups apart without changing what an optimizer does with them.
_NAMES = frozenset({"params", "name", "moe"})


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """Which param group of DeepSpeed's optimizer each of this rank's expert parameters goes with.

    An expert parameter has that group's options. Other ranks have other experts, so their groups may be others.

    Attributes:
        place_of: id of an expert parameter -> index of its group among those that DeepSpeed's optimizer keeps.
    """

    place_of: Mapping[int, int]


def separate(
    model: torch.nn.Module, optimizer: Any, model_parameters: Any, lr_scheduler: Any
) -> tuple[Any, ExpertGroups]:
    """Takes expert parameters out of the arguments of deepspeed.initialize.

    An optimizer that was built already loses them in place. Experts go with the group that they were in. A group of
    experts alone goes with one of the same options: schedules then reach its experts through that one.

    Args:
        model: the model; its expert parameters carry `lazarus = True`.
        optimizer: the argument: an optimizer, a function that makes one, or None.
        model_parameters: the argument: parameters, or dicts with `params`, or None for all.
        lr_scheduler: the argument.

    Returns:
        `model_parameters` without experts, and what was taken out.

    Raises:
        UnsupportedError: naming the parameter or group that cannot be trained so.
    """
    built = isinstance(optimizer, torch.optim.Optimizer)
    if built:
        groups: list[MutableMapping[str, Any]] = list(optimizer.param_groups)
        kept = model_parameters
    else:
        given = list(model.parameters() if model_parameters is None else model_parameters)
        grouped = bool(given) and isinstance(given[0], Mapping)
        groups = [dict(item) for item in given] if grouped else [{"params": given}]
    taken: list[list[torch.Tensor]] = []
    for group in groups:
        members = _listed(group["params"])
        taken.append([param for param in members if _is_ours(param)])
        group["params"] = [param for param in members if not _is_ours(param)]
    left = [group for group in groups if group["params"]]
    if not left:
        raise UnsupportedError(
            "no parameter is left for DeepSpeed's optimizer: all of the model's are experts'",
            where="deepspeed.initialize",
            fix="train a model with dense parameters as well, the gates at least",
        )
    _check_scheduler(lr_scheduler, len(groups) - len(left))
    if built:
        optimizer.param_groups[:] = left
    else:
        kept = left if grouped else left[0]["params"]
    places = [_place(group, index, left) if taken[index] else -1 for index, group in enumerate(groups)]
    place_of = {id(param): place for place, members in zip(places, taken, strict=True) for param in members}
    for name, param in model.named_parameters():
        if _is_ours(param) and param.requires_grad and param.numel() and id(param) not in place_of:
            raise UnsupportedError(
                f"{name} requires a gradient, but is in no param group",
                where="model_parameters of deepspeed.initialize",
                fix="add it to a group, or freeze it with requires_grad_(False)",
            )
    return kept, ExpertGroups(place_of)


def _is_ours(param: Any) -> bool:
    return bool(getattr(param, "lazarus", False))


def _listed(params: Any) -> Sequence[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _check_scheduler(lr_scheduler: Any, dropped: int) -> None:
    if dropped and isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise UnsupportedError(
            f"{dropped} param groups have experts alone, and the learning-rate scheduler was made for them",
            where="lr_scheduler of deepspeed.initialize",
            fix="pass a function that makes the scheduler from the optimizer, or put experts and dense parameters of "
            "the same options into one group",
        )


def _place(group: Mapping[str, Any], index: int, left: Iterable[Mapping[str, Any]]) -> int:
    """Returns the index among the kept groups of the one whose options a group's experts have."""
    kept = list(left)
    for place, other in enumerate(kept):
        if other is group:
            return place
    own = {name: value for name, value in group.items() if name not in _NAMES}
    for place, other in enumerate(kept):
        if {name: value for name, value in other.items() if name not in _NAMES} == own:
            return place
    raise UnsupportedError(
        f"param group {index} has experts alone, and no group of dense parameters has its options {own}",
        where="model_parameters of deepspeed.initialize",
        fix="give experts the options of a group of dense parameters; a learning-rate schedule reaches them through it",
    )
