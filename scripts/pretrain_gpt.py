#!/usr/bin/env python3
"""Pre-train a GPT Mixture-of-Experts model with DeepSpeed, with or without the moc_ckpt plugin.

    torchrun --standalone --nproc-per-node 4 scripts/pretrain_gpt.py --preset tiny --train-iters 100 --save runs/tiny
    deepspeed scripts/pretrain_gpt.py --preset gpt-125m-8e --bf16 --save runs/125m --load runs/125m
    python scripts/pretrain_gpt.py --help

The work is done in the package `gpt_moe` beside this file.
"""

from gpt_moe.main import main

if __name__ == "__main__":
    main()
