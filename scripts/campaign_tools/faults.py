"""The fault campaign: trains, kills, starts again, and checks what came back; seeded.

A life is one start of a tiny 2-rank training in the checkpoint directory of the lives before it. It ends by a fault;
the next life loads, and compares every tensor with what the oracle kept at the version that the checkpoint names, and
the lost tokens that the package reports with a recount from what the gates dispatched (`tally`).
"""

from __future__ import annotations

import json
import math
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BAD", "Campaign", "Fault", "draw", "run", "table"]

BAD = ("refused", "lost_commits", "lost_memory", "wrong_tensors", "hangs", "errors")
"""Counts of what must not happen."""

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


#: The last life of a directory: nothing happens to it.
_NONE = Fault("agent", "none", 1, False, 0.0, 0)


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


def case_life(ctx: Any, path: str, number: int, fault: Fault, armed: str, startup: str) -> None:
    """One life on one rank: loads and checks, then trains until the fault comes."""
    from distributed import harness
    from distributed.pec_tools import Diary, manifest
    from distributed.test_pec_ledger import Gates
    from distributed.test_pipeline import build

    from campaign_tools.kill_at import TRAINER_POINTS, arm
    from campaign_tools.tally import Tally
    from moc_ckpt.events import read_events
    from moc_ckpt.storage.attempts import current_attempt
    from moc_ckpt.storage.store import open_store

    # What the agent that this life may start gets.
    os.environ.pop("MOC_CAMPAIGN_POINT", None)
    if armed:
        os.environ["MOC_CAMPAIGN_POINT"] = armed
        os.environ["MOC_CAMPAIGN_ARMED"] = f"{path}/armed{number}-"
        os.environ["PYTHONPATH"] = os.pathsep.join([startup, os.environ["PYTHONPATH"]])
    life = Life(Path(path), number)
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ROW, None, seed=3, **section(diary.path))
    gates = Gates(ctx, engine)
    tally = Tally(Path(path) / "tally", ctx.rank, ctx.world, number, gates.experts)
    found, lost, wrong = 0, None, []
    if (Path(diary.path) / "latest").exists():
        if number % 2:  # a run that trains before it loads has let go of memory: storage has to do
            harness.train(engine, 1, data_seed=5)
        where, _ = engine.load_checkpoint(diary.path)
        assert where is not None
        # Not the one that `latest` names: a crash may have come before it was moved.
        tag = Path(where).name
        wrong = diary.wrong(engine, tag)
        found = engine.global_steps
        tally.restored(manifest(diary.path, tag))
        events = [event.fields for event in read_events(open_store(diary.path)) if event.event == "RECOVERED"]
        wrong += tally.differences(engine.moc.ledger, events[-1] if ctx.rank == 0 else None)
        lost = sum(tally.counts()["recoveries"][-1])
    store = open_store(diary.path)
    present = current_attempt(store) if store.root_exists() else None
    attempt = (present.attempt if present else 0) + 1
    agent = engine.moc.pipeline.host.agent.agent_pid
    life.note(f"rank{ctx.rank}", {"pid": os.getpid(), "agent": agent, "found": found, "lost": lost, "wrong": wrong})
    ctx.barrier()
    if fault.point in TRAINER_POINTS and (fault.kind == "trainers" or ctx.rank == fault.victim):
        arm(TRAINER_POINTS[fault.point], fault.calls, after=fault.after)
    step_done = engine.moc.step_done

    def noted(*args: Any, **kwargs: Any) -> None:
        # Before the snapshot, so that nothing can come back that was not kept.
        diary.note(engine, attempt)
        tally.trained(*gates.take(), (attempt, engine.global_steps))
        step_done(*args, **kwargs)

    engine.moc.step_done = noted
    gates.on = True
    for _ in range(MOST_STEPS):
        harness.train(engine, 1)
        life.note(f"step{ctx.rank}", engine.global_steps)
    engine.moc.wait()
    if fault.kind != "agent":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Life:
    """Notes that the processes of one life leave for the campaign.

    Attributes:
        root: directory of the lives.
        number: which one.
    """

    root: Path
    number: int

    def note(self, what: str, value: Any) -> None:
        """Leaves a note; whole or not at all."""
        target = self.root / f"{self.number}.{what}"
        new = target.with_name(f"{target.name}.new")
        new.write_text(json.dumps(value))
        new.replace(target)

    def read(self, what: str) -> Any:
        """Returns a note; None if there is none."""
        target = self.root / f"{self.number}.{what}"
        return json.loads(target.read_text()) if target.exists() else None

    def kill_agent(self) -> None:
        """Kills the agent that this life used, if it is still that."""
        pid = (self.read("rank0") or {}).get("agent")
        with suppress(OSError):
            if pid and b"moc_ckpt.persist.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def kill_trainers(self, fault: Fault) -> None:
        """Kills the trainers that a fault means."""
        for rank in range(WORLD):
            pid = (self.read(f"rank{rank}") or {}).get("pid")
            if pid and (fault.kind != "trainer" or rank == fault.victim):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


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


