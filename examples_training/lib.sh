# shellcheck shell=bash
# Library of the experiment scripts. A script sources it from the repository root, sets the variables of its experiment and
# calls pretrain_epochs or pretrain_budget. Every variable below can be set in the script, in the environment, or as an
# argument: `bash examples_training/mdm/example_training.sh EPOCH_CNT=50 SEED=1`. Arguments win over the script; where the
# script sets a variable itself, the environment must not hold another value.

set -eo pipefail
source utils/model_params.sh
source utils/epoch_tokens.sh
source examples_training/launch.sh
source examples_training/checks.sh

# Defaults: the published recipe (arXiv 2507.15857 and its released configuration). Unset means default, empty is empty.
set_defaults() {
    # Batch
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE-8}     # sequences per GPU and forward pass
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE-256} # sequences per optimizer step, over all GPUs
    SEQ_LEN=${SEQ_LEN-2048}                    # tokens per sequence
    # Optimizer
    LR=${LR-2e-4}                              # peak learning rate
    MIN_LR=${MIN_LR-2e-5}                      # learning rate at the end of the cosine
    WARMUP_PERCENT=${WARMUP_PERCENT-1}         # share of the samples that the learning rate rises over
    ADAM_BETA1=${ADAM_BETA1-0.9}
    ADAM_BETA2=${ADAM_BETA2-0.95}
    WEIGHT_DECAY=${WEIGHT_DECAY-0.1}           # on matrices only
    CLIP_GRAD=${CLIP_GRAD-1.0}
    SEED=${SEED-1234}
    # Model: both dropouts were 0.1 in every published run
    HIDDEN_DROPOUT=${HIDDEN_DROPOUT-0.1}
    ATTENTION_DROPOUT=${ATTENTION_DROPOUT-0.1}
    CHECKPOINT_ACTIVATIONS=${CHECKPOINT_ACTIVATIONS-0} # 1: recompute every block in the backward pass
    # Ablations: empty is off
    AR_RATIO=${AR_RATIO-}                      # MDM: share of the sequences whose masks move to the end
    RANDMASK_RATIO=${RANDMASK_RATIO-}          # AR: share of the positions that lose past positions
    NUM_ORDER_LIST=${NUM_ORDER_LIST-}          # AR: number of token orders
    USE_PREDEFINED_ORDER=${USE_PREDEFINED_ORDER-0} # 1: perturbed raster orders instead of random ones
    # Data
    TRAIN_DATA_PATH=${TRAIN_DATA_PATH-utils/datapaths/example_trainset.txt} # file of weights and prefixes
    VALID_DATA_PATH=${VALID_DATA_PATH-utils/datapaths/example_valset.txt}
    UNIQUE_TOKENS=${UNIQUE_TOKENS-}            # train on the first documents only, up to this many tokens
    VOCAB_FILE=${VOCAB_FILE-utils/data/gpt2-vocab.json}
    MERGE_FILE=${MERGE_FILE-utils/data/gpt2-merges.txt}
    # Logging, validation and checkpoints, in steps
    LOG_INTERVAL=${LOG_INTERVAL-10}
    EVAL_INTERVAL=${EVAL_INTERVAL-1000}
    EVAL_ITERS=${EVAL_ITERS-100}               # validation windows, in units of the global batch
    SAVE_INTERVAL=${SAVE_INTERVAL-1000}
    OUTPUT_DIR=${OUTPUT_DIR-output}
    WANDB_PROJECT=${WANDB_PROJECT-data-constrained} # empty: no W&B
    WANDB_GROUP=${WANDB_GROUP-$EXPERIMENT}
    # Engine
    TP_SIZE=${TP_SIZE-1}                       # tensor-parallel ranks
    PP_SIZE=${PP_SIZE-1}                       # pipeline stages
    ZERO_STAGE=${ZERO_STAGE-0}
    CPU_OFFLOAD=${CPU_OFFLOAD-0}               # 1: optimizer state and step on the CPU
    [[ -n ${EXTRA_ARGS+set} ]] || EXTRA_ARGS=() # last on the command line, so it overrides everything
    # Left to choose_devices and choose_launcher: PRECISION, NUM_GPUS, LAUNCHER, MASTER_PORT; to name_run: VARIANT, WANDB_EXP_NAME.
}

