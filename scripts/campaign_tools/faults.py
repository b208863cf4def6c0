"""The fault campaign: trains, kills, starts again, and checks what came back; seeded.

A life is one start of a tiny 2-rank training in the checkpoint directory of the lives before it. It ends by a fault;
the next life loads, and compares every tensor with what the oracle kept at the version that the checkpoint names.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Fault", "draw", "run"]

_ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
ROW = "w2_ep1"
MOST_STEPS = 9
DEADLINE = 90.0
#: Lives in one directory; then a new one begins, since kept states take room.
LIVES = 12


@dataclass(frozen=True, slots=True)
class Fault:
    """How a life ends.

    Attributes:
        kind: `trainer`, `trainers`, `agent`, `everything` (trainers and agent), `node` (and the arenas are gone).
        point: a named point of `kill_at`, or `random`.
        calls: at which call of the point.
        after: right after the call, not before it.
        delay_s: `random`: seconds after the first step.
        victim: rank, for `trainer`.
    """

    kind: str
    point: str
    calls: int
    after: bool
    delay_s: float
    victim: int


def draw(rng: random.Random) -> Fault:
    """Draws a fault: half at a random moment, half at a named point."""
    from campaign_tools.kill_at import AGENT_POINTS, TRAINER_POINTS

    point = rng.choice(["random"] * 11 + [*TRAINER_POINTS, *AGENT_POINTS])
    if point in TRAINER_POINTS:
        kind = rng.choice(["trainer", "trainers"])
    elif point in AGENT_POINTS:
        kind = rng.choice(["agent", "everything"])
    else:
        kind = rng.choice(["trainer", "trainers", "agent", "everything", "node"])
    # The points of an agent come once per rank and save, those of a trainer once per step or more.
    calls = rng.randint(1, 4) if point in AGENT_POINTS else rng.randint(1, 40 if point == "copy" else 7)
    return Fault(kind, point, calls, rng.random() < 0.5, rng.uniform(0.0, 0.6), rng.randrange(WORLD))


def section(path: str) -> dict[str, Any]:
    """The plugin's section: a snapshot at every step, a persist at every third, retention at work."""
    return {
        "k_snapshot": 1,
        "k_persist": 1,
        "snapshot_interval": 1,
        "persist_interval": 3,
        "save_dir": path,
        "max_plt": 0.9,
        "storage": {"keep_last": 2},
        "host": {"linger_s": 30.0},
    }


def case_life(ctx: Any, path: str, number: int, fault: Fault, armed: str, startup: str) -> dict[str, Any]:
    """One life on one rank: load and check, then train until the fault comes."""
    from campaign_tools.kill_at import TRAINER_POINTS, arm
    from distributed import harness
    from distributed.pec_tools import Diary
    from distributed.test_pipeline import build

    from moc_ckpt.storage.attempts import current_attempt
    from moc_ckpt.storage.store import open_store

    # What the agent that this life may start gets.
    os.environ.pop("MOC_CAMPAIGN_POINT", None)
    if armed:
        os.environ["MOC_CAMPAIGN_POINT"] = armed
        os.environ["PYTHONPATH"] = os.pathsep.join([startup, os.environ["PYTHONPATH"]])
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, seed=3, **section(diary.path))
    store = open_store(diary.path)
    wrong: list[str] = []
    found = 0
    if number and (Path(diary.path) / "latest").exists():
        harness.train(engine, 1, data_seed=5)
        wrong = diary.load(engine)
        found = engine.global_steps
    present = current_attempt(store) if store.root_exists() else None
    attempt = (present.attempt if present else 0) + 1
    agent = engine.moc.pipeline.host.agent.agent_pid
    Path(path, f"pid{number}.{ctx.rank}").write_text(str(os.getpid()))
    if ctx.rank == 0:
        Path(path, f"life{number}").write_text(f"{found} {agent}")
        Path(path, f"wrong{number}").write_text("\n".join(wrong))
    else:
        Path(path, f"wrong{number}.1").write_text("\n".join(wrong))
    ctx.barrier()
    if fault.point in TRAINER_POINTS and (fault.kind == "trainers" or ctx.rank == fault.victim):
        arm(TRAINER_POINTS[fault.point], fault.calls, after=fault.after)
    for _ in range(MOST_STEPS):
        harness.train(engine, 1)
        diary.note(engine, attempt)
        Path(path, f"step{number}.{ctx.rank}").write_text(str(engine.global_steps))
    engine.moc.wait()
    Path(path, f"waited{number}.{ctx.rank}").write_text("")
    if fault.kind != "agent":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"steps": engine.global_steps}


