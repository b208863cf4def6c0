"""`moc-ckpt plan`: what the checkpoints of a model weigh, before it is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from moc_ckpt.cli.common import AsJson, print_json, size, stdout, what_went_wrong
from moc_ckpt.errors import ConfigError
from moc_ckpt.plan.forecast import Forecast, SaveForecast, Setup, forecast
from moc_ckpt.plan.models import GPT2_VOCABULARY, PRESETS, GptMoe, build_model, tensor_specs
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_spec import ZeroSettings

__all__ = ["PlanCommand", "plan"]

_SHOWN_RANKS = 16
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MODEL = "the model"
_RUN = "the run"
_CHECKPOINTS = "the checkpoints (as in the ds_config's moc_checkpoint section)"


class Preset(str, Enum):
    """Models whose sizes are known."""

    TINY = "tiny"
    GPT_125M_8E = "gpt-125m-8e"
    GPT_350M_16E = "gpt-350m-16e"


class Precision(str, Enum):
    """Of the weights; masters and moments are 32 bit."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Selection(str, Enum):
    """Which experts a save takes."""

    SEQUENTIAL = "sequential"
    LOAD_AWARE = "load_aware"
    FULL = "full"


class Sharding(str, Enum):
    """Who writes what several ranks hold alike."""

    ADAPTIVE = "adaptive"
    EQUAL = "equal"


class Balance(str, Enum):
    """Whether snapshots are filled up."""

    FILL = "fill"
    NONE = "none"


class SaveWeights(str, Enum):
    """Whether weights are stored beside their masters."""

    DERIVE = "derive"
    SHARDED = "sharded"


class PlanCommand(TyperCommand):
    """A command whose --num-experts takes several numbers, as Megatron's does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option before each of its numbers, which is how the parser takes a list."""
        expanded: list[str] = []
        inside = False
        for item in args:
            if inside and item.isdigit() and expanded[-1] != "--num-experts":
                expanded.append("--num-experts")
            inside = item == "--num-experts" or (inside and item.isdigit())
            expanded.append(item)
        return super().parse_args(ctx, expanded)


