"""How each arm checkpoints: set-up, what happens in a block, waiting for the rest, and what it cost in bytes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from _stall.agents import end_job, job_folder
from _stall.arms import Arm, ArmError, plugin_section
from _stall.hooks import AddedHooks, Clock
from _stall.training import Training

__all__ = ["Runner", "make_runner", "tree_bytes"]


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Runner:
    """One arm on one rank. Every method is called by all ranks in the same order.

    Args:
        arm: which.
        training: the engine.
        arguments: of the program.
        root: directory for checkpoints; the same on all ranks.
    """

    explicit = True

    def __init__(self, arm: Arm, training: Training, arguments: argparse.Namespace, root: Path) -> None:
        self.arm, self.training, self.arguments = arm, training, arguments
        self.folder = root / arm.name.replace("/", "_")
        self.saves = 0
        self._stored = 0

    def start(self) -> None:
        """Sets up; not timed as a stall, but reported."""

    def resume(self) -> None:
        """Is called before a block with the arm."""

    def park(self) -> None:
        """Is called before a block without it."""

    def save(self) -> float:
        """Takes a checkpoint (explicit arms); returns the host time inside."""
        self.training.synchronize()  # steps that were queued before are no part of the save
        self.saves += 1
        target = self.folder / f"save{self.saves}"
        begin = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            self.write(target)
        return time.perf_counter() - begin

    def write(self, target: Path) -> None:
        """Writes, or begins to write, a checkpoint.

        Args:
            target: its own directory.
        """
        raise NotImplementedError

    def inside(self) -> float:
        """Returns host time inside of the arm's hooks since the last call."""
        return 0.0

    def drain(self) -> None:
        """Waits until all that was begun is done."""

    def last_persist(self) -> tuple[int, float]:
        """Returns bytes and seconds of this rank's last write to storage; (0, 0.0) if there was none."""
        return 0, 0.0

    def clean(self) -> None:
        """Removes checkpoints; not timed."""
        dist.barrier()
        if dist.get_rank() == 0:
            newest = self.folder / f"save{self.saves}"
            self._stored = tree_bytes(newest) or self._stored
            shutil.rmtree(self.folder, ignore_errors=True)
        dist.barrier()

    def stop(self) -> None:
        """Ends the arm."""

    def facts(self) -> dict[str, Any]:
        """Returns what is known beside the times; rank 0's counts."""
        return {"bytes": self._stored}


class Native(Runner):
    """DeepSpeed's own save_checkpoint, as it is: it does not sync, so the wait for the disk is in the drain."""

    def write(self, target: Path) -> None:
        engine = self.training.engine
        type(engine).save_checkpoint.__wrapped__(engine, str(target))

    def drain(self) -> None:
        if int(os.environ["LOCAL_RANK"]) == 0:
            os.sync()
        dist.barrier()


