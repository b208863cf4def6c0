"""Migration: the fewest copies move, from live holders only, and sources share the work."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError, MocError
from moc_ckpt.lazarus._sources import balanced_sources
from moc_ckpt.lazarus.migration import Migration, migrate
from moc_ckpt.lazarus.placement import mro, spread
from moc_ckpt.lazarus.types import Placement


def check(old: list[Placement], plan: list[Placement], failed: list[int], joined: int, found: Migration) -> None:
    """What holds for every migration, from its definition."""
    count = len(old[0].slots)
    assert found.nodes == (*(node for node in range(count) if node not in failed), *range(count, count + joined))
    for layer, (before, after, item) in enumerate(zip(old, plan, found.layers, strict=True)):
        assert sorted(item.placement.slots) == sorted(after.slots)
        assert [after.slots[place] for place in item.places] == list(item.placement.slots)
        has = {node: set(before.slots[node]) if node < count else set() for node in found.nodes}
        moves = [transfer for transfer in found.transfers if transfer.layer == layer]
        for transfer in moves:
            assert transfer.source is None or transfer.expert in has[transfer.source]
            assert transfer.expert not in has[transfer.destination]
        assert len({(transfer.destination, transfer.expert) for transfer in moves}) == len(moves) == item.transfers
        for node, wanted in zip(found.nodes, item.placement.slots, strict=True):
            arrived = {transfer.expert for transfer in moves if transfer.destination == node}
            assert arrived == set(wanted) - has[node]
        assert item.transfers <= min(item.greedy, item.identity)


def fewest(before: Placement, after: Placement, nodes: tuple[int, ...]) -> int:
    has = [set(before.slots[node]) if node < len(before.slots) else set() for node in nodes]
    return min(
        sum(len(set(held) - own) for held, own in zip(order, has, strict=True))
        for order in itertools.permutations(after.slots)
    )


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[Placement], list[Placement], list[int], int]:
    nodes, slots, layers = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    failed = draw(st.lists(st.integers(0, nodes - 1), unique=True, max_size=nodes - 1).map(sorted))
    joined = draw(st.integers(0, 6 - (nodes - len(failed))))
    now = nodes - len(failed) + joined
    experts = draw(st.integers(1, min(nodes, now) * slots))
    rng = draw(st.randoms(use_true_random=False))

    def placement(count: int) -> Placement:
        replicas = [1] * experts
        for _ in range(rng.randint(0, count * slots - experts)):
            replicas[rng.randrange(experts)] += 1
        places = list(rng.choice((mro, spread))(replicas, count, slots).slots)
        rng.shuffle(places)
        return Placement(experts, tuple(places))

    return [placement(nodes) for _ in range(layers)], [placement(now) for _ in range(layers)], failed, joined


@settings(deadline=None, max_examples=250)
@given(case=moves())
def test_as_few_copies_move_as_possible(case: tuple[list[Placement], list[Placement], list[int], int]) -> None:
    old, plan, failed, joined = case
    found = migrate(old, plan, failed=failed, joined=joined, allow_checkpoint=True)
    check(old, plan, failed, joined, found)
    for before, after, item in zip(old, plan, found.layers, strict=True):
        assert item.transfers == fewest(before, after, found.nodes)


@settings(deadline=None, max_examples=250)
@given(case=moves())
def test_experts_without_a_live_copy_are_named_or_listed(
    case: tuple[list[Placement], list[Placement], list[int], int],
) -> None:
    old, plan, failed, joined = case
    alive = [node for node in range(len(old[0].slots)) if node not in failed]
    lost = {
        (layer, expert)
        for layer, before in enumerate(old)
        for expert in set(range(before.num_experts)).difference(*(before.slots[node] for node in alive))
    }
    found = migrate(old, plan, failed=failed, joined=joined, allow_checkpoint=True)
    assert set(found.from_checkpoint) == lost
    assert {(item.layer, item.expert) for item in found.transfers if item.source is None} == lost
    if lost:
        layer, expert = min(lost)
        with pytest.raises(MocError, match=f"copy of expert {expert} of MoE layer {layer}"):
            migrate(old, plan, failed=failed, joined=joined)
    else:
        assert migrate(old, plan, failed=failed, joined=joined) == found


@settings(deadline=None, max_examples=300)
@given(
    choices=st.lists(st.lists(st.integers(0, 3), unique=True, max_size=4), max_size=6),
)
def test_sources_share_the_transfers_as_evenly_as_possible(choices: list[list[int]]) -> None:
    found = balanced_sources(range(len(choices)), dict(enumerate(choices)), 4)
    assert all((got is None and not some) or got in some for got, some in zip(found, choices, strict=True))
    real = [some for some in choices if some]
    best = min(max([pick.count(s) for s in range(4)]) for pick in itertools.product(*real))
    assert max(found.count(source) for source in range(4)) == best


def test_a_chain_of_moves_relieves_a_source() -> None:
    # Taken one by one the first ones share 0 and 1, and the rest would make 2 for all but by luck.
    choices = {"a": [0, 1], "b": [1, 2], "c": [0, 1, 2]}
    assert sorted(balanced_sources([*"aaaabb"], choices, 3)) == [0, 0, 1, 1, 2, 2]


def test_sources_are_shared_over_all_layers() -> None:
    # In each layer a new node needs expert 0, which nodes 0 and 1 have: one from each.
    old = [Placement(1, ((0,), (0,)))] * 2
    plan = [Placement(1, ((0,), (0,), (0,)))] * 2
    assert migrate(old, plan, joined=1).sent == {0: 1, 1: 1, 2: 0}


def test_failure_join_and_rebalancing_are_one_thing() -> None:
    old = [mro([2, 2, 4, 4], 4, 3)]
    assert migrate(old, old).transfers == ()
    assert migrate(old, [mro([2, 2, 4, 4], 4, 3)], failed=[3], joined=1).received == {0: 0, 1: 0, 2: 0, 4: 2}
    smaller = migrate(old, [mro([2, 2, 2, 3], 3, 3)], failed=[0])
    check(old, [mro([2, 2, 2, 3], 3, 3)], [0], 0, smaller)


def test_greedy_can_be_beaten() -> None:
    rng = random.Random(7)
    beaten = 0
    for _ in range(60):
        replicas = [2] * 8 + [rng.randint(2, 6) for _ in range(4)]
        old, plan = (list(spread(rng.sample(replicas, 12), 8, 6).slots) for _ in range(2))
        rng.shuffle(plan)
        item = migrate([Placement(12, tuple(old))], [Placement(12, tuple(plan))]).layers[0]
        assert item.transfers <= item.greedy
        beaten += item.transfers < item.greedy
    assert beaten


def test_nodes_keep_to_their_failure_domain() -> None:
    old = [Placement(2, ((0,), (0,), (1,), (1,)))]
    plan = [Placement(2, ((1,), (1,), (0,), (0,)))]
    domains = (0, 0, 1, 1)
    assert migrate(old, plan).transfers == ()
    kept = migrate(old, plan, domains=domains, plan_domains=domains)
    assert kept.layers[0].placement == plan[0] and len(kept.transfers) == 4
    with pytest.raises(ConfigError, match="failure domains of the nodes are not those"):
        migrate(old, plan, domains=domains, plan_domains=(0, 1, 1, 1))
    with pytest.raises(ConfigError, match="give both"):
        migrate(old, plan, domains=domains)


@pytest.mark.parametrize(
    ("old", "plan", "options", "message"),
    [
        ([mro([2, 2], 2, 2)], [mro([2, 2], 4, 1)], {}, r"plan is for another world: it has 4 places for 2 nodes"),
        ([mro([2, 2], 2, 2)], [mro([2, 2], 2, 2)], {"joined": 1}, r"2 places for 3 nodes \(2 - 0 failed \+ 1 joined\)"),
        ([mro([2, 2], 2, 2)], [mro([2, 1, 1], 2, 2)], {}, r"has 3 experts and the old one 2\n.*MoE layer 0"),
        ([mro([2, 2], 2, 2)], [], {}, "0 MoE layers"),
        ([mro([2, 2], 2, 2)], [mro([2, 2], 2, 2)], {"failed": [2]}, r"nodes \[2\] failed\n.*nodes 0 to 1"),
        ([mro([2, 2], 2, 2)], [mro([2, 2], 2, 2)], {"joined": -1}, "-1 nodes joined"),
        (
            [mro([2, 2], 2, 2)] * 2,
            [mro([2, 2], 2, 2), Placement(2, ((0,), (0,)))],
            {},
            r"no replica of expert 1\n.*layer 1",
        ),
        ([mro([2, 2], 2, 2), mro([2, 2], 4, 1)], [mro([2, 2], 2, 2)] * 2, {}, r"4 nodes, and 2 in the first layer"),
    ],
)
def test_bad_input(old: list[Placement], plan: list[Placement], options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        migrate(old, plan, **options)  # type: ignore[arg-type]
