"""The projects that can be patched."""

from __future__ import annotations

from moc_ckpt.patching.deepspeed import DEEPSPEED
from moc_ckpt.patching.megatron_fixes import FIXES
from moc_ckpt.patching.megatron_hooks import HOOKS
from moc_ckpt.patching.patch import Target

__all__ = ["MEGATRON_DEEPSPEED", "TARGETS"]

MEGATRON_DEEPSPEED = Target(
    name="megatron-deepspeed",
    package="megatron",
    required=("megatron/training.py", "megatron/checkpointing.py", "megatron/arguments.py"),
    patches=(*HOOKS, *FIXES),
)

TARGETS = {target.name: target for target in (MEGATRON_DEEPSPEED, DEEPSPEED)}
