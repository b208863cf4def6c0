"""LazarusMoE under a DeepSpeed engine: one shared expert's mathematics, and replicas that stay alike bit by bit."""

from __future__ import annotations

from typing import Any

import pytest

from distributed import harness, oracle
from distributed import lazarus_tools as tools
from distributed.lazarus_tools import Setting
from distributed.pool import Pool

pytestmark = pytest.mark.distributed

WORLD = 4


def case_reference(ctx: Any, setting: Setting, steps: int) -> dict[str, Any]:
    """Trains; replicas are compared bit by bit, losses, norms and weights with the reference."""
    engine = tools.build(setting)
    losses, norms, lrs = tools.train(engine, steps)
    state = tools.expert_state(engine, ctx)
    everyone = ctx.gather([float.fromhex(x) for x in losses])
    weights = {name: param.detach().cpu() for name, param in tools._named_globally(engine)}
    out: dict[str, Any] = {"norms": norms, "experts": len(state), "mine": losses}
    if ctx.rank == 0:
        reference = tools.Reference(setting, ctx.world)
        expected, expected_norms = reference.train(lrs)
        found = [list(row) for row in zip(*everyone, strict=True)]
        out["loss off"] = max(
            abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
        )
        out["norm off"] = max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True))
        out["first norm off"] = abs(norms[0] / expected_norms[0] - 1)
        out["fell"] = (sum(expected[0]), sum(expected[-1]))
        weights |= {name: entry["weight"] for name, entry in state.items()}
        out["weight off"] = max(
            float((weights[name].double() - value).abs().max())
            for name, value in reference.params.items()
            if value.requires_grad
        )
        out["clipped"] = sum(norm > (setting.clip or 1e9) for norm in expected_norms)
    return out


@pytest.mark.parametrize("changes", [{}, {"state": "sharded", "gas": 2, "k": 2}, {"stage": 1, "clip": 0.0}])
def test_fifty_steps_follow_one_shared_model(pool: Pool, changes: dict[str, Any]) -> None:
    """Ranks hold different experts, under random placements; every one trains as if it were there once."""
    results = pool.run(WORLD, case_reference, setting=Setting().with_(**changes), steps=50)
    first = results[0]
    assert all(result["norms"] == first["norms"] for result in results)
    # Three trained parameters per expert (the gain is frozen), of 2 layers.
    assert first["experts"] == 2 * 5 * 3
    assert first["loss off"] < 1e-3
    assert first["norm off"] < 1e-3
    assert first["weight off"] < 1e-3
    assert first["fell"][1] < 0.6 * first["fell"][0], "nothing was learnt, so the comparison proves little"
    assert changes.get("clip") == 0.0 or first["clipped"] >= 10, "no step was clipped"


@pytest.mark.parametrize(
    ("frozen", "state"),
    [((1, 3), "replicated"), ((1, 3), "sharded"), ((1, 3, 4), "replicated"), (tuple(range(5)), "replicated")],
)
def test_frozen_experts(pool: Pool, frozen: tuple[int, ...], state: str) -> None:
    """The last rank has only frozen ones of the second layer, or of both, and takes part in exchanges; or all have."""
    assert set(tools.PLACEMENTS[1][3]) == {1, 3} and set(tools.PLACEMENTS[0][3]) == {1, 3, 4}
    setting = Setting(frozen=frozen, state=state)
    results = pool.run(WORLD, case_reference, setting=setting, steps=20)
    first = results[0]
    assert all(result["norms"] == first["norms"] for result in results)
    assert first["experts"] == 2 * (5 - len(frozen)) * 3
    assert first["loss off"] < 1e-3
    assert first["norm off"] < 1e-3
    assert first["weight off"] < 1e-3
    assert first["fell"][1] < 0.9 * first["fell"][0]


@pytest.mark.parametrize("state", ["replicated", "sharded"])
def test_bf16_follows_within_its_rounding(pool: Pool, state: str) -> None:
    results = pool.run(WORLD, case_reference, setting=Setting(dtype="bf16", gas=2, state=state), steps=25)
    first = results[0]
    assert all(result["norms"] == first["norms"] for result in results)
    # One step's gradients differ by bf16's rounding; later ones by where it has led.
    assert first["first norm off"] < 0.02
    assert first["loss off"] < 0.15
    assert first["fell"][1] < 0.9 * first["fell"][0]


