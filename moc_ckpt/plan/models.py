"""The parameters of GPT-MoE models, from the arguments that Megatron calls by the same names. Pure.

Order, names and optimizer groups are those of the training program of this repository (scripts/gpt_moe):
megatron-core's GPT with DeepSpeed's MoE layer in every n-th transformer layer, matrices with weight decay and vectors
without.
Megatron-DeepSpeed's models have the same sizes under other names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from moc_ckpt.errors import ConfigError
from moc_ckpt.plan.zero_spec import TensorSpec, split_expert_groups
from moc_ckpt.state.unit import EXPERTS_MARK, MoELayer

__all__ = ["GPT2_VOCABULARY", "PRESETS", "GptMoe", "build_model", "tensor_specs"]

GPT2_VOCABULARY = 50257

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": {
            "num_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "seq_length": 128,
            "num_experts": (8,),
            "vocab_size": 257,
            "make_vocab_size_divisible_by": 1,
        },
        "gpt-125m-8e": {
            "num_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "seq_length": 2048,
            "num_experts": (8,),
        },
        "gpt-350m-16e": {
            "num_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "seq_length": 2048,
            "num_experts": (16,),
        },
    }
)
"""Arguments of `build_model`: the sizes of the training program's presets. The tiny one reads bytes, the others are
planned with GPT-2's vocabulary."""

_DECAY, _NO_DECAY = 0, 1


