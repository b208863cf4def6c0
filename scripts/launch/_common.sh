# Sourced by the launch scripts of the models, which set the sizes first. Everything below can be set from outside:
#
#   MEGATRON           a Megatron-DeepSpeed checkout to train with (default: this repository's scripts/pretrain_gpt.py)
#   PYTHON             the interpreter                                        (default: python3)
#   SAVE               where checkpoints, logs and the DeepSpeed configuration go  (default: runs/NAME)
#   DATA_PATH          prefix of the .bin/.idx files        (default: none; then scripts/pretrain_gpt.py makes its own)
#   VOCAB_FILE, MERGE_FILE   of the GPT-2 tokenizer; without them the data are numbers below VOCAB_SIZE
#   GPUS               processes on each node                (default: what nvidia-smi lists; 2 without it)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT              (default: one node; SLURM's values inside a job)
#   EP                 ranks that share one set of experts   (default: the most that divide ranks and experts)
#   MICRO_BATCH, GLOBAL_BATCH, TRAIN_ITERS, SEQ_LENGTH, PRECISION (bf16, fp16, fp32)
#   SNAPSHOT_INTERVAL  steps between snapshots in memory     (default: 1)
#   SAVE_INTERVAL      steps between checkpoints on storage  (default: 200)
#   K_SNAPSHOT, K_PERSIST    experts per MoE layer in each   (default: auto)
#   MAX_RESTARTS       after a crash                         (default: 10)
#   BACKOFF            seconds before the first of them, on one node; doubles    (default: 10)
#
# Further arguments are the training script's.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

PYTHON="${PYTHON:-python3}"
MEGATRON="${MEGATRON:-}"
SAVE="${SAVE:-runs/$NAME}"
DATA_PATH="${DATA_PATH:-}"
VOCAB_FILE="${VOCAB_FILE:-}"
MERGE_FILE="${MERGE_FILE:-}"
VOCAB_SIZE="${VOCAB_SIZE:-50256}"
TRAIN_ITERS="${TRAIN_ITERS:-500000}"
SEQ_LENGTH="${SEQ_LENGTH:-2048}"
PRECISION="${PRECISION:-bf16}"
SNAPSHOT_INTERVAL="${SNAPSHOT_INTERVAL:-1}"
SAVE_INTERVAL="${SAVE_INTERVAL:-200}"
K_SNAPSHOT="${K_SNAPSHOT:-auto}"
K_PERSIST="${K_PERSIST:-auto}"
MAX_RESTARTS="${MAX_RESTARTS:-10}"

if [ -z "${GPUS:-}" ]; then
    if command -v nvidia-smi >/dev/null 2>&1; then
        GPUS="$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)"
    else
        GPUS=2
    fi
fi
if [ -z "${NNODES:-}" ] && [ -n "${SLURM_JOB_NUM_NODES:-}" ]; then
    NNODES="$SLURM_JOB_NUM_NODES"
    NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
fi
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_PORT="${MASTER_PORT:-29500}"
[ "$GPUS" -ge 1 ] || die "GPUS=$GPUS: no process to start; set GPUS"
WORLD=$((GPUS * NNODES))
if [ -z "${EP:-}" ]; then
    EP=$((WORLD < NUM_EXPERTS ? WORLD : NUM_EXPERTS))
    while [ $((WORLD % EP)) -ne 0 ] || [ $((NUM_EXPERTS % EP)) -ne 0 ]; do EP=$((EP - 1)); done
fi
MICRO_BATCH="${MICRO_BATCH:-4}"
GLOBAL_BATCH="${GLOBAL_BATCH:-$((WORLD * MICRO_BATCH > 256 ? WORLD * MICRO_BATCH : 256))}"

# What cannot work is said before anything starts.
[ $((WORLD % EP)) -eq 0 ] || die "EP=$EP does not divide the $WORLD ranks ($NNODES nodes of $GPUS)"
[ $((NUM_EXPERTS % EP)) -eq 0 ] || die "EP=$EP does not divide the $NUM_EXPERTS experts"
[ $((GLOBAL_BATCH % (MICRO_BATCH * WORLD))) -eq 0 ] ||
    die "GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of MICRO_BATCH x ranks = $((MICRO_BATCH * WORLD))"
