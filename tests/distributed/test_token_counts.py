"""Token counts: equal to a recount from the gates' raw outputs, for every gate, and the training does not notice.

The recount (`Recount`) knows nothing of capacities: it counts what the gates dispatch, entry by entry, in the forward
passes that the test says are training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed import harness, zoo
from distributed.pool import CaseError, Pool
from moc_ckpt.integrations.deepspeed.token_counts import CountLayout, LayerTokens

pytestmark = pytest.mark.distributed

HIDDEN, TOKENS = 8, 24


@dataclasses.dataclass(frozen=True)
class Gate:
    """One MoE layer of the model below."""

    experts: int = 4
    k: int = 1
    drop: bool = True
    factor: float = 0.5
    rts: bool = True
    ep: int = 1
    #: Times that the layer is used in one forward pass.
    calls: int = 1
    #: The gate is also asked for its dense output (combine weights and dispatch mask, what old versions always give).
    dense: bool = False


@dataclasses.dataclass(frozen=True)
class Setup:
    """One model and how it is trained."""

    layers: tuple[Gate, ...]
    gas: int = 1
    checkpoint: str = ""


DROPPING = (
    Gate(experts=4, k=1, ep=2),
    Gate(experts=6, k=2),
    Gate(experts=8, k=3, ep=2),
    Gate(experts=4, k=1, rts=False),
    Gate(experts=4, k=2, factor=0.25),
)
KEEPING = (Gate(experts=4, k=1, drop=False, ep=2), Gate(experts=6, k=2, drop=False))


def build(ctx: Any, setup: Setup, seed: int = 1) -> Any:
    """An engine over a stack of MoE layers, each with a gate of its own kind."""
    import deepspeed
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from torch import nn

    torch.manual_seed(seed * 100 + ctx.rank)

    class Block(nn.Module):
        def __init__(self, gate: Gate) -> None:
            super().__init__()
            self.options = gate
            self.dense = nn.Linear(HIDDEN, HIDDEN)
            self.moe = MoE(
                HIDDEN,
                nn.Sequential(nn.Linear(HIDDEN, 6), nn.GELU(), nn.Linear(6, HIDDEN)),
                num_experts=gate.experts,
                ep_size=gate.ep,
                k=gate.k,
                drop_tokens=gate.drop,
                capacity_factor=gate.factor,
                eval_capacity_factor=2.0,
                min_capacity=1,
                use_rts=gate.rts,
            )

        def forward(self, x: Any) -> tuple[Any, Any]:
            x, total = torch.tanh(self.dense(x)), 0.0
            for _ in range(self.options.calls):
                out, aux, _ = self.moe(x)
                x, total = x + nn.functional.dropout(out, 0.1, self.training), total + aux
            if self.options.dense:
                total = total + self.moe.deepspeed_moe.gate(x.reshape(-1, HIDDEN), None)[0]
            return x, total

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(HIDDEN, HIDDEN)
            self.blocks = nn.ModuleList(Block(gate) for gate in setup.layers)
            self.checkpoint = setup.checkpoint
            #: Raised after the first block.
            self.error: BaseException | None = None
            self.inner_gradient = False
            self.nested = False

        def forward(self, x: Any) -> Any:
            if self.nested:
                self.nested = False
                self(x)
            x, total = self.first(x), 0.0
            for block in self.blocks:
                if self.inner_gradient:
                    self.differentiate(block, x)
                x, aux = run(self.checkpoint, block, x)
                total = total + aux
                if self.error is not None:
                    error, self.error = self.error, None
                    raise error
            return x.float().pow(2).mean() + 0.01 * total

        def differentiate(self, block: Any, x: Any) -> None:
            x = x.detach().requires_grad_()
            torch.autograd.grad(run("torch", block, x)[0].sum(), x)

    net = Net()
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2.0 if "gate" in name else 0.4))
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(net.parameters()), "name": "all"})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setup.gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=net, model_parameters=groups, config=config, dist_init_required=False)[0]
    harness._ENGINES.append(engine)
    return engine


def run(kind: str, block: Any, x: Any) -> Any:
    """Runs a block under one kind of activation checkpointing."""
    if not kind:
        return block(x)
    if kind.startswith("deepspeed"):
        import deepspeed

        deepspeed.checkpointing.configure(None, partition_activations=False)
        if kind == "deepspeed":
            return deepspeed.checkpointing.checkpoint(block, x)
        return deepspeed.checkpointing.non_reentrant_checkpoint(block, x)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, x, use_reentrant=kind == "torch_reentrant")


class Recount:
    """Counts what the gates dispatch, entry by entry."""

    def __init__(self, model: Any) -> None:
        from deepspeed.moe.sharded_moe import TopKGate

        gates = [module for module in model.modules() if isinstance(module, TopKGate)]
        self._shape = [gate.wg.out_features for gate in gates]
        self.on = False
        self.calls = 0
        self.total, self._step = self._zeros(), self._zeros()
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda gate, args, output, layer=layer: self._see(layer, gate, args, output))

    def _zeros(self) -> list[dict[str, Any]]:
        return [{"kept": [0] * experts, "assigned": 0, "tokens x k": 0} for experts in self._shape]

    def _see(self, layer: int, gate: Any, args: Any, output: Any) -> None:
        import torch

        self.calls += 1
        if not self.on:
            return
        if len(output) == 4:
            kept = [int(output[2][:, expert].any(-1).sum()) for expert in range(self._shape[layer])]
        else:
            kept = [int((output[3] == expert).sum()) for expert in range(self._shape[layer])]
        assert output[-1].dtype == torch.int64
        entry = self._step[layer]
        entry["kept"] = [a + b for a, b in zip(entry["kept"], kept, strict=True)]
        entry["assigned"] += int(output[-1].sum())
        entry["tokens x k"] += args[0].shape[0] * gate.k

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the forward pass of one micro-batch."""
        self.on = True
        yield
        self.on = False

    def step_done(self, skipped: bool) -> None:
        if not skipped:
            for whole, part in zip(self.total, self._step, strict=True):
                whole["kept"] = [a + b for a, b in zip(whole["kept"], part["kept"], strict=True)]
                whole["assigned"] += part["assigned"]
                whole["tokens x k"] += part["tokens x k"]
        self._step = self._zeros()

    def take(self, ctx: Any) -> list[dict[str, Any]]:
        """The sums over all ranks since the last call."""
        mine, self.total = self.total, self._zeros()
        out = self._zeros()
        for rank in ctx.gather(mine):
            for whole, part in zip(out, rank, strict=True):
                whole["kept"] = [a + b for a, b in zip(whole["kept"], part["kept"], strict=True)]
                whole["assigned"] += part["assigned"]
                whole["tokens x k"] += part["tokens x k"]
        return out