class Campaign:
    """Runs lives one after the other, and judges them.

    Args:
        pool: processes for the ranks.
        seed: decides all faults.
        tell: is told about every life.
    """

    def __init__(self, pool: Any, seed: int, tell: Callable[[str], None]) -> None:
        self._pool = pool
        self._rng = random.Random(seed)
        self._tell = tell
        self._startup = str(Path(__file__).with_name("startup"))
        self.counts: Counter[str] = Counter()
        self.by_fault: Counter[str] = Counter()
        self.came_back: Counter[str] = Counter()
        self.unexpected: list[dict[str, Any]] = []

    def directory(self, faults: int) -> None:
        """Lets a run of `faults` lives die in a new directory; one more life checks the last of them."""
        from leftovers import remove_buffers

        from moc_ckpt.snapshot.places import job_dir, job_key

        root = Path(tempfile.mkdtemp(prefix="moc_faults_"))
        promise: int | None = None
        stored: int | None = None
        life = Life(root, 0)
        try:
            for number in range(faults + 1):
                fault = draw(self._rng) if number < faults else _NONE
                life = Life(root, number)
                ended, detail = self._live(life, fault)
                if ended in ("hang", "error"):
                    self._wrong("hangs" if ended == "hang" else "errors", life, str(fault), detail)
                    return
                if number and not self._is_right(life, promise, stored, detail):
                    return
                if number == faults:
                    return
                folder = job_dir(job_key(root / "c"), create=False)
                if fault.kind in ("everything", "node"):
                    life.kill_agent()
                if fault.kind == "node":
                    for arena in folder.glob("*.arena"):
                        arena.unlink()
                promise, stored = held(folder), committed(root / "c")
                self.counts["cases"] += 1
                self.by_fault[f"{fault.kind} at {fault.point}"] += 1
                self._tell(
                    f"{self.counts['cases']} {fault.kind} at {fault.point}: {ended}; "
                    f"memory holds step {promise}, storage step {stored}"
                )
        finally:
            life.kill_agent()
            shutil.rmtree(root, ignore_errors=True)
            remove_buffers()

    def _live(self, life: Life, fault: Fault) -> tuple[str, str]:
        """Runs one life; how it ended (`survived`, `killed`, `hang` or `error`), and details."""
        from distributed.pool import CaseError, CaseHang

        from campaign_tools.kill_at import AGENT_POINTS

        armed = f"{fault.point}:{fault.calls}:{int(fault.after)}" if fault.point in AGENT_POINTS else ""
        killer = _Killer(life, fault)
        killer.start()
        try:
            self._pool.run(
                WORLD,
                case_life,
                path=str(life.root),
                number=life.number,
                fault=fault,
                armed=armed,
                startup=self._startup,
                deadline=DEADLINE,
                fresh_after=True,  # what a life leaves in its environment is its own
            )
        except CaseHang as error:
            died = "died" in str(error).splitlines()[0]
            return ("killed" if died else "hang"), str(error)[-3000:]
        except CaseError as error:
            return "error", str(error)[-3000:]
        finally:
            killer.stop()
        return "survived", ""

    def _is_right(self, life: Life, promise: int | None, stored: int | None, detail: str) -> bool:
        """Compares what a life found with what was there before it."""
        ranks = [life.read(f"rank{rank}") for rank in range(WORLD)]
        if None in ranks:
            return self._wrong("refused", life, "it did not get as far as training", detail)
        found = ranks[0]["found"]
        wrong = [line for rank in ranks for line in rank["wrong"]]
        if wrong:
            return self._wrong("wrong_tensors", life, "restored otherwise than promised", "\n".join(wrong[:12]))
        if stored is not None and found < stored:
            return self._wrong("lost_commits", life, f"found step {found}", f"step {stored} was committed")
        if promise is not None and found < promise:
            return self._wrong("lost_memory", life, f"found step {found}", f"memory held step {promise}")
        if promise is not None or stored is not None:
            self.counts["recovered"] += 1
            # Every restore was recounted; those that lost something are what shows that counting is no formality.
            self.counts["lossy"] += bool(ranks[0]["lost"])
            self.counts["tokens_lost"] += ranks[0]["lost"] or 0
            self.came_back["memory" if (promise or 0) > (stored or 0) else "storage"] += 1
        return True

    def _wrong(self, what: str, life: Life, how: str, detail: str) -> bool:
        self.counts[what] += 1
        self.unexpected.append({"what": what, "life": life.number, "how": how, "detail": detail})
        self._tell(f"{what}: {how}: {detail}")
        return False


