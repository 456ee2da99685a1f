#!/usr/bin/env bash
# The project's question on a laptop: AR and MDM on 10,000 unique tokens of presidents' speeches, three runs, two at a time.
#   make quickstart            (or: bash examples_training/quickstart.sh, with python3 of an environment that has the project)
# Settings below were searched for this size; docs/training.md says how. Runs that are already finished are not repeated.
set -euo pipefail

PYTHON=${PYTHON:-python3}
OUTPUT_DIR=${OUTPUT_DIR:-output/quickstart}
UNIQUE_TOKENS=10000
SEQ_LEN=64
# Validation: windows of other passages, and Monte Carlo draws per window for MDM.
EVAL_WINDOWS=${EVAL_WINDOWS:-384}
NUM_MC=${NUM_MC:-4}
# "tiny" (used by the tests): the same pipeline, a few steps only.
SCALE=${SCALE:-full}

if [[ ! -f pretrain_gpt.py ]]; then
    echo "error: start this script from the repository root (no pretrain_gpt.py in $PWD)" >&2
    exit 2
fi

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUTPUT_DIR"
"$PYTHON" tools/prepare_quickstart.py --output "$OUTPUT_DIR/data"

# train NAME ENTRY_POINT PROGRESS_BAR_LINE EPOCHS VALIDATIONS [FLAGS...]
train() {
    local name=$1 entry=$2 line=$3 epochs=$4 validations=$5
    shift 5
    local samples=$((UNIQUE_TOKENS * epochs / SEQ_LEN)) interval
    interval=$((samples / 16 / validations))
    if [[ $SCALE == tiny ]]; then
        samples=$((16 * 6)) interval=3
    fi
    local arguments=(
        --num-layers 3 --hidden-size 96 --num-attention-heads 4 --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN"
        --use-rotary-position-embeddings --normalization rmsnorm --swiglu --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 8
        --micro-batch-size 16 --global-batch-size 16 --train-samples "$samples"
        --lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-fraction 0.01
        --adam-beta2 0.95 --clip-grad 1.0
        --tokenizer-type HFTokenizer --tokenizer-model "$OUTPUT_DIR/data/tokenizer.json"
        --train-data-path "$OUTPUT_DIR/data/train_text_document" --unique-tokens "$UNIQUE_TOKENS"
        --valid-data-path "$OUTPUT_DIR/data/valid_text_document" --eval-windows "$EVAL_WINDOWS" --eval-interval "$interval"
        --num-workers 0 --no-compile --log-interval 20
        --save "$OUTPUT_DIR/checkpoints_$name" --load "$OUTPUT_DIR/checkpoints_$name"
        --save-interval 1000 --keep-last 1 --keep-best 1 --exit-signal-handler
    )
    TQDM_POSITION=$line TQDM_DESC=$name "$PYTHON" "$entry" "${arguments[@]}" "$@" >>"$OUTPUT_DIR/$name.log"
}

pids=()
# Ctrl-C reaches the runs as well; wait for them to save.
trap 'wait' INT TERM
start() { train "$@" & pids+=($!); }

# AR and MDM with the same settings, which are MDM's best, and AR with its own best: it has time for both meanwhile.
# Uniform weights leave the plateau earlier than the ELBO's; validation is the ELBO all the same.
start mdm_same pretrain_diff_gpt.py 0 330 16 --weight-decay 0.8 --num-mc "$NUM_MC" --loss-weighting uniform
start ar_same pretrain_gpt.py 1 70 20 --weight-decay 0.8
wait "${pids[1]}"
start ar_best pretrain_gpt.py 1 70 20 --weight-decay 2.0 --lr 3e-3 --min-lr 3e-4 --attention-dropout 0.1 --hidden-dropout 0.1
wait "${pids[0]}"
wait "${pids[2]}"

"$PYTHON" tools/report.py --output "$OUTPUT_DIR/comparison.png" \
    "AR, weight decay 0.8=$OUTPUT_DIR/checkpoints_ar_same" \
    "MDM, weight decay 0.8=$OUTPUT_DIR/checkpoints_mdm_same" \
    "AR, tuned=$OUTPUT_DIR/checkpoints_ar_best"
