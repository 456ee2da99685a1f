# shellcheck shell=bash disable=SC2034  # what it finds out, lib.sh reads
# What lib.sh checks and looks up before a run starts. Whatever is wrong ends with one line and exit code 2.

require() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || stop_with "$(assigned "$name") is empty: give it a value$(hint "$name")"
    done
}

# The assignment of a variable as it stands in the script, for messages.
assigned() {
    local line
    line=$(grep -m 1 "^$1=" "$0" 2>/dev/null | sed 's/ *#.*//') || true
    echo "${line:-$1}"
}

# A remedy for the variables that are taken from a table.
hint() {
    case $1 in
        DATA_CNT) echo ", a number of tokens or an entry of utils/epoch_tokens.sh, e.g. \"\${DATA_100M}\"" ;;
        FLOPS_FACTOR) echo " in units of 1e18 FLOPs, e.g. 10" ;;
        *) echo ", in the script or as $1=VALUE" ;;
    esac
}

require_whole() {
    local name
    for name in "$@"; do
        require "$name"
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop_with "$name must be a whole number above 0, not '${!name}'"
        require_computable "$name"
    done
}

require_digits() {
    local name
    for name in "$@"; do
        require "$name"
        [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || stop_with "$name must be a whole number, not '${!name}'"
        require_computable "$name"
    done
}

# A whole number that bash can also multiply by a small one: its arithmetic overflows without a word at 19 digits.
require_computable() {
    [[ ${!1} =~ ^.{1,15}$ ]] || stop_with "$1=${!1} is too large: at most 15 digits"
}

# require_at_most LIMIT NAME...: after require_whole or require_digits.
require_at_most() {
    local limit=$1 name
    shift
    for name in "$@"; do
        ((${!name} <= limit)) || stop_with "$name must be at most $limit, not '${!name}'"
    done
}

# A number of 0 or more as Python reads it: 1, 0.5, .5, 2e-4.
require_number() {
    local name
    for name in "$@"; do
        require "$name"
        [[ ${!name} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] ||
            stop_with "$name must be a number of 0 or more, not '${!name}'"
    done
}

require_choice() {
    local name=$1 choice
    shift
    for choice in "$@"; do [[ ${!name} != "$choice" ]] || return 0; done
    stop_with "$name must be one of $*, not '${!name}'"
}

# Switches, 0 where unset. Any other value would count as 0, and a dry run that is none trains.
require_switches() {
    local name
    for name in "$@"; do
        printf -v "$name" %s "${!name-0}"
        require_choice "$name" 0 1
    done
}

# The processes must divide into the model's parts, and the batch into the processes; a dry run may not know their number.
check_batch() {
    [[ -n $PROCESSES ]] || return 0
    local parts=$((TP_SIZE * PP_SIZE)) copies
    ((PROCESSES % parts == 0)) || stop_with "TP_SIZE x PP_SIZE = $parts does not divide $PROCESSES processes"
    copies=$((PROCESSES / parts))
    ((GLOBAL_BATCH_SIZE % (MICRO_BATCH_SIZE * copies) == 0)) ||
        stop_with "GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE is no multiple of MICRO_BATCH_SIZE=$MICRO_BATCH_SIZE x $copies data-parallel processes"
}

# The variables of SETTINGS that the environment holds, before the script sets its own.
remember_environment() {
    local name
    declare -gA GIVEN=()
    for name in $SETTINGS; do [[ -z ${!name+set} ]] || GIVEN[$name]=${!name}; done
}

# apply_overrides NAME=VALUE...: arguments of the script win over what stands in it. What stands in it would win over the
# environment, so there a value that differs is refused.
apply_overrides() {
    local argument name value remedy
    for argument in "$@"; do
        name=${argument%%=*}
        [[ $argument == *=* ]] || stop_with "'$argument' is not NAME=VALUE: flags of the entry point go into EXTRA_ARGS"
        [[ $SETTINGS == *[[:space:]]"$name"[[:space:]]* ]] || stop_with "$name is no variable of the scripts: examples_training/README.md lists them"
        unset "$name" "GIVEN[$name]"
        printf -v "$name" %s "${argument#*=}"
    done
    for name in "${!GIVEN[@]}"; do
        value="${name}[*]" remedy="give it as an argument"
        [[ $name != EXTRA_ARGS ]] || remedy="add to it there" # an argument would drop the script's own
        [[ ${!value} == "${GIVEN[$name]}" ]] ||
            stop_with "$name=${GIVEN[$name]} in the environment has no effect, the script sets $(assigned "$name"): $remedy"
    done
}

# refuse_unread WHY NAME...: variables that are the scripts', but that this one does not read.
refuse_unread() {
    local why=$1 name
    shift
    for name in "$@"; do
        [[ -z ${!name+set} ]] || stop_with "$name has no effect in ${BASH_SOURCE[-1]}, $why"
    done
}

# look_up_tokens NAME: where the variable NAME holds a name of utils/epoch_tokens.sh (100M or DATA_100M), its number instead.
look_up_tokens() {
    local entry=DATA_${!1:-}
    entry=${entry/#DATA_DATA_/DATA_}
    [[ ! $entry =~ ^DATA_[A-Za-z0-9_]+$ || -z ${!entry:-} ]] || printf -v "$1" %s "${!entry}"
}

find_python() {
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        [[ ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
    fi
    PYTHON=$(command -v "$PYTHON") || stop_with "PYTHON: no such program; make venv makes .venv/bin/python"
    # Its deepspeed and torchrun are the ones to use.
    export PYTHON PATH="${PYTHON%/*}:$PATH"
}

# MODEL_PARAM is the five numbers of a row, or the row's name; afterwards both are known.
find_row() {
    local name
    [[ -n ${MODEL_PARAM[*]:-} ]] ||
        stop_with "$(assigned MODEL_PARAM) names no row of utils/model_params.sh: take one of its PARAM_ names, e.g. (\"\${PARAM_425M[@]}\")"
    MODEL_PARAM=("${MODEL_PARAM[@]}") # from an argument or the environment it is no array yet
    if [[ ${#MODEL_PARAM[@]} == 1 ]]; then
        name=PARAM_${MODEL_PARAM[0]#PARAM_}
        [[ $name =~ ^PARAM_[A-Za-z0-9_]+$ && -n ${!name:-} ]] ||
            stop_with "MODEL_PARAM=${MODEL_PARAM[0]} names no row of utils/model_params.sh: take one of its PARAM_ names, e.g. 425M"
        name="${name}[@]"
        MODEL_PARAM=("${!name}")
    fi
    [[ ${#MODEL_PARAM[@]} == 5 && ${MODEL_PARAM[*]} =~ ^[1-9][0-9]*(\ [1-9][0-9]*){4}$ ]] ||
        stop_with "MODEL_PARAM must be five whole numbers (d_model ffw kv heads layers), not '${MODEL_PARAM[*]}'"
    ROW=d${MODEL_PARAM[0]}-h${MODEL_PARAM[3]}x${MODEL_PARAM[2]}-l${MODEL_PARAM[4]}
    for name in "${!PARAM_@}"; do
        local -n row=$name
        [[ ${row[*]} != "${MODEL_PARAM[*]}" ]] || ROW=${name#PARAM_}
    done
}

# The data path files, and, unless nothing will run, the data and GPT-2's vocabulary.
find_data() {
    local name prefixes prefix suffix
    for name in TRAIN_DATA_PATH VALID_DATA_PATH; do
        [[ -f ${!name} || ${SMOKE:-0}${DRY_RUN:-0} == 11 ]] ||
            stop_with "$name=${!name}: no such file; it holds weights and prefixes of data, as the files in utils/datapaths"
    done
    [[ ${DRY_RUN:-0} != 1 ]] || return 0
    for name in TRAIN_DATA_PATH VALID_DATA_PATH; do
        prefixes=$("$PYTHON" - "${!name}" "$name" <<'PYTHON'
import sys

from megatron.data.data_paths import read_data_path_file
from megatron.errors import UserError

try:
    print(*(source.prefix for source in read_data_path_file(*sys.argv[1:])), sep="\n")
except UserError as error:
    sys.exit(f"error: {error}")
PYTHON
        ) || exit 2
        while IFS= read -r prefix; do
            for suffix in bin idx; do
                [[ -f $prefix.$suffix ]] ||
                    stop_with "${!name} names $prefix, but there is no $prefix.$suffix: tools/preprocess_data.py makes it (docs/data.md)"
            done
        done <<<"$prefixes"
    done
    if [[ ! -f $VOCAB_FILE || ! -f $MERGE_FILE ]]; then
        [[ $VOCAB_FILE == utils/data/gpt2-vocab.json && $MERGE_FILE == utils/data/gpt2-merges.txt ]] ||
            stop_with "VOCAB_FILE=$VOCAB_FILE or MERGE_FILE=$MERGE_FILE: no such file"
        echo "note: no GPT-2 vocabulary in utils/data yet: tools/fetch_gpt2_vocab.py gets it" >&2
        "$PYTHON" tools/fetch_gpt2_vocab.py >&2 ||
            stop_with "GPT-2's vocabulary could not be fetched: put it at $VOCAB_FILE and $MERGE_FILE"
    fi
}

# A note where a budget needs more tokens than the training data have, so that its one epoch is none. Without data, as a
# dry run may be, only UNIQUE_TOKENS says how many they are.
note_epochs() {
    local tokens
    tokens=$("$PYTHON" - "$TRAIN_DATA_PATH" 2>/dev/null <<'PYTHON'
import sys

from megatron.data.data_paths import read_data_path_file
from megatron.data.indexed_dataset import IndexedDataset

sources = read_data_path_file(sys.argv[1], "TRAIN_DATA_PATH")
print(sum(IndexedDataset(source.prefix).num_tokens for source in sources))
PYTHON
    ) || tokens=
    [[ -z $UNIQUE_TOKENS || (-n $tokens && $tokens -lt $UNIQUE_TOKENS) ]] || tokens=$UNIQUE_TOKENS
    [[ -n $tokens && $tokens -gt 0 ]] || return 0
    ((DATA_CNT <= tokens)) ||
        echo "note: FLOPS_FACTOR=$FLOPS_FACTOR is $DATA_CNT tokens for $ROW, but the training data have $tokens: they repeat" >&2
}
