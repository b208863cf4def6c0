"""A pool of real processes: started once, serving many cases.

A case is a module-level function `case(ctx, **kwargs)`. `Pool.run(world, case, **kwargs)` calls it at
the same time in `world` processes that form one torch.distributed (gloo) job and returns their results
in rank order. Starting DeepSpeed costs seconds, so the processes outlive their cases; between two cases
DeepSpeed's global state is reset (see `_worker.py`).

The processes are started with subprocess (never forked) and ended by pid. The first `world` of them
serve a case, so worlds of 1, 2, 4 and 8 share 8 processes. When a rank raises, the error names the rank
and carries its traceback. When a rank hangs, all stacks are dumped into the error, the processes of that
case are killed and fresh ones serve the cases after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: Multiplies every deadline, for slow or busy machines.
TIME_SCALE = float(os.environ.get("MOC_TEST_TIME_SCALE", "1"))


#: What DeepSpeed itself cannot do in older versions on the CPU: (first version that can, words of the traceback, why).
NATIVE_LIMITS = (
    ((0, 18), ("get_norm_with_moe_layers", "data must be a sequence"), "the gradient norm of BF16_Optimizer with MoE"),
    ((0, 19), ("_has_inf_or_nan", "Expected reduction dim"), "the overflow check of a partition without elements"),
    ((0, 19), ("DeepSpeedZeroConfig", "parameter_alignment"), "the option parameter_alignment"),
)


def skip_if_native_limit(text: str) -> None:
    """Skip the running test, with the reason, where an old DeepSpeed fails in its own code."""
    from importlib.metadata import version

    import pytest

    found = version("deepspeed")
    numbers = tuple(int(part) for part in found.split(".")[:2])
    for fixed, words, why in NATIVE_LIMITS:
        if numbers < fixed and all(word in text for word in words):
            pytest.skip(f"DeepSpeed {found} itself fails here: {why}")


class CaseError(AssertionError):
    """At least one rank raised; the text holds the tracebacks of all that did."""


class CaseHang(AssertionError):
    """At least one rank did not answer before the deadline; the text holds the stacks of all ranks."""


def send(sock: socket.socket, obj: Any) -> None:
    """Send one length-prefixed message."""
    data = pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    sock.sendall(struct.pack("<Q", len(data)) + data)


def recv(sock: socket.socket) -> Any:
    """Receive one length-prefixed message; EOFError when the other side is gone."""
    (size,) = struct.unpack("<Q", _recv_exactly(sock, 8))
    return pickle.loads(_recv_exactly(sock, size))


def _recv_exactly(sock: socket.socket, size: int) -> bytes:
    chunks = []
    while size:
        chunk = sock.recv(min(size, 1 << 20))
        if not chunk:
            raise EOFError("the other side closed the connection")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def free_port() -> int:
    """A TCP port on the loopback device that nothing listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def extensions_dir() -> str:
    """Where torch builds its C++ extensions: private to this environment, kept between sessions.

    torch keys this cache by extension name only, so sharing it between two torch versions breaks both.
    """
    import torch

    key = hashlib.sha1(f"{sys.prefix}|{sys.version}|{torch.__version__}".encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"moc_test_extensions_{os.getuid()}_{key}"
    path.mkdir(mode=0o700, exist_ok=True)
    return str(path)


def worker_env(**extra: str) -> dict[str, str]:
    """The environment of a worker: CPU only, one thread, loopback, quiet."""
    env = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        env.pop(name, None)
    env.update(
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
        TORCH_EXTENSIONS_DIR=extensions_dir(),
        PYTHONHASHSEED="0",
        PYTHONUNBUFFERED="1",
        TOKENIZERS_PARALLELISM="false",
        TORCH_CPP_LOG_LEVEL="ERROR",
        DISABLE_LOGS_WHILE_COMPILING="0",
        # The same ninja as in this process: another version would build DeepSpeed's kernels anew.
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        PYTHONPATH=os.pathsep.join(
            [str(ROOT), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])],
        ),
    )
    env.update(extra)
    return env


class Worker:
    """One process of the pool."""

    def __init__(self, slot: int, log_dir: Path, shared: Path) -> None:
        self.slot = slot
        self.log = log_dir / f"worker_{slot}.log"
        self.stacks = log_dir / f"worker_{slot}.stacks"
        self.stacks.write_text("")
        ours, theirs = socket.socketpair()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "_worker.py"), str(theirs.fileno()), str(slot), str(self.stacks)],
                env=worker_env(MOC_SHM_DIR=str(shared)),
                cwd=str(ROOT),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        theirs.close()
        self.sock = ours

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.sock.close()

    def log_tail(self, limit: int = 2000) -> str:
        data = self.log.read_bytes() if self.log.exists() else b""
        return data[-limit:].decode(errors="replace")


