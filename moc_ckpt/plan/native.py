"""What DeepSpeed's own save_checkpoint writes, and which rank writes it. Pure.

Found by reading deepspeed/runtime/engine.py (`_save_moe_checkpoint`, `_save_zero_checkpoint`) and by measuring files;
tests/distributed/test_plan_bytes.py compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moc_ckpt.pec.ownership import Ownership
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import TensorSpec, ZeroSettings, owned_bytes
from moc_ckpt.state.fragment import MASTER, itemsize

__all__ = ["native_ownership"]


def native_ownership(
    tensors: Sequence[TensorSpec], experts: Sequence[int], ep: int, parallel: ParallelLayout, settings: ZeroSettings
) -> Ownership:
    """Returns who writes which bytes in DeepSpeed's own checkpoint; also the baseline of the MoC-System paper.

    - The weights of everything but experts: rank 0.
    - The weights of an expert: the first rank of those that hold it (expert-data-parallel rank 0), so that of all
      replicas one expert-parallel group writes.
    - Optimizer state with ZeRO: its owner, masters and moments. In 16 bit a parameter comes to 2 + 12 bytes; in fp32,
      where the masters are stored beside equal weights, to 4 + 12.
    - Optimizer state without ZeRO: each rank of that expert-parallel group writes all it holds, dense state included,
      and rank 0 writes the same once more into the model's file. In fp32 weight and master are one.

    Padding, names and the overhead of files are left out.

    Args:
        tensors: the parameters and persistent buffers of the model, in group order.
        experts: number of experts of each MoE layer.
        ep: expert-parallel size of every MoE layer.
        parallel: the ranks.
        settings: what decides who owns which optimizer state.
    """
    counts = tuple(experts)
    dense = np.zeros(parallel.world, dtype=np.int64)
    writers = [parallel.rank_of(ep, position, 0) for position in range(ep)] if counts else [0]
    weights = np.zeros(sum(counts), dtype=np.int64)
    state = np.zeros_like(weights)
    offsets = np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))])
    dense_state = 0
    for spec in tensors:
        numel, width = math.prod(spec.shape), itemsize(spec.dtype)
        kinds = settings.kinds_of(spec.group) if spec.group is not None else ()
        # Without ZeRO and in the weights' own precision the optimizer updates the weights themselves.
        held = sum(itemsize(dtype) for kind, dtype in kinds if not (kind == MASTER and dtype == spec.dtype))
        if spec.layer is None or spec.expert is None:
            dense[0] += numel * width
            dense_state += numel * held
        else:
            unit = offsets[spec.layer] + spec.expert
            weights[unit] += numel * width
            state[unit] += numel * held
    layer = np.repeat(np.arange(len(counts)), counts)
    expert = np.arange(sum(counts)) - offsets[layer]
    local = np.array(counts, dtype=np.int64)[layer] // ep
    writer = np.array(writers, dtype=np.int64)[expert // local] if counts else layer
    columns = [(layer, expert, writer, weights)]
    if settings.partitioned:
        # Only what has state, so that nothing but optimizer state comes back.
        trained = [spec for spec in tensors if spec.group is not None]
        eps = (ep,) * len(counts)
        sole = owned_bytes(trained, counts, eps, parallel, replace(settings, save_weights=False)).ownership
        owner = np.searchsorted(offsets, sole.unit, side="right") - 1
        columns.append((owner, sole.unit - offsets[owner], sole.rank, sole.nbytes))
        dense += sole.dense
    else:
        again = np.where(writer == 0, 2, 1)
        columns.append((layer, expert, writer, state * again))
        dense[writers] += dense_state
        dense[0] += dense_state
    layers, ids, ranks, sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Ownership.from_arrays(counts, parallel.world, layers, ids, ranks, sizes, dense)
