"""Lost tokens: what the ledger says, against a recount from the gates' raw outputs and a model of what was restored.

`Gates` counts what the gates dispatch, route by route. `Truth` knows which updates each expert's state contains: every
optimizer step is an update; a save keeps the set, a restore brings back the set of the version that the manifest names.
What is lost is what the checkpoint's own step had and the restored version has not.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from distributed import harness, zoo
from distributed.pec_tools import DEADLINE, Place, Version, build, manifest, row_experts, versions, written
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

    def take(self) -> tuple[Counts, list[int]]:
        """What this rank's gates kept and what they were asked for since the last call."""
        found = self.kept, self.routed
        self._clear()
        return found

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
        for theirs, sent in self.ctx.gather(self.take()):
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
