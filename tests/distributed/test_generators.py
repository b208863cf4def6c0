"""Random number generators in a world of another size: shared streams go on, the others differ by rank."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest

from distributed import harness
from distributed.harness import ON
from distributed.pool import Pool
from distributed.test_errors import DEADLINE
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed

ROW = Row("generators", world=2, layers=(Layer(experts=2, ep=1),))
STREAMS = ("python", "numpy", "torch")


def build(ctx: Any) -> Any:
    harness.reset()
    return harness.build(ROW, world=ctx.world, seed=1 + ctx.world, plugin=ON)


def seed(ctx: Any, alike: tuple[str, ...]) -> None:
    """Seed the generators, those named `alike` on all ranks."""
    import numpy as np
    import torch

    seeds = {name: 50 if name in alike else 60 + ctx.rank for name in STREAMS}
    random.seed(seeds["python"])
    np.random.seed(seeds["numpy"])
    torch.manual_seed(seeds["torch"])


def draws() -> dict[str, str]:
    """What each generator draws next; the generators move on."""
    import numpy as np
    import torch

    torch_bytes = torch.rand(8).numpy().tobytes()
    return {
        "python": repr([random.random() for _ in range(3)]),
        "numpy": hashlib.sha1(np.random.rand(8).tobytes()).hexdigest(),
        "torch": hashlib.sha1(torch_bytes).hexdigest(),
    }


def case_save(ctx: Any, path: str, alike: tuple[str, ...]) -> dict[str, str]:
    """Save and go on drawing."""
    engine = build(ctx)
    harness.train(engine, 1)
    seed(ctx, alike)
    draws()
    engine.save_checkpoint(path, tag="t")
    return draws()


def case_load(ctx: Any, path: str, cases: list[tuple[str, ...]]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """What each rank draws after a load, and after another one, by the streams that were alike before."""
    engine = build(ctx)
    out = []
    for alike in cases:
        harness.train(engine, 1)
        seed(ctx, alike)
        engine.load_checkpoint(path)
        first = draws()
        engine.load_checkpoint(path)
        out.append((first, draws()))
    return out


def test_growing_keeps_apart_what_was_apart(pool: Pool, ckpt_dir: str) -> None:
    """One saved rank shares each stream with itself: that alone must not make the ranks draw alike."""
    (saved,) = pool.run(1, case_save, path=ckpt_dir, alike=())
    cases: list[tuple[str, ...]] = [(), ("python",), STREAMS]
    one, two = pool.run(2, case_load, path=ckpt_dir, cases=cases, deadline=DEADLINE)
    for alike, (first, again), (other, other_again) in zip(cases, one, two, strict=True):
        assert (first, other) == (again, other_again), f"{alike}: not reproducible"
        for stream in STREAMS:
            if stream in alike:
                assert first[stream] == other[stream] == saved[stream], f"{stream} of {alike} does not go on"
            else:
                assert len({first[stream], other[stream], saved[stream]}) == 3, f"{stream} of {alike} is shared"


def test_shrinking_goes_on_with_what_was_shared(pool: Pool, ckpt_dir: str) -> None:
    both = pool.run(2, case_save, path=ckpt_dir, alike=("python", "numpy"), deadline=DEADLINE)
    ((result,),) = pool.run(1, case_load, path=ckpt_dir, cases=[()])
    first, again = result
    assert first == again
    for stream in ("python", "numpy"):
        assert first[stream] == both[0][stream] == both[1][stream], f"{stream} does not go on"
    assert first["torch"] not in {result["torch"] for result in both}, "torch's stream was not shared"
