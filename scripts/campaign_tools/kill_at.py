"""Kills a process at a named point: its n-th call of a function, before it or right after.

Trainers call `arm` themselves. Agents are other processes: `sitecustomize.py` in `startup` arms them as they start,
from MOC_CAMPAIGN_POINT.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["AGENT_POINTS", "TRAINER_POINTS", "arm", "arm_on_import"]

#: point -> (module, attribute), in the process of a trainer.
TRAINER_POINTS = {
    "plan": ("moc_ckpt.snapshot.stager", "Stager._plan"),
    "copy": ("moc_ckpt.snapshot.stager", "Stager._move"),
    "record": ("moc_ckpt.snapshot.local_slots", "LocalSlots.add_extra"),
    "vote": ("moc_ckpt.integrations.deepspeed.background", "Background._finish"),
    "persist": ("moc_ckpt.integrations.deepspeed.background", "Background._persist"),
}
#: The same in the process of an agent.
AGENT_POINTS = {
    "pack": ("moc_ckpt.persist.writer", "write_pack"),
    "part": ("moc_ckpt.persist.writer", "write_part"),
    "commit": ("moc_ckpt.persist.committer", "commit"),
    "manifest": ("moc_ckpt.storage.commit", "encode_manifest"),
    "pointer": ("moc_ckpt.storage.commit", "_move_latest"),
    "retention": ("moc_ckpt.persist.committer", "apply_retention"),
}


def arm(where: tuple[str, str], calls: int, *, after: bool) -> None:
    """Lets this process kill itself.

    Args:
        where: module and attribute of the function.
        calls: at which call, from 1.
        after: when the call has returned, else before it.
    """
    module = importlib.import_module(where[0])
    holder: Any = module
    *path, name = where[1].split(".")
    for part in path:
        holder = getattr(holder, part)
    original: Callable[..., Any] = getattr(holder, name)
    lock, left = threading.Lock(), [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with lock:
            left[0] -= 1
            now = left[0] == 0
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, wrapped)


def arm_on_import(text: str) -> None:
    """Arms an agent from `point:calls:after`, once its modules are there."""
    import wrapt

    point, calls, after = text.split(":")
    where = AGENT_POINTS[point]
    wrapt.register_post_import_hook(lambda _module: arm(where, int(calls), after=after == "1"), where[0])
