"""crc32c of parts, and of the whole they make (pure)."""

from __future__ import annotations

from functools import lru_cache

from crc32c import crc32c

__all__ = ["crc32c", "crc32c_combine"]

_POLYNOMIAL = 0x82F63B78


def _multiply(a: int, b: int) -> int:
    """Returns a*b modulo the polynomial (bits reflected: bit 31 is x^0)."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def _shift(nbytes: int) -> int:
    """Returns x^(8 nbytes) modulo the polynomial."""
    result, power = 1 << 31, 1 << 23  # x^0, x^8
    while nbytes:
        if nbytes & 1:
            result = _multiply(result, power)
        power = _multiply(power, power)
        nbytes >>= 1
    return result


def crc32c_combine(first: int, second: int, second_nbytes: int) -> int:
    """Returns the crc32c of two byte strings joined.

    Args:
        first: crc32c of the first one.
        second: crc32c of the second one.
        second_nbytes: length of the second one in bytes.
    """
    return _multiply(_shift(second_nbytes), first) ^ second
