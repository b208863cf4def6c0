"""GPT-MoE sizes from model arguments; the real model is compared in tests/distributed/test_plan_bytes.py."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpt_moe import arguments
from gpt_moe.data import vocabulary

from moc_ckpt.errors import ConfigError
from moc_ckpt.plan.models import PRESETS, GptMoe, build_model, tensor_specs
from moc_ckpt.plan.zero_spec import MAX_GROUP_SIZE, TensorSpec

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 8, "seq_length": 6, "num_experts": (4,), "vocab_size": 20}


def test_presets_are_those_of_the_training_program() -> None:
    assert set(PRESETS) == set(arguments.PRESETS)
    for name, preset in PRESETS.items():
        args = arguments.parse_args(["--preset", name])
        arguments.resolve_batch(args, 1)
        arguments.validate(args, 1)
        theirs = build_model(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            ffn_hidden_size=args.ffn_hidden_size,
            seq_length=args.seq_length,
            max_position_embeddings=args.max_position_embeddings,
            num_experts=(args.num_experts,),
            expert_interval=args.expert_interval,
            topk=args.topk,
            untie_embeddings_and_output_weights=args.untie_embeddings_and_output_weights,
            # The tiny preset reads bytes, as the training program does; the others are planned with GPT-2's vocabulary.
            vocab_size=vocabulary(args) if name == "tiny" else 50257,
            make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        )
        assert build_model(**preset) == theirs
        for key, value in preset.items():
            if key not in ("num_experts", "vocab_size"):
                assert getattr(args, key) == value


def test_sizes_of_the_papers_models() -> None:
    """The numbers of parameters that were counted on real models."""
    assert build_model(**PRESETS["gpt-125m-8e"]).parameters == (323_641_344, 226_676_736)
    assert build_model(**PRESETS["gpt-350m-16e"]).parameters == (1_866_987_520, 1_611_595_776)
    assert build_model(**PRESETS["gpt-350m-16e"]).vocabulary == 50304


@given(
    layers=st.integers(1, 7),
    heads=st.integers(1, 3),
    ffn=st.one_of(st.none(), st.integers(1, 40)),
    interval=st.integers(1, 3),
    tied=st.booleans(),
    data=st.data(),
)
def test_parameters_by_formula(
    layers: int, heads: int, ffn: int | None, interval: int, tied: bool, data: st.DataObject
) -> None:
    hidden = 4 * heads
    count = layers // interval
    experts = data.draw(st.one_of(st.tuples(st.integers(1, 6)), st.tuples(*[st.integers(1, 6)] * count)))
    if not count:
        experts = (1,)
    model = build_model(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        seq_length=5,
        max_position_embeddings=9,
        vocab_size=30,
        make_vocab_size_divisible_by=16,
        num_experts=experts,
        expert_interval=interval,
        untie_embeddings_and_output_weights=not tied,
    )
    each = experts * count if len(experts) == 1 else experts
    width = 4 * hidden if ffn is None else ffn
    mlp = 2 * hidden * width + width + hidden
    attention = 4 * hidden * hidden + 4 * hidden + 4 * hidden
    moe = [n for n in each if n > 1]
    dense = (32 * (1 if tied else 2) + 9) * hidden + layers * attention + 2 * hidden
    dense += (layers - len(moe)) * mlp + sum(moe) * hidden
    assert model.parameters == (dense + sum(moe) * mlp, sum(moe) * mlp)
    assert [layer.num_experts for layer in model.moe_layers] == moe
    assert [layer.ordinal for layer in model.moe_layers] == list(range(len(moe)))


@given(
    counts=st.lists(st.sampled_from([1, 2, 4, 6, 8]), min_size=1, max_size=4),
    ep=st.sampled_from([1, 2]),
    tied=st.booleans(),
)
def test_specs(counts: list[int], ep: int, tied: bool) -> None:
    changes = {"num_layers": len(counts), "expert_interval": 1, "num_experts": tuple(counts)}
    model = build_model(**{**SIZES, **changes}, untie_embeddings_and_output_weights=not tied)
    specs = tensor_specs(model, ep, "bfloat16")
    assert sum(math.prod(spec.shape) for spec in specs) == model.parameters[0]
    assert sum(math.prod(spec.shape) for spec in specs if spec.layer is not None) == model.parameters[1]
    assert max(Counter(spec.fqn for spec in specs).values()) == 1
    for spec in specs:
        assert spec.dtype == "bfloat16" and not spec.is_buffer and not spec.frozen
        assert (spec.layer is None) == (spec.expert is None)
        vector = len(spec.shape) == 1
        assert spec.group == (2 * (spec.expert is not None)) + vector
        if spec.layer is not None:
            layer = model.moe_layers[spec.layer]
            assert spec.fqn.startswith(f"{layer.prefix}.deepspeed_moe.experts.deepspeed_experts.{spec.expert}.")
            assert 0 <= (spec.expert or 0) < layer.num_experts
    places = [(spec.layer, spec.expert) for spec in specs if spec.layer is not None]
    assert places == sorted(places)
    assert len(set(places)) == sum(layer.num_experts for layer in model.moe_layers)


def test_experts_are_split_into_groups_as_deepspeed_does() -> None:
    """GPT-350M-16E on 8 expert-parallel ranks: 2 x 12 experts of 8 M elements pass the limit of one group."""
    model = build_model(**PRESETS["gpt-350m-16e"])
    for ep, groups in ((16, 1), (8, 2), (1, 10)):
        specs = tensor_specs(model, ep, "bfloat16")
        local = 16 // ep
        for position in (0, ep - 1):
            mine = [spec for spec in specs if spec.expert is None or spec.expert // local == position]
            matrices = [spec for spec in mine if spec.expert is not None and len(spec.shape) == 2]
            # What the greedy rule makes of this rank's matrices in order.
            expected: list[list[TensorSpec]] = [[]]
            for spec in matrices:
                if sum(math.prod(one.shape) for one in [*expected[-1], spec]) > MAX_GROUP_SIZE:
                    expected.append([])
                expected[-1].append(spec)
            found = defaultdict(list)
            for spec in matrices:
                found[spec.group].append(spec)
            assert list(found.values()) == expected and list(found) == list(range(2, 2 + groups))
            vectors = {spec.group for spec in mine if spec.expert is not None and len(spec.shape) == 1}
            assert vectors == {2 + groups}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 9, "num_attention_heads": 4}, ["--hidden-size 9", "--num-attention-heads 4"]),
        ({"num_layers": 0}, ["--num-layers 0"]),
        ({"ffn_hidden_size": 0}, ["--ffn-hidden-size 0"]),
        ({"vocab_size": -5}, ["--vocab-size -5"]),
        ({"expert_interval": 0}, ["--expert-interval 0"]),
        ({"expert_interval": 5}, ["--expert-interval 5", "--num-layers 4"]),
        ({"max_position_embeddings": 3}, ["--seq-length 6", "--max-position-embeddings 3"]),
        ({"num_experts": (4, 8, 8)}, ["3 numbers", "2 MoE layers"]),
        ({"num_experts": (4, 0)}, ["--num-experts 0 (number 1)"]),
        ({"num_experts": ()}, ["0 numbers"]),
        ({"topk": 3, "num_experts": (4, 2)}, ["--topk 3", "--num-experts 2 (number 1)"]),
        ({"topk": 0, "num_layers": -1}, ["--topk 0", "--num-layers -1"]),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(**{**SIZES, **changes})
    for word in words:
        assert word in str(caught.value)


def test_experts_that_do_not_divide_are_refused_by_layer() -> None:
    model = build_model(**{**SIZES, "num_experts": (4, 6)})
    with pytest.raises(ConfigError, match="6 experts of MoE layer 1 do not divide over 4"):
        tensor_specs(model, 4, "float32")
    with pytest.raises(ConfigError, match="over 0"):
        tensor_specs(model, 0, "float32")


def test_one_expert_is_a_plain_mlp() -> None:
    """As in Megatron-DeepSpeed: a 1 in the list makes that layer dense, and the later MoE layers move up."""
    model = build_model(**{**SIZES, "num_layers": 6, "num_experts": (4, 1, 8)})
    assert model == GptMoe(hidden=8, ffn=32, positions=6, vocabulary=128, experts=(1, 4, 1, 1, 1, 8))
    assert [(layer.ordinal, layer.prefix) for layer in model.moe_layers] == [
        (0, "decoder.layers.1.mlp"),
        (1, "decoder.layers.5.mlp"),
    ]
