"""Plain data: Python values and tensors as msgpack, without pickle.

Everything that a checkpoint holds beside tensors (counters, schedulers, random number generators,
hyper-parameters) goes through here, so that reading a checkpoint never runs code from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from moc_ckpt.errors import FormatError, NotPlainError

__all__ = ["decode_plain", "encode_plain"]

_TAG = "$"
# What msgpack can hold as a number.
_INTS = range(-(2**63), 2**64)


def encode_plain(value: Any, root: str) -> bytes:
    """Encodes `value` as msgpack.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, set, dict (any plain keys), numpy
            scalars and arrays, torch tensors (any device), dtypes and devices; nested at will.
        root: name of the value, for messages.

    Raises:
        NotPlainError: with the path of the first object that is anything else.
    """
    return msgspec.msgpack.encode(_pack(value, root))


def decode_plain(data: bytes, where: str) -> Any:
    """Decodes what `encode_plain` made: equal values, tensors on the CPU.

    Raises:
        FormatError: if the bytes are not this format.
    """
    try:
        return _unpack(msgspec.msgpack.decode(data))
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"not plain data of this package: {error}", where=where) from error


def _pack(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (bool, float, str, bytes)):
        # Subclasses (an enum of str, say) would come back as their base: refuse what cannot round-trip.
        if value is not None and type(value) not in (bool, float, str, bytes):
            if isinstance(value, np.generic):
                return _pack_array("np0", np.asarray(value))
            raise _not_plain(value, path)
        return value
    if type(value) is int:
        return value if value in _INTS else {_TAG: "int", "v": str(value)}
    if type(value) is list:
        return _pack_items(value, path)
    if type(value) is tuple:
        return {_TAG: "tuple", "v": _pack_items(value, path)}
    if type(value) in (set, frozenset):
        return {_TAG: type(value).__name__, "v": [_pack(item, f"{path}{{}}") for item in value]}
    if isinstance(value, dict):
        if type(value) is dict and all(type(key) is str and key != _TAG for key in value):
            return {key: _pack(item, f"{path}.{key}") for key, item in value.items()}
        # OrderedDict, defaultdict and the like come back as dict: same items, same order.
        items = [[_pack(key, f"{path}.{key!r}"), _pack(item, f"{path}[{key!r}]")] for key, item in value.items()]
        return {_TAG: "dict", "v": items}
    if isinstance(value, torch.Tensor):
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        name = str(value.dtype).removeprefix("torch.")
        return {_TAG: "tensor", "dtype": name, "shape": list(value.shape), "v": data}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise _not_plain(value, path)
        return _pack_array("np", value)
    if isinstance(value, np.generic):
        return _pack_array("np0", np.asarray(value))
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "v": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {_TAG: "device", "v": str(value)}
    raise _not_plain(value, path)


def _pack_items(values: Sequence[Any], path: str) -> list[Any]:
    # Generators have states of hundreds of numbers, and are saved with every snapshot.
    if set(map(type, values)) == {int} and min(values) >= _INTS.start and max(values) < _INTS.stop:
        return list(values)
    return [_pack(item, f"{path}[{i}]") for i, item in enumerate(values)]


def _pack_array(tag: str, array: np.ndarray) -> dict[str, Any]:
    return {_TAG: tag, "dtype": array.dtype.str, "shape": list(array.shape), "v": array.tobytes()}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(_TAG)
    if tag is None:
        return {key: _unpack(item) for key, item in value.items()}
    body = value["v"]
    if tag == "int":
        return int(body)
    if tag == "tuple":
        return tuple(_unpack(item) for item in body)
    if tag == "set":
        return {_unpack(item) for item in body}
    if tag == "frozenset":
        return frozenset(_unpack(item) for item in body)
    if tag == "dict":
        return {_unpack(key): _unpack(item) for key, item in body}
    if tag == "tensor":
        dtype = getattr(torch, value["dtype"])
        if not body:
            return torch.empty(value["shape"], dtype=dtype)
        return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(dtype).reshape(value["shape"])
    if tag in ("np", "np0"):
        array = np.frombuffer(bytearray(body), dtype=np.dtype(value["dtype"])).reshape(value["shape"])
        return array if tag == "np" else array[()]
    if tag == "dtype":
        return getattr(torch, body)
    if tag == "device":
        return torch.device(body)
    raise ValueError(f"unknown tag {tag!r}")


def _not_plain(value: Any, path: str) -> NotPlainError:
    return NotPlainError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which is not plain data",
        where=path,
        fix="keep numbers, strings, lists, dicts, arrays and tensors in it",
    )
