"""`moc-ckpt run`: real processes that crash, hang, ignore SIGTERM or leave others behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PYTHON = sys.executable
PATIENCE_S = 30.0


@pytest.fixture
def base() -> Iterator[Path]:
    """Shared memory of its own."""
    path = Path("/dev/shm") / f"mcr-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


class Supervised:
    """A `moc-ckpt run` in a process of its own."""

    def __init__(self, base: Path, *words: str, command: list[str], **environ: str) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith("MOC_")}
        env |= {"MOC_SHM_DIR": str(base), **environ}
        self.process = subprocess.Popen(
            [PYTHON, "-m", "moc_ckpt.cli.main", "run", *words, "--", *command],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out = self.err = ""

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def end(self) -> int:
        self.out, self.err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode

    def lines(self) -> list[str]:
        """What the supervisor itself says, without the time."""
        found = []
        for line in self.err.splitlines():
            match = re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d moc-ckpt run: (.*)", line)
            if match:
                found.append(re.sub(r"process \d+", "process P", re.sub(r"after \d+\.\d s", "after T s", match[1])))
        return found


def python(code: str) -> list[str]:
    return [PYTHON, "-c", code]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def number(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text().strip())
    return int(path.read_text())


def test_success_is_the_end(base: Path) -> None:
    code = "import os; print('hello', os.environ['MOC_RESTART_COUNT'], os.getsid(0) == os.getpid())"
    with Supervised(base, command=python(code), MOC_JOB_ID="j1") as run:
        assert run.end() == 0
        assert run.out == "hello 0 True\n"
        assert run.lines() == [
            "attempt 1 of 11: started process P, job j1",
            "attempt 1 of 11: exit status 0 after T s",
        ]


def test_a_crash_is_followed_by_a_restart_of_the_same_job(base: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
with open({str(tmp_path / "seen")!r}, 'a') as file:
    print(os.environ['MOC_JOB_ID'], os.environ['MOC_RESTART_COUNT'], file=file)
n = int(os.environ['MOC_RESTART_COUNT'])
if n == 0: raise SystemExit(3)
if n == 1: os.kill(os.getpid(), signal.SIGKILL)
"""
    with Supervised(base, "--backoff", "0.25", command=python(code)) as run:
        assert run.end() == 0
        job = re.search(r"job (run-[0-9a-f]{12})", run.err)
        assert job is not None
        assert run.lines() == [
            f"attempt 1 of 11: started process P, job {job[1]}",
            "attempt 1 of 11: exit status 3 after T s",
            "  memory of this node holds nothing of the job",
            "restart 1 of 10 in 0.25 s",
            f"attempt 2 of 11: started process P, job {job[1]}",
            "attempt 2 of 11: killed by SIGKILL after T s",
            "  memory of this node holds nothing of the job",
            "restart 2 of 10 in 0.5 s",
            f"attempt 3 of 11: started process P, job {job[1]}",
            "attempt 3 of 11: exit status 0 after T s",
        ]
        assert (tmp_path / "seen").read_text().splitlines() == [f"{job[1]} {count}" for count in range(3)]


