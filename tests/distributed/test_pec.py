"""Partial checkpoints: which experts a save takes, and that a mixed-version restore is exact."""

from __future__ import annotations

from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import (
    DEADLINE,
    Diary,
    Waiting,
    build,
    cycle,
    everyone,
    manifest,
    row_experts,
    versions,
    written,
)
from distributed.pool import Pool
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed

#: Layers with different numbers of experts, in different expert parallelism.
UNEVEN = (Layer(experts=2, ep=1), Layer(experts=4, ep=2, k=2), Layer(experts=8, ep=4, residual=True))


def row_of(name: str) -> Row:
    if name == "uneven":
        return zoo.ROWS["z2_bf16"].with_model(layers=UNEVEN)
    if name == "frozen":
        return zoo.ROWS["z1_bf16"].with_model(freeze=("blocks.1.moe.deepspeed_moe.experts",))
    return zoo.ROWS[name]


def case_mixed(ctx: Any, path: str, row: str, saves: int, k: int, plugin: dict[str, Any]) -> dict[str, Any]:
    """Train and save; then load the newest, and one from the middle, into other engines."""
    shape = row_of(row)
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, shape, k, storage={"keep_last": 0}, **plugin)
    waiting = Waiting(row_experts(shape))
    out: dict[str, Any] = {"sizes": [], "longest": [], "wrong": []}
    for _ in range(saves):
        harness.train(engine, 1)
        took = waiting.saw(diary.save(engine))
        out["sizes"].append([sum(layer == at for layer, _ in took) for at in range(len(waiting.experts))])
        out["longest"].append([waiting.longest(at) for at in range(len(waiting.experts))])
    out["plt before"] = engine.moc.plt
    middle = f"global_step{saves // 2 + 1}"
    engine = build(ctx, shape, k, seed=2, **plugin)
    harness.train(engine, 2, data_seed=99)
    out["wrong"] += diary.load(engine)
    out["plt"] = engine.moc.plt
    out["wrong"] += diary.load(engine, middle)
    out["versions"] = len(set(versions(manifest(diary.path)).values()))
    return out


MIXED = [
    ("z2_bf16", 1, {}),
    ("z2_bf16", 2, {"selection": "load_aware"}),
    ("uneven", 3, {}),
    ("z0_bf16", 1, {}),
    ("z0_fp32", 1, {"save_weights": "sharded"}),
    ("z2_fp32", 2, {"sharding": "equal"}),
    ("z1_bf16_fp32acc", 1, {}),
    ("z2_bf16_round_robin", 1, {}),
    ("z2_bf16_aligned", 1, {}),
    ("z2_bf16_cpu_adam", 1, {}),
    ("z1_fp32_amsgrad", 1, {}),
    ("z2_bf16_sgd", 1, {}),
    ("z2_fp16", 1, {}),
    ("z2_bf16_data_first", 1, {}),
    ("frozen", 1, {"save_weights": "sharded"}),
]


@pytest.mark.parametrize(("row", "k", "plugin"), MIXED, ids=lambda value: str(value).replace(" ", ""))
def test_mixed_versions_restore_exactly(pool: Pool, ckpt_dir: str, row: str, k: int, plugin: dict[str, Any]) -> None:
    zoo.skip_unless_possible(row) if row in zoo.ROWS else None
    experts = row_experts(row_of(row))
    saves = 1 + max(cycle(count, k) for count in experts) + 1
    results = pool.run(4, case_mixed, path=ckpt_dir, row=row, saves=saves, k=k, plugin=plugin, deadline=DEADLINE)
    load_aware = plugin.get("selection") == "load_aware"
    for rank, result in enumerate(results):
        assert result["wrong"] == [], f"rank {rank}"
        assert result["sizes"][0] == experts, "the first checkpoint of a directory is full"
        for sizes, longest in zip(result["sizes"][1:], result["longest"][1:], strict=True):
            for layer, count in enumerate(experts):
                assert 1 <= sizes[layer] <= min(k, count), (result["sizes"], layer)
                assert longest[layer] <= cycle(count, k) * (2 if load_aware else 1) - 1, (result["longest"], layer)
        assert result["versions"] > 1
        assert result["plt before"] == 0
        assert 0 < result["plt"] < 1


# ---------------------------------------------------------------------------------------------- full saves