@dataclass(frozen=True, slots=True)
class GptMoe:
    """The sizes of a GPT-MoE model, checked.

    Attributes:
        hidden: width of the model, in elements; as ffn.
        ffn: width inside an MLP or expert.
        positions: rows of the learned position embedding.
        vocabulary: rows of the token embedding, padding included.
        experts: number of experts of each transformer layer; 1 where it has a plain MLP.
        tied: the output layer uses the token embedding.
    """

    hidden: int
    ffn: int
    positions: int
    vocabulary: int
    experts: tuple[int, ...]
    tied: bool = True

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The MoE layers, in order."""
        found = [(number, count) for number, count in enumerate(self.experts) if count > 1]
        return tuple(
            MoELayer(ordinal, f"decoder.layers.{number}.mlp", count) for ordinal, (number, count) in enumerate(found)
        )

    @property
    def parameters(self) -> tuple[int, int]:
        """(parameters of the whole model, those of them that are in experts)."""
        inside = total = 0
        for _, shape, layer, _ in _parameters(self):
            total += math.prod(shape)
            inside += math.prod(shape) if layer is not None else 0
        return total, inside


def build_model(
    *,
    num_layers: int,
    hidden_size: int,
    seq_length: int,
    num_experts: Sequence[int],
    num_attention_heads: int = 1,
    ffn_hidden_size: int | None = None,
    max_position_embeddings: int | None = None,
    vocab_size: int = GPT2_VOCABULARY,
    make_vocab_size_divisible_by: int = 128,
    expert_interval: int = 2,
    topk: int = 1,
    untie_embeddings_and_output_weights: bool = False,
) -> GptMoe:
    """Checks the model's arguments and returns its sizes.

    Args:
        num_layers: transformer layers.
        hidden_size: width of the model.
        seq_length: tokens per sample.
        num_experts: experts of every MoE layer, or a number for each MoE layer; 1 makes it a plain MLP.
        num_attention_heads: checked only; no size depends on it.
        ffn_hidden_size: width inside an MLP or expert; None means 4 x hidden_size.
        max_position_embeddings: learned positions; None means seq_length.
        vocab_size: tokens of the vocabulary.
        make_vocab_size_divisible_by: the embedding is padded to a multiple of it.
        expert_interval: every n-th transformer layer is an MoE layer.
        topk: experts per token; checked only.
        untie_embeddings_and_output_weights: the output layer has weights of its own.

    Raises:
        ConfigError: naming every argument that is wrong.
    """
    ffn = 4 * hidden_size if ffn_hidden_size is None else ffn_hidden_size
    positions = seq_length if max_position_embeddings is None else max_position_embeddings
    counts = {
        "--num-layers": num_layers,
        "--hidden-size": hidden_size,
        "--seq-length": seq_length,
        "--num-attention-heads": num_attention_heads,
        "--ffn-hidden-size": ffn,
        "--vocab-size": vocab_size,
        "--make-vocab-size-divisible-by": make_vocab_size_divisible_by,
        "--expert-interval": expert_interval,
        "--topk": topk,
    }
    problems = [f"{name} {value} must be at least 1" for name, value in counts.items() if value < 1]
    if not problems:
        problems = _contradictions(
            num_layers, hidden_size, seq_length, num_experts, num_attention_heads, positions, expert_interval, topk
        )
    if problems:
        raise ConfigError("; ".join(problems), where="the model's arguments", fix="correct what is named")
    layers = num_layers // expert_interval
    each = tuple(num_experts) * layers if len(num_experts) == 1 else tuple(num_experts)
    experts = tuple(
        1 if number % expert_interval else each[number // expert_interval - 1] for number in range(1, num_layers + 1)
    )
    unit = make_vocab_size_divisible_by
    return GptMoe(
        hidden=hidden_size,
        ffn=ffn,
        positions=positions,
        vocabulary=-(-vocab_size // unit) * unit,
        experts=experts,
        tied=not untie_embeddings_and_output_weights,
    )


def _contradictions(
    num_layers: int,
    hidden: int,
    seq_length: int,
    num_experts: Sequence[int],
    heads: int,
    positions: int,
    interval: int,
    topk: int,
) -> list[str]:
    layers = num_layers // interval
    problems = []
    if hidden % heads:
        problems.append(f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}")
    if seq_length > positions:
        problems.append(f"--seq-length {seq_length} exceeds --max-position-embeddings {positions}")
    if len(num_experts) not in (1, layers):
        problems.append(
            f"--num-experts has {len(num_experts)} numbers; --num-layers {num_layers} and --expert-interval {interval} "
            f"make {layers} MoE layers, so give 1 number or {layers}"
        )
    for place, count in enumerate(num_experts):
        which = "" if len(num_experts) == 1 else f" (number {place})"
        if count < 1:
            problems.append(f"--num-experts {count}{which} must be at least 1")
        elif 1 < count < topk:
            problems.append(f"--topk {topk} exceeds --num-experts {count}{which}")
    if not layers and max(num_experts, default=1) > 1:
        problems.append(f"--expert-interval {interval} leaves no MoE layer among --num-layers {num_layers}")
    return problems


def tensor_specs(model: GptMoe, ep: int, dtype: str) -> tuple[TensorSpec, ...]:
    """Returns every parameter of the model with the optimizer group it is in.

    The order is that of `model.parameters()`, with all experts of a layer in place of those of one rank. Groups are
    numbered as on every rank: matrices (weight decay), vectors (none), then the experts' matrices and the experts'
    vectors, each split where DeepSpeed's limit for one rank is passed.

    Args:
        model: the sizes.
        ep: expert-parallel size: ranks that share one set of experts.
        dtype: of the weights, e.g. `bfloat16`.

    Raises:
        ConfigError: if the experts of a layer do not divide over `ep` ranks.
    """
    for layer in model.moe_layers:
        if ep < 1 or layer.num_experts % ep:
            raise ConfigError(
                f"the {layer.num_experts} experts of MoE layer {layer.ordinal} do not divide over {ep} "
                "expert-parallel ranks",
                where="--num-experts, --ep",
                fix="choose an expert-parallel size that divides the number of experts of every layer",
            )
    counts = tuple(layer.num_experts for layer in model.moe_layers)
    specs = [
        TensorSpec(name, shape, _DECAY if len(shape) > 1 else _NO_DECAY, layer_of, expert, dtype)
        for name, shape, layer_of, expert in _parameters(model)
    ]
    groups = {spec.fqn: spec.group for spec in split_expert_groups(specs, counts, (ep,) * len(counts))}
    return tuple(replace(spec, group=groups[spec.fqn]) for spec in specs)


def _parameters(model: GptMoe) -> Iterator[tuple[str, tuple[int, ...], int | None, int | None]]:
    """Yields (name, shape, MoE layer, expert) of every parameter; the last two are None outside experts."""
    hidden = model.hidden
    yield "embedding.word_embeddings.weight", (model.vocabulary, hidden), None, None
    yield "embedding.position_embeddings.weight", (model.positions, hidden), None, None
    ordinal = 0
    for number, experts in enumerate(model.experts):
        stem = f"decoder.layers.{number}."
        attention: tuple[tuple[str, tuple[int, ...]], ...] = (
            ("input_layernorm.weight", (hidden,)),
            ("input_layernorm.bias", (hidden,)),
            ("self_attention.linear_proj.weight", (hidden, hidden)),
            ("self_attention.linear_proj.bias", (hidden,)),
            ("self_attention.linear_qkv.weight", (3 * hidden, hidden)),
            ("self_attention.linear_qkv.bias", (3 * hidden,)),
            ("pre_mlp_layernorm.weight", (hidden,)),
            ("pre_mlp_layernorm.bias", (hidden,)),
        )
        for name, shape in attention:
            yield stem + name, shape, None, None
        if experts == 1:
            for name, shape in _expert(model):
                yield f"{stem}mlp.{name}", shape, None, None
            continue
        yield f"{stem}mlp.deepspeed_moe.gate.wg.weight", (experts, hidden), None, None
        for expert in range(experts):
            for name, shape in _expert(model):
                yield f"{stem}mlp{EXPERTS_MARK}{expert}.{name}", shape, ordinal, expert
        ordinal += 1
    yield "decoder.final_layernorm.weight", (hidden,), None, None
    yield "decoder.final_layernorm.bias", (hidden,), None, None
    if not model.tied:
        yield "output_layer.weight", (model.vocabulary, hidden), None, None


def _expert(model: GptMoe) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The parameters of one MLP, which is what an expert is."""
    return (
        ("linear_fc1.weight", (model.ffn, model.hidden)),
        ("linear_fc1.bias", (model.ffn,)),
        ("linear_fc2.weight", (model.hidden, model.ffn)),
        ("linear_fc2.bias", (model.hidden,)),
    )
