"""Optional arms: checkpointing of other projects, where it is installed and runs. See docs/benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from _stall.arms import Arm, ArmError
from _stall.hooks import AddedHooks, Clock
from _stall.runners import Runner
from _stall.training import Training

__all__ = ["make_peer"]


class LmResiliency(Runner):
    """LM-Resiliency's in-memory checkpoint (GEMINI) of a DeepSpeed engine, without its fault detection.

    It wraps `engine.step` and has no way to pause, so in blocks without it the wrapper is taken off. Its host time is
    that of its post-step hook; it saves into memory alone, so there are no bytes on disk.
    """

    explicit = False

    def start(self) -> None:
        import torch
        from lm_resiliency.checkpointing.config import InMemoryCkptConfig
        from lm_resiliency.integrations.deepspeed import enable_resiliency

        training = self.training
        self._clock = Clock()
        self._hooks = AddedHooks(training.engine.module, training.basic_optimizer)
        self._plain = training.engine.step
        begin = time.perf_counter()
        self._peer: Any = enable_resiliency(
            training.engine,
            interval=self.arm.interval,
            enable_detection=False,
            ckpt_config=InMemoryCkptConfig(disk_flush_interval=0, disk_folder=str(self.folder)),
            device=torch.device("cuda", torch.cuda.current_device()) if training.cuda else torch.device("cpu"),
        )
        self._setup = time.perf_counter() - begin
        self._wrapped = training.engine.step
        self._peer._post_step = self._clock.wrap(self._peer._post_step)
        self._hooks.time_optimizer_hooks(self._clock)
        self.park()

    def resume(self) -> None:
        self._hooks.resume()
        self.training.engine.step = self._wrapped
        self._peer.step_count = self.training.engine.global_steps  # its intervals count from the same step as ours

    def park(self) -> None:
        self.training.engine.step = self._plain
        self._hooks.park()

    def inside(self) -> float:
        return self._clock.take()

    def drain(self) -> None:
        self._peer._ckpt_manager._wait_for_completion_worker()

    def clean(self) -> None:
        """Nothing is on disk."""

    def stop(self) -> None:
        self.resume()
        self._peer.close()
        self._hooks.park()

    def facts(self) -> dict[str, Any]:
        return {"bytes": 0, "setup_s": self._setup}


class Nvrx(Runner):
    """NVIDIA's resiliency extension: TorchAsyncCheckpoint of every rank's own masters and moments. CUDA only."""

    def start(self) -> None:
        if not self.training.cuda:
            raise ArmError("arm nvrx: nvidia-resiliency-ext synchronises a CUDA device in every save")
        from nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt import TorchAsyncCheckpoint

        self._peer: Any = TorchAsyncCheckpoint(persistent_queue=True)

    def write(self, target: Path) -> None:
        self._peer.finalize_async_save(blocking=True)
        target.mkdir(parents=True, exist_ok=True)
        self._peer.async_save(self.training.state(), str(target / f"rank{os.environ['RANK']}.pt"))

    def drain(self) -> None:
        self._peer.finalize_async_save(blocking=True)

    def stop(self) -> None:
        self._peer.finalize_async_save(blocking=True, terminate=True)


def make_peer(arm: Arm, training: Training, arguments: argparse.Namespace, root: Path) -> Runner:
    """Returns the runner of a peer.

    Raises:
        ArmError: if it is not known to work.
    """
    kinds: dict[str, type[Runner]] = {"lm_resiliency": LmResiliency, "nvrx": Nvrx}
    if arm.kind not in kinds:
        raise ArmError(f"arm {arm.name}: does not run on this stack (docs/benchmarks/README.md says why)")
    print(f"peer {arm.name}: not this project's code", file=sys.stderr)
    return kinds[arm.kind](arm, training, arguments, root)
