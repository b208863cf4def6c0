"""Engine state beside tensors: counters, schedulers, loss scaler. All as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moc_ckpt.errors import ModelMismatchError

__all__ = [
    "capture_engine",
    "check_schedulers",
    "regrouped",
    "restore_counters",
    "restore_loss_scaler",
    "restore_schedulers",
    "scaler_numbers",
]

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# Names under which DeepSpeed's 16-bit optimizers keep their scaling state, over its versions.
_SCALER_FIELDS = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
    "scale_factor",
    "scale_window",
    "delayed_shift",
    "consecutive_hysteresis",
    "min_scale",
    "min_loss_scale",
)


def capture_engine(engine: Any) -> dict[str, Any]:
    """Returns counters, learning-rate scheduler, loss scaler and data-efficiency state. Not collective."""
    state: dict[str, Any] = {
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS if hasattr(engine, name)},
        "loss_scaler": {
            name: _number(getattr(holder, name))
            for holder in reversed(list(_scalers(engine)))
            for name in _SCALER_FIELDS
            if _has_number(holder, name)
        },
    }
    if _has_scheduler(engine):
        state["lr_scheduler"] = engine.lr_scheduler.state_dict()
    if engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
        state["random_ltd"] = engine.random_ltd_scheduler.state_dict()
    if engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        state["data_sampler"] = engine.training_dataloader.data_sampler.state_dict()
    return state


def scaler_numbers(scaler: Any) -> dict[str, Any]:
    """Returns the numbers of a loss scaler, as `capture_engine` has them."""
    return {name: _number(getattr(scaler, name)) for name in _SCALER_FIELDS if _has_number(scaler, name)}


def restore_counters(engine: Any, state: dict[str, Any]) -> None:
    """Restores the step counters, so that the next micro-batch begins an accumulation window."""
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    window = engine.gradient_accumulation_steps()
    # Gradients of an unfinished window are not saved; a window may also have another length now.
    engine.micro_steps = -(-engine.micro_steps // window) * window


def restore_loss_scaler(engine: Any, state: dict[str, Any]) -> None:
    """Restores the loss scaler's numbers where this engine has one."""
    for holder in _scalers(engine):
        for name, value in state["loss_scaler"].items():
            if _has_number(holder, name):
                setattr(holder, name, value)


def check_schedulers(engine: Any, state: dict[str, Any], *, lr: bool) -> None:
    """Raises ModelMismatchError if `restore_schedulers` could not restore what this engine has."""
    if lr and _has_scheduler(engine) and "lr_scheduler" not in state:
        raise ModelMismatchError(
            "the checkpoint has no learning-rate scheduler, but this run has one",
            fix="pass load_lr_scheduler_states=False, or configure no scheduler",
        )
    if lr and _has_scheduler(engine):
        _regrouped(engine, state)


def _has_scheduler(engine: Any) -> bool:
    return engine.lr_scheduler is not None and hasattr(engine.lr_scheduler, "load_state_dict")


def restore_schedulers(engine: Any, state: dict[str, Any], *, lr: bool) -> None:
    """Restores the learning-rate scheduler (if asked for), random-LTD and the curriculum's data sampler."""
    if lr and _has_scheduler(engine):
        engine.lr_scheduler.load_state_dict(_regrouped(engine, state))
    if "random_ltd" in state and engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
        engine.random_ltd_scheduler.load_state_dict(state["random_ltd"])
    if "data_sampler" in state and engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        engine.training_dataloader.data_sampler.load_state_dict(state["data_sampler"])


def _regrouped(engine: Any, state: dict[str, Any]) -> dict[str, Any]:
    groups = getattr(getattr(engine.lr_scheduler, "optimizer", None), "param_groups", None)
    saved = state["lr_scheduler"]
    return saved if groups is None else regrouped(saved, groups)


def regrouped(saved: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a torch scheduler's state for another number of param groups than it was saved with.

    DeepSpeed's MoE keeps experts in groups of their own, replicated experts go with the dense ones. Learning rates are
    in the (restored) groups anyway; what else a scheduler keeps per group must be the same for all of them.

    Args:
        saved: what `state_dict` returned.
        groups: the param groups now, restored.

    Raises:
        ModelMismatchError: naming what cannot be regrouped.
    """
    count = len(saved["base_lrs"]) if isinstance(saved.get("base_lrs"), list) else len(groups)
    if count == len(groups):
        return saved
    found = dict(saved)
    for name, value in saved.items():
        if not isinstance(value, list) or len(value) != count:
            continue
        if name == "base_lrs":
            found[name] = [group.get("initial_lr", group["lr"]) for group in groups]
        elif name == "_last_lr":
            found[name] = [group["lr"] for group in groups]
        elif all(item == value[0] for item in value):
            found[name] = value[:1] * len(groups)
        else:
            raise ModelMismatchError(
                f"the learning-rate scheduler has another {name} for each of {count} param groups; now there are "
                f"{len(groups)}",
                fix="group the parameters as in the run that saved the checkpoint, or pass "
                "load_lr_scheduler_states=False",
            )
    return found


def _scalers(engine: Any) -> Iterator[Any]:
    """Yields the objects that may hold scaling state, the authoritative one first."""
    for holder in (
        getattr(engine.optimizer, "loss_scaler", None),
        getattr(engine.optimizer, "loss_scale_config", None),
        engine.optimizer,
    ):
        if holder is not None and not isinstance(holder, (int, float)):
            yield holder


def _has_number(holder: Any, name: str) -> bool:
    # Properties of a wrapper only mirror the scaler's own fields.
    return name in getattr(holder, "__dict__", {}) and _number(getattr(holder, name)) is not None


def _number(value: Any) -> float | int | None:
    if isinstance(value, (bool, int, float)):
        return value
    return value.item() if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1 else None
