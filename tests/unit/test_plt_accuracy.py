"""The pure parts of the accuracy experiment: its design, what a fault loses, the statistics, the report."""

import itertools
import json
import math
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
for _path in (ROOT / "scripts", ROOT / "scripts" / "experiments"):
    sys.path.insert(0, str(_path))

import plt_accuracy  # noqa: E402
from _plt_design import (  # noqa: E402
    CONTINUED,
    ORDER,
    RESTART,
    ROUTING,
    DesignError,
    Results,
    Settings,
    checkpoint_steps,
    expected_plt,
    lost_tokens,
    plan_runs,
    proportion_lost,
    restored_versions,
    schedule,
    smaller,
    window_means,
)
from _plt_figure import figure, ticks  # noqa: E402
from _plt_report import (  # noqa: E402
    BEGIN,
    END,
    LIMIT,
    Analysis,
    collect,
    pooled,
    replace_section,
    section,
    slope,
)

# ------------------------------------------------------------------------------------------------- design


def test_settings_are_those_of_the_model():
    settings = Settings()
    assert (settings.experts, settings.top_k, settings.fault) == (8, 2, 400)
    assert settings.tokens_per_step == 8 * 128
    assert settings.total_tokens == 800 * 1024


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 801}, "--steps 801"),
        ({"steps": 2}, "--steps 2"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"seeds": ()}, "--seeds"),
        ({"ks": (1, 9)}, "8 experts"),
        ({"ks": (0, 8)}, "1 to 8"),
        ({"ks": (1, 2)}, "baseline"),
        ({"intervals": (401,)}, "400 steps"),
        ({"intervals": ()}, "--intervals"),
        ({"eval_batches": 0}, "--eval-batches"),
    ],
)
def test_bad_settings_are_refused_with_the_option_named(change, words):
    with pytest.raises(DesignError, match=words):
        replace(Settings(), **change)


def test_settings_survive_json():
    settings = smaller(Settings())
    assert Settings.from_data(json.loads(json.dumps(settings.to_data()))) == settings


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_last_checkpoint_is_at_the_fault(fault, interval):
    steps = checkpoint_steps(fault, interval)
    assert steps[-1] == fault
    assert 0 < steps[0] <= interval
    assert all(later - earlier == interval for earlier, later in itertools.pairwise(steps))


def test_the_schedule_has_every_checkpoint_once():
    settings = Settings(steps=60, intervals=(4, 7), ks=(1, 4, 8))
    due = schedule(settings)
    for k in (1, 4):
        for interval in (4, 7):
            assert [step for step, items in due.items() if (k, interval) in items] == checkpoint_steps(30, interval)
    assert sum(map(len, due.values())) == 2 * (len(checkpoint_steps(30, 4)) + len(checkpoint_steps(30, 7)))
    assert all(k < 8 for items in due.values() for k, _ in items)


def test_runs_are_distinct_and_have_one_baseline_per_seed():
    settings = Settings()
    runs = plan_runs(settings)
    assert len(set(runs)) == len(runs) == 3 * (1 + 2 + 1 + 3 * 3) + 1
    for seed in settings.seeds:
        assert sum(run.seed == seed and run.kind == RESTART and run.k == 8 for run in runs) == 1
    assert [run.seed for run in runs if run.kind == CONTINUED] == [1]
    assert len({(run.k, run.interval): run.directory for run in runs}.values()) == len({run.directory for run in runs})


@given(k=st.integers(1, 8), interval=st.integers(1, 60), steps=st.integers(30, 200))
def test_expected_plt_is_that_of_a_simulated_rotation(k, interval, steps):
    settings = Settings(steps=2 * steps, ks=tuple({k, 8}), intervals=(min(interval, steps),))
    interval = settings.intervals[0]
    version, cursor = {}, 0
    for number, step in enumerate(checkpoint_steps(settings.fault, interval)):
        for _ in range(8 if number == 0 else k):  # the first checkpoint of a directory is full
            version[cursor % 8] = step
            cursor += 1
    lost = sum(settings.fault - step for step in version.values()) / 8
    assert expected_plt(settings, k, interval) == pytest.approx(lost / settings.steps)


@given(st.data())
def test_lost_tokens_are_those_after_the_restored_steps(data):
    layers, experts, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 2**32 - 1))
    each = np.random.default_rng(seed).integers(0, 50, (steps, layers, experts))
    counts = {step: each[:step].sum(0).tolist() for step in range(1, steps + 1)}
    versions = [[data.draw(st.integers(1, steps)) for _ in range(experts)] for _ in range(layers)]
    expected = [
        sum(int(each[at, layer, expert]) for expert in range(experts) for at in range(versions[layer][expert], steps))
        for layer in range(layers)
    ]
    lost = lost_tokens(counts, steps, versions)
    assert lost == expected
    assert proportion_lost(lost, 1000, 2) == pytest.approx(np.mean(expected) / 2000)


