"""`moc-ckpt placement`: where loads come from, what is printed, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cli_calls import Verb
from storage_samples import make_store, save

from moc_ckpt.lazarus.placement import mro, spread
from moc_ckpt.lazarus.probability import count_recoverable, probabilities
from moc_ckpt.lazarus.types import Placement
from moc_ckpt.pec.ledger import Ledger
from moc_ckpt.storage.checkpoint import manifest_key
from moc_ckpt.storage.manifest import encode_manifest

VERB = Verb("placement", {"COLUMNS": "120"})
run, data, text, refused = VERB.run, VERB.data, VERB.text, VERB.refused


# ---------------------------------------------------------------------------------------------- numbers


def test_loads() -> None:
    found = data("--loads", "5,3,1,1", "--nodes", 5, "--slots", 4, "--fault-threshold", 1)
    assert found["replicas"] == [10, 6, 2, 2]
    assert [len(held) for held in found["placement"]] == [4] * 5
    assert Placement(4, tuple(map(tuple, found["placement"]))).replicas() == (10, 6, 2, 2)
    survival = found["recovery_probability"]
    assert set(survival) >= {"mro", "spread", "compact"}
    assert survival["mro"] == [1, 1, 0.9, 0.7, 0.4, 0]  # Figure 4: 7/10 with 3 failed nodes
    assert survival["spread"] == list(probabilities(count_recoverable(spread([10, 6, 2, 2], 5, 4))))
    assert all(most >= ours for most, ours in zip(found["upper_bound"], survival["mro"], strict=True))
    assert found["imbalance"] == 1 and found["layers"][0]["replicas"] == found["replicas"]


def test_replicas_may_leave_slots_vacant() -> None:
    found = data("--replicas", "2,3,3,4", "--nodes", 5, "--slots", 4)
    assert found["replicas"] == [2, 3, 3, 4] and found["recovery_probability"]["mro"][3] == 0.7
    shown = text("--replicas", "2,3,3,4", "--nodes", 5, "--slots", 4)
    assert "(4 vacant)" in shown and "most loaded" not in shown


def test_where_the_published_construction_differs_it_is_shown() -> None:
    shown = text("--replicas", "3,3,3,3", "--nodes", 4, "--slots", 3)
    assert "mro_paper" in shown and "is the same as mro" not in shown and "75.0%" in shown
    assert "any 2 failed nodes are survived" in shown
    assert "is the same as mro" in text("--loads", "5,3,1,1", "--nodes", 5, "--slots", 4)


def test_for_people() -> None:
    shown = text("--loads", "50,30,10,10", "--nodes", 5, "--slots", 4, "--fault-threshold", 2, "--gpus-per-node", 2)
    for part in (
        "5 nodes of 4 slots: 20 slots per MoE layer",
        "at least 2 of each expert; any failed node is survived",
        "0 50 50.0% 10 50.0%",
        "most loaded node: 1.00 times the mean",
        "0-1 0 1 2 3",
        "GPU 0 GPU 1",
        "copies of experts in 20 slots",
        "by failed nodes",
        "3 70.0%",
        "at most: no placement of these replicas can exceed it",
    ):
        assert part in shown, part


def test_a_threshold_that_does_not_fit_is_said() -> None:
    args = ("--loads", "1,1,1", "--nodes", 4, "--slots", 2, "--fault-threshold", 3)
    found = data(*args)
    assert (found["fault_threshold"], found["fault_threshold_asked"]) == (2, 3)
    assert found["note"] in text(*args)


def test_skew_is_over_the_mean() -> None:
    found = data("--skew", 4, "--experts", 8, "--nodes", 8, "--slots", 4)
    assert sum(found["loads"]) == 8_000_000 and found["loads"][0] == 4_000_000
    assert max(found["loads"][1:]) - min(found["loads"][1:]) <= 1
    assert found["replicas"] == [18, *[2] * 7]  # what rounding down leaves is for the last one
    assert data("--skew", 1, "--experts", 1, "--nodes", 2, "--slots", 1)["replicas"] == [2]


def test_racks() -> None:
    args = ("--loads", "1,1,1,1", "--nodes", 6, "--slots", 2, "--fault-threshold", 3)
    found = data(*args, "--racks", 3)
    assert found["racks"] == [0, 0, 1, 1, 2, 2]
    survival = found["rack_recovery_probability"]
    assert survival["mro"] == [1, 1, 1, 0] and survival["mro_unaware"][2] < 1
    assert found["recovery_probability"]["mro"] == data(*args)["recovery_probability"]["mro"]
    assert data(*args, "--racks", "7,7,7,9,9,9")["racks"] == [0, 0, 0, 1, 1, 1]
    assert "by failed racks" in text(*args, "--racks", 3)


# --------------------------------------------------------------------------------------- several layers


@pytest.mark.parametrize(
    "content",
    [
        "50 30 10 10\n10,10,10,10  # the second\n\n",
        "[[50, 30, 10, 10], [10, 10, 10, 10]]",
        '{"loads": [[50, 30, 10, 10], [10, 10, 10, 10]]}',
        '{"processed": [[50, 30, 10, 10], [10, 10, 10, 10]]}',
    ],
)
def test_files_of_loads(tmp_path: Path, content: str) -> None:
    path = tmp_path / "loads"
    path.write_text(content)
    args = ("--loads", path, "--nodes", 5, "--slots", 4)
    found = data(*args)
    assert [layer["loads"] for layer in found["layers"]] == [[50, 30, 10, 10], [10, 10, 10, 10]]
    plans = [mro(layer["replicas"], 5, 4) for layer in found["layers"]]
    assert found["recovery_probability"]["mro"] == list(probabilities(count_recoverable(*plans)))
    assert "replicas" not in found
    assert data(*args, "--layer", 1)["replicas"] == [5, 5, 5, 5]
    shown = text(*args)
    assert "2 MoE layers of 4 experts" in shown and "--layer N shows one in full" in shown
    assert "there is no MoE layer 2" in refused(*args, "--layer", 2)


def test_a_list_longer_than_a_file_name_may_be() -> None:
    loads = [1_000_000 + expert for expert in range(256)]
    found = data("--loads", ",".join(map(str, loads)), "--nodes", 32, "--slots", 9)
    assert found["loads"] == loads
    assert data("--loads", "1e3,5.0e2", "--nodes", 2, "--slots", 3)["replicas"] == [4, 2]


def test_a_checkpoints_ledger(tmp_path: Path) -> None:
    store = make_store("local", tmp_path)
    save(store, "global_step10", 10)
    manifest = save(store, "global_step20", 20)
    args = ("--checkpoint", store.url, "--nodes", 4, "--slots", 3)
    assert "no ledger of routed tokens" in refused(*args)
    ledger = Ledger.start([4, 4], [1, 1]).add([[9, 1, 1, 1], [3, 3, 3, 3]], [12, 12])
    store.write(
        manifest_key("global_step20"), encode_manifest(msgspec.structs.replace(manifest, ledger=ledger.to_data()))
    )
    found = data(*args)
    assert [layer["loads"] for layer in found["layers"]] == [[9, 1, 1, 1], [3, 3, 3, 3]]
    assert "no ledger" in refused(*args, "--tag", "global_step10")
    assert "does not exist" in refused("--checkpoint", tmp_path / "none", "--nodes", 4, "--slots", 3)


# ------------------------------------------------------------------------------------------- transfers


def test_transfers_from_an_old_plan(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(run("--skew", 4, "--experts", 16, "--nodes", 10, "--slots", 6, "--json")[1])
    args = ("--skew", 2, "--experts", 16, "--slots", 6, "--old", old, "--failed", "1,3", "--joined", 1)
    found = data(*args)
    moved = found["migration"]
    assert found["nodes"] == 9 and moved["nodes"] == [0, 2, 4, 5, 6, 7, 8, 9, 10]
    before = json.loads(old.read_text())["placement"]
    has = {node: set(before[node]) if node < 10 else set() for node in moved["nodes"]}
    for transfer in moved["transfers"]:
        assert transfer["expert"] in has[transfer["source"]]
    for node, held in zip(moved["nodes"], moved["placement"][0], strict=True):
        arrived = {item["expert"] for item in moved["transfers"] if item["destination"] == node}
        assert arrived == set(held) - has[node]
    assert moved["copies_moved"] == [len(moved["transfers"])] and moved["copies_moved"] <= moved["copies_moved_greedy"]
    shown = text(*args)
    assert "transfers from the old plan" in shown and f"{len(moved['transfers'])} move; greedy" in shown
    # What came out of a migration is an old plan again, with its nodes where they are.
    new = tmp_path / "new.json"
    new.write_text(json.dumps(found))
    again = data("--skew", 2, "--experts", 16, "--slots", 6, "--old", new)
    assert again["migration"]["transfers"] == [] and again["migration"]["placement"] == moved["placement"]


def test_an_expert_without_a_live_copy(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(run("--replicas", "1,3", "--nodes", 2, "--slots", 2, "--json")[1])
    args = ("--loads", "1,1", "--slots", 2, "--old", old, "--failed", 0)
    assert "no live node has a copy of expert 0 of MoE layer 0" in refused(*args, status=1)
    assert "1 experts have no live copy: 0 of layer 0" in text(*args, "--from-checkpoint")
    assert "another world: it has 2 places for 1 nodes" in refused(*args, "--nodes", 2)


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--nodes", 2, "--slots", 2), "loads of the experts are not known"),
        (
            ("--loads", "1,1", "--replicas", "1,1", "--nodes", 2, "--slots", 2),
            "--loads and --replicas exclude each other",
        ),
        (("--loads", "1,1", "--slots", 2), "the cluster is not known"),
        (("--loads", "1,x", "--nodes", 2, "--slots", 2), "there is no file '1,x'"),
        (("--loads", "1,-1", "--nodes", 2, "--slots", 2), "load of expert 1 is -1"),
        (("--loads", "", "--nodes", 2, "--slots", 2), "there are no experts"),
        (("--loads", "nan,1", "--nodes", 2, "--slots", 2), "load of expert 0 is nan"),
        (("--loads", "9" * 400 + ",1", "--nodes", 2, "--slots", 2), "load of expert 0 is 999"),
        (("--replicas", "1,b", "--nodes", 2, "--slots", 2), "--replicas is '1,b'"),
        (("--replicas", "1,4", "--nodes", 2, "--slots", 2), "expert 1 does not fit"),
        (("--replicas", "1,0", "--nodes", 2, "--slots", 2), "expert 1 is to have 0 replicas"),
        (("--loads", "1,1,1", "--nodes", 1, "--slots", 2), "expert 2 would get none"),
        (("--loads", "1,1", "--nodes", 2, "--slots", 2, "--fault-threshold", 3), "fault threshold of 3"),
        (("--skew", 3, "--nodes", 2, "--slots", 2), "--skew and --experts belong together"),
        (("--skew", 9, "--experts", 4, "--nodes", 2, "--slots", 2), "--skew 9 of 4 experts"),
        (("--loads", "1,1", "--nodes", 2, "--slots", 2, "--failed", "1"), "there is no old plan"),
        (("--loads", "1,1", "--nodes", 2, "--slots", 2, "--racks", "3"), "3 racks for 2 nodes"),
        (("--loads", "1,1", "--nodes", 2, "--slots", 2, "--racks", "0,1,1"), "racks of 3 nodes, and there are 2"),
        (("--loads", "1,1", "--nodes", 2, "--slots", 2, "--tag", "t"), "--tag is a checkpoint's"),
        (("--loads", "1,1", "--slots", 2, "--old", "/none.json"), "old plan cannot be read"),
        (("--loads", "1,1", "--nodes", 100_000, "--slots", 2), "100,000 nodes: survival is counted exactly"),
    ],
)
def test_wrong_use(args: tuple[object, ...], message: str) -> None:
    assert message in refused(*args)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "not JSON"),
        ('{"a": 1}', "has no loads"),
        ("[1, null]", "a load is None"),
        ("1 b", "a load is 'b'"),
        ("", "has no loads"),
        ("# tokens", "has no loads"),
        ("[]", "has no loads"),
        ('{"loads": []}', "has no loads"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "loads.txt"
    path.write_text(content)
    assert message in refused("--loads", path, "--nodes", 2, "--slots", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "AttributeError"),
        ('{"layers": []}', "it has no MoE layer"),
        ('{"replicas": [1, 1], "placement": [[0, 5], [1]]}', "a slot is given to expert 5"),
    ],
)
def test_files_that_are_no_old_plan(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    found = refused("--loads", "1,1", "--slots", 2, "--old", path)
    assert "the old plan cannot be read" in found and message in found and f"--old {path}" in found


# ---------------------------------------------------------------------------------- plot and imports


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    assert str(path) in text("--loads", "5,3,1,1", "--nodes", 5, "--slots", 4, "--plot", path).replace(" ", "")
    assert b"<svg" in path.read_bytes()
    assert "plot cannot be written" in refused(
        "--loads", "1", "--nodes", 1, "--slots", 1, "--plot", tmp_path / "a" / "b.svg"
    )


def test_needs_neither_torch_nor_scipy_nor_matplotlib() -> None:
    code = """
