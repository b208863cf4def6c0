import argparse
import os

import deepspeed


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in (
        ("num-layers", 2),
        ("hidden-size", 16),
        ("num-attention-heads", 2),
        ("seq-length", 16),
        ("vocab-size", 64),
        ("num-experts", 4),
        ("moe-expert-parallel-size", 1),
        ("expert-interval", 2),
        ("topk", 1),
        ("micro-batch-size", 1),
        ("global-batch-size", 4),
        ("train-iters", 0),
        ("train-tokens", None),
        ("lr-warmup-iters", 0),
        ("lr-decay-iters", 100),
        ("seed", 1234),
        ("eval-interval", 1000),
        ("eval-iters", 1),
        ("save-interval", None),
        ("exit-interval", None),
        ("num-workers", 0),
        ("zero-stage", 0),
        ("local_rank", None),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, number in (("lr", 1e-3), ("min-lr", 0.0), ("moe-loss-coeff", 0.1), ("hidden-dropout", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=number)
    for name in ("save", "load", "load-tag", "lr-decay-style"):
        parser.add_argument(f"--{name}", default=None)
    parser.add_argument("--kill-switch-file", default=None)
    for name in (
        "bf16",
        "finetune",
        "no-load-rng",
        "no-save-rng",
        "no-pipeline-parallel",
        "create-moe-param-group",
        "exit-signal-handler",
    ):
        parser.add_argument(f"--{name}", action="store_true")
    # obstacle: both are on by default and need what is not installed
    parser.add_argument("--no-masked-softmax-fusion", action="store_false", dest="masked_softmax_fusion")
    parser.add_argument("--no-gradient-accumulation-fusion", action="store_false", dest="gradient_accumulation_fusion")
    # obstacle: a scripted function computes its first calls otherwise than the others
    parser.add_argument("--no-bias-dropout-fusion", action="store_false", dest="bias_dropout_fusion")
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args()
    args.rank = int(os.environ["RANK"])
    args.world_size = int(os.environ["WORLD_SIZE"])
    args.consumed_train_samples = args.consumed_valid_samples = args.consumed_train_tokens = 0
    return args