def test_plt_by_hand():
    # Layer 0: expert 0 is 2 steps old and lost 10 + 30 tokens, layer 1: nothing.
    counts = {1: [[5, 5], [4, 6]], 2: [[15, 10], [9, 9]], 3: [[45, 12], [20, 20]]}
    lost = lost_tokens(counts, 3, [[1, 3], [3, 3]])
    assert lost == [40, 0]
    assert proportion_lost(lost, 400, 1) == pytest.approx(0.05)


def test_versions_are_told_by_content():
    history = {10: [["a", "b"]], 20: [["c", "b"]], 30: [["d", "e"]]}
    assert restored_versions([["c", "b"]], history) == [[20, 20]]
    with pytest.raises(DesignError, match="0/1"):
        restored_versions([["d", "x"]], history)


def test_window_means_leave_out_an_incomplete_window():
    assert window_means([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0]
    assert window_means([1.0], 2) == []


# ------------------------------------------------------------------------------------------- file of results


def half_record(seed):
    return {"half": seed, "counts": {4: [[1]]}, "digests": {4: [["a"]]}}


def run_record(run, **values):
    return {"run": asdict(run), **values}


def test_results_go_on_after_a_cut(tmp_path):
    path, settings = tmp_path / "deep" / "results.jsonl", Settings()
    runs = plan_runs(settings)
    first = Results(path, settings, resume=False)
    first.add(half_record(1))
    first.add({"control": 2, "silent": 3.0})
    first.add(run_record(runs[0], plt=0.0))
    with path.open("a") as file:
        file.write('{"run": {"seed": 1, "ki')  # the process died while it wrote
    second = Results(path, settings, resume=True)
    assert second.halves[1]["counts"] == {4: [[1]]}
    assert second.controls[2]["silent"] == 3.0
    assert second.missing(runs) == runs[1:]
    second.add(run_record(runs[1], plt=0.5))
    third = Results(path, settings, resume=True)
    assert third.missing(runs) == runs[2:]
    assert third.runs[runs[1]]["plt"] == 0.5
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path, Settings(), resume=False)
    with pytest.raises(DesignError, match="--resume"):
        Results(path, Settings(), resume=False)
    with pytest.raises(DesignError, match="other settings"):
        Results(path, Settings(steps=400), resume=True)
    assert len(path.read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------------ statistics


def made_up(settings, noise=0.004, effect=0.2, rise=2.0):
    """Data with a known effect of PLT on the final loss."""
    random = np.random.default_rng(5)
    runs = []
    for run in plan_runs(settings):
        plt = expected_plt(settings, run.k, run.interval)
        chance = 0.0 if run.kind == CONTINUED else random.normal(0, noise)
        final = 2.0 + 0.01 * run.seed + chance + effect * plt
        train = [2.2 + rise * plt * 0.8**at for at in range(40)]
        runs.append(
            run_record(
                run, plt=plt, plt_recount=plt, plt_expected=plt, lost=[1], after_fault=2.3 + rise * plt, final=final,
                train=train, seconds=1.0,
            )
        )  # fmt: skip
    halves = {
        seed: {
            "at_fault": 2.3, "processed_share": 0.9, "parameters": [10, 6], "data": "text", "train": [], "saves": 7,
            "save_seconds": 1.0, "seconds": 2.0, "environment": {"python": "3", "device": "two cores"},
        }
        for seed in settings.seeds
    }  # fmt: skip
    controls = {seed: {"whole": 2.3, "silent": 2.9 + 0.1 * seed, "exchanged": 2.5} for seed in settings.seeds}
    return json.loads(json.dumps(collect(settings, halves, controls, runs)))


def test_noise_is_pooled_within_seeds():
    data = made_up(Settings())
    analysis = Analysis(data)
    groups = [
        [
            run["final"]
            for run in data["runs"]
            if run["seed"] == seed and (run["kind"] == ROUTING or (run["kind"] == RESTART and run["k"] == 8))
        ]
        for seed in (1, 2, 3)
    ]
    assert [len(group) for group in groups] == [3, 3, 3]
    assert analysis.noise == pytest.approx(math.sqrt(np.mean([np.var(group, ddof=1) for group in groups])))
    assert analysis.base == pytest.approx({seed: np.mean(group) for seed, group in zip((1, 2, 3), groups, strict=True)})
    assert math.isnan(pooled([[1.0], [2.0]]))


def test_standard_errors_come_from_the_spread_over_seeds():
    analysis = Analysis(made_up(Settings()))
    base = analysis.base
    table = {
        (k, interval): [
            next(
                run["final"] - base[seed]
                for run in analysis.partial()
                if (run["seed"], run["k"], run["interval"]) == (seed, k, interval)
            )
            for seed in (1, 2, 3)
        ]
        for k in (1, 2, 4)
        for interval in (10, 20, 40)
    }
    spread = math.sqrt(np.mean([np.var(deltas, ddof=1) for deltas in table.values()]))
    assert analysis.spread == pytest.approx(spread)
    for cell in analysis.cells():
        assert cell.error == pytest.approx(spread / math.sqrt(3) if cell.interval else 0.0)
    below = [key for key in table if expected_plt(Settings(), *key) <= LIMIT]
    means = np.mean([table[key] for key in below], axis=0)
    count, mean, error = analysis.groups()["up to 3.75 %"]
    assert (count, mean) == (3 * len(below), pytest.approx(np.mean(means)))
    assert error == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))


