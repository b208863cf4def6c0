"""Replicas by load: equation 1, and loads that break naive versions of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError
from moc_ckpt.lazarus.allocation import allocate

loads = st.one_of(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=40),
    st.lists(st.sampled_from([0, 1, 7]), min_size=1, max_size=40),
    st.lists(st.floats(0, 1e9, allow_nan=False), min_size=1, max_size=20),
)


def equation_1(tokens: list[Fraction], room: int, threshold: int) -> list[int]:
    """Literally, on loads that are sorted and positive."""
    replicas: list[int] = []
    for e in range(len(tokens)):
        share = tokens[e] / sum(tokens[e:]) * (room - sum(replicas))
        replicas.append(max(share.__floor__(), threshold))
    return replicas


@settings(deadline=None, max_examples=400)
@given(loads=loads, nodes=st.integers(1, 12), slots=st.integers(1, 12), threshold=st.integers(1, 12))
def test_invariants(loads: list[float], nodes: int, slots: int, threshold: int) -> None:
    if nodes * slots < len(loads) or threshold > nodes:
        with pytest.raises(ConfigError):
            allocate(loads, nodes, slots, threshold)
        return
    found = allocate(loads, nodes, slots, threshold)
    assert sum(found.replicas) == nodes * slots
    assert found.fault_threshold == min(threshold, nodes * slots // len(loads))
    assert min(found.replicas) >= found.fault_threshold >= 1
    assert bool(found.note) == (found.fault_threshold < threshold)
    ordered = sorted(range(len(loads)), key=lambda expert: (loads[expert], expert))
    sizes = [found.replicas[expert] for expert in ordered]
    assert sizes == sorted(sizes)


@settings(deadline=None, max_examples=200)
@given(
    loads=st.lists(st.integers(1, 10**9), min_size=1, max_size=20),
    nodes=st.integers(1, 10),
    slots=st.integers(2, 10),
    threshold=st.integers(1, 3),
)
def test_equation_1(loads: list[int], nodes: int, slots: int, threshold: int) -> None:
    threshold = min(threshold, nodes)
    loads = sorted(loads)[: nodes * slots // threshold]
    found = allocate(loads, nodes, slots, threshold)
    assert list(found.replicas) == equation_1([Fraction(load) for load in loads], nodes * slots, threshold)


@pytest.mark.parametrize(
    ("loads", "nodes", "slots", "threshold", "replicas"),
    [
        ([5, 3, 1, 1], 5, 4, 1, (10, 6, 2, 2)),
        ([0, 0, 0], 3, 2, 1, (2, 2, 2)),  # no load at all: evenly
        ([0, 0, 9], 3, 2, 1, (1, 1, 4)),  # one hot
        ([0, 9, 0], 3, 2, 2, (2, 2, 2)),
        ([7, 7, 7, 7], 5, 2, 2, (2, 2, 3, 3)),  # ties by number
        ([1, 1, 1], 2, 2, 2, (1, 1, 2)),  # 4 slots do not hold 2 of each
        ([3], 4, 2, 1, (8,)),
        ([0], 2, 1, 1, (2,)),
    ],
)
def test_examples(loads: list[int], nodes: int, slots: int, threshold: int, replicas: tuple[int, ...]) -> None:
    assert allocate(loads, nodes, slots, threshold).replicas == replicas


def test_a_threshold_that_is_too_high_is_lowered_and_said() -> None:
    found = allocate([4, 2, 1], 4, 2, 3)
    assert (found.replicas, found.fault_threshold, found.asked) == ((4, 2, 2), 2, 3)
    assert found.note == "8 slots do not hold 3 replicas of 3 experts: every expert has at least 2"


def test_ratios_of_huge_and_tiny_loads_are_exact() -> None:
    # Doubles would round t_e / sum(t) * slots up to the next integer, or down.
    big = 10**18
    assert allocate([big, 2 * big + 1], 3, 1, 1).replicas == (1, 2)
    assert allocate([big + 1, 2 * big], 3, 1, 1).replicas == (1, 2)
    assert allocate([big - 1, 2 * big], 3, 2, 1).replicas == (1, 5)
    assert allocate([5e-324, 1e-323], 3, 2, 1).replicas == (2, 4)


def test_arrays_of_counts_will_do() -> None:
    assert allocate(np.array([5, 3, 1, 1]), 5, 4).replicas == (10, 6, 2, 2)  # type: ignore[arg-type]
    assert allocate(np.array([5, 3, 1, 1], dtype=np.float32), 5, 4).replicas == (10, 6, 2, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loads", "nodes", "slots", "threshold", "message"),
    [
        ([1, -1], 2, 2, 1, r"load of expert 1 is -1\n.*MoE layer 3"),
        ([float("nan"), 1], 2, 2, 1, r"load of expert 0 is nan"),
        ([1, float("inf")], 2, 2, 1, r"load of expert 1 is inf"),
        ([1, "x"], 2, 2, 1, r"load of expert 1 is 'x'"),
        ([1, 1, 1], 1, 2, 1, r"2 slots for 3 experts: expert 2 would get none\n.*MoE layer 3\n.*at least 3 slots"),
        ([1, 1], 2, 2, 3, r"fault threshold of 3 needs as many nodes, and there are 2\n.*MoE layer 3"),
        ([], 2, 2, 1, "no experts"),
        ([1], 0, 2, 1, "nodes is 0"),
        ([1], 2, 0, 1, "slots is 0"),
        ([1], 2, 2, 0, "fault_threshold is 0"),
    ],
)
def test_bad_input(loads: list[float], nodes: int, slots: int, threshold: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(loads, nodes, slots, threshold, layer=3)