def held(folder: Path) -> int | None:
    """The newest step that memory holds whole, found by looking at every slot of every arena."""
    from moc_ckpt.snapshot.arena import Arena
    from moc_ckpt.snapshot.places import find_arenas

    runs: dict[str, dict[int, set[tuple[str, int]]]] = {}
    born: dict[str, float] = {}
    for path in find_arenas(folder):
        with Arena.open(path) as arena:
            identity = arena.identity
            born[identity.run] = max(identity.created, born.get(identity.run, 0.0))
            whole = {
                (s.unit, s.step) for s in arena.table.live() if s.state.name in ("FILLED", "PERSISTING", "COMMITTED")
            }
            runs.setdefault(identity.run, {})[identity.rank] = whole
            if identity.attempt is None:
                runs[identity.run][identity.rank] = set()
    if not runs:
        return None
    ranks = runs[max(born, key=lambda run: born[run])]
    if len(ranks) < WORLD:
        return None
    steps = set.intersection(*({step for unit, step in slots if unit == "extra"} for slots in ranks.values()))
    steps = {step for step in steps if all(("dense", step) in slots for slots in ranks.values())}
    return max(steps, default=None)


def committed(path: Path) -> int | None:
    """The step of the newest manifest, from the files alone."""
    found = []
    for file in path.glob("*/manifest.json"):
        body = _find(json.loads(file.read_text()), "attempt")
        found.append((body["attempt"], body["step"]))
    return max(found)[1] if found else None


def _find(data: Any, key: str) -> Any:
    """The first map with a key, at any depth."""
    if isinstance(data, dict):
        if key in data:
            return data
        for value in data.values():
            if (found := _find(value, key)) is not None:
                return found
    return None


