"""Issues many copies from device memory into pinned host memory at next to no cost for other threads.

A copy through torch takes about 10 microseconds of the interpreter, and lets go of its lock in between, so that
hundreds of copies mean hundreds of turns with a training thread that needs the lock itself. The driver's own
function is called here without letting go: some hundred copies are issued in one go, in well under a millisecond.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["DeviceCopier"]

logger = logging.getLogger("moc_ckpt")

# A queue of the device takes about a thousand entries; behind that the driver waits, and must not have the lock then.
_IN_ONE_GO = 512
_PROBE_BYTES = 4096
# Copies that training itself needs (a loss, a norm) share the engine with these: they wait for one of them at most.
_LONGEST = 32 << 20


class DeviceCopier:
    """Copies from one device into registered host memory. Belongs to one thread.

    Where the driver's library is not there, or does not do what it should (it is tried once), torch copies.

    Args:
        device: the device.
        memory: the host memory, uint8 [bytes], registered with the device.
    """

    def __init__(self, device: torch.device, memory: torch.Tensor) -> None:
        self._device = device
        self._memory = memory
        self._address = memory.data_ptr()
        self._calls = self._find()

    def issue(self, runs: Sequence[tuple[int, int, int]], stream: torch.cuda.Stream) -> None:
        """Issues copies; returns at once.

        Args:
            runs: (address on the device, first byte in the host memory, bytes).
            stream: the stream that they go to; it must be the current one.

        Raises:
            RuntimeError: if the device refuses one.
        """
        pieces = [
            (source + at, target + at, min(_LONGEST, nbytes - at))
            for source, target, nbytes in runs
            for at in range(0, nbytes, _LONGEST)
        ]
        if self._calls is None:
            for source, target, nbytes in pieces:
                self._memory[target : target + nbytes].copy_(_view(source, nbytes, self._device), non_blocking=True)
            return
        call, handle, base = self._calls[len(pieces) > _IN_ONE_GO], stream.cuda_stream, self._address
        for source, target, nbytes in pieces:
            if code := call(base + target, source, nbytes, handle):
                raise RuntimeError(f"the device refuses to copy {nbytes:,} bytes to the host: CUDA error {code}")

    def _find(self) -> tuple[Any, Any] | None:
        """Returns the driver's copy function: without letting go of the interpreter's lock, and with."""
        try:
            libraries = ctypes.PyDLL("libcuda.so.1"), ctypes.CDLL("libcuda.so.1")
            calls = tuple(library.cuMemcpyDtoHAsync_v2 for library in libraries)
        except (OSError, AttributeError) as error:
            logger.info("copies go through torch: %s", error)
            return None
        for call in calls:
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
            call.restype = ctypes.c_int
        if not all(self._works(call) for call in calls):
            logger.warning("copies go through torch: the driver's own copy function does not work here")
            return None
        return calls[0], calls[1]

    def _works(self, call: Any) -> bool:
        source = torch.arange(_PROBE_BYTES, device=self._device).to(torch.uint8)
        target = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.current_stream(self._device)
        code = call(target.data_ptr(), source.data_ptr(), _PROBE_BYTES, stream.cuda_stream)
        stream.synchronize()
        return code == 0 and torch.equal(target, source.cpu())


class _DeviceMemory:
    """Shows device memory by address to `torch.as_tensor`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _view(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_DeviceMemory(address, nbytes), device=device)
