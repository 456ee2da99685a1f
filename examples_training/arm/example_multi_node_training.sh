#!/usr/bin/env bash
#SBATCH --job-name=arm-multi-node
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# Train a large autoregressive model on several nodes. Without Slurm: set MASTER_ADDR, MASTER_PORT, NNODES and NODE_RANK on each.
# Guide: examples_training/README.md, "Multi-node".
[[ -f examples_training/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[[ -f examples_training/lib.sh ]] || { echo "error: start this script from the repository root, not from $PWD" >&2; exit 2; }
source examples_training/lib.sh

MODEL_PARAM=("${PARAM_2298M[@]}")                                       # model: a row of utils/model_params.sh
DATA_CNT="${DATA_100M}"                                                 # unique tokens: an entry of utils/epoch_tokens.sh, or a number
EPOCH_CNT=100                                                           # epochs over them
TRAIN_DATA_PATH=${TRAIN_DATA_PATH-utils/datapaths/example_trainset.txt} # training data: weights and prefixes
VALID_DATA_PATH=${VALID_DATA_PATH-utils/datapaths/example_valset.txt}   # validation data
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE-8}                                  # sequences per GPU and forward pass
ZERO_STAGE=${ZERO_STAGE-1}                                              # optimizer state split over the GPUs
CPU_OFFLOAD=${CPU_OFFLOAD-1}                                            # and kept on the CPU
TP_SIZE=${TP_SIZE-1}                                                    # tensor-parallel GPUs
PP_SIZE=${PP_SIZE-1}                                                    # pipeline stages

pretrain_epochs arm multi_node "$@"
