# shellcheck shell=bash
# Library of the downstream scripts: lm-eval tasks on the checkpoints of a training run, on every GPU of this machine.
# Every variable can be set in the script, in the environment, or as an argument NAME=VALUE (lib.sh says which wins).

source examples_training/lib.sh
SETTINGS=" LOAD LOAD_TAG TASKS MODE NUM_MC MC_TOLERANCE NUM_FEWSHOT LIMIT RESULTS NUM_GPUS EXTRA_ARGS SMOKE DRY_RUN "
remember_environment

# downstream FAMILY [NAME=VALUE...]
downstream() {
    local family=$1 gpus
    shift
    apply_overrides "$@"
    require_switches SMOKE DRY_RUN
    [[ $family != arm ]] || refuse_unread "whose likelihoods are exact" NUM_MC MC_TOLERANCE
    if [[ ${SMOKE:-0} == 1 ]]; then
        source examples_training/smoke.sh
        shrink_downstream "$family"
    fi
    NUM_MC=${NUM_MC-32}               # MDM: Monte Carlo draws of a likelihood
    MC_TOLERANCE=${MC_TOLERANCE-}     # MDM: draw on until the standard error is this many nats; empty: NUM_MC draws
    NUM_FEWSHOT=${NUM_FEWSHOT-0}
    LIMIT=${LIMIT-}                   # only so many questions of each task; empty: all
    LOAD_TAG=${LOAD_TAG-}             # empty: the latest checkpoint
    RESULTS=${RESULTS-$LOAD/downstream_$MODE.json}
    [[ -n ${EXTRA_ARGS+set} ]] || EXTRA_ARGS=()
    find_python
    set -u
    require LOAD TASKS RESULTS
    require_whole NUM_MC
    require_digits NUM_FEWSHOT
    [[ -z $LIMIT ]] || require_whole LIMIT
    [[ -z $MC_TOLERANCE ]] || require_number MC_TOLERANCE
    [[ -z ${NUM_GPUS:-} ]] || require_digits NUM_GPUS
    ARGS=(tools/evaluate.py --load "$LOAD" --tasks "$TASKS" --num-fewshot "$NUM_FEWSHOT" --output "$RESULTS")
    case $family-$MODE in
        *-auto) ;;                                                    # likelihoods, and greedy answers where they count
        mdm-mc) ARGS+=(--eval-method mc --only-nll) ;;                # the bound, by Monte Carlo
        mdm-chain) ARGS+=(--eval-method chain --only-nll) ;;          # token by token from the left
        arm-nll) ARGS+=(--only-nll) ;;                                # exact
        *-generate) ARGS+=(--only-generate) ;;                        # what decoding gives
        *) stop_with "MODE=$MODE is no mode of $family: mdm has auto, mc, chain, generate; arm has auto, nll, generate" ;;
    esac
    [[ $family != mdm ]] || ARGS+=(--num-mc "$NUM_MC")
    [[ $family != mdm || -z $MC_TOLERANCE ]] || ARGS+=(--mc-tolerance "$MC_TOLERANCE")
    [[ -z $LOAD_TAG ]] || ARGS+=(--load-tag "$LOAD_TAG")
    [[ -z $LIMIT ]] || ARGS+=(--limit "$LIMIT")
    split_extra_args
    ARGS+=("${EXTRA_ARGS[@]}")
    gpus=${NUM_GPUS:-$(visible_gpus)}
    LAUNCH=("$PYTHON")
    ((gpus < 2)) || LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%s\n' "${LAUNCH[@]}" "${ARGS[@]}"
        exit 0
    fi
    "${LAUNCH[@]}" "${ARGS[@]}"
}
