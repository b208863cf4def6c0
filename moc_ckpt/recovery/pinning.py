"""Pins host memory while it is copied to a device: copies from pageable memory run at a fraction of the bus's rate."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["merge_pages", "pinned"]

logger = logging.getLogger("moc_ckpt")

# Below it pinning costs more than it saves.
_LEAST_BYTES = 1 << 20


def merge_pages(ranges: Iterable[tuple[int, int]], page: int = mmap.PAGESIZE) -> list[tuple[int, int]]:
    """Returns the pages of byte ranges, joined where they meet: (address, bytes), ascending. Pure.

    Args:
        ranges: (address, bytes), in any order.
        page: bytes of a page.
    """
    found: list[tuple[int, int]] = []
    for address, nbytes in sorted(ranges):
        if nbytes <= 0:
            continue
        start, stop = address // page * page, -(-(address + nbytes) // page) * page
        if found and start <= found[-1][0] + found[-1][1]:
            begin, count = found.pop()
            start, stop = begin, max(stop, begin + count)
        found.append((start, stop - start))
    return found


@contextmanager
def pinned(values: Sequence[torch.Tensor], device: torch.device) -> Iterator[int]:
    """Registers host tensors with a device while the context is open; yields the bytes that were registered.

    A copy from memory that could not be registered is slower, and as right. Not collective.

    Args:
        values: contiguous CPU tensors.
        device: where they are going; nothing is done where that is no GPU.
    """
    done: list[int] = []
    total = 0
    driver = ctypes.CDLL("libcuda.so.1") if device.type == "cuda" and any(value.numel() for value in values) else None
    if driver is not None:
        # The driver's own functions: a refusal by the runtime's stays behind, and fails the next kernel.
        torch.cuda.current_stream(device).synchronize()
        for address, nbytes in merge_pages((value.data_ptr(), value.nbytes) for value in values):
            if nbytes < _LEAST_BYTES:
                continue
            if driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0)) == 0:
                done.append(address)
                total += nbytes
            else:
                logger.info("%d bytes of host memory cannot be pinned: their copy takes longer", nbytes)
    try:
        yield total
    finally:
        if done:
            torch.cuda.current_stream(device).synchronize()
        for address in done:
            assert driver is not None
            driver.cuMemHostUnregister(ctypes.c_void_p(address))
