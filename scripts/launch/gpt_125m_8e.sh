#!/usr/bin/env bash
# GPT-125M-8E: 324 million parameters, 227 million of them in 6 MoE layers of 8 experts; ZeRO-2, expert parallelism,
# snapshots in memory at every step. One node:
#
#   DATA_PATH=/data/pile_text_document scripts/launch/gpt_125m_8e.sh
#   MEGATRON=~/Megatron-DeepSpeed DATA_PATH=… VOCAB_FILE=… MERGE_FILE=… scripts/launch/gpt_125m_8e.sh
#
# Several: the same on each, with NNODES, NODE_RANK and MASTER_ADDR; or scripts/launch/slurm.sbatch. What can be set is in
# _common.sh.
NAME="${NAME:-gpt-125m-8e}"
NUM_LAYERS=12 HIDDEN_SIZE=768 NUM_HEADS=12 NUM_EXPERTS=8
LR="${LR:-4.5e-4}" MIN_LR="${MIN_LR:-4.5e-6}"
# shellcheck source=scripts/launch/_common.sh
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/_common.sh"
