"""What the training state really is, read from DeepSpeed's own structures and never through moc_ckpt.

`global_state` puts the optimizer's state of all ranks together under layout-free names: experts carry
their global id, fragments are placed by where a parameter's storage lies in its flat group. Replicas must
agree bit by bit and every element must be covered. `local_state` is what belongs to one rank: weights,
buffers, generators, hyperparameters, scheduler, loss scaler, counters.
"""

from __future__ import annotations

import copy
import random
import re
from typing import Any

_EXPERT = re.compile(r"^(.*deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)$")


# ------------------------------------------------------------------------------------------- names


def global_names(module: Any) -> dict[str, str]:
    """Local name -> global name of all parameters and buffers, by DeepSpeed's expert groups."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    first: dict[str, int] = {}
    for prefix, layer in module.named_modules():
        if isinstance(layer, MoE):
            place = groups._get_expert_parallel_rank(layer.expert_group_name)
            first[f"{prefix}.deepspeed_moe.experts.deepspeed_experts."] = place * layer.num_local_experts
    out = {}
    names = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
    for name in names:
        match = _EXPERT.match(name)
        out[name] = f"{match[1]}{first[match[1]] + int(match[2])}{match[3]}" if match else name
    return out


# ------------------------------------------------------------------------------- the optimizer's state


def _flat_view(optimizer: Any) -> list[tuple[list[Any], Any, Any, int, int]] | None:
    """(parameters, flat low-precision group, master, lo, hi) per group of a flattening optimizer."""
    import torch.distributed as dist

    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # DeepSpeedZeroOptimizer
        params, flats = optimizer.bit16_groups, optimizer.bit16_groups_flat
        masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.real_dp_process_group
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
        params, flats = optimizer.bf16_groups, optimizer.bf16_groups_flat
        masters, groups = optimizer.fp32_groups_flat_partition, optimizer.real_dp_process_group
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer: flat, not partitioned
        params, flats = optimizer.fp16_groups, optimizer.fp16_groups_flat
        masters, groups = optimizer.fp32_groups_flat, [None] * len(optimizer.fp16_groups)
    else:
        return None
    out = []
    for index, flat in enumerate(flats):
        master = masters[index]
        place = 0 if groups[index] is None else dist.get_rank(group=groups[index])
        lo = place * master.numel()
        out.append((list(params[index]), flat, master, lo, lo + master.numel()))
    return out


def _pieces(engine: Any) -> list[tuple[Any, int, int, Any, dict[str, Any], dict[str, Any]]]:
    """(parameter, start, stop, master piece, tensor state pieces, scalars) of this rank."""
    wrapper = engine.optimizer
    base = getattr(wrapper, "optimizer", wrapper)
    out = []
    flat_groups = _flat_view(wrapper)
    if flat_groups is not None:
        for index, (params, flat, master, lo, hi) in enumerate(flat_groups):
            state = base.state.get(master, {})
            scalars = _scalars(state, base.param_groups[index])
            for param in params:
                if param.numel() == 0:
                    continue
                offset, rest = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
                assert rest == 0, "parameter does not lie on an element of its flat group"
                assert 0 <= offset <= flat.numel() - param.numel(), "parameter lies outside its flat group"
                start, stop = max(lo, offset), min(hi, offset + param.numel())
                if start >= stop:
                    continue
                at = slice(start - lo, stop - lo)
                tensors = {k: v.detach().view(-1)[at] for k, v in _tensors(state, master).items()}
                out.append((param, start - offset, stop - offset, master.detach().view(-1)[at], tensors, scalars))
        return out
    if hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer: one master per parameter
        pairs = [
            (low, high, base.param_groups[i])
            for i, (lows, highs) in enumerate(zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True))
            for low, high in zip(lows, highs, strict=True)
        ]
    else:  # the raw optimizer: the parameters are the masters
        pairs = [(p, p, group) for group in base.param_groups for p in group["params"] if p.requires_grad]
    for low, high, group in pairs:
        if low.numel() == 0:  # flattening optimizers leave empty parameters out
            continue
        state = base.state.get(high, {})
        tensors = {k: v.detach().reshape(-1) for k, v in _tensors(state, high).items()}
        out.append((low, 0, low.numel(), high.detach().reshape(-1), tensors, _scalars(state, group)))
    return out


def _tensors(state: dict[str, Any], master: Any) -> dict[str, Any]:
    import torch

    return {
        k: v for k, v in state.items() if torch.is_tensor(v) and k != "step" and tuple(v.shape) == tuple(master.shape)
    }


def _scalars(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    step = state.get("step", group.get("step"))
    hyper = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "name", "step", "moe")}
    return {"step": None if step is None else float(step), "hyper": hyper}


def global_state(engine: Any, ctx: Any) -> dict[str, dict[str, Any]] | None:
    """Global name -> {"master", moments…: full tensor, "step", "hyper"} on rank 0; None elsewhere."""
    import torch.distributed as dist

    names = global_names(engine.module)
    by_id = {id(param): names[name] for name, param in engine.module.named_parameters()}
    mine = []
    for param, start, stop, master, tensors, scalars in _pieces(engine):
        pieces = {"master": master.cpu().clone(), **{k: v.cpu().clone() for k, v in tensors.items()}}
        mine.append((by_id[id(param)], tuple(param.shape), start, stop, pieces, scalars))
    everyone: list[Any] | None = [None] * ctx.world if ctx.rank == 0 else None
    dist.gather_object(mine, everyone, dst=0)
    if everyone is None:
        return None
    return assemble(everyone)


def assemble(everyone: list[list[Any]]) -> dict[str, dict[str, Any]]:
    """Full tensors from all ranks' fragments; replicas compared, coverage proven."""
    import torch

    out: dict[str, dict[str, Any]] = {}
    covered: dict[tuple[str, str], Any] = {}
    for rank, fragments in enumerate(everyone):
        for name, shape, start, stop, pieces, scalars in fragments:
            entry = out.setdefault(name, {"shape": shape, **scalars})
            assert entry["shape"] == shape, f"{name}: shape {shape} on rank {rank}, {entry['shape']} elsewhere"
            assert entry["step"] == scalars["step"], (
                f"{name}: step {scalars['step']} on rank {rank}, not {entry['step']}"
            )
            assert _plain(entry["hyper"]) == _plain(scalars["hyper"]), f"{name}: hyperparameters differ on rank {rank}"
            numel = 1
            for size in shape:
                numel *= size
            for kind, piece in pieces.items():
                if kind not in entry:
                    entry[kind] = torch.zeros(numel, dtype=piece.dtype)
                    covered[name, kind] = torch.zeros(numel, dtype=torch.bool)
                seen = covered[name, kind][start:stop]
                old = entry[kind][start:stop]
                where = f"{name} {kind} [{start}:{stop}] rank {rank}"
                same = bits_equal(old[seen], piece[seen])
                assert same, f"{where}: replicas differ, {old[seen][:4].tolist()} and {piece[seen][:4].tolist()}"
                entry[kind][start:stop] = piece
                covered[name, kind][start:stop] = True
    for (name, kind), seen in covered.items():
        assert bool(seen.all()), f"{name} {kind}: {int((~seen).sum())} of {seen.numel()} elements belong to no rank"
    kinds = {name: {k for k in entry if k not in ("shape", "step", "hyper")} for name, entry in out.items()}
    widest = set().union(*kinds.values())
    for name, have in kinds.items():
        assert have == widest, f"{name}: has {sorted(have)}, others {sorted(widest)}"
    return out