def case_all_experts(ctx: Any, path: str, k: Any, selection: str) -> dict[str, Any]:
    """K is N in every layer, over several saves."""
    reference = build(ctx, "z2_bf16", None)
    losses = harness.train(reference, 8)
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, "z2_bf16", k, selection=selection)
    mine, took = [], []
    for _ in range(2):
        mine += harness.train(engine, 2)
        assert engine.save_checkpoint(diary.path) is True
        took.append(written(manifest(diary.path)))
    before = harness.snapshot(ctx, engine)
    engine = build(ctx, "z2_bf16", k, seed=2, selection=selection)
    harness.train(engine, 1, data_seed=99)
    engine.load_checkpoint(diary.path)
    return {
        "restored": harness.differences(before, harness.snapshot(ctx, engine)),
        "losses": losses == mine + harness.train(engine, 4),
        "full": [places == everyone([4, 4, 4]) for places in took],
        "plt": engine.moc.plt,
    }


@pytest.mark.parametrize(("k", "selection"), [(4, "sequential"), (1, "full")])
def test_k_of_all_experts_is_a_full_checkpoint(pool: Pool, ckpt_dir: str, k: Any, selection: str) -> None:
    for result in pool.run(4, case_all_experts, path=ckpt_dir, k=k, selection=selection, deadline=DEADLINE):
        assert result == {"restored": [], "losses": True, "full": [True, True], "plt": 0.0}


def case_last_save(ctx: Any, path: str) -> dict[str, Any]:
    """Partial saves, a fault that loses, a full save: from that nothing more is lost."""
    diary, experts = Diary(ctx, f"{path}/c", f"{path}/kept"), row_experts("z2_bf16")
    engine = build(ctx, "z2_bf16", 1)
    for _ in range(3):
        harness.train(engine, 1)
        diary.save(engine)
    engine = build(ctx, "z2_bf16", 1, seed=2)
    out: dict[str, Any] = {"wrong": diary.load(engine)}
    harness.train(engine, 1)
    body = diary.save(engine, full=True)
    out["full"] = written(body) == everyone(experts)
    out["versions"] = set(versions(body).values()) == {(2, 4)}
    out["plt"], lost = engine.moc.plt, [counts.tolist() for counts in engine.moc.ledger.lost]
    end = harness.snapshot(ctx, engine)
    losses = harness.train(engine, 3)
    engine = build(ctx, "z2_bf16", 1, seed=3)
    out["wrong"] += diary.load(engine) + harness.differences(end, harness.snapshot(ctx, engine))
    out["plt after"] = engine.moc.plt
    out["lost"] = [counts.tolist() for counts in engine.moc.ledger.lost] == lost
    out["losses"] = losses == harness.train(engine, 3)
    # The cycle goes on after it.
    out["next"] = len(written(diary.save(engine)))
    return out


def test_full_save_loses_nothing(pool: Pool, ckpt_dir: str) -> None:
    for result in pool.run(4, case_last_save, path=ckpt_dir, deadline=DEADLINE):
        assert 0 < result.pop("plt") == result.pop("plt after")
        assert result == {"wrong": [], "full": True, "versions": True, "lost": True, "losses": True, "next": 3}


# ------------------------------------------------------------------------------------- training is not disturbed


def case_undisturbed(ctx: Any, path: str, row: str, plugin: dict[str, Any] | None, steps: int) -> list[str]:
    harness.reset()
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    losses = []
    for _ in range(steps):
        losses += harness.train(engine, 1)
        if plugin is not None:
            engine.save_checkpoint(path)
    engine.eval()
    return [*losses, *(float(value).hex() for value in (engine.moc.plt,))] if plugin else losses


@pytest.mark.parametrize("row", ["z2_bf16", "z0_fp32", "z2_fp16"])
def test_losses_do_not_depend_on_the_plugin(pool: Pool, ckpt_dir: str, row: str) -> None:
    plain = pool.run(4, case_undisturbed, path=ckpt_dir, row=row, plugin=None, steps=9, deadline=DEADLINE)
    section = {"enabled": True, "k_persist": 1, "storage": {"keep_last": 1}}
    saving = pool.run(4, case_undisturbed, path=ckpt_dir, row=row, plugin=section, steps=9, deadline=DEADLINE)
    for rank, (one, two) in enumerate(zip(plain, saving, strict=True)):
        assert one == two[:-1], f"rank {rank}"
        assert len(set(one)) > 5


# -------------------------------------------------------------------------------------------------- bad values


def case_refused(ctx: Any, row: Row, sections: list[Any]) -> list[dict[str, Any]]:
    """Builds an engine with each section (a list: one per rank); in the end one that is right."""
    out = []
    for section in sections:
        mine = section[ctx.rank % len(section)] if isinstance(section, list) else section
        harness.reset()
        done = harness.attempt(harness.build, row, world=ctx.world, seed=1, plugin={"enabled": True, **mine})
        done.pop("value", None)
        out.append(done)
    return out