def run(count: int, seed: int, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Runs `count` faults.

    Args:
        count: number of faults.
        seed: decides all of them.
        tell: is told about every life.

    Returns:
        cases, recovered, refused, lost_commits, wrong_tensors, hangs, unexpected (each with what it was), by kind.
    """
    sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "scripts")]
    from distributed.pool import CaseError, CaseHang, Pool

    from moc_ckpt.snapshot.places import job_dir, job_key

    rng = random.Random(seed)
    result: dict[str, Any] = {
        "campaign": "faults",
        "seed": seed,
        "cases": 0,
        "recovered": 0,
        "refused": 0,
        "lost_commits": 0,
        "wrong_tensors": 0,
        "hangs": 0,
        "unexpected": [],
        "by_fault": {},
        "came_back": Counter(),
    }
    startup = str(Path(__file__).with_name("startup"))
    search = os.pathsep.join([str(_ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONPATH"] = search
    by_fault: Counter[str] = Counter()
    with Pool() as pool:
        os.environ["MOC_SHM_DIR"] = str(pool._shared)
        root: Path | None = None
        number = 0
        promise: int | None = None
        before: int | None = None
        try:
            while result["cases"] <= count:
                last = result["cases"] == count
                if root is None:
                    root, number, promise, before = Path(tempfile.mkdtemp(prefix="moc_faults_")), 0, None, None
                fault = draw(rng)
                from campaign_tools.kill_at import AGENT_POINTS

                armed = f"{fault.point}:{fault.calls}:{int(fault.after)}" if fault.point in AGENT_POINTS else ""
                killer = _Killer(root, number, fault)
                killer.start()
                ended = ""
                try:
                    pool.run(
                        WORLD,
                        case_life,
                        path=str(root),
                        number=number,
                        fault=fault,
                        armed=armed,
                        startup=startup,
                        deadline=DEADLINE,
                    )
                    pool._discard(pool._workers[:WORLD])  # what a life leaves in its environment is its own
                    ended = "survived"
                except CaseHang as error:
                    ended = "killed" if "died" in str(error).splitlines()[0] else "hang"
                    detail = str(error)[-1500:]
                except CaseError as error:
                    ended, detail = "error", str(error)[-3000:]
                killer.stop()
                mark = root / f"life{number}"
                if number and (promise is not None or before is not None):
                    result["recovered"] += _check(result, root, number, promise, before, fault, tell)
                if ended in ("hang", "error") or not mark.exists():
                    result["hangs"] += ended == "hang"
                    result["unexpected"].append({"life": number, "fault": str(fault), "how": ended, "detail": detail})
                    tell(f"UNEXPECTED {ended} {fault}: {detail}")
                    shutil.rmtree(root, ignore_errors=True)
                    root = None
                    result["cases"] += 1
                    continue
                if last:
                    break
                folder = job_dir(job_key(root / "c"), create=False)
                if fault.kind in ("everything", "node"):
                    _kill_agent(mark)
                if fault.kind == "node":
                    for arena in folder.glob("*.arena"):
                        arena.unlink()
                promise, before = held(folder), committed(root / "c")
                by_fault[f"{fault.kind} at {fault.point}"] += 1
                result["cases"] += 1
                tell(
                    f"{result['cases']}/{count} {fault.kind} at {fault.point}: {ended}; memory {promise}, storage {before}"
                )
                number += 1
                if number == LIVES:
                    # One more life checks the last fault; it goes into the next directory's count.
                    LIFE = Fault("agent", "random", 1, False, 1e9, 0)
                    try:
                        pool.run(
                            WORLD,
                            case_life,
                            path=str(root),
                            number=number,
                            fault=LIFE,
                            armed="",
                            startup=startup,
                            deadline=DEADLINE,
                        )
                    except (CaseHang, CaseError) as error:
                        result["unexpected"].append({"life": number, "fault": "none", "detail": str(error)[-2000:]})
                    if promise is not None or before is not None:
                        result["recovered"] += _check(result, root, number, promise, before, LIFE, tell)
                    _kill_agent(root / f"life{number}")
                    shutil.rmtree(root, ignore_errors=True)
                    root = None
        finally:
            if root is not None:
                _kill_agent(root / f"life{number}")
                shutil.rmtree(root, ignore_errors=True)
    result["by_fault"] = dict(sorted(by_fault.items()))
    result["came_back"] = dict(result["came_back"])
    return result


def _check(
    result: dict[str, Any], root: Path, number: int, promise: int | None, before: int | None, fault: Fault, tell: Any
) -> int:
    """Compares what a life found with what was promised; whether it is all right."""
    mark = root / f"life{number}"
    if not mark.exists():
        return 0
    found = int(mark.read_text().split()[0])
    text = (root / f"wrong{number}").read_text() + (root / f"wrong{number}.1").read_text()
    if text.strip():
        result["wrong_tensors"] += 1
        result["unexpected"].append({"life": number, "fault": str(fault), "how": "wrong", "detail": text[:1500]})
        tell(f"WRONG {text[:600]}")
        return 0
    if before is not None and found < before:
        result["lost_commits"] += 1
        result["unexpected"].append({"life": number, "fault": str(fault), "how": f"found {found}, committed {before}"})
        tell(f"LOST: found {found}, committed {before}")
        return 0
    if promise is not None and found < promise:
        result["unexpected"].append(
            {"life": number, "fault": str(fault), "how": f"found {found}, memory had {promise}"}
        )
        tell(f"LESS: found {found}, memory had {promise}")
        return 0
    result["came_back"]["memory" if promise is not None and promise > (before or 0) else "storage"] += 1
    return 1


def _kill_agent(mark: Path) -> None:
    if mark.exists():
        pid = mark.read_text().split()[1]
        if pid.isdigit():
            try:
                if "moc_ckpt.persist.agent" in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                    os.kill(int(pid), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                pass


class _Killer(threading.Thread):
    """Kills at a random moment, from outside."""

    def __init__(self, root: Path, number: int, fault: Fault) -> None:
        super().__init__(daemon=True)
        self._root, self._number, self._fault = root, number, fault
        self._over = threading.Event()
        self.done = False

    def stop(self) -> None:
        self._over.set()
        self.join(5)

    def run(self) -> None:
        fault = self._fault
        if fault.point != "random":
            return
        first = self._root / f"step{self._number}.0"
        while not first.exists():
            if self._over.wait(0.02):
                return
        if self._over.wait(min(fault.delay_s, 1e6)):
            return
        if fault.kind in ("agent", "everything", "node"):
            _kill_agent(self._root / f"life{self._number}")
        if fault.kind != "agent":
            for pid in _trainers(self._root, self._number, fault):
                os.kill(pid, signal.SIGKILL)
        self.done = True


def _trainers(root: Path, number: int, fault: Fault) -> list[int]:
    found = []
    for rank in range(WORLD):
        file = root / f"pid{number}.{rank}"
        if file.exists() and (fault.kind != "trainer" or rank == fault.victim):
            found.append(int(file.read_text()))
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT / "scripts"))
    from campaign_tools import faults

    out = faults.run(int(sys.argv[1]), int(sys.argv[2]), lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(out, indent=1))
