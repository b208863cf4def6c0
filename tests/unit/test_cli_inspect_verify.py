from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from storage_samples import flip, make_store, save, write_rank
from typer.testing import CliRunner

from moc_ckpt.cli.common import age, size
from moc_ckpt.cli.main import app
from moc_ckpt.storage.checkpoint import load_manifest, manifest_key
from moc_ckpt.storage.manifest import FragmentTable, MoELayerRecord, UnitRecord, encode_manifest
from moc_ckpt.storage.store import Store

runner = CliRunner()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store("local", tmp_path)
    save(store, "global_step10", 10)
    save(store, "global_step20", 20, experts=[(0, 0), (0, 1), (1, 3)])
    return store


def run(*args: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_inspect_json(store: Store) -> None:
    code, out, err = run("inspect", store.url, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["tag"], data["step"], data["attempt"], data["parameters"]) == ("global_step20", 20, 1, 275)
    assert data["bytes"] == sum(data["kinds"].values()) == sum(unit["bytes"] for unit in data["units"])
    versions = {unit["name"]: unit["version"] for unit in data["units"]}
    assert versions["expert/0/0"] == {"attempt": 1, "step": 20}
    assert versions["expert/0/2"] == {"attempt": 1, "step": 10}
    behind = {unit["name"]: unit["behind"] for unit in data["units"]}
    fresh = {"expert/0/0", "expert/0/1", "expert/1/3"}
    experts = {f"expert/{layer}/{expert}" for layer in range(2) for expert in range(4)}
    assert behind == {"dense/h.0.attn": None, **{name: 0 if name in fresh else 10 for name in experts}}
    assert data["plt"] is None and data["ledger"] is None and data["older_tags"] == ["global_step10"]
    behind = {unit["name"]: unit["behind"] for unit in data["units"]}
    fresh = {"expert/0/0", "expert/0/1", "expert/1/3"}
    experts = {f"expert/{layer}/{expert}" for layer in range(2) for expert in range(4)}
    assert behind == {"dense/h.0.attn": None, **{name: 0 if name in fresh else 10 for name in experts}}
    assert data["plt"] is None and data["ledger"] is None and data["older_tags"] == ["global_step10"]
    assert data["topology"]["expert_parallel"] == {"ep_size_2": 2}
    assert [tag["tag"] for tag in data["tags"]] == ["global_step20", "global_step10"]
    assert data["tags"][0]["error"] is None
    assert json.loads(run("inspect", store.url, "global_step10", "--json")[1])["step"] == 10


def test_inspect_for_people(store: Store) -> None:
    code, out, _ = run("inspect", store.url)
    out = " ".join(out.split())
    assert code == 0
    for text in (
        "global_step20",
        "2 ranks, ZeRO stage 1, bf16; expert parallel: ep_size_2 2",
        "exp_avg",
        "275",
        f"{2 * 4 * (35 + 8 * 30) / 275:.2f} bytes per parameter",
        "0: 0-1",
        "10: 2-3",
        "0: 3",
        "10: 0-2",
        "global_step10",
        "(this one)",
        "1 older tag: global_step10",
        "4 in each of 2 MoE layers: 3 from step 20, 5 older, by 10 steps at most",
        "layer 0 2 oldest 0 . . 1 1 10 1 1 1 1 . 10 steps behind: . 0 1 10",
    ):
        assert text in out, text
    assert "PLT" not in out


def test_inspect_of_a_checkpoint_with_all_experts_is_short(store: Store) -> None:
    code, out, _ = run("inspect", store.url, "global_step10")
    assert code == 0 and "4 in each of 2 MoE layers, all from step 10" in " ".join(out.split())
    assert "steps behind" not in out and "MoE layers:" not in out


LEDGER: dict[str, Any] = {
    "plt": 0.01234,
    "k": [2, 4],
    "recoveries": [
        {"step": 12, "attempt": 1, "lost": [100, 20], "plt": 0.004},
        {"step": 15, "attempt": 2, "lost": [1000, 114], "plt": 0.01234},
    ],
    "processed": [[10_000, 20_000, 30_000, 40_000], [50_000, 0, 0, 0]],
    "lost": [[1000, 0, 100, 0], [134, 0, 0, 0]],
    "routed": [100_000, 50_000],
}


def add_ledger(store: Store, ledger: dict[str, Any]) -> None:
    manifest = load_manifest(store, "global_step20")
    store.write(manifest_key("global_step20"), encode_manifest(msgspec.structs.replace(manifest, ledger=ledger)))


def test_inspect_shows_the_lost_tokens(store: Store) -> None:
    add_ledger(store, LEDGER)
    data = json.loads(run("inspect", store.url, "--json")[1])
    assert data["plt"] == 0.01234
    assert data["ledger"] == {
        "plt": 0.01234,
        "k": [2, 4],
        "recoveries": LEDGER["recoveries"],
        "tokens_lost": 1234,
        "tokens_lost_per_layer": [1100, 134],
        "tokens_processed": 150_000,
    }
    out = " ".join(run("inspect", store.url)[1].split())
    assert "PLT 1.23 % (2 recoveries, 1,234 tokens lost)" in out
    assert "last recovery: step 15 of attempt 2, 1,114 tokens lost" in out
    assert "K 2 to 4 per MoE layer" in out


@pytest.mark.parametrize(
    ("ledger", "text", "lost"),
    [
        ({}, "PLT unknown", None),
        ({"plt": 0.0, "recoveries": [], "k": [1, 1]}, "PLT 0.00 % (0 recoveries, 0 tokens lost) K 1 per MoE layer", 0),
        (
            {"plt": 0.5, "recoveries": [{"lost": [1, 2]}, {"step": 3, "lost": [4]}]},
            "50.00 % (2 recoveries, 7 tokens",
            7,
        ),
        ({"plt": 0.5, "lost": [[1], [2, 3]]}, "PLT 50.00 % (6 tokens lost)", 6),
        ({"plt": None, "recoveries": [{}]}, "PLT unknown (1 recovery, 0 tokens lost)", 0),
        ({"plt": "?", "k": 3, "recoveries": None, "lost": "x", "processed": None}, "PLT unknown", 0),
    ],
)
def test_ledgers_that_lack_something(store: Store, ledger: dict[str, Any], text: str, lost: int | None) -> None:
    add_ledger(store, ledger)
    code, out, _ = run("inspect", store.url)
    assert code == 0 and text in " ".join(out.split())
    code, out, _ = run("inspect", store.url, "--json")
    data = json.loads(out)
    assert code == 0 and data["ledger"]["tokens_lost"] == lost
    assert data["plt"] == data["ledger"]["plt"]


def give_layers(store: Store, layers: list[int], keep: int) -> None:
    """Gives the newest manifest other layers, with `keep` experts from each of the last steps."""
    manifest = load_manifest(store, "global_step20")
    units = [
        UnitRecord(f"expert/{layer}/{expert}", 1, 1000 - 10 * (expert // keep), 1)
        for layer, count in enumerate(layers)
        for expert in range(count)
    ]
    manifest = msgspec.structs.replace(
        manifest,
        step=1000,
        units=units,
        fragments=FragmentTable.from_rows((0, *row[1:]) for row in manifest.fragments),
        moe_layers=[MoELayerRecord(layer, f"h.{layer}.moe", count) for layer, count in enumerate(layers)],
    )
    store.write(manifest_key("global_step20"), encode_manifest(manifest))


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize(("layers", "keep"), [([1], 1), ([4, 16, 2], 4), ([256] * 60, 8), ([256], 8), ([64] * 12, 2)])
def test_maps_fit_the_terminal(
    store: Store, layers: list[int], keep: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_layers(store, layers, keep)
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run("inspect", store.url)
    lines = out.splitlines()
    assert code == 0 and all(len(line) <= width for line in lines)
    assert ("steps behind:" in out) == (layers != [1])
    # The table of exact ages is there only if it is short.
    assert any(line.lstrip().startswith(("│", "|")) and "h.1.moe" in line for line in lines) == (len(layers) == 3)
    if len(layers) == 60:
        assert "neighbouring experts" in out and "exact ages: --json" in out and len(lines) < 120
    data = json.loads(run("inspect", store.url, "--json")[1])
    assert [unit["behind"] for unit in data["units"]] == [e // keep * 10 for count in layers for e in range(count)]


def test_without_latest_the_newest_commit_is_shown(store: Store) -> None:
    store.delete("latest")
    assert json.loads(run("inspect", store.url, "--json")[1])["tag"] == "global_step20"


def test_damaged_neighbours_do_not_hide_the_rest(store: Store) -> None:
    store.write("global_step10/manifest.json", b"{")
    code, out, _ = run("inspect", store.url, "--json")
    assert code == 0
    assert [bool(tag["error"]) for tag in json.loads(out)["tags"]] == [False, True]
    assert run("inspect", store.url)[0] == 0


def test_verify_intact(store: Store) -> None:
    code, out, _ = run("verify", store.url)
    assert code == 0 and out.startswith("ok global_step20 (step 20):") and "all intact" in out
    code, out, _ = run("verify", store.url, "global_step10", "--json")
    data = json.loads(out)
    assert code == 0 and data["ok"] and data["problems"] == [] and data["step"] == 10 and data["bytes"] > 0


def test_verify_damaged(store: Store) -> None:
    assert store.local_path is not None
    victim = next(store.local_path.glob("global_step10/*/packs/rank_00000.experts/c/0"))
    flip(victim, 0)
    code, out, _ = run("verify", store.url)  # global_step20 needs experts of global_step10
    assert code == 1
    assert str(victim) in out and "checksum mismatch" in out and "expert/0/2" in out and "what to do" in out
    code, out, _ = run("verify", store.url, "--json")
    data = json.loads(out)
    assert code == 1 and not data["ok"]
    assert {"file", "unit", "tensor", "what", "expected", "found"} <= set(data["problems"][0])


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_errors_say_what_where_and_what_to_do(verb: str, store: Store, tmp_path: Path) -> None:
    code, out, err = run(verb, store.url, "nothing")
    assert code == 2 and out == ""
    assert "error: there is no checkpoint 'nothing'" in err
    assert store.url in err and "there are: global_step10, global_step20" in err
    assert "Traceback" not in err
    code, out, err = run(verb, tmp_path / "nowhere", "--json")
    assert code == 2
    assert json.loads(out)["error"]["what"] == "the checkpoint directory does not exist"
    (tmp_path / "empty").mkdir()
    code, _, err = run(verb, tmp_path / "empty")
    assert code == 2 and "there is no checkpoint in this directory" in err


def test_damage_and_foreign_checkpoints_and_unfinished_saves(store: Store) -> None:
    write_rank(store, "half", "s", 0, step=30, attempt=1)
    assert "was not finished" in run("inspect", store.url, "half")[2]
    store.write("native/mp_rank_00_model_states.pt", b"x")
    code, _, err = run("inspect", store.url, "native")
    assert code == 2 and "DeepSpeed itself" in err
    store.write("global_step20/manifest.json", b"{")
    code, _, err = run("inspect", store.url)
    assert code == 1 and "truncated" in err and "global_step20/manifest.json" in err


@pytest.mark.parametrize("args", [["inspect"], ["nothing"], ["verify", "--bad"], ["inspect", "a", "b", "c"]])
def test_wrong_use_is_status_2(args: list[str]) -> None:
    code, _, err = run(*args)
    assert code == 2 and "Usage" in err


def test_help_and_version() -> None:
    code, out, _ = run("--help")
    assert code == 0 and "inspect" in out and "verify" in out and "Exit status" in out
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("moc-ckpt ")
    for verb in ("inspect", "verify"):
        code, out, _ = run(verb, "--help")
        assert code == 0 and "--json" in out and "DIR" in out


def test_the_command_line_imports_neither_torch_nor_deepspeed(store: Store) -> None:
    script = (
        "import sys\nfrom moc_ckpt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    bad = sorted({'torch', 'deepspeed', 'tensorstore'} & set(sys.modules))\n"
        "    sys.exit(f'imported {bad}' if bad else end.code)\n"
    )
    for verb in ("inspect", "verify"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, store.url], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_sizes_and_ages_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 << 10, 5 << 30, 2 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
        "2.0 TiB",
    ]
    assert [age(s) for s in (-5, 90, 600, 7200, 200_000)] == ["0 s", "90 s", "10 min", "2 h", "2 days"]