def plan(
    preset: Annotated[
        Preset | None, typer.Option(help="A whole model; other options override it.", rich_help_panel=_MODEL)
    ] = None,
    num_layers: Annotated[int | None, typer.Option(help="Transformer layers.", rich_help_panel=_MODEL)] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the model.", rich_help_panel=_MODEL)] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="Attention heads.", rich_help_panel=_MODEL)] = None,
    ffn_hidden_size: Annotated[
        int | None,
        typer.Option(help="Width inside an MLP or expert. (default: 4 x hidden size)", rich_help_panel=_MODEL),
    ] = None,
    seq_length: Annotated[int | None, typer.Option(help="Tokens per sample.", rich_help_panel=_MODEL)] = None,
    max_position_embeddings: Annotated[
        int | None, typer.Option(help="Learned positions. (default: sequence length)", rich_help_panel=_MODEL)
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help=f"Vocabulary, before padding. (default: GPT-2's {GPT2_VOCABULARY})", rich_help_panel=_MODEL),
    ] = None,
    make_vocab_size_divisible_by: Annotated[
        int | None, typer.Option(help="The vocabulary is padded to it. (default: 128)", rich_help_panel=_MODEL)
    ] = None,
    num_experts: Annotated[
        list[int] | None,
        typer.Option(help="Experts per MoE layer: one number, or one for each MoE layer.", rich_help_panel=_MODEL),
    ] = None,
    expert_interval: Annotated[
        int | None, typer.Option(help="Every n-th layer is an MoE layer. (default: 2)", rich_help_panel=_MODEL)
    ] = None,
    topk: Annotated[int | None, typer.Option(help="Experts per token. (default: 1)", rich_help_panel=_MODEL)] = None,
    untie_embeddings_and_output_weights: Annotated[
        bool,
        typer.Option(
            "--untie-embeddings-and-output-weights",
            help="The output layer has weights of its own.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    ds_config: Annotated[
        Path | None,
        typer.Option(
            help="DeepSpeed JSON file: ZeRO stage, precision, moc_checkpoint; options win.", rich_help_panel=_RUN
        ),
    ] = None,
    world: Annotated[
        int | None, typer.Option(help="Ranks. (default: the expert-parallel size)", rich_help_panel=_RUN)
    ] = None,
    ep: Annotated[
        int,
        typer.Option(
            "--ep", "--moe-expert-parallel-size", help="Ranks that share one set of experts.", rich_help_panel=_RUN
        ),
    ] = 1,
    stage: Annotated[
        int | None, typer.Option("--stage", "--zero-stage", help="ZeRO stage. (default: 2)", rich_help_panel=_RUN)
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the weights. (default: bf16)", rich_help_panel=_RUN)
    ] = None,
    interval: Annotated[
        int | None, typer.Option(help="Steps between two checkpoints, for the expected PLT.", rich_help_panel=_RUN)
    ] = None,
    total_steps: Annotated[
        int | None, typer.Option(help="Steps of the whole training, for the expected PLT.", rich_help_panel=_RUN)
    ] = None,
    k_snapshot: Annotated[
        str | None, typer.Option(help="Experts per MoE layer in a snapshot, or auto.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    k_persist: Annotated[
        str | None, typer.Option(help="Experts per MoE layer in a checkpoint, or auto.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    selection: Annotated[
        Selection | None, typer.Option(help="Which experts a save takes.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    sharding: Annotated[
        Sharding | None,
        typer.Option(help="Who writes what several ranks hold alike.", rich_help_panel=_CHECKPOINTS),
    ] = None,
    balance: Annotated[
        Balance | None, typer.Option(help="Fill snapshots up below the bottleneck.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    save_weights: Annotated[
        SaveWeights | None, typer.Option(help="Store the weights as well.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute what checkpoints of a model weigh: in all, per rank, beside a full one and DeepSpeed's own.

    Give a --preset, or --num-layers, --hidden-size, --seq-length and --num-experts. Needs neither torch nor a GPU.
    """
    with what_went_wrong(as_json):
        model = _model(
            preset,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            ffn_hidden_size=ffn_hidden_size,
            seq_length=seq_length,
            max_position_embeddings=max_position_embeddings,
            vocab_size=vocab_size,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            num_experts=tuple(num_experts) if num_experts else None,
            expert_interval=expert_interval,
            topk=topk,
            untie_embeddings_and_output_weights=untie_embeddings_and_output_weights or None,
        )
        section = {
            "k_snapshot": _k("--k-snapshot", k_snapshot),
            "k_persist": _k("--k-persist", k_persist),
            "selection": selection and selection.value,
            "sharding": sharding and sharding.value,
            "balance": balance and balance.value,
            "save_weights": save_weights and save_weights.value,
        }
        settings = _settings(ds_config, stage, precision and precision.value, section)
        run = _run(settings, ep, ep if world is None else world, interval, total_steps)
        experts = [layer.num_experts for layer in model.moe_layers]
        tensors = tensor_specs(model, ep, run.dtype)
        found = forecast(tensors, experts, run.setup, where="--k-snapshot, --k-persist or the ds_config")
        data = _as_data(model, run, found)
    if as_json:
        print_json(data)
    else:
        stdout().print(_as_text(model, run, found, data))


@dataclass(frozen=True, slots=True)
class _Run:
    """How the model is trained: the setup, and the dtype of its weights."""

    setup: Setup
    dtype: str


def _model(preset: Preset | None, **given: Any) -> GptMoe:
    known = {name: value for name, value in given.items() if value is not None}
    arguments = {**(PRESETS[preset.value] if preset else {}), **known}
    required = ("num_layers", "hidden_size", "seq_length", "num_experts")
    absent = [f"--{name.replace('_', '-')}" for name in required if name not in arguments]
    if absent:
        raise ConfigError(
            f"the model's size is not known: {', '.join(absent)} missing",
            where="the command line",
            fix=f"give them, or a --preset: {', '.join(PRESETS)}",
        )
    return build_model(**arguments)


def _k(option: str, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(
            f"{option} is {text}", where=option, fix='give a number of experts per MoE layer, at least 1, or "auto"'
        )
    return value


def _settings(
    path: Path | None, stage: int | None, precision: str | None, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the ds_config with the options on top."""
    if path is None:
        settings: dict[str, Any] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    else:
        settings = _read(path)
    if stage is not None:
        settings["zero_optimization"] = {**_part(settings, "zero_optimization"), "stage": stage}
    if precision is not None:
        for name in ("bf16", "bfloat16", "fp16"):
            settings.pop(name, None)
        if precision != "fp32":
            settings[precision] = {"enabled": True}
    options = {name: value for name, value in section.items() if value is not None}
    if options:
        settings["moc_checkpoint"] = {**_part(settings, "moc_checkpoint"), **options}
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"the ds_config cannot be read: {error}", where=f"--ds-config {path}") from None
    if not isinstance(found, dict):
        raise ConfigError("the ds_config is not a JSON object", where=f"--ds-config {path}")
    return {name: value if name == "moc_checkpoint" else _without_auto(value) for name, value in found.items()}


def _without_auto(value: Any) -> Any:
    """Drops what a trainer would fill in: Hugging Face's "auto"."""
    if isinstance(value, dict):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value


def _part(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, got {value!r}", where=f"ds_config, key {name!r}")
    return dict(value)


def _run(settings: Mapping[str, Any], ep: int, world: int, interval: int | None, total_steps: int | None) -> _Run:
    from moc_ckpt.config import find_config  # pydantic takes as long to import as all the rest of this verb

    config = find_config(settings)
    precision = "fp32"
    for name, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        if any(_part(settings, key).get("enabled") is True for key in keys):
            precision = name
    stage = _part(settings, "zero_optimization").get("stage", 0)
    if not isinstance(stage, int):
        raise ConfigError(f"the ZeRO stage is {stage!r}", where="ds_config, zero_optimization.stage", fix="0, 1 or 2")
    setup = Setup(
        parallel=ParallelLayout(world, bool(settings.get("use_data_before_expert_parallelism", False))),
        ep=ep,
        zero=ZeroSettings.from_config(settings),
        k_snapshot=config.k_snapshot,
        k_persist=config.k_persist,
        selection=config.selection,
        sharding=config.sharding,
        fill=config.balance == "fill",
        interval=interval,
        total_steps=total_steps,
    )
    return _Run(setup, _DTYPES[precision])


# ------------------------------------------------------------------------------------------- what is printed


def _as_data(model: GptMoe, run: _Run, found: Forecast) -> dict[str, Any]:
    parameters, inside = model.parameters
    setup = run.setup
    return {
        **_save_data(found, found.persist),
        "full_bytes": found.full_bytes,
        "native_bytes": found.native_bytes,
        "snapshot": _save_data(found, found.snapshot),
        "model": {
            "parameters": parameters,
            "expert_parameters": inside,
            "experts": list(found.experts),
            "vocabulary": model.vocabulary,
        },
        "run": {
            "world": setup.parallel.world,
            "ep": setup.ep,
            "stage": setup.zero.stage,
            "dtype": run.dtype,
            "selection": setup.selection,
            "sharding": setup.sharding,
            "balance": "fill" if setup.fill else "none",
            "save_weights": "sharded" if setup.zero.save_weights else "derive",
        },
        "notes": _notes(run, found),
    }


def _save_data(found: Forecast, save: SaveForecast) -> dict[str, Any]:
    return {
        "total_bytes": save.total_bytes,
        "ratio_to_full": save.total_bytes / found.full_bytes,
        "ratio_to_native": save.total_bytes / found.native_bytes,
        "bottleneck_bytes": save.bottleneck_bytes,
        "bottleneck_optimum_bytes": save.optimum_bytes,
        "optimum_proven": save.optimum_proven,
        "worst_case_bottleneck_bytes": save.worst_bytes,
        "contiguous_bottleneck_bytes": save.contiguous_bytes,
        "baseline_bottleneck_bytes": save.baseline_bytes,
        "mean_bytes": save.mean_bytes,
        "per_rank": {
            "min": int(save.peaks.min()),
            "mean": round(float(save.peaks.mean())),
            "max": int(save.peaks.max()),
            "most_loaded": int(save.peaks.argmax()),
        },
        "k": list(save.k),
        "cycle": save.cycle,
        "expected_plt_per_fault": save.expected_plt,
    }


def _notes(run: _Run, found: Forecast) -> list[str]:
    notes = []
    for name, save in (("K_persist", found.persist), ("K_snapshot", found.snapshot)):
        uneven = [layer for layer, (n, k) in enumerate(zip(found.experts, save.k, strict=True)) if n % k]
        if uneven:
            layer = uneven[0]
            notes.append(
                f"{name} {save.k[layer]} does not divide the {found.experts[layer]} experts of MoE layer {layer}"
                f"{' and others' if len(uneven) > 1 else ''}: bytes are the mean over a cycle"
            )
    setup = run.setup
    if setup.selection == "load_aware":
        notes.append("load-aware selection follows the tokens: loads and PLT are those of equally loaded experts")
    if setup.fill and found.snapshot.k != found.experts:
        notes.append("snapshots are filled up below the most loaded rank; their bytes are a mean over saves")
    if not setup.zero.partitioned:
        notes.append(
            "without ZeRO DeepSpeed writes the dense optimizer state once per expert-parallel rank, and rank 0 twice"
        )
    return notes


def _as_text(model: GptMoe, run: _Run, found: Forecast, data: dict[str, Any]) -> Group:
    parts: list[Any] = [_summary(model, run, found), Text(), _saves(run, found, data), Text(), _ranks(found.persist)]
    parts += [Text(f"note: {note}", style="dim") for note in data["notes"]]
    return Group(*parts)


def _summary(model: GptMoe, run: _Run, found: Forecast) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    parameters, inside = model.parameters
    setup = run.setup
    counts = sorted(set(found.experts))
    experts = " or ".join(map(str, counts)) if counts else "no"
    table.add_row("model", f"{parameters:,} parameters, {inside:,} of them in {len(found.experts)} x {experts} experts")
    table.add_row("run", f"{setup.parallel.world:,} ranks, EP {setup.ep}, ZeRO-{setup.zero.stage}, {run.dtype}")
    table.add_row("full", f"{size(found.full_bytes)}; DeepSpeed's own {size(found.native_bytes)}")
    return table


def _saves(run: _Run, found: Forecast, data: dict[str, Any]) -> Table:
    table = Table(title="one save, in the mean over a cycle", title_justify="left")
    table.add_column()
    table.add_column("checkpoint", justify="right")
    filled = run.setup.fill and found.snapshot.k != found.experts
    table.add_column("snapshot, filled up" if filled else "snapshot", justify="right")
    saves = (found.persist, found.snapshot)
    each = (data, data["snapshot"])

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    row("experts per layer (K)", *(_k_text(save.k, found.experts) for save in saves))
    row("saves per cycle", *(str(save.cycle) for save in saves))
    row("bytes", *(size(save.total_bytes) for save in saves))
    row("  of a full one", *(f"{item['ratio_to_full']:.1%}" for item in each))
    row("  of DeepSpeed's own", *(f"{item['ratio_to_native']:.1%}" for item in each))
    row("per rank, mean", *(size(save.mean_bytes) for save in saves))
    row("most loaded rank", *(size(save.bottleneck_bytes) for save in saves))
    row("  optimum", *(f"{'' if s.optimum_proven else 'at least '}{size(s.optimum_bytes)}" for s in saves))
    if run.setup.selection == "load_aware":
        row("  whatever the loads, at most", *(size(save.worst_bytes) for save in saves))
    row("  DeepSpeed's writers", *(size(save.baseline_bytes) for save in saves))
    row("PLT per fault", *("-" if s.expected_plt is None else f"{s.expected_plt:.3%}" for s in saves))
    return table


def _k_text(k: tuple[int, ...], experts: tuple[int, ...]) -> str:
    return " or ".join(f"{size} of {count}" for size, count in sorted(set(zip(k, experts, strict=True)))) or "-"


def _ranks(save: SaveForecast) -> Table:
    """A bar for each rank, or each run of neighbouring ranks: the largest checkpoint of any of them."""
    world, top = len(save.peaks), max(int(save.peaks.max()), 1)
    table = Table(title="largest checkpoint of each rank", title_justify="left", box=None, pad_edge=False)
    table.add_column("ranks", justify="right")
    table.add_column("")
    table.add_column("bytes", justify="right")
    rows = min(world, _SHOWN_RANKS)
    for number in range(rows):
        first, stop = number * world // rows, (number + 1) * world // rows
        most = int(save.peaks[first:stop].max())
        name = str(first) if stop == first + 1 else f"{first}-{stop - 1}"
        table.add_row(name, ProgressBar(total=top, completed=most, width=40), size(most))
    least, mean = int(save.peaks.min()), float(save.peaks.mean())
    table.caption = f"least {size(least)}, mean {size(mean)}, most {size(top)}"
    table.caption_justify = "left"
    return table
