"""Lost tokens: what the ledger says, against a recount from the gates' raw outputs and a model of what was restored.

`Gates` counts what the gates dispatch, route by route. `Truth` knows which updates each expert's state contains: every
optimizer step is an update; a save keeps the set, a restore brings back the set of the version that the manifest names.
What is lost is what the checkpoint's own step had and the restored version has not.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Place, Version, build, logged, manifest, row_experts, versions, written
from distributed.pool import Pool
from distributed.zoo import Layer, Row

pytestmark = pytest.mark.distributed

Counts = list[list[int]]
"""[layer][expert]."""


class Gates:
    """Counts the routes that an engine's gates keep, in the steps that this class trains."""

    def __init__(self, ctx: Any, engine: Any) -> None:
        from deepspeed.moe.sharded_moe import TopKGate

        self.ctx, self.engine = ctx, engine
        gates = [module for module in engine.module.modules() if isinstance(module, TopKGate)]
        self.experts = [int(gate.wg.weight.shape[0]) for gate in gates]
        self.on = False
        self._clear()
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda gate, args, output, layer=layer: self._see(layer, gate, args, output))

    def _clear(self) -> None:
        self.kept: Counts = [[0] * count for count in self.experts]
        self.routed = [0] * len(self.experts)

    def _see(self, layer: int, gate: Any, args: Any, output: Any) -> None:
        if not self.on:
            return
        for expert in range(self.experts[layer]):
            if len(output) == 4:  # the dispatch mask [tokens, experts, capacity]
                self.kept[layer][expert] += int(output[2][:, expert].sum())
            else:  # the expert of every route, -1 where the capacity dropped it
                self.kept[layer][expert] += int((output[3] == expert).sum())
        self.routed[layer] += args[0].shape[0] * gate.k

    def train(self, data_seed: int) -> tuple[Counts, list[int]] | None:
        """One optimizer step; what it dispatched on all ranks, None if it was skipped."""
        skipped = self.engine.skipped_steps
        self._clear()
        self.on = True
        harness.train(self.engine, 1, data_seed=data_seed)
        self.on = False
        if self.engine.skipped_steps > skipped:
            return None
        kept, routed = [[0] * count for count in self.experts], [0] * len(self.experts)
        for theirs, sent in self.ctx.gather((self.kept, self.routed)):
            kept = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(kept, theirs, strict=True)]
            routed = [a + b for a, b in zip(routed, sent, strict=True)]
        return kept, routed


class Truth:
    """What really happened on the way to the present state; plain data, so that it can go from world to world.

    Args:
        experts: number of experts of each layer.
    """

    def __init__(self, experts: list[int]) -> None:
        self.experts = experts
        self.updates: list[tuple[Counts, list[int]]] = []
        #: Updates of the dense state, and those that each expert's state contains.
        self.line: list[int] = []
        self.holds: dict[Place, set[int]] = {
            (layer, expert): set() for layer, count in enumerate(experts) for expert in range(count)
        }
        #: Per recovery of this timeline: tokens lost in each layer.
        self.recoveries: list[list[int]] = []
        self.saved: dict[Version, Any] = {}

    def trained(self, update: tuple[Counts, list[int]] | None) -> None:
        if update is None:
            return
        self.updates.append(update)
        self.line.append(len(self.updates) - 1)
        for held in self.holds.values():
            held.add(len(self.updates) - 1)

    def keep(self, body: dict[str, Any]) -> None:
        """A save was committed."""
        state = (self.line, self.holds, self.recoveries)
        self.saved[body["attempt"], body["step"]] = copy.deepcopy(state)

    def restore(self, body: dict[str, Any]) -> None:
        """A checkpoint was restored."""
        self.line, self.holds, self.recoveries = copy.deepcopy(self.saved[body["attempt"], body["step"]])
        lost = [0] * len(self.experts)
        for place, version in versions(body).items():
            then = self.saved[version][1][place]
            lost[place[0]] += self._tokens(place, self.holds[place] - then)
            self.holds[place] = set(then)
        self.recoveries.append(lost)

    def _tokens(self, place: Place, updates: Any) -> int:
        return sum(self.updates[update][0][place[0]][place[1]] for update in updates)

    def ledger(self, total_tokens: float | None, top_k: list[int]) -> dict[str, Any]:
        """What the engine's ledger should say."""
        layers = range(len(self.experts))
        processed = [[self._tokens((at, e), self.line) for e in range(self.experts[at])] for at in layers]
        learnt = [[self._tokens((at, e), self.holds[at, e]) for e in range(self.experts[at])] for at in layers]
        routed = [sum(self.updates[update][1][at] for update in self.line) for at in layers]
        return {
            "processed": processed,
            "lost": [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(processed, learnt, strict=True)],
            "routed": routed,
            "recoveries": self.recoveries,
            "plt": self.plt(total_tokens, top_k),
        }

    def plt(self, total_tokens: float | None, top_k: list[int]) -> float:
        """Equation 7: per layer all lost tokens over all tokens times top-k, averaged over the layers."""
        shares = []
        for layer, k in enumerate(top_k):
            lost = sum(recovery[layer] for recovery in self.recoveries)
            total = sum(self.updates[update][1][layer] for update in self.line)
            if total_tokens is not None:
                total = total_tokens * k
            shares.append(lost / total if total else 0.0)
        return sum(shares) / len(shares)