class Dcp(Runner):
    """torch.distributed.checkpoint.async_save with its asynchronous stager, on every rank.

    It gets what ours saves, masters and moments, as a few large tensors of each rank's own. The staged copy must be
    complete before the update overwrites what it reads: that wait is in a step pre-hook, and counts.
    """

    def start(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = self.training.cuda
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
            )
        )
        # torch 2.11 closes the inner stager after every copy, and fails at the second one.
        self._inner = self._stager._state_dict_stager
        self._inner.close = lambda: None
        self._staging: Any = None
        self._upload: Any = None
        self._clock = Clock()
        self._handle = self.training.basic_optimizer.register_step_pre_hook(
            self._clock.wrap(lambda *_args: self._join_staging())
        )

    def _join_staging(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def write(self, target: Path) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        reply = async_save(
            {"state": self.training.state()},
            storage_writer=FileSystemWriter(str(target), sync_files=True, thread_count=2),
            process_group=self._group,
            async_stager=self._stager,
        )
        self._staging, self._upload = reply.staging_completion, reply.upload_completion

    def inside(self) -> float:
        return self._clock.take()

    def drain(self) -> None:
        self._join_staging()
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def stop(self) -> None:
        self._handle.remove()
        self._stager.close()
        type(self._inner).close(self._inner)
        dist.destroy_process_group(self._group)


class Plugin(Runner):
    """moc_ckpt on the same engine: attached for this arm, its hooks taken off in the blocks without it.

    Every arm is a job of its own, so that its arenas and its agent can go when it ends.
    """

    def start(self) -> None:
        from moc_ckpt.config import MocConfig, parse_config
        from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

        self.explicit = not self.arm.ours
        arguments, training = self.arguments, self.training
        config = parse_config(
            plugin_section(
                self.arm,
                list(MocConfig.model_fields),
                save_dir=str(self.folder),
                experts=arguments.experts,
                k=arguments.k,
                k_persist=arguments.k_persist,
                persist_interval=arguments.persist_interval,
            )
        )
        self._job = job_folder(self.arm)
        os.environ["MOC_JOB_ID"] = self._job.name
        self._clock, self._copies = Clock(), []
        self._hooks = AddedHooks(training.engine.module, training.basic_optimizer)
        dist.barrier()
        begin = time.perf_counter()
        self.moc: Any = MocCheckpoint(training.engine, config)
        self._setup = time.perf_counter() - begin
        self.moc.step_done = self._clock.wrap(self.moc.step_done)
        self._hooks.time_optimizer_hooks(self._clock)
        if self.arm.ours:
            self._watch_copies(self.moc.pipeline.tuner)
            self.moc.register_state(dict)
        self.park()
        if self.arm.ours and "auto" in (arguments.k, arguments.k_persist):
            self._settle()

    def _watch_copies(self, tuner: Any) -> None:
        copied = tuner.copied

        def watch(job: Any) -> None:
            self._copies.append((job.nbytes, job.seconds))
            copied(job)

        tuner.copied = watch

    def _settle(self) -> None:
        """Trains until what is `auto` has been measured and decided."""
        self.resume()
        for _ in range(self.arguments.settle):
            self.training.step()
        self.drain()
        self.park()

    def resume(self) -> None:
        self._hooks.resume()
        self.training.engine.moc = self.moc

    def park(self) -> None:
        self.training.engine.moc = None
        self._hooks.park()

    def write(self, target: Path) -> None:
        self.moc.save(str(target))

    def inside(self) -> float:
        return self._clock.take()

    def drain(self) -> None:
        if self.arm.ours:
            # The last copy must end before steps without the hooks overwrite what it reads.
            self.moc.pipeline.quiesce()
            self.moc.wait()

    def clean(self) -> None:
        if self.explicit:
            super().clean()
        else:
            dist.barrier()  # the plugin's own retention keeps one

    def last_persist(self) -> tuple[int, float]:
        found = self._persists()
        return found[-1] if found else (0, 0.0)

    def _persists(self) -> list[tuple[int, float]]:
        """Returns bytes and seconds of this rank's writes, as its agent logged them."""
        rank, found = dist.get_rank(), []
        for log in sorted((self.folder / "events").glob("*.jsonl")):
            for line in log.read_text().splitlines():
                event = json.loads(line)
                fields = event.get("fields", event)
                if event.get("event") == "PERSISTED" and fields.get("rank") == rank:
                    found.append((int(fields["bytes"]), float(fields["seconds"])))
        return found

    def stop(self) -> None:
        self._written = self._persists()
        if self.arm.ours:
            tuner = self.moc.pipeline.tuner
            self._chosen = {"k": tuner.k, "skipped": tuner.skipped}
        self.resume()
        self.drain()
        self.training.engine.moc = None
        self.moc.close()
        self._hooks.park()
        dist.barrier()
        if int(os.environ["LOCAL_RANK"]) == 0:
            end_job(self._job)
            shutil.rmtree(self.folder, ignore_errors=True)
        dist.barrier()

    def facts(self) -> dict[str, Any]:
        found = {**super().facts(), "setup_s": self._setup}
        if not self.arm.ours:
            return found
        # The first persist of a directory holds every expert.
        written = [nbytes for nbytes, _ in self._written[1:]]
        copies = self._copies[1:]
        found |= {**self._chosen, "snapshots": len(self._copies), "persists_seen": len(self._written)}
        found["snapshot_bytes"] = int(statistics.median(nbytes for nbytes, _ in copies)) if copies else 0
        found["persist_bytes"] = int(statistics.median(written)) if written else 0
        rates = [nbytes / seconds for nbytes, seconds in copies if seconds > 0]
        found["copy_bytes_per_s"] = statistics.median(rates) if rates else 0.0
        found["bytes"] = found["persist_bytes"] or found["snapshot_bytes"]
        return found


def make_runner(arm: Arm, training: Training, arguments: argparse.Namespace, root: Path) -> Runner:
    """Returns the runner of an arm.

    Raises:
        ArmError: if a peer is not installed or does not run here.
    """
    kinds: dict[str, type[Runner]] = {
        "native": Native,
        "dcp": Dcp,
        "durable": Plugin,
        "full": Plugin,
        "pec": Plugin,
    }
    if arm.kind in kinds:
        return kinds[arm.kind](arm, training, arguments, root)
    try:
        from _stall import peers
    except ImportError as error:
        raise ArmError(f"arm {arm.name}: {error}") from error
    return peers.make_peer(arm, training, arguments, root)
