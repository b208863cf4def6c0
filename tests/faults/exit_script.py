"""Trains two steps, saves, and ends at once: what the process leaves under way must still be committed.

RANK=0 WORLD_SIZE=2 MASTER_PORT=… python exit_script.py DIRECTORY KEPT HOW
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    path, kept, how = sys.argv[1:]
    from distributed import _worker, harness
    from distributed._worker import Context

    _worker.prepare()
    import deepspeed.comm.comm as ds_comm
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    ds_comm.init_distributed("gloo", dist_init_required=False, verbose=False)
    ctx = Context(rank, world)
    plugin = {"enabled": True, "save_mode": "async", "host": {"linger_s": 3.0}}
    engine = harness.build("w2_ep1", world=world, seed=1, plugin=plugin)
    harness.train(engine, 2)
    harness.keep(ctx, engine, kept)
    engine.save_checkpoint(path)
    if how == "destroy":
        dist.destroy_process_group()
    elif how == "error":
        raise SystemExit(3)
    elif how == "exception":
        raise RuntimeError("the training script fails")


if __name__ == "__main__":
    main()