def attach(engine: Any) -> tuple[Any, Recount]:
    from moc_ckpt.integrations.deepspeed.layouts import find_layers
    from moc_ckpt.integrations.deepspeed.token_counts import TokenCounter

    return TokenCounter(engine, find_layers(engine)[0]), Recount(engine.module)


def taken(counter: Any) -> list[dict[str, Any]]:
    """The counter's counts, summed over ranks as the plugin does, in turn added up by itself and by another thread."""
    import torch
    import torch.distributed as dist

    counter.takes_of_tests = getattr(counter, "takes_of_tests", 0) + 1
    if counter.takes_of_tests % 2:
        vector = counter.take()
    else:
        with ThreadPoolExecutor(1) as thread:
            vector = torch.from_numpy(thread.submit(counter.take_to_host()).result())
    dist.all_reduce(vector)
    return [{"kept": list(p), "assigned": routed} for p, routed in counter.layout.split(vector.tolist())]


def compare(ctx: Any, counter: Any, recount: Recount) -> dict[str, Any]:
    """Takes both; what a test looks at."""
    counted, recounted = taken(counter), recount.take(ctx)
    differ = [
        f"layer {layer}: counted {a}, recounted {b}"
        for layer, (a, b) in enumerate(zip(counted, recounted, strict=True))
        if a["kept"] != b["kept"] or not a["assigned"] == b["assigned"] == b["tokens x k"]
    ]
    return {
        "differ": differ,
        "assigned": [entry["assigned"] for entry in counted],
        "dropped": [entry["assigned"] - sum(entry["kept"]) for entry in counted],
    }


