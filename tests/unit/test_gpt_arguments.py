"""Arguments, presets and the merge with a DeepSpeed file."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpt_moe.arguments import DEFAULTS, PRESETS, ArgumentError, build_parser, parse_args, validate
from gpt_moe.ds_config import absorb_file, build_ds_config, load_file


def settle(argv, world=4, file_config=None):
    args = parse_args(argv)
    conflicts = absorb_file(args, file_config or {}, world)
    validate(args, world)
    config, more = build_ds_config(args, file_config or {})
    return args, config, conflicts + more


def test_every_option_has_a_default_and_every_default_an_option():
    options = {action.dest for action in build_parser()._actions} - {"help"}
    assert options == set(DEFAULTS)
    for preset in PRESETS.values():
        assert set(preset) <= set(DEFAULTS)


def test_precedence_of_default_preset_and_argument():
    args = parse_args(["--preset", "gpt-350m-16e", "--hidden-size", "64"])
    assert (args.num_layers, args.num_experts, args.hidden_size) == (24, 16, 64)
    assert args.explicit == {"preset", "hidden_size"}
    assert parse_args([]).hidden_size == DEFAULTS["hidden_size"]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_valid_on_8_ranks(preset):
    args, config, conflicts = settle(["--preset", preset, "--moe-expert-parallel-size", "8", "--save", "x"], world=8)
    assert not conflicts
    assert args.global_batch_size == args.micro_batch_size * 8 * args.gradient_accumulation_steps
    assert config["train_batch_size"] == args.global_batch_size


def test_the_global_batch_survives_fewer_ranks():
    four, _, _ = settle(["--preset", "tiny"], world=4)
    one, _, _ = settle(["--preset", "tiny"], world=1)
    assert four.global_batch_size == one.global_batch_size
    assert (four.gradient_accumulation_steps, one.gradient_accumulation_steps) == (1, 4)
    eight, _, _ = settle(["--preset", "tiny"], world=8)
    assert eight.micro_batch_size == 1


def test_launchers_spell_the_local_rank_differently():
    assert parse_args(["--local_rank=3"]).local_rank == parse_args(["--local-rank", "3"]).local_rank == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bf16", "--fp16"], "--bf16 and --fp16"),
        (["--hidden-size", "130"], "--num-attention-heads"),
        (["--seq-length", "64", "--max-position-embeddings", "32"], "--max-position-embeddings"),
        (["--moe-expert-parallel-size", "3"], "--num-experts"),
        (["--moe-expert-parallel-size", "8"], "4 ranks"),
        (["--expert-interval", "9"], "no MoE layer"),
        (["--topk", "9"], "--topk"),
        (["--save-interval", "5"], "--save"),
        (["--no-moc", "--moc-checkpoint", "{}", "--moc-checkpoint", '{"k_persist": 1}'], "--moc-checkpoint"),
        (["--tokenizer-type", "null", "--data-path", "x"], "--vocab-size"),
        (["--tokenizer-type", "null", "--vocab-size", "9"], "--data-path"),
        (["--lazarus-slots", "3"], "--lazarus-slots needs --lazarus"),
        (["--lazarus-rebalance-interval", "3"], "--lazarus-rebalance-interval needs --lazarus"),
        (["--lazarus", "--lazarus-rebalance-interval", "-1"], "is a number of steps"),
        (["--lazarus", "--no-moc"], "--no-moc"),
        (["--lazarus", "--fp16"], "bf16 or fp32"),
        (["--lazarus", "--zero-stage", "0"], "--zero-stage 1 or 2"),
        (["--lazarus", "--num-experts", "1"], "--num-experts of 2"),
        (["--lazarus", "--lazarus-slots", "1"], "x 4 ranks do not hold --num-experts 8"),
        (["--lazarus", "--lazarus-fault-threshold", "5"], "between 1 and the 4 ranks"),
    ],
)
def test_contradictions_are_named(argv, words):
    with pytest.raises(ArgumentError, match=words):
        settle(argv)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ArgumentError, match="4 ranks"):
        settle(["--global-batch-size", "6"])
    with pytest.raises(ArgumentError, match="multiple"):
        settle(["--global-batch-size", "12", "--micro-batch-size", "2"])


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_moc_checkpoint_wants_a_json_object(text, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--moc-checkpoint", text])
    assert "JSON" in capsys.readouterr().err


def test_replicated_experts_by_default_have_deepspeeds_number_of_slots():
    args, config, _ = settle(["--lazarus", "--moe-expert-parallel-size", "2", "--lazarus-optimizer-state", "sharded"])
    assert args.lazarus_slots == 4
    assert config["lazarus"] == {"optimizer_state": "sharded"}
    assert "lazarus" not in settle([])[1]
    _, config, _ = settle(
        ["--lazarus", "--lazarus-rebalance-interval", "500", "--lazarus-fault-threshold", "2"],
        file_config={"lazarus": {"restart_s": 5}},
    )
    assert config["lazarus"] == {
        "optimizer_state": "replicated",
        "rebalance_interval": 500,
        "fault_threshold": 2,
        "restart_s": 5,
    }


def test_the_plugin_is_on_unless_told_otherwise():
    _, config, _ = settle(["--moc-checkpoint", '{"k_persist": 2}'])
    assert config["moc_checkpoint"] == {"enabled": True, "k_persist": 2}
    _, config, _ = settle(["--no-moc"], file_config={"moc_checkpoint": {"enabled": True}})
    assert "moc_checkpoint" not in config


def test_the_file_wins_and_conflicts_are_named():
    file_config = {
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "moc_checkpoint": {"k_persist": 1},
        "comms_logger": {"enabled": False},
    }
    argv = ["--zero-stage", "2", "--lr", "1e-3", "--moc-checkpoint", '{"k_persist": 2, "keep": 1}']
    args, config, conflicts = settle(argv, file_config=file_config)
    assert (args.zero_stage, args.bf16, args.clip_grad, args.lr) == (1, True, 0.5, 1e-5)
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert config["moc_checkpoint"] == {"enabled": True, "k_persist": 1, "keep": 1}
    assert config["comms_logger"] == {"enabled": False}
    assert len(conflicts) == 3
    assert "--zero-stage" in conflicts[0] and "--lr" in conflicts[1] and "k_persist" in conflicts[2]


def test_batch_sizes_of_the_file():
    args, config, conflicts = settle(
        ["--global-batch-size", "64"],
        file_config={"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    )
    assert (args.micro_batch_size, args.global_batch_size, args.gradient_accumulation_steps) == (2, 24, 3)
    assert config["train_batch_size"] == 24
    assert len(conflicts) == 1 and "--global-batch-size" in conflicts[0]
    with pytest.raises(ArgumentError, match="contradicts"):
        settle([], file_config={"train_batch_size": 16, "gradient_accumulation_steps": 3})


def test_auto_means_not_given(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "wall_clock_breakdown": True}))
    assert load_file(str(path)) == {"bf16": {}, "wall_clock_breakdown": True}
    assert load_file(None) == {}


@pytest.mark.parametrize("text", [None, "{", "[]", '{"zero_optimization": {"stage": 3}}'])
def test_bad_files_are_refused(tmp_path, text):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError, match=r"ds\.json"):
        load_file(str(path))