if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    die "NNODES=$NNODES: set MASTER_ADDR to the first node's address (scripts/launch/slurm.sbatch does)"
fi
if [ -n "$MEGATRON" ]; then
    [ -f "$MEGATRON/pretrain_gpt.py" ] || die "MEGATRON=$MEGATRON has no pretrain_gpt.py"
    [ -n "$DATA_PATH" ] || die "with MEGATRON set, DATA_PATH must name the data (docs/megatron-deepspeed.md makes some)"
fi
if [ -n "$VOCAB_FILE$MERGE_FILE" ] && { [ ! -f "$VOCAB_FILE" ] || [ ! -f "$MERGE_FILE" ]; }; then
    die "VOCAB_FILE and MERGE_FILE must both be files"
fi
case "$PRECISION" in bf16 | fp16 | fp32) ;; *) die "PRECISION=$PRECISION: bf16, fp16 or fp32" ;; esac

mkdir -p "$SAVE"
SAVE="$(cd "$SAVE" && pwd)"
CONFIG="$SAVE/ds_config.$NODE_RANK.json"
"$PYTHON" - "$CONFIG" "$MICRO_BATCH" "$GLOBAL_BATCH" "$PRECISION" "$SAVE/checkpoints" \
    "$SNAPSHOT_INTERVAL" "$K_SNAPSHOT" "$K_PERSIST" <<'PY'
import json
import os
import sys

path, micro, whole, precision, save_dir, snapshots, k_snapshot, k_persist = sys.argv[1:]


def number(text: str) -> "int | str":
    return text if text == "auto" else int(text)


config = {
    "train_micro_batch_size_per_gpu": int(micro),
    "train_batch_size": int(whole),
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
    "moc_checkpoint": {
        "enabled": True,
        "save_dir": save_dir,
        "snapshot_interval": number(snapshots),
        "k_snapshot": number(k_snapshot),
        "k_persist": number(k_persist),
    },
}
if precision != "fp32":
    config[precision] = {"enabled": True}
with open(path + ".new", "w") as file:
    json.dump(config, file, indent=2)
os.replace(path + ".new", path)
PY

arguments=(
    --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_HEADS"
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH" --init-method-std 0.014
    --num-experts "$NUM_EXPERTS" --moe-expert-parallel-size "$EP" --expert-interval 2 --topk 1
    --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --moe-loss-coeff 0.01
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_ITERS"
    --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-iters "${WARMUP_ITERS:-700}"
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --split 98,2,0 --log-interval "${LOG_INTERVAL:-10}" --eval-interval "${EVAL_INTERVAL:-1000}" --eval-iters "${EVAL_ITERS:-10}"
    --save "$SAVE/checkpoints" --load "$SAVE/checkpoints" --save-interval "$SAVE_INTERVAL"
    --zero-stage 2 --deepspeed --deepspeed_config "$CONFIG"
)
[ "$PRECISION" = fp32 ] || arguments+=("--$PRECISION")
[ -z "$DATA_PATH" ] || arguments+=(--data-path "$DATA_PATH")
if [ -n "$MEGATRON" ]; then
    arguments+=(--data-impl mmap --create-moe-param-group --no-pipeline-parallel --num-workers 0)
    if [ -n "$VOCAB_FILE" ]; then
        arguments+=(--tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")
    else
        arguments+=(--tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
    fi
    script=(-m moc_ckpt.launch "$MEGATRON/pretrain_gpt.py")
else
    [ -z "$VOCAB_FILE" ] || die "scripts/pretrain_gpt.py has no GPT-2 tokenizer: give it data that are tokens already"
    if [ -n "$DATA_PATH" ]; then
        arguments+=(--tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
    fi
    script=("$ROOT/scripts/pretrain_gpt.py")
fi

export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# By it a restart finds the memory of the run before; one name for all nodes.
export MOC_JOB_ID="${MOC_JOB_ID:-${SLURM_JOB_ID:-$NAME}}"
torchrun=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS")
if [ "$NNODES" -gt 1 ]; then
    # The rendezvous restarts the workers of all nodes together.
    exec "${torchrun[@]}" --nnodes "$NNODES" --node-rank "$NODE_RANK" --max-restarts "$MAX_RESTARTS" \
        --rdzv-id "$MOC_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
        "${script[@]}" "${arguments[@]}" "$@"
fi
exec "$PYTHON" -m moc_ckpt.cli.main run --max-restarts "$MAX_RESTARTS" --backoff "${BACKOFF:-10}" -- \
    "${torchrun[@]}" --standalone "${script[@]}" "${arguments[@]}" "$@"