@pytest.mark.parametrize(("code", "status", "how"), [("raise SystemExit(7)", 7, "exit status 7"), (None, 139, "")])
def test_it_gives_up_with_the_last_status(base: Path, code: str | None, status: int, how: str) -> None:
    words = python(code or "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with Supervised(base, "--max-restarts", "2", "--backoff", "0", "--json", command=words) as run:
        assert run.end() == status
        answer = json.loads(run.out)
        assert (answer["status"], answer["reason"], answer["restarts"]) == (status, "gave up", 2)
        assert [one["attempt"] for one in answer["runs"]] == [1, 2, 3]
        assert {one["how"] for one in answer["runs"]} == {how or "killed by SIGSEGV"}
        assert run.lines()[-1] == f"gave up after 2 restarts; status {status}"


def test_without_restarts_a_crash_is_the_end(base: Path) -> None:
    with Supervised(base, "--max-restarts", "0", command=["sh", "-c", "exit 4"]) as run:
        assert run.end() == 4


def test_json_is_alone_on_stdout(base: Path) -> None:
    with Supervised(base, "--json", command=["sh", "-c", "echo output; echo error >&2"]) as run:
        assert run.end() == 0
        assert json.loads(run.out)["reason"] == "ended"
        assert "output\n" in run.err and "error\n" in run.err


def test_wrong_use(base: Path) -> None:
    with Supervised(base, command=["/no/such/program"]) as run:
        assert run.end() == 2
        assert "/no/such/program cannot be started: No such file" in run.err
    with Supervised(base, command=[]) as run:
        assert run.end() == 2
    with Supervised(base, "--max-restarts", "-1", command=["true"]) as run:
        assert run.end() == 2


def test_options_after_the_command_are_the_commands(base: Path) -> None:
    with Supervised(base, command=["echo", "--grace", "-h", "--", "--json"]) as run:
        assert run.end() == 0
        assert run.out == "--grace -h -- --json\n"


# ---- signals ----

SAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep({seconds})
    open({path!r}, 'a').write('saved\\n')
    sys.exit({status})
signal.signal(signal.SIGTERM, save)
open({path!r} + '.pid', 'w').write(str(os.getpid()))
time.sleep(60)
"""


def saves(path: Path, seconds: float = 0.5, status: int = 143) -> list[str]:
    return python(SAVES.format(path=str(path), seconds=seconds, status=status))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("status", [143, 0, 1])
def test_a_signal_becomes_one_sigterm_and_no_restart(
    base: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    path = tmp_path / "work"
    with Supervised(base, "--backoff", "0", "--json", command=saves(path, status=status)) as run:
        number(tmp_path / "work.pid")
        run.process.send_signal(signum)
        assert run.end() == status
        assert path.read_text() == "saved\n"
        answer = json.loads(run.out)
        assert (answer["reason"], answer["restarts"]) == ("stopped", 0)
        assert run.lines()[1:] == [
            f"attempt 1 of 11: {signum.name}: told the command to save and end, which it must within 600 s",
            f"attempt 1 of 11: exit status {status} after T s",
        ]


def test_a_preempted_command_that_nobody_here_told_is_started_again(base: Path, tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(143 if os.environ['MOC_RESTART_COUNT'] == '0' else 0)"
    with Supervised(base, "--backoff", "0", "--json", command=python(code)) as run:
        assert run.end() == 0
        assert json.loads(run.out)["restarts"] == 1


def test_a_second_sigterm_does_not_cut_the_save_off(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "work"
    with Supervised(base, command=saves(path, 1.5)) as run:
        number(tmp_path / "work.pid")
        for _ in range(5):
            run.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert run.end() == 143
        assert path.read_text() == "saved\n"


def test_grace_ends_with_a_kill(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "work"
    with Supervised(base, "--grace", "1", command=saves(path, 60)) as run:
        pid = number(tmp_path / "work.pid")
        begin = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 137
        assert 1 <= time.monotonic() - begin < 10
        assert not alive(pid) and not path.exists()
        assert "attempt 1 of 11: not ended within 1 s: killed 1 process" in run.lines()


def test_ctrl_c_twice_does_not_wait(base: Path, tmp_path: Path) -> None:
    with Supervised(base, command=saves(tmp_path / "work", 60)) as run:
        pid = number(tmp_path / "work.pid")
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert alive(pid)
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 137
        assert not alive(pid)
        assert "attempt 1 of 11: Ctrl-C again: killed 1 process" in run.lines()


def test_a_signal_while_it_waits_for_a_restart(base: Path) -> None:
    with Supervised(base, "--backoff", "60", command=["false"]) as run:
        assert run.process.stderr is not None
        while "restart 1 of 10" not in run.process.stderr.readline():
            pass
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143
        assert run.lines() == ["SIGTERM: no restart"]


def test_a_shell_that_dies_at_once_does_not_cut_its_trainer_off(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "work"
    inner = tmp_path / "inner.py"
    inner.write_text(saves(path, 4.0)[2])
    with Supervised(base, command=["sh", "-c", f"{PYTHON} {inner}; true"]) as run:
        number(tmp_path / "work.pid")
        run.process.send_signal(signal.SIGTERM)
        # Not `end`: the trainer has the pipes, so those would be waited for in any case.
        assert run.process.wait(PATIENCE_S) == 143
        assert path.exists() and path.read_text() == "saved\n"


# ---- what a crash leaves ----

CRASHES = """
import os, subprocess, sys, time
if os.environ['MOC_RESTART_COUNT'] == '0':
    subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session={session})
    while not os.path.exists({pid!r}): time.sleep(0.01)
    sys.exit(5)
