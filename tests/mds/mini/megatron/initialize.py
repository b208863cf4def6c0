import random

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from megatron import fused_kernels
from megatron.arguments import parse_args
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.global_vars import set_args


def initialize_megatron(extra_args_provider=None):
    args = parse_args(extra_args_provider)
    set_args(args)
    # obstacle: on a CPU the number of devices is not the number of ranks
    device = args.rank % get_accelerator().device_count()
    if args.local_rank is not None:
        assert args.local_rank == device, "expected local-rank to be the same as rank % device-count."
    args.local_rank = device
    deepspeed.init_distributed()
    if args.gradient_accumulation_fusion:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    if get_accelerator().device_name() == "cuda":
        fused_kernels.load(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    get_cuda_rng_tracker().add("model-parallel-rng", args.seed + 2718)