def data(ctx: Any, number: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1000 * number + ctx.rank)
    x = torch.randn(2, TOKENS // 2, HIDDEN, generator=generator)
    return x + 0.7 * x[:, :1]  # tokens alike, so that some experts are much asked for


def train_step(ctx: Any, engine: Any, counter: Any, recount: Recount, *, between: Any = None) -> list[str]:
    """One optimizer step; `between` runs after each micro-batch."""
    losses = []
    for micro in range(engine.gradient_accumulation_steps()):
        with recount.training():
            loss = engine(data(ctx, 10 * engine.global_steps + micro))
        engine.backward(loss)
        losses.append(float(loss.detach()).hex())
        finish(engine, counter, recount)
        if between is not None:
            between()
    return losses


def finish(engine: Any, counter: Any, recount: Recount | None) -> bool:
    """engine.step and what follows it; whether the step was skipped."""
    boundary, before = engine.is_gradient_accumulation_boundary(), engine.skipped_steps
    engine.step()
    skipped = engine.skipped_steps > before
    if boundary and counter is not None:
        counter.step_done(skipped)
    if boundary and recount is not None:
        recount.step_done(skipped)
    return skipped


# ---------------------------------------------------------------------------------------------- gates


def case_gates(ctx: Any, setup: Setup) -> list[dict[str, Any]]:
    """Several takes, over one step and over two."""
    engine = build(ctx, setup)
    counter, recount = attach(engine)
    out = []
    for steps in (1, 2, 1):
        for _ in range(steps):
            train_step(ctx, engine, counter, recount)
        out.append(compare(ctx, counter, recount))
    return out


@pytest.mark.parametrize(("world", "gas"), [(2, 1), (2, 3), (4, 2)])
def test_dropping_gates(pool: Pool, world: int, gas: int) -> None:
    results = pool.run(world, case_gates, setup=Setup(DROPPING, gas=gas))
    for rank, result in enumerate(results):
        for steps, got in zip((1, 2, 1), result, strict=True):
            assert got["differ"] == [], f"rank {rank}"
            assert got["assigned"] == [world * steps * gas * TOKENS * gate.k for gate in DROPPING]
            assert all(got["dropped"]), f"nothing was dropped in some layer: {got['dropped']}"


def _deepspeed() -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(int(part) for part in version("deepspeed").split(".")[:3])


@pytest.mark.parametrize("layers", [KEEPING, (Gate(experts=8, k=3, drop=False, ep=2),)], ids=["top12", "topk"])
def test_gates_that_drop_nothing(pool: Pool, layers: tuple[Gate, ...]) -> None:
    if _deepspeed() < (0, 17, 1) and any(gate.k > 2 for gate in layers):
        pytest.skip("DeepSpeed 0.17.0 itself fails here: a top-k gate that drops no tokens")
    for got in pool.run(2, case_gates, setup=Setup(layers, gas=2))[0]:
        assert got["differ"] == []
        assert got["dropped"] == [0] * len(layers)
        assert all(got["assigned"])


def test_layers_used_twice_and_dense_outputs(pool: Pool) -> None:
    """Outputs with a dispatch mask have their own way to the capacity, and two calls have different ones."""
    layers = (Gate(k=1, dense=True), Gate(experts=6, k=2, calls=2), Gate(experts=6, k=3, calls=2, dense=True))
    times = (2, 2, 3)
    for got in pool.run(2, case_gates, setup=Setup(layers, gas=2))[0][:1]:
        assert got["differ"] == []
        expected = [2 * 2 * TOKENS * gate.k * calls for gate, calls in zip(layers, times, strict=True)]
        assert got["assigned"] == expected
        assert all(got["dropped"])


def case_sizes(ctx: Any) -> dict[str, Any]:
    """Micro-batches of different lengths have different capacities."""
    engine = build(ctx, Setup(DROPPING, gas=4))
    counter, recount = attach(engine)
    for micro in range(8):
        with recount.training():
            loss = engine(data(ctx, micro)[:, : 12 - 3 * micro % 7])
        engine.backward(loss)
        finish(engine, counter, recount)
    return compare(ctx, counter, recount)


def test_micro_batches_of_different_sizes(pool: Pool) -> None:
    (got, other) = pool.run(2, case_sizes)
    assert got["differ"] == other["differ"] == []
    assert all(got["dropped"])


# ---------------------------------------------------------------------------------------------- which steps


def case_skips(ctx: Any, row: str, steps: int, pending: int | None) -> dict[str, Any]:
    """fp16 with gradients that overflow."""
    import torch.distributed as dist

    from moc_ckpt.integrations.deepspeed import token_counts

    engine = harness.build(row, world=ctx.world)
    counter, recount = attach(engine)
    shape, skips, most = engine.zoo_row, 0, token_counts._MAX_PENDING
    engine.train()
    try:
        token_counts._MAX_PENDING = pending or most
        while engine.global_steps < steps:
            step = engine.global_steps
            for micro in range(shape.gas):
                batch = zoo.batch(shape, step=step, micro=micro, rank=dist.get_rank(), world=ctx.world, seed=7)
                with recount.training():
                    loss = engine(*batch)
                engine.backward(loss * float("inf") if step in shape.poison else loss)
                skips += finish(engine, counter, recount)
    finally:
        token_counts._MAX_PENDING = most
    return {
        "skips": skips,
        "gas": shape.gas,
        "k": [layer.k for layer in shape.layers],
        **compare(ctx, counter, recount),
    }


@pytest.mark.parametrize("pending", [None, 2], ids=["", "added_early"])
@pytest.mark.parametrize("row", ["z2_fp16", "z0_fp16"])
def test_skipped_steps_do_not_count(pool: Pool, row: str, pending: int | None) -> None:
    steps = 10
    for got in pool.run(4, case_skips, row=row, steps=steps, pending=pending):
        assert got["differ"] == []
        assert got["skips"] >= 2, "no step overflowed"
        tokens = zoo.GLOBAL_MICRO * zoo.SEQ * (steps - got["skips"]) * got["gas"]
        assert got["assigned"] == [tokens * k for k in got["k"]]


def case_evaluation(ctx: Any) -> dict[str, Any]:
    """Evaluation between micro-batches and between steps, in every way there is."""
    import torch

    engine = build(ctx, Setup(DROPPING, gas=2))
    counter, recount = attach(engine)
    x = data(ctx, 77)

    def evaluate() -> None:
        engine.eval()
        engine(x)  # with gradients enabled
        with torch.no_grad():
            engine(x)
            engine.module(x)
        engine.train()
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                engine(x)
        # Layers on their own are no training step of the model either.
        engine.module.blocks[0](x)

    evaluate()
    for _ in range(2):
        train_step(ctx, engine, counter, recount, between=evaluate)
    return compare(ctx, counter, recount)


def test_evaluation_does_not_count(pool: Pool) -> None:
    for got in pool.run(2, case_evaluation):
        assert got["differ"] == []
        assert got["assigned"] == [2 * 2 * 2 * TOKENS * gate.k for gate in DROPPING]


def case_boundaries(ctx: Any) -> dict[str, Any]:
    """Taken in the middle of an accumulation, and forgotten."""
    engine = build(ctx, Setup(DROPPING, gas=2))
    counter, recount = attach(engine)
    out: dict[str, Any] = {"middle": []}
    empty = lambda: out["middle"].append(sum(entry["assigned"] for entry in taken(counter)))  # noqa: E731
    first_half = engine.micro_steps
    train_step(ctx, engine, counter, recount, between=lambda: engine.micro_steps == first_half + 1 and empty())
    out["whole"] = compare(ctx, counter, recount)
    engine.backward(engine(data(ctx, 5)))
    engine.step()
    counter.reset()
    engine.backward(engine(data(ctx, 6)))
    finish(engine, counter, None)
    out["after reset"] = [entry["assigned"] for entry in taken(counter)]
    return out


def test_steps_count_when_they_are_done(pool: Pool) -> None:
    got = pool.run(2, case_boundaries)[0]
    assert got["middle"] == [0]
    assert got["whole"]["differ"] == []
    assert all(got["whole"]["assigned"])
    assert got["after reset"] == [2 * TOKENS * gate.k for gate in DROPPING]


# ---------------------------------------------------------------------------------------------- checkpointing

KINDS = ("torch", "torch_reentrant", "deepspeed", "deepspeed_non_reentrant")


def case_checkpointing(ctx: Any, kind: str) -> dict[str, Any]:
    """The same training with and without activation checkpointing."""
    out = {}
    for name, checkpoint in (("plain", ""), ("checkpointed", kind)):
        engine = build(ctx, Setup(DROPPING, gas=2, checkpoint=checkpoint))
        counter, recount = attach(engine)
        losses = [loss for _ in range(3) for loss in train_step(ctx, engine, counter, recount)]
        out[name] = {"losses": losses, "gate calls": recount.calls, "counts": taken(counter)}
        out[name]["recounted"] = recount.take(ctx)
        harness.discard(engine)
        harness.reset()
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_counts_once(pool: Pool, kind: str) -> None:
    try:
        results = pool.run(2, case_checkpointing, kind=kind)
    except CaseError as error:
        if "transport_stream" in str(error) and "'NoneType' object is not callable" in str(error):
            pytest.skip("older DeepSpeed itself fails here: its checkpointing wants streams, on a CPU too")
        raise
    for got in results:
        plain, checkpointed = got["plain"], got["checkpointed"]
        assert checkpointed["gate calls"] == 2 * plain["gate calls"], "nothing was computed again"
        assert checkpointed["losses"] == plain["losses"], "not the same training"
        assert checkpointed["counts"] == plain["counts"]
        for counted, recounted in zip(checkpointed["counts"], checkpointed["recounted"], strict=True):
            assert counted["kept"] == recounted["kept"]
            assert counted["assigned"] == recounted["tokens x k"] > 0


def case_inner_gradient(ctx: Any) -> dict[str, Any]:
    """A forward pass that differentiates checkpointed layers itself."""
    engine = build(ctx, Setup((Gate(), Gate(experts=6, k=2))))
    counter, recount = attach(engine)
    engine.module.inner_gradient = True
    train_step(ctx, engine, counter, recount)
    return {"assigned": [entry["assigned"] for entry in taken(counter)], "gate calls": recount.calls}


def test_backward_inside_of_forward(pool: Pool) -> None:
    got = pool.run(2, case_inner_gradient)[0]
    assert got["gate calls"] == 2 * 3, "nothing was computed again"
    assert got["assigned"] == [2 * 2 * TOKENS, 2 * 2 * TOKENS * 2]


# ---------------------------------------------------------------------------------------------- failures


def case_failures(ctx: Any) -> dict[str, Any]:
    """Forward passes that raise in the middle, or are interrupted; nested ones."""
    engine = build(ctx, Setup(DROPPING, gas=2))
    counter, recount = attach(engine)
    x, out = data(ctx, 3), {}

    def fail(error: BaseException) -> None:
        engine.module.error = error
        with contextlib.suppress(type(error)):
            engine(x)

    def fail_and_evaluate() -> None:
        fail(ValueError("out of memory"))
        with torch.no_grad():
            fail(ValueError("in evaluation"))

    import torch

    fail_and_evaluate()
    for _ in range(2):
        train_step(ctx, engine, counter, recount, between=fail_and_evaluate)
    out["raised"] = compare(ctx, counter, recount)

    try:
        raise RuntimeError("the model runs inside of a handler")
    except RuntimeError:
        train_step(ctx, engine, counter, recount)
    out["in handler"] = compare(ctx, counter, recount)

    engine.module.nested = True
    train_step(ctx, engine, counter, recount)
    out["nested"] = compare(ctx, counter, recount)

    fail(KeyboardInterrupt())
    train_step(ctx, engine, counter, recount)
    recount.take(ctx)
    out["interrupted"] = sum(entry["assigned"] for entry in taken(counter))
    train_step(ctx, engine, counter, recount)
    out["after"] = compare(ctx, counter, recount)
    return out


def test_failed_forward_passes(pool: Pool) -> None:
    for got in pool.run(2, case_failures):
        one = [2 * 2 * TOKENS * gate.k for gate in DROPPING]
        for name, expected in (("raised", 2), ("in handler", 1), ("after", 1)):
            assert got[name]["differ"] == [], name
            assert got[name]["assigned"] == [expected * count for count in one], name
        assert got["nested"]["differ"] == []
        assert got["nested"]["assigned"] == [count * 3 // 2 for count in one], "the inner pass counts too"
        assert got["interrupted"] <= sum(one)


# ---------------------------------------------------------------------------------------------- the training


def case_undisturbed(ctx: Any, row: str, steps: int) -> dict[str, Any]:
    """A zoo row with the hooks and without."""
    import torch.distributed as dist

    out: dict[str, Any] = {}
    runs = []
    for counting in (False, True):
        engine = harness.build(row, world=ctx.world)
        counter = attach_only(engine) if counting else None
        shape, losses = engine.zoo_row, []
        engine.train()
        for step in range(steps):
            for micro in range(shape.gas):
                batch = zoo.batch(shape, step=step, micro=micro, rank=dist.get_rank(), world=ctx.world, seed=7)
                loss = engine(*batch)
                engine.backward(loss * float("inf") if step in shape.poison else loss)
                finish(engine, counter, None)
                losses.append(float(loss.detach().double()).hex())
            if counter is not None and step % 2:
                out["assigned"] = [entry["assigned"] for entry in taken(counter)]
        runs.append((losses, harness.snapshot(ctx, engine)))
        harness.discard(engine)
        harness.reset()
    out["losses"] = runs[0][0] == runs[1][0]
    out["state"] = harness.differences(runs[0][1], runs[1][1])
    return out


def attach_only(engine: Any) -> Any:
    from moc_ckpt.integrations.deepspeed.layouts import find_layers
    from moc_ckpt.integrations.deepspeed.token_counts import TokenCounter

    return TokenCounter(engine, find_layers(engine)[0])


@pytest.mark.parametrize("row", ["z2_bf16", "z1_bf16_fp32acc", "z0_fp32", "z2_fp16"])
def test_losses_state_and_generators_do_not_change(pool: Pool, row: str) -> None:
    for got in pool.run(4, case_undisturbed, row=row, steps=6):
        assert got["losses"], "other losses"
        assert got["state"] == []
        assert all(got["assigned"])


def case_operations(ctx: Any) -> dict[str, Any]:
    """The operations that torch runs, with hooks and without, and those of the counter alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    out: dict[str, Any] = {}
    for gas in (1, 8):
        engine = build(ctx, Setup((Gate(), Gate(), Gate(k=1, ep=2)), gas=gas))
        forwards, counter = {}, None
        for name in ("first", "without", "with"):  # the first pass makes what is made once
            counter = attach_only(engine) if name == "with" else None
            for micro in range(gas):
                with Log() as log:
                    loss = engine(data(ctx, micro))
                engine.backward(loss)
                if micro + 1 < gas or counter is None:
                    finish(engine, counter, None)
            forwards[name] = log.names
        engine.step()
        with Log() as log:
            counter.step_done(False)
        with Log() as take:
            counter.take()
        out[gas] = {**forwards, "fold": log.names, "take": take.names}
        harness.discard(engine)
        harness.reset()
    return out


def test_counting_is_a_few_operations_when_counts_are_taken(pool: Pool) -> None:
    got = pool.run(2, case_operations)[0]
    views = ("view", "slice", "select", "detach", "alias")
    for gas, entry in got.items():
        # The capacity, a tensor in host memory (a shape in older DeepSpeed), is read once per gate; that is all.
        read = "aten._local_scalar_dense.default"
        assert entry["with"].count(read) - entry["without"].count(read) in (0, 3)
        assert [x for x in entry["with"] if x != read] == [x for x in entry["without"] if x != read]
        assert entry["fold"] == [], "the end of a step is for training"
        kernels = [name for name in entry["take"] if name.split(".")[1] not in views]
        assert 0 < len(kernels) <= 7, f"{gas} micro-batches: {kernels}"
        # What reads a value on the host, which waits for the device.
        assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & {
            name.split(".")[1] for name in entry["take"]
        }
    assert len(got[1]["take"]) == len(got[8]["take"])


# ---------------------------------------------------------------------------------------------- hooks


def case_hooks(ctx: Any) -> dict[str, Any]:
    """Installed, removed, and refused."""
    from deepspeed.moe.sharded_moe import TopKGate

    from moc_ckpt.errors import UnsupportedError
    from moc_ckpt.integrations.deepspeed.layouts import find_layers
    from moc_ckpt.integrations.deepspeed.token_counts import TokenCounter
    from moc_ckpt.state.unit import MoELayer

    engine = build(ctx, Setup(DROPPING))

    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_always_called)
            for module in engine.module.modules()
        )

    layers, _ = find_layers(engine)
    out: dict[str, Any] = {"before": hooks(), "refused": []}
    gate = engine.module.blocks[1].moe.deepspeed_moe.gate
    engine.module.blocks[1].moe.deepspeed_moe.gate = type("OwnGate", (type(gate).__mro__[1],), {})()
    for wrong in (layers, [MoELayer(0, "blocks.0", 4)], [layers[0], MoELayer(1, "nowhere.moe", 4)]):
        try:
            TokenCounter(engine, wrong)
        except UnsupportedError as error:
            out["refused"].append(str(error))
    engine.module.blocks[1].moe.deepspeed_moe.gate = gate
    out["after refusal"] = hooks()
    assert isinstance(gate, TopKGate)

    counter, recount = attach(engine)
    train_step(ctx, engine, counter, recount)
    counter.close()
    counter.close()
    for _ in range(2):
        train_step(ctx, engine, counter, recount)
    out["counted"] = [entry["assigned"] for entry in taken(counter)]
    out["after close"] = hooks() - len(DROPPING)  # the recount's
    return out


def test_hooks_come_and_go(pool: Pool) -> None:
    got = pool.run(2, case_hooks)[0]
    assert got["before"] == got["after refusal"] == got["after close"]
    assert got["counted"] == [2 * TOKENS * gate.k for gate in DROPPING]
    own, block, nowhere = got["refused"]
    assert "layer 1" in own
    assert "OwnGate" in own
    assert "blocks.0" in block
    assert "nowhere.moe" in nowhere


# ---------------------------------------------------------------------------------------------- the layout

LAYERS = st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=6), max_size=5)


@given(LAYERS, st.integers(0, 2**40))
def test_layout_splits_what_lies_side_by_side(layers: list[list[int]], routed: int) -> None:
    layout = CountLayout(tuple(len(layer) for layer in layers))
    vector = [value for ordinal, layer in enumerate(layers) for value in (*layer, routed + ordinal)]
    assert layout.size == len(vector)
    expected = tuple(LayerTokens(tuple(layer), routed + ordinal) for ordinal, layer in enumerate(layers))
    assert layout.split(vector) == expected
    assert [vector[at : at + len(layer)] for at, layer in zip(layout.offsets, layers, strict=True)] == layers
    for wrong in (vector[:-1], [*vector, 0]):
        if len(wrong) != layout.size:
            with pytest.raises(ValueError, match="MoE layers"):
                layout.split(wrong)
