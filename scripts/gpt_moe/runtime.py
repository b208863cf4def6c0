"""The process around the model: environment, launchers, devices, random seeds, quietness."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gpt_moe.arguments import ArgumentError

__all__ = ["Runtime", "prepare_environment", "preserved_rng", "quiet", "seed_everything", "start"]

_MEGATRON_HINT = (
    "megatron-core is missing: pip install 'moc_ckpt[pretrain]' (or pip install 'megatron-core>=0.16,<0.17')"
)
_PLUGIN_HINT = "the plugin moc_ckpt is missing: pip install -e . in its repository, or run with --no-moc"


class Runtime:
    """Where this process runs.

    Attributes:
        rank: global rank.
        local_rank: rank on this node.
        world_size: number of ranks.
        device: the device of model and data.
    """

    def __init__(self, rank: int, local_rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.local_rank = local_rank
        self.world_size = world_size
        self.device = device

    def print(self, text: str) -> None:
        """Print on rank 0.

        Args:
            text: one or more lines.
        """
        if self.rank == 0:
            print(text, flush=True)

    def check_precision(self, args: argparse.Namespace) -> None:
        """Refuse a precision that DeepSpeed does not run on this device.

        Args:
            args: settled arguments.

        Raises:
            ArgumentError: naming the flag.
        """
        from deepspeed.accelerator import get_accelerator

        accelerator: Any = get_accelerator()
        if args.fp16 and not accelerator.is_fp16_supported():
            raise ArgumentError(f"--fp16 does not run on this {self.device.type}; use --bf16 or neither")
        if args.bf16 and not accelerator.is_bf16_supported():
            raise ArgumentError(f"--bf16 does not run on this {self.device.type}; use --fp16 or neither")


def prepare_environment(args: argparse.Namespace) -> None:
    """Set what must be set before deepspeed is imported, and import the plugin.

    Handles torchrun (environment), the `deepspeed` launcher (environment and --local_rank) and no launcher at all.

    Args:
        args: the parsed arguments.
    """
    env = os.environ
    if args.local_rank is not None:
        env.setdefault("LOCAL_RANK", str(args.local_rank))
    if "RANK" not in env:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(port)
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("LOCAL_SIZE", env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    if args.deterministic:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not args.verbose:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.getLogger("megatron").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
    if args.moc:
        try:
            import moc_ckpt  # noqa: F401  (hooks itself into deepspeed, so it comes first)
        except ImportError as error:
            raise SystemExit(f"{_PLUGIN_HINT} ({error})") from error
    try:
        with quiet(not args.verbose):
            import megatron.core  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{_MEGATRON_HINT} ({error})") from error


def start(args: argparse.Namespace) -> Runtime:
    """Join the process group and choose the device.

    Args:
        args: the parsed arguments.
    """
    with quiet(not args.verbose):
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    if not args.verbose:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator: Any = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        # This op only speeds up inference and would be compiled at start.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        device = torch.device(accelerator.device_name(), local_rank)
        accelerator.set_device(local_rank)
    with quiet(not args.verbose):
        deepspeed.init_distributed(verbose=args.verbose, auto_mpi_discovery=False)
    return Runtime(torch.distributed.get_rank(), local_rank, torch.distributed.get_world_size(), device)


def can_build_fused_adam() -> bool:
    """Tell whether DeepSpeed's FusedAdam can be had: prebuilt, or with nvcc and a C++ compiler at hand."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")))  # noqa: PTH118
    if not (nvcc and shutil.which("c++") and shutil.which("ninja")):
        return False
    from deepspeed.ops.op_builder import FusedAdamBuilder

    return bool(FusedAdamBuilder().is_compatible(verbose=False))


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator that training draws from, differently on every rank.

    Args:
        seed: the run's seed.
        rank: this rank.
    """
    mixed = (seed + 1_000_003 * rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore every generator afterwards, so that what happens inside leaves training untouched."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    device_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_state is not None:
            torch.cuda.set_rng_state(device_state)


@contextlib.contextmanager
def quiet(active: bool) -> Iterator[None]:
    """Swallow what libraries print; exceptions still pass, with what was printed before them.

    Args:
        active: False lets everything through.
    """
    if not active:
        yield
        return
    text = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(text):
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        sys.stderr.write(text.getvalue())
        raise