# Variables that may be given as NAME=VALUE arguments.
SETTINGS=" MODEL_PARAM FLOPS_FACTOR DATA_CNT EPOCH_CNT EXTRA_ARGS PRECISION NUM_GPUS LAUNCHER MASTER_PORT VARIANT WANDB_EXP_NAME
 MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE SEQ_LEN LR MIN_LR WARMUP_PERCENT ADAM_BETA1 ADAM_BETA2 WEIGHT_DECAY CLIP_GRAD SEED HIDDEN_DROPOUT
 ATTENTION_DROPOUT CHECKPOINT_ACTIVATIONS AR_RATIO RANDMASK_RATIO NUM_ORDER_LIST USE_PREDEFINED_ORDER TRAIN_DATA_PATH VALID_DATA_PATH
 UNIQUE_TOKENS VOCAB_FILE MERGE_FILE LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SAVE_INTERVAL OUTPUT_DIR WANDB_PROJECT WANDB_GROUP TP_SIZE
 PP_SIZE ZERO_STAGE CPU_OFFLOAD SMOKE DRY_RUN "
remember_environment

# pretrain_epochs FAMILY EXPERIMENT [NAME=VALUE...]: EPOCH_CNT epochs over DATA_CNT unique tokens; samples and warm-up are
# rounded down.
pretrain_epochs() {
    begin_run "$@"
    refuse_unread "which takes DATA_CNT and EPOCH_CNT" FLOPS_FACTOR
    look_up_tokens DATA_CNT
    require_whole DATA_CNT EPOCH_CNT
    ((DATA_CNT <= 10 ** 15 / EPOCH_CNT)) || stop_with "DATA_CNT=$DATA_CNT x EPOCH_CNT=$EPOCH_CNT is too large: at most 1e15 tokens"
    TRAIN_SAMPLES=$((DATA_CNT * EPOCH_CNT / SEQ_LEN))
    WARMUP_SAMPLES=$((TRAIN_SAMPLES * WARMUP_PERCENT / 100))
    run
}

# pretrain_budget FAMILY EXPERIMENT [NAME=VALUE...]: FLOPS_FACTOR * 1e18 FLOPs = 6 N D, one epoch; samples and warm-up are
# rounded to the nearest, with a warm-up of at least 100 samples.
pretrain_budget() {
    begin_run "$@"
    refuse_unread "which takes FLOPS_FACTOR and runs one epoch" DATA_CNT EPOCH_CNT
    require FLOPS_FACTOR
    [[ $FLOPS_FACTOR =~ ^[0-9]+(\.[0-9]+)?$ && $FLOPS_FACTOR =~ [1-9] ]] ||
        stop_with "FLOPS_FACTOR must be a number above 0 (in units of 1e18 FLOPs), not '$FLOPS_FACTOR'"
    [[ $FLOPS_FACTOR =~ ^0*[0-9]{1,9}(\.|$) ]] || stop_with "FLOPS_FACTOR=$FLOPS_FACTOR is too large: at most 999999999 (1e27 FLOPs)"
    [[ $ROW != d*-* ]] || stop_with "MODEL_PARAM=(${MODEL_PARAM[*]}) is no row of utils/model_params.sh: add it there, so that its size is known"
    local output name value
    output=$("$PYTHON" -m megatron.budget samples --flops-factor "$FLOPS_FACTOR" --model "$ROW" --seq-length "$SEQ_LEN") || exit 2
    while IFS='=' read -r name value; do
        case $name in
            TOKENS) DATA_CNT=$value ;;
            TRAIN_SAMPLES | WARMUP_SAMPLES) printf -v "$name" %s "$value" ;;
        esac
    done <<<"$output"
    [[ $DATA_CNT =~ ^.{1,15}$ ]] || stop_with "FLOPS_FACTOR=$FLOPS_FACTOR is too large for $ROW: $DATA_CNT tokens, at most 1e15"
    if [[ $WARMUP_PERCENT != 1 ]]; then
        WARMUP_SAMPLES=$(((TRAIN_SAMPLES * WARMUP_PERCENT + 50) / 100))
        ((WARMUP_SAMPLES >= 100)) || WARMUP_SAMPLES=100
    fi
    run
}

