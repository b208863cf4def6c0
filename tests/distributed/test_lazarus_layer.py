"""LazarusMoE on several ranks against one process that has every expert and the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest

from distributed import lazarus_reference as lazarus

pytestmark = pytest.mark.distributed

HIDDEN, WIDE = 6, 10


def build(seed: int, ranks: int, experts: int, slots: int, **kwargs: Any) -> Any:
    from moc_ckpt.lazarus.layer import LazarusMoE

    placement = lazarus.random_placement(seed, ranks, experts, slots)
    return LazarusMoE(
        HIDDEN,
        lazarus.expert_module(HIDDEN, WIDE),
        experts,
        placement=placement,
        top2_2nd_expert_sampling=False,
        **kwargs,
    )


def run(ctx: Any, layer: Any, seed: int, sizes: list[int], k: int, masked: bool = False) -> dict[str, float]:
    """Forward and backward on all ranks and in the reference; the largest differences."""
    import torch

    dtype = next(layer.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, HIDDEN, generator=generator).to(dtype) for size in sizes]
    targets = [torch.randn(size, HIDDEN, generator=generator).to(dtype) for size in sizes]
    used = [torch.rand(size, generator=generator) < 0.7 for size in sizes] if masked else None
    gate = layer.deepspeed_moe.gate.wg.weight
    with torch.no_grad():
        gate.copy_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(seed)))
    experts = lazarus.all_experts(ctx, layer)

    mine = batches[ctx.rank].clone().requires_grad_()
    output, loss, counts = layer(mine, None if used is None else used[ctx.rank])
    assert output.dtype == dtype and output.shape == mine.shape
    ((output * targets[ctx.rank]).sum() + 0.3 * loss.to(dtype)).backward()

    exact = torch.float64
    inputs = [batch.to(exact).requires_grad_() for batch in batches]
    weights = gate.detach().to(exact).requires_grad_()
    whole = [{name: value.to(exact).requires_grad_() for name, value in one.items()} for one in experts]
    outputs, losses, expected = lazarus.reference(inputs, weights, whole, k, used)
    total = sum(
        (one * target.to(exact)).sum() + 0.3 * aux for one, target, aux in zip(outputs, targets, losses, strict=True)
    )
    total.backward()

    def distance(one: Any, two: Any) -> float:
        """The largest difference, relative to the largest value where that is above 1."""
        two = torch.zeros_like(one) if two is None else two
        assert torch.isfinite(one).all(), "max() would pass over it"
        return float((one.to(exact) - two).abs().max() / two.abs().max().clamp(min=1.0)) if one.numel() else 0.0

    assert counts.tolist() == expected[ctx.rank]
    gates = sum(ctx.gather(gate.grad))
    found = lazarus.summed_gradients(ctx, layer)
    return {
        "output": distance(output.detach(), outputs[ctx.rank].detach()),
        "loss": distance(loss.detach().reshape(1), losses[ctx.rank].detach()),
        "input gradient": distance(mine.grad, inputs[ctx.rank].grad),
        "gate gradient": distance(gates, weights.grad),
        "expert gradient": max(
            distance(grads[name], whole[index][name].grad) for index, grads in enumerate(found) for name in grads
        ),
    }


def case_exact(ctx: Any, seed: int, experts: int, slots: int, k: int, sizes: list[int], masked: bool) -> Any:
    layer = build(seed, ctx.world, experts, slots, k=k).double()
    return run(ctx, layer, seed, sizes, k, masked)


@pytest.mark.parametrize(
    ("seed", "experts", "slots", "k", "sizes", "masked"),
    [
        (1, 6, 3, 1, [9, 9, 9, 9], False),
        (2, 6, 3, 2, [12, 5, 0, 8], False),
        (3, 5, 4, 3, [7, 11, 3, 6], False),
        (4, 4, 1, 2, [6, 6, 6, 6], False),
        (5, 3, 5, 1, [10, 0, 0, 0], True),
        (6, 7, 2, 1, [4, 14, 9, 1], True),
        (7, 1, 1, 1, [3, 2, 1, 0], False),
    ],
)
def test_exact_in_double(
    pool: Any, seed: int, experts: int, slots: int, k: int, sizes: list[int], masked: bool
) -> None:
    found = pool.run(4, case_exact, seed=seed, experts=experts, slots=slots, k=k, sizes=sizes, masked=masked)
    for rank in found:
        assert max(rank.values()) < 1e-10, rank


def case_bfloat16(ctx: Any, seed: int, k: int) -> Any:
    import torch

    layer = build(seed, ctx.world, 6, 3, k=k).to(torch.bfloat16)
    return run(ctx, layer, seed, [9, 12, 3, 8], k)


@pytest.mark.parametrize("k", [1, 2])
def test_bfloat16_within_rounding(pool: Any, k: int) -> None:
    """bfloat16 rounds by 1 part in 512; three products follow one another in either direction."""
    for rank in pool.run(4, case_bfloat16, seed=1, k=k):
        assert max(rank.values()) < 2**-6, rank


def case_shares(ctx: Any) -> Any:
    """Other shares send other rows to other ranks, and change no result; skewed loads become even."""
    import torch

    from moc_ckpt.lazarus.shares import even_shares

    layer = build(1, ctx.world, 6, 3, k=1).double()
    exchange, swap, received = layer.deepspeed_moe.exchange, layer.deepspeed_moe.exchange.swap, []
    exchange.swap = lambda rows, incoming, outgoing: received.append(sum(incoming)) or swap(rows, incoming, outgoing)
    before = run(ctx, layer, 1, [90, 90, 90, 90], 1)
    loads = torch.tensor([0] * 6)
    generator = torch.Generator().manual_seed(1)
    gate = layer.deepspeed_moe.gate
    for _ in range(ctx.world):
        loads += torch.bincount(gate(torch.randn(90, HIDDEN, generator=generator).double()).experts[:, 0], minlength=6)
    layer.set_shares(even_shares(loads.tolist(), layer.placement))
    layer.zero_grad(set_to_none=True)
    after = run(ctx, layer, 1, [90, 90, 90, 90], 1)
    return before, after, received[0], received[len(received) // 2]


def test_shares_even_the_load(pool: Any) -> None:
    found = pool.run(4, case_shares)
    for before, after, _, _ in found:
        assert max(before.values()) < 1e-10 and max(after.values()) < 1e-10
    slots, shares = ([rank[column] for rank in found] for column in (2, 3))
    assert sum(slots) == sum(shares) == 360
    assert max(slots) > 100, "a case in which slots alone are uneven"
    assert max(shares) <= 90 + 6, "within a row per expert of the mean"


def case_one_hot(ctx: Any) -> Any:
    """All tokens of all ranks go to one expert, which is everywhere: nobody sends anything."""
    import torch

    from moc_ckpt.lazarus.layer import LazarusMoE

    layer = LazarusMoE(HIDDEN, lazarus.expert_module(HIDDEN, WIDE), 4, slots_per_rank=4).double()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()
        layer.deepspeed_moe.gate.wg.weight[2] = 1.0
    seen: list[Any] = []
    exchange = layer.deepspeed_moe.exchange
    swap = exchange.swap
    exchange.swap = lambda rows, incoming, outgoing: seen.append((incoming, outgoing)) or swap(rows, incoming, outgoing)
    layer(torch.ones(10, HIDDEN, dtype=torch.float64, requires_grad=True))[0].sum().backward()
    idle = layer.deepspeed_moe.experts.deepspeed_experts[0][0].weight.grad
    return {"flows": seen, "idle": None if idle is None else float(idle.abs().max())}


def test_everything_to_one_expert(pool: Any) -> None:
    for rank, found in enumerate(pool.run(4, case_one_hot)):
        alone = [10 if other == rank else 0 for other in range(4)]
        assert found["flows"] == [(alone, alone)] * 4
        assert found["idle"] == 0.0, "an expert without tokens has a gradient of zeros"


def case_alike(ctx: Any, as_module: bool) -> Any:
    """Every rank has another seed and other experts; copies start equal, and the generators go on alike."""
    import torch
    from torch import nn

    from moc_ckpt.lazarus.layer import LazarusMoE

    class Scaled(nn.Module):
        """A module with a parameter that cannot be drawn anew."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(HIDDEN, HIDDEN)
            self.scale = nn.Parameter(torch.full((1,), float(ctx.rank)))

        def forward(self, x: Any) -> Any:
            return self.inner(x) * self.scale, None

    # Without new numbers from the caller's side, what a rank draws next tells what building consumed.
    expert: Any = Scaled() if as_module else lambda: lazarus.expert_module(HIDDEN, WIDE)
    out = []
    for seed in (11, 12):
        torch.manual_seed(ctx.rank)
        placement = lazarus.random_placement(seed, ctx.world, 5, 3)
        layer = LazarusMoE(HIDDEN, expert, 5, placement=placement)
        drawn = float(torch.rand(1))
        experts = lazarus.all_experts(ctx, layer)
        for parameter in layer.deepspeed_moe.experts.parameters():
            assert parameter.allreduce is False and parameter.lazarus is True
        ids = [p.expert_id for m in layer.deepspeed_moe.experts.deepspeed_experts for p in m.parameters()]
        assert tuple(sorted(set(ids))) == layer.expert_ids == placement.distinct(ctx.rank)
        out.append(({i: {n: v.tolist() for n, v in one.items()} for i, one in enumerate(experts)}, drawn))
    # The seed of the layer comes from the first rank, so both layers are equal.
    assert out[0] == out[1]
    torch.manual_seed(ctx.rank)
    other = LazarusMoE(HIDDEN, expert, 5, placement=placement, seed=99)
    values = lazarus.all_experts(ctx, other)
    name = next(name for name in values[0] if "weight" in name)
    return {
        "differ": len({str(one[name].tolist()) for one in values}),
        "others": values[0][name].tolist() != out[0][0][0][name],
        "scale": [float(one["scale"]) for one in values if "scale" in one],
    }