def test_cells_and_groups_find_the_effect():
    settings = Settings()
    analysis = Analysis(made_up(settings, noise=1e-6))
    cells = analysis.cells()
    assert [(cell.k, cell.interval) for cell in cells] == [
        *((k, interval) for k in (1, 2, 4) for interval in (10, 20, 40)),
        (8, 0),
    ]
    for cell in cells:
        plt = expected_plt(settings, cell.k, cell.interval)
        assert cell.plt == pytest.approx(plt)
        assert cell.delta == pytest.approx(0.2 * plt, abs=1e-5)
        assert cell.jump == pytest.approx(2.0 * plt)
        assert cell.low <= cell.delta <= cell.high
    groups = analysis.groups()
    assert [count for count, *_ in groups.values()] == [15, 12]
    below = [cell.delta for cell in cells if 0 < cell.plt <= LIMIT]
    assert groups["up to 3.75 %"][1] == pytest.approx(np.mean(below))
    assert analysis.trend(analysis.delta)[0] == pytest.approx(0.2, rel=1e-3)
    assert analysis.trend(analysis.jump)[0] == pytest.approx(2.0)
    for run in analysis.runs:
        if run["plt"] > LIMIT:
            run["final"] = 7.0
    assert analysis.trend(analysis.delta, LIMIT)[0] == pytest.approx(0.2, rel=1e-2)
    assert analysis.trend(analysis.delta)[0] > 1
    assert analysis.exact() == (39, 39)
    assert analysis.worth("silent") == pytest.approx(0.6 + 0.1 * 2)
    assert analysis.worth("exchanged") == pytest.approx(0.2)


def test_recovery_takes_whole_windows():
    settings = Settings()
    analysis = Analysis(made_up(settings))
    runs = [run for run in analysis.partial() if (run["k"], run["interval"]) == (1, 40)]
    plt = expected_plt(settings, 1, 40)
    found = analysis.recovery(runs)
    assert [(first, last) for first, last, _ in found] == [
        (1, 10), (11, 20), (21, 50), (51, 100), (101, 200), (201, 400),
    ]  # fmt: skip
    assert found[0][2] == pytest.approx(2.0 * plt)
    assert found[2][2] == pytest.approx(2.0 * plt * np.mean([0.8**2, 0.8**3, 0.8**4]))


def test_a_run_that_differs_from_no_fault_is_told():
    data = made_up(Settings())
    assert Analysis(data).continued_equal() is False
    for run in data["runs"]:
        if run["kind"] == CONTINUED:
            run["final"] = next(
                other["final"]
                for other in data["runs"]
                if (other["kind"], other["k"], other["seed"]) == (RESTART, 8, 1)
            )
    assert Analysis(data).continued_equal() is True
    data["runs"][-1]["plt"] += 1e-9
    assert Analysis(data).exact() == (38, 39)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=20))
