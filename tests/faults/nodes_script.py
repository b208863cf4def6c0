"""One rank of a training on several nodes, under torchrun; keeps what the oracle sees after every step.

torchrun … nodes_script.py FOLDER PLUGIN_JSON LIFE [STEPS]

Life 1 trains until it is killed. A later one resumes, compares what came back, trains STEPS steps and ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from distributed.zoo import Layer, Row

#: With two expert-parallel ranks each rank has half of the experts, whole.
ROW = Row("w2_ep2", world=2, stage=1, layers=(Layer(ep=2), Layer(ep=2, k=2)), rank_buffers=False)


def main() -> None:
    folder, plugin, life = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    from distributed import _worker, harness, pec_tools
    from distributed._worker import Context

    _worker.prepare()
    import deepspeed.comm.comm as ds_comm
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    ds_comm.init_distributed("gloo", dist_init_required=False, verbose=False)
    ctx = Context(rank, world)
    diary = pec_tools.Diary(ctx, str(folder / "c"), str(folder / "kept"))

    def tell(name: str, data: Any) -> None:
        fresh = folder / f"new.{name}.{life}.{rank}"
        fresh.write_text(json.dumps(data))
        fresh.replace(folder / f"{name}.{life}.{rank}")

    tell("pid", os.getpid())
    with harness.logged() as said:
        engine = pec_tools.build(ctx, ROW, 1, seed=life, **plugin)
    if life == 1:
        while True:
            harness.train(engine, 1)
            diary.note(engine, attempt=1)
            # With how many saves this rank waits for an answer to.
            tell("step", [engine.global_steps, sum(save.outcome is None for save in engine.moc.pipeline._saves)])
    body = pec_tools.manifest(diary.path)
    wrong = diary.load(engine)
    found, losses = engine.global_steps, []
    tell("found", {"step": found, "wrong": wrong, "body": body, "said": [text for _, text in said]})
    for _ in range(int(sys.argv[4])):
        losses += harness.train(engine, 1)
        diary.note(engine, attempt=2)
    engine.moc.wait()
    tell("end", {"losses": losses})
    harness.discard(engine)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
