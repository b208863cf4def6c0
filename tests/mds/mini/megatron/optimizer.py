import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from megatron import get_args


def get_megatron_optimizer(model):
    args = get_args()
    decay, rest = [], []
    for name, param in model[0].named_parameters():
        (rest if name.endswith(".bias") or param.dim() == 1 else decay).append(param)
    groups = [
        {"name": "wd_no_scale_lr", "params": decay, "wd_mult": 1.0},
        {"name": "no_wd_no_scale_lr", "params": rest, "wd_mult": 0.0},
    ]
    if args.create_moe_param_group:
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return torch.optim.Adam(groups, lr=args.lr, weight_decay=0.01)