class Pool:
    """Processes that serve cases of any world size up to the largest asked for."""

    def __init__(self) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="moc_pool_"))
        # Arenas and agents' sockets of this pool alone; short, for a socket's path has 108 bytes.
        self._shared = Path(tempfile.mkdtemp(prefix="moc_t", dir="/dev/shm"))
        # For processes that tests start themselves; of several pools the first one's.
        os.environ.setdefault("MOC_SHM_DIR", str(self._shared))
        self._workers: list[Worker] = []
        self._group: tuple[int, tuple[int, ...]] | None = None
        self.restarts = 0
        self.seconds: list[tuple[str, int, float]] = []

    # ---------------------------------------------------------------- cases

    def run(
        self,
        world: int,
        case: Callable[..., Any] | str,
        /,
        *,
        deadline: float = 120.0,
        fresh_after: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `case(ctx, **kwargs)` on ranks 0..world-1 and return the results in rank order.

        Args:
            world: number of ranks.
            case: a module-level function, or "module:function".
            deadline: seconds (times MOC_TEST_TIME_SCALE) until the case counts as hanging.
            fresh_after: end these processes afterwards (for cases that leave DeepSpeed unusable).
            **kwargs: arguments of the case; they must pickle.

        Returns:
            One result per rank.

        Raises:
            CaseError: a rank raised.
            CaseHang: a rank did not answer in time, or its process died.
        """
        __tracebackhide__ = True
        target = case if isinstance(case, str) else f"{case.__module__}:{case.__qualname__}"
        self._ensure(world)
        began = time.monotonic()
        workers = self._workers[:world]
        signature = (world, tuple(w.process.pid for w in workers))
        # A TCP port for a new process group; None: these processes already form this world.
        port = None if self._group == signature else free_port()
        for rank, worker in enumerate(workers):
            send(worker.sock, {"target": target, "kwargs": kwargs, "rank": rank, "world": world, "port": port})
        self._group = signature
        answers = self._collect(workers, target, deadline * TIME_SCALE)
        self.seconds.append((target, world, time.monotonic() - began))
        errors = {rank: answer[1] for rank, answer in answers.items() if answer[0] == "error"}
        broken = [rank for rank, answer in answers.items() if not answer[2]]
        if broken or fresh_after:
            self._discard(workers)
        if errors:
            text = self._describe(target, world, errors)
            skip_if_native_limit(text)
            raise CaseError(text)
        if broken and not fresh_after:
            raise CaseError(f"{target}: ranks {broken} could not be reset after the case (see their logs)")
        return [answers[rank][1] for rank in range(world)]

    def _collect(self, workers: list[Worker], target: str, deadline: float) -> dict[int, tuple[str, Any, bool]]:
        __tracebackhide__ = True
        answers: dict[int, tuple[str, Any, bool]] = {}
        end = time.monotonic() + deadline
        while len(answers) < len(workers):
            pending = {w.sock.fileno(): (rank, w) for rank, w in enumerate(workers) if rank not in answers}
            ready, _, _ = select.select(list(pending), [], [], min(1.0, max(0.0, end - time.monotonic())))
            for fd in ready:
                rank, worker = pending[fd]
                try:
                    answers[rank] = recv(worker.sock)
                except (EOFError, ConnectionError):
                    worker.process.wait(timeout=10)
                    self._fail(workers, answers, f"rank {rank} died (exit {worker.process.returncode})", target)
                if answers[rank][0] == "error":
                    # The others either raise too, soon, or wait for this rank for ever.
                    end = min(end, time.monotonic() + 20.0 * TIME_SCALE)
            if not ready and time.monotonic() >= end:
                missing = sorted(rank for rank, _ in pending.values())
                self._fail(workers, answers, f"no answer from ranks {missing}", target)
        return answers

    def _fail(self, workers: list[Worker], answers: dict[int, Any], why: str, target: str) -> None:
        """Dump all stacks, kill the processes of the case and raise."""
        __tracebackhide__ = True
        for worker in workers:
            worker.stacks.write_text("")
            if worker.alive():
                os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        parts = [f"{target}: {why}"]
        for rank, worker in enumerate(workers):
            if rank in answers and answers[rank][0] == "error":
                parts.append(f"--- rank {rank} raised\n{answers[rank][1]}")
            elif rank in answers:
                parts.append(f"--- rank {rank} had finished")
            else:
                parts.append(f"--- rank {rank} stacks\n{worker.stacks.read_text()}\nlog tail:\n{worker.log_tail()}")
        self._discard(workers)
        raise CaseHang("\n".join(parts))

    def _describe(self, target: str, world: int, errors: dict[int, str]) -> str:
        parts = [f"{target}: {len(errors)} of {world} ranks raised"]
        seen: dict[str, list[int]] = {}
        for rank in sorted(errors):
            seen.setdefault(errors[rank], []).append(rank)
        parts += [f"--- ranks {ranks}\n{text}" for text, ranks in seen.items()]
        return "\n".join(parts)

    # ------------------------------------------------------------- processes

    def _ensure(self, world: int) -> None:
        for slot, worker in enumerate(self._workers):
            if not worker.alive():
                worker.kill()
                self._workers[slot] = Worker(slot, self._dir, self._shared)
                self.restarts += 1
        while len(self._workers) < world:
            self._workers.append(Worker(len(self._workers), self._dir, self._shared))

    def _discard(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.kill()
        self._group = None

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                send(worker.sock, None)
        end = time.monotonic() + 5
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=max(0.1, end - time.monotonic()))
            worker.kill()
        self._workers = []
        if os.environ.get("MOC_SHM_DIR") == str(self._shared):
            del os.environ["MOC_SHM_DIR"]
        if os.environ.get("MOC_TEST_KEEP") == "1":
            print(f"pool logs: {self._dir}, shared memory: {self._shared}")
        else:
            # Agents end by themselves soon; without their directory they have nothing to do.
            shutil.rmtree(self._shared, ignore_errors=True)
            shutil.rmtree(self._dir, ignore_errors=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
