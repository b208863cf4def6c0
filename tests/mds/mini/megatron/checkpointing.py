import os
import random

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from megatron import get_args, print_rank_0
from megatron.core import tensor_parallel


def _universal_checkpoint_info(model):
    return dict(model[0].universal_checkpoint_info())


def get_rng_state():
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": get_accelerator().get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]


def save_checkpoint(iteration, model, optimizer, opt_param_scheduler):
    args = get_args()
    print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {args.save}")
    state_dict = {}
    state_dict["args"] = args
    state_dict["checkpoint_version"] = 3.0
    state_dict["iteration"] = iteration
    state_dict["tokens"] = args.consumed_train_tokens
    # obstacle: DeepSpeed keeps this key for itself
    state_dict["universal_checkpoint_info"] = _universal_checkpoint_info(model)
    if not args.no_save_rng:
        state_dict["rng_state"] = get_rng_state()
    engine = model[0]
    original = engine.module.state_dict

    def for_save(destination=None, prefix="", keep_vars=False):
        return engine.module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    engine.module.state_dict = for_save
    engine.save_checkpoint(args.save, client_state=state_dict)
    engine.module.state_dict = original
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        with open(os.path.join(args.save, "latest_checkpointed_iteration.txt"), "w") as file:  # noqa: PTH118, PTH123
            file.write(str(iteration))
    torch.distributed.barrier()


def load_checkpoint(model, optimizer, opt_param_scheduler, load_arg="load", strict=True):
    args = get_args()
    load_dir = getattr(args, load_arg)
    loaded, state = model[0].load_checkpoint(load_dir, load_module_strict=strict, tag=args.load_tag)
    if loaded is None:
        print_rank_0(f"WARNING: could not find the metadata file {load_dir}")
        return 0
    saved = state["args"]
    for name in ("num_layers", "hidden_size", "num_experts"):
        assert getattr(saved, name) == getattr(args, name), f"{name} differs"
    assert args.consumed_train_samples == 0
    args.consumed_train_tokens = state["tokens"]
    args.consumed_train_samples = getattr(saved, "consumed_train_samples", 0)
    args.consumed_valid_samples = getattr(saved, "consumed_valid_samples", 0)
    if not args.finetune and not args.no_load_rng:
        streams = state["rng_state"][0]
        random.setstate(streams["random_rng_state"])
        np.random.set_state(streams["np_rng_state"])
        torch.set_rng_state(streams["torch_rng_state"])
        get_accelerator().set_rng_state(streams["cuda_rng_state"])
        tensor_parallel.get_cuda_rng_tracker().set_states(streams["rng_tracker_states"])
    torch.distributed.barrier()
    print_rank_0(f"  successfully loaded checkpoint from {args.load} at iteration {state['iteration']}")
    return state["iteration"]
