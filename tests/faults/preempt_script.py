"""Trains until a SIGTERM ends it, and keeps what the oracle sees at that moment.

RANK=0 WORLD_SIZE=2 MASTER_PORT=… python preempt_script.py FOLDER PLUGIN_JSON [TWIST]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 3000


def main() -> None:
    folder, plugin = Path(sys.argv[1]), json.loads(sys.argv[2])
    twist = sys.argv[3] if len(sys.argv) > 3 else ""
    from distributed import _worker, harness
    from distributed._worker import Context

    _worker.prepare()
    import deepspeed.comm.comm as ds_comm
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    ds_comm.init_distributed("gloo", dist_init_required=False, verbose=False)
    ctx = Context(rank, world)
    heard: list[int] = []

    def mine(signum: int, _frame: Any) -> None:
        heard.append(signum)

    if twist in ("chain", "close"):
        signal.signal(signal.SIGTERM, mine)
    before = signal.getsignal(signal.SIGTERM)
    engine = harness.build("w2_ep1", world=world, seed=1, plugin=plugin)
    if plugin.get("preempt_save", True):
        assert signal.getsignal(signal.SIGTERM) is not before
    engine.moc.register_state(lambda: {"position": engine.global_steps * 10})
    if twist == "close":
        engine.moc.close()
        assert signal.getsignal(signal.SIGTERM) is mine, "the handler from before is not back"
        os.kill(os.getpid(), signal.SIGTERM)
        harness.train(engine, 2)
        assert heard == [signal.SIGTERM]
        return
    if twist == "explicit":
        harness.train(engine, 1)
        engine.save_checkpoint(str(folder / "c"))
    if twist == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(300)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM, "a forked child does not die of the signal"
    try:
        for number in range(STEPS):
            harness.train(engine, 1)
            (folder / f"ready{rank}").write_text(str(number))
            if rank == 0:
                time.sleep(0.01 * (number % 5))  # ranks are not in step
    except SystemExit as end:
        (folder / f"end{rank}").write_text(f"{engine.global_steps} {end.code} {len(heard)}")
        harness.keep(ctx, engine, str(folder / "kept.pt"))
        raise
    (folder / f"end{rank}").write_text("not ended")


if __name__ == "__main__":
    main()
