"""The ledger against a simulation that remembers every single token, and the rules of Dynamic-K."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.errors import FormatError
from moc_ckpt.pec.dynamic_k import lower_k, raise_k
from moc_ckpt.pec.ledger import Ledger, expected_plt

LAYERS = (2, 3)


class Expert:
    """An expert as the set of tokens that its weights have learnt from."""

    def __init__(self):
        self.learnt = frozenset()
        self.saved = frozenset()
        self.saved_count = 0


@st.composite
def runs(draw):
    """Rounds of training, each ended by a save of some experts and perhaps by a fault after it."""
    rounds = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = [draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for n in LAYERS]
        dropped = [draw(st.integers(0, 4)) for _ in LAYERS]
        selected = [draw(st.sets(st.integers(0, n - 1))) for n in LAYERS]
        rounds.append((tokens, dropped, selected, draw(st.booleans())))
    return rounds


@given(runs())
def test_losses_are_those_of_remembered_tokens(rounds):
    ledger = Ledger.start(LAYERS, (1, 2))
    experts = [[Expert() for _ in range(n)] for n in LAYERS]
    lost_in_all = [0] * len(LAYERS)
    serial, first = 0, True
    for number, (tokens, dropped, selected, fault) in enumerate(rounds, 1):
        for layer, counts in enumerate(tokens):
            for expert, count in enumerate(counts):
                experts[layer][expert].learnt |= set(range(serial, serial + count))
                serial += count
        ledger = ledger.add(tokens, [sum(t) + d for t, d in zip(tokens, dropped, strict=True)])
        for layer, group in enumerate(experts):
            for expert, item in enumerate(group):
                if first or expert in selected[layer]:
                    item.saved, item.saved_count = item.learnt, int(ledger.learnt[layer][expert])
        first = False
        assert [[len(item.learnt) for item in group] for group in experts] == [x.tolist() for x in ledger.learnt]
        if not fault:
            continue
        ledger = Ledger.from_data(ledger.to_data())  # what a restart reads
        ledger = ledger.recover([[item.saved_count for item in group] for group in experts], attempt=1, step=number)
        for layer, group in enumerate(experts):
            gone = sum(len(item.learnt - item.saved) for item in group)
            assert ledger.recoveries[-1].lost[layer] == gone
            lost_in_all[layer] += gone
            for item in group:
                item.learnt = item.saved
        totals = [max(total, 1) for total in ledger.routed]
        want = sum(lost / total for lost, total in zip(lost_in_all, totals, strict=True)) / len(LAYERS)
        assert ledger.plt == pytest.approx(want)
        assert ledger.recoveries[-1].plt == ledger.plt
    assert [[len(item.learnt) for item in group] for group in experts] == [x.tolist() for x in ledger.learnt]


def test_equation_seven_by_hand():
    ledger = Ledger.start((2, 2), (1, 2)).add([[60, 40], [120, 80]], [100, 200])
    ledger = ledger.recover([[50, None], [120, 60]], attempt=3, step=7)
    assert ledger.recoveries[0].lost == (10, 20)
    assert ledger.plt == pytest.approx((10 / 100 + 20 / 200) / 2)
    known = Ledger.from_data(ledger.to_data(), total_tokens=1000)
    assert known.plt == pytest.approx((10 / 1000 + 20 / (1000 * 2)) / 2)


def test_a_version_that_is_ahead_costs_nothing_and_counts_from_there():
    ledger = Ledger.start((1,), (1,)).add([[9]], [9]).recover([[5]], attempt=1, step=1)
    ledger = ledger.add([[1]], [1]).recover([[9]], attempt=1, step=2)
    assert [item.lost for item in ledger.recoveries] == [(4,), (0,)]
    assert ledger.learnt[0].tolist() == [9]


def test_the_same_restore_again_loses_the_same_once():
    data = Ledger.start((2,), (1,)).add([[10, 10]], [20]).to_data()
    for _ in range(3):  # each time from the same checkpoint: what came after it is gone with the process
        ledger = Ledger.from_data(data).recover([[10, 4]], attempt=1, step=3)
        assert ledger.recoveries[-1].lost == (6,)
        assert ledger.plt == pytest.approx(6 / 20)


def test_wrong_shapes_and_damaged_data_are_refused():
    ledger = Ledger.start((2,), (1,))
    with pytest.raises(ValueError, match="layers of"):
        ledger.add([[1, 2, 3]], [6])
    data = ledger.to_data()
    for name in ("processed", "recoveries", "floor", "top_k"):
        with pytest.raises(FormatError):
            Ledger.from_data({key: value for key, value in data.items() if key != name})
    with pytest.raises(FormatError):
        Ledger.from_data({**data, "lost": [[1]]})
    with pytest.raises(FormatError):
        Ledger.from_data({**data, "routed": ["many"]})


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 500), st.integers(1, 50))
def test_forecast_is_the_mean_over_fault_times(experts, k, interval, saves):
    """Uniform load, rotation: a fault after save s finds the experts 0 to cycle - 1 saves old, all alike."""
    k = min(k, experts)
    cycle = math.ceil(experts / k)
    want = sum(range(cycle)) / cycle * interval / (interval * (saves + cycle))
    assert expected_plt((experts,), k, interval, interval * (saves + cycle)) == pytest.approx(want)


def test_forecast_of_the_ledger():
    ledger = Ledger.start((8, 4), (1, 1)).add([[25] * 8, [50] * 4], [200, 200])
    assert ledger.forecast(1, (40, 40)) == pytest.approx((3.5 * 40 / 200 + 1.5 * 40 / 200) / 2)
    assert ledger.forecast(4, (40, 20)) == pytest.approx((0.5 * 40 / 200 + 0) / 2)
    assert ledger.forecast(8, (40, 40)) == 0


def linear(rate, experts):
    return lambda k: (math.ceil(experts / k) - 1) / 2 * rate


@given(
    st.integers(1, 64),
    st.data(),
    st.floats(0, 0.1),
    st.floats(0, 0.05),
    st.floats(0.001, 0.2),
)
def test_raised_k_is_the_first_doubling_that_fits(experts, data, plt, rate, limit):
    k = data.draw(st.integers(1, experts))
    forecast = linear(rate, experts)
    found = raise_k(k, experts, plt, forecast, limit)
    tried = [k]
    while tried[-1] < experts:
        tried.append(min(2 * tried[-1], experts))
    want = next((value for value in tried if plt + forecast(value) <= limit), experts)
    assert found == want


@given(
    st.integers(1, 64),
    st.data(),
    st.floats(0, 0.1),
    st.floats(0, 0.05),
    st.floats(0.001, 0.2),
)
def test_lowered_k_survives_the_next_fault(experts, data, plt, rate, limit):
    least = data.draw(st.integers(1, experts))
    k = data.draw(st.integers(least, experts))
    forecast = linear(rate, experts)
    lower = lower_k(k, least, plt, forecast, limit)
    assert least <= lower <= k
    assert lower >= k // 2
    if lower < k:
        # The next fault costs the forecast; after it K need not rise again.
        assert raise_k(lower, experts, plt + forecast(lower), forecast, limit + 1e-12) == lower
    elif k > least:
        assert plt + 2 * forecast(max(math.ceil(k / 2), least)) > limit