def case_orders(ctx: Any, setting: Setting, steps: int) -> dict[str, Any]:
    engine = tools.build(setting)
    names = {id(p): n for n, p in tools._named_globally(engine)}
    groups = tools.groups_of(setting, engine.module, ctx.rank)
    orders = [names[id(p)] for group in groups for p in group["params"] if hasattr(p, "lazarus")]
    losses, norms, _ = tools.train(engine, steps)
    return {"losses": losses, "norms": norms, "orders": ctx.gather(orders), "state": tools.expert_state(engine, ctx)}


@pytest.mark.parametrize("state", ["replicated", "sharded"])
def test_orders_of_a_ranks_own_do_not_matter(pool: Pool, state: str) -> None:
    """Reductions in the orders that ranks have their parameters in would wait for each other for ever."""
    plain = Setting(state=state)
    ordered = pool.run(WORLD, case_orders, setting=plain, steps=4)
    shuffled = pool.run(WORLD, case_orders, setting=plain.with_(shuffled=True), steps=4)
    assert tools.would_deadlock(shuffled[0]["orders"])
    assert not tools.would_deadlock(ordered[0]["orders"]), "the simulation finds deadlocks where there are none"
    for one, two in zip(ordered, shuffled, strict=True):
        assert one["losses"] == two["losses"]
        assert one["norms"] == two["norms"]
        assert _differences(one["state"], two["state"]) == []


def _differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    found = [f"{name}: only on one side" for name in sorted(one.keys() ^ two.keys())]
    for name in sorted(one.keys() & two.keys()):
        for kind in one[name].keys() | two[name].keys():
            a, b = one[name].get(kind), two[name].get(kind)
            same = oracle.bits_equal(a, b) if hasattr(a, "dtype") and hasattr(b, "dtype") else a == b
            if not same:
                found.append(f"{name} {kind}")
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sharded_state_gives_the_bits_of_replicated_state(pool: Pool, dtype: str) -> None:
    """Sizes are such that shares are whole vector registers, where the CPU's kernels round all elements alike."""
    base = Setting(dtype=dtype, hidden=64, ffn=256, gas=2)
    replicated = pool.run(WORLD, case_orders, setting=base, steps=6)
    sharded = pool.run(WORLD, case_orders, setting=base.with_(state="sharded"), steps=6)
    for one, two in zip(replicated, sharded, strict=True):
        assert one["norms"] == two["norms"]
        assert one["losses"] == two["losses"]
        assert _differences(one["state"], two["state"]) == []


# ------------------------------------------------------------------------------ as DeepSpeed's own layer trains


NATIVE = Setting(placements=None, ep=2, experts=4)
#: The same model with replicas: 4 experts in 3 slots on each of 4 ranks.
OURS = NATIVE.with_(
    placements=(((0, 1, 2), (1, 2, 3), (0, 3, 3), (0, 2, 3)), ((0, 1, 3), (0, 2, 3), (1, 1, 2), (0, 2, 3)))
)


def case_losses(ctx: Any, setting: Setting, steps: int) -> tuple[list[float], list[float]]:
    losses, norms, _ = tools.train(tools.build(setting), steps)
    return [float.fromhex(x) for x in losses], norms


@pytest.mark.parametrize("client", [False, True])
def test_trains_as_deepspeeds_layer_does(pool: Pool, client: bool) -> None:
    """The same losses, and the same norms, by which most steps are clipped."""
    native = pool.run(WORLD, case_losses, setting=NATIVE.with_(gas=2), steps=12)
    ours = pool.run(WORLD, case_losses, setting=OURS.with_(gas=2, client=client), steps=12)
    for (losses, norms), (expected, expected_norms) in zip(ours, native, strict=True):
        assert losses == pytest.approx(expected, abs=1e-4)
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        assert sum(norm > NATIVE.clip for norm in norms) >= 6, "no step was clipped"


def case_first_values(ctx: Any) -> list[str]:
    """Every rank builds its model with values of its own."""
    import torch

    original = tools.build_model

    def other(setting: Setting, seed: int) -> Any:
        return original(setting, seed + ctx.rank)

    tools.build_model = other
    try:
        engine = tools.build(Setting(dtype="bf16"))
    finally:
        tools.build_model = original
    wrong = []
    for name, tensor in tools.local_weights(engine).items():
        _, mark, rest = name.partition(".deepspeed_experts.")
        first = 0
        if mark:
            layer, expert = int(name.split(".")[1]), int(rest.split(".")[0])
            first = min(rank for rank, slots in enumerate(tools.PLACEMENTS[layer]) if expert in slots)
        expected = tools.initial(name, tuple(tensor.shape), 1 + first).to(torch.bfloat16)
        if not oracle.bits_equal(tensor, expected):
            wrong.append(name)
    tools.expert_state(engine, ctx)
    return wrong


