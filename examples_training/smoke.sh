# shellcheck shell=bash disable=SC2034  # sets the variables of lib.sh
# SMOKE=1: any experiment script from end to end in seconds, on the CPU: a tiny model, tiny data made on the spot with the
# project's own tools, three steps; for the downstream scripts a task of four questions.

shrink() {
    local data
    [[ $OUTPUT_DIR != output ]] || OUTPUT_DIR=output/smoke
    data=$OUTPUT_DIR/data
    [[ ${DRY_RUN:-0} == 1 || -f $data/data_path.txt ]] || make_smoke_data "$data"
    MODEL_PARAM=(64 256 16 4 2) ROW="smoke test of $ROW" VARIANT=smoke_$VARIANT WANDB_EXP_NAME=smoke_$WANDB_EXP_NAME
    # The same batch for one process and for two, so that their losses can be compared.
    SEQ_LEN=64 MICRO_BATCH_SIZE=2 GLOBAL_BATCH_SIZE=$((2 * (PROCESSES > 2 ? PROCESSES : 2)))
    TRAIN_SAMPLES=$((3 * GLOBAL_BATCH_SIZE)) WARMUP_SAMPLES=2
    LOG_INTERVAL=1 EVAL_INTERVAL=3 EVAL_ITERS=1 SAVE_INTERVAL=3
    TRAIN_DATA_PATH=$data/data_path.txt VALID_DATA_PATH=$data/data_path.txt
    VOCAB_FILE=$data/vocab.json MERGE_FILE=$data/merges.txt
    [[ -z $UNIQUE_TOKENS ]] || UNIQUE_TOKENS=2000
    WANDB_PROJECT=
}

# shrink_downstream FAMILY: the run that SMOKE=1 example_training.sh trains, and a task beside it.
shrink_downstream() {
    LOAD=${LOAD/#output\/checkpoints_/output/smoke/checkpoints_smoke_}
    export CUDA_VISIBLE_DEVICES=
    [[ ${DRY_RUN:-0} == 1 || -d $LOAD ]] ||
        stop_with "LOAD=$LOAD: no such directory; SMOKE=1 bash examples_training/$1/example_training.sh makes it"
    NUM_MC=${NUM_MC-2} TASKS=$LOAD/smoke_task.yaml
    [[ ${DRY_RUN:-0} == 1 ]] || make_smoke_task "$TASKS"
}

# Four questions with two answers each, in an lm-eval task FILE and a jsonl file beside it.
make_smoke_task() {
    local n
    for n in 1 2 3 4; do
        printf '{"question": "%s times %s is", "choices": ["%s.", "0."], "gold": 0}\n' "$n" "$n" "$((n * n))"
    done >"${1%.yaml}.jsonl"
    cat >"$1" <<'YAML'
task: smoke
dataset_path: json
dataset_kwargs: {data_files: {test: smoke_task.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
YAML
}

# A GPT-2 style vocabulary of bytes and 40 documents, in DIRECTORY, which appears whole or not at all.
make_smoke_data() {
    local scratch=$1.$$
    mkdir -p "$scratch"
    "$PYTHON" - "$scratch" <<'PYTHON'
import json, sys
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

directory = Path(sys.argv[1])
tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
(directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
(directory / "merges.txt").write_text("#version: 0.2\n")
with (directory / "documents.jsonl").open("w") as file:
    for n in range(40):
        file.write(json.dumps({"text": f"Document {n}: " + f"{n} times {n} is {n * n}. " * 8}) + "\n")
PYTHON
    "$PYTHON" tools/preprocess_data.py --input "$scratch/documents.jsonl" --output-prefix "$scratch/smoke" --append-eod \
        --tokenizer-type GPT2BPETokenizer --vocab-file "$scratch/vocab.json" --merge-file "$scratch/merges.txt" --workers 1
    echo "\"1.0 $1/smoke_text_document\"" >"$scratch/data_path.txt"
    # Another run may have been faster.
    mv -T "$scratch" "$1" 2>/dev/null || rm -r "$scratch"
}