# ------------------------------------------------------------------------------------- per-rank state


def local_state(engine: Any) -> dict[str, Any]:
    """What this rank holds beside the optimizer's tensors, all of it copied."""
    import numpy as np
    import torch

    names = global_names(engine.module)
    persistent = set(engine.module.state_dict().keys())
    buffers = {name: buf.detach().cpu().clone() for name, buf in engine.module.named_buffers()}
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    scaler_state: dict[str, Any] = {}
    for holder in (getattr(engine.optimizer, name, None) for name in ("loss_scaler", "loss_scale_config")):
        if holder is not None and hasattr(holder, "__dict__"):
            scaler_state.update(vars(holder))
    for key in ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"):
        if hasattr(engine.optimizer, key):
            scaler_state[f"optimizer.{key}"] = getattr(engine.optimizer, key)
    return {
        "weights": {names[n]: p.detach().cpu().clone() for n, p in engine.module.named_parameters()},
        "frozen": {names[n] for n, p in engine.module.named_parameters() if not p.requires_grad},
        "buffers": {names[n]: b for n, b in buffers.items() if n in persistent},
        "volatile": {names[n]: b for n, b in buffers.items() if n not in persistent},
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state().clone() if torch.cuda.is_available() else None,
        },
        "param_groups": [_plain({k: v for k, v in g.items() if k != "params"}) for g in base.param_groups],
        "lr_scheduler": None
        if engine.lr_scheduler is None
        else _plain({k: v for k, v in engine.lr_scheduler.state_dict().items() if not callable(v)}),
        "scaler": {k: v for k, v in scaler_state.items() if isinstance(v, (int, float, str, bool, type(None)))},
        "counters": {
            name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps", "micro_steps")
        },
    }


