"""Fragments: layout-free addresses of bytes of training state (DESIGN section 2). Pure: no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DTYPE_BYTES", "EXP_AVG", "EXP_AVG_SQ", "MASTER", "WEIGHT", "Fragment", "TensorKey", "itemsize"]

MASTER = "master"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
WEIGHT = "weight"

DTYPE_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
}


def itemsize(dtype: str) -> int:
    """Returns the bytes of one element of `dtype` (a torch name without the `torch.` prefix).

    Raises:
        ValueError: if the dtype is unknown.
    """
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}") from None


class TensorKey(NamedTuple):
    """Names one logical tensor: a parameter's or buffer's full name and a state kind."""

    fqn: str
    kind: str


@dataclass(frozen=True, slots=True, order=True)
class Fragment:
    """An interval of one logical tensor, independent of how ranks shard it.

    Attributes:
        fqn: parameter or buffer name from the module root, experts with their GLOBAL id.
        kind: `master`, `exp_avg`, `exp_avg_sq`, `weight`, or another key of the optimizer's state.
        dtype: torch dtype name without its prefix, e.g. `float32`.
        shape: shape of the whole logical tensor, in elements.
        start: first element of the interval in the row-major flattened logical tensor.
        stop: one past the last element.
    """

    fqn: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.tensor_numel:
            raise ValueError(f"fragment [{self.start}, {self.stop}) is outside {self.fqn} {self.shape}")

    @property
    def key(self) -> TensorKey:
        """The logical tensor this is a part of."""
        return TensorKey(self.fqn, self.kind)

    @property
    def numel(self) -> int:
        """Elements in the interval."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Bytes of the interval."""
        return self.numel * itemsize(self.dtype)

    @property
    def tensor_numel(self) -> int:
        """Elements of the whole logical tensor."""
        return math.prod(self.shape)
