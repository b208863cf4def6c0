"""LazarusMoE under a DeepSpeed engine.

DeepSpeed trains the dense parameters, experts are trained by `ReplicaOptimizer`, and both take one step together: with
one gradient norm, one clip coefficient, and the options of the same param groups. DeepSpeed neither broadcasts, reduces
nor partitions an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moc_ckpt.comm import Comm
from moc_ckpt.config import LAZARUS_KEY, LazarusConfig, find_config, parse_lazarus
from moc_ckpt.errors import ConfigError, ModelMismatchError, UnsupportedError
from moc_ckpt.integrations.deepspeed.expert_groups import ExpertGroups, separate
from moc_ckpt.integrations.deepspeed.rebalance import Rebalancer
from moc_ckpt.lazarus.history import Rebalance
from moc_ckpt.lazarus.layer import LazarusMoE
from moc_ckpt.lazarus.replicas import ExpertParam, LayerReplicas, ReplicaOptimizer, State
from moc_ckpt.snapshot.places import node_name

__all__ = ["EngineReplicas", "Preparation", "prepare"]

# Their update of an element depends on that element alone, whatever tensor it lies in.
_ELEMENTWISE = ("Adam", "AdamW", "FusedAdam", "SGD")
_WRAPPER = "DeepSpeedZeroOptimizer"
_RENDEZVOUS_S = 120.0
_WORK_S = 600.0


def find_replicated(model: torch.nn.Module) -> list[tuple[str, LazarusMoE]]:
    """Returns the layers with replicas, in named_modules order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LazarusMoE)]


def prepare(arguments: dict[str, Any], settings: Mapping[str, Any]) -> Preparation | None:
    """Readies the arguments of DeepSpeedEngine for a model with replicas; collective for such a model.

    Args:
        arguments: by name; `model_parameters` is replaced, and experts are taken out of `optimizer`.
        settings: the ds_config.

    Returns:
        What is needed to build the engine; None, and nothing touched, for a model without such layers.

    Raises:
        UnsupportedError: on all ranks, naming what cannot be trained with replicas.
        ConfigError: on all ranks, if the ds_config's section is wrong.
    """
    layers = find_replicated(arguments["model"])
    if not layers:
        return None
    # Ranks hold other experts, so what is wrong may be wrong on some alone; the others would build and wait for them.
    comm = Comm(rendezvous_s=_RENDEZVOUS_S, commit_s=_WORK_S)
    return comm.agree("readying the experts", lambda: _prepare(arguments, settings, layers), wait="rendezvous")


def _prepare(
    arguments: dict[str, Any], settings: Mapping[str, Any], layers: list[tuple[str, LazarusMoE]]
) -> Preparation:
    section = parse_lazarus(settings)
    _check_settings(settings)
    moc = find_config(settings)
    if section.rebalance_interval and not moc.enabled:
        raise ConfigError(
            f"{LAZARUS_KEY}.rebalance_interval is {section.rebalance_interval}, and nobody counts tokens",
            where="ds_config",
            fix='set "moc_checkpoint": {"enabled": true}, whose ledger has the counts; or rebalance_interval to 0',
        )
    _check_model(arguments["model"], layers)
    arguments["model_parameters"], groups = separate(
        arguments["model"],
        arguments.get("optimizer"),
        arguments.get("model_parameters"),
        arguments.get("lr_scheduler"),
    )
    return Preparation(layers, groups, section, moc.timeouts.rendezvous_s)


