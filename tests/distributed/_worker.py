"""The process side of the pool: `python _worker.py SOCKET_FD SLOT STACKS_FILE`."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import random
import signal
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

# Running as a script puts this directory on the path; the modules in it are `distributed.X`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

#: Longer than any deadline of the pool: hangs are the pool's to report, with all stacks.
GROUP_TIMEOUT = timedelta(minutes=20)


class Context:
    """What a case gets: its rank, its world and a little communication."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world

    def gather(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, on every rank."""
        import torch.distributed as dist

        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, obj)
        return out

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch.distributed as dist

        dist.barrier()


def prepare() -> None:
    """Import what every case needs and make DeepSpeed quiet and free of just-in-time builds."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.ERROR)
    # init_distributed would compile this one (half a minute); only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # BF16_Optimizer calls this dozens of times with force=True, each with a full garbage collection.
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    import moc_ckpt  # noqa: F401  (hooks into an already imported deepspeed)

    # Everything imported so far is garbage never; collections between cases become 10 times cheaper.
    gc.collect()
    gc.freeze()


def join(rank: int, world: int, port: int) -> None:
    """Form a new process group of `world` ranks."""
    import deepspeed.comm as ds_comm
    import torch.distributed as dist

    leave()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
    ds_comm.init_distributed("gloo", dist_init_required=False, verbose=False)


def leave() -> None:
    """Leave the current process group, as far as torch and DeepSpeed remember it."""
    import deepspeed.comm.comm as ds_comm
    import torch.distributed as dist

    from distributed import harness

    harness.reset()
    if dist.is_initialized():
        dist.destroy_process_group()
    ds_comm.cdb = None


def seed_everything(seed: int) -> None:
    """Put all generators in a known state."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def serve(sock: socket.socket) -> None:
    """Answer cases until the pool says stop."""
    from distributed.pool import recv, send

    prepare()
    while True:
        try:
            message = recv(sock)
        except EOFError:
            return
        if message is None:
            return
        kind, result, usable = "ok", None, True
        try:
            if message["port"] is not None:
                join(message["rank"], message["world"], message["port"])
            seed_everything(1000 + message["rank"])
            module, _, name = message["target"].partition(":")
            case = getattr(importlib.import_module(module), name)
            result = case(Context(message["rank"], message["world"]), **message["kwargs"])
        except BaseException:
            kind, result = "error", traceback.format_exc()
        try:
            from distributed import harness

            harness.reset()
            gc.collect()
        except BaseException:
            traceback.print_exc()
            usable = False
        send(sock, (kind, result, usable))


def main() -> None:
    """Entry point."""
    fd, _slot, stacks = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    # Kept open on purpose: the signal handler writes to it.
    out = Path(stacks).open("a")  # noqa: SIM115
    faulthandler.enable(file=out, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=out, all_threads=True)
    serve(socket.socket(fileno=fd))
    sys.stdout.flush()
    # The interpreter's own teardown of torch.distributed can take seconds and nobody waits for it.
    os._exit(0)


if __name__ == "__main__":
    main()
