"""Copies live tensors into the arena while training goes on (DESIGN section 8, invariant I2).

A thread issues the copies, on a stream of its own for device tensors; memory of the host is copied by the thread
itself. The training thread spends microseconds: it records where in its stream the state is complete. The update that
would overwrite what is being read waits for the copy on the device; only for host memory it waits on the host.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moc_ckpt.errors import RendezvousTimeoutError
from moc_ckpt.plan.copy_plan import CopyRun, coalesce, cut
from moc_ckpt.snapshot.device_copy import DeviceCopier

__all__ = ["CopyJob", "Piece", "Stager", "Work", "register", "unregister"]

logger = logging.getLogger("moc_ckpt")

# Host memory is copied in steps of this size, so that the thread hands the interpreter lock over in between.
_STEP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor and its place in a slot; where its bytes lie is found once.

    Attributes:
        tensor: one dimension, contiguous, on any device; what it shows is copied when the job runs.
        offset: first byte in the slot.
        source: address of the tensor's storage; on a device or in the host's memory.
        start: first byte in the storage.
        nbytes: bytes of the tensor.
    """

    tensor: torch.Tensor
    offset: int
    source: int = field(init=False)
    start: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        tensor, size = self.tensor, self.tensor.element_size()
        object.__setattr__(self, "source", tensor.untyped_storage().data_ptr())
        object.__setattr__(self, "start", int(tensor.storage_offset()) * size)
        object.__setattr__(self, "nbytes", tensor.numel() * size)


Work = Sequence[tuple[Sequence[Piece], Sequence[tuple[int, int]]]]
"""For each slot its pieces and its extents: (first byte in the arena, bytes)."""


