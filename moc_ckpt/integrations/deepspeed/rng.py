"""Random number generators: what each rank draws next (invariant I9)."""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from typing import Any

import numpy as np
import torch

from moc_ckpt.state.plain import encode_plain

__all__ = ["capture_rng", "derive_rng", "digest_rng", "restore_rng"]

logger = logging.getLogger(__name__)

# Trackers of named device generators, found only where their library is loaded already: (module, accessor).
_TRACKERS = (
    ("deepspeed.runtime.activation_checkpointing.checkpointing", "get_cuda_rng_tracker"),
    ("megatron.core.tensor_parallel.random", "get_cuda_rng_tracker"),
)


def capture_rng() -> dict[str, Any]:
    """Returns the state of every generator of this rank as plain data. Not collective; does not draw."""
    from deepspeed.accelerator import get_accelerator

    numpy_state = np.random.get_state()
    streams: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": tuple(numpy_state),
        "torch": torch.get_rng_state(),
        "seed": torch.initial_seed(),
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        streams["device"] = accelerator.get_rng_state(accelerator.current_device())
    for module, accessor in _TRACKERS:
        states = _tracker_states(module, accessor)
        if states:
            streams[f"tracker:{module}"] = states
    return streams


def restore_rng(streams: dict[str, Any]) -> None:
    """Sets every generator that `streams` has, as `capture_rng` returned it."""
    from deepspeed.accelerator import get_accelerator

    if "python" in streams:
        random.setstate(streams["python"])
    if "numpy" in streams:
        np.random.set_state(streams["numpy"])
    if "torch" in streams:
        torch.set_rng_state(streams["torch"])
    accelerator = get_accelerator()
    if "device" in streams and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(streams["device"], accelerator.current_device())
    for module, accessor in _TRACKERS:
        states = streams.get(f"tracker:{module}")
        if states and module in sys.modules:
            getattr(sys.modules[module], accessor)().set_states(states)


def digest_rng(streams: dict[str, Any]) -> dict[str, str]:
    """Returns a digest per stream, to see which streams all ranks share."""
    return {
        name: hashlib.blake2b(encode_plain(value, name), digest_size=8).hexdigest() for name, value in streams.items()
    }


def derive_rng(source: dict[str, Any], shared: set[str], rank: int, step: int) -> None:
    """Sets this rank's generators in a world of another size.

    A stream that all ranks shared (a common data order, say) stays shared and goes on where it was. The
    others are seeded from (saved seed, rank, step): reproducible, and different on every rank. Trackers of named
    device generators that are not shared keep the seeds that this run gave them.

    Args:
        source: the streams of the saved rank 0.
        shared: names of the streams that are equal on all ranks, of the saved world and of this one.
        rank: this rank.
        step: the step that is restored.
    """
    from deepspeed.accelerator import get_accelerator

    text = f"{source.get('seed')}/{rank}/{step}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & (2**63 - 1)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.manual_seed(seed)
    restore_rng({name: value for name, value in source.items() if name in shared})
    logger.info(
        "RNG of rank %d: %s from the checkpoint, the rest from seed %d",
        rank,
        ", ".join(sorted(shared - {"seed"})) or "nothing",
        seed,
    )


def _tracker_states(module: str, accessor: str) -> dict[str, Any]:
    loaded = sys.modules.get(module)
    if loaded is None or not hasattr(loaded, accessor):
        return {}
    tracker = getattr(loaded, accessor)()
    states: dict[str, Any] = getattr(tracker, "get_states", dict)()
    return {name: value for name, value in states.items() if isinstance(value, torch.Tensor)}