def test_all_copies_begin_at_the_first_holders_values(pool: Pool) -> None:
    """Trained and frozen parameters; dense ones at those of rank 0, as always with DeepSpeed."""
    assert pool.run(WORLD, case_first_values) == [[]] * WORLD


# --------------------------------------------------------------------------------------- gradients that overflow


def case_overflow(ctx: Any, setting: Setting) -> dict[str, Any]:
    """In its third step one replica of one expert gets an infinite gradient."""
    engine = tools.build(setting)
    tools.train(engine, 2)
    before, weights = tools.expert_state(engine, ctx), tools.local_weights(engine)
    if ctx.rank == 2:
        param = engine.module.blocks[1].moe.deepspeed_moe.experts.deepspeed_experts[0].down.weight
        handle = param.register_hook(lambda grad: grad * float("inf"))
    _, norms, _ = tools.train(engine, 1)
    after, now = tools.expert_state(engine, ctx), tools.local_weights(engine)
    if ctx.rank == 2:
        handle.remove()
    _, later, _ = tools.train(engine, 2)
    moved = _differences(after, tools.expert_state(engine, ctx))
    same = [oracle.bits_equal(weights[name], now[name]) for name in weights]
    return {
        "norm": norms[0],
        "skipped": engine.skipped_steps,
        "changed": _differences(before, after),
        "same": all(same),
        "later": all(norm < 1e3 for norm in later),
        "moved": bool(moved),
    }


@pytest.mark.parametrize("state", ["replicated", "sharded"])
def test_an_infinite_gradient_on_one_rank_skips_the_step_everywhere(pool: Pool, state: str) -> None:
    """Dense state and experts alike, and training goes on afterwards."""
    for result in pool.run(WORLD, case_overflow, setting=Setting(state=state)):
        assert result["norm"] == float("inf")
        assert (result["skipped"], result["changed"], result["same"]) == (1, [], True)
        assert result["later"]
        assert result["moved"]


def case_split(ctx: Any) -> list[Any]:
    """Trains with experts in the dense groups, and in those that DeepSpeed's own function makes of them."""
    runs = []
    for split in (False, True):
        engine = tools.build(Setting(split=split, gas=2))
        runs.append((*tools.train(engine, 4), tools.whole_state(engine, ctx), len(engine.optimizer.param_groups)))
        harness.discard(engine)
        harness.reset()
    (losses, norms, rates, state, groups), other = runs
    assert (losses, norms, rates, groups) == (other[0], other[1], other[2], other[4])
    return oracle.global_differences(state, other[3]) if ctx.rank == 0 else []


def test_deepspeeds_groups_of_experts_train_alike(pool: Pool) -> None:
    """`split_params_into_different_moe_groups_for_optimizer` of the installed version, as for DeepSpeed's own layer."""
    assert pool.run(WORLD, case_split) == [[]] * WORLD


# ------------------------------------------------------------------------------------------------- refusals


