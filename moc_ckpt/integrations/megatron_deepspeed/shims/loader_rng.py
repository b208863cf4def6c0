"""`loader-rng`: the data loaders draw from the generator that dropout draws from, after a resume has set it."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import (
    Concern,
    Finding,
    Machine,
    after_import,
    needed,
    require,
)

__all__ = ["SHIM"]

_TRAINING = "megatron.training"
_SAMPLERS = "megatron.data.data_samplers"


def _find(checkout: Checkout, _: Machine) -> Finding:
    return (
        require(checkout, _TRAINING, "build_train_valid_test_data_iterators")
        or require(checkout, _SAMPLERS, "build_pretraining_data_loader")
        or needed("iterators are made after the generators were restored")
    )


def _install(_: Checkout) -> None:
    after_import(_SAMPLERS, _give_generators)
    after_import(_TRAINING, _keep_generators)


def _give_generators(module: ModuleType) -> None:
    """Every loader seeds its workers from a generator of its own, now and whenever it begins again."""
    import torch

    original = module.build_pretraining_data_loader

    @functools.wraps(original)
    def build_pretraining_data_loader(*args: Any, **kwargs: Any) -> Any:
        loader = original(*args, **kwargs)
        # A repeating loader has the real one inside.
        inner = getattr(loader, "loader", loader)
        if isinstance(inner, torch.utils.data.DataLoader) and inner.generator is None:
            inner.generator = torch.Generator()
            inner.generator.manual_seed(torch.initial_seed())
        return loader

    module.build_pretraining_data_loader = build_pretraining_data_loader  # type: ignore[attr-defined]


def _keep_generators(module: ModuleType) -> None:
    """Building data sets and iterators leaves every generator where it was."""
    from moc_ckpt.integrations.deepspeed.rng import capture_rng, restore_rng

    original = module.build_train_valid_test_data_iterators

    @functools.wraps(original)
    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        streams = capture_rng()
        try:
            return original(*args, **kwargs)
        finally:
            restore_rng(streams)

    module.build_train_valid_test_data_iterators = build_train_valid_test_data_iterators  # type: ignore[attr-defined]


SHIM = Concern(
    name="loader-rng",
    why="iter(DataLoader) draws from the CPU generator after a checkpoint has restored it, so a resumed run with "
    "dropout on a CPU leaves the uninterrupted one",
    since="all versions",
    replaces="build_pretraining_data_loader, whose loaders get generators of their own, and "
    "build_train_valid_test_data_iterators, which leaves all generators as they were",
    find=_find,
    install=_install,
)