@dataclass(slots=True)
class CopyJob:
    """One snapshot's copies.

    Attributes:
        nbytes: bytes to copy.
        runs: contiguous copies that it took.
        seconds: how long they took; 0.0 while they run. On a device by its own clock.
        error: what went wrong; None if nothing did.
    """

    nbytes: int = 0
    runs: int = 0
    seconds: float = 0.0
    error: Exception | None = None
    _prepare: Callable[[], Work] = tuple
    _hold_back_s: float = 0.0
    _keep: Any = None
    _boundary: Any = None
    _began: Any = None
    _ended: Any = None
    _planned: threading.Event = field(default_factory=threading.Event)
    _issued: threading.Event = field(default_factory=threading.Event)
    _host_done: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        """Tells whether the copies have ended, well or not."""
        return self._done.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the end of the copies; tells whether it came. Any thread may wait."""
        return self._done.wait(timeout_s)

    def wait_planned(self, timeout_s: float) -> bool:
        """Waits until it is known where the copies go; tells whether it is. Any thread may wait."""
        return self._planned.wait(timeout_s)


class Stager:
    """Runs copy jobs one after the other. `start` and `before_update` belong to the training thread.

    Args:
        memory: the arena, uint8 [bytes], as a tensor over shared memory; registered with the device if there is one.
        device: the device that trains.
        deadline_s: seconds after which waiting for a copy is an error.
    """

    def __init__(self, memory: torch.Tensor, device: torch.device, *, deadline_s: float) -> None:
        self._address = memory.data_ptr()
        self._device = device if device.type == "cuda" else None
        self._deadline_s = deadline_s
        self._copier = DeviceCopier(device, memory, deadline_s=deadline_s) if self._device is not None else None
        self._current: CopyJob | None = None
        self._jobs: queue.SimpleQueue[tuple[CopyJob, Callable[[CopyJob], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="moc-stager", daemon=True)
        self._thread.start()

    def start(
        self,
        prepare: Callable[[], Work],
        then: Callable[[CopyJob], None],
        *,
        keep: Any = None,
        hold_back_s: float = 0.0,
    ) -> CopyJob:
        """Schedules the copies of a snapshot; returns at once.

        The job before this one must have ended (`join`): two would race for the order of the stream.

        Args:
            prepare: returns what to copy; called in the stager's thread.
            then: called in the stager's thread when the copies have ended.
            keep: tensors that must live until then.
            hold_back_s: seconds by which to begin later. At the beginning of a step the device waits for what the
                training thread launches, and planning copies takes the interpreter from it.
        """
        job = CopyJob(_prepare=prepare, _keep=keep, _hold_back_s=hold_back_s)
        if self._device is not None:
            # What is on the training stream now is the state to copy.
            job._boundary = torch.cuda.Event(enable_timing=False)
            job._boundary.record(torch.cuda.current_stream(self._device))
        self._current = job
        self._jobs.put((job, then))
        return job

    def before_update(self) -> float:
        """Keeps the coming update behind the copies; called before the optimizer overwrites anything.

        On a device the training stream waits for the copies' event, and the host goes on as soon as the last copy is
        with the device: only a window of them is at a time, so a host waits here for what does not hide behind forward
        and backward. Copies of host memory are waited for.

        Returns:
            Seconds that the host lost.

        Raises:
            RendezvousTimeoutError: if a copy does not end.
        """
        job = self._current
        if job is None or job.done:
            return 0.0
        begin = time.perf_counter()
        self._await(job._issued, "copies to be issued")
        if job._ended is not None and job.error is None:
            torch.cuda.current_stream(self._device).wait_event(job._ended)
        self._await(job._host_done, "a copy of host memory")
        return time.perf_counter() - begin

    def join(self) -> float:
        """Waits until the last job has ended; returns the seconds that it took to wait.

        Raises:
            RendezvousTimeoutError: if it does not.
        """
        job, begin = self._current, time.perf_counter()
        if job is not None and not job.done:
            self._await(job._done, "a snapshot's copies")
        return time.perf_counter() - begin

    def close(self) -> None:
        """Ends the thread after the last job. Doing it again changes nothing."""
        self._jobs.put(None)
        self._thread.join(self._deadline_s)

    def _await(self, event: threading.Event, what: str) -> None:
        if not event.wait(self._deadline_s):
            raise RendezvousTimeoutError(
                f"waited {self._deadline_s:g} s in vain for {what}",
                where="the thread moc-stager of this process",
                fix="look for errors of the device above; raise moc_checkpoint.timeouts.commit_s if it is just slow",
            )

    # ------------------------------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while (entry := self._jobs.get()) is not None:
            job, then = entry
            try:
                self._run(job)
            except Exception as error:
                job.error = error
            finally:
                job._prepare, job._keep = tuple, None
                try:
                    then(job)
                except Exception:
                    logger.exception("after a snapshot's copies")
                for event in (job._planned, job._issued, job._host_done, job._done):
                    event.set()

    def _run(self, job: CopyJob) -> None:
        if job._hold_back_s > 0:
            time.sleep(job._hold_back_s)
        begin = time.perf_counter()
        on_device, on_host = self._plan(job)
        job._planned.set()
        if on_device:
            assert self._copier is not None
            job._began, job._ended = self._copier.copy(on_device, job._boundary)
        job._issued.set()
        for source, target, nbytes in on_host:
            for at in range(0, nbytes, _STEP_BYTES):
                self._move(source + at, self._address + target + at, min(_STEP_BYTES, nbytes - at))
        job._host_done.set()
        if job._ended is not None:
            job._ended.synchronize()
            job.seconds = job._began.elapsed_time(job._ended) / 1000
        job.seconds = max(job.seconds, 0.0 if on_device else time.perf_counter() - begin)

    def _plan(self, job: CopyJob) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """Returns the copies of device memory and of host memory: (address, first byte in the arena, bytes)."""
        devices: dict[int, bool] = {}
        runs: list[CopyRun] = []
        for pieces, extents in job._prepare():
            placed = []
            for piece in pieces:
                if piece.nbytes:
                    placed.append((piece.source, piece.start, piece.offset, piece.nbytes))
                    if piece.source not in devices:
                        devices[piece.source] = piece.tensor.is_cuda
            runs += cut(placed, extents)
        joined = coalesce(runs)
        job.runs, job.nbytes = len(joined), sum(run.nbytes for run in joined)
        found: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
        for run in joined:
            found[not devices[run.source]].append((run.source + run.start, run.target, run.nbytes))
        return found

    def _move(self, source: int, target: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)


def register(memory: torch.Tensor) -> bool:
    """Pins the memory for the device, so that copies into it are asynchronous and run at the bus's rate.

    In one call, whatever its size (about 0.04 s per GiB): the device refuses copies that cross from one registration
    into the next.

    Args:
        memory: uint8 [bytes] over shared memory whose pages are populated.

    Returns:
        Whether there is a device that it could be registered with.

    Raises:
        RuntimeError: if the device refuses; then `ulimit -l` is usually too small.
    """
    if not torch.cuda.is_available():
        return False
    nbytes = memory.numel()
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
    if code != 0:
        raise RuntimeError(f"cudaHostRegister of {nbytes:,} bytes failed with error {code}; is `ulimit -l` too small?")
    return True


def unregister(memory: torch.Tensor) -> None:
    """Undoes `register`, before the memory is unmapped; nothing where there is no device."""
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
