#!/usr/bin/env bash
# Start one node's processes of a run, and stop all of them when the run is stopped.
#
#   Slurm:          srun bash examples_training/launch.sh pretrain_gpt.py --num-layers ...     (one task a process, or a node)
#   without Slurm:  MASTER_ADDR=host0 MASTER_PORT=29500 NNODES=2 NODE_RANK=0 \
#                       bash examples_training/launch.sh pretrain_gpt.py --num-layers ...      (on every node, with its rank)
#
# The experiment scripts call it themselves (LAUNCHER=srun) or use its functions. It takes any number of nodes, sets no NCCL
# variable and deletes nothing. NUM_GPUS is the number of processes of this node [all visible GPUs; one without a GPU].

# stop_with MESSAGE: end with one line, as the entry points do.
stop_with() {
    echo "error: $*" >&2
    exit 2
}

# Number of GPUs that this shell may use.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        # "" and -1 hide every GPU.
        [[ -n $CUDA_VISIBLE_DEVICES && $CUDA_VISIBLE_DEVICES != -* ]] || { echo 0; return; }
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# A port of this machine that nobody listens on, below the range that the kernel hands out itself.
free_port() {
    local port
    for _ in {1..100}; do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    done
    stop_with "no free port found between 20000 and 32000: set MASTER_PORT"
}

# Address of the first node of this Slurm job. A node's name need not resolve, so Slurm's own record of it is asked.
slurm_master_address() {
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    echo "${address:-$first}"
}

# marked_processes MARK [WORD]: processes that supervise started under MARK, launchers, ranks and data loaders; with WORD
# only those that have it on their command line.
marked_processes() {
    local pid
    for pid in $({ grep -lzsxF "PRETRAIN_RUN_MARK=$1" /proc/[0-9]*/environ || true; } | cut -d/ -f3); do
        [[ -z ${2:-} ]] || grep -qzsxF -- "$2" "/proc/$pid/cmdline" || continue
        echo "$pid"
    done
}

# kill_marked SIGNAL MARK [WORD]
kill_marked() {
    local pid
    for pid in $(marked_processes "$2" "${3:-}"); do kill -s "$1" "$pid" 2>/dev/null || true; done
}

# signal_ranks SIGNAL MARK: signal the training processes themselves, not their launchers, which would kill them before they
# have saved, nor their data loaders. A training process is marked, has a RANK, and its parent has none.
signal_ranks() {
    local pid parent found=1
    for pid in $(marked_processes "$2"); do
        grep -qzs '^RANK=' "/proc/$pid/environ" || continue
        parent=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null) || continue
        grep -qzs '^RANK=' "/proc/$parent/environ" && continue
        kill -s "$1" "$pid" 2>/dev/null && found=0
    done
    return "$found"
}

# supervise COMMAND...: run a launcher and return its exit code. SIGTERM, SIGHUP, Ctrl-C and SIGUSR1 (Slurm's warning before
# a time limit) reach every rank, which saves at its next step and exits; a second Ctrl-C kills. When the launcher has ended,
# however it ended, nothing of the run is left. STOPPED_BY holds the first signal.
supervise() {
    local code=0 mark="$$-$RANDOM$RANDOM" child entry
    STOPPED_BY=
    # Left over in some shells, these would make a launcher look like a rank.
    unset RANK LOCAL_RANK WORLD_SIZE
    set -m # a process group of its own: the terminal's Ctrl-C comes here only, once
    PRETRAIN_RUN_MARK=$mark "$@" &
    child=$!
    set +m
    trap 'forward TERM "$child" "$mark"' TERM HUP
    trap 'forward INT "$child" "$mark"' INT
    trap 'forward USR1 "$child" "$mark"' USR1
    # wait also returns when a signal came: only the child's end counts, and its code can be asked for again.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || code=$?
    trap - TERM HUP INT USR1
    for entry in "$@"; do [[ $entry != *.py ]] || break; done
    if [[ -n $(marked_processes "$mark" "$entry") ]]; then
        # The launcher died and left its ranks behind: ten seconds to end, then the end.
        kill_marked TERM "$mark" "$entry"
        for _ in {1..50}; do [[ -n $(marked_processes "$mark" "$entry") ]] || break; sleep 0.2; done
        kill_marked KILL "$mark" "$entry"
        [[ $code != 0 ]] || code=1
    fi
    return "$code"
}

