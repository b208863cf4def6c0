from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from storage_samples import flip, make_store, save, write_rank
from typer.testing import CliRunner

from moc_ckpt.cli.common import age, size
from moc_ckpt.cli.main import app
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
        "1 older tag",
    ):
        assert text in out, text


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
