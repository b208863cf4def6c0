"""The test suite's own foundations: pool, zoo and oracle, checked against DeepSpeed's native checkpoints."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, oracle, zoo
from distributed.pool import CaseError, CaseHang, Pool

pytestmark = pytest.mark.distributed


# -------------------------------------------------------------------------------------------- pool


def case_who(ctx: Any, base: int) -> tuple[int, int, int]:
    import torch.distributed as dist

    return base + ctx.rank, dist.get_rank(), dist.get_world_size()


def case_one_raises(ctx: Any) -> None:
    if ctx.rank == 1:
        raise ValueError("rank one is special")


def case_hang(ctx: Any) -> None:
    if ctx.rank == 0:
        time.sleep(600)
    ctx.barrier()


def case_generators(ctx: Any) -> list[float]:
    import random

    import numpy as np
    import torch

    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_pool_runs_cases_in_any_world(pool: Pool) -> None:
    for world in (2, 1, 4, 2):
        assert pool.run(world, case_who, base=10) == [(10 + r, r, world) for r in range(world)]


def test_pool_starts_every_case_from_the_same_generators(pool: Pool) -> None:
    assert pool.run(2, case_generators) == pool.run(2, case_generators)


def test_pool_reports_rank_and_traceback(pool: Pool) -> None:
    with pytest.raises(CaseError, match=r"ranks \[1\](.|\n)*rank one is special"):
        pool.run(2, case_one_raises)
    assert pool.run(2, case_who, base=0)[1] == (1, 1, 2)


def test_pool_survives_a_hang() -> None:
    with Pool() as own:
        own.run(2, case_who, base=0)  # they have started, so that the deadline is the hang's alone
        with pytest.raises(CaseHang, match=r"no answer from ranks \[0, 1\](.|\n)*case_hang(.|\n)*case_hang"):
            own.run(2, case_hang, deadline=6.0)
        assert own.run(2, case_who, base=5) == [(5, 0, 2), (6, 1, 2)]


# ------------------------------------------------------------------------------- oracle against files


def _globalise(name: str, first: int) -> str:
    match = oracle._EXPERT.match(name)
    return f"{match[1]}{first + int(match[2])}{match[3]}" if match else name


def case_files(ctx: Any, row: str, path: str) -> list[str]:
    """Rebuild the global state from native files, the way zero_to_fp32 does, and compare it with the oracle."""
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    engine = harness.build(row, world=ctx.world)
    harness.train(engine, 3)
    engine.save_checkpoint(path, tag="t")
    whole = oracle.global_state(engine, ctx)
    places = {
        name: (list(groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name]), groups._get_expert_parallel_rank(name))
        for name in groups._EXPERT_PARALLEL_GROUP
    }
    layers = [(name, m) for name, m in engine.module.named_modules() if isinstance(m, MoE)]
    first_of = [
        {prefix: places[m.expert_group_name][1] * m.num_local_experts for prefix, m in layers},
        places,
    ]
    ranks = ctx.gather(first_of)
    ctx.barrier()
    if ctx.rank:
        return []
    top = Path(path, "t")
    model = torch.load(top / "mp_rank_00_model_states.pt", weights_only=False)
    optim = [
        torch.load(next(top.glob(f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt")), weights_only=False)[
            "optimizer_state_dict"
        ]
        for r in range(ctx.world)
    ]
    groups_of_optimizer = engine.optimizer.optimizer.param_groups
    out: list[str] = []
    seen = 0
    for index, shapes in enumerate(model["param_shapes"]):
        group = groups_of_optimizer[index]
        if group.get("moe"):
            teams = {tuple(ranks[r][1][group["name"]][0]) for r in range(ctx.world)}
        else:
            teams = {tuple(range(ctx.world))}
        for team in teams:
            parts = {"master": [optim[r]["single_partition_of_fp32_groups"][index].view(-1) for r in team]}
            for kind in ("exp_avg", "exp_avg_sq"):
                parts[kind] = [_moment(optim[r], index, kind) for r in team]
            # Some of these are saved without the padding at the end of the partition.
            size = max(piece.numel() for pieces in parts.values() for piece in pieces)
            flat = {kind: torch.cat([_padded(piece, size) for piece in pieces]) for kind, pieces in parts.items()}
            offset = 0
            for name, shape in shapes.items():
                prefix = name.split(".deepspeed_moe.experts.")[0]
                full = _globalise(name, ranks[team[0]][0].get(prefix, 0))
                count = math.prod(shape)
                for kind, values in flat.items():
                    out += filter(
                        None,
                        [
                            oracle._tensor_difference(
                                f"{full} {kind}", values[offset : offset + count], whole[full][kind]
                            )
                        ],
                    )
                    seen += 1
                offset += count
    assert seen == 3 * len(whole), f"{seen} tensors in the files, {3 * len(whole)} in the oracle"
    for number, (prefix, layer) in enumerate(layers):
        for expert in range(layer.num_experts):
            file = torch.load(top / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt", weights_only=False)
            for name, weight in file.items():
                assert f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{expert}." in name
                if name in whole:
                    cast = whole[name]["master"].view(weight.shape).to(weight.dtype)
                    out += filter(None, [oracle._tensor_difference(name, weight, cast)])
    return out[:12]


def _moment(saved: dict[str, Any], index: int, kind: str) -> Any:
    base = saved["base_optimizer_state"]
    return (base["state"][index][kind] if isinstance(base, dict) else base[index][kind]).view(-1)


def _padded(piece: Any, size: int) -> Any:
    import torch

    return torch.cat([piece, piece.new_zeros(size - piece.numel())])


@pytest.mark.parametrize("row", ["z2_bf16", "z2_fp32", "z1_fp32"])
def test_oracle_agrees_with_native_files(pool: Pool, ckpt_dir: str, row: str) -> None:
    assert pool.run(4, case_files, row=row, path=ckpt_dir)[0] == []


# ------------------------------------------------------------------- native save and load as an oracle


def case_native(ctx: Any, row: str, path: str) -> dict[str, Any]:
    """Native save, native load and the generators by hand: training goes on bit for bit."""
    engine = harness.build(row, world=ctx.world, seed=1)
    harness.train(engine, 5)
    assert engine.save_checkpoint(path) is True
    at5 = harness.snapshot(ctx, engine)
    losses = harness.train(engine, 5)
    at10 = harness.snapshot(ctx, engine)
    harness.discard(engine)
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=2)
    harness.train(engine, 2, data_seed=99)
    other = harness.differences(at5, harness.snapshot(ctx, engine))
    engine.load_checkpoint(path)
    oracle.restore_by_hand(engine, at5["local"])
    restored = harness.differences(at5, harness.snapshot(ctx, engine))
    again = harness.train(engine, 5)
    return {
        "other": other,
        "restored": restored,
        "losses": losses == again,
        "end": harness.differences(at10, harness.snapshot(ctx, engine)),
    }


@pytest.mark.parametrize("row", ["z2_bf16", "z1_bf16_fp32acc", "z0_bf16", "z0_fp32", "z2_bf16_round_robin"])
def test_native_checkpoint_is_exact(pool: Pool, ckpt_dir: str, row: str) -> None:
    for rank, result in enumerate(pool.run(zoo.ROWS[row].world, case_native, row=row, path=ckpt_dir)):
        assert result["other"], "the other engine was not different, so the test proves nothing"
        assert (result["restored"], result["losses"], result["end"]) == ([], True, []), f"rank {rank}"


def case_consistent(ctx: Any, row: str) -> list[str]:
    engine = harness.build(row, world=ctx.world)
    losses = harness.train(engine, 3)
    whole = [oracle.global_state(engine, ctx)]
    import torch.distributed as dist

    dist.broadcast_object_list(whole, src=0)
    assert all(float.fromhex(x) == float.fromhex(x) for x in losses), "the loss is not a number"
    experts = {name: entry for name, entry in whole[0].items() if oracle.set_expert_of(name)}
    assert experts, "no expert in the global state"
    sums: dict[float, str] = {}
    for name, entry in experts.items():
        if name.endswith("up.weight"):
            key = float(entry["master"].double().sum())
            assert key not in sums, f"{name} equals {sums[key]}: a mixed-up expert would go unnoticed"
            sums[key] = name
    return oracle.weights_differ_from_masters(oracle.local_state(engine), whole[0])


@pytest.mark.parametrize("row", sorted(zoo.ROWS))
def test_weights_are_cast_masters(pool: Pool, row: str) -> None:
    zoo.skip_unless_possible(row)
    world = zoo.ROWS[row].world
    assert pool.run(world, case_consistent, row=row) == [[]] * world


def test_worker_environment_is_private(pool: Pool) -> None:
    first = pool.run(1, case_environment)[0]
    assert first["CUDA_VISIBLE_DEVICES"] == ""
    assert first["TORCH_EXTENSIONS_DIR"] != os.environ.get("TORCH_EXTENSIONS_DIR", "")
    assert first["OMP_NUM_THREADS"] == "1"


def case_environment(ctx: Any) -> dict[str, str]:
    return dict(os.environ)
