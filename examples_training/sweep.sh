#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# A grid of runs, one a task of a Slurm array, or one after another under bash; `--dry-run` lists them with their numbers.
#   sbatch --array=0-23%4 examples_training/sweep.sh weight_decay --family arm
#   bash examples_training/sweep.sh weight_decay --family arm --dry-run
# Guide: examples_training/README.md, "Sweeps".
[[ -f examples_training/lib.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[[ -f examples_training/lib.sh ]] || { echo "error: start this script from the repository root, not from $PWD" >&2; exit 2; }
source examples_training/lib.sh

find_python
exec "$PYTHON" tools/sweep.py "$@" ${SLURM_ARRAY_TASK_ID:+--task "$SLURM_ARRAY_TASK_ID"}
