#!/usr/bin/env python3
"""How fast the stager's copies leave every GPU of this machine, one alone and all at once.

    python scripts/bench/copy_rate.py --gib 6

Per GPU a process with registered shared memory, as an arena has it. `whole` is one copy by the driver, the limit;
`pieces` are those of the stager, which let others have the copy engine in between. Medians of three, GB/s.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _ranks import rank_environments

from moc_ckpt.snapshot.device_copy import DeviceCopier
from moc_ckpt.snapshot.stager import register, unregister

_REPEATS = 3


def shared_memory(nbytes: int, rank: int) -> torch.Tensor:
    """Returns populated shared memory that is registered with the device."""
    path = Path(os.environ.get("MOC_SHM_DIR", "/dev/shm")) / f"moc-copy-rate-{os.getpid()}-{rank}"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(handle, nbytes)
        memory = np.frombuffer(mmap.mmap(handle, nbytes), dtype=np.uint8)
    finally:
        path.unlink()
        os.close(handle)
    memory[::4096] = 1
    tensor = torch.from_numpy(memory)
    register(tensor)
    return tensor


def rank_main(nbytes: int) -> None:
    """Measures one GPU; rank 0 prints the report."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = shared_memory(nbytes, rank)
    copier = DeviceCopier(device, target, deadline_s=60.0)
    boundary = torch.cuda.Event()
    boundary.record()

    def whole() -> None:
        target.copy_(source, non_blocking=True)

    def pieces() -> None:
        copier.copy([(source.data_ptr(), 0, nbytes)], boundary)

    def rate(copy: Callable[[], object], *, alone: bool) -> float:
        rates = []
        for _ in range(_REPEATS):
            for turn in range(world if alone else 1):
                dist.barrier()
                if alone and turn != rank:
                    continue
                torch.cuda.synchronize()
                begin = time.perf_counter()
                copy()
                torch.cuda.synchronize()
                rates.append(nbytes / (time.perf_counter() - begin) / 1e9)
        dist.barrier()
        return round(statistics.median(rates), 1)

    found = {
        "compiled": copier.compiled,
        "alone": {"whole": rate(whole, alone=True), "pieces": rate(pieces, alone=True)},
        "all at once": {"whole": rate(whole, alone=False), "pieces": rate(pieces, alone=False)},
    }
    if not torch.equal(target, source.cpu()):
        raise SystemExit("the copy differs from the source")
    replies: list[object] = [None] * world
    dist.all_gather_object(replies, found)
    if rank == 0:
        print(json.dumps({"device": torch.cuda.get_device_name(), "bytes": nbytes, "gpus": replies}, indent=1))
    unregister(target)
    dist.destroy_process_group()


def main() -> None:
    """Starts one process per GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0)
    nbytes = int(parser.parse_args().gib * 2**30) // 4096 * 4096
    if "RANK" in os.environ:
        rank_main(nbytes)
        return
    world = torch.cuda.device_count()
    if not world:
        raise SystemExit("this machine has no GPU")
    processes = [subprocess.Popen([sys.executable, *sys.argv], env=env) for env in rank_environments(world)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