def restore_by_hand(engine: Any, saved: dict[str, Any]) -> None:
    """Put back what native checkpoints leave out or get wrong.

    That is the generators, this rank's buffers (only rank 0's are saved), `micro_steps`, and frozen
    parameters of experts: under ZeRO-2 DeepSpeed loads rank 0's over those of every other rank.
    """
    import numpy as np
    import torch

    names = global_names(engine.module)
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if names[name] in saved["buffers"]:
                buffer.copy_(saved["buffers"][names[name]])
        for name, param in engine.module.named_parameters():
            if not param.requires_grad:
                param.copy_(saved["weights"][names[name]])
    engine.micro_steps = saved["counters"]["micro_steps"]
    random.setstate(saved["rng"]["python"])
    np.random.set_state(saved["rng"]["numpy"])
    torch.set_rng_state(saved["rng"]["torch"])
    if saved["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(saved["rng"]["cuda"])


def set_expert_of(name: str) -> tuple[str, int] | None:
    """(layer prefix, global expert id) of a global name, or None for a dense one."""
    match = _EXPERT.match(name)
    return (match[1], int(match[2])) if match else None


# ------------------------------------------------------------------------------------------ comparing


def bits_equal(a: Any, b: Any) -> bool:
    """Same dtype, same shape, same bits (so NaN equals itself and 0.0 differs from -0.0)."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _tensor_difference(label: str, a: Any, b: Any) -> str | None:
    if bits_equal(a, b):
        return None
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{label}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    wrong = (a.double() != b.double()).view(-1)
    if not bool(wrong.any()):
        return f"{label}: values equal, bits differ"
    first = int(wrong.nonzero()[0])
    biggest = float((a.double() - b.double()).abs().max())
    x, y = a.reshape(-1)[first].item(), b.reshape(-1)[first].item()
    return f"{label}: {int(wrong.sum())}/{wrong.numel()} differ, first [{first}] {x!r} != {y!r}, max {biggest:.3g}"


def global_differences(
    a: dict[str, dict[str, Any]] | None,
    b: dict[str, dict[str, Any]] | None,
    *,
    skip: tuple[str, ...] = (),
    only_expert: bool | None = None,
) -> list[str]:
    """How two global states differ; [] when they do not (and on ranks that hold none)."""
    import torch

    if a is None or b is None:
        return []
    out = [f"{name}: only in the first" for name in sorted(a.keys() - b.keys())]
    out += [f"{name}: only in the second" for name in sorted(b.keys() - a.keys())]
    for name in sorted(a.keys() & b.keys()):
        if only_expert is not None and (set_expert_of(name) is not None) != only_expert:
            continue
        one, two = a[name], b[name]
        for key in sorted((one.keys() | two.keys()) - set(skip)):
            label = f"{name} {key}"
            if key not in one or key not in two:
                out.append(f"{label}: only in the {'first' if key in one else 'second'}")
            elif torch.is_tensor(one[key]):
                out += filter(None, [_tensor_difference(label, one[key], two[key])])
            elif _plain(one[key]) != _plain(two[key]):
                out.append(f"{label}: {one[key]!r} != {two[key]!r}")
    return out


def local_differences(a: dict[str, Any], b: dict[str, Any], *, skip: tuple[str, ...] = ()) -> list[str]:
    """How two per-rank states differ."""
    out = []
    for section in ("weights", "buffers", "volatile"):
        if section in skip:
            continue
        out += [f"{section} {n}: only in one" for n in sorted(a[section].keys() ^ b[section].keys())]
        for name in sorted(a[section].keys() & b[section].keys()):
            out += filter(None, [_tensor_difference(f"{section} {name}", a[section][name], b[section][name])])
    if "rng" not in skip:
        out += [f"rng {k}: differs" for k in a["rng"] if _plain(a["rng"][k]) != _plain(b["rng"][k])]
    for section in ("param_groups", "lr_scheduler", "scaler", "counters"):
        if section not in skip and a[section] != b[section]:
            out.append(f"{section}: {a[section]!r} != {b[section]!r}")
    return out


def weights_differ_from_masters(local: dict[str, Any], whole: dict[str, dict[str, Any]]) -> list[str]:
    """Weights of this rank that are not exactly the cast masters."""
    out = []
    for name, weight in local["weights"].items():
        if name in local["frozen"] or weight.numel() == 0:
            continue
        expected = whole[name]["master"].view(weight.shape).to(weight.dtype)
        out += filter(None, [_tensor_difference(f"weight {name} against cast(master)", weight, expected)])
    return out


def _plain(value: Any) -> Any:
    """A comparable copy: tensors and arrays become (dtype, shape, bytes)."""
    import numpy as np
    import torch

    if torch.is_tensor(value):
        value = value.detach().cpu()
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return ("tensor", str(value.dtype), tuple(value.shape), raw)
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