"""
CHILD = """
import os, signal, time
if {stubborn}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open({pid!r} + '.new', 'w') as file: file.write(str(os.getpid()))
os.rename({pid!r} + '.new', {pid!r})
time.sleep(60)
"""


@pytest.mark.parametrize("session", [False, True], ids=["group", "session"])
@pytest.mark.parametrize("stubborn", [False, True], ids=["meek", "stubborn"])
def test_what_a_crash_leaves_is_ended(base: Path, tmp_path: Path, session: bool, stubborn: bool) -> None:
    pid = str(tmp_path / "pid")
    child = CHILD.format(pid=pid, stubborn=stubborn)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        words = python(CRASHES.format(child=child, session=session, pid=pid))
        with Supervised(base, "--backoff", "0", "--grace", "1", command=words) as run:
            assert run.end() == 0
            assert not alive(number(Path(pid)))
            told = "attempt 1 of 11: ended 1 process that it left"
            assert (told + ", 1 of them by SIGKILL" if stubborn else told) in run.lines()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_an_agent_outlives_a_crash_and_says_what_it_holds(base: Path, tmp_path: Path) -> None:
    """The agent holds what the restart recovers from; whatever else the command started is ended."""
    from moc_ckpt.snapshot.arena import Arena, ArenaSpec, Identity
    from moc_ckpt.snapshot.places import arena_path

    folder = base / f"moc_ckpt-{os.getuid()}" / "j2"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    identity = Identity(
        job="j2", run="r", rank=0, world=1, pid=1, node="n", url=None, attempt=None, created=time.time()
    )
    Arena.create(arena_path(folder, "r", 0), ArenaSpec(1 << 16, 1 << 16, 1 << 16, 8), identity).close()
    code = f"""
import os, subprocess, sys, time
if os.environ['MOC_RESTART_COUNT'] == '0':
    words = [sys.executable, '-m', 'moc_ckpt.persist.agent', '--dir', {str(folder)!r}, '--job', 'j2']
    # As a trainer starts it: nobody else's output must wait for its end.
    subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists({str(folder / "agent.sock")!r}): time.sleep(0.02)
    sys.exit(1)
"""
    agent = 0
    try:
        with Supervised(base, "--backoff", "0", command=python(code), MOC_JOB_ID="j2") as run:
            assert run.end() == 0
            agent = number(folder / "agent.lock")
            assert alive(agent)
            assert "  rank 0: nothing that is whole" in run.lines()
            assert "  its agent is idle" in run.lines()
            assert not any("that it left" in line for line in run.lines())
    finally:
        if agent:
            os.kill(agent, signal.SIGKILL)
            wait_for(lambda: not alive(agent))


def test_needs_no_torch() -> None:
    code = "import sys, moc_ckpt.cli.run; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([PYTHON, "-c", code], check=False).returncode == 0


def test_backoff_doubles_and_starts_anew_after_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from moc_ckpt.cli import supervisor

    lengths = iter([1.0, 1.0, 601.0, 1.0, 1.0])
    waits: list[float] = []
    told: list[str] = []
    one = supervisor.Supervisor(
        ["x"],
        job="j",
        max_restarts=4,
        backoff_s=8.0,
        grace_s=1,
        say=told.append,
        before_restart=lambda job: [f"hook {job}"],
    )
    monkeypatch.setattr(one, "_once", lambda attempt: supervisor.Run(attempt, 1, "exit status 1", next(lengths)))
    monkeypatch.setattr(one, "_pause", waits.append)
    assert one.run() == 1
    assert waits == [8.0, 16.0, 8.0, 16.0]
    assert told.count("  hook j") == 5


def test_a_hook_that_fails_does_not_keep_from_restarting() -> None:
    from moc_ckpt.cli.supervisor import Supervisor

    told: list[str] = []

    def hook(_job: str) -> list[str]:
        raise RuntimeError("storage is away")

    one = Supervisor(["false"], job="j", max_restarts=1, backoff_s=0, grace_s=1, say=told.append, before_restart=hook)
    assert one.run() == 1
    assert len(one.runs) == 2
    assert told.count("  what memory holds is not known: storage is away") == 2