# What both do first: arguments, defaults, checks, the model's row.
begin_run() {
    FAMILY=$1 EXPERIMENT=$2
    shift 2
    case $FAMILY in
        arm) ENTRY_POINT=pretrain_gpt.py ;;
        mdm) ENTRY_POINT=pretrain_diff_gpt.py ;;
        *) stop_with "the family of an experiment is arm or mdm, not '$FAMILY'" ;;
    esac
    apply_overrides "$@"
    require_switches SMOKE DRY_RUN
    set_defaults
    find_python
    set -u
    require TRAIN_DATA_PATH VALID_DATA_PATH VOCAB_FILE MERGE_FILE OUTPUT_DIR
    require_number LR MIN_LR ADAM_BETA1 ADAM_BETA2 WEIGHT_DECAY CLIP_GRAD HIDDEN_DROPOUT ATTENTION_DROPOUT
    [[ $CLIP_GRAD =~ ^(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$ ]] ||
        stop_with "CLIP_GRAD must be a number as JSON writes it, e.g. 0.5, not '$CLIP_GRAD'"
    [[ -z $AR_RATIO ]] || require_number AR_RATIO
    [[ -z $RANDMASK_RATIO ]] || require_number RANDMASK_RATIO
    [[ -z $NUM_ORDER_LIST ]] || require_whole NUM_ORDER_LIST
    require_whole MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE SEQ_LEN TP_SIZE PP_SIZE LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SAVE_INTERVAL
    require_digits WARMUP_PERCENT SEED
    require_at_most 100 WARMUP_PERCENT
    require_at_most 999999999 MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE SEQ_LEN TP_SIZE PP_SIZE
    require_choice ZERO_STAGE 0 1 2 3
    require_choice CPU_OFFLOAD 0 1
    require_choice CHECKPOINT_ACTIVATIONS 0 1
    require_choice USE_PREDEFINED_ORDER 0 1
    [[ $CPU_OFFLOAD == 0 || $ZERO_STAGE != 0 ]] || stop_with "CPU_OFFLOAD=1 needs ZERO_STAGE=1, 2 or 3: offloading is part of ZeRO"
    look_up_tokens UNIQUE_TOKENS
    [[ -z $UNIQUE_TOKENS ]] || require_whole UNIQUE_TOKENS
    find_row
}

# What both do last.
run() {
    ((TRAIN_SAMPLES >= GLOBAL_BATCH_SIZE)) ||
        stop_with "the run has $TRAIN_SAMPLES samples, less than one batch of GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE: raise its tokens or epochs"
    name_run
    choose_devices
    choose_launcher
    if [[ ${SMOKE:-0} == 1 ]]; then
        source examples_training/smoke.sh
        shrink
    fi
    find_data
    [[ -z ${FLOPS_FACTOR:-} || $SMOKE == 1 ]] || note_epochs
    check_batch
    build_arguments
    write_deepspeed_config
    [[ -z $NOTE ]] || echo "note: $NOTE" >&2
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        cat "$DEEPSPEED_CONFIG"
        printf '%s\n' "${LAUNCH[@]}" "$ENTRY_POINT" "${ARGS[@]}"
        exit 0
    fi
    print_summary
    mkdir -p "$OUTPUT_DIR"
    local code=0
    supervise "${LAUNCH[@]}" "$ENTRY_POINT" "${ARGS[@]}" || code=$?
    # Slurm may have signalled the tasks of srun instead of this script (--signal without B:).
    if [[ $code == 0 ]] && tail -n 2 "$CHECKPOINTS/metrics.jsonl" 2>/dev/null | grep -q 'received SIGUSR1'; then
        STOPPED_BY=USR1
    fi
    if [[ $STOPPED_BY == USR1 && -n ${SLURM_JOB_ID:-} ]]; then
        echo "the time limit is near: job $SLURM_JOB_ID goes back into the queue and will go on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" || echo "note: not requeued: sbatch this script again to go on" >&2
    fi
    exit "$code"
}

# --- the run: name, arguments, DeepSpeed configuration ---

