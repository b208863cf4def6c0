"""What `moc-ckpt plan` says of a model, against the model, the engine and the files themselves."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distributed import harness
from distributed.pool import Pool
from moc_ckpt.pec.k_values import AUTO
from moc_ckpt.plan.forecast import Forecast, Setup, forecast
from moc_ckpt.plan.models import PRESETS, GptMoe, build_model, tensor_specs
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_spec import ZeroSettings
from moc_ckpt.storage.checkpoint import load_manifest
from moc_ckpt.storage.store import open_store

pytestmark = pytest.mark.distributed

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")
#: A model as small as the tests of names can do with.
SMALL = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "num_experts": 4}
VOCABULARY = 384


# ----------------------------------------------------------------------- the training program's model


def arguments(ctx: Any, ep: int, sizes: dict[str, Any], *flags: str) -> Any:
    """The training program's arguments, settled."""
    if SCRIPTS not in sys.path:
        sys.path.insert(0, SCRIPTS)
    from gpt_moe.arguments import parse_args, resolve_batch, validate

    argv = [f"--moe-expert-parallel-size={ep}", "--micro-batch-size=1", *flags]
    for name, value in sizes.items():
        if value is True:
            argv.append("--" + name.replace("_", "-"))
        elif value is not False:
            argv.append(f"--{name.replace('_', '-')}={value}")
    args = parse_args(argv)
    resolve_batch(args, ctx.world)
    validate(args, ctx.world)
    return args


def make_net(args: Any, vocabulary: int = VOCABULARY) -> Any:
    """The training program's model; `forget` it afterwards."""
    import torch
    from gpt_moe.model import build_model as build_net

    return build_net(args, vocabulary, torch.device("cpu"), False)


def forget() -> None:
    """Ends megatron-core's process groups, which do not outlive a world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def case_parameters(ctx: Any, ep: int, sizes: dict[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    """(name with global expert id, shape, optimizer group) of this rank's parameters, in order."""
    args = arguments(ctx, ep, sizes)
    from deepspeed.utils import groups
    from gpt_moe.optimizer import parameter_groups

    net = make_net(args)
    try:
        local = args.num_experts // ep
        first = groups._get_expert_parallel_rank(f"ep_size_{ep}") * local if args.num_experts > 1 else 0
        of = {id(p): i for i, group in enumerate(parameter_groups(net, 0.1)) for p in group["params"]}
        return [
            (
                re.sub(r"(deepspeed_experts\.)(\d+)", lambda match: f"{match[1]}{first + int(match[2])}", name),
                tuple(param.shape),
                of[id(param)],
            )
            for name, param in net.named_parameters()
        ]
    finally:
        forget()


