"""Shares that even the ranks' work: against a linear program, and what is refused."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.shares import check_shares, even_shares, slot_shares
from moc_ckpt.lazarus.types import Placement


def place_loads(loads: list[int], shares: tuple[tuple[int, ...], ...]) -> list[float]:
    whole = [sum(column) for column in zip(*shares, strict=True)]
    return [sum(load * share / every for load, share, every in zip(loads, row, whole, strict=True)) for row in shares]


def random_case(seed: int) -> tuple[list[int], Placement]:
    draw = random.Random(seed)
    places, slots = draw.randint(1, 6), draw.randint(1, 5)
    experts = draw.randint(1, min(8, places * slots))
    filled = list(range(experts)) + [draw.randrange(experts) for _ in range(places * slots - experts)]
    draw.shuffle(filled)
    rows = tuple(tuple(filled[place * slots : (place + 1) * slots]) for place in range(places))
    return [draw.choice([0, 1, 5, draw.randint(0, 1000)]) for _ in range(experts)], Placement(experts, rows)


def smallest_largest(loads: list[int], placement: Placement) -> float:
    """The least load that the busiest place can have: a linear program over all ways to share."""
    optimize = pytest.importorskip("scipy.optimize")
    pairs = [(place, expert) for expert in range(len(loads)) for place in placement.holders(expert)]
    below = np.zeros((len(placement.slots), len(pairs) + 1))
    below[:, -1] = -1
    whole = np.zeros((len(loads), len(pairs) + 1))
    for column, (place, expert) in enumerate(pairs):
        below[place, column] = whole[expert, column] = 1
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1
    found = optimize.linprog(cost, A_ub=below, b_ub=np.zeros(len(below)), A_eq=whole, b_eq=loads)
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("seed", range(60))
def test_no_sharing_has_a_less_busy_place(seed: int) -> None:
    loads, placement = random_case(seed)
    shares = even_shares(loads, placement)
    check_shares(shares, placement)
    largest = max(place_loads(loads, shares))
    mean = sum(loads) / len(placement.slots)
    assert largest <= smallest_largest(loads, placement) + 0.01 * mean
    assert largest <= max(place_loads(loads, slot_shares(placement))) + 1e-3 * mean


def test_by_hand() -> None:
    placement = Placement(3, ((0, 1), (0, 2)))
    assert slot_shares(placement) == ((1, 1, 0), (1, 0, 1))
    shares = even_shares([6, 4, 0], placement)
    assert place_loads([6, 4, 0], shares) == pytest.approx([5, 5], rel=1e-3)
    assert shares[1][2] == 1, "an expert without load keeps a share per slot"


def test_a_thousand_devices_in_a_second() -> None:
    """128 nodes, 256 experts, 8 slots: one layer."""
    draw = random.Random(1)
    filled = list(range(256)) + [int(256 * draw.random() ** 2) for _ in range(128 * 8 - 256)]
    draw.shuffle(filled)
    placement = Placement(256, tuple(tuple(filled[place * 8 : place * 8 + 8]) for place in range(128)))
    begin = time.process_time()
    shares = even_shares([1000 // (1 + expert // 8) for expert in range(256)], placement)
    assert time.process_time() - begin < 2.0
    check_shares(shares, placement)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (((1, 1),), "2 places by 2 experts"),
        (((1, 1), (1,)), "2 places by 2 experts"),
        (((1, 1), (1, 1)), "expert 1: place 1 cannot have 1"),
        (((-1, 1), (2, 0)), "expert 0: place 0 cannot have -1"),
        (((1, 0), (1, 0)), "expert 1: all places have 0"),
        (((0.5, 1), (0.5, 0)), "expert 0: place 0 cannot have 0.5"),
        (((2**62, 1), (2**62, 0)), "expert 0: all places have 92"),
    ],
)
def test_what_does_not_fit_is_refused(shares: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_shares(shares, Placement(2, ((0, 1), (0, 0))), where="block 5")


def test_wrong_loads_are_refused() -> None:
    for loads in ([1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ConfigError):
            even_shares(loads, Placement(2, ((0, 1),)))


@pytest.mark.parametrize("least", [1e-300, 1e-16, 1.69e-12, 1e-6])
def test_a_vanishing_load_keeps_its_slots(least: float) -> None:
    """Loads may be averages over a long time, in which an idle expert's gets smaller and smaller."""
    placement = Placement(4, ((0, 1, 3), (0, 2), (1, 2, 3)))
    shares = even_shares([least, 4096.0, 4096.0, 9000.0], placement)
    check_shares(shares, placement)
    assert sum(row[0] for row in shares) > 0
