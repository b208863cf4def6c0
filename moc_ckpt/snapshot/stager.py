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
from moc_ckpt.plan.copy_plan import coalesce, cut

__all__ = ["CopyJob", "Piece", "Stager", "register", "unregister"]

logger = logging.getLogger("moc_ckpt")

# Host memory is copied in steps of this size, so that the thread hands the interpreter lock over in between.
_STEP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor and its place in a slot.

    Attributes:
        tensor: one dimension, contiguous, on any device; what it shows is copied when the job runs.
        offset: first byte in the slot.
    """

    tensor: torch.Tensor
    offset: int


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
    _work: Sequence[tuple[Sequence[Piece], Sequence[tuple[int, int]]]] = ()
    _keep: Any = None
    _boundary: Any = None
    _began: Any = None
    _ended: Any = None
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


class Stager:
    """Runs copy jobs one after the other. `start` and `before_update` belong to the training thread.

    Args:
        memory: the arena, uint8 [bytes], as a tensor over shared memory; registered with the device if there is one.
        device: the device that trains.
        deadline_s: seconds after which waiting for a copy is an error.
    """

    def __init__(self, memory: torch.Tensor, device: torch.device, *, deadline_s: float) -> None:
        self._memory = memory
        self._address = memory.data_ptr()
        self._device = device if device.type == "cuda" else None
        self._deadline_s = deadline_s
        self._stream = torch.cuda.Stream(device) if self._device is not None else None
        self._current: CopyJob | None = None
        self._jobs: queue.SimpleQueue[tuple[CopyJob, Callable[[CopyJob], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="moc-stager", daemon=True)
        self._thread.start()

    def start(
        self,
        work: Sequence[tuple[Sequence[Piece], Sequence[tuple[int, int]]]],
        then: Callable[[CopyJob], None],
        *,
        keep: Any = None,
    ) -> CopyJob:
        """Schedules the copies of a snapshot; returns at once.

        The job before this one must have ended (`join`): two would race for the order of the stream.

        Args:
            work: for each slot its pieces and its extents: (first byte in the arena, bytes).
            then: called in the stager's thread when the copies have ended.
            keep: tensors that must live until then.
        """
        job = CopyJob(_work=work, _keep=keep)
        if self._device is not None:
            # What is on the training stream now is the state to copy.
            job._boundary = torch.cuda.Event(enable_timing=False)
            job._boundary.record(torch.cuda.current_stream(self._device))
        self._current = job
        self._jobs.put((job, then))
        return job

    def before_update(self) -> float:
        """Keeps the coming update behind the copies; called before the optimizer overwrites anything.

        On a device the training stream waits for the copies' event and the host goes on. Copies of host memory are
        waited for.

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
                job._work, job._keep = (), None
                try:
                    then(job)
                except Exception:
                    logger.exception("after a snapshot's copies")
                for event in (job._issued, job._host_done, job._done):
                    event.set()

    def _run(self, job: CopyJob) -> None:
        begin = time.perf_counter()
        on_device, on_host = self._plan(job)
        if on_device:
            assert self._stream is not None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(job._boundary)
                job._began = torch.cuda.Event(enable_timing=True)
                job._began.record()
                for source, target in on_device:
                    target.copy_(source, non_blocking=True)
                ended = torch.cuda.Event(enable_timing=True)
                ended.record()
                job._ended = ended
        job._issued.set()
        for source_address, target_address, nbytes in on_host:
            self._move(source_address, target_address, nbytes)
        job._host_done.set()
        if job._ended is not None:
            # Sleeps instead of spinning would be kinder to the other cores, but timing events cannot block.
            while not job._ended.query():
                time.sleep(0.0005)
            job.seconds = job._began.elapsed_time(job._ended) / 1000
        job.seconds = max(job.seconds, 0.0 if on_device else time.perf_counter() - begin)

    def _plan(self, job: CopyJob) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[int, int, int]]]:
        """Returns (source, target) views of device copies and (source, target, bytes) addresses of host copies."""
        bases: dict[tuple[int, bool], torch.Tensor] = {}
        runs = []
        for pieces, extents in job._work:
            placed = []
            for piece in pieces:
                tensor = piece.tensor
                nbytes = tensor.numel() * tensor.element_size()
                if not nbytes:
                    continue
                storage = tensor.untyped_storage()
                source = storage.data_ptr()
                bases.setdefault((source, tensor.is_cuda), tensor)
                start = int(tensor.storage_offset()) * tensor.element_size()
                placed.append((source, start, piece.offset, nbytes))
            runs += cut(placed, extents)
        joined = coalesce(runs)
        job.runs, job.nbytes = len(joined), sum(run.nbytes for run in joined)
        on_device: list[tuple[torch.Tensor, torch.Tensor]] = []
        on_host: list[tuple[int, int, int]] = []
        bytes_of: dict[int, torch.Tensor] = {}
        for run in joined:
            if (run.source, True) in bases:
                whole = bytes_of.get(run.source)
                if whole is None:
                    storage = bases[run.source, True].untyped_storage()
                    whole = torch.empty(0, dtype=torch.uint8, device=bases[run.source, True].device).set_(storage)
                    bytes_of[run.source] = whole
                target = self._memory[run.target : run.target + run.nbytes]
                on_device.append((whole[run.start : run.start + run.nbytes], target))
            else:
                for at in range(0, run.nbytes, _STEP_BYTES):
                    count = min(_STEP_BYTES, run.nbytes - at)
                    on_host.append((run.source + run.start + at, self._address + run.target + at, count))
        return on_device, on_host

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
