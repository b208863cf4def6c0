"""Pins host memory while it is copied to a device: copies from pageable memory run at a fraction of the bus's rate."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["Pins", "merge_pages", "pinned"]

logger = logging.getLogger("moc_ckpt")

# Below it pinning costs more than it saves.
_LEAST_BYTES = 1 << 20
# CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
_ALREADY = 712


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


class Pins:
    """Host memory that is registered with a device, until it is let go. Belongs to one thread at a time.

    A copy from memory that could not be registered is slower, and as right.

    Args:
        device: where the bytes are going; nothing is done where that is no GPU.

    Attributes:
        nbytes: bytes that are registered.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done: list[int] = []
        self._driver: ctypes.CDLL | None = None
        self.nbytes = 0

    def add(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Registers memory.

        Args:
            ranges: (address, bytes); a copy must not cross from one into another of another call.
        """
        pages = [item for item in merge_pages(ranges) if item[1] >= _LEAST_BYTES]
        if self._device.type != "cuda" or not pages:
            return
        # The driver's own functions: a refusal by the runtime's stays behind, and fails the next kernel.
        driver = self._driver = self._driver or ctypes.CDLL("libcuda.so.1")
        torch.cuda.set_device(self._device)
        torch.cuda.current_stream(self._device).query()  # a thread has no context before its first call
        for address, nbytes in pages:
            code = int(driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0)))
            if code == 0:
                self._done.append(address)
                self.nbytes += nbytes
            elif code != _ALREADY:
                logger.info("%d bytes of host memory cannot be pinned: their copy takes longer", nbytes)

    def close(self) -> None:
        """Undoes it, once no copy needs it any more. Doing it again changes nothing."""
        done, self._done, self.nbytes = self._done, [], 0
        if done:
            torch.cuda.set_device(self._device)
            torch.cuda.current_stream(self._device).query()
        for address in done:
            assert self._driver is not None
            self._driver.cuMemHostUnregister(ctypes.c_void_p(address))


@contextmanager
def pinned(values: Sequence[torch.Tensor], device: torch.device) -> Iterator[int]:
    """Registers host tensors with a device while the context is open; yields the bytes that it registered.

    What is registered already stays so. Not collective.

    Args:
        values: contiguous CPU tensors.
        device: where they are going; nothing is done where that is no GPU.
    """
    pins = Pins(device)
    pins.add((value.data_ptr(), value.nbytes) for value in values)
    try:
        yield pins.nbytes
    finally:
        if pins.nbytes:
            torch.cuda.current_stream(device).synchronize()
        pins.close()
