"""DeepSpeedCPUAdam keeps part of its state in C++, out of reach: it is brought there by replaying steps."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["replay_bias_correction"]


def replay_bias_correction(optimizer: Any) -> None:
    """Gives DeepSpeedCPUAdam the bias correction that an uninterrupted run would have.

    It multiplies beta ** step up step by step, but computes a power after a jump of the step count; the two
    differ in their last bit, and so would the masters. The steps up to the restored one are therefore taken on one
    scratch element (microseconds each). Does nothing for other optimizers.
    """
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    steps = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(1) for _ in range(4))
    betas = [group["betas"] for group in optimizer.param_groups]
    update = optimizer.ds_opt_adam.adam_update
    for step in range(1, steps + 1):
        for beta1, beta2 in betas:
            update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, param, grad, exp_avg, exp_avg_sq)
