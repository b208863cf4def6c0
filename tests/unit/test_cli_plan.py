"""`moc-ckpt plan`: options, ds_config, what is refused, what is printed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Verb

VERB = Verb("plan", errors=("ConfigError", "UnsupportedError"))
run, data, refused = VERB.run, VERB.data, VERB.refused

KEYS = {
    "total_bytes",
    "full_bytes",
    "native_bytes",
    "ratio_to_native",
    "bottleneck_bytes",
    "bottleneck_optimum_bytes",
    "optimum_proven",
    "mean_bytes",
    "cycle",
    "expected_plt_per_fault",
    "ratio_to_full",
    "per_rank",
    "baseline_bottleneck_bytes",
    "snapshot",
}
PARAMETERS = 1_866_987_520
IN_EXPERTS = 1_611_595_776


def write(path: Path, config: Any) -> Path:
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


# ------------------------------------------------------------------------------------------- numbers


def test_gpt_350m_16e_with_one_expert() -> None:
    found = data("--preset", "gpt-350m-16e", "--world", 16, "--ep", 8, "--k-persist", 1, "--stage", 2)
    assert set(found) >= KEYS
    assert found["total_bytes"] == 12 * (PARAMETERS - IN_EXPERTS + IN_EXPERTS // 16)
    assert found["full_bytes"] == 12 * PARAMETERS
    assert found["native_bytes"] == 14 * PARAMETERS
    assert found["ratio_to_native"] == found["total_bytes"] / found["native_bytes"] <= 0.167
    assert found["ratio_to_full"] == found["total_bytes"] / found["full_bytes"]
    assert found["mean_bytes"] == round(found["total_bytes"] / 16)
    assert (found["bottleneck_bytes"], found["optimum_proven"]) == (found["bottleneck_optimum_bytes"], True)
    assert found["per_rank"]["max"] == found["bottleneck_bytes"]
    assert found["per_rank"]["min"] <= found["per_rank"]["mean"] <= found["per_rank"]["max"]
    assert (found["cycle"], found["expected_plt_per_fault"]) == (16, None)
    assert found["snapshot"]["k"] == [16] * 12 and found["snapshot"]["total_bytes"] == found["full_bytes"]
    assert found["model"]["vocabulary"] == 50304
    assert (found["model"]["parameters"], found["model"]["expert_parameters"]) == (PARAMETERS, IN_EXPERTS)
    assert found["run"] == {
        "world": 16,
        "ep": 8,
        "stage": 2,
        "dtype": "bfloat16",
        "selection": "sequential",
        "sharding": "adaptive",
        "balance": "fill",
        "save_weights": "derive",
    }


def test_expected_plt() -> None:
    args = ("--preset", "tiny", "--k-persist", 2, "--interval", 50)
    assert data(*args)["expected_plt_per_fault"] is None
    found = data(*args, "--total-steps", 1000)
    assert found["expected_plt_per_fault"] == pytest.approx((4 - 1) / 2 * 50 / 1000)
    assert found["snapshot"]["expected_plt_per_fault"] == 0


def test_snapshots_are_filled_up_unless_told_not_to() -> None:
    args = ("--preset", "gpt-350m-16e", "--world", 16, "--ep", 8, "--k-snapshot", 1)
    filled, plain = data(*args), data(*args, "--balance", "none")
    assert filled["snapshot"]["bottleneck_bytes"] == plain["snapshot"]["bottleneck_bytes"]
    assert filled["snapshot"]["total_bytes"] >= plain["snapshot"]["total_bytes"] == plain["total_bytes"]
    assert filled["total_bytes"] == plain["total_bytes"], "checkpoints are never filled up"
    assert filled["k"] == [1] * 12, "auto persists as many as a snapshot takes"


def test_options_of_the_model_override_the_preset() -> None:
    base = data("--preset", "tiny")
    wide = data("--preset", "tiny", "--hidden-size", 256, "--vocab-size", 300, "--make-vocab-size-divisible-by", 64)
    assert wide["model"]["vocabulary"] == 320 and base["model"]["vocabulary"] == 257
    assert wide["model"]["parameters"] > 3 * base["model"]["parameters"]
    untied = data("--preset", "tiny", "--untie-embeddings-and-output-weights")
    assert untied["model"]["parameters"] == base["model"]["parameters"] + 257 * 128
    assert data("--preset", "tiny", "--max-position-embeddings", 130)["model"]["parameters"] == (
        base["model"]["parameters"] + 2 * 128
    )


def test_a_model_by_arguments_with_megatrons_list_of_experts() -> None:
    sizes = ("--num-layers", 8, "--hidden-size", 64, "--seq-length", 32, "--num-attention-heads", 4)
    one = data(*sizes, "--num-experts", 4, 8, 16, 16, "--ep", 2, "--world", 4, "--k-persist", 8)
    assert one["model"]["experts"] == [4, 8, 16, 16]
    assert one["k"] == [4, 8, 8, 8] and one["cycle"] == 2
    assert one["model"]["vocabulary"] == 50304
    again = data("--moe-expert-parallel-size=2", "--num-experts=4", "--num-experts=8", "--num-experts", 16, 16, *sizes,
                 "--world", 4, "--k-persist", 8)  # fmt: skip
    assert again == one
    every = data(*sizes, "--num-experts", 4, "--expert-interval", 1, "--ffn-hidden-size", 100, "--topk", 2)
    assert every["model"]["experts"] == [4] * 8
    assert every["model"]["expert_parameters"] == 8 * 4 * (2 * 64 * 100 + 100 + 64)


def test_the_mean_over_a_cycle_is_said() -> None:
    found = data("--preset", "tiny", "--k-persist", 3)
    model = found["model"]
    dense = model["parameters"] - model["expert_parameters"]
    assert found["cycle"] == 3
    assert found["total_bytes"] == round(12 * (dense + model["expert_parameters"] / 3))
    assert "K_persist 3 does not divide the 8 experts of MoE layer 0" in found["notes"][0]
    assert not [note for note in data("--preset", "tiny", "--k-persist", 4)["notes"] if "divide" in note]


def test_load_aware_and_full() -> None:
    args = ("--preset", "tiny", "--world", 4, "--ep", 4, "--k-persist", 3)
    aware = data(*args, "--selection", "load_aware")
    model = aware["model"]
    each = 12 * model["expert_parameters"] // 8
    assert aware["total_bytes"] == 12 * (model["parameters"] - model["expert_parameters"]) + 3 * each
    assert aware["worst_case_bottleneck_bytes"] >= aware["bottleneck_bytes"]
    assert any("equally loaded" in note for note in aware["notes"])
    full = data(*args, "--selection", "full")
    assert full["total_bytes"] == full["full_bytes"] and full["cycle"] == 1


# ----------------------------------------------------------------------------------------- ds_config


def test_the_ds_config_is_read_and_options_win(tmp_path: Path) -> None:
    section = {"enabled": True, "selection": "sequential", "k_snapshot": 4, "k_persist": 2, "balance": "none"}
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1},
        "fp16": {"enabled": True, "loss_scale": "auto"},
        "moc_checkpoint": {**section, "save_weights": "sharded", "sharding": "equal"},
    }
    args = ("--preset", "tiny", "--ds-config", write(tmp_path / "ds.json", config), "--world", 4, "--ep", 2)
    found = data(*args)
    assert found["run"] == {
        "world": 4,
        "ep": 2,
        "stage": 1,
        "dtype": "float16",
        "selection": "sequential",
        "sharding": "equal",
        "balance": "none",
        "save_weights": "sharded",
    }
    assert found["k"] == [2, 2] and found["snapshot"]["k"] == [4, 4]
    assert found["full_bytes"] == 14 * found["model"]["parameters"]
    over = data(
        *args,
        *("--stage", 0, "--precision", "fp32", "--k-persist", "auto", "--k-snapshot", 8, "--selection", "full"),
        *("--sharding", "adaptive", "--balance", "fill", "--save-weights", "derive"),
    )
    assert over["run"] == {
        "world": 4,
        "ep": 2,
        "stage": 0,
        "dtype": "float32",
        "selection": "full",
        "sharding": "adaptive",
        "balance": "fill",
        "save_weights": "derive",
    }
    assert over["full_bytes"] == 12 * over["model"]["parameters"]


def test_a_plain_ds_config_means_what_deepspeed_takes_it_for(tmp_path: Path) -> None:
    """No section of the plugin: K is all; no precision: fp32; no stage: 0."""
    found = data("--preset", "tiny", "--ds-config", write(tmp_path / "ds.json", {"train_batch_size": 8}))
    assert (found["run"]["stage"], found["run"]["dtype"], found["k"]) == (0, "float32", [8, 8])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"moc_checkpoint": {"k_persit": 2}}, ["k_persit", "k_persist"]),
        ({"moc_checkpoint": {"k_persist": 0}}, ["k_persist", "0"]),
        ({"moc_checkpoint": {"k_persist": 4, "k_snapshot": 2}}, ["k_persist is 4", "k_snapshot 2"]),
        ({"moc_checkpoint": {"k_persist": 9}}, ["k_persist is 9", "layer 0", "8 experts"]),
        ({"moc_checkpoint": 3}, ["moc_checkpoint", "3"]),
        ({"moc_checkpiont": {"k_persist": 2}}, ["moc_checkpiont", "moc_checkpoint"]),
        ({"zero_optimization": {"stage": 3}}, ["stage 3"]),
        ({"zero_optimization": {"stage": "two"}}, ["stage", "two"]),
        ({"zero_optimization": 2}, ["zero_optimization"]),
        ({"optimizer": {"type": "SGD"}}, ["SGD"]),
        ("{", ["cannot be read"]),
        ("[1]", ["not a JSON object"]),
    ],
)
def test_a_bad_ds_config_is_refused(tmp_path: Path, config: Any, words: list[str]) -> None:
    text = refused("--preset", "tiny", "--ds-config", write(tmp_path / "ds.json", config))
    for word in words:
        assert word in text


def test_an_absent_ds_config_is_refused(tmp_path: Path) -> None:
    assert "nothing.json" in refused("--preset", "tiny", "--ds-config", tmp_path / "nothing.json")


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--k-persist", 9), ["k_persist is 9", "layer 0", "8 experts"]),
        (("--k-snapshot", 17, "--k-persist", 1), ["k_snapshot is 17", "8 experts"]),
        (("--k-persist", 0), ["--k-persist is 0"]),
        (("--k-persist", "many"), ["--k-persist is many"]),
        (("--k-persist", 4, "--k-snapshot", 3), ["k_persist is 4", "k_snapshot 3"]),
        (("--world", 6, "--ep", 4), ["4", "6"]),
        (("--world", 3, "--ep", 3), ["8 experts of MoE layer 0", "3"]),
        (("--world", 0), ["0 ranks"]),
        (("--interval", 0), ["interval is 0"]),
        (("--stage", 3), ["stage 3"]),
        (("--num-experts", 8, 8, 8), ["3 numbers", "2 MoE layers"]),
        (("--num-attention-heads", 5), ["--hidden-size 128", "--num-attention-heads 5"]),
    ],
)
def test_what_does_not_fit_is_refused(args: tuple[object, ...], words: list[str]) -> None:
    text = refused("--preset", "tiny", *args)
    for word in words:
        assert word in text


def test_a_model_needs_sizes() -> None:
    text = refused("--hidden-size", 64, "--num-experts", 4)
    for word in ("--num-layers", "--seq-length", "gpt-350m-16e"):
        assert word in text
    assert run("--preset", "gpt-5")[0] == 2
    assert run("--preset", "tiny", "--selection", "some")[0] == 2


# ---------------------------------------------------------------------------------------- for people


def test_for_people() -> None:
    args = ("--preset", "gpt-350m-16e", "--world", 16, "--ep", 8, "--k-persist", 1, "--k-snapshot", 4)
    code, out, err = run(*args, "--interval", 100, "--total-steps", 10_000)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for words in (
        "1,866,987,520 parameters",
        "12 x 16 experts",
        "16 ranks, EP 8, ZeRO-2, bfloat16",
        "1 of 16",
        "4 of 16",
        "16.3%",
        "19.1%",
        "20.9 GiB",
        "24.3 GiB",
        "7.500%",
        "largest checkpoint of each rank",
    ):
        assert words in text, words
    many = " ".join(run("--preset", "tiny", "--world", 512, "--ep", 8)[1].split())
    assert "0-31" in many and "480-511" in many
    uneven = " ".join(run("--preset", "tiny", "--k-persist", 3, "--selection", "load_aware")[1].split())
    assert "note: K_persist 3 does not divide" in uneven and "whatever the loads" in uneven


def test_10_000_ranks_in_2_seconds_without_torch() -> None:
    """CPU seconds of a whole process: other work on the machine does not count."""
    scale = float(os.environ.get("MOC_TEST_TIME_SCALE", "1"))
    program = (
        "import sys\n"
        "from moc_ckpt.cli.main import app\n"
        "try:\n"
        "    app()\n"
        "finally:\n"
        "    loaded = {'torch', 'deepspeed', 'megatron'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n"
    )
    for args in (("--k-persist", "1"), ("--k-persist", "2", "--k-snapshot", "8", "--ep", "8"), ("--stage", "0")):
        command = [sys.executable, "-c", program, "plan", "--preset", "gpt-350m-16e", "--world", "10000", "--ep", "16"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*command, *args, "--json"], capture_output=True, text=True, timeout=120, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["run"]["world"] == 10_000
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert spent < 2 * scale, f"{args}: {spent:.2f} s"
