#!/usr/bin/env bash
#SBATCH --job-name=arm-lr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# One point of the grid of learning rates and Adam's beta2 (autoregressive); `tools/sweep.py lr` runs the grid.
# Guide: examples_training/README.md, "Learning-rate exploration".
[[ -f examples_training/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[[ -f examples_training/lib.sh ]] || { echo "error: start this script from the repository root, not from $PWD" >&2; exit 2; }
source examples_training/lib.sh

MODEL_PARAM=("${PARAM_217M[@]}")                                     # model: a row of utils/model_params.sh
FLOPS_FACTOR=10                                                      # budget in units of 1e18 FLOPs: 6, 10, 30 or 100
LR=2e-4                                                              # peak learning rate
MIN_LR=2e-5                                                          # learning rate at the end
ADAM_BETA2=0.95                                                      # Adam's second coefficient
WARMUP_PERCENT=1                                                     # share of the samples that the learning rate rises over
TRAIN_DATA_PATH=${TRAIN_DATA_PATH-utils/datapaths/train_c4_full.txt} # training data: weights and prefixes
VALID_DATA_PATH=${VALID_DATA_PATH-utils/datapaths/val_c4.txt}        # validation data
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE-16}                              # sequences per GPU and forward pass

pretrain_budget arm lr_exploration "$@"
