"""Command-line arguments: Megatron's names, three presets, and the checks on them.

Precedence, weakest first: the defaults, the preset, what is given on the command line, the DeepSpeed JSON file
(see `ds_config.py`, which names every conflict). Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

__all__ = ["DEFAULTS", "PRESETS", "ArgumentError", "parse_args", "resolve_batch", "validate"]


class ArgumentError(ValueError):
    """An argument is wrong, or two of them contradict each other."""


DEFAULTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": None,
    "seq_length": 128,
    "max_position_embeddings": None,
    "init_method_std": 0.02,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "untie_embeddings_and_output_weights": False,
    "num_experts": 8,
    "moe_expert_parallel_size": 1,
    "expert_interval": 2,
    "topk": 1,
    "moe_train_capacity_factor": 1.0,
    "moe_eval_capacity_factor": 1.0,
    "moe_min_capacity": 4,
    "moe_loss_coeff": 0.01,
    "disable_moe_token_dropping": False,
    "lazarus": False,
    "lazarus_slots": None,
    "lazarus_fault_threshold": 1,
    "lazarus_loads": None,
    "lazarus_optimizer_state": "replicated",
    "lazarus_rebalance_interval": 0,
    "micro_batch_size": 4,
    "global_batch_size": None,
    "train_iters": 100,
    "exit_interval": None,
    "seed": 1234,
    "lr": 3e-4,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 0,
    "lr_decay_iters": None,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "bf16": False,
    "fp16": False,
    "zero_stage": 2,
    "deterministic": False,
    "data_path": None,
    "split": "969,30,1",
    "tokenizer_type": "ByteTokenizer",
    "vocab_size": None,
    "make_vocab_size_divisible_by": 128,
    "save": None,
    "load": None,
    "save_interval": None,
    "moc": True,
    "moc_checkpoint": None,
    "eval_interval": 100,
    "eval_iters": 0,
    "log_interval": 10,
    "loss_log": None,
    "verbose": False,
    "deepspeed_config": None,
    "fault_at_iter": None,
    "fault_rank": None,
    "local_rank": None,
    "preset": None,
    "deepspeed": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "seq_length": 128,
        "num_experts": 8,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_iters": 10,
        "make_vocab_size_divisible_by": 1,
        "eval_interval": 50,
        "eval_iters": 2,
    },
    "gpt-125m-8e": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "seq_length": 2048,
        "num_experts": 8,
        "micro_batch_size": 4,
        "global_batch_size": 256,
        "lr": 4.5e-4,
        "min_lr": 4.5e-6,
        "lr_warmup_iters": 375,
        "train_iters": 10000,
        "init_method_std": 0.014,
        "eval_iters": 10,
        "eval_interval": 500,
        "save_interval": 500,
    },
    "gpt-350m-16e": {
        "num_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "seq_length": 2048,
        "num_experts": 16,
        "micro_batch_size": 2,
        "global_batch_size": 256,
        "lr": 2.0e-4,
        "min_lr": 2.0e-6,
        "lr_warmup_iters": 375,
        "train_iters": 10000,
        "init_method_std": 0.014,
        "eval_iters": 10,
        "eval_interval": 500,
        "save_interval": 500,
    },
}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object such as '{\"k_persist\": 2}'")
    return value


def _tokenizer(text: str) -> str:
    names = {"byte": "ByteTokenizer", "bytetokenizer": "ByteTokenizer", "null": "NullTokenizer"}
    names["nulltokenizer"] = "NullTokenizer"
    if text.lower() not in names:
        raise argparse.ArgumentTypeError("choose ByteTokenizer or NullTokenizer")
    return names[text.lower()]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; absent arguments leave no attribute, so that presets can fill them."""
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py",
        description="Pre-train a GPT Mixture-of-Experts model (megatron-core model, DeepSpeed engine).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def add(group: Any, flag: str, help_text: str, **options: Any) -> None:
        default = DEFAULTS.get(flag.lstrip("-").replace("-", "_"))
        shown = "" if default in (None, False) else f" (default {default})"
        group.add_argument(flag, help=help_text + shown, **options)

    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=sorted(PRESETS), help="fill in a whole model; other arguments override it")
    add(group, "--num-layers", "transformer layers", type=int)
    add(group, "--hidden-size", "model width", type=int)
    add(group, "--num-attention-heads", "attention heads", type=int)
    add(group, "--ffn-hidden-size", "width inside an MLP or expert (default 4 x hidden size)", type=int)
    add(group, "--seq-length", "tokens per sample", type=int)
    add(group, "--max-position-embeddings", "learned positions (default the sequence length)", type=int)
    add(group, "--init-method-std", "standard deviation of the initial weights", type=float)
    add(group, "--hidden-dropout", "dropout after attention and MLP", type=float)
    add(group, "--attention-dropout", "dropout on attention weights", type=float)
    add(
        group,
        "--untie-embeddings-and-output-weights",
        "give the output layer its own weights",
        action="store_true",
    )

    group = parser.add_argument_group("mixture of experts")
    add(group, "--num-experts", "experts per MoE layer; 1 means a dense model", type=int)
    add(group, "--moe-expert-parallel-size", "ranks that share one set of experts", type=int)
    add(group, "--expert-interval", "every n-th layer is an MoE layer", type=int)
    add(group, "--topk", "experts per token", type=int)
    add(group, "--moe-train-capacity-factor", "expert capacity in training", type=float)
    add(group, "--moe-eval-capacity-factor", "expert capacity in evaluation", type=float)
    add(group, "--moe-min-capacity", "least capacity of an expert", type=int)
    add(group, "--moe-loss-coeff", "weight of the load-balancing loss", type=float)
    add(group, "--disable-moe-token-dropping", "unlimited expert capacity", action="store_true")

    group = parser.add_argument_group("replicated experts (Lazarus)")
    add(group, "--lazarus", "experts have replicas by load; no token is dropped", action="store_true")
    add(group, "--lazarus-slots", "experts per rank and layer (default experts / expert-parallel size)", type=int)
    add(group, "--lazarus-fault-threshold", "replicas that every expert has at least", type=int)
    add(
        group,
        "--lazarus-loads",
        "loads that replicas follow: numbers, a JSON file, or a directory of checkpoints, whose planned placement is "
        "used if there is one (default even)",
        metavar="LOADS",
    )
    add(
        group,
        "--lazarus-optimizer-state",
        "every replica has all state of an expert, or they share it out",
        choices=["replicated", "sharded"],
    )
    add(
        group,
        "--lazarus-rebalance-interval",
        "steps between two decisions about another placement, which --lazarus-loads carries out (default never)",
        type=int,
    )

    group = parser.add_argument_group("training")
    add(group, "--micro-batch-size", "samples per rank and micro-step", type=int)
    add(group, "--global-batch-size", "samples per iteration (default micro batch x ranks)", type=int)
    add(group, "--train-iters", "iterations in the whole run", type=int)
    add(group, "--exit-interval", "stop when the iteration is a multiple of this", type=int)
    add(group, "--seed", "seed of weights, data order, dropout and routing", type=int)
    add(group, "--lr", "peak learning rate", type=float)
    add(group, "--min-lr", "final learning rate", type=float)
    add(group, "--lr-decay-style", "shape of the decay", choices=["constant", "linear", "cosine"])
    add(group, "--lr-warmup-iters", "linear warm-up iterations", type=int)
    add(group, "--lr-decay-iters", "iterations until --min-lr (default --train-iters)", type=int)
    add(group, "--weight-decay", "AdamW weight decay (not on biases and norms)", type=float)
    add(group, "--clip-grad", "gradient norm limit, 0 for none", type=float)
    add(group, "--adam-beta1", "AdamW beta 1", type=float)
    add(group, "--adam-beta2", "AdamW beta 2", type=float)
    add(group, "--adam-eps", "AdamW epsilon", type=float)
    add(group, "--bf16", "bfloat16 weights, float32 masters", action="store_true")
    add(group, "--fp16", "float16 weights, float32 masters, loss scaling", action="store_true")
    add(group, "--zero-stage", "ZeRO stage", type=int, choices=[0, 1, 2])
    add(group, "--deterministic", "use deterministic kernels (a CPU run always is deterministic)", action="store_true")
    add(
        group,
        "--deepspeed_config",
        "DeepSpeed JSON; its values win over arguments, conflicts are named",
        metavar="PATH",
    )
    group.add_argument("--deepspeed", action="store_true", help="accepted for compatibility; DeepSpeed is always used")
    group.add_argument("--local-rank", "--local_rank", dest="local_rank", type=int, help="set by the launcher")

    group = parser.add_argument_group("data")
    add(
        group,
        "--data-path",
        "prefix of a Megatron .bin/.idx pair; without it the source files of the Python standard library are the text "
        "(make a pair with python scripts/gpt_moe/make_indexed.py)",
        metavar="PREFIX",
    )
    add(group, "--split", "weights of train, validation and test documents")
    add(group, "--tokenizer-type", "ByteTokenizer (256 bytes + end of document) or NullTokenizer", type=_tokenizer)
    add(group, "--vocab-size", "tokens of the .bin file without the end of document, for NullTokenizer", type=int)
    add(group, "--make-vocab-size-divisible-by", "pad the embedding to a multiple of this", type=int)

    group = parser.add_argument_group("checkpoints")
    add(group, "--save", "directory to save to", metavar="DIR")
    add(group, "--load", "directory to resume from; an empty or absent one starts from scratch", metavar="DIR")
    add(group, "--save-interval", "iterations between checkpoints; one is always saved at the end", type=int)
    group.add_argument("--moc", action=argparse.BooleanOptionalAction, help="use the moc_ckpt plugin (default on)")
    add(
        group,
        "--moc-checkpoint",
        'JSON object merged into the "moc_checkpoint" section of the DeepSpeed configuration',
        type=_json_object,
        metavar="JSON",
    )

    group = parser.add_argument_group("reports")
    add(group, "--eval-interval", "iterations between validations", type=int)
    add(group, "--eval-iters", "global batches per validation, 0 for none", type=int)
    add(group, "--log-interval", "iterations between log lines", type=int)
    group.add_argument(
        "--loss-log",
        "--log-file",
        dest="loss_log",
        metavar="PATH",
        help="append one JSON line per iteration; with {rank} in PATH every rank writes its own file, else rank 0 does",
    )
    add(group, "--verbose", "show DeepSpeed's and megatron-core's own messages", action="store_true")

    group = parser.add_argument_group("drills")
    add(group, "--fault-at-iter", "SIGKILL in this iteration, after backward and before the update", type=int)
    add(group, "--fault-rank", "only this rank dies (default all)", type=int)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the preset and the defaults.

    Args:
        argv: the arguments; the process's own if None.

    Returns:
        A namespace with every key of `DEFAULTS`, and `explicit`: the names given on the command line.
    """
    given = vars(build_parser().parse_args(argv))
    preset = PRESETS.get(given.get("preset", ""), {})
    merged = {**DEFAULTS, **preset, **given}
    return argparse.Namespace(**merged, explicit=frozenset(given))


def resolve_batch(args: argparse.Namespace, world_size: int) -> None:
    """Fill in the global batch size and the gradient accumulation steps.

    Args:
        args: changed in place; gains `gradient_accumulation_steps`.
        world_size: the number of ranks; all of them are data-parallel.

    Raises:
        ArgumentError: if the global batch does not divide into micro batches.
    """
    per_step = args.micro_batch_size * world_size
    if args.global_batch_size is None:
        args.global_batch_size = per_step
    share, rest = divmod(args.global_batch_size, world_size)
    if rest or share == 0:
        raise ArgumentError(f"--global-batch-size {args.global_batch_size} does not divide over {world_size} ranks")
    if share < args.micro_batch_size and "micro_batch_size" not in args.explicit:
        args.micro_batch_size = share
    if share % args.micro_batch_size:
        raise ArgumentError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {world_size} ranks = {per_step}"
        )
    args.gradient_accumulation_steps = share // args.micro_batch_size


def validate(args: argparse.Namespace, world_size: int) -> None:
    """Check the arguments against each other and derive the dependent ones.

    Args:
        args: changed in place (`ffn_hidden_size`, `max_position_embeddings`, `lr_decay_iters`).
        world_size: the number of ranks.

    Raises:
        ArgumentError: with a sentence that names the arguments concerned.
    """
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = 4 * args.hidden_size
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    if args.lazarus_slots is None:
        args.lazarus_slots = max(1, args.num_experts // args.moe_expert_parallel_size)
    expert_ranks = args.moe_expert_parallel_size
    lost = [
        name
        for name in ("slots", "fault_threshold", "loads", "optimizer_state", "rebalance_interval")
        if f"lazarus_{name}" in args.explicit
    ]
    slots = args.lazarus_slots * world_size
    problems = [
        (lost and not args.lazarus, f"--lazarus-{'-'.join(lost[:1]).replace('_', '-')} needs --lazarus"),
        (args.lazarus and args.num_experts < 2, "--lazarus needs --num-experts of 2 or more"),
        (args.lazarus and not args.moc, "--lazarus is part of the plugin: leave out --no-moc"),
        (args.lazarus and args.zero_stage not in (1, 2), "--lazarus needs --zero-stage 1 or 2"),
        (args.lazarus and args.fp16, "--lazarus trains in bf16 or fp32, not with --fp16"),
        (
            args.lazarus and (args.lazarus_slots < 1 or slots < args.num_experts),
            f"--lazarus-slots {args.lazarus_slots} x {world_size} ranks do not hold --num-experts {args.num_experts}",
        ),
        (
            args.lazarus and not 1 <= args.lazarus_fault_threshold <= world_size,
            f"--lazarus-fault-threshold {args.lazarus_fault_threshold} must be between 1 and the {world_size} ranks",
        ),
        (args.lazarus_rebalance_interval < 0, "--lazarus-rebalance-interval is a number of steps, or 0"),
        (args.bf16 and args.fp16, "--bf16 and --fp16 exclude each other"),
        (
            args.hidden_size % args.num_attention_heads,
            f"--hidden-size {args.hidden_size} is not a multiple of --num-attention-heads {args.num_attention_heads}",
        ),
        (
            args.seq_length > args.max_position_embeddings,
            f"--seq-length {args.seq_length} exceeds --max-position-embeddings {args.max_position_embeddings}",
        ),
        (
            args.num_experts % expert_ranks,
            f"--num-experts {args.num_experts} is not a multiple of --moe-expert-parallel-size {expert_ranks}",
        ),
        (
            world_size % expert_ranks,
            f"{world_size} ranks are not a multiple of --moe-expert-parallel-size {expert_ranks}",
        ),
        (args.expert_interval < 1, "--expert-interval must be at least 1"),
        (
            args.num_experts > 1 and args.expert_interval > args.num_layers,
            f"--expert-interval {args.expert_interval} leaves no MoE layer among --num-layers {args.num_layers}",
        ),
        (
            args.num_experts > 1 and not 1 <= args.topk <= args.num_experts,
            f"--topk {args.topk} must be between 1 and --num-experts {args.num_experts}",
        ),
        (
            args.num_experts > 1 and args.micro_batch_size * args.seq_length < args.moe_min_capacity,
            "a micro batch has fewer tokens than --moe-min-capacity",
        ),
        (
            args.save_interval and not args.save,
            "--save-interval needs --save" if "save_interval" in args.explicit else "",
        ),
        (args.moc_checkpoint and not args.moc, "--moc-checkpoint has no effect with --no-moc"),
        (args.log_interval < 1, "--log-interval must be at least 1"),
        (args.tokenizer_type == "NullTokenizer" and not args.vocab_size, "NullTokenizer needs --vocab-size"),
        (args.tokenizer_type == "NullTokenizer" and not args.data_path, "NullTokenizer needs --data-path"),
    ]
    found = [text for wrong, text in problems if wrong and text]
    if found:
        raise ArgumentError("; ".join(found))