# forward SIGNAL CHILD MARK: what supervise does with a signal.
forward() {
    local signal=$1
    if [[ -n $STOPPED_BY && $signal == INT ]]; then
        kill_marked KILL "$3"
        return
    fi
    STOPPED_BY=${STOPPED_BY:-$signal}
    [[ $signal == INT ]] && signal=TERM
    echo "stopping: the run saves at its next step and exits (Ctrl-C again kills)" >&2
    if [[ ${LAUNCHER:-} == srun ]]; then
        kill -s "$signal" "$2" 2>/dev/null || true # srun passes it on to its tasks
    else
        # Without ranks the run is still starting and has nothing to save.
        signal_ranks "$signal" "$3" || kill -s TERM -- "-$2" 2>/dev/null || true
    fi
}

# start_node ENTRY_POINT ARGUMENTS...: this node's processes, or this task's one process.
start_node() {
    local python=${PYTHON:-python3} name processes nodes=${NNODES:-1} rank=${NODE_RANK:-0}
    [[ $# -gt 0 ]] || stop_with "usage: launch.sh ENTRY_POINT ARGUMENTS..."
    processes=${NUM_GPUS:-$(visible_gpus)}
    for name in NUM_GPUS NNODES NODE_RANK MASTER_PORT; do
        [[ ${!name:-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] || stop_with "$name must be a whole number, not '${!name}'"
    done
    [[ $processes -gt 0 ]] || processes=1
    # A run on the CPU stays there: Slurm shows the job's GPUs to every step anew.
    [[ ${DS_ACCELERATOR:-} != cpu ]] || export CUDA_VISIBLE_DEVICES=
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
    if [[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_STEP_ID:-} ]]; then
        nodes=$SLURM_STEP_NUM_NODES rank=$SLURM_NODEID
        export MASTER_ADDR=${MASTER_ADDR:-$(slurm_master_address)}
        # Every node must come to the same port without asking another.
        export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
        if [[ $SLURM_STEP_NUM_TASKS -gt $nodes || $processes == 1 ]]; then
            export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
            # With one GPU bound to each task, that GPU is number 0 to it.
            [[ $(visible_gpus) != 1 ]] || LOCAL_RANK=0
            exec "$python" -u "$@"
        fi
    elif [[ -n ${SLURM_JOB_ID:-} && ${SLURM_NNODES:-1} -gt 1 && -z ${NNODES:-} ]]; then
        stop_with "this job has $SLURM_NNODES nodes: start launch.sh on each of them with srun"
    elif [[ $nodes -gt 1 ]]; then
        [[ -n ${MASTER_ADDR:-} ]] || stop_with "NNODES=$nodes needs MASTER_ADDR, the address of the node with NODE_RANK=0"
        [[ -n ${NODE_RANK:-} ]] || stop_with "NNODES=$nodes needs NODE_RANK, this node's number from 0 to $((nodes - 1))"
    fi
    supervise "$python" -m torch.distributed.run --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$processes" \
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
}

# --- for lib.sh: which devices, which launcher ---

# PRECISION, and how many processes on which devices. Without a GPU training is fp32; a dry run shows what a GPU machine
# would run, since it is often made on a login node.
# shellcheck disable=SC2034  # lib.sh prints NOTE
choose_devices() {
    local visible explicit=${NUM_GPUS-}
    visible=$(visible_gpus)
    HIDDEN_GPUS=$(unset CUDA_VISIBLE_DEVICES && visible_gpus)
    if [[ -n $explicit ]]; then
        require_digits NUM_GPUS
        require_at_most 999999 NUM_GPUS
    fi
    if [[ ${SMOKE:-0} == 1 || $explicit == 0 ]]; then
        visible=0
        export CUDA_VISIBLE_DEVICES=
    fi
    DEVICE=gpu NOTE=
    if ((visible > 0)); then
        NUM_GPUS=${explicit:-$visible}
        ((NUM_GPUS <= visible)) || stop_with "NUM_GPUS=$NUM_GPUS, but this machine shows $visible GPUs"
    elif [[ ${DRY_RUN:-0} == 1 && ${SMOKE:-0} != 1 && $explicit != 0 ]]; then
        NOTE="no GPU here: this is what a machine with GPUs would run (this one: fp32 on the CPU)"
        NUM_GPUS=$explicit
    else
        DEVICE=cpu NUM_GPUS=${explicit:-${SLURM_NTASKS_PER_NODE:-1}}
        ((NUM_GPUS > 0)) || NUM_GPUS=1
        export DS_ACCELERATOR=cpu
    fi
    if [[ -z ${PRECISION:-} ]]; then
        PRECISION=bf16
        if [[ $DEVICE == cpu ]]; then
            PRECISION=fp32
            NOTE="no GPU is used: fp32 on the CPU, so without --bf16"
        fi
    fi
    require_choice PRECISION bf16 fp16 fp32
    if [[ $DEVICE == gpu && -n ${CUDA_VISIBLE_DEVICES:-} && -n $explicit ]]; then
        CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$explicit" <<<"$CUDA_VISIBLE_DEVICES")
        export CUDA_VISIBLE_DEVICES
    fi
}

# LAUNCH, the words before the entry point.
choose_launcher() {
    local nodes=${NNODES:-1} cpus
    if [[ -n ${NNODES:-} ]]; then
        require_whole NNODES
        require_at_most 999999 NNODES
    fi
    [[ -z ${NODE_RANK:-} ]] || require_digits NODE_RANK
    if [[ -z ${LAUNCHER:-} ]]; then
        LAUNCHER=deepspeed
        if [[ ${SLURM_NNODES:-1} -gt 1 ]]; then
            LAUNCHER=srun
        elif [[ $nodes -gt 1 || ($DEVICE == cpu && $HIDDEN_GPUS -gt 0) ]]; then
            LAUNCHER=torchrun
        fi
    fi
    require_choice LAUNCHER deepspeed torchrun srun
    # deepspeed sets CUDA_VISIBLE_DEVICES itself, on the CPU too.
    [[ $LAUNCHER != deepspeed || $DEVICE != cpu || $HIDDEN_GPUS == 0 ]] ||
        stop_with "LAUNCHER=deepspeed would show the GPUs to a run on the CPU: use LAUNCHER=torchrun"
    if [[ $nodes -gt 1 && $LAUNCHER != srun ]]; then
        [[ $LAUNCHER == torchrun ]] || stop_with "LAUNCHER=deepspeed starts one node: use LAUNCHER=torchrun (or srun) for NNODES=$nodes"
        [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} && -n ${NODE_RANK:-} ]] ||
            stop_with "NNODES=$nodes needs MASTER_ADDR and MASTER_PORT (the same on every node) and NODE_RANK (from 0 to $((nodes - 1)))"
    fi
    MASTER_PORT=${MASTER_PORT:-$(free_port)} || exit 2
    require_whole MASTER_PORT
    require_at_most 65535 MASTER_PORT
    case $LAUNCHER in
        deepspeed)
            LAUNCH=(deepspeed)
            # deepspeed reads CUDA_VISIBLE_DEVICES only without --num_gpus, and only numbers.
            if [[ -z ${CUDA_VISIBLE_DEVICES:-} ]]; then
                [[ -z $NUM_GPUS ]] || LAUNCH+=(--num_gpus "$NUM_GPUS")
            elif [[ ! $CUDA_VISIBLE_DEVICES =~ ^[0-9,]+$ ]]; then
                stop_with "LAUNCHER=deepspeed reads only numbers in CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: use LAUNCHER=torchrun"
            fi
            LAUNCH+=(--master_port "$MASTER_PORT")
            ;;
        torchrun)
            LAUNCH=(torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${NUM_GPUS:-gpu}"
                --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT")
            ;;
        srun)
            nodes=${SLURM_NNODES:-1}
            LAUNCH=(srun --kill-on-bad-exit=1 --nodes "$nodes")
            if [[ -n $NUM_GPUS ]]; then
                cpus=$((${SLURM_CPUS_ON_NODE:-NUM_GPUS} / NUM_GPUS))
                LAUNCH+=(--ntasks "$((nodes * NUM_GPUS))" --ntasks-per-node "$NUM_GPUS" --cpus-per-task "$((cpus > 0 ? cpus : 1))")
            fi
            LAUNCH+=(bash examples_training/launch.sh)
            if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then export MASTER_ADDR=${MASTER_ADDR:-$(slurm_master_address)}; fi
            ;;
    esac
    # shellcheck disable=SC2034  # of all nodes, for lib.sh
    PROCESSES=${NUM_GPUS:+$((nodes * ${NUM_GPUS:-0}))}
    export LAUNCHER MASTER_PORT NUM_GPUS
    [[ -z $NUM_GPUS ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS))}
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    start_node "$@"
fi
