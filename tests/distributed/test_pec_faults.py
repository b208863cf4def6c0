"""Partial checkpoints over faults: Dynamic-K, and what DeepSpeed's monitor and the event log show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Version, build, manifest, row_experts, written
from distributed.pool import Pool
from distributed.test_pec_ledger import Gates, Truth

pytestmark = pytest.mark.distributed


# ------------------------------------------------------------------------------------------------ Dynamic-K


class Rule:
    """Dynamic-K as the paper and DESIGN state it, for layers of equally many experts."""

    def __init__(self, least: int, experts: int, max_plt: float) -> None:
        self.k = self.least = least
        self.experts, self.max_plt = experts, max_plt

    def forecast(self, k: int, interval: list[int], totals: list[int]) -> float:
        """An expert is (cycle - 1) / 2 intervals old on average when the fault comes."""
        age = (-(-self.experts // k) - 1) / 2
        return sum(age * tokens / total for tokens, total in zip(interval, totals, strict=True)) / len(totals)

    def fault(self, plt: float, interval: list[int], totals: list[int]) -> None:
        while self.k < self.experts and plt + self.forecast(self.k, interval, totals) > self.max_plt:
            self.k = min(2 * self.k, self.experts)

    def save(self, plt: float, interval: list[int], totals: list[int]) -> None:
        lower = max(-(-self.k // 2), self.least)
        if plt + 2 * self.forecast(lower, interval, totals) <= self.max_plt:
            self.k = lower


def case_dynamic(ctx: Any, path: str, script: str, max_plt: float, dynamic: bool) -> dict[str, Any]:
    """Saves every step; what each save takes, and what the rule says."""
    row = zoo.ROWS["z1_bf16"]
    plugin = {"dynamic_k": dynamic, "max_plt": max_plt}
    truth, rule = Truth(row_experts(row)), Rule(1, 4, max_plt)
    engine = build(ctx, row, 1, **plugin)
    gates = Gates(ctx, engine)
    out: dict[str, Any] = {"taken": [], "expected": [], "log": [], "plt": []}
    marks: dict[Version, list[list[int]]] = {}
    history: list[list[int]] = []

    def interval() -> list[float]:
        """Tokens between two saves of this line, the mean over the last 16 distances."""
        last = history[-17:]
        return [(b - a) / max(len(last) - 1, 1) for a, b in zip(last[0], last[-1], strict=True)]

    def processed() -> list[int]:
        return [sum(sum(truth.updates[update][0][at]) for update in truth.line) for at in range(2)]

    def totals() -> list[int]:
        return [sum(truth.updates[update][1][at] for update in truth.line) for at in range(2)]

    for number, word in enumerate(script):
        with harness.logged() as log:
            if word == "t":
                truth.trained(gates.train(data_seed=number))
                engine.save_checkpoint(path)
                body = manifest(path)
                history = [*history, processed()]
                truth.keep(body)
                marks[body["attempt"], body["step"]] = history
                out["taken"].append(len(written(body)))
                out["expected"].append(2 * rule.k if number else 8)
                if dynamic:
                    rule.save(truth.plt(None, [1, 2]), interval(), totals())
            else:
                engine = build(ctx, row, 1, seed=number, **plugin)
                gates = Gates(ctx, engine)
                engine.load_checkpoint(path)
                body = manifest(path)
                truth.restore(body)
                history = marks[body["attempt"], body["step"]]
                if dynamic:
                    rule.fault(truth.plt(None, [1, 2]), interval(), totals())
        out["log"].append([text for _, text in log if "Dynamic-K" in text])
        out["plt"].append(engine.moc.plt)
    # A run that does not want it goes on with its own K.
    engine = build(ctx, row, 1, dynamic_k=False, max_plt=max_plt)
    engine.load_checkpoint(path)
    harness.train(engine, 1)
    engine.save_checkpoint(path)
    out["switched off"] = len(written(manifest(path)))
    return out


def test_dynamic_k_doubles_is_kept_and_comes_down(pool: Pool, ckpt_dir: str) -> None:
    script = "ttttt" + "f" + "t" + "f" + "t" * 12
    options = {"max_plt": 0.35, "dynamic": True, "deadline": 2 * DEADLINE}
    result = pool.run(4, case_dynamic, path=ckpt_dir, script=script, **options)[0]
    assert result["taken"] == result["expected"]
    assert result["taken"][:5] == [8, 2, 2, 2, 2]
    assert result["taken"][5] > 2, "the fault should have raised K"
    assert result["taken"][-1] == 2, "K should have come down again"
    assert any("K is" in text and "instead of 1" in text and "%" in text for text in result["log"][5])
    assert [text for texts in result["log"] for text in texts if "comes down" in text]
    assert result["switched off"] == 2


def test_dynamic_k_switched_off_while_it_is_raised(pool: Pool, ckpt_dir: str) -> None:
    options = {"max_plt": 0.2, "dynamic": True, "deadline": DEADLINE}
    on = pool.run(4, case_dynamic, path=f"{ckpt_dir}/a", script="tttttft", **options)
    assert on[0]["taken"] == on[0]["expected"] == [8, 2, 2, 2, 2, 8]
    assert on[0]["switched off"] == 2
    options = {"max_plt": 0.01, "dynamic": False, "deadline": DEADLINE}
    off = pool.run(4, case_dynamic, path=f"{ckpt_dir}/b", script="ttttftt", **options)
    assert off[0]["taken"] == [8, 2, 2, 2, 2, 2]
    assert not any(off[0]["log"])


# ------------------------------------------------------------------------------------- monitor and event log


def case_reports(ctx: Any, path: str) -> dict[str, Any]:
    from moc_ckpt.errors import StorageError
    from moc_ckpt.integrations.deepspeed import save

    row = zoo.ROWS["z1_bf16"]
    monitor = {"csv_monitor": {"enabled": True, "output_path": f"{path}/csv", "job_name": "job"}}
    engine = build(ctx, row, 1, config=monitor)
    found = []
    for _ in range(2):
        harness.train(engine, 1)
        engine.save_checkpoint(f"{path}/c", client_state={"x": 1})
        found.append(engine.moc.plt)
    original = save.write_prepared
    if ctx.rank == 2:

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise StorageError("injected: the disk is on fire")

        save.write_prepared = refuse
    failed = harness.attempt(engine.save_checkpoint, f"{path}/c", tag="never")
    save.write_prepared = original
    engine = build(ctx, row, 1, seed=2, config=monitor)
    engine.load_checkpoint(f"{path}/c")
    harness.train(engine, 1)
    engine.save_checkpoint(f"{path}/c")
    ctx.barrier()
    texts = [file.read_text() for file in Path(path, "c", "events").glob("*.jsonl")]
    lines = [json.loads(line) for text in texts for line in text.split("\n") if line]
    curves = {file.name: file.read_text().split() for file in Path(path, "csv").rglob("*.csv")}
    ctx.barrier()
    return {
        "failed": failed["raised"],
        "events": lines,
        "curves": curves,
        "plt": engine.moc.plt,
        "lost": [list(recovery.lost) for recovery in engine.moc.ledger.recoveries],
        "samples": engine.global_samples,
    }


def test_monitor_and_event_log(pool: Pool, ckpt_dir: str) -> None:
    result = pool.run(4, case_reports, path=ckpt_dir, deadline=DEADLINE)[0]
    assert result["failed"] == "StorageError"
    events = result["events"]
    assert [event["event"] for event in events] == ["COMMITTED", "COMMITTED", "FAILED", "RECOVERED", "COMMITTED"]
    first, second, failed, recovered, third = events
    assert (first["step"], first["experts"], second["experts"], first["tag"]) == (1, 8, 2, "global_step1")
    assert first["bytes"] > second["bytes"] > 0
    assert (first["plt"], second["plt"], second["k"]) == (0, 0, [1, 1])
    assert (failed["tag"], failed["step"]) == ("never", 2)
    assert "on fire" in failed["reason"]
    assert recovered["tag"] == "global_step2"
    assert recovered["plt"] > 0
    assert recovered["lost"] == result["lost"][-1]
    assert (recovered["step"], recovered["older_experts"]) == (2, 6)
    assert third["plt"] == result["plt"] > 0
    curves = {name: rows for name, rows in result["curves"].items() if "MoC" in name}
    plt = next(rows for name, rows in curves.items() if name.endswith("plt.csv"))
    assert float(plt[-1].split(",")[-1]) == pytest.approx(result["plt"])
    assert int(plt[-1].split(",")[0]) == result["samples"]
    lost = next(rows for name, rows in curves.items() if "lost" in name)
    assert float(lost[-1].split(",")[-1]) == sum(result["lost"][-1])
    assert any(name.endswith("_k.csv") for name in curves)