def case_refused(ctx: Any, setting: Setting, rank_of_other: int | None = None) -> dict[str, Any]:
    if ctx.rank == rank_of_other:
        setting = setting.with_(placements=tools.OTHERS)
    return harness.attempt(tools.build, setting)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"stage": 0}, "ZeRO stage 0"),
        ({"stage": 3}, "ZeRO stage 3"),
        ({"dtype": "fp16"}, "fp16"),
        ({"config": (("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),)}, "offload"),
        ({"config": (("zero_optimization", {"stage": 2, "compute_grad_norm": False}),)}, "compute_grad_norm"),
        ({"config": (("gradient_allreduce_op", "sum"),)}, "gradient_allreduce_op"),
        ({"config": (("zero_optimization", {"stage": 2, "zenflow": {"topk_ratio": 0.1}}),)}, "ZenFlow"),
        ({"config": (("expert_parallel", {"enabled": True, "autoep_size": 2}),)}, "AutoEP"),
        ({"config": (("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),)}, "torch autocast"),
        ({"config": (("tensor_parallel", {"autotp_size": 2}),)}, "tensor parallelism (TP)"),
        ({"config": (("sequence_parallel_size", 2),)}, "sequence parallelism"),
        ({"config": (("lazarus", {"optimizer_stat": "sharded"}),)}, "did you mean 'optimizer_state'"),
        ({"config": (("lazarus", {"optimizer_state": "halved"}),)}, "'replicated' or 'sharded'"),
        ({"config": (("optimizer", {"type": "Adagrad", "params": {"lr": 0.1}}),)}, "Adagrad"),
        (
            {"stage": 1, "dtype": "bf16", "config": (("data_types", {"grad_accum_dtype": "fp32"}),)},
            "BF16_Optimizer",
        ),
    ],
)
def test_what_is_untested_is_refused_by_name(pool: Pool, changes: dict[str, Any], name: str) -> None:
    for result in pool.run(WORLD, case_refused, setting=Setting().with_(**changes)):
        assert result["moc"], result
        assert name in result["text"]


def case_own_group(ctx: Any) -> dict[str, Any]:
    """One expert has a param group of its own, on the ranks that hold it."""
    import deepspeed

    net = tools.build_model(Setting(), 1)
    params = [param for param in net.parameters() if param.requires_grad]
    own = [param for param in params if getattr(param, "lazarus", False) and param.expert_id == 0]
    groups: list[dict[str, Any]] = [{"params": [param for param in params if all(param is not other for other in own)]}]
    groups += [{"params": own, "lr": 1e-5}] if own else []
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    found = harness.attempt(deepspeed.initialize, model=net, model_parameters=groups, config=config)
    return {**found, "held": bool(own)}


def test_what_is_wrong_on_some_ranks_is_refused_on_all(pool: Pool) -> None:
    """The others would wait for them while DeepSpeed builds its engine."""
    results = pool.run(WORLD, case_own_group)
    assert {result["held"] for result in results} == {True, False}
    for result in results:
        assert result["moc"], result
        assert "no group of dense parameters has its options" in result["text"]


def case_refused_models(ctx: Any) -> dict[str, dict[str, Any]]:
    """Models that have layers with replicas, and something else."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule

    from moc_ckpt.lazarus.layer import LazarusMoE

    half = dist.new_subgroups(2)[0]

    def ours(group: Any = None) -> torch.nn.Module:
        return LazarusMoE(4, lambda: torch.nn.Linear(4, 4), num_experts=2, slots_per_rank=2, group=group, seed=1)

    stages = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    models = {
        "beside": torch.nn.ModuleList([*stages, ours(), MoE(4, torch.nn.Linear(4, 4), num_experts=2)]),
        "sub-group": torch.nn.ModuleList([*stages, ours(half)]),
        "pipeline": PipelineModule([*stages, ours()], num_stages=1, loss_fn=torch.nn.MSELoss()),
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    return {
        name: harness.attempt(
            deepspeed.initialize, model=model, model_parameters=list(model.parameters()), config=dict(config)
        )
        for name, model in models.items()
    }


def test_other_layers_groups_and_pipelines_are_refused_by_name(pool: Pool) -> None:
    for results in pool.run(WORLD, case_refused_models):
        for name, words in (
            ("beside", "DeepSpeed's MoE layers beside it"),
            ("sub-group", "a process group smaller than the world"),
            ("pipeline", "pipeline parallelism (PP)"),
        ):
            assert results[name]["raised"] == "UnsupportedError", results[name]
            assert words in results[name]["text"]


def test_ranks_with_different_placements_are_refused_everywhere(pool: Pool) -> None:
    for result in pool.run(WORLD, case_refused, setting=Setting(), rank_of_other=2):
        assert result["raised"] == "ModelMismatchError"
        assert "ranks 0 and 2" in result["text"]


def case_native_save(ctx: Any, path: str) -> list[dict[str, Any]]:
    engine = tools.build(Setting())
    return [harness.attempt(engine.save_checkpoint, path), harness.attempt(engine.load_checkpoint, path)]


def test_deepspeeds_own_checkpoints_are_refused(pool: Pool, ckpt_dir: str) -> None:
    for results in pool.run(WORLD, case_native_save, path=ckpt_dir):
        for result in results:
            assert result["raised"] == "UnsupportedError"
            assert "moc_checkpoint" in result["text"]