class Preparation:
    """An engine that is about to be built.

    Args:
        layers: the layers with replicas, with their names.
        groups: what was taken out of DeepSpeed's param groups.
        settings: the section of the ds_config.
        deadline_s: seconds after which a decision about placements gives up on ranks that do not take part.
    """

    def __init__(
        self,
        layers: list[tuple[str, LazarusMoE]],
        groups: ExpertGroups,
        settings: LazarusConfig,
        deadline_s: float,
    ) -> None:
        self._layers = layers
        self._groups = groups
        self._settings = settings
        self._deadline_s = deadline_s

    @contextmanager
    def building(self) -> Iterator[None]:
        """While DeepSpeed builds its engine: it broadcasts no expert."""
        params = [
            param for _, layer in self._layers for param in layer.parameters() if getattr(param, "lazarus", False)
        ]
        for param in params:
            # DeepSpeed's mark of parameters that differ between ranks although they are data-parallel.
            param.ds_optim_param = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for param in params:
                del param.ds_optim_param  # type: ignore[attr-defined]

    def attach(self, engine: Any) -> EngineReplicas:
        """Takes over the experts of a built engine; collective.

        Raises:
            MocError: on all ranks, if the engine is not supported or ranks disagree about the experts.
        """
        comm = Comm(rendezvous_s=_RENDEZVOUS_S, commit_s=_WORK_S)
        # A rank may have no expert of a group, all of which are frozen, say.
        used = comm.exchange("finding the experts' param groups", lambda: set(self._groups.place_of.values()))
        followed = sorted(set().union(*used))
        layers = comm.agree("reading the experts", lambda: self._read(engine, followed), wait="rendezvous")
        signatures = comm.exchange("comparing the experts", lambda: self._signature(layers))
        _check_alike(signatures)
        rebalancer = None
        if self._settings.rebalance_interval:
            nodes = comm.exchange("finding the nodes", node_name)
            modules = [layer for _, layer in self._layers]
            # Alike on all ranks, so that they fail together.
            rebalancer = Rebalancer(engine, modules, self._settings, nodes, self._deadline_s)
        return EngineReplicas(engine, layers, followed, self._settings.optimizer_state, rebalancer)

    def _read(self, engine: Any, followed: Sequence[int]) -> list[LayerReplicas]:
        _check_engine(engine)
        group_of = {name: followed.index(place) for name, place in self._groups.place_of.items()}
        for _, layer in self._layers:
            layer.deepspeed_moe.experts.pack()  # the engine's cast has torn the weights apart
        return [
            LayerReplicas(
                f"MoE layer {ordinal} ({name})",
                layer.placement,
                {
                    expert: [
                        ExpertParam(inner, param, group_of.get(id(param)) if param.requires_grad else None)
                        for inner, param in module.named_parameters()
                    ]
                    for expert, module in zip(
                        layer.expert_ids, layer.deepspeed_moe.experts.deepspeed_experts, strict=True
                    )
                },
            )
            for ordinal, (name, layer) in enumerate(self._layers)
        ]

    def _signature(self, layers: list[LayerReplicas]) -> _Signature:
        experts = {
            (layer.where, expert): [
                (item.name, str(item.param.dtype), tuple(item.param.shape), item.group) for item in params
            ]
            for layer in layers
            for expert, params in layer.experts.items()
        }
        placements = [(layer.where, layer.placement.num_experts, layer.placement.slots) for layer in layers]
        return (placements, self._settings), experts


class EngineReplicas:
    """`engine.lazarus`: trains one engine's experts beside its optimizer. Building it is collective.

    Args:
        engine: a built engine.
        layers: the layers with replicas.
        followed: indices of the param groups of DeepSpeed's optimizer that experts of any rank go with.
        state: where the experts' optimizer state is.
        rebalancer: looks for better placements; None for no look.

    Attributes:
        replicas: the experts' optimizer.
    """

    def __init__(
        self,
        engine: Any,
        layers: list[LayerReplicas],
        followed: Sequence[int],
        state: State,
        rebalancer: Rebalancer | None = None,
    ) -> None:
        self._engine = engine
        self._rebalancer = rebalancer
        self._wrapper = engine.optimizer
        self._followed = tuple(followed)
        base = self._wrapper.optimizer
        self.replicas = ReplicaOptimizer(
            layers,
            base,
            [_options(base.param_groups[index]) for index in followed],
            state=state,
            group=dist.group.WORLD,
            # DeepSpeed's mean over data-parallel ranks, which it also takes for its own experts.
            divisor=dist.get_world_size(),
        )
        self._norm = torch.zeros(())
        self._deepspeed_step: Callable[..., Any] = self._wrapper.step
        self._deepspeed_norm: Callable[..., Any] = self._wrapper.scaled_global_norm
        self._wrapper.step = self._step
        self._wrapper.scaled_global_norm = self._global_norm

    @property
    def rebalance(self) -> Rebalance | None:
        """The latest plan of a better placement, equal on all ranks; None if staying is better, or none is looked for.

        It appears soon after the step at which it was decided, on one rank earlier than on another.
        """
        return None if self._rebalancer is None else self._rebalancer.plan

    def wait(self, timeout_s: float) -> bool:
        """Waits until `rebalance` is that of the last decision that was due; tells whether it is. Not collective."""
        return self._rebalancer is None or self._rebalancer.wait(timeout_s)

    def step_done(self) -> None:
        """Is called after every optimizer step, once the checkpoint's side is done with it; waits for nothing."""
        if self._rebalancer is not None:
            self._rebalancer.step_done()

    def follow(self) -> None:
        """Takes the options of DeepSpeed's param groups, which schedules change; not collective."""
        groups = self._wrapper.optimizer.param_groups
        for own, index in zip(self.replicas.optimizer.param_groups, self._followed, strict=True):
            own.update(_options(groups[index]))

    def close(self) -> None:
        """Takes the hooks off parameters and optimizer; not collective, may be repeated."""
        if self._rebalancer is not None:
            self._rebalancer.close()
        self.replicas.close()
        for name in ("step", "scaled_global_norm"):
            self._wrapper.__dict__.pop(name, None)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's step, and the experts'; at the end of each gradient accumulation, on all ranks."""
        if self._wrapper.loss_scale != 1.0:
            raise UnsupportedError(
                f"the loss is scaled by {self._wrapper.loss_scale}", where="LazarusMoE", fix="train in bf16 or fp32"
            )
        self.follow()
        self.replicas.reduce()
        result = self._deepspeed_step(*args, **kwargs)
        if self._wrapper.overflow:
            self.replicas.discard()
        else:
            self.replicas.step(self._scale())
        return result

    @torch.no_grad()
    def _global_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The norm of all gradients, every expert counted once; it decides about clipping of dense state and experts.

        Within DeepSpeed's step, after `reduce`.
        """
        dense = torch.as_tensor(self._deepspeed_norm(*args, **kwargs))
        experts = self.replicas.squared_norm()
        mine = torch.stack([experts, dense.to(experts).square()])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        # Added in the order of the ranks: the same bits everywhere, so that replicas stay alike.
        total = parts[0][1].clone()
        for part in parts:
            total += part[0]
        self._norm = total.sqrt().to(dense)
        return self._norm

    def _scale(self) -> torch.Tensor | float:
        """Returns what DeepSpeed multiplied the dense gradients with, by the formula of `unscale_and_clip_grads`."""
        if self._wrapper.clip_grad == 0.0:
            return 1.0
        norm = torch.where(torch.isfinite(self._norm), self._norm, torch.inf)
        return 1.0 / torch.clamp((norm + 1e-6) / self._wrapper.clip_grad, min=1.0)