BAD: list[tuple[Any, list[str]]] = [
    ({"k_persist": 0}, ["k_persist", "0"]),
    ({"k_snapshot": -1}, ["k_snapshot", "-1"]),
    ({"k_persist": True}, ["k_persist"]),
    ({"k_persist": 1.5}, ["k_persist", "1.5"]),
    ({"k_persist": "all"}, ["k_persist", "all", "auto"]),
    ({"k_persist": 9}, ["k_persist", "9", "layer 2", "8 experts"]),
    ({"k_snapshot": 9}, ["k_snapshot", "9", "layer 2", "8 experts"]),
    ({"k_persist": 3, "k_snapshot": 2}, ["k_persist", "3", "k_snapshot", "2"]),
    ({"max_plt": 0}, ["max_plt", "0"]),
    ({"max_plt": 1}, ["max_plt", "1"]),
    ({"max_plt": 1.0}, ["max_plt", "1"]),
    ({"max_plt": -0.1}, ["max_plt", "-0.1"]),
    ({"max_plt": float("nan")}, ["max_plt", "nan"]),
    ({"plt_total_tokens": 0}, ["plt_total_tokens", "0"]),
    ({"selection": "random"}, ["selection", "random", "load_aware"]),
    ({"sharding": "none"}, ["sharding", "adaptive"]),
    ([{"k_persist": 1}, {"k_persist": 2}], ["k_persist", "ranks"]),
    ([{"selection": "sequential"}, {"selection": "load_aware"}], ["selection", "ranks"]),
    ([{"k_persist": 1}, {"k_persist": 1}, {"k_persist": 9}, {"k_persist": 1}], ["k_persist"]),
]


def test_bad_values_are_refused_on_all_ranks(pool: Pool) -> None:
    """Before anything is saved, with the layer and the numbers."""
    row = row_of("uneven")
    good = [{"k_persist": 8}, {"k_persist": 3, "k_snapshot": 3}, {"k_persist": 3, "k_snapshot": "auto"}, {}]
    sections = [section for section, _ in BAD] + good
    results = pool.run(4, case_refused, row=row, sections=sections, deadline=3 * DEADLINE)
    for rank, found in enumerate(results):
        for (section, words), one in zip(BAD, found, strict=False):
            assert one["raised"] == "ConfigError", (rank, section, one)
            for word in words:
                assert word in one["text"], (rank, section, one["text"])
        assert [one["text"] for one in found[len(BAD) :]] == [""] * len(good), f"rank {rank}"


# ------------------------------------------------------------------------------------------- expert buffers


def case_own_buffers(ctx: Any, path: str) -> dict[str, Any]:
    """Buffers of an expert that differ between its replicas (running statistics, say)."""
    import torch

    from distributed import oracle

    def spread(engine: Any) -> None:
        names = oracle.global_names(engine.module)
        with torch.no_grad():
            for name, buffer in engine.module.named_buffers():
                if oracle.set_expert_of(names[name]) is not None:
                    buffer.fill_(engine.global_steps + 0.1 * ctx.rank)

    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, "z2_bf16", 1)
    for _ in range(3):
        harness.train(engine, 1)
        spread(engine)
        engine.save_checkpoint(diary.path)
    found = versions(manifest(diary.path))
    engine = build(ctx, "z2_bf16", 1, seed=2)
    engine.load_checkpoint(diary.path)
    names = oracle.global_names(engine.module)
    wrong = []
    for name, buffer in engine.module.named_buffers():
        place = oracle.set_expert_of(names[name])
        if place is not None:
            layer = int(place[0].split(".")[1])
            step = found[layer, place[1]][1]
            # Of an older version there is one value for all replicas; of the newest there is each rank's own.
            if int(buffer[0] + 0.01) != step:
                wrong.append(f"{names[name]}: {buffer[0]:.1f}, its version is of step {step}")
    return {"wrong": wrong, "steps": sorted({step for _, step in found.values()})}


def test_buffers_of_an_expert_are_of_its_version(pool: Pool, ckpt_dir: str) -> None:
    for rank, result in enumerate(pool.run(4, case_own_buffers, path=ckpt_dir, deadline=DEADLINE)):
        assert result["steps"] == [1, 2, 3]
        assert result["wrong"] == [], f"rank {rank}"
