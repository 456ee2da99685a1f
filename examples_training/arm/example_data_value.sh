#!/usr/bin/env bash
#SBATCH --job-name=arm-data-value
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# Repeat a share of the optimal run's data to the same total (autoregressive): what is repeated data worth?
# Optimal models and their data at 1e19, 3e19, 1e20 FLOPs: 217M 7B6, 425M 12B, 724M 23B8.
# Guide: examples_training/README.md, "Data value".
[[ -f examples_training/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[[ -f examples_training/lib.sh ]] || { echo "error: start this script from the repository root, not from $PWD" >&2; exit 2; }
source examples_training/lib.sh

MODEL_PARAM=("${PARAM_217M[@]}")                                     # model: a row of utils/model_params.sh
DATA_CNT="${DATA_7B6_10ep}"                                          # unique tokens: DATA_<size>, or its share DATA_<size>_<n>ep
EPOCH_CNT=10                                                         # the n of DATA_CNT: 1, 2, 4, 10, 20, 50 or 100
UNIQUE_TOKENS="$DATA_CNT"                                            # no copies: the first documents, up to this many tokens
TRAIN_DATA_PATH=${TRAIN_DATA_PATH-utils/datapaths/train_c4_full.txt} # training data: weights and prefixes
VALID_DATA_PATH=${VALID_DATA_PATH-utils/datapaths/val_c4.txt}        # validation data
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE-16}                              # sequences per GPU and forward pass

pretrain_epochs arm data_value "$@"