_Signature = tuple[
    tuple[list[tuple[str, int, tuple[tuple[int, ...], ...]]], LazarusConfig],
    dict[tuple[str, int], list[tuple[str, str, tuple[int, ...], int | None]]],
]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    # FusedAdam counts its steps in the group: that count is the experts' own.
    return {name: value for name, value in group.items() if name not in ("params", "name", "moe", "step")}


def _check_alike(signatures: list[_Signature]) -> None:
    """Raises, on all ranks alike, if ranks have different ideas of the layers, or of an expert that they share."""
    for rank, (common, _) in enumerate(signatures):
        if common != signatures[0][0]:
            raise ModelMismatchError(
                f"ranks 0 and {rank} differ in the MoE layers' placements or the section {LAZARUS_KEY} of the "
                "ds_config",
                where="deepspeed.initialize",
                fix="build the model with the same placements, and give all ranks the same ds_config",
            )
    known: dict[tuple[str, int], tuple[int, Any]] = {}
    for rank, (_, experts) in enumerate(signatures):
        for key, params in experts.items():
            first, expected = known.setdefault(key, (rank, params))
            if params != expected:
                raise ModelMismatchError(
                    f"expert {key[1]} has other parameters on rank {rank} than on rank {first}",
                    where=key[0],
                    fix="build all replicas of an expert alike, and put them into the same param groups",
                )


def _check_settings(settings: Mapping[str, Any]) -> None:
    zero = settings.get("zero_optimization") or {}

    def on(section: str) -> bool:
        return bool((settings.get(section) or {}).get("enabled"))

    def offloads(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    refused = {
        f"ZeRO stage {zero.get('stage', 0)} (stages 1 and 2 work)": zero.get("stage", 0) not in (1, 2),
        "CPU or NVMe offload": offloads("offload_optimizer") or offloads("offload_param"),
        "zero_optimization.compute_grad_norm false": zero.get("compute_grad_norm") is False,
        "fp16 (bf16 and fp32 work)": on("fp16"),
        "torch autocast": on("torch_autocast"),
        "ZenFlow": bool(zero.get("zenflow")),
        "AutoEP": on("expert_parallel"),
        "tensor parallelism (TP)": ((settings.get("tensor_parallel") or {}).get("autotp_size") or 0) > 1,
        "sequence parallelism": (settings.get("sequence_parallel_size") or 1) > 1,
    }
    _refuse([name for name, used in refused.items() if used])


def _check_model(model: torch.nn.Module, layers: list[tuple[str, LazarusMoE]]) -> None:
    from deepspeed.moe.layer import MoE

    world = dist.get_world_size()
    refused = {
        "DeepSpeed's MoE layers beside it": any(isinstance(module, MoE) for module in model.modules()),
        "pipeline parallelism (PP)": "Pipeline" in type(model).__name__,
        "a process group smaller than the world": any(layer.ranks != world for _, layer in layers),
    }
    _refuse([name for name, used in refused.items() if used])
    for name, layer in layers:
        for expert, module in zip(layer.expert_ids, layer.deepspeed_moe.experts.deepspeed_experts, strict=True):
            if not any(param.numel() for param in module.parameters()):
                raise UnsupportedError(
                    f"expert {expert} of {name} has no parameters",
                    where="deepspeed.initialize",
                    fix="give the experts of LazarusMoE something to train, or use a plain module in its place",
                )


def _check_engine(engine: Any) -> None:
    wrapper, base = type(engine.optimizer).__name__, type(getattr(engine.optimizer, "optimizer", None)).__name__
    if wrapper != _WRAPPER:
        _refuse([f"the optimizer wrapper {wrapper} (e.g. fp32 gradient accumulation in ZeRO-1)"])
    if not engine.optimizer.gradient_average:
        _refuse(["gradient_allreduce_op other than mean"])
    if base not in _ELEMENTWISE:
        _refuse([f"the optimizer {base} ({', '.join(_ELEMENTWISE)} work)"])


def _refuse(found: list[str]) -> None:
    if found:
        raise UnsupportedError(
            f"LazarusMoE does not train with {', '.join(found)} yet",
            where="deepspeed.initialize",
            fix="turn it off, or use deepspeed.moe.layer.MoE",
        )