@pytest.mark.parametrize("as_module", [True, False])
def test_copies_start_alike(pool: Any, as_module: bool) -> None:
    for found in pool.run(3, case_alike, as_module=as_module):
        assert found["differ"] == 5, "no expert starts as another"
        assert found["others"], "another seed gives other values"
        assert found["scale"] == ([0.0] * 5 if as_module else [])


def case_deepspeed(ctx: Any, k: int, residual: bool) -> None:
    """The default placement is DeepSpeed's layout, so its state dict loads as it is."""
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    from moc_ckpt.lazarus.layer import LazarusMoE

    arguments = {
        "hidden_size": HIDDEN,
        "num_experts": 4,
        "ep_size": 2,
        "k": k,
        "use_residual": residual,
        "drop_tokens": False,
        "top2_2nd_expert_sampling": False,
    }
    torch.manual_seed(3)
    theirs = MoE(expert=lazarus.expert_module(HIDDEN, WIDE), **arguments)
    theirs.set_deepspeed_parallelism()
    # Experts depend on where they are, all else is alike.
    first = groups._get_expert_parallel_rank("ep_size_2") * 2
    with torch.no_grad():
        for index, expert in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(first + index)
            for parameter in expert.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ours = LazarusMoE(expert=lazarus.expert_module(HIDDEN, WIDE), **arguments)
    missing = ours.load_state_dict(theirs.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.manual_seed(50 + ctx.rank)
    tokens = torch.randn(3, 7, HIDDEN)
    results = []
    for layer in (theirs, ours):
        batch = tokens.clone().requires_grad_()
        output, loss, counts = layer(batch)
        (output.square().sum() + loss).backward()
        results.append([output, loss, counts, batch.grad, layer.deepspeed_moe.gate.wg.weight.grad])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "residual"), [(1, False), (2, True), (3, False)])