def seen(engine: Any) -> dict[str, Any]:
    """What the engine's ledger says."""
    ledger = engine.moc.ledger
    return {
        "processed": [counts.tolist() for counts in ledger.processed],
        "lost": [counts.tolist() for counts in ledger.lost],
        "routed": list(ledger.routed),
        "recoveries": [list(recovery.lost) for recovery in ledger.recoveries],
        "plt": engine.moc.plt,
    }


def differ(engine: Any, truth: Truth, total: float | None) -> list[str]:
    """Where the engine's ledger is wrong."""
    expected = truth.ledger(total, [layer.k for layer in engine.zoo_row.layers])
    found = seen(engine)
    keys = [key for key in expected if key != "plt" and found[key] != expected[key]]
    out = [f"{key}: {found[key]}, not {expected[key]}" for key in keys]
    if found["plt"] != pytest.approx(expected["plt"], rel=1e-12, abs=0):
        out.append(f"plt: {found['plt']}, not {expected['plt']}")
    return out


def evaluate(engine: Any, how: str) -> None:
    """Forward passes that are no training."""
    import torch

    row = engine.zoo_row
    tokens, target = zoo.batch(row, step=99, micro=0, rank=0, world=4, seed=5)
    if how == "eval":
        engine.eval()
        engine(tokens, target)
        engine.train()
    with torch.no_grad():
        engine(tokens, target)


def case_script(
    ctx: Any, path: str, row: Row, k: int, script: str, plugin: dict[str, Any], truth: Truth | None = None
) -> dict[str, Any]:
    """A life of trainings, saves and faults, a word for each; the ledger is compared after every save and fault.

    Words: `t` train a step; `s` save; `a` save under the tag "aside"; `f` a fault: a new engine loads the newest
    checkpoint; `b` the same engine goes back to it; `g` a fault from which "aside" is loaded; `e` evaluate; `m` half a
    step (one micro-batch of several), which the following restore throws away; `o` save everything.
    """
    experts, total = row_experts(row), plugin.get("plt_total_tokens")
    storage = {"keep_last": 0}
    fresh = truth is None
    truth = truth or Truth(experts)
    engine = build(ctx, row, k, seed=1, storage=storage, **plugin) if fresh else None
    gates = Gates(ctx, engine) if fresh else None
    out: dict[str, Any] = {"wrong": [], "plt": [], "taken": []}
    for number, word in enumerate(script):
        if word == "t":
            truth.trained(gates.train(data_seed=number))
        elif word in "sao":
            tag = "aside" if word == "a" else f"n{len(truth.saved)}"
            assert engine.moc.save(path, tag, full=word == "o")
            body = manifest(path, tag)
            truth.keep(body)
            out["taken"].append(len(written(body)))
        elif word in "fgb":
            body = manifest(path, "aside" if word == "g" else None)
            if word != "b":
                engine = build(ctx, row, k, seed=number, storage=storage, **plugin)
                gates = Gates(ctx, engine)
                harness.train(engine, 1, data_seed=77)
            engine.load_checkpoint(path, tag=body["tag"])
            truth.restore(body)
            out["plt"].append(engine.moc.plt)
        elif word == "e":
            evaluate(engine, "eval")
            evaluate(engine, "no_grad")
        elif word == "m":
            tokens, target = zoo.batch(row, step=0, micro=0, rank=ctx.rank, world=ctx.world, seed=3)
            engine.backward(engine(tokens, target))
            engine.step()
        if word in "saofgb":
            out["wrong"] += [f"{script[: number + 1]}: {line}" for line in differ(engine, truth, total)]
    out["truth"] = truth
    out["dropped"] = [sum(sent[at] - sum(kept[at]) for kept, sent in truth.updates) for at in range(len(truth.experts))]
    return out


#: Every layer drops tokens: the model's capacity factor is 1.25 and its gates are noisy.
TOP12 = zoo.ROWS["z2_bf16"]
FP16 = zoo.ROWS["z2_fp16"].with_model(poison=(1, 3, 6, 10))
LAYERS = (Layer(experts=2, ep=1), Layer(experts=4, ep=2, k=2), Layer(experts=8, ep=4))
UNEVEN = zoo.ROWS["z1_bf16"].with_model(layers=LAYERS)

#: Faults after several saves; twice in a row without a save; with one save between; at the save's own step; back to a
#: checkpoint set aside before others; evaluation in between; after a full save.
LIFE = "tsttstesfttfetsftsaftsbttsgtsfofts"


