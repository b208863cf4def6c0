"""Copies from device memory into pinned host memory, so that training hardly notices.

A copy engine serves one stream until nothing of it is left. Copies of training itself (a loss, a gradient norm, the
counts of a gate) would wait for a whole snapshot, and so would every `torch.cuda.synchronize()`, which DeepSpeed
calls at every step. Pieces therefore alternate between two streams, each waiting for the one before, and only a window
of them is with the device at a time. What issues them is a few lines of C (paced_copy.c) that run beside the
interpreter; where they were not built, torch does the same and takes a little from the training thread.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["DeviceCopier", "PacedCopy", "load_paced_copy"]

logger = logging.getLogger("moc_ckpt")

# What others wait for the engine at most: 0.3 ms at 55 GB/s. Smaller pieces cost bandwidth.
_PIECE = 16 << 20
# Pieces with the device at a time: what a `synchronize` may wait for, and what bridges pauses of the issuing thread.
_WINDOW = 16
_PROBE_BYTES = 3 * 4096
_TIMED_OUT = -1
# Between looks at whether a piece is done, in seconds.
_PAUSE_S = 100e-6

Run = tuple[int, int, int]
"""(address on the device, address in host memory, bytes)."""


class _Driver(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("copy", "record", "wait", "query")]


class _Run(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("source", "target", "nbytes")]


class PacedCopy:
    """The compiled loop, over the driver's functions. Thread-safe; a call lets go of the interpreter's lock.

    Args:
        function: `moc_paced_copy_1` of the compiled library.
        driver: addresses of cuMemcpyDtoHAsync, cuEventRecord, cuStreamWaitEvent and cuEventQuery.
    """

    def __init__(self, function: Any, driver: Sequence[int]) -> None:
        pointer = ctypes.c_void_p
        function.argtypes = [
            ctypes.POINTER(_Driver),
            ctypes.POINTER(pointer),
            ctypes.POINTER(pointer),
            ctypes.c_size_t,
            ctypes.POINTER(_Run),
            ctypes.c_size_t,
            ctypes.c_uint64,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_int),
        ]
        function.restype = ctypes.c_int
        self._function = function
        self._driver = _Driver(*driver)

    def __call__(
        self, streams: tuple[int, int], events: Sequence[int], runs: Sequence[Run], piece: int, deadline_s: float
    ) -> tuple[int, int]:
        """Issues copies; returns when the last one is with the device.

        Args:
            streams: handles; the first one's earlier work comes before all copies.
            events: handles; as many pieces are with the device at most.
            runs: what to copy, in this order.
            piece: bytes after which the other stream goes on.
            deadline_s: longest wait for a piece, in seconds.

        Returns:
            The driver's error code (0: none; -1: a piece was not done in time), and which stream ends last.
        """
        last = ctypes.c_int(0)
        code = self._function(
            ctypes.byref(self._driver),
            (ctypes.c_void_p * 2)(*streams),
            (ctypes.c_void_p * len(events))(*events),
            len(events),
            (_Run * len(runs))(*(_Run(*run) for run in runs)),
            len(runs),
            piece,
            int(deadline_s * 1e9),
            ctypes.byref(last),
        )
        return code, last.value


def load_paced_copy() -> Any:
    """Returns the compiled function, or None where it was not built."""
    for path in sorted(Path(__file__).parent.glob("_paced_copy*.so")):
        try:
            return ctypes.CDLL(str(path)).moc_paced_copy_1
        except (OSError, AttributeError) as error:  # of another platform, or of another version of the package
            logger.info("%s is of no use: %s", path.name, error)
    return None


class DeviceCopier:
    """Copies from one device into registered host memory. Belongs to one thread, and to one job at a time.

    Args:
        device: the device.
        memory: the host memory, uint8 [bytes], registered with the device.
        deadline_s: longest wait for a piece, in seconds.
        piece: bytes after which others get the copy engine.
        window: pieces that are with the device at most, at least 2.
        compiled: False: torch issues the copies, even where the compiled loop is there.

    Attributes:
        streams: the two; all copies come after the first one's earlier work.
    """

    def __init__(
        self,
        device: torch.device,
        memory: torch.Tensor,
        *,
        deadline_s: float,
        piece: int = _PIECE,
        window: int = _WINDOW,
        compiled: bool = True,
    ) -> None:
        self._device = device
        self._memory = memory
        self._deadline_s = deadline_s
        self._piece = piece
        self.streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._events = [torch.cuda.Event() for _ in range(window)]
        for event in self._events:
            event.record(self.streams[0])  # its handle exists from the first record on
        self._paced = self._find() if compiled else None

    @property
    def compiled(self) -> bool:
        """Tells whether the compiled loop issues the copies."""
        return self._paced is not None

    def copy(self, runs: Sequence[Run], boundary: Any) -> tuple[Any, Any]:
        """Issues copies; returns when the last one is with the device. The host waits for all but a window of them.

        Args:
            runs: (address on the device, first byte in the host memory, bytes).
            boundary: event of the training stream; copies begin when it has come.

        Returns:
            Events of the begin and of the end of the copies, with times; waiting for the end does not spin.

        Raises:
            RuntimeError: if the device refuses a copy.
            TimeoutError: if a piece is not done in time.
        """
        base, first = self._memory.data_ptr(), self.streams[0]
        first.wait_stream(self.streams[1])
        first.wait_event(boundary)
        began = torch.cuda.Event(enable_timing=True)
        began.record(first)
        last = self._issue([(source, base + target, nbytes) for source, target, nbytes in runs])
        # Blocking: who waits for it sleeps, and leaves core and lock to others.
        ended = torch.cuda.Event(enable_timing=True, blocking=True)
        ended.record(self.streams[last])
        return began, ended

    def _issue(self, runs: Sequence[Run]) -> int:
        if self._paced is None:
            return self._issue_with_torch(runs)
        streams = self.streams[0].cuda_stream, self.streams[1].cuda_stream
        events = [event.cuda_event for event in self._events]
        code, last = self._paced(streams, events, runs, self._piece, self._deadline_s)
        if code == _TIMED_OUT:
            raise TimeoutError(f"the device did not end a copy of {self._piece:,} bytes in {self._deadline_s:g} s")
        if code:
            raise RuntimeError(f"the device refuses to copy to the host: CUDA error {code}")
        return last

    def _issue_with_torch(self, runs: Sequence[Run]) -> int:
        base, which = self._memory.data_ptr(), 0
        pieces = [
            (source + at, target + at - base, min(self._piece, nbytes - at))
            for source, target, nbytes in runs
            for at in range(0, nbytes, self._piece)
        ]
        for number, (source, target, nbytes) in enumerate(pieces):
            which, event = number % 2, self._events[number % len(self._events)]
            deadline = time.monotonic() + self._deadline_s
            while number >= len(self._events) and not event.query():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the device did not end a copy of {nbytes:,} bytes in {self._deadline_s:g} s")
                time.sleep(_PAUSE_S)
            if number:
                self.streams[which].wait_event(self._events[(number - 1) % len(self._events)])
            with torch.cuda.stream(self.streams[which]):
                self._memory[target : target + nbytes].copy_(_view(source, nbytes, self._device), non_blocking=True)
            event.record(self.streams[which])
        return which

    def _find(self) -> PacedCopy | None:
        """Returns the compiled loop if it is there and does what it should; it is tried once."""
        function = load_paced_copy()
        if function is None:
            logger.info("copies are issued by torch: moc_ckpt was installed without a C compiler")
            return None
        try:
            library = ctypes.CDLL("libcuda.so.1")
            names = "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuStreamWaitEvent", "cuEventQuery"
            driver = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
            paced = PacedCopy(function, driver)
        except (OSError, AttributeError) as error:
            logger.info("copies are issued by torch: %s", error)
            return None
        if not self._works(paced):
            logger.warning("copies are issued by torch: the driver's own functions do not work here")
            return None
        return paced

    def _works(self, paced: PacedCopy) -> bool:
        source = (torch.arange(_PROBE_BYTES, device=self._device) % 251).to(torch.uint8)
        target = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        torch.cuda.current_stream(self._device).synchronize()
        streams = self.streams[0].cuda_stream, self.streams[1].cuda_stream
        run = (source.data_ptr(), target.data_ptr(), _PROBE_BYTES)
        code, last = paced(streams, [event.cuda_event for event in self._events[:2]], [run], 4096, self._deadline_s)
        self.streams[last].synchronize()
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
