#!/usr/bin/env bash
# GPT-350M-16E: 1.87 billion parameters, 1.61 billion of them in 12 MoE layers of 16 experts. As gpt_125m_8e.sh.
NAME="${NAME:-gpt-350m-16e}"
NUM_LAYERS=24 HIDDEN_SIZE=1024 NUM_HEADS=16 NUM_EXPERTS=16
LR="${LR:-3.0e-4}" MIN_LR="${MIN_LR:-3.0e-6}"
# shellcheck source=scripts/launch/_common.sh
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/_common.sh"