@pytest.mark.parametrize(
    ("world", "ep", "changes"),
    [
        (2, 1, {}),
        (2, 2, {"untie_embeddings_and_output_weights": True}),
        (4, 2, {"expert_interval": 1, "ffn_hidden_size": 24}),
        (4, 4, {"num_layers": 3, "expert_interval": 3, "max_position_embeddings": 11}),
        (2, 1, {"num_experts": 1}),
    ],
)
def test_names_shapes_order_and_groups(pool: Pool, world: int, ep: int, changes: dict[str, Any]) -> None:
    sizes = {**SMALL, **changes}
    results = pool.run(world, case_parameters, ep=ep, sizes=sizes)
    model = build_model(**{**sizes, "num_experts": (sizes["num_experts"],)}, vocab_size=VOCABULARY)
    specs = tensor_specs(model, ep, "float32")
    assert model.vocabulary == VOCABULARY
    for rank, found in enumerate(results):
        local = sizes["num_experts"] // ep
        expected = [
            (spec.fqn, spec.shape, spec.group)
            for spec in specs
            if spec.expert is None or spec.expert // local == rank % ep
        ]
        assert found == expected
    held = Counter(name for found in results for name, _, _ in found)
    assert set(held) == {spec.fqn for spec in specs}
    assert {count for name, count in held.items() if "deepspeed_experts" in name} <= {world // ep}


# ------------------------------------------------------------------------------------- bytes on disk

#: Large enough that file headers and DeepSpeed's scripts stay below 0.5 % of its checkpoint.
MEDIUM = {"num_layers": 4, "hidden_size": 192, "num_attention_heads": 4, "seq_length": 16, "num_experts": 4}
#: GPT-350M-16E scaled down: the vocabulary makes dense and experts the same proportion.
SCALED = {"num_layers": 8, "hidden_size": 192, "num_attention_heads": 4, "seq_length": 16, "num_experts": 16}
SCALED_VOCABULARY = 3200


def case_save(
    ctx: Any,
    ep: int,
    sizes: dict[str, Any],
    vocabulary: int,
    stage: int,
    flags: tuple[str, ...],
    path: str,
    plugin: dict[str, Any] | None,
    saves: int = 1,
) -> str:
    """Train a step before each save with the training program's engine; the name of the optimizer's wrapper."""
    args = arguments(ctx, ep, sizes, f"--zero-stage={stage}", *flags)
    import deepspeed
    import torch
    from gpt_moe.ds_config import build_ds_config
    from gpt_moe.optimizer import parameter_groups

    config, _ = build_ds_config(args, {})
    config["moc_checkpoint"] = {"save_mode": "durable", **plugin} if plugin is not None else {"enabled": False}
    net = make_net(args, vocabulary)
    try:
        optimizer = torch.optim.AdamW(parameter_groups(net, 0.1), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
        harness._ENGINES.append(engine)
        positions = torch.arange(args.seq_length).unsqueeze(0)
        tokens = torch.randint(0, vocabulary, (1, args.seq_length + 1))
        for _ in range(saves):
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            engine.backward(engine(inputs, positions, None, labels=labels).float().mean())
            engine.step()
            engine.save_checkpoint(path)
        return type(engine.optimizer).__name__
    finally:
        harness.reset()
        forget()


def plan_for(
    world: int, ep: int, sizes: dict[str, Any], vocabulary: int, stage: int, dtype: str, **more: Any
) -> tuple[GptMoe, Forecast]:
    """What the planner says of the same model and run."""
    model = build_model(**{**sizes, "num_experts": (sizes["num_experts"],)}, vocab_size=vocabulary)
    assert model.vocabulary == vocabulary
    save_weights = more.pop("save_weights", False)
    zero = ZeroSettings(stage, save_weights=save_weights)
    counts = [layer.num_experts for layer in model.moe_layers]
    return model, forecast(tensor_specs(model, ep, dtype), counts, Setup(ParallelLayout(world), ep, zero, **more))


def size_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def bytes_by_rank(path: str, tag: str, world: int) -> tuple[list[int], set[str]]:
    """(bytes that each rank wrote of its tensors, expert units among them) in the packs of one tag."""
    manifest = load_manifest(open_store(path), tag)
    loads, units = [0] * world, set()
    for row in manifest.fragments:
        pack = manifest.packs[row.pack].path
        if pack.partition("/")[0] != tag:
            continue
        rank = int(re.search(r"rank_(\d+)", pack)[1])  # type: ignore[index]
        width = {"float32": 4, "bfloat16": 2}[manifest.tensors[row.tensor].dtype]
        loads[rank] += (row.stop - row.start) * width
        if manifest.units[row.unit].name.startswith("expert/"):
            units.add(manifest.units[row.unit].name)
    return loads, units


@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_native_bytes_are_what_deepspeed_writes(pool: Pool, ckpt_dir: str, stage: int, flags: tuple[str, ...]) -> None:
    args = {"ep": 2, "sizes": MEDIUM, "vocabulary": 1024, "stage": stage}
    pool.run(4, case_save, **args, flags=flags, path=ckpt_dir, plugin=None)
    model, plan = plan_for(4, **args, dtype="bfloat16" if flags else "float32")
    found = size_on_disk(Path(ckpt_dir))
    assert plan.native_bytes <= found <= 1.005 * plan.native_bytes
    if stage:
        assert plan.native_bytes == model.parameters[0] * (14 if flags else 16)


@pytest.mark.parametrize(
    ("world", "ep", "stage", "plugin"),
    [
        (4, 2, 2, {}),
        (2, 2, 1, {}),
        (4, 4, 2, {"save_weights": "sharded"}),
        (4, 2, 0, {}),
        (4, 2, 0, {"sharding": "equal"}),
    ],
)
def test_full_saves_weigh_what_is_planned(
    pool: Pool, ckpt_dir: str, world: int, ep: int, stage: int, plugin: dict[str, Any]
) -> None:
    args = {"ep": ep, "sizes": MEDIUM, "vocabulary": 1024, "stage": stage}
    section = {**harness.ON, **plugin}
    pool.run(world, case_save, **args, flags=("--bf16",), path=ckpt_dir, plugin=section)
    _, plan = plan_for(
        world,
        **args,
        dtype="bfloat16",
        save_weights=plugin.get("save_weights") == "sharded",
        sharding=plugin.get("sharding", "adaptive"),
    )
    loads, _ = bytes_by_rank(ckpt_dir, "global_step1", world)
    assert sum(loads) == plan.full_bytes == plan.persist.total_bytes
    assert loads == plan.persist.peaks.tolist()
    assert max(loads) == plan.persist.bottleneck_bytes


@pytest.mark.parametrize(("stage", "k"), [(2, 1), (2, 3), (0, 1), (0, 2)])
def test_a_whole_cycle_weighs_what_is_planned(pool: Pool, ckpt_dir: str, stage: int, k: int) -> None:
    sizes = {**MEDIUM, "expert_interval": 1, "hidden_size": 64}
    args = {"ep": 2, "sizes": sizes, "vocabulary": 1024, "stage": stage}
    _, plan = plan_for(4, **args, dtype="bfloat16", k_persist=k)
    section = {**harness.ON, "k_persist": k, "storage": {"keep_last": 0}}
    cycle = plan.persist.cycle
    assert cycle == -(-4 // k)
    pool.run(4, case_save, **args, flags=("--bf16",), path=ckpt_dir, plugin=section, saves=1 + cycle)
    # The first save of a directory is full; the cycle begins after it.
    saves = [bytes_by_rank(ckpt_dir, f"global_step{2 + number}", 4) for number in range(cycle)]
    peaks = [max(loads[rank] for loads, _ in saves) for rank in range(4)]
    assert peaks == plan.persist.peaks.tolist()
    assert max(peaks) == plan.persist.bottleneck_bytes
    total = sum(sum(loads) for loads, _ in saves)
    assert abs(total - cycle * plan.persist.total_bytes) <= cycle / 2, "the mean over the cycle, rounded"
    assert sorted(unit for _, units in saves for unit in units) == sorted(
        f"expert/{layer}/{expert}" for layer in range(4) for expert in range(4)
    )


def test_partial_saves_of_a_scaled_down_gpt_350m_16e(pool: Pool, ckpt_dir: str) -> None:
    args = {"ep": 4, "sizes": SCALED, "vocabulary": SCALED_VOCABULARY, "stage": 2}
    model, plan = plan_for(4, **args, dtype="bfloat16", k_persist=1, k_snapshot=AUTO)
    parameters, inside = build_model(**PRESETS["gpt-350m-16e"]).parameters
    assert model.parameters[1] / model.parameters[0] == pytest.approx(inside / parameters, rel=0.002)
    saves = 4
    flags = ("--bf16",)
    pool.run(4, case_save, **args, flags=flags, path=f"{ckpt_dir}/native", plugin=None)
    section = {**harness.ON, "selection": "sequential", "k_persist": 1, "storage": {"keep_last": 0}}
    pool.run(4, case_save, **args, flags=flags, path=f"{ckpt_dir}/moc", plugin=section, saves=saves, deadline=240.0)
    native = size_on_disk(Path(ckpt_dir, "native"))
    assert plan.native_bytes <= native <= 1.005 * plan.native_bytes
    full, units = bytes_by_rank(f"{ckpt_dir}/moc", "global_step1", 4)
    assert sum(full) == plan.full_bytes and len(units) == 4 * 16
    seen: set[str] = set()
    for step in range(2, saves + 1):
        tag = f"global_step{step}"
        loads, units = bytes_by_rank(f"{ckpt_dir}/moc", tag, 4)
        assert len(units) == 4 and not units & seen, "one expert of each layer, another one in each save"
        seen |= units
        assert sum(loads) == plan.persist.total_bytes
        assert max(loads) <= plan.persist.bottleneck_bytes
        assert all(load <= peak for load, peak in zip(loads, plan.persist.peaks.tolist(), strict=True))
        # The bound of the issue, with everything that lies in the directory of the tag.
        assert size_on_disk(Path(ckpt_dir, "moc", tag)) <= 0.167 * native