def run(
    count: int, seed: int, tell: Callable[[str], None] = lambda text: None, *, seconds: float = math.inf
) -> dict[str, Any]:
    """Runs a campaign.

    Args:
        count: number of faults.
        seed: decides all of them.
        tell: is told about every life.
        seconds: after so long no further directory is begun.

    Returns:
        cases, recovered, refused, lost_commits, wrong_tensors, hangs and the like; `unexpected` says what each was.
    """
    sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "scripts")]
    from distributed.pool import Pool

    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with Pool() as pool:
        os.environ["MOC_SHM_DIR"] = str(pool._shared)
        campaign = Campaign(pool, seed, tell)
        left, end = count, time.monotonic() + seconds
        while left > 0 and time.monotonic() < end:
            campaign.directory(min(left, LIVES))
            left -= LIVES
    return {
        "campaign": "faults",
        "seed": seed,
        **{name: campaign.counts[name] for name in ("cases", "recovered", "lossy", "tokens_lost", *BAD)},
        "came_back_from": dict(campaign.came_back),
        "by_fault": dict(sorted(campaign.by_fault.items())),
        "unexpected": campaign.unexpected,
    }


def table(result: dict[str, Any]) -> str:
    """Returns a result as text."""
    lines = [f"{result['cases']} faults, seed {result['seed']}: {result['recovered']} came back as promised"]
    lines.append(f"  {result['lossy']} of them lost {result['tokens_lost']:,} tokens, as the gates' own counts say")
    lines += [f"  {name}: {result[name]}" for name in BAD]
    lines += [f"  came back from {place}: {count}" for place, count in sorted(result["came_back_from"].items())]
    lines += [f"  {fault}: {count}" for fault, count in result["by_fault"].items()]
    lines += [f"{item['what']}, life {item['life']}: {item['how']}: {item['detail']}" for item in result["unexpected"]]
    return "\n".join(lines)


class _Killer(threading.Thread):
    """Kills at a random moment, from outside."""

    def __init__(self, life: Life, fault: Fault) -> None:
        super().__init__(daemon=True)
        self._life, self._fault = life, fault
        self._over = threading.Event()

    def stop(self) -> None:
        self._over.set()
        self.join(5)

    def run(self) -> None:
        fault, life = self._fault, self._life
        if fault.point != "random":
            return
        while life.read("step0") is None:
            if self._over.wait(0.02):
                return
        if self._over.wait(fault.delay_s):
            return
        if fault.kind in ("agent", "everything", "node"):
            life.kill_agent()
        if fault.kind != "agent":
            life.kill_trainers(fault)
