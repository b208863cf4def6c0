"""Megatron's client_state as plain data: its arguments, counters and random generators, and back.

Nothing here is unpickled. An object that is not data (an enum, a scheduler) is noted by its type only; when the
arguments come back, the running process's own value takes its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moc_ckpt.errors import ClientStateError

__all__ = ["decode", "encode", "is_encoded"]

_MARK = "__moc__"
_LEAVES = (int, float, str, bool, type(None))
_MAX_DEPTH = 16
# As for arguments that cache what follows from the others, such as rotary embeddings.
_LARGE = 1 << 20


def encode(value: Any, _depth: int = 0) -> Any:
    """Returns plain data for a client_state: numbers, strings, None, lists, tuples and dicts of them."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if _depth < _MAX_DEPTH:
        if isinstance(value, dict) and _MARK not in value:
            if all(type(key) in _LEAVES for key in value):
                return {key: encode(item, _depth + 1) for key, item in value.items()}
        elif kind in (list, tuple):
            return kind(encode(item, _depth + 1) for item in value)
        elif isinstance(value, argparse.Namespace):
            return {_MARK: "namespace", "items": encode(vars(value), _depth + 1)}
        elif isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return value.item()
        elif kind is np.ndarray and value.dtype.kind in "biuf" and value.nbytes <= _LARGE:
            return {
                _MARK: "ndarray",
                "dtype": value.dtype.str,
                "shape": list(value.shape),
                "data": _text(value.tobytes()),
            }
        elif isinstance(value, torch.Tensor) and value.nbytes <= _LARGE:
            flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            return {
                _MARK: "tensor",
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "data": _text(flat.numpy().tobytes()),
            }
        elif kind is bytes:
            return {_MARK: "bytes", "data": _text(value)}
        elif kind is torch.dtype:
            return {_MARK: "dtype", "name": str(value).removeprefix("torch.")}
    return {_MARK: "object", "type": f"{kind.__module__}.{kind.__qualname__}"}


def is_encoded(state: Mapping[str, Any]) -> bool:
    """Tells whether a client_state is Megatron's and was encoded; one that DeepSpeed saved has its args as they are."""
    args = state.get("args")
    return isinstance(args, Mapping) and args.get(_MARK) == "namespace"


def decode(value: Any, live: Any = None) -> Any:
    """Returns what `encode` was given.

    Args:
        value: its result.
        live: the arguments of this process; a value that was not data is taken from there, and left out if it is not
            there either.

    Raises:
        ClientStateError: if it is not a result of `encode`.
    """
    if type(value) in _LEAVES:
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(decode(item) for item in value)
    if not isinstance(value, Mapping):
        raise _unknown(type(value).__name__)
    mark = value.get(_MARK)
    if mark is None:
        return {key: decode(item, live) for key, item in value.items()}
    try:
        if mark == "namespace":
            return _namespace(value["items"], live)
        if mark == "ndarray":
            return np.frombuffer(_raw(value), np.dtype(value["dtype"])).reshape(value["shape"])
        if mark == "tensor":
            data = _raw(value)
            raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            return raw.view(_dtype(value["dtype"])).view(value["shape"])
        if mark == "bytes":
            return bytes(_raw(value))
        if mark == "dtype":
            return _dtype(value["name"])
        if mark == "object":
            return None
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unknown(f"{mark}: {error}") from error
    raise _unknown(str(mark))


def _namespace(items: Mapping[str, Any], live: Any) -> argparse.Namespace:
    result = argparse.Namespace()
    for name, item in items.items():
        if isinstance(item, Mapping) and item.get(_MARK) == "object":
            if hasattr(live, name):
                setattr(result, name, getattr(live, name))
        else:
            setattr(result, name, decode(item))
    return result


def _text(data: bytes) -> str:
    """Torch pickles bytes by functions, and text as text."""
    return data.decode("latin-1")


def _raw(value: Mapping[str, Any]) -> bytearray:
    return bytearray(value["data"].encode("latin-1"))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found


def _unknown(what: str) -> ClientStateError:
    return ClientStateError(
        f"client_state is not what the launcher wrote: {what}",
        where="client_state",
        fix="load it with the program that saved it, or with a newer moc_ckpt",
    )
