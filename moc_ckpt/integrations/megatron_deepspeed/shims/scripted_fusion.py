"""`scripted-fusion`: TorchScript computes the first calls of a function in another way than all later ones."""

from __future__ import annotations

import argparse

from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout
from moc_ckpt.integrations.megatron_deepspeed.concern import Concern, Finding, Machine, needed, not_needed
from moc_ckpt.integrations.megatron_deepspeed.shims._parser import change_parser, needs_provider

__all__ = ["SHIM"]

_OPTIONS = {"--no-bias-dropout-fusion": "bias_dropout_fusion", "--no-bias-gelu-fusion": "bias_gelu_fusion"}


def _find(checkout: Checkout, machine: Machine) -> Finding:
    if not any(option in checkout.options for option in _OPTIONS):
        return not_needed(f"there is no {' and no '.join(_OPTIONS)}")
    if machine.device == "cuda":
        return not_needed("on CUDA the script warms these functions up before it trains")
    return needs_provider(checkout) or needed("a resumed process would repeat the first calls")


def _install(checkout: Checkout) -> None:
    found = {dest: False for option, dest in _OPTIONS.items() if option in checkout.options}

    def change(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(**found)

    change_parser(change)


SHIM = Concern(
    name="scripted-fusion",
    why="the first calls of a scripted function are profiled and round otherwise than the later, optimized ones; with "
    "--bf16 the first step of a resumed run then differs in the sixth digit",
    since="Megatron-DeepSpeed of January 2021",
    replaces="the defaults of --no-bias-dropout-fusion and --no-bias-gelu-fusion",
    find=_find,
    install=_install,
)
