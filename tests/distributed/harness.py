"""Building, training and discarding engines inside a worker; resetting DeepSpeed between them."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
from collections.abc import Iterator
from typing import Any

from distributed import oracle, zoo

#: The smallest section that turns the plugin on.
ON: dict[str, Any] = {"enabled": True}

#: Engines that are alive in this process, ended by `reset`.
_ENGINES: list[Any] = []


def build(
    row: zoo.Row | str,
    *,
    world: int,
    seed: int = 1,
    plugin: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> Any:
    """Build the engine of a zoo row.

    Args:
        row: the row, or its name.
        world: number of ranks.
        seed: of the initial weights (alike in every layout) and of this rank's generators.
        plugin: the "moc_checkpoint" section; None leaves the key out.
        config: merged into the ds_config.
        model: changes to the row's model.

    Returns:
        The DeepSpeed engine.
    """
    import deepspeed
    import numpy as np
    import torch
    import torch.distributed as dist

    if isinstance(row, str):
        row = zoo.ROWS[row]
    if row.dtype == "fp16":
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed refuses fp16 on most CPUs although torch can do it; without this the loss scaler needs a GPU.
        get_accelerator().is_fp16_supported = lambda: True
    if model:
        row = row.with_model(**model)
    rank = dist.get_rank()
    random.seed(seed * 100 + rank)
    np.random.seed(seed * 100 + rank)
    torch.manual_seed(seed * 100 + rank)
    net = zoo.build_model(row, rank=rank, world=world, seed=seed)
    ds_config = zoo.ds_config(row, world)
    if plugin is not None:
        # Saves that block are what most cases are about; those of the pipeline say so.
        ds_config["moc_checkpoint"] = {"save_mode": "durable", **plugin}
    ds_config = _merge(ds_config, config or {})
    optimizer, scheduler = zoo.client_optimizer(row, net)
    engine, _, _, _ = deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else zoo.param_groups(row, net),
        lr_scheduler=scheduler,
        config=ds_config,
        dist_init_required=False,
    )
    _ENGINES.append(engine)
    engine.zoo_row = row
    zoo.check_expert_ranks(engine.module, rank)
    return engine


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _merge(out[key], value)
        else:
            out[key] = value
    return out


def train(engine: Any, steps: int, *, data_seed: int = 7) -> list[str]:
    """Train `steps` optimizer steps; the data follow from the engine's own step counter.

    Args:
        engine: the engine.
        steps: number of optimizer steps, those included that the row makes overflow.
        data_seed: of the data.

    Returns:
        This rank's losses (one per micro-step) as `float.hex`.
    """
    import torch
    import torch.distributed as dist

    row = engine.zoo_row
    losses = []
    engine.train()
    for _ in range(steps):
        step = engine.global_steps
        for micro in range(row.gas):
            tokens, target = zoo.batch(
                row, step=step, micro=micro, rank=dist.get_rank(), world=dist.get_world_size(), seed=data_seed
            )
            loss = engine(tokens.to(engine.device), target.to(engine.device))
            engine.backward(loss * float("inf") if step in row.poison else loss)
            engine.step()
            losses.append(float(loss.detach().to(torch.float64)).hex())
    return losses


def mean_loss(ctx: Any, losses: list[str]) -> float:
    """The mean of all ranks' losses."""
    import itertools

    values = [float.fromhex(x) for x in itertools.chain.from_iterable(ctx.gather(losses))]
    return sum(values) / len(values)


