from .global_vars import get_args


def print_rank_0(text):
    import torch

    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


__all__ = ["get_args", "print_rank_0"]
