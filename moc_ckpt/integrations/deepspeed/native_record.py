"""What a checkpoint notes of the engine so that a native DeepSpeed checkpoint can be made of it later.

Fragments are layout-free; DeepSpeed's own files are not. They need the order of the parameters in their groups, the
groups' names, the further names of tied parameters and a few settings. It is the same at every step of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moc_ckpt.errors import UnsupportedError
from moc_ckpt.integrations.deepspeed.layouts import model_weights
from moc_ckpt.integrations.deepspeed.view import EngineView
from moc_ckpt.plan.native_groups import NativeGroup
from moc_ckpt.state.catalog import dtype_name
from moc_ckpt.state.plain import decode_plain, encode_plain
from moc_ckpt.state.scalars import LAYOUT_KEYS

__all__ = ["NATIVE", "WRAPPER", "NativeRecord", "describe", "layout_options", "plain_fields", "read_record"]

NATIVE = "native"
"""Key of the record in a checkpoint's state."""
WRAPPER = "DeepSpeedZeroOptimizer"
"""The only optimizer wrapper whose native files are known."""
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class NativeRecord:
    """What `describe` noted, on rank 0.

    Attributes:
        wrapper: class of DeepSpeed's optimizer wrapper.
        groups: the param groups.
        aliases: further name -> first name of tied parameters.
        buffers: names of the persistent buffers.
        dtypes: dtypes of the trained weights that are not of the engine's precision, by name.
        round_robin: `round_robin_gradients`.
        parameter_alignment: `parameter_alignment`.
        data_first: `use_data_before_expert_parallelism`.
        clip_grad: gradient clipping.
        dynamic_loss_scale: whether the loss scale changes.
        scaler: class name of the loss scaler.
        scaler_fields: its attributes, as far as they are plain; the numbers among them may be old.
    """

    wrapper: str
    groups: tuple[NativeGroup, ...] = ()
    aliases: Mapping[str, str] | None = None
    buffers: tuple[str, ...] = ()
    dtypes: Mapping[str, str] | None = None
    round_robin: bool = False
    parameter_alignment: bool = False
    data_first: bool = False
    clip_grad: float = 0.0
    dynamic_loss_scale: bool = False
    scaler: str = "LossScaler"
    scaler_fields: Mapping[str, Any] | None = None

    def encode(self) -> bytes:
        """Returns the record as plain data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "groups"}
        data["groups"] = [{"names": list(group.names), "options": dict(group.options)} for group in self.groups]
        return encode_plain(data, NATIVE)


def describe(view: EngineView) -> bytes:
    """Returns the record of an engine, encoded. Not collective; only rank 0's is stored."""
    engine, wrapper = view.engine, view.engine.optimizer
    # Replicas have an optimizer of their own, of which DeepSpeed's files know nothing.
    kind = type(wrapper).__name__ if engine.lazarus is None else "LazarusMoE"
    if kind != WRAPPER:
        return NativeRecord(kind).encode()
    first = {id(param): name for name, param in engine.module.named_parameters()}
    aliases = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        known = first.get(id(value))
        if known is not None and known != name:
            aliases[view.names.globalise(name)] = view.names.globalise(known)
    precision = _precision(engine)
    settings = getattr(engine._config, "_param_dict", None) or {}
    scaler = wrapper.loss_scaler
    return NativeRecord(
        wrapper=kind,
        groups=tuple(
            NativeGroup(tuple(view.names.of(param) for param in members if param.numel()), layout_options(group))
            for members, group in zip(wrapper.bit16_groups, view.optimizer.param_groups, strict=True)
        ),
        aliases=aliases,
        buffers=tuple(item.fqn for item in model_weights(engine, view.names) if item.is_buffer),
        dtypes={
            view.names.of(param): dtype_name(param.dtype)
            for members in wrapper.bit16_groups
            for param in members
            if param.dtype != precision
        },
        round_robin=bool(getattr(wrapper, "round_robin_gradients", False)),
        parameter_alignment=bool(getattr(wrapper, "parameter_alignment", False)),
        data_first=bool(settings.get("use_data_before_expert_parallelism", False)),
        clip_grad=float(wrapper.clip_grad),
        dynamic_loss_scale=bool(wrapper.dynamic_loss_scale),
        scaler=type(scaler).__name__,
        scaler_fields=plain_fields(scaler),
    ).encode()


def read_record(state: Mapping[str, Any], where: str) -> NativeRecord:
    """Returns the record of a checkpoint.

    Args:
        state: the checkpoint's state, decoded.
        where: its place, for messages.

    Raises:
        UnsupportedError: if the checkpoint is from before records.
    """
    encoded = state.get(NATIVE)
    if not isinstance(encoded, bytes):
        raise UnsupportedError(
            "the checkpoint does not say how DeepSpeed had grouped the parameters: an older moc_ckpt saved it",
            where=where,
            fix="load it in a run with this version and save it again, then export that one",
        )
    data = decode_plain(encoded, where)
    groups = tuple(NativeGroup(tuple(item["names"]), item["options"]) for item in data.pop("groups"))
    known = NativeRecord.__dataclass_fields__
    return NativeRecord(groups=groups, **{name: value for name, value in data.items() if name in known})


def layout_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a param group that belong to the run, not to the training."""
    return {name: group[name] for name in sorted(LAYOUT_KEYS - {"params"}) if type(group.get(name, ())) in _PLAIN}


def plain_fields(scaler: Any) -> dict[str, Any]:
    """Returns the attributes of a loss scaler that are numbers, texts or dtypes."""
    values = vars(scaler) if hasattr(scaler, "__dict__") else {}
    return {name: value for name, value in values.items() if type(value) in (*_PLAIN, torch.dtype)}


def _precision(engine: Any) -> torch.dtype:
    return torch.bfloat16 if engine.bfloat16_enabled() else torch.float16 if engine.fp16_enabled() else torch.float32
