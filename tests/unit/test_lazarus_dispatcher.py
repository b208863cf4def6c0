"""The dispatcher's integers: conservation, fair shares, locality, the same plan on all ranks, and every row's way."""

from __future__ import annotations

import random
from fractions import Fraction

import lazarus_tools as tools
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.lazarus import rows
from moc_ckpt.lazarus.dispatcher import make_plan, rank_flows, targets


@st.composite
def dispatches(draw: st.DrawFn, largest: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and slots, [N, E] each; zeros and ties are common."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    number = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, largest))
    table = st.lists(number, min_size=ranks * experts, max_size=ranks * experts)
    counts = torch.tensor(draw(table)).view(ranks, experts)
    held = st.lists(st.integers(0, 3), min_size=ranks * experts, max_size=ranks * experts)
    slots = torch.tensor(draw(held)).view(ranks, experts)
    for expert in range(experts):
        if not slots[:, expert].any():
            slots[draw(st.integers(0, ranks - 1)), expert] = draw(st.integers(1, 3))
    return counts, slots


def check_flows(counts: torch.Tensor, slots: torch.Tensor) -> None:
    """What must hold of any dispatch, entry by entry."""
    ranks, experts = counts.shape
    flows = [rank_flows(counts, slots, rank) for rank in range(ranks)]
    for expert in range(experts):
        total, every = int(counts[:, expert].sum()), int(slots[:, expert].sum())
        load = [sum(int(flows[sender][0][rank, expert]) for sender in range(ranks)) for rank in range(ranks)]
        assert sum(load) == total
        for rank in range(ranks):
            send = flows[rank][0]
            assert int(send[:, expert].sum()) == int(counts[rank, expert]), "every row is sent exactly once"
            assert abs(load[rank] - Fraction(total * int(slots[rank, expert]), every)) < 1, "a fair share"
            assert load[rank] == 0 or slots[rank, expert] > 0, "only to ranks that have the expert"
            assert int(send[rank, expert]) == min(int(counts[rank, expert]), load[rank]), "local room first"
            for other in range(ranks):
                assert send[other, expert] >= 0
                assert send[other, expert] == flows[other][1][rank, expert], "both ends know of the same rows"


@given(dispatches())
def test_flows(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    check_flows(*case)


@settings(max_examples=30)
@given(dispatches(largest=10**9))
def test_flows_of_billions(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    check_flows(*case)


def test_targets_by_hand() -> None:
    counts = torch.tensor([[10, 0], [0, 7]])
    slots = torch.tensor([[2, 1], [1, 1]])
    assert targets(counts, slots).tolist() == [[6, 3], [4, 4]]
    send, recv = rank_flows(counts, slots, 0)
    assert send.tolist() == [[6, 0], [4, 0]]
    assert recv.tolist() == [[6, 0], [0, 3]]


def test_experts_do_not_all_fill_the_same_rank_first() -> None:
    """Ranks 0 and 1 have twice their share, 2 and 3 nothing: who sends to whom alternates with the expert."""
    counts = torch.tensor([[8] * 4, [8] * 4, [0] * 4, [0] * 4])
    slots = torch.ones(4, 4, dtype=torch.int64)
    assert rank_flows(counts, slots, 0)[0].t().tolist() == [[4, 0, 4, 0], [4, 0, 4, 0], [4, 0, 4, 0], [4, 0, 0, 4]]
    assert rank_flows(counts, slots, 1)[0].t().tolist() == [[0, 4, 0, 4], [0, 4, 0, 4], [0, 4, 0, 4], [0, 4, 4, 0]]


def exchange(buffers: list[torch.Tensor], sizes: list[list[int]]) -> list[torch.Tensor]:
    """An all-to-all by hand: what each rank receives, in the order of senders."""
    parts = [buffer[: sum(size)].split(size) for buffer, size in zip(buffers, sizes, strict=True)]
    return [torch.cat([parts[sender][rank] for sender in range(len(buffers))]) for rank in range(len(buffers))]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.integers(1, 5),
    experts=st.integers(1, 6),
    k=st.integers(1, 3),
    tokens=st.integers(0, 40),
)
def test_every_row_arrives_sorted_and_returns(seed: int, ranks: int, experts: int, k: int, tokens: int) -> None:
    draw = random.Random(seed)
    slots = tools.random_slots(draw, ranks, experts)
    chosen = [tools.random_experts(draw, draw.randint(0, tokens), experts, min(k, experts)) for _ in range(ranks)]
    counted = [rows.count_routes(mine, experts) for mine in chosen]
    counts = torch.stack([count for count, _ in counted])
    for mine, (count, seen) in zip(chosen, counted, strict=True):
        flat = mine.reshape(-1).tolist()
        assert count.tolist() == [flat.count(expert) for expert in range(experts)]
        assert [flat[:place].count(expert) for place, expert in enumerate(flat)] == seen.tolist()
    plans = [make_plan(counts, slots, rank) for rank in range(ranks)]
    sizes = [plan.sizes.tolist() for plan in plans]
    # Rows that say who they are: sender, token. Their expert follows from the route.
    named = [
        torch.stack([torch.full((len(mine),), rank), torch.arange(len(mine))], dim=1)
        for rank, mine in enumerate(chosen)
    ]
    sent = [
        rows.send_rows(name, mine, seen, plan)
        for name, mine, (_, seen), plan in zip(named, chosen, counted, plans, strict=True)
    ]
    received = exchange([buffer for buffer, _ in sent], [size[:ranks] for size in sizes])
    arrived: list[tuple[int, int, int]] = []
    back = []
    for rank, (mine, plan) in enumerate(zip(received, plans, strict=True)):
        assert [len(mine)] == [sum(sizes[rank][ranks : 2 * ranks])]
        ordered, places = rows.sort_rows(mine, plan)
        of_expert = sizes[rank][2 * ranks :]
        for expert, part in enumerate(ordered.split(of_expert)):
            found = [tuple(row) for row in part.tolist()]
            assert found == sorted(found), "by sender and position"
            arrived += [(expert, sender, token) for sender, token in found]
        back.append(rows.gather_rows(ordered, places))
    wanted = [
        (expert, rank, token)
        for rank, mine in enumerate(chosen)
        for token, choices in enumerate(mine.tolist())
        for expert in choices
        if expert >= 0
    ]
    assert sorted(arrived) == sorted(wanted)
    home = exchange(back, [size[ranks : 2 * ranks] for size in sizes])
    for name, mine, rows_home, (_, places) in zip(named, chosen, home, sent, strict=True):
        total = rows.combine_rows(rows_home.double(), places, None)
        assert torch.equal(total, name.double() * (mine >= 0).sum(1, keepdim=True))


@pytest.mark.parametrize("k", [1, 2])
def test_weigh_is_the_gradient_of_combine(k: int) -> None:
    draw = random.Random(3)
    chosen = tools.random_experts(draw, 9, 4, k)
    _, seen = rows.count_routes(chosen, 4)
    counts = rows.count_routes(chosen, 4)[0][None]
    tokens = torch.rand(9, 5, dtype=torch.float64)
    home, places = rows.send_rows(tokens, chosen, seen, make_plan(counts, torch.ones_like(counts), 0))
    home = home[: int(counts.sum())].requires_grad_()
    weights = torch.rand(9, k, dtype=torch.float64, requires_grad=True)
    grad = torch.rand(9, 5, dtype=torch.float64)
    wanted = torch.autograd.grad(rows.combine_rows(home, places, weights), (home, weights), grad)
    got = rows.weigh_rows(grad, home.detach(), places, weights.detach())
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two)