# VARIANT names everything that the run writes. It holds whatever makes another run of it, so that an edited script never
# goes on from the checkpoint of another run: experiment, family, size, samples, data, and each setting off the recipe.
name_run() {
    if [[ -z ${VARIANT:-} ]]; then
        local data=${TRAIN_DATA_PATH##*/}
        data=${data%.txt}
        VARIANT=${EXPERIMENT}_${FAMILY}_${ROW}_${TRAIN_SAMPLES}_${data#train_}
        suffix u "$UNIQUE_TOKENS" ""
        suffix b "$GLOBAL_BATCH_SIZE" 256
        suffix s "$SEQ_LEN" 2048
        suffix lr "$LR" 2e-4
        suffix minlr "$MIN_LR" 2e-5
        suffix warm "$WARMUP_PERCENT" 1
        suffix beta1- "$ADAM_BETA1" 0.9
        suffix beta2- "$ADAM_BETA2" 0.95
        suffix wd "$WEIGHT_DECAY" 0.1
        suffix clip "$CLIP_GRAD" 1.0
        suffix drop "$HIDDEN_DROPOUT" 0.1
        suffix attn "$ATTENTION_DROPOUT" 0.1
        suffix ltr "$AR_RATIO" ""
        suffix mask "$RANDMASK_RATIO" ""
        suffix orders "$NUM_ORDER_LIST" ""
        suffix predefined "$USE_PREDEFINED_ORDER" 0
        suffix "" "${PRECISION:-bf16}" bf16 # asked for, not for want of a GPU
        suffix seed "$SEED" 1234
        suffix x "$(extra_digest)" ""
    fi
    [[ $VARIANT != */* ]] || stop_with "VARIANT=$VARIANT is a name and must not contain /: directories go into OUTPUT_DIR"
    WANDB_EXP_NAME=${WANDB_EXP_NAME:-$VARIANT}
}

# suffix NAME VALUE RECIPE: append to VARIANT what differs from the recipe.
suffix() {
    [[ $2 == "$3" ]] || VARIANT+=_$1$2
}

# Eight letters that tell the EXTRA_ARGS of one run from another's, flags that change no result left out.
extra_digest() {
    local word kept=() skip=0
    split_extra_args
    for word in "${EXTRA_ARGS[@]}"; do
        if [[ $word == --* ]]; then
            skip=0
            [[ ! $word =~ ^--(exit|save|load|no-load|keep|log|eval|skip-train|num-mc|tensorboard|wandb|metrics|kill|num-workers|data-cache|distributed|compile|no-compile|checkpoint-act|recompute) ]] || skip=1
        fi
        [[ $skip == 1 ]] || kept+=("$word")
    done
    [[ ${#kept[@]} == 0 ]] || printf '%s\0' "${kept[@]}" | cksum | awk '{ printf "%08x", $1 }'
}

# From the environment or an argument EXTRA_ARGS is one string of words; in a script it is an array.
split_extra_args() {
    [[ $(declare -p EXTRA_ARGS) == "declare -a"* ]] || read -ra EXTRA_ARGS <<<"${EXTRA_ARGS[0]}"
}

# ARGS, everything after the entry point.
build_arguments() {
    local model_args optimizer_args data_args logging_args deepspeed_args
    CHECKPOINTS=$OUTPUT_DIR/checkpoints_$VARIANT
    model_args=(
        --num-layers "${MODEL_PARAM[4]}" --hidden-size "${MODEL_PARAM[0]}"
        --num-attention-heads "${MODEL_PARAM[3]}" --kv-channels "${MODEL_PARAM[2]}"
        --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --use-rotary-position-embeddings
        --normalization rmsnorm --swiglu --disable-bias-linear
        --hidden-dropout "$HIDDEN_DROPOUT" --attention-dropout "$ATTENTION_DROPOUT"
    )
    [[ $CHECKPOINT_ACTIVATIONS == 0 ]] || model_args+=(--checkpoint-activations)
    [[ -z $AR_RATIO ]] || model_args+=(--ar-ratio "$AR_RATIO")
    [[ -z $RANDMASK_RATIO ]] || model_args+=(--randmask-ratio "$RANDMASK_RATIO")
    [[ -z $NUM_ORDER_LIST ]] || model_args+=(--use-order-list --num-order-list "$NUM_ORDER_LIST")
    [[ $USE_PREDEFINED_ORDER == 0 ]] || model_args+=(--use-predefined-order)
    optimizer_args=(
        --optimizer adam --adam-beta1 "$ADAM_BETA1" --adam-beta2 "$ADAM_BETA2" --adam-eps 1e-8
        --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine
        --lr-decay-samples "$TRAIN_SAMPLES" --lr-warmup-samples "$WARMUP_SAMPLES"
        --clip-grad "$CLIP_GRAD" --weight-decay "$WEIGHT_DECAY" --seed "$SEED"
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-samples "$TRAIN_SAMPLES"
    )
    [[ $PRECISION == fp32 ]] || optimizer_args+=("--$PRECISION")
    data_args=(
        --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE"
        --train-data-path-file "$TRAIN_DATA_PATH" --valid-data-path-file "$VALID_DATA_PATH" --data-impl mmap
    )
    [[ -z $UNIQUE_TOKENS ]] || data_args+=(--unique-tokens "$UNIQUE_TOKENS")
    logging_args=(
        --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
        --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval "$SAVE_INTERVAL"
        --kill-switch-file "$OUTPUT_DIR/kill-switch-$VARIANT" --exit-signal-handler
        --tensorboard-dir "$OUTPUT_DIR/tensorboard_$VARIANT" --tensorboard-queue-size 5
        --log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard
    )
    [[ -z $WANDB_PROJECT ]] || logging_args+=(
        --wandb-project "$WANDB_PROJECT" --wandb-exp-name "$WANDB_EXP_NAME" --wandb-group "$WANDB_GROUP"
        --wandb-save-dir "$OUTPUT_DIR/wandb_$VARIANT"
    )
    DEEPSPEED_CONFIG=ds_configs/$VARIANT.json
    deepspeed_args=(
        --tensor-model-parallel-size "$TP_SIZE" --pipeline-model-parallel-size "$PP_SIZE"
        --deepspeed --deepspeed_config "$DEEPSPEED_CONFIG" --zero-stage "$ZERO_STAGE"
    )
    [[ $CPU_OFFLOAD == 0 ]] || deepspeed_args+=(--cpu-optimizer)
    split_extra_args
    ARGS=("${model_args[@]}" "${optimizer_args[@]}" "${data_args[@]}" "${logging_args[@]}" "${deepspeed_args[@]}" "${EXTRA_ARGS[@]}")
}

# One file a run, whole at any moment, so that runs side by side never read each other's.
write_deepspeed_config() {
    local precision="" offload=""
    [[ $PRECISION == fp32 ]] || precision=$'\n  "'$PRECISION$'": {"enabled": true},'
    [[ $CPU_OFFLOAD == 0 ]] || offload=', "offload_optimizer": {"device": "cpu"}'
    mkdir -p ds_configs
    cat >"$DEEPSPEED_CONFIG.$$" <<JSON
{
  "train_micro_batch_size_per_gpu": $MICRO_BATCH_SIZE,
  "train_batch_size": $GLOBAL_BATCH_SIZE,
  "gradient_clipping": $CLIP_GRAD,
  "zero_optimization": {"stage": $ZERO_STAGE$offload},$precision
  "steps_per_print": 2000,
  "wall_clock_breakdown": false
}
JSON
    mv "$DEEPSPEED_CONFIG.$$" "$DEEPSPEED_CONFIG"
}

print_summary() {
    echo "run:         $VARIANT"
    echo "model:       $ROW, ${MODEL_PARAM[4]} layers, width ${MODEL_PARAM[0]}, ${MODEL_PARAM[3]} heads of ${MODEL_PARAM[2]}, dropout $HIDDEN_DROPOUT (attention $ATTENTION_DROPOUT)"
    echo "length:      $TRAIN_SAMPLES samples of $SEQ_LEN tokens, $((TRAIN_SAMPLES / GLOBAL_BATCH_SIZE)) steps of $GLOBAL_BATCH_SIZE, warm-up $WARMUP_SAMPLES samples"
    echo "processes:   ${NUM_GPUS:-?} on the $DEVICE of each of ${SLURM_NNODES:-${NNODES:-1}} node(s), $PRECISION, started with $LAUNCHER"
    echo "checkpoints: $CHECKPOINTS (the same command goes on from there; touch '$OUTPUT_DIR/kill-switch-$VARIANT' stops it)"
}
