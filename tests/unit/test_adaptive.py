"""Adaptive configuration against brute force: every K, every interval, simulated faults."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import ConfigError
from moc_ckpt.plan.adaptive import (
    MAX_INTERVAL,
    UNMEASURED_INTERVAL,
    Measured,
    Settings,
    best_interval,
    choose_k,
    choose_persist_interval,
    choose_snapshot_interval,
    decide,
    overhead_per_step,
    reconsider,
)

GB = 10**9
#: The H200 model of the measured facts: 7.27 GB per rank, of which about 0.9 GB are dense, 141 ms per step.
WINDOW = [int(0.9 * GB + k * 0.398 * GB) for k in range(17)]
H200 = Measured(
    copy_bytes_per_s=55 * GB, forward_backward_s=0.120, step_s=0.141, persist_bytes_per_s=2 * GB, restart_s=60.0
)

seconds = st.floats(1e-4, 1e3)
costs = st.one_of(st.just(0.0), st.floats(1e-6, 1e2))
rates = st.floats(1e3, 1e12)
windows = st.lists(st.integers(0, 10**12), min_size=1, max_size=33)
growing = windows.map(sorted)
mtbfs = st.floats(1.0, 1e7)


def measured_strategy(**fixed: object) -> st.SearchStrategy[Measured]:
    given_fields: dict[str, st.SearchStrategy[object]] = {
        "copy_bytes_per_s": rates,
        "forward_backward_s": seconds,
        "step_s": seconds,
        "persist_bytes_per_s": rates,
        "restart_s": st.one_of(st.none(), st.floats(0, 1e4)),
        "stall_s": costs,
        "persist_cost_s": costs,
    }
    return st.builds(Measured, **{**given_fields, **{name: st.just(value) for name, value in fixed.items()}})


def optimum(cost, intervals) -> float:
    return min(cost(interval) for interval in intervals)


# ------------------------------------------------------------------------------------------------------ K


@given(windows, measured_strategy(), st.data())
def test_k_is_the_largest_that_hides(window, measured, data):
    k_max = len(window) - 1
    k_min = data.draw(st.integers(0, k_max))
    margin = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    choice = choose_k(window, measured, k_min, k_max, margin=margin)
    budget = measured.forward_backward_s * (1 - margin)
    hidden = [k for k in range(k_min, k_max + 1) if window[k] / measured.copy_bytes_per_s <= budget]
    assert choice.k == (max(hidden) if hidden else k_min)
    assert choice.hides == bool(hidden)
    assert choice.nbytes == window[choice.k]
    # Equation 10, written as the paper has it.
    snapshot = window[choice.k] / measured.copy_bytes_per_s
    over = snapshot - measured.forward_backward_s if snapshot > measured.forward_backward_s else 0.0
    assert choice.exposed_s == over
    if hidden:
        assert choice.exposed_s == 0


@given(windows, measured_strategy(), st.floats(1.0, 100.0), st.floats(1.0, 100.0))
def test_more_bandwidth_or_time_never_lowers_k(window, measured, faster, longer):
    k_max = len(window) - 1
    k = choose_k(window, measured, 0, k_max).k
    more = replace(
        measured,
        copy_bytes_per_s=measured.copy_bytes_per_s * faster,
        forward_backward_s=measured.forward_backward_s * longer,
    )
    assert choose_k(window, more, 0, k_max).k >= k


def test_window_as_a_function_is_asked_from_the_top_and_not_further_than_needed():
    asked = []

    def window(k: int) -> int:
        asked.append(k)
        return WINDOW[k]

    assert choose_k(window, H200, 1, 16).k == 12  # 5.68 GB in 103 ms; 13 would take 110.5 ms of 108
    assert asked == [16, 15, 14, 13, 12]
    assert choose_k(WINDOW, H200, 1, 16).k == 12


def test_k_where_nothing_hides_reports_what_is_exposed():
    slow = replace(H200, copy_bytes_per_s=5 * GB)
    choice = choose_k(WINDOW, slow, 1, 16)
    assert (choice.k, choice.hides) == (1, False)
    assert choice.exposed_s == pytest.approx(1.298 / 5 - 0.120)


@pytest.mark.parametrize(
    ("k_min", "k_max", "margin", "window"),
    [(3, 2, 0.1, [1] * 5), (-1, 2, 0.1, [1] * 5), (1, 2, 1.0, [1] * 5), (1, 9, 0.1, [1] * 5), (0, 0, 0.1, [-1])],
)
def test_k_refuses_what_cannot_be(k_min, k_max, margin, window):
    with pytest.raises(ValueError):
        choose_k(window, H200, k_min, k_max, margin=margin)


# -------------------------------------------------------------------------------------------- the interval


@given(st.floats(0, 50.0), st.floats(0.01, 10.0), st.floats(10.0, 1e5), st.integers(1, 40), st.integers(0, 400))
def test_no_other_interval_beats_the_best(save_s, step_s, mtbf_s, least, more):
    most = least + more
    best = best_interval(save_s, step_s, mtbf_s, least=least, most=most)
    assert least <= best <= most

    def cost(interval: int) -> float:
        return overhead_per_step(interval, save_s=save_s, step_s=step_s, mtbf_s=mtbf_s)

    assert cost(best) <= optimum(cost, range(least, most + 1)) * (1 + 1e-12)


@given(st.floats(1e-6, 1e4), st.floats(1e-4, 1e3), st.floats(1.0, 1e9))
def test_the_best_interval_is_youngs_rounded(save_s, step_s, mtbf_s):
    best = best_interval(save_s, step_s, mtbf_s)
    young = math.sqrt(2 * save_s * mtbf_s) / step_s
    assert best == MAX_INTERVAL or max(1, math.floor(young)) <= best <= math.ceil(young) + 1


def test_equal_overheads_take_the_smaller_interval():
    # I (I + 1) == 2 save MTBF / step^2 == 6: intervals 2 and 3 cost the same.
    assert overhead_per_step(2, save_s=3.0, step_s=1.0, mtbf_s=1.0) == overhead_per_step(
        3, save_s=3.0, step_s=1.0, mtbf_s=1.0
    )
    assert best_interval(3.0, 1.0, 1.0) == 2


def test_extreme_inputs_end():
    assert best_interval(0.0, 1.0, 1e9) == 1
    assert best_interval(1e6, 1e-9, 1e9) == MAX_INTERVAL
    assert best_interval(1e-300, 1e-9, 1e-9, least=7) == 7


def test_overhead_equals_equation_4():
    total, interval, save, step, mtbf, restart = 10_000, 25, 0.4, 0.5, 1000.0, 90.0
    faults = total * step / mtbf  # equation 11
    paper = save * total / interval + faults * (restart + interval / 2 * step)
    mine = total * overhead_per_step(interval, save_s=save, step_s=step, mtbf_s=mtbf, restart_s=restart)
    assert mine == pytest.approx(paper)


def test_the_model_agrees_with_a_simulation_of_faults():
    """Exponential faults, step by step: the mean time lost per step is the formula's, and its optimum is best."""
    step, save, mtbf, restart = 1.0, 2.0, 400.0, 5.0

    def simulate(interval: int, wanted: int, seed: int) -> float:
        draw = random.Random(seed)
        clock, done, committed, next_fault = 0.0, 0, 0, draw.expovariate(1 / mtbf)
        while done < wanted:
            duration = step + (save if (done + 1) % interval == 0 else 0.0)
            if clock + duration > next_fault:
                clock = next_fault + restart
                next_fault = clock + draw.expovariate(1 / mtbf)
                done = committed
                continue
            clock += duration
            done += 1
            if done % interval == 0:
                committed = done
        return clock / wanted - step

    best = best_interval(save, step, mtbf)
    assert best == 40
    lost = {one: sum(simulate(one, 40_000, seed) for seed in range(3)) / 3 for one in (best // 4, best, best * 4)}
    # The formula is of first order: it leaves out faults during repeated work.
    predicted = overhead_per_step(best, save_s=save, step_s=step, mtbf_s=mtbf, restart_s=restart)
    assert lost[best] == pytest.approx(predicted, rel=0.15)
    assert lost[best] < min(lost[best // 4], lost[best * 4])


# ----------------------------------------------------------------------------------------- snapshot interval


def test_snapshots_that_cost_nothing_are_taken_at_every_step():
    assert choose_snapshot_interval(0.0, H200) == 1
    assert choose_snapshot_interval(0.0, H200, mtbf_s=3600.0) == 1
    assert choose_snapshot_interval(0.0, H200, mtbf_s=3600.0, persist_interval=50) == 1


@given(costs, measured_strategy(), st.sampled_from([0.001, 0.01, 0.1]))
def test_without_mtbf_stalls_stay_within_their_share(save_s, measured, share):
    chosen = choose_snapshot_interval(save_s, measured, max_stall=share)
    if chosen < MAX_INTERVAL:
        assert save_s / chosen <= share * measured.step_s * (1 + 1e-9)
    if chosen > 1:
        assert save_s / (chosen - 1) > share * measured.step_s * (1 - 1e-9)


@given(costs, measured_strategy(), mtbfs, st.integers(1, 360))
def test_with_a_fixed_persist_the_best_divisor_is_chosen(save_s, measured, mtbf_s, persist):
    chosen = choose_snapshot_interval(save_s, measured, mtbf_s=mtbf_s, persist_interval=persist)
    assert persist % chosen == 0
    divisors = [one for one in range(1, persist + 1) if persist % one == 0]

    def cost(interval: int) -> float:
        return overhead_per_step(interval, save_s=save_s, step_s=measured.step_s, mtbf_s=mtbf_s)

    assert cost(chosen) <= optimum(cost, divisors) * (1 + 1e-12)
    without = choose_snapshot_interval(save_s, measured, persist_interval=persist)
    assert persist % without == 0


# ------------------------------------------------------------------------------------------ persist interval


@given(st.integers(0, 10**13), measured_strategy(), st.integers(1, 50))
def test_the_smallest_interval_that_persist_sustains(nbytes, measured, multiple):
    chosen = choose_persist_interval(nbytes, measured, multiple_of=multiple, margin=0.0)
    assert chosen % multiple == 0
    duration = nbytes / measured.persist_bytes_per_s
    if duration / measured.step_s < MAX_INTERVAL:
        assert chosen * measured.step_s >= duration * (1 - 1e-9)
        if chosen > multiple:
            assert (chosen - multiple) * measured.step_s < duration * (1 + 1e-9)
    with_margin = choose_persist_interval(nbytes, measured, multiple_of=multiple)
    assert with_margin >= chosen


@given(st.integers(0, 10**11), measured_strategy(), costs, mtbfs, st.integers(1, 20))
def test_with_mtbf_no_other_sustained_multiple_is_better(nbytes, measured, cost_s, mtbf_s, multiple):
    least = choose_persist_interval(nbytes, measured, multiple_of=multiple)
    chosen = choose_persist_interval(nbytes, measured, cost_s=cost_s, mtbf_s=mtbf_s, multiple_of=multiple)
    assert chosen >= least and chosen % multiple == 0

    def cost(interval: int) -> float:
        return overhead_per_step(interval, save_s=cost_s, step_s=measured.step_s, mtbf_s=mtbf_s)

    others = [least + multiple * number for number in range(200)] + [chosen + multiple]
    others += [chosen - multiple] if chosen - multiple >= least else []
    others = [one for one in others if one <= max(MAX_INTERVAL, chosen)]
    assert cost(chosen) <= optimum(cost, others) * (1 + 1e-12)


@given(st.integers(0, 10**12), measured_strategy(), st.floats(1.0, 50.0))
def test_a_faster_storage_never_lengthens_the_interval(nbytes, measured, faster):
    quick = replace(measured, persist_bytes_per_s=measured.persist_bytes_per_s * faster)
    assert choose_persist_interval(nbytes, quick) <= choose_persist_interval(nbytes, measured)


def test_unmeasured_persists_start_somewhere():
    unknown = replace(H200, persist_bytes_per_s=None)
    assert choose_persist_interval(GB, unknown) == UNMEASURED_INTERVAL
    assert choose_persist_interval(GB, unknown, multiple_of=4) == 12


# ------------------------------------------------------------------------------------------------ decisions


def test_the_measured_model_decides_as_by_hand():
    decision = decide(H200, Settings(experts=16), WINDOW)
    # K 12: 5.676 GB in 103.2 ms of 120 ms; persist of it: 2.838 s, with the margin 3.12 s = 22.1 steps.
    assert (decision.k, decision.snapshot_interval, decision.persist_interval) == (12, 1, 23)
    assert decision.overhead.share_memory == 0
    assert "K 12 of 16" in decision.reasons[0] and "it hides" in decision.reasons[0]
    assert "5.68 GB" in decision.reasons[0] and "55 GB/s" in decision.reasons[0] and "120 ms" in decision.reasons[0]
    assert "snapshots at every step" in decision.reasons[1]
    assert "every 23 steps" in decision.reasons[2] and "20.1 steps" in decision.reasons[2]


def test_fixed_values_are_kept_and_their_cost_reported():
    slow = replace(H200, copy_bytes_per_s=5 * GB)
    settings = Settings(experts=16, k_snapshot=4, snapshot_interval=7, persist_interval=3, mtbf_s=3600.0)
    decision = decide(slow, settings, WINDOW)
    assert (decision.k, decision.snapshot_interval, decision.persist_interval) == (4, 7, 3)
    exposed = WINDOW[4] / (5 * GB) - 0.120
    # Persists every 3 steps bring their own snapshot, except at every 21st step, where there is one.
    taken = len({step for step in range(1, 2101) if step % 7 == 0 or step % 3 == 0}) / 2100
    assert decision.overhead.save_s == pytest.approx(exposed * taken)
    faults = slow.step_s / 3600
    assert decision.overhead.lost_memory_s == pytest.approx(faults * 3 * slow.step_s / 2)
    assert decision.overhead.lost_storage_s == pytest.approx(faults * 3 * slow.step_s / 2)
    assert decision.overhead.restart_s == pytest.approx(faults * 60)
    assert all("configured" in reason for reason in decision.reasons)


def test_off_stays_off():
    decision = decide(H200, Settings(experts=16, snapshot_interval=0, persist_interval=0, mtbf_s=60.0), WINDOW)
    assert (decision.snapshot_interval, decision.persist_interval) == (0, 0)
    assert (decision.overhead.save_s, decision.overhead.lost_memory_s, decision.overhead.lost_storage_s) == (0, 0, 0)
    assert all("with save_checkpoint only" in reason for reason in decision.reasons[1:3])


def test_persist_without_snapshots_pays_for_its_snapshot():
    slow = replace(H200, copy_bytes_per_s=5 * GB, persist_bytes_per_s=100 * GB)
    settings = Settings(experts=16, snapshot_interval=0, mtbf_s=3600.0)
    decision = decide(slow, settings, WINDOW)
    exposed = WINDOW[1] / (5 * GB) - 0.120
    assert decision.persist_interval == best_interval(exposed, slow.step_s, 3600.0) > 1


def test_k_persist_counts_for_the_persist_only():
    few = decide(H200, Settings(experts=16, k_persist=1), WINDOW)
    assert few.k == 12
    assert few.persist_interval == math.ceil(WINDOW[1] / (2 * GB) * 1.1 / H200.step_s)
    above = decide(H200, Settings(experts=16, k_snapshot=2, k_persist=2), WINDOW, [10 * one for one in WINDOW])
    assert above.persist_interval == math.ceil(10 * WINDOW[2] / (2 * GB) * 1.1 / H200.step_s)


def test_floors_and_models_without_experts():
    assert decide(H200, Settings(experts=16, k_min=14), WINDOW).k == 14
    assert decide(H200, Settings(experts=16, k_min=99), WINDOW).k == 16
    assert decide(H200, Settings(experts=16, k_snapshot=2, k_min=4), WINDOW).k == 4
    assert decide(H200, Settings(experts=16, k_snapshot=99), WINDOW).k == 16
    assert decide(H200, Settings(experts=0), [GB]).k == 0


optional_mtbf = st.one_of(st.none(), mtbfs)
intervals = st.one_of(st.just("auto"), st.integers(0, 60))


@given(growing, measured_strategy(), optional_mtbf, intervals, intervals, st.data())
def test_a_decision_holds_together(window, measured, mtbf_s, snapshot, persist, data):
    experts = len(window) - 1
    k = data.draw(st.one_of(st.just("auto"), st.integers(1, 40)))
    settings = Settings(
        experts=experts, k_snapshot=k, snapshot_interval=snapshot, persist_interval=persist, mtbf_s=mtbf_s, k_min=0
    )
    decision = decide(measured, settings, window)
    assert decision == decide(measured, settings, window.__getitem__)
    assert 0 <= decision.k <= experts
    assert snapshot in ("auto", decision.snapshot_interval)
    assert persist in ("auto", decision.persist_interval)
    if "auto" in (snapshot, persist) and decision.snapshot_interval and decision.persist_interval:
        assert decision.persist_interval % decision.snapshot_interval == 0
    assert decision.overhead.share_memory >= 0 and decision.overhead.share_storage >= 0
    if mtbf_s is None:
        assert decision.overhead.lost_memory_s == decision.overhead.lost_storage_s == decision.overhead.restart_s == 0
    assert len(decision.reasons) == 3 and all(decision.reasons)
    assert not reconsider(decision, measured)


# ----------------------------------------------------------------------------------------------- reconsider


@given(measured_strategy(), st.sampled_from([field.name for field in fields(Measured)]), st.floats(0.5, 2.0))
def test_reconsidered_only_above_the_threshold(measured, name, factor):
    previous = decide(measured, Settings(experts=2, mtbf_s=1e5), [1, 2, 3])
    old = getattr(measured, name)
    if old is None:
        assert reconsider(previous, replace(measured, **{name: 5.0}))
        return
    change = abs(old * factor - old)
    if abs(change - 0.2 * old) < 1e-9 * old:
        return
    expected = change > 0.2 * old
    if name in ("stall_s", "persist_cost_s"):
        expected = expected and change > 0.01 * measured.step_s
    assert reconsider(previous, replace(measured, **{name: old * factor})) == expected


def test_what_becomes_known_counts_and_what_is_not_used_does_not():
    unknown = replace(H200, persist_bytes_per_s=None, restart_s=None)
    plain = decide(unknown, Settings(experts=16), WINDOW)
    assert reconsider(plain, replace(unknown, persist_bytes_per_s=1e9))
    assert not reconsider(plain, replace(unknown, restart_s=100.0))
    assert reconsider(decide(unknown, Settings(experts=16, mtbf_s=1e4), WINDOW), replace(unknown, restart_s=100.0))
    # What was known and is not measured any more changes nothing.
    assert not reconsider(decide(H200, Settings(experts=16, mtbf_s=1e4), WINDOW), unknown)


# ------------------------------------------------------------------------------------------------ measured


@given(st.lists(measured_strategy(), min_size=1, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_minima_over_ranks_give_the_worst_of_each(ranks, known):
    ranks = [
        one if keep else replace(one, persist_bytes_per_s=None, restart_s=None)
        for one, keep in zip(ranks, known, strict=False)
    ]
    worst = Measured.from_minima([min(column) for column in zip(*(one.minima() for one in ranks), strict=True)])
    for name in ("copy_bytes_per_s", "forward_backward_s", "step_s", "persist_bytes_per_s"):
        values = [getattr(one, name) for one in ranks if getattr(one, name) is not None]
        assert getattr(worst, name) == (min(values) if values else None)
    for name in ("restart_s", "stall_s", "persist_cost_s"):
        values = [getattr(one, name) for one in ranks if getattr(one, name) is not None]
        assert getattr(worst, name) == (max(values) if values else None)


@pytest.mark.parametrize(
    "change",
    [
        {"copy_bytes_per_s": 0.0},
        {"copy_bytes_per_s": math.nan},
        {"forward_backward_s": -1.0},
        {"step_s": math.inf},
        {"persist_bytes_per_s": 0.0},
        {"restart_s": -1.0},
        {"stall_s": math.nan},
    ],
)
def test_impossible_measurements_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(H200, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"experts": -1},
        {"k_snapshot": 0},
        {"k_persist": 0},
        {"k_min": -1},
        {"snapshot_interval": -1},
        {"persist_interval": -2},
        {"mtbf_s": 0.0},
        {"mtbf_s": math.inf},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(Settings(experts=8), **change)