def test_slope_is_that_of_least_squares(points):
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    found, error = slope(xs, ys)
    if len(set(xs)) < 2:
        assert math.isnan(found)
        return
    design = np.stack([np.ones(len(xs)), xs], 1)
    coefficients = np.linalg.lstsq(design, np.array(ys), rcond=None)[0]
    rest = np.array(ys) - design @ coefficients
    covariance = np.linalg.inv(design.T @ design) * (rest @ rest) / (len(xs) - 2)
    assert found == pytest.approx(coefficients[1], abs=1e-9)
    assert error == pytest.approx(math.sqrt(max(covariance[1, 1], 0)), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- report


def test_the_table_has_a_row_for_every_cell():
    analysis = Analysis(made_up(Settings()))
    text = section(analysis)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(line.count("|") == 9 for line in rows) == 1 + len(analysis.cells())
    worst = next(line for line in rows if line.startswith("| 1 | 40 |"))
    assert "17.50 %" in worst
    assert "39 of 39" in text
    assert "DIFFERS" in text


def test_only_the_generated_part_of_a_document_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_section(text, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    for broken in ("", text + BEGIN, f"{END}{BEGIN}"):
        with pytest.raises(ValueError, match="markers"):
            replace_section(broken, "")


@given(st.floats(-100, 100), st.floats(1e-4, 1e4))
def test_ticks_are_round_and_inside(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - good) for good in (1, 2, 2.5, 5, 10)) < 1e-3


def test_the_plot_is_well_formed_and_has_every_point():
    analysis = Analysis(made_up(Settings()))
    root = ET.fromstring(figure(analysis))
    name = "{http://www.w3.org/2000/svg}title"
    hints = [item.text for item in root.iter(name) if item.text.startswith("K ")]
    # Two panels, each with every run and every mean over seeds.
    assert len(hints) == 2 * (27 + 9)
    box = [float(number) for number in root.attrib["viewBox"].split()]
    for item in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(item.attrib["cx"]) < box[2]
        assert 0 < float(item.attrib["cy"]) < box[3]


def test_one_seed_without_repeats_is_reported_too():
    settings = smaller(Settings(routing_repeats=0))
    settings = replace(settings, routing_repeats=0)
    analysis = Analysis(made_up(settings))
    assert math.isnan(analysis.noise)
    assert "nan" in section(analysis)
    ET.fromstring(figure(analysis))


def test_runs_without_loss_alone_are_reported_too():
    analysis = Analysis(made_up(Settings(ks=(8,))))
    text = section(analysis)
    assert "Mean difference" not in text
    assert "| 8 (N) | any |" in text
    ET.fromstring(figure(analysis))


def test_the_report_in_docs_is_that_of_the_numbers_there(tmp_path):
    figures = ROOT / "docs" / "figures"
    data = json.loads((figures / plt_accuracy.NUMBERS).read_text(encoding="utf-8"))
    document = (ROOT / "docs" / plt_accuracy.REPORT).read_text(encoding="utf-8")
    analysis = Analysis(data)
    assert section(analysis) in document, "run scripts/experiments/plt_accuracy.py --report-only"
    assert figure(analysis) == (figures / plt_accuracy.PLOT).read_text(encoding="utf-8")
    plt_accuracy.write_numbers(tmp_path, data)
    assert (tmp_path / plt_accuracy.NUMBERS).read_bytes() == (figures / plt_accuracy.NUMBERS).read_bytes()
    # What the report claims about the measurement itself.
    assert analysis.exact()[0] == analysis.exact()[1]
    assert analysis.continued_equal() is True
    assert {run["kind"] for run in data["runs"]} == {RESTART, CONTINUED, ROUTING, ORDER}


# ---------------------------------------------------------------------------------------------- command line


def test_arguments():
    args = plt_accuracy.parse(["--ks", "2,N", "--steps", "40", "--intervals", "5", "--seeds", "7"])
    assert args.settings == Settings(steps=40, seeds=(7,), ks=(2, 8), intervals=(5,))
    assert plt_accuracy.parse(["--quick"]).settings == smaller(Settings())


@pytest.mark.parametrize(
    "argv", [["--ks", "9,N"], ["--ks", "x"], ["--steps", "3"], ["--jobs", "0"], ["--quick", "--publish"]]
)
def test_wrong_arguments_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        plt_accuracy.parse(argv)
    assert caught.value.code == 2
    assert argv[-2].lstrip("-") in capsys.readouterr().err


def test_dispatched_tokens_are_counted_from_routes_and_masks():
    torch = pytest.importorskip("torch")
    from _plt_training import dispatched

    routes = torch.tensor([[0, 2, -1, 2], [1, -1, 0, 3]], dtype=torch.int32)  # [k, tokens], -1: dropped
    sparse = (None, torch.tensor(2), 5, routes, None, None, torch.tensor([3, 1, 2, 1, 1]))
    assert dispatched(sparse, 5).tolist() == [2, 1, 2, 1, 0]
    mask = torch.zeros(4, 3, 2, dtype=torch.bool)  # [tokens, experts, capacity]
    mask[0, 1, 0] = mask[2, 1, 1] = mask[3, 2, 0] = True
    assert dispatched((None, None, mask, torch.tensor([0, 3, 1])), 3).tolist() == [0, 2, 1]
