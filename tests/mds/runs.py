"""Runs of a training script under the launcher, on the miniature tree or a real checkout, and what can be read of them.

Ranks are started one by one, as `deepspeed --module moc_ckpt.launch` starts them, so that a test can kill each by its
number. `MEGATRON_DEEPSPEED_DIR` names the real checkout, `MEGATRON_DEEPSPEED_PYTHONPATH` where its packages lie if they
are not in this environment.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import agent_tools
import numpy as np
from distributed.pool import free_port, worker_env

from moc_ckpt.snapshot.places import agent_lock_path
from moc_ckpt.storage.checkpoint import load_manifest
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import open_store

HERE = Path(__file__).resolve().parent
REAL = os.environ.get("MEGATRON_DEEPSPEED_DIR", "")
NO_REAL = "MEGATRON_DEEPSPEED_DIR names no checkout of Megatron-DeepSpeed"
PATIENCE_S = 420.0

_LOSS = re.compile(
    r"^ iteration +(\d+)/ +\d+ \|.* consumed samples: +(\d+) .*learning rate: ([^ ]+) .*lm loss: ([^ ]+) "
)
_VALID = re.compile(r"validation loss at iteration (\d+) .*lm loss value: ([^ ]+) ")
# What differs from run to run, and what nobody asked for.
_SHORT = re.compile(
    r" (elapsed time|global batch|loss scale|actual seqlen|samples per|tokens per|TFLOPs)[^|]*\||number of.*"
)
_LOADED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")


@dataclass(frozen=True)
class Tree:
    """A checkout that can be trained.

    Attributes:
        root: of the tree.
        arguments: that make a tiny model of its script.
        python_path: where its packages lie.
        other_length: arguments of a run that resumes one of another length, whose schedule the script would refuse.
    """

    root: Path
    arguments: tuple[str, ...]
    python_path: str = ""
    other_length: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return self.root / "pretrain_gpt.py"


_COMMON = shlex.split(
    "--num-layers 2 --num-attention-heads 2 --num-experts 4 --expert-interval 2 --topk 1 --create-moe-param-group "
    "--no-pipeline-parallel --global-batch-size 4 --lr 1e-3 --lr-decay-iters 20 --lr-warmup-iters 2 --min-lr 1e-5 "
    "--seed 11 --eval-iters 1 --eval-interval 5 --num-workers 0 --zero-stage 2 --deepspeed"
)


def mini() -> Tree:
    return Tree(HERE / "mini", (*_COMMON, "--hidden-size", "16", "--seq-length", "16"))


def real(folder: Path) -> Tree:
    """The real checkout, with a corpus of numbers in `folder`, made by the checkout's own tool."""
    root, packages = Path(REAL).resolve(), os.environ.get("MEGATRON_DEEPSPEED_PYTHONPATH", "")
    lines = []
    for document in range(300):
        numbers = [document % 127]
        for position in range(199):
            numbers.append((numbers[-1] * 5 + 3 + (document * 7 + position * position) % 3) % 127)
        lines.append(json.dumps({"text": " ".join(map(str, numbers))}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(root / "tools" / "preprocess_data.py"), "--input", str(folder / "data.jsonl")]
    command += ["--output-prefix", str(folder / "data"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"]
    command += ["--dataset-impl", "mmap", "--append-eod", "--workers", "1"]
    env = worker_env(PYTHONPATH=packages)
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=PATIENCE_S)
    shape = shlex.split(
        "--hidden-size 32 --seq-length 32 --max-position-embeddings 32 --data-impl mmap --split 90,10,0 "
        "--tokenizer-type NullTokenizer --vocab-size 127 --log-interval 1 --lr-decay-style cosine"
    )
    own = (*_COMMON, *shape, "--data-path", str(folder / "data_text_document"))
    return Tree(root, own, packages, ("--override-opt_param-scheduler",))


@dataclass
class Run:
    """One run that is over.

    Attributes:
        codes: exit statuses of the ranks.
        log: what all ranks printed, rank by rank.
    """

    codes: list[int]
    log: str

    @cached_property
    def losses(self) -> dict[int, str]:
        """The training loss of each iteration, as printed."""
        return {int(m[1]): m[4] for line in self.log.splitlines() if (m := _LOSS.match(line))}

    @cached_property
    def rates(self) -> dict[int, tuple[str, str]]:
        """Samples seen and the learning rate."""
        return {int(m[1]): (m[2], m[3]) for line in self.log.splitlines() if (m := _LOSS.match(line))}

    @cached_property
    def validation(self) -> dict[int, str]:
        """The validation loss, as printed."""
        return {int(m[1]): m[2] for line in self.log.splitlines() if (m := _VALID.search(line))}

    @property
    def loaded(self) -> int | None:
        """The iteration that it resumed at."""
        found = _LOADED.search(self.log)
        return int(found[1]) if found else None

    def ok(self) -> Run:
        """This run, which must have ended well."""
        assert set(self.codes) == {0}, f"{self.codes}\n{self.log[-6000:]}"
        return self

    def since(self, iteration: int) -> dict[int, tuple[str, ...]]:
        """All that was printed about the iterations after this one."""
        return {
            number: (loss, *self.rates[number], self.validation.get(number, ""))
            for number, loss in self.losses.items()
            if number > iteration
        }


@dataclass
class Place:
    """Where the runs of one test live: a directory for files and one in shared memory; both end with the test."""

    folder: Path
    shared: Path
    tree: Tree
    runs: int = 0
    transcript: list[str] = field(default_factory=list)

    def ds_config(self, world: int, dtype: str, section: dict[str, object] | None) -> Path:
        settings: dict[str, object] = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 4 // max(world, 2),
            "steps_per_print": 1000,
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
        }
        if dtype == "bf16":
            settings["bf16"] = {"enabled": True}
        if section is not None:
            settings["moc_checkpoint"] = section
        self.runs += 1
        path = self.folder / f"ds{self.runs}.json"
        path.write_text(json.dumps(settings))
        return path

    def run(
        self,
        *arguments: str,
        world: int = 2,
        ep: int = 2,
        dtype: str = "fp32",
        launcher: Sequence[str] = ("-m", "moc_ckpt.launch"),
        before: Sequence[str] = (),
        section: dict[str, object] | None = None,
        at: tuple[int, str] = (0, ""),
    ) -> Run:
        """Trains.

        Args:
            *arguments: of the script.
            world: number of ranks.
            ep: expert-parallel size.
            dtype: fp32 or bf16.
            launcher: what comes between the interpreter and the script.
            before: options of the launcher.
            section: "moc_checkpoint" of the ds_config.
            at: what happens once an iteration is printed: `kill` all ranks, `term` rank 0, or a file of this name is
                made where the last rank works, and only there.
        """
        port = free_port()
        config = self.ds_config(world, dtype, section)
        own = [*self.tree.arguments, "--moe-expert-parallel-size", str(ep), "--deepspeed_config", str(config)]
        own += ["--micro-batch-size", str(4 // max(world, 2)), *(["--bf16"] if dtype == "bf16" else []), *arguments]
        paths = os.pathsep.join(filter(None, [str(HERE.parent.parent), self.tree.python_path]))
        processes, logs = [], []
        for rank in range(world):
            env = worker_env(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                MOC_SHM_DIR=str(self.shared),
            )
            env["PYTHONPATH"] = paths
            command = [sys.executable, *launcher, f"--local_rank={rank}" if "-m" in launcher else "", *before]
            command = [*filter(None, command), str(self.tree.script), *own]
            logs.append(self.folder / f"run{self.runs}.rank{rank}.log")
            own_folder = self.folder / f"rank{rank}"
            own_folder.mkdir(exist_ok=True)
            with logs[-1].open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=env, cwd=own_folder, stdout=log, stderr=subprocess.STDOUT)
                )
            if rank == 0:
                shown = " ".join(command[1:]).replace(str(HERE.parent.parent), ".")
                self.transcript.append(f"[world {world}] python {shown}")
        try:
            iteration, what = at
            if what:
                mark = re.compile(rf"^ iteration +{iteration}/", re.MULTILINE)
                agent_tools.wait_until(
                    lambda: mark.search(logs[-1].read_text(errors="replace")) or any(p.poll() for p in processes),
                    "the iteration",
                    PATIENCE_S,
                )
                if what == "kill":
                    for process in processes:
                        process.kill()
                elif what == "term":
                    processes[0].send_signal(signal.SIGTERM)
                else:
                    (own_folder / what).touch()
            codes = [process.wait(PATIENCE_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        run = Run(codes, "\n".join(log.read_text(errors="replace") for log in logs))
        self._note(run, at)
        return run

    def _note(self, run: Run, at: tuple[int, str]) -> None:
        kept = [
            _SHORT.sub("", line)[:260]
            for line in run.log.splitlines()
            if line.startswith((" iteration", "[moc_ckpt]", "moc_ckpt.launch:")) or _LOADED.search(line)
        ]
        end = f"exit statuses {run.codes}" + (f", after iteration {at[0]}: {at[1]}" if at[1] else "")
        self.transcript += [*kept, f"-> {end}", ""]
        path = os.environ.get("MOC_TRANSCRIPT")
        if path:
            with Path(path).open("a") as file:
                file.write("\n".join(self.transcript) + "\n")
        self.transcript.clear()


@contextmanager
def place(tree: Tree, folder: Path) -> Iterator[Place]:
    """A place for the runs of a test; ends agents that are left, and removes what they had."""
    shared = Path("/dev/shm") / f"moc_mds-{uuid.uuid4().hex[:8]}"
    shared.mkdir(mode=0o700)
    try:
        yield Place(folder, shared, tree)
    finally:
        for lock in shared.rglob(agent_lock_path(Path()).name):
            with suppress(OSError, ValueError):
                agent_tools.end_agent(int(lock.read_text()), lock.parent)
        shutil.rmtree(shared, ignore_errors=True)


def tensors(directory: Path, tag: str) -> dict[tuple[str, str], np.ndarray]:
    """Every logical tensor of a checkpoint, by name and kind, as bytes."""
    store = open_store(str(directory))
    manifest = load_manifest(store, tag)
    readers = [PackReader(store, pack.path, pack.nbytes) for pack in manifest.packs]
    found: dict[tuple[str, str], np.ndarray] = {}
    for row in manifest.fragments:
        record = manifest.tensors[row.tensor]
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[record.dtype]
        count = int(np.prod(record.shape, dtype=np.int64)) if record.shape else 1
        whole = found.setdefault((record.fqn, record.kind), np.zeros(count * size, np.uint8))
        nbytes = (row.stop - row.start) * size
        whole[row.start * size : row.stop * size] = readers[row.pack].read(row.offset, nbytes)
    return found


def differences(left: dict[tuple[str, str], np.ndarray], right: dict[tuple[str, str], np.ndarray]) -> list[str]:
    """Names of the tensors that two checkpoints do not share bit for bit."""
    names = sorted(set(left) | set(right))
    return [
        f"{name} {kind}"
        for name, kind in names
        if (name, kind) not in left
        or (name, kind) not in right
        or not np.array_equal(left[name, kind], right[name, kind])
    ]


def settled(directory: Path, tag: str) -> None:
    """Waits until a checkpoint exists."""
    agent_tools.wait_until((directory / tag / "manifest.json").exists, f"{tag} to be committed", 120.0)
