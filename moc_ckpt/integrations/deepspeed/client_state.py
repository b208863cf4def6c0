"""The caller's client_state: checked for loadability when it is saved, not at resume."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from moc_ckpt.errors import ClientStateError, CorruptionError

__all__ = ["client_state_encoder", "decode_client_state", "encode_client_state", "refused_type"]

# How torch.load names the type that it refuses.
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_LEAVES = (int, float, str, bool, bytes, type(None))
_TRUST = "moc_checkpoint.recovery.trust_client_state"


def encode_client_state(state: Mapping[str, Any], *, trust: bool, prove: bool = True) -> bytes:
    """Encodes client_state with torch.save and proves that it loads again.

    Args:
        state: the caller's dict.
        trust: allow objects that only a full unpickling restores.
        prove: try to load it; half of the time that encoding takes.

    Raises:
        ClientStateError: naming the first object that would not load.
    """
    try:
        data = _dump(dict(state))
    except Exception as error:
        path, culprit = _find(state, "client_state", _dumps)
        raise ClientStateError(
            f"{path} ({_type(culprit)}) cannot be saved: {error}", where=path, fix="leave it out of client_state"
        ) from error
    if prove and not trust:
        try:
            _load(data, trust=False)
        except Exception as error:
            path, culprit = _find(state, "client_state", _loads)
            raise ClientStateError(
                f"{path} is a {_type(culprit)}, which torch.load(weights_only=True) will not load",
                where=path,
                fix=f"turn it into plain data (numbers, strings, lists, dicts, tensors), or set {_TRUST} to true "
                "if every writer of the directory is trusted",
            ) from error
    return data


def client_state_encoder(state: Mapping[str, Any], *, trust: bool, prove: bool = True) -> Callable[[], bytes]:
    """Returns what encodes client_state as it is now; any thread may call it.

    Plain data is copied now and encoded then, as encoding costs a training thread ten times as much. Everything else is
    encoded now.

    Args:
        state: the caller's dict.
        trust: see `encode_client_state`.
        prove: likewise.

    Raises:
        ClientStateError: naming the first object that would not load.
    """
    if not state:
        return bytes  # whoever writes it has an empty one
    try:
        plain = _copy(dict(state))
    except TypeError:
        data = encode_client_state(state, trust=trust, prove=prove)
        return lambda: data
    return partial(encode_client_state, plain, trust=trust, prove=prove)


def _copy(value: Any) -> Any:
    """Copies plain data; TypeError if there is anything else in it."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is dict:
        return {_copy(key): _copy(item) for key, item in value.items()}
    if kind in (list, tuple):
        return kind(map(_copy, value))
    raise TypeError


def decode_client_state(data: bytes, *, trust: bool, where: str) -> dict[str, Any]:
    """Loads client_state; with `trust` it may run code from the checkpoint.

    Raises:
        ClientStateError: if it holds objects that need trust.
        CorruptionError: if it is not a torch.save file.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise CorruptionError("client_state is not a torch.save file", where=where, fix="load an older tag")
    try:
        return _load(data, trust=trust)
    except pickle.UnpicklingError as error:
        raise ClientStateError(
            f"client_state needs unpickling of {refused_type(error)}",
            where=where,
            fix=f"set {_TRUST} to true if every writer of the directory is trusted",
        ) from error
    except Exception as error:
        raise CorruptionError(f"client_state cannot be read: {error}", where=where, fix="load an older tag") from error


def refused_type(error: pickle.UnpicklingError) -> str:
    """Returns what torch.load(weights_only=True) would not load, for messages."""
    named = _GLOBAL.search(str(error))
    return named[1] if named else "objects"


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes, *, trust: bool) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)


def _dumps(value: Any) -> bool:
    try:
        _dump(value)
    except Exception:
        return False
    return True


def _loads(value: Any) -> bool:
    try:
        _load(_dump(value), trust=False)
    except Exception:
        return False
    return True


def _find(value: Any, path: str, good: Any) -> tuple[str, Any]:
    """Returns path and value of the innermost object that fails."""
    children: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        children = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    for child_path, child in children:
        if not good(child):
            return _find(child, child_path, good)
    return path, value


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
