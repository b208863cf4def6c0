"""The trainings of the accuracy experiment: real engines, real checkpoints, in one worker process.

Each worker is a world of one rank on one thread; several of them run side by side. A fault is the end of one engine
and a restore into a newly built one, in the same process; what the old one knew is gone with it.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _plt_design import (
    CONTINUED,
    ORDER,
    RESTART,
    ROUTING,
    Run,
    Settings,
    expected_plt,
    lost_tokens,
    proportion_lost,
    restored_versions,
    schedule,
    window_means,
)
from gpt_moe.arguments import parse_args, validate
from gpt_moe.data import TokenStream, build_streams, vocabulary
from gpt_moe.ds_config import absorb_file, build_ds_config
from gpt_moe.progress import Progress
from gpt_moe.runtime import Runtime, prepare_environment, preserved_rng, quiet, seed_everything, start

__all__ = ["Training", "control", "environment", "first_half", "second_half", "start_worker"]

_EVAL_SEED = 20240808
_EVAL_COST = 1 / 3  # of a training step, for the progress bar

_runtime: Runtime | None = None
_queue: Any = None


def start_worker(queue: Any) -> None:
    """Prepares this process; called once.

    Args:
        queue: takes finished units of work (training steps), for the progress bar; None for none.
    """
    global _runtime, _queue
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    args = parse_args([])
    prepare_environment(args)
    log = logging.getLogger("moc_ckpt")
    log.setLevel(logging.WARNING)
    log.addHandler(logging.StreamHandler())
    _runtime, _queue = start(args), queue
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went: nobody takes the results then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _report(units: float) -> None:
    if _queue is not None:
        _queue.put(units)


def environment() -> dict[str, str]:
    """Returns the versions and the device that the numbers depend on."""
    import platform
    from importlib.metadata import version

    names = ("torch", "deepspeed", "megatron-core", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": f"CPU ({platform.machine()}), {os.cpu_count()} cores, one thread per training",
    }


def _trainer_class() -> type:
    """Returns the program's trainer, one step at a time and with exchangeable data."""
    from gpt_moe.train import Trainer

    class StepTrainer(Trainer):
        def step(self) -> float:
            return float(self._iteration()[0])

        def use_training_data(self, stream: TokenStream) -> None:
            self._train_data = stream

    return StepTrainer