import sys
for name in ("torch", "deepspeed", "scipy", "matplotlib"):
    sys.modules[name] = None
from moc_ckpt.cli.main import main
sys.argv = ["moc-ckpt", "placement", "--loads", "5,3,1,1", "--nodes", "5", "--slots", "4", *sys.argv[1:]]
main()
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, "--json"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["replicas"] == [10, 6, 2, 2], done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code, "--plot", "x.svg"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr


def test_one_layer_of_an_old_plan_keeps_its_number(tmp_path: Path) -> None:
    loads, old = tmp_path / "loads", tmp_path / "old.json"
    loads.write_text("1,1,1\n2,1,1\n1,2,6\n")
    cluster = ("--loads", loads, "--nodes", 4, "--slots", 2)
    old.write_text(run(*cluster, "--json")[1])
    change = ("--loads", loads, "--slots", 2, "--old", old, "--failed", 1, "--joined", 1)
    every, one = data(*change), data(*change, "--layer", 2)
    moved = [item for item in every["migration"]["transfers"] if item["layer"] == 2]
    assert moved and {item["layer"] for item in one["migration"]["transfers"]} == {2}
    key = sorted((item["expert"], item["destination"]) for item in moved)
    assert key == sorted((item["expert"], item["destination"]) for item in one["migration"]["transfers"])
    old.write_text(run(*cluster, "--layer", 0, "--json")[1])
    assert "the old plan has not the MoE layers 2" in refused(*change, "--layer", 2)
    assert "the old plan has not the MoE layers 0-2" in refused(*change)
