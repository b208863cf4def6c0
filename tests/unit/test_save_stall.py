"""The save-stall benchmark: arms, order of blocks, arithmetic, hooks, raw write, and one real run."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import save_stall  # noqa: E402
from _stall import process, report  # noqa: E402
from _stall.agents import agents_of, end_job  # noqa: E402
from _stall.arms import PEERS, Arm, ArmError, all_arms, blocks, parse_arm, plugin_section  # noqa: E402
from _stall.hooks import AddedHooks, Clock  # noqa: E402
from _stall.numbers import Block, arm_report, merge_ranks, quantile, summarise  # noqa: E402
from _stall.raw_write import raw_write  # noqa: E402

from moc_ckpt.config import MocConfig, parse_config  # noqa: E402

# ------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("arm", [*all_arms(), Arm("durable"), Arm("nvrx"), Arm("lm_resiliency", 5)])
def test_names_of_arms_are_read_back(arm):
    assert parse_arm(arm.name) == arm
    assert arm.label()


@pytest.mark.parametrize(
    "name", ["", "fast", "full", "pec/", "pec/0", "pec/-1", "native/5", "dcp+persist", "pec/1+disk", "pec/1+", "/1"]
)
def test_unknown_arms_are_refused(name):
    with pytest.raises(ArmError, match="arm"):
        parse_arm(name)


def test_all_arms_are_what_is_to_be_compared():
    arms = all_arms()
    assert len(arms) == len({arm.name for arm in arms}) == 14
    assert {(arm.kind, arm.interval, arm.persist) for arm in arms if arm.ours} == {
        (kind, interval, persist) for kind in ("full", "pec") for interval in (1, 5, 10) for persist in (False, True)
    }
    assert not {arm.kind for arm in arms} & set(PEERS)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
def test_every_block_has_one_without_beside_it(pairs, rounds, seed):
    arms = all_arms()
    order = blocks(arms, pairs, rounds, seed)
    assert order == blocks(arms, pairs, rounds, seed), "the ranks would run different blocks"
    assert len(order) == rounds
    for entry in order:
        assert Counter(arm for arm, _ in entry) == Counter(arms)
        for _, with_arms in entry:
            assert len(with_arms) == 2 * pairs
            couples = list(zip(with_arms[::2], with_arms[1::2], strict=True))
            assert all(a != b for a, b in couples)
            first = sum(a for a, _ in couples)
            assert abs(2 * first - pairs) <= 1, "an arm must not always come first, or always second"


def test_orders_of_rounds_differ():
    order = blocks(all_arms(), 4, 4)
    assert len({tuple(arm.name for arm, _ in entry) for entry in order}) == 4


def section(arm: str, known: list[str]) -> dict:
    return plugin_section(parse_arm(arm), known, save_dir="/data", experts=8, k=2, k_persist=1, persist_interval=10)


KEYS = [*MocConfig.model_fields, "save_mode", "snapshot_interval", "persist_interval", "save_dir", "host"]


def test_sections_of_the_plugin():
    partial, full = section("pec/5", KEYS), section("full/1+persist", KEYS)
    assert (partial["k_snapshot"], partial["k_persist"]) == (2, 1)
    assert (full["k_snapshot"], full["k_persist"]) == (8, 8)
    assert (partial["snapshot_interval"], partial["persist_interval"], partial["save_dir"]) == (5, 0, None)
    assert (full["snapshot_interval"], full["persist_interval"], full["save_dir"]) == (1, 10, "/data")
    assert partial["save_mode"] == full["save_mode"] == "async"


def test_arms_that_the_installed_version_cannot_do_are_refused():
    with pytest.raises(ArmError, match="snapshot_interval"):
        section("pec/5", ["enabled", "k_snapshot", "k_persist", "storage"])


def test_sections_are_valid_for_the_installed_version():
    known = list(MocConfig.model_fields)
    parse_config(section("durable", known))
    if "snapshot_interval" in known:
        for arm in all_arms():
            if arm.ours:
                parse_config(section(arm.name, known))


# --------------------------------------------------------------------------------------------- arithmetic


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_numpys(values, share):
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-6)


def test_a_quantile_of_nothing_is_nan():
    assert math.isnan(quantile([], 0.5))


def pair(draw: random.Random, *, stall: float, slower: float, saves: int, steps: int = 20) -> list[Block]:
    """Blocks of steps of about 0.1 s; with the arm each save costs `stall`, and each step is slower by a factor."""
    plain = [0.1 * draw.uniform(0.99, 1.01) for _ in range(steps)]
    mine = [0.1 * slower * draw.uniform(0.99, 1.01) for _ in range(steps)]
    return [
        Block("x", False, plain, sum(plain), cpu=2.0),
        Block("x", True, mine, sum(mine) + stall * saves, [stall] * saves, cpu=3.0, cpu_others=0.5),
    ]


@pytest.mark.parametrize(("stall", "slower", "saves"), [(0.5, 1.0, 1), (0.003, 1.2, 4), (0.0, 1.0, 20)])
def test_calls_and_all_that_was_lost_are_told_apart(stall, slower, saves):
    draw = random.Random(1)
    found = arm_report([one for _ in range(40) for one in pair(draw, stall=stall, slower=slower, saves=saves)], "x")
    assert found["calls_ms"] == pytest.approx(stall * 1e3)
    assert found["lost_ms"] == pytest.approx((stall + 20 * 0.1 * (slower - 1) / saves) * 1e3, abs=2.0)
    assert found["lost_low_ms"] <= found["lost_ms"] <= found["lost_high_ms"]
    assert found["step_ratio"] == pytest.approx(slower, rel=0.01)
    assert found["p99_ratio"] == pytest.approx(slower, rel=0.02)
    assert (found["checkpoints"], found["steps"]) == (40 * saves, 800)
    assert found["cpu_s"] == pytest.approx(1.0 / saves)
    assert found["cpu_others_s"] == pytest.approx(0.5 / saves)


def test_the_order_within_a_pair_does_not_matter():
    draw = random.Random(2)
    pairs = [pair(draw, stall=0.1, slower=1.1, saves=2) for _ in range(6)]
    there = [one for couple in pairs for one in couple]
    back = [one for couple in pairs for one in reversed(couple)]
    assert arm_report(there, "x") == arm_report(back, "x")


def test_a_slow_spell_of_the_machine_is_in_both_blocks_of_a_pair():
    draw = random.Random(3)
    found = []
    for number in range(9):
        couple = pair(draw, stall=0.05, slower=1.0, saves=1)
        for one in couple if number % 3 == 0 else ():
            one.steps = [4 * step for step in one.steps]
            one.wall = sum(one.steps) + sum(one.calls)
        found += couple
    assert arm_report(found, "x")["lost_ms"] == pytest.approx(50, abs=10)


def test_blocks_that_are_no_pairs_are_refused():
    draw = random.Random(4)
    couple = pair(draw, stall=0.1, slower=1.0, saves=1)
    with pytest.raises(ValueError):
        arm_report([couple[0], couple[0]], "x")
    with pytest.raises(ValueError):
        arm_report(couple[:1], "x")
    with pytest.raises(ValueError, match="pairs"):
        arm_report([], "x")


def test_ranks_merge_to_the_slowest_time_and_everyones_memory():
    first = Block("x", True, [1.0, 2.0], 3.5, [0.1], drain=0.5, cpu=1.0, cpu_others=0.2, rss=5, shared=7)
    second = Block("x", True, [1.5, 1.0], 3.0, [0.4], drain=0.6, cpu=2.0, rss=6)
    (merged,) = merge_ranks([[first], [second]])
    assert (merged.steps, merged.wall, merged.calls, merged.drain) == ([1.5, 2.0], 3.5, [0.4], 0.6)
    assert (merged.cpu, merged.cpu_others, merged.rss, merged.shared) == (3.0, 0.2, 11, 7)
    with pytest.raises(ValueError, match="different blocks"):
        merge_ranks([[first], [Block("y", True, [1.0, 1.0], 2.0, [0.1])]])


def test_the_first_checkpoint_is_reported_apart():
    draw = random.Random(5)
    first = Block("x", True, [0.1, 0.1], 2.2, [2.0], first=True)
    later = [one for _ in range(4) for one in pair(draw, stall=0.01, slower=1.0, saves=1)]
    entry = summarise([first, *later], ["x"], {"x": {"bytes": 5}})["x"]
    assert entry["first_ms"] == pytest.approx(2000, abs=5)
    assert entry["first_calls_ms"] == pytest.approx(2000)
    assert entry["calls_ms"] == pytest.approx(10)
    assert entry["bytes"] == 5


# ------------------------------------------------------------------------------------------ blocks and steps


def settled(*words: str, gpu: bool = False):
    arguments = save_stall.build_parser().parse_args(words)
    return arguments, save_stall.settle(arguments, gpu=gpu)


def test_defaults_by_device():
    arguments, arms = settled()
    assert (arguments.hidden, arguments.experts, arguments.ep, arguments.dtype) == (384, 8, 2, "fp32")
    assert arms == all_arms()
    arguments, _ = settled("--ranks", "4", gpu=True)
    assert (arguments.hidden, arguments.experts, arguments.ep, arguments.dtype) == (1024, 32, 4, "bf16")


def test_quick_gives_way_to_what_is_given():
    arguments, arms = settled("--quick", "--hidden", "128", "--arms", "native", "pec/1")
    assert (arguments.hidden, arguments.pairs, [arm.name for arm in arms]) == (128, 6, ["native", "pec/1"])
    _, arms = settled("--quick")
    assert [arm.name for arm in arms] == ["native", "dcp", save_stall.OURS_QUICK]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "pec/3"], "no multiple of 3"),
        (["--arms", "pec/4+persist", "--block", "12"], "no multiple of 20"),
        (["--arms", "native", "native"], "twice"),
        (["--experts", "3"], "--ep 2 must divide"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--arms", "native", "--block", "1"], "no multiple"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(words, message):
    with pytest.raises(ArmError, match=message):
        settled(*words)


def test_periods():
    assert report.period(Arm("native"), 10) == 1
    assert report.period(Arm("pec", 5), 10) == 5
    assert report.period(Arm("pec", 4, True), 10) == 20


# ----------------------------------------------------------------------------------------- hooks and clocks


def test_hooks_that_were_added_come_off_and_back_and_others_stay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("old"))
    added = AddedHooks(model, optimizer)
    model[0].register_forward_hook(lambda *_: seen.append("first"))
    model[1].register_forward_pre_hook(lambda *_: seen.append("second"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))

    def one() -> list[str]:
        seen.clear()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return list(seen)

    everything = ["old", "first", "second", "step"]
    assert one() == everything
    added.park()
    added.park()
    assert one() == ["old"]
    added.resume()
    assert one() == everything
    clock = Clock()
    assert added.time_optimizer_hooks(clock) == 1
    assert one() == everything
    assert clock.take() > 0


def test_a_clock_counts_nested_calls_once():
    clock = Clock()
    inner = clock.wrap(lambda: time.sleep(0.02))
    clock.wrap(lambda: (inner(), inner()))()
    assert 0.04 <= clock.take() < 0.08
    assert clock.take() == 0
    with pytest.raises(ZeroDivisionError):
        clock.wrap(lambda: 1 / 0)()
    assert clock.take() > 0


# --------------------------------------------------------------------------------------- storage and /proc


def test_a_raw_write_leaves_nothing_behind_and_takes_time(tmp_path):
    seconds = raw_write(tmp_path / "raw", (20 << 20) + 5)
    if seconds is not None:  # else this file system has no O_DIRECT
        assert 0 < seconds < 60
    assert list(tmp_path.iterdir()) == []


def test_a_raw_write_where_o_direct_is_refused_or_the_directory_is_gone(tmp_path):
    assert raw_write(tmp_path / "no" / "raw", 4096) is None


def test_processes_are_found_and_measured():
    mark = f"mark-{os.getpid()}"
    code = "import time; x = bytearray(60 << 20); t = time.process_time\nwhile t() < 0.3: pass\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, mark])
    try:
        deadline = time.monotonic() + 30
        while process.cpu_seconds(child.pid) < 0.25 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.25 <= process.cpu_seconds(child.pid) < 10
        assert (60 << 20) <= process.resident_bytes(child.pid) < (500 << 20)
        assert child.pid in process.descendants(os.getpid())
        assert process.matching(mark, "-c") == {child.pid}
        assert process.matching(mark[:-1], "-c") == set(), "whole arguments only"
    finally:
        child.kill()
        child.wait()
    assert process.cpu_seconds(child.pid) == process.resident_bytes(child.pid) == 0
    assert child.pid not in process.descendants(os.getpid())


def test_shared_bytes_count_what_files_really_take(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "full").write_bytes(b"x" * 100_000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert 100_000 <= process.shared_bytes(tmp_path) < 200_000
    assert process.shared_bytes(tmp_path / "none") == 0


def test_the_agent_of_a_job_ends_and_its_shared_memory_goes(tmp_path):
    mine, other = tmp_path / "bench-1-pec-5", tmp_path / "bench-1-pec-50"
    children = []
    for folder in (mine, other):
        folder.mkdir()
        (folder / "arena").write_bytes(b"x")
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(60)", "moc_ckpt.persist.agent", f"{folder}"]
            )
        )
    try:
        deadline = time.monotonic() + 30
        while not (agents_of(mine) and agents_of(other)) and time.monotonic() < deadline:
            time.sleep(0.02)
        reaper = threading.Thread(target=children[0].wait)
        reaper.start()
        end_job(mine)
        reaper.join(10)
        assert children[0].returncode == -signal.SIGTERM
        assert not mine.exists()
        assert children[1].poll() is None and (other / "arena").exists()
    finally:
        for child in children:
            child.kill()
            child.wait()


# ------------------------------------------------------------------------------------------------ reports


def sample() -> dict:
    draw = random.Random(6)
    names = ["native", "dcp", "pec/5+persist", "full/1"]
    found = []
    for name in names:
        for _ in range(4):
            for one in pair(draw, stall=0.3 if name == "native" else 0.01, slower=1.01, saves=1):
                one.arm = name
                found.append(one)
    facts = {name: {"bytes": 10**6 * (number + 1)} for number, name in enumerate(names)}
    facts["pec/5+persist"]["persist_to_raw"] = 0.93
    base = dict.fromkeys(("layers", "experts", "ep", "top_k", "hidden", "stage", "ranks", "rounds", "pairs"), 1)
    return {
        **base,
        "parameters": 10**7,
        "model": "blocks",
        "dtype": "fp32",
        "device": "CPU",
        "state_bytes_per_rank": 10**8,
        "versions": {"torch": "2", "deepspeed": "0.19"},
        "block": 10,
        "seconds": 5.0,
        "arms": summarise(found, names, facts),
        "labels": {name: parse_arm(name).label() for name in names},
    }


def test_the_quick_summary_compares_ours_with_the_others():
    summary = save_stall.quick_summary(sample())
    assert summary["stall_ratio_to_native"] == pytest.approx(0.01 / 0.3, rel=0.01)
    assert (summary["bytes"], summary["native_bytes"]) == (3 * 10**6, 10**6)
    assert summary["dcp_stall_ms"] == pytest.approx(10)
    assert summary["step_ratio"] == pytest.approx(1.01, abs=0.01)


def test_the_table_has_every_arm(capsys):
    found = sample()
    report.table(found)
    shown = capsys.readouterr().out
    for label in found["labels"].values():
        assert label in shown
    assert "0.93" in shown
    lines = report.markdown(found).splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1


def test_the_plot_is_drawn_or_says_what_it_needs(tmp_path):
    target = tmp_path / "deep" / "plot.svg"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(SystemExit, match="pip install matplotlib"):
            report.plot(sample(), target)
        return
    report.plot(sample(), target)
    text = target.read_text()
    assert text.lstrip().startswith("<?xml") and len(text) > 5000


# ----------------------------------------------------------------------------------------------- a real run


@pytest.mark.distributed
def test_a_real_run_prints_one_object_and_leaves_nothing(tmp_path):
    arms = ["native", "dcp", "durable"]
    if "snapshot_interval" in MocConfig.model_fields:
        arms = ["native", "dcp", "pec/5+persist"]
    command = [sys.executable, str(BENCH / "save_stall.py"), "--quick", "--json", "--hidden", "64", "--pairs", "1"]
    before = set(Path("/dev/shm").rglob("*"))
    result = subprocess.run(
        [*command, "--dir", str(tmp_path), "--raw-write", "--arms", *arms, "dlrover"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    needed = ("stall_ms", "native_stall_ms", "dcp_stall_ms", "stall_ratio_to_native", "step_ratio", "bytes")
    assert all(isinstance(found[name], (int, float)) and found[name] > 0 for name in (*needed, "native_bytes"))
    parameters = found["report"]["parameters"]
    # Native: masters, two moments and the fp32 weights, with gates and the like; DCP: the same without weights.
    assert found["native_bytes"] == pytest.approx(16 * parameters, rel=0.1)
    assert found["report"]["arms"]["dcp"]["bytes"] == pytest.approx(12 * parameters, rel=0.1)
    assert list(found["report"]["arms"]) == arms
    assert "does not run" in found["report"]["not_run"]["dlrover"]
    for entry in found["report"]["arms"].values():
        assert entry["steps"] == 10
        assert entry["step_ms"] == pytest.approx(statistics.median([entry["step_ms"]]))
    assert list(tmp_path.iterdir()) == []
    assert {path for path in set(Path("/dev/shm").rglob("*")) - before if "/bench-" in str(path)} == set()