def test_same_results_as_deepspeed(pool: Any, k: int, residual: bool) -> None:
    pool.run(2, case_deepspeed, k=k, residual=residual)


def case_recomputed(ctx: Any) -> Any:
    """With activation checkpointing the forward pass runs again in backward: the same gradients."""
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = build(4, ctx.world, 6, 4, k=2).double()
    grads = []
    for again in (False, True):
        batch = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(ctx.rank), dtype=torch.float64)
        batch.requires_grad_()
        output = checkpoint(lambda x: layer(x)[0], batch, use_reentrant=False) if again else layer(batch)[0]
        grads.append(torch.autograd.grad(output.square().sum(), [batch, *layer.parameters()]))
    return all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_activation_checkpointing(pool: Any) -> None:
    assert pool.run(2, case_recomputed) == [True, True]


def case_frozen(ctx: Any) -> Any:
    """Only expert 0 is trained, which rank 0 alone has; tokens and gate need no gradient (a first layer's, say)."""
    import torch

    from moc_ckpt.lazarus.layer import LazarusMoE
    from moc_ckpt.lazarus.types import Placement

    placement = Placement(3, ((0, 1), *[(1, 2)] * (ctx.world - 1)))
    layer = LazarusMoE(HIDDEN, lazarus.expert_module(HIDDEN, WIDE), 3, k=3, placement=placement, seed=1).double()
    head = torch.nn.Linear(HIDDEN, 1).double()
    layer.deepspeed_moe.gate.requires_grad_(False)
    for parameter in layer.deepspeed_moe.experts.parameters():
        parameter.requires_grad_(parameter.expert_id == 0)
    output, _, _ = layer(torch.ones(4, HIDDEN, dtype=torch.float64))
    head(output).sum().backward()
    gradients = [p.grad is not None for p in layer.deepspeed_moe.experts.parameters() if p.expert_id == 0]
    with torch.no_grad():
        assert not layer(torch.ones(4, HIDDEN, dtype=torch.float64))[0].requires_grad
    return gradients


