"""SIGTERM to one rank or to all, at any moment: one last, whole checkpoint, and every rank leaves at the same step."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import harness, zoo
from distributed.pec_tools import everyone, manifest, row_experts, verified, versions, written
from distributed.pool import TIME_SCALE, Pool, free_port, worker_env

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROW = "w2_ep1"
WORLD = 2
PREEMPTED = 143
SCRIPT = Path(__file__).with_name("preempt_script.py")

SECTIONS: dict[str, dict[str, Any]] = {
    "durable": {"save_mode": "durable", "k_persist": 1, "k_snapshot": 1},
    "snapshots": {"save_mode": "async", "k_snapshot": 1, "snapshot_interval": 1, "persist_interval": 2},
    "explicit": {"save_mode": "async", "k_snapshot": 1, "k_persist": 1},
}


class Ranks:
    """The two processes of a training, ended by pid whatever happens."""

    def __init__(self, folder: Path, plugin: dict[str, Any], twist: str = "", world: int = WORLD) -> None:
        self.folder, self.processes = folder, []
        port = str(free_port())
        section = {"enabled": True, "host": {"linger_s": 3.0}, **plugin}
        for rank in range(world):
            env = worker_env(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            command = [sys.executable, str(SCRIPT), str(folder), json.dumps(section), *([twist] if twist else [])]
            with (folder / f"log{rank}").open("wb") as log:
                self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def await_training(self, step: int = 0) -> None:
        ready = [self.folder / f"ready{rank}" for rank in range(len(self.processes))]

        def there() -> bool:
            assert all(process.poll() is None for process in self.processes), self.logs()
            return all(path.exists() and int(path.read_text() or -1) >= step for path in ready)

        wait_for(there, 120)

    def codes(self, seconds: float = 60) -> list[int]:
        end = time.monotonic() + seconds * TIME_SCALE
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log*")))

    def ends(self) -> list[list[str]]:
        return [(self.folder / f"end{rank}").read_text().split() for rank in range(len(self.processes))]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds * TIME_SCALE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def case_compare(ctx: Any, path: str, kept: str) -> tuple[list[str], Any]:
    harness.reset()
    engine = harness.build(ROW, world=ctx.world, seed=9, plugin={"enabled": True})
    harness.train(engine, 1, data_seed=3)
    _, client_state = engine.load_checkpoint(path)
    return harness.differences_from_kept(ctx, engine, kept), client_state


@pytest.fixture
def shared(pool: Pool) -> Iterator[Pool]:
    """The pool, whose shared memory the processes of a test use too."""
    yield pool


def check(pool: Pool, folder: Path, ranks: Ranks) -> int:
    """Checks what a run that was told to end has left behind; its last step."""
    ends, path = ranks.ends(), folder / "c"
    steps = {end[0] for end in ends}
    assert len(steps) == 1, f"ranks stop at different steps: {ends}"
    step = int(steps.pop())
    assert (path / "latest").read_text() == f"global_step{step}"
    body = manifest(str(path))
    assert body["step"] == step
    experts = everyone(row_experts(zoo.ROWS[ROW]))
    assert written(body) == experts, "the last save refers to older ones"
    assert versions(body) == dict.fromkeys(experts, (body["attempt"], step))
    assert verified(str(path), f"global_step{step}") == []
    for wrong, client_state in pool.run(WORLD, case_compare, path=str(path), kept=str(folder / "kept.pt")):
        assert wrong == []
        assert client_state == {"position": step * 10}
    return step


MOMENTS = [
    ("durable", (0,), 1),
    ("durable", (1,), 2),
    ("durable", (0, 1), 3),
    ("snapshots", (0,), 4),
    ("snapshots", (1,), 5),
    ("snapshots", (1, 0), 6),
    ("explicit", (1,), 7),
    ("explicit", (0, 1), 8),
]


@pytest.mark.parametrize(("kind", "who", "seed"), MOMENTS, ids=[f"{k}-{''.join(map(str, w))}" for k, w, _ in MOMENTS])
def test_a_signal_becomes_the_last_checkpoint(
    shared: Pool, tmp_path: Path, kind: str, who: tuple[int, ...], seed: int
) -> None:
    dice = random.Random(seed)
    plugin = dict(SECTIONS[kind])
    if kind != "explicit":
        plugin["save_dir"] = str(tmp_path / "c")
    with Ranks(tmp_path, plugin, kind if kind == "explicit" else "") as ranks:
        ranks.await_training()
        time.sleep(dice.uniform(0, 1.5))
        for rank in who:
            os.kill(ranks.processes[rank].pid, signal.SIGTERM)
            time.sleep(dice.choice([0, 0.05, 0.3]))
        assert ranks.codes() == [PREEMPTED] * WORLD, ranks.logs()
        assert "not saved" not in ranks.logs()
        assert all(end[1] == str(PREEMPTED) for end in ranks.ends())
        assert check(shared, tmp_path, ranks) < 3000


def test_further_signals_do_not_cut_the_save_off(shared: Pool, tmp_path: Path) -> None:
    with Ranks(tmp_path, {**SECTIONS["snapshots"], "save_dir": str(tmp_path / "c")}) as ranks:
        ranks.await_training(2)
        while any(process.poll() is None for process in ranks.processes):
            for process in ranks.processes:
                if process.poll() is None and not (tmp_path / "kept.pt").exists():
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert ranks.codes() == [PREEMPTED] * WORLD, ranks.logs()
        check(shared, tmp_path, ranks)


def test_one_rank_alone(shared: Pool, tmp_path: Path) -> None:
    """A world of one, with a handler from before, which is called too."""
    with Ranks(tmp_path, {"save_mode": "durable", "save_dir": str(tmp_path / "c")}, "chain", world=1) as ranks:
        ranks.await_training(1)
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.codes() == [PREEMPTED], ranks.logs()
        step, _, heard = ranks.ends()[0]
        assert heard == "1"
        assert (tmp_path / "c" / "latest").read_text() == f"global_step{step}"


def test_without_a_directory_nothing_is_saved_and_the_log_says_so(shared: Pool, tmp_path: Path) -> None:
    with Ranks(tmp_path, SECTIONS["durable"]) as ranks:
        ranks.await_training()
        ranks.processes[1].send_signal(signal.SIGTERM)
        assert ranks.codes() == [PREEMPTED] * WORLD, ranks.logs()
        assert ranks.logs().count("is not saved: no save_dir is set") == 1
        assert len({end[0] for end in ranks.ends()}) == 1


def test_switched_off_the_signal_kills(shared: Pool, tmp_path: Path) -> None:
    plugin = {**SECTIONS["durable"], "save_dir": str(tmp_path / "c"), "preempt_save": False}
    with Ranks(tmp_path, plugin) as ranks:
        ranks.await_training()
        for process in ranks.processes:
            process.send_signal(signal.SIGTERM)
        assert ranks.codes() == [-signal.SIGTERM] * WORLD
        assert not (tmp_path / "c" / "latest").exists()


def test_the_handler_from_before_comes_back(shared: Pool, tmp_path: Path) -> None:
    with Ranks(tmp_path, {**SECTIONS["durable"], "save_dir": str(tmp_path / "c")}, "close", world=1) as ranks:
        assert ranks.codes(120) == [0], ranks.logs()


def test_a_rank_that_is_gone_is_named_and_the_others_leave(shared: Pool, tmp_path: Path) -> None:
    """Rank 1 is stopped while rank 0 waits for it in a collective; nobody may wait for ever."""
    plugin = {**SECTIONS["durable"], "save_dir": str(tmp_path / "c"), "timeouts": {"rendezvous_s": 3.0}}
    with Ranks(tmp_path, plugin) as ranks:
        ranks.await_training(1)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # rank 0 now waits in C, where no handler in Python runs
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.processes[0].wait(40 * TIME_SCALE) == PREEMPTED, ranks.logs()
        assert "ranks 1 did not say how far they are within 3 s" in ranks.logs()
        assert not (tmp_path / "c" / "latest").exists()


def test_a_signal_to_a_forked_child_is_its_own(shared: Pool, tmp_path: Path) -> None:
    """Data loaders end their workers by SIGTERM: those die, and the training goes on."""
    with Ranks(tmp_path, {**SECTIONS["durable"], "save_dir": str(tmp_path / "c")}, "fork", world=1) as ranks:
        ranks.await_training(20)
        time.sleep(1.5)
        assert ranks.processes[0].poll() is None, ranks.logs()
        assert not (tmp_path / "end0").exists()
