#!/usr/bin/env bash
#SBATCH --job-name=arm-training
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# Train one autoregressive model for many epochs over a fixed number of unique tokens.
# Guide: examples_training/README.md, "The standard run".
[[ -f examples_training/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[[ -f examples_training/lib.sh ]] || { echo "error: start this script from the repository root, not from $PWD" >&2; exit 2; }
source examples_training/lib.sh

MODEL_PARAM=("${PARAM_425M[@]}")                                        # model: a row of utils/model_params.sh
DATA_CNT="${DATA_100M}"                                                 # unique tokens: an entry of utils/epoch_tokens.sh, or a number
EPOCH_CNT=100                                                           # epochs over them
TRAIN_DATA_PATH=${TRAIN_DATA_PATH-utils/datapaths/example_trainset.txt} # training data: weights and prefixes
VALID_DATA_PATH=${VALID_DATA_PATH-utils/datapaths/example_valset.txt}   # validation data
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE-8}                                  # sequences per GPU and forward pass

pretrain_epochs arm training "$@"
