#!/usr/bin/env bash
# Everything about snapshots that needs GPUs, on this machine, in steps that can be run apart:
#
#   scripts/bench/on_gpu.sh exact  OUT_DIR     copies are whole and exact, also where the update races them (4 minutes)
#   scripts/bench/on_gpu.sh stall  OUT_DIR     what ours costs (all GPUs; about 5 minutes on two)
#   scripts/bench/on_gpu.sh copy   OUT_DIR     how fast copies leave the GPUs, one alone and all at once (seconds)
#   scripts/bench/on_gpu.sh peers  OUT_DIR     DeepSpeed, torch DCP and other settings of ours (about 8 minutes on two)
#   scripts/bench/on_gpu.sh lazarus OUT_DIR    LazarusMoE: tests of its kernels, and the layer beside DeepSpeed's (4 minutes on two)
#
# It uses the python on PATH and installs nothing. The model of `stall` and `peers` keeps an H100 or H200 busy: 92 % of a step of
# 0.25 s; with 12 layers of hidden 1024 the step is three times as long as the device needs, and Python is what is measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
step="${1:?exact, stall, copy, peers or lazarus}"
out="$(mkdir -p "${2:?where results go}" && cd "$2" && pwd)"
gpus="$(nvidia-smi -L | wc -l)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
model=(--model blocks --hidden 2048 --layers 6 --experts "$((4 * gpus))" --micro-batch 16 --seq 2048)

bench() {
    local name="$1"
    shift
    python3 scripts/bench/save_stall.py --ranks "$gpus" "${model[@]}" --block 20 --raw-write --timeout 560 \
        --out "$out/$name.json" "$@" 2>"$out/$name.log"
}

case "$step" in
    exact)
        python3 -m pytest -q -s -p no:cacheprovider tests/gpu/test_stager.py
        python3 tests/gpu/run_gpu.py --json "$out/exact.json" --only async_z2_bf16_fused async_z1_bf16_fp32acc_fused \
            async_z0_bf16_fused async_z2_fp16_fused async_z2_bf16_cpu_adam async_z2_fp32_fused
        ;;
    copy) python3 scripts/bench/copy_rate.py | tee "$out/copy.json" ;;
    stall) bench stall --arms pec/1 pec/1+persist --pairs "${PAIRS:-5}" ;;
    peers) bench peers --arms native dcp full/1 full/10 pec/5 pec/10+persist --pairs 2 --explicit-pairs 1 ;;
    lazarus)
        status=0
        python3 -m pytest -q -s -p no:cacheprovider tests/gpu/test_lazarus.py || status=$?
        python3 tests/gpu/run_lazarus.py --json "$out/lazarus_engine.json" >"$out/lazarus_engine.log" 2>&1 || status=$?
        python3 scripts/bench/moe_layer.py --json "$out/moe_layer.json"
        exit "$status"
        ;;
    *)
        echo "no step $step: exact, stall, copy, peers or lazarus" >&2
        exit 2
        ;;
esac