@pytest.mark.parametrize(
    ("row", "k", "script", "plugin"),
    [
        (TOP12, 1, LIFE, {}),
        (FP16, 1, LIFE, {"selection": "load_aware"}),
        (UNEVEN, 3, LIFE, {"plt_total_tokens": 10000}),
        (zoo.ROWS["z0_fp32"], 2, "tssttsbtbtmbtsft", {"plt_total_tokens": 1e9, "selection": "load_aware"}),
        (TOP12, 1, "tstmbtsmf", {}),
        (UNEVEN, 1, "tstaogtstfsfttsf", {}),
    ],
    ids=[
        "top-1 and 2, gas 2",
        "fp16 with skipped steps",
        "uneven",
        "stage 0, load-aware",
        "half a step",
        "two saves of one step",
    ],
)
def test_ledger_is_what_happened(
    pool: Pool, ckpt_dir: str, row: Row, k: int, script: str, plugin: dict[str, Any]
) -> None:
    results = pool.run(4, case_script, path=ckpt_dir, row=row, k=k, script=script, plugin=plugin, deadline=2 * DEADLINE)
    for rank, result in enumerate(results):
        assert result["wrong"] == [], f"rank {rank}"
        assert all(result["dropped"]), "nothing was dropped, so the capacity is not tested"
    if len(script) > 20:
        assert all(plt > 0 for plt in results[0]["plt"][:3])
        assert sum(map(sum, results[0]["truth"].recoveries)) > 0


def test_ledger_over_restarts_and_resizes(pool: Pool, ckpt_dir: str) -> None:
    """World 4, 2, 4 and 1; the tokens of all of them are one sum."""
    truth, plt = None, []
    for world, stage, eps, script in (
        (4, 2, (2, 4), "tstts"),
        (2, 1, (2, 1), "ftsts"),
        (4, 0, (4, 2), "fftstst"),
        (1, 2, (1, 1), "ftts"),
    ):
        layers = (Layer(ep=eps[0]), Layer(ep=eps[1], k=2))
        row = zoo.ROWS["z2_bf16"].with_model(stage=stage, layers=layers)
        results = pool.run(
            world, case_script, path=ckpt_dir, row=row, k=1, script=script, plugin={}, truth=truth, deadline=DEADLINE
        )
        for rank, result in enumerate(results):
            assert result["wrong"] == [], f"world {world}, rank {rank}"
        truth = results[0]["truth"]
        plt += results[0]["plt"]
    assert all(0 < one < 1 for one in plt)


# -------------------------------------------------------------------------------------------- load-aware


def case_busiest(ctx: Any, path: str, saves: int) -> list[str]:
    """Before anyone's time has come, a load-aware save takes those with the most unsaved tokens."""
    row, wrong = zoo.ROWS["z1_bf16"], []
    engine = build(ctx, row, 2, selection="load_aware")
    gates = Gates(ctx, engine)
    unsaved: dict[Place, int] = {(layer, expert): 0 for layer in range(2) for expert in range(4)}
    for number in range(saves):
        for _ in range(1 + number):
            kept, _ = gates.train(data_seed=7)
            for layer, expert in unsaved:
                unsaved[layer, expert] += kept[layer][expert]
        engine.save_checkpoint(path)
        took = written(manifest(path))
        for layer in range(2):
            mine = [unsaved[place] for place in took if place[0] == layer]
            others = [tokens for place, tokens in unsaved.items() if place[0] == layer and place not in took]
            if number and not (len(mine) == len(others) == 2 and min(mine) >= max(others)):
                wrong.append(f"save {number}, layer {layer}: {unsaved}, took {took}")
        unsaved.update(dict.fromkeys(took, 0))
    return wrong


def test_load_aware_takes_the_busiest(pool: Pool, ckpt_dir: str) -> None:
    assert pool.run(4, case_busiest, path=ckpt_dir, saves=4, deadline=DEADLINE) == [[]] * 4


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
    marks: dict[Version, tuple[list[int], list[int]]] = {}
    interval, mark = [0, 0], [0, 0]

    def processed() -> list[int]:
        return [sum(sum(truth.updates[update][0][at]) for update in truth.line) for at in range(2)]

    def totals() -> list[int]:
        return [sum(truth.updates[update][1][at] for update in truth.line) for at in range(2)]

    for number, word in enumerate(script):
        with logged() as log:
            if word == "t":
                truth.trained(gates.train(data_seed=number))
                engine.save_checkpoint(path)
                body = manifest(path)
                interval, mark = [a - b for a, b in zip(processed(), mark, strict=True)], processed()
                truth.keep(body)
                marks[body["attempt"], body["step"]] = (interval, mark)
                out["taken"].append(len(written(body)))
                out["expected"].append(2 * rule.k if number else 8)
                if dynamic:
                    rule.save(truth.plt(None, [1, 2]), interval, totals())
            else:
                engine = build(ctx, row, 1, seed=number, **plugin)
                gates = Gates(ctx, engine)
                engine.load_checkpoint(path)
                body = manifest(path)
                truth.restore(body)
                interval, mark = marks[body["attempt"], body["step"]]
                if dynamic:
                    rule.fault(truth.plt(None, [1, 2]), interval, totals())
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
    assert [text for texts in result["log"] for text in texts if "again" in text]
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
    original = save.write_rank
    if ctx.rank == 2:

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise StorageError("injected: the disk is on fire")

        save.write_rank = refuse
    failed = harness.attempt(engine.save_checkpoint, f"{path}/c", tag="never")
    save.write_rank = original
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
