from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import CoverageError
from moc_ckpt.plan.coverage import check_coverage, check_experts, coverage_problems
from moc_ckpt.state.fragment import TensorKey
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer

A, B = TensorKey("a.weight", "master"), TensorKey("b.weight", "exp_avg")
DECLARED = {A: ("float32", (2, 5)), B: ("float32", (4,))}
WHOLE = [(A, 0, 10), (B, 0, 4)]


def test_whole_tensors_pass() -> None:
    check_coverage(DECLARED, WHOLE)
    check_coverage(DECLARED, [(B, 2, 4), (A, 7, 10), (A, 0, 3), (B, 0, 2), (A, 3, 7), (A, 5, 5)])
    check_coverage({}, [])


def test_tensors_without_elements_need_nothing() -> None:
    empty = TensorKey("e", "master")
    check_coverage({empty: ("float32", (0, 3))}, [])
    check_coverage({empty: ("float32", (0, 3))}, [(empty, 0, 0)])


def test_scalars_have_one_element() -> None:
    scalar = TensorKey("s", "master")
    check_coverage({scalar: ("float32", ())}, [(scalar, 0, 1)])
    with pytest.raises(CoverageError):
        check_coverage({scalar: ("float32", ())}, [])


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([(A, 0, 3), (A, 5, 10), (B, 0, 4)], r"a.weight \(master\): hole \[3, 5\)"),
        ([(A, 1, 10), (B, 0, 4)], r"a.weight \(master\): hole \[0, 1\)"),
        ([(A, 0, 9), (B, 0, 4)], r"a.weight \(master\): hole \[9, 10\)"),
        ([(A, 0, 10)], r"b.weight \(exp_avg\): hole \[0, 4\) \(the whole tensor\)"),
        ([*WHOLE, (A, 2, 4)], r"a.weight \(master\): overlap \[2, 4\)"),
        ([*WHOLE, (A, 0, 10)], r"a.weight \(master\): overlap \[0, 10\)"),
        ([(A, 0, 6), (A, 5, 10), (B, 0, 4)], r"a.weight \(master\): overlap \[5, 6\)"),
        ([*WHOLE, (A, 8, 11)], r"outside the tensor's \[0, 10\)"),
        ([*WHOLE, (TensorKey("c", "master"), 0, 1)], r"c \(master\): has fragments but no rank declared it"),
    ],
)
def test_problems_are_named(fragments: list[tuple[TensorKey, int, int]], message: str) -> None:
    with pytest.raises(CoverageError, match=message) as info:
        check_coverage(DECLARED, fragments)
    assert "1 problem)" in info.value.what and info.value.fix


def test_the_rest_is_counted() -> None:
    declared = {TensorKey(f"t{i}", "master"): ("float32", (2,)) for i in range(40)}
    with pytest.raises(CoverageError) as info:
        check_coverage(declared, [])
    assert "40 problems" in info.value.what and "and 35 more" in info.value.where


@given(
    numel=st.integers(0, 12),
    spans=st.lists(st.tuples(st.integers(-1, 13), st.integers(-1, 13)).map(sorted), max_size=6),
)
def test_agrees_with_counting_every_element(numel: int, spans: list[list[int]]) -> None:
    counts = [0] * numel
    inside = True
    for start, stop in spans:
        inside &= start >= 0 and stop <= numel
        for element in range(max(start, 0), min(stop, numel)):
            counts[element] += 1
    good = inside and all(count == 1 for count in counts)
    problems = coverage_problems({A: ("float32", (numel,))}, [(A, *span) for span in spans])
    assert (not problems) == good
    if inside:
        holes = {
            element
            for problem in problems
            if ": hole" in problem
            for element in range(*map(int, problem.partition("[")[2].partition(")")[0].split(", ")))
        }
        assert holes == {element for element, count in enumerate(counts) if count == 0}


LAYERS = [MoELayer(0, "h.0.moe", 3), MoELayer(1, "h.1.moe", 2)]


def experts() -> dict[TensorKey, tuple[str, tuple[int, ...]]]:
    declared: dict[TensorKey, tuple[str, tuple[int, ...]]] = {A: ("float32", (2, 5))}
    for layer in LAYERS:
        for expert in range(layer.num_experts):
            for name, shape in (("w", (3, 4)), ("b", (4,))):
                key = TensorKey(f"{layer.prefix}{EXPERTS_MARK}{expert}.{name}", "master")
                declared[key] = ("float32", shape)
    return declared


def test_equal_experts_pass() -> None:
    check_experts(LAYERS, experts())
    check_experts([], {A: ("float32", (1,))})


def test_an_expert_that_nobody_declared_is_named() -> None:
    declared = {key: spec for key, spec in experts().items() if f"h.1.moe{EXPERTS_MARK}1." not in key.fqn}
    with pytest.raises(CoverageError, match=r"MoE layer 1 \(h.1.moe\): no state of expert 1\n") as info:
        check_experts(LAYERS, declared)
    assert "1 problem)" in info.value.what


def test_a_layer_without_any_expert_is_named() -> None:
    declared = {key: spec for key, spec in experts().items() if "h.1.moe" not in key.fqn}
    with pytest.raises(CoverageError, match="no state of expert 0, 1"):
        check_experts(LAYERS, declared)


def test_experts_that_differ_are_named() -> None:
    declared = experts()
    del declared[TensorKey(f"h.0.moe{EXPERTS_MARK}2.b", "master")]
    with pytest.raises(CoverageError, match=r"expert 2 lacks b \(master\)"):
        check_experts(LAYERS, declared)
    declared = experts()
    declared[TensorKey(f"h.0.moe{EXPERTS_MARK}2.b", "master")] = ("float32", (5,))
    with pytest.raises(CoverageError, match="another shape or dtype of b"):
        check_experts(LAYERS, declared)


@pytest.mark.parametrize(
    "name", [f"h.7.moe{EXPERTS_MARK}0.w", f"h.0.moe{EXPERTS_MARK}3.w", f"h.0.moe{EXPERTS_MARK}x.w"]
)
def test_experts_of_unknown_layers_are_named(name: str) -> None:
    declared = {**experts(), TensorKey(name, "master"): ("float32", (3, 4))}
    with pytest.raises(CoverageError, match="belongs to no expert of the known MoE layers"):
        check_experts(LAYERS, declared)