@contextlib.contextmanager
def logged() -> Iterator[list[tuple[str, str]]]:
    """What the package logs meanwhile on this rank: (level, text)."""
    found: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append((record.levelname, record.getMessage()))

    logger, handler = logging.getLogger("moc_ckpt"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def attempt(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Call a function; what it returned or raised, as plain data."""
    from moc_ckpt.errors import MocError

    try:
        value = function(*args, **kwargs)
    except Exception as error:
        names = [cls.__name__ for cls in type(error).__mro__]
        return {"raised": type(error).__name__, "moc": isinstance(error, MocError), "mro": names, "text": str(error)}
    return {"raised": None, "moc": False, "mro": [], "text": "", "value": value}


def snapshot(ctx: Any, engine: Any) -> dict[str, Any]:
    """Everything the oracle knows about the engine now (the global part on rank 0 only)."""
    return {"global": oracle.global_state(engine, ctx), "local": oracle.local_state(engine)}


def differences(a: dict[str, Any], b: dict[str, Any], *, skip: tuple[str, ...] = ()) -> list[str]:
    """How two snapshots differ; at most 12 lines."""
    out = oracle.global_differences(a["global"], b["global"], skip=skip)
    out += oracle.local_differences(a["local"], b["local"], skip=skip)
    return out[:12]


def keep(ctx: Any, engine: Any, path: str) -> None:
    """Write the engine's snapshot to `path` for cases in other worlds or processes."""
    import torch

    mine = snapshot(ctx, engine)
    everyone = ctx.gather(mine["local"])
    if ctx.rank == 0:
        torch.save({"global": mine["global"], "locals": everyone}, path)
    ctx.barrier()


def kept(path: str) -> dict[str, Any]:
    """Read what `keep` wrote."""
    import torch

    return torch.load(path, weights_only=False)


def differences_from_kept(ctx: Any, engine: Any, path: str, *, skip: tuple[str, ...] = ()) -> list[str]:
    """How the engine differs from a kept snapshot of the same world."""
    saved = kept(path)
    before = {"global": saved["global"] if ctx.rank == 0 else None, "local": saved["locals"][ctx.rank]}
    return differences(before, snapshot(ctx, engine), skip=skip)


def discard(engine: Any) -> None:
    """End one engine and forget the groups that DeepSpeed made for it."""
    if engine in _ENGINES:
        _ENGINES.remove(engine)
    close = getattr(getattr(engine, "moc", None), "close", None)
    if callable(close):
        close()
    wrapper = engine.optimizer
    engine.destroy()
    if getattr(wrapper, "cpu_offload", False):
        # Hooks of gradients that are offloaded hold their optimizer, which holds the parameters: a cycle that Python
        # does not see, with the engine and its process groups (two threads and a socket per rank each) in it.
        vars(wrapper).clear()


def reset() -> None:
    """Bring DeepSpeed back to the state after import; torch's process group stays.

    What a second `deepspeed.initialize` with MoE layers trips over in one process: the cached expert
    groups (`deepspeed.utils.groups`), torch autocast's flag, AutoTP's mode, the name tables of
    `deepspeed.utils.debug` and, harmless but leaking, the process groups of the previous engine.
    """
    import torch.distributed as dist
    from deepspeed.utils import debug, groups

    while _ENGINES:
        with contextlib.suppress(Exception):
            discard(_ENGINES[-1])
    # Only the groups that DeepSpeed made: others may be kept by their owners for the life of the world.
    made = [
        *groups._EXPERT_PARALLEL_GROUP.values(),
        *groups._EXPERT_DATA_PARALLEL_GROUP.values(),
        *groups._ALL_TO_ALL_GROUP.values(),
        groups._WORLD_GROUP,
    ]
    for name in (
        "_EXPERT_PARALLEL_GROUP",
        "_EXPERT_PARALLEL_GROUP_RANKS",
        "_EXPERT_DATA_PARALLEL_GROUP",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
        "_ALL_TO_ALL_GROUP",
    ):
        getattr(groups, name, {}).clear()
    for name in (
        "_WORLD_GROUP",
        "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
        "_TENSOR_MODEL_PARALLEL_GROUP",
        "_MODEL_PARALLEL_GROUP",
        "_DATA_PARALLEL_GROUP",
        "_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE",
        "_MPU_TENSOR_MODEL_PARALLEL_RANK",
        "mpu",
        "mesh_device",
    ):
        setattr(groups, name, None)
    groups.expert_tensor_parallel_world_size = 1
    with contextlib.suppress(ImportError):  # older versions have no autocast of their own
        from deepspeed.runtime import torch_autocast

        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        torch_autocast.TORCH_AUTOCAST_DTYPE = None
    debug.debug_clear_module_and_param_names()
    with contextlib.suppress(ImportError, TypeError):
        from deepspeed.module_inject import set_autotp_mode

        set_autotp_mode(training=False)
    gc.collect()
    if dist.is_initialized():
        alive = dist.distributed_c10d._world.pg_map
        for group in made:
            if group is not None and group is not dist.group.WORLD and group in alive:
                dist.destroy_process_group(group)
