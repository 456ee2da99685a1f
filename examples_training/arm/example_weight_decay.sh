#!/usr/bin/env bash
#SBATCH --job-name=arm-weight-decay
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# One point of the grid of weight decay and dropout (autoregressive); `tools/sweep.py weight_decay` runs the grid.
# Guide: examples_training/README.md, "Regularised baseline".
[[ -f examples_training/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[[ -f examples_training/lib.sh ]] || { echo "error: start this script from the repository root, not from $PWD" >&2; exit 2; }
source examples_training/lib.sh

MODEL_PARAM=("${PARAM_140M[@]}")                                        # model: a row of utils/model_params.sh
DATA_CNT="${DATA_100M}"                                                 # unique tokens: an entry of utils/epoch_tokens.sh, or a number
EPOCH_CNT=50                                                            # epochs over them
WEIGHT_DECAY=1.6                                                        # 0.1 (the recipe) to 3.2
HIDDEN_DROPOUT=0.1                                                      # 0 to 0.3
ATTENTION_DROPOUT=0.1                                                   # 0 to 0.3
TRAIN_DATA_PATH=${TRAIN_DATA_PATH-utils/datapaths/example_trainset.txt} # training data: weights and prefixes
VALID_DATA_PATH=${VALID_DATA_PATH-utils/datapaths/example_valset.txt}   # validation data
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE-8}                                  # sequences per GPU and forward pass

pretrain_epochs arm weight_decay "$@"
