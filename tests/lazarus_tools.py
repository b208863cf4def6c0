"""Random dispatches, and the kernels compared with plain torch on them: `python lazarus_tools.py [cpu | cuda] [cases]`.

On a CPU the kernels need TRITON_INTERPRET=1 in the environment.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def random_slots(draw: random.Random, ranks: int, experts: int, most: int = 3) -> torch.Tensor:
    """Slots [ranks, experts] int64 with at least one of every expert; some ranks may have none at all."""
    table = torch.tensor([[max(0, draw.randint(-2, most)) for _ in range(experts)] for _ in range(ranks)])
    for expert in range(experts):
        if not table[:, expert].any():
            table[draw.randrange(ranks), expert] = 1
    return table


def random_experts(draw: random.Random, tokens: int, experts: int, k: int, missing: float = 0.1) -> torch.Tensor:
    """Choices [tokens, k] int64, skewed, each expert at most once per token; some are -1."""
    skew = torch.tensor([draw.random() ** 4 + 1e-3 for _ in range(experts)])
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    keys = torch.rand(tokens, experts, generator=generator).log() / skew
    chosen = keys.argsort(dim=1, descending=True)[:, :k].contiguous()
    return torch.where(torch.rand(tokens, k, generator=generator) < missing, -1, chosen)


def compare(device: str, ranks: int, experts: int, k: int, tokens: int, hidden: int, seed: int, dtype: Any) -> int:
    """Compares kernels and plain torch on one random dispatch, on every rank of it.

    Integers and moved rows must be equal; sums may round differently.

    Returns:
        The number of routes that were dispatched.
    """
    from moc_ckpt.lazarus import kernels, rows

    draw = random.Random(seed)
    slots = random_slots(draw, ranks, experts).to(device)
    chosen = [random_experts(draw, draw.randint(0, tokens), experts, k).to(device) for _ in range(ranks)]
    counts = torch.stack([rows.count_routes(mine, experts)[0] for mine in chosen])
    routed = 0

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(device)

    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for rank, mine in enumerate(chosen):
        ours, theirs = rows.count_routes(mine, experts), kernels.count_routes(mine, experts)
        equal(ours[0], theirs[0], "counts")
        plan, other = rows.make_plan(counts, slots, rank), kernels.make_plan(counts, slots, rank)
        for name, one, two in zip(plan._fields, plan, other, strict=True):
            equal(one, two, name)
        source = rand(len(mine), hidden).to(dtype)
        buffer, places = rows.send_rows(source, mine, ours[1], plan)
        buffer2, places2 = kernels.send_rows(source, mine, theirs[1], other)
        sent = int(plan.sizes[:ranks].sum())
        equal(places, places2, "places")
        equal(buffer[:sent], buffer2[:sent], "send buffer")
        assert sorted(places[places >= 0].tolist()) == list(range(sent))
        received = rand(int(plan.sizes[ranks : 2 * ranks].sum()), hidden).to(dtype)
        one, order = rows.sort_rows(received, plan)
        two, order2 = kernels.sort_rows(received, other)
        equal(order, order2, "order")
        equal(one, two, "sorted rows")
        equal(kernels.gather_rows(one, order), received, "gathered rows")
        equal(kernels.scatter_rows(received, order), one, "scattered rows")
        home, weights = buffer[:sent].contiguous(), rand(*mine.shape)
        for given in (weights, None):
            want, got = rows.combine_rows(home, places, given), kernels.combine_rows(home, places, given)
            torch.testing.assert_close(got, want, **close)
        grad = rand(len(mine), hidden).to(dtype)
        pairs = zip(
            kernels.weigh_rows(grad, home, places, weights), rows.weigh_rows(grad, home, places, weights), strict=True
        )
        for got, want in pairs:
            torch.testing.assert_close(got, want, **close)
        routed += sent
    return routed


def equal(one: torch.Tensor, two: torch.Tensor, what: str) -> None:
    """Raises unless both are equal, in dtype and shape as well."""
    if one.dtype != two.dtype or one.shape != two.shape or not torch.equal(one, two):
        raise AssertionError(f"{what} differ:\n{one}\n{two}")


def main() -> None:
    """Compares a number of random dispatches, sizes at the edges of blocks among them."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    draw = random.Random(5)
    routed = 0
    for seed in range(number):
        ranks, experts = draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3, 5, 8])
        k, tokens, hidden = draw.randint(1, min(3, experts)), draw.choice([0, 1, 33, 70]), draw.choice([1, 3, 8])
        dtype = draw.choice([torch.float32, torch.bfloat16])
        routed += compare(device, ranks, experts, k, tokens, hidden, seed, dtype)
    assert routed
    print(f"{number} dispatches, {routed} routes: equal")


if __name__ == "__main__":
    main()