class Training:
    """One engine with its data, its evaluation, and an own count of the tokens its experts processed.

    The count is taken from what the gates dispatch, not from where the plugin takes its own.

    Args:
        settings: of the experiment.
        seed: of weights, data order and routing.
        k: `k_persist` of the engine's own checkpoints.

    Attributes:
        engine: the DeepSpeed engine.
        losses: training loss of every step since it was built.
        data: fingerprint of the text.
        parameters: parameters of the model, and those of them in experts.
    """

    def __init__(self, settings: Settings, seed: int, k: int) -> None:
        from gpt_moe.model import moe_layers, parameter_counts

        assert _runtime is not None, "start_worker comes first"
        args = parse_args([*settings.arguments(seed)])
        args.moc_checkpoint = plugin_section(settings, k)
        absorb_file(args, {}, _runtime.world_size)
        validate(args, _runtime.world_size)
        ds_config, _ = build_ds_config(args, {})
        train, held_out, self.data = build_streams(args)
        # One random sample of the held-out text, the same in every run.
        held_out = dataclasses.replace(held_out, shuffled=True, seed=_EVAL_SEED)
        seed_everything(seed, 0)
        self.engine = _build_engine(args, ds_config, _runtime)
        self._args, self._progress = args, Progress.start(args, 1, self.data)
        self._layers = moe_layers(self.engine.module)
        self._trainer = _trainer_class()(self.engine, args, _runtime, self._progress, (train, held_out), self._layers)
        self.parameters = parameter_counts(self.engine.module, args.num_experts)
        self._train = train
        self._counts = torch.zeros(len(self._layers), args.num_experts, dtype=torch.int64)
        self._routed = 0
        self._handles = [
            layer.deepspeed_moe.gate.register_forward_hook(self._count(number))
            for number, layer in enumerate(self._layers)
        ]
        self.losses: list[float] = []
        self.engine.train()
        seed_everything(seed, 0)

    def _count(self, layer: int) -> Callable[..., None]:
        def hook(gate: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if gate.training:
                self._counts[layer] += dispatched(output, self._args.num_experts)
                self._routed += int(output[-1].sum())

        return hook

    @property
    def counts(self) -> list[list[int]]:
        """Per layer, for each expert the tokens it has processed since the engine was built."""
        return self._counts.tolist()

    @property
    def processed_share(self) -> float:
        """Share of the routed tokens that were not dropped for lack of capacity."""
        return float(self._counts.sum()) / max(1, self._routed)

    def digests(self) -> list[list[str]]:
        """Returns per layer, for each expert a digest of its weights."""
        return [[_digest(expert) for expert in layer.deepspeed_moe.experts.deepspeed_experts] for layer in self._layers]

    def client_state(self) -> dict[str, Any]:
        """Returns what goes into a checkpoint beside the engine's state."""
        return self._progress.client_state()

    def load(self, directory: Path) -> None:
        """Restores the newest checkpoint of a directory.

        Args:
            directory: a checkpoint root.
        """
        path, state = self.engine.load_checkpoint(str(directory))
        if path is None or state is None:
            raise RuntimeError(f"nothing to restore in {directory}")
        self._progress.restore(state)
        if self._progress.iteration != self.engine.global_steps:
            raise RuntimeError(f"restored step {self.engine.global_steps} with data of {self._progress.iteration}")

    def reseed_routing(self, variant: int) -> None:
        """Draws other random numbers from here on.

        Args:
            variant: which.
        """
        seed_everything(self._args.seed * 1_000 + variant, 0)

    def reorder_data(self, variant: int) -> None:
        """Takes other training samples from here on.

        Args:
            variant: which.
        """
        other = dataclasses.replace(self._train, seed=self._train.seed * 1_000 + variant)
        self._trainer.use_training_data(other)

    def train(self, until: int, after_step: Callable[[int], None] = lambda _step: None) -> None:
        """Trains until a step.

        Args:
            until: the last step.
            after_step: called with each finished step.
        """
        while self._progress.iteration < until:
            self.losses.append(self._trainer.step())
            after_step(self._progress.iteration)
            _report(1.0)

    def evaluate(self) -> float:
        """Returns the loss on the held-out text; training is left as it was."""
        with preserved_rng():
            seed_everything(_EVAL_SEED, 0)
            loss = self._trainer.evaluate()
        _report(self._args.eval_iters * _EVAL_COST)
        return loss

    def evaluate_without_experts(self, *, exchanged: bool) -> float:
        """Returns the loss on the held-out text while the experts do not do their work.

        Args:
            exchanged: every token is processed by the expert next to its own; otherwise the experts answer nothing.
        """

        # Dispatched tokens are [1, experts, capacity, hidden].
        def before(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (inputs[0].roll(1, dims=1), *inputs[1:]) if exchanged else inputs

        def after(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.roll(-1, dims=1) if exchanged else torch.zeros_like(output)

        experts = [layer.deepspeed_moe.experts for layer in self._layers]
        handles = [item.register_forward_pre_hook(before) for item in experts]
        handles += [item.register_forward_hook(after) for item in experts]
        try:
            return self.evaluate()
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Ends the engine."""
        for handle in self._handles:
            handle.remove()
        self.engine.moc.close()
        self.engine.destroy()
        del self.engine, self._trainer, self._layers
        gc.collect()


def dispatched(output: Any, experts: int) -> torch.Tensor:
    """Returns how many tokens each expert gets to process in one call of a gate: int64 [experts].

    Args:
        output: what DeepSpeed's TopKGate returned: routes (since 0.19) with index -1 where a token was dropped, before
            that a mask [tokens, experts, capacity].
        experts: number of experts.
    """
    if isinstance(output[2], torch.Tensor):
        return output[2].sum(dim=(0, 2), dtype=torch.int64)
    routes = output[3]
    return torch.bincount(routes[routes >= 0], minlength=experts)


def plugin_section(settings: Settings, k: int) -> dict[str, Any]:
    """Returns the section `moc_checkpoint` of the ds_config.

    Args:
        settings: of the experiment.
        k: experts per layer in a checkpoint.
    """
    return {
        "enabled": True,
        "selection": "sequential",
        "k_snapshot": k,
        "k_persist": k,
        "dynamic_k": False,
        "plt_total_tokens": settings.total_tokens,
        "storage": {"keep_last": 1},
    }


def first_half(settings: Settings, seed: int, folder: Path, then_continue: bool) -> list[dict[str, Any]]:
    """Trains a seed up to the fault and writes the checkpoints of every (K, interval) on the way.

    Saving changes no bit of the training, so one training serves all of them.

    Args:
        settings: of the experiment.
        seed: the seed.
        folder: where the checkpoint directories go; what is there is removed.
        then_continue: go on without a fault afterwards.

    Returns:
        The record of the half, and that of the CONTINUED run if asked for.
    """
    from moc_ckpt.config import parse_config
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    training = Training(settings, seed, settings.experts)
    writers = {
        k: MocCheckpoint(training.engine, parse_config(plugin_section(settings, k)))
        for k in settings.ks
        if k < settings.experts
    }
    due = schedule(settings)
    counts: dict[int, list[list[int]]] = {}
    digests: dict[int, list[list[str]]] = {}
    saves, save_seconds = 0, 0.0

    def after_step(step: int) -> None:
        nonlocal saves, save_seconds
        for writer in writers.values():
            writer.step_done(skipped=False)  # the engine itself tells only its own plugin
        if step not in due and step != settings.fault:
            return
        counts[step], digests[step] = training.counts, training.digests()
        started = time.perf_counter()
        for k, interval in due.get(step, ()):
            directory = folder / Run(seed, CONTINUED, k, interval).directory
            writers[k].save(str(directory), client_state=training.client_state())
            saves += 1
        save_seconds += time.perf_counter() - started

    training.train(settings.fault, after_step)
    for writer in writers.values():
        writer.close()
    full = folder / Run(seed, CONTINUED, settings.experts).directory
    training.engine.save_checkpoint(str(full), client_state=training.client_state())
    at_fault = training.evaluate()
    half = {
        "half": seed,
        "at_fault": at_fault,
        "counts": counts,
        "digests": digests,
        "processed_share": training.processed_share,
        "parameters": training.parameters,
        "data": training.data,
        "environment": environment(),
        "train": window_means(training.losses, settings.window),
        "saves": saves + 1,
        "save_seconds": round(save_seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    records = [half]
    if then_continue:
        run = Run(seed, CONTINUED, settings.experts)
        nothing = [0] * len(counts[settings.fault])
        outcome = {"plt": 0.0, "plt_recount": 0.0, "lost": nothing, "after_fault": at_fault}
        training.losses.clear()
        records.append(_finish(settings, run, training, outcome))
    training.close()
    return records


def second_half(settings: Settings, run: Run, folder: Path, half: dict[str, Any]) -> dict[str, Any]:
    """Restores a checkpoint into a new engine and trains it to the end.

    Args:
        settings: of the experiment.
        run: which run.
        folder: where its seed's checkpoint directories are.
        half: record of the first half.

    Returns:
        The record of the run.
    """
    training = Training(settings, run.seed, run.k)
    training.load(folder / run.directory)
    versions = restored_versions(training.digests(), half["digests"])
    lost = lost_tokens(half["counts"], settings.fault, versions)
    outcome = {
        "plt": training.engine.moc.plt,
        "plt_recount": proportion_lost(lost, settings.total_tokens, settings.top_k),
        "plt_expected": expected_plt(settings, run.k, run.interval),
        "lost": lost,
        "versions": versions,
        "after_fault": training.evaluate(),
    }
    if run.kind == ROUTING:
        training.reseed_routing(run.variant)
    if run.kind == ORDER:
        training.reorder_data(run.variant)
    record = _finish(settings, run, training, outcome)
    training.close()
    return record


def control(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Measures what the experts are worth at the fault: what a loss of all that they are would cost.

    Args:
        settings: of the experiment.
        seed: the seed.
        folder: where its checkpoint directories are.

    Returns:
        A record: loss with whole experts, with experts that answer nothing, and with every token at the expert
        next to its own.
    """
    training = Training(settings, seed, settings.experts)
    training.load(folder / Run(seed, RESTART, settings.experts).directory)
    record = {
        "control": seed,
        "whole": training.evaluate(),
        "silent": training.evaluate_without_experts(exchanged=False),
        "exchanged": training.evaluate_without_experts(exchanged=True),
    }
    training.close()
    return record


def _finish(settings: Settings, run: Run, training: Training, outcome: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    training.train(settings.steps)
    final = training.evaluate()
    return {
        "run": dataclasses.asdict(run),
        **outcome,
        "final": final,
        "train": window_means(training.losses, settings.window),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _build_engine(args: Any, ds_config: dict[str, Any], runtime: Runtime) -> Any:
    import deepspeed
    from gpt_moe.model import build_model
    from gpt_moe.optimizer import build_optimizer, build_schedule, parameter_groups

    with quiet(True):
        model = build_model(args, vocabulary(args), runtime.device, swap_groups=False)
        groups = parameter_groups(model, args.weight_decay)
        optimizer, _ = build_optimizer(args, groups, ds_config, runtime.device)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=build_schedule(args, ds_config), config=ds_config
        )
    return engine


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()