def test_a_rank_without_trained_experts_takes_part_in_backward(pool: Any) -> None:
    assert pool.run(2, case_frozen, deadline=60.0) == [[True] * 4, []]


def case_constant_for_nothing(ctx: Any) -> Any:
    """All tokens go to expert 2, which rank 0 has; the experts of the others return a constant for no rows."""
    import torch

    from moc_ckpt.lazarus.layer import LazarusMoE
    from moc_ckpt.lazarus.types import Placement

    class Short(torch.nn.Linear):
        def forward(self, rows: Any) -> Any:
            return super().forward(rows) if len(rows) else rows.new_zeros(0, HIDDEN)

    placement = Placement(3, ((0, 1, 2), *[(0, 1)] * (ctx.world - 1)))
    layer = LazarusMoE(HIDDEN, lambda: Short(HIDDEN, HIDDEN), 3, placement=placement, seed=1).double()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()
        layer.deepspeed_moe.gate.wg.weight[2] = 1.0
    tokens = torch.ones(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    layer(tokens)[0].sum().backward()
    assert tokens.grad is not None
    return float(tokens.grad.abs().sum())


def test_experts_may_return_a_constant_for_no_rows(pool: Any) -> None:
    """The exchanges of the backward pass take place on all ranks, whatever hangs together on one."""
    found = pool.run(2, case_constant_for_nothing, deadline=60.0)
    assert found[0] > 0 and found == [found[0]] * 2


def case_template(ctx: Any) -> Any:
    """An expert given as a module whose parent zeroes a child's weight, and leaves a parameter of its own alone."""
    import torch

    from moc_ckpt.lazarus.layer import LazarusMoE

    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN)
            self.scale = torch.nn.Parameter(torch.randn(2))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            torch.nn.init.zeros_(self.last.weight)

        def forward(self, rows: Any) -> Any:
            return self.last(self.first(rows))

    layer = LazarusMoE(HIDDEN, Expert(), 3, slots_per_rank=3, seed=1)
    return {
        f"{index}.{name}": value.tolist()
        for index, module in zip(layer.expert_ids, layer.deepspeed_moe.experts.deepspeed_experts, strict=True)
        for name, value in module.named_parameters()
    }


def test_a_template_is_drawn_as_its_constructor_does_and_alike_everywhere(pool: Any) -> None:
    found = pool.run(2, case_template)
    assert found[0] == found[1], "the ranks' templates had different values"
    first = found[0]
    assert all(not any(map(any, first[f"{index}.last.weight"])) for index in range(3))
    assert first["0.first.weight"] != first["1.first.weight"] and first["0.scale"] == first["1.scale"]


def case_outside(ctx: Any) -> Any:
    import torch.distributed as dist

    from distributed.harness import attempt
    from moc_ckpt.lazarus.layer import LazarusMoE

    alone = dist.new_group([0])
    made = attempt(LazarusMoE, HIDDEN, lazarus.expert_module(HIDDEN, WIDE), 2, group=alone, slots_per_rank=2)
    return (made or {}).get("text", "") if isinstance(made, dict) else ""


def test_a_rank_outside_the_layers_group_is_told(pool: Any) -> None:
    found = pool.run(2, case_outside)
    assert "rank 1 is not in the layer's group" in found[1] and not found[0]


def case_world(ctx: Any) -> Any:
    from distributed.harness import attempt
    from moc_ckpt.lazarus.layer import LazarusMoE
    from moc_ckpt.lazarus.types import Placement

    plan = Placement(2, ((0, 1),) * 3)
    found = attempt(LazarusMoE, HIDDEN, lazarus.expert_module(HIDDEN, WIDE), 2, placement=plan, name="layer 7", seed=1)
    ctx.barrier()
    return found


def test_a_placement_for_another_world(pool: Any) -> None:
    for found in pool.run(2, case_world):
        assert found["raised"] == "ConfigError"
        assert "3 ranks, 2 share" in found["text"] and "layer 7" in found["text"]
