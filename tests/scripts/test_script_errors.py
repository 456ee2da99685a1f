"""Whatever a user gets wrong ends with exit code 2 and one line that says what and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BY_ARGUMENT = {
    "MODEL_PARAM=999M": "MODEL_PARAM=999M names no row of utils/model_params.sh",
    "MODEL_PARAM=": "names no row of utils/model_params.sh",
    "EPOCH_CNT=": "is empty: give it a value",
    "DATA_CNT=": "is empty: give it a value, a number of tokens or an entry of utils/epoch_tokens.sh",
    "DATA_CNT=900M": "DATA_CNT must be a whole number above 0, not '900M'",
    "EPOCH_CNT=ten": "EPOCH_CNT must be a whole number above 0, not 'ten'",
    "MICRO_BATCH_SIZE=0": "MICRO_BATCH_SIZE must be a whole number above 0, not '0'",
    "WARMUP_PERCENT=0.5": "WARMUP_PERCENT must be a whole number, not '0.5'",
    "WARMUP_PERCENT=200": "WARMUP_PERCENT must be at most 100, not '200'",
    "LR=abc": "LR must be a number of 0 or more, not 'abc'",
    "MIN_LR=-1e-5": "MIN_LR must be a number of 0 or more, not '-1e-5'",
    "ADAM_BETA2=0,95": "ADAM_BETA2 must be a number of 0 or more, not '0,95'",
    "CLIP_GRAD=abc": "CLIP_GRAD must be a number of 0 or more, not 'abc'",
    "CLIP_GRAD=.5": "CLIP_GRAD must be a number as JSON writes it, e.g. 0.5, not '.5'",
    "HIDDEN_DROPOUT=nan": "HIDDEN_DROPOUT must be a number of 0 or more, not 'nan'",
    "AR_RATIO=half": "AR_RATIO must be a number of 0 or more, not 'half'",
    "NUM_ORDER_LIST=0": "NUM_ORDER_LIST must be a whole number above 0, not '0'",
    "MASTER_PORT=abc": "MASTER_PORT must be a whole number above 0, not 'abc'",
    "MASTER_PORT=65536": "MASTER_PORT must be at most 65535, not '65536'",
    "ZERO_STAGE=4": "ZERO_STAGE must be one of 0 1 2 3, not '4'",
    "CPU_OFFLOAD=1": "CPU_OFFLOAD=1 needs ZERO_STAGE=1, 2 or 3",
    "PRECISION=fp8": "PRECISION must be one of bf16 fp16 fp32, not 'fp8'",
    "LAUNCHER=mpirun": "LAUNCHER must be one of deepspeed torchrun srun, not 'mpirun'",
    "NUM_GPUS=two": "NUM_GPUS must be a whole number, not 'two'",
    "NUM_GPUS=999999999": "NUM_GPUS must be at most 999999, not '999999999'",
    "NUM_GPUS=3": "GLOBAL_BATCH_SIZE=256 is no multiple of MICRO_BATCH_SIZE=8 x 3 data-parallel processes",
    "DATA_CNT=999999999999999999": "DATA_CNT=999999999999999999 is too large: at most 15 digits",
    "EPOCH_CNT=99999999999": "DATA_CNT=99952399 x EPOCH_CNT=99999999999 is too large: at most 1e15 tokens",
    "TP_SIZE=1000000000": "TP_SIZE must be at most 999999999, not '1000000000'",
    "SEED=99999999999999999999": "SEED=99999999999999999999 is too large: at most 15 digits",
    "DATA_CNT=1000": "less than one batch of GLOBAL_BATCH_SIZE=256",
    "VARIANT=a/b": "VARIANT=a/b is a name and must not contain /",
    "TRAIN_DATA_PATH=no such.txt": "TRAIN_DATA_PATH=no such.txt: no such file",
    "VALID_DATA_PATH=": "is empty: give it a value",
    "LEARNING_RATE=1": "LEARNING_RATE is no variable of the scripts",
    "--lr": "'--lr' is not NAME=VALUE",
}


def _assert_one_line(result: Any, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


@pytest.mark.parametrize("argument", BY_ARGUMENT)
def test_wrong_settings(argument: str, sandbox: Any) -> None:
    result = sandbox.bash("examples_training/mdm/example_training.sh", argument, DRY_RUN="1")
    _assert_one_line(result, BY_ARGUMENT[argument])
    assert not (sandbox.path / "ds_configs").exists()


DOWNSTREAM = {
    "NUM_GPUS=abc": "error: NUM_GPUS must be a whole number, not 'abc'\n",
    "LIMIT=-3": "error: LIMIT must be a whole number above 0, not '-3'\n",
    "NUM_FEWSHOT=-1": "error: NUM_FEWSHOT must be a whole number, not '-1'\n",
    "NUM_MC=0": "error: NUM_MC must be a whole number above 0, not '0'\n",
    "MC_TOLERANCE=x": "error: MC_TOLERANCE must be a number of 0 or more, not 'x'\n",
}


@pytest.mark.parametrize("argument", DOWNSTREAM)
def test_wrong_downstream_settings(argument: str, sandbox: Any) -> None:
    result = sandbox.bash("examples_training/mdm/example_downstream.sh", argument, DRY_RUN="1")
    _assert_one_line(result, DOWNSTREAM[argument])


@pytest.mark.parametrize("setting", ["NNODES=two", "NODE_RANK=x", "NODE_RANK=-1"])
def test_wrong_numbers_of_nodes(setting: str, sandbox: Any) -> None:
    name, value = setting.split("=")
    result = sandbox.bash("examples_training/mdm/example_training.sh", DRY_RUN="1", **{name: value})
    _assert_one_line(result, f"error: {name} must be a whole number")


def test_numbers_are_taken_as_python_writes_them(sandbox: Any, parsed: Any) -> None:
    numbers = {"LR": ".001", "MIN_LR": "1E-5", "ADAM_BETA2": "0.95", "WEIGHT_DECAY": "1.", "CLIP_GRAD": "1e0"}
    optimizer = parsed(sandbox.dry_run("arm/example_training", **numbers)).optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay, optimizer.clip_grad) == (0.001, 1e-5, 1.0, 1.0)


@pytest.mark.parametrize("path", ["mdm/example_training", "arm/example_chinchilla", "arm/example_downstream"])
@pytest.mark.parametrize("name", ["DRY_RUN", "SMOKE"])
@pytest.mark.parametrize("value", ["yes", "true", "2", "01", ""])
def test_a_switch_is_0_or_1(path: str, name: str, value: str, sandbox: Any) -> None:
    file, other = f"examples_training/{path}.sh", {"DRY_RUN": "SMOKE", "SMOKE": "DRY_RUN"}[name]
    message = f"error: {name} must be one of 0 1, not '{value}'\n"
    _assert_one_line(sandbox.bash(file, f"{name}={value}", f"{other}=1"), message)
    _assert_one_line(sandbox.bash(file, **{name: value, other: "1"}), message)
    assert not (sandbox.path / "ds_configs").exists() and not (sandbox.path / "output").exists()


UNREAD = {
    ("mdm/example_chinchilla", "DATA_CNT=100M"): "which takes FLOPS_FACTOR and runs one epoch",
    ("arm/example_lr_exploration", "EPOCH_CNT=7"): "which takes FLOPS_FACTOR and runs one epoch",
    ("mdm/example_training", "FLOPS_FACTOR=5"): "which takes DATA_CNT and EPOCH_CNT",
    ("arm/example_downstream", "NUM_MC=8"): "whose likelihoods are exact",
    ("arm/example_downstream", "MC_TOLERANCE=1"): "whose likelihoods are exact",
}


@pytest.mark.parametrize(("given", "why"), UNREAD.items())
def test_a_variable_that_the_script_does_not_read(given: tuple[str, str], why: str, sandbox: Any) -> None:
    file = f"examples_training/{given[0]}.sh"
    name, value = given[1].split("=")
    message = f"error: {name} has no effect in {file}, {why}\n"
    _assert_one_line(sandbox.bash(file, given[1], DRY_RUN="1"), message)
    _assert_one_line(sandbox.bash(file, DRY_RUN="1", **{name: value}), message)


SET_BY_THE_SCRIPT = {
    ("arm/example_training", "MODEL_PARAM", "140M"): 'MODEL_PARAM=("${PARAM_425M[@]}")',
    ("arm/example_chinchilla", "FLOPS_FACTOR", "30"): "FLOPS_FACTOR=10",
    ("mdm/example_data_value", "UNIQUE_TOKENS", ""): 'UNIQUE_TOKENS="$DATA_CNT"',
    ("arm/example_evaluation", "EXTRA_ARGS", "--bf16"): 'EXTRA_ARGS=(--skip-train --eval-windows "$EVAL_WINDOWS")',
}


@pytest.mark.parametrize(("given", "line"), SET_BY_THE_SCRIPT.items())
def test_the_environment_does_not_change_what_the_script_sets(
    given: tuple[str, str, str], line: str, sandbox: Any
) -> None:
    script, name, value = given
    remedy = "add to it there" if name == "EXTRA_ARGS" else "give it as an argument"
    result = sandbox.bash(f"examples_training/{script}.sh", DRY_RUN="1", **{name: value})
    _assert_one_line(
        result, f"error: {name}={value} in the environment has no effect, the script sets {line}: {remedy}\n"
    )


def test_an_argument_wins_over_the_environment(sandbox: Any) -> None:
    run = sandbox.dry_run("arm/example_chinchilla", "FLOPS_FACTOR=6", FLOPS_FACTOR="30")
    assert run.arguments == sandbox.dry_run("arm/example_chinchilla", "FLOPS_FACTOR=6").arguments
    same = sandbox.dry_run("arm/example_chinchilla", FLOPS_FACTOR="10")
    assert same.arguments == sandbox.dry_run("arm/example_chinchilla").arguments


EDITED = {
    ("MODEL_PARAM", '("${PARAM_426M[@]}")'): 'MODEL_PARAM=("${PARAM_426M[@]}") names no row of utils/model_params.sh',
    ("MODEL_PARAM", "(1280 5120 128 10)"): "must be five whole numbers (d_model ffw kv heads layers), not '1280 5120",
    ("MODEL_PARAM", ""): "MODEL_PARAM= names no row",
    ("DATA_CNT", '"${DATA_101M}"'): 'DATA_CNT="${DATA_101M}" is empty',
    ("DATA_CNT", ""): "DATA_CNT= is empty",
    ("EPOCH_CNT", ""): "EPOCH_CNT= is empty",
}


@pytest.mark.parametrize(("edit", "message"), EDITED.items())
def test_wrong_edits_are_quoted(edit: tuple[str, str], message: str, sandbox: Any) -> None:
    copy = sandbox.edited("arm/example_training", dict([edit]))
    _assert_one_line(sandbox.bash(str(copy), DRY_RUN="1"), message)


@pytest.mark.parametrize("value", ["", "0", "ten", "1e"])
def test_wrong_budget(value: str, sandbox: Any) -> None:
    copy = sandbox.edited("arm/example_chinchilla", {"FLOPS_FACTOR": value})
    _assert_one_line(sandbox.bash(str(copy), DRY_RUN="1"), "FLOPS_FACTOR")


def test_a_budget_that_overflows(sandbox: Any) -> None:
    script = "examples_training/arm/example_chinchilla.sh"
    huge = f"FLOPS_FACTOR={'9' * 23}"
    _assert_one_line(sandbox.bash(script, huge, DRY_RUN="1"), f"{huge} is too large: at most 999999999 (1e27 FLOPs)")
    result = sandbox.bash(script, "FLOPS_FACTOR=99999999", "MODEL_PARAM=7M", DRY_RUN="1")
    _assert_one_line(result, "FLOPS_FACTOR=99999999 is too large for 7M: ")


def test_a_budget_needs_a_known_size(sandbox: Any) -> None:
    copy = sandbox.edited("arm/example_chinchilla", {"MODEL_PARAM": "(64 256 16 4 2)"})
    _assert_one_line(sandbox.bash(str(copy), DRY_RUN="1"), "(64 256 16 4 2) is no row of utils/model_params.sh")


def test_every_script_refuses_another_directory(script: str, sandbox: Any, tmp_path: Path) -> None:
    result = sandbox.bash(f"{sandbox.path}/examples_training/{script}.sh", cwd=tmp_path, DRY_RUN="1")
    _assert_one_line(result, f"error: start this script from the repository root, not from {tmp_path}")


def test_missing_data(sandbox: Any) -> None:
    result = sandbox.bash("examples_training/mdm/example_chinchilla.sh")
    _assert_one_line(
        result,
        "utils/datapaths/train_c4_full.txt names data/c4/train_full_text_document, "
        "but there is no data/c4/train_full_text_document.bin",
    )


def test_broken_data_path_file(sandbox: Any) -> None:
    (sandbox.path / "paths.txt").write_text("1.0\n", encoding="utf-8")
    result = sandbox.bash("examples_training/mdm/example_training.sh", TRAIN_DATA_PATH="paths.txt")
    _assert_one_line(result, "paths.txt")


def test_names_with_spaces_in_a_data_path_file(sandbox: Any) -> None:
    (sandbox.path / "my data").mkdir()
    (sandbox.path / "my data" / "a b.bin").touch()
    (sandbox.path / "my paths.txt").write_text('"1.0 my data/a b"\n', encoding="utf-8")
    result = sandbox.bash("examples_training/mdm/example_training.sh", TRAIN_DATA_PATH="my paths.txt")
    _assert_one_line(result, "my paths.txt names my data/a b, but there is no my data/a b.idx")


def test_missing_vocabulary_of_ones_own(sandbox: Any) -> None:
    _with_data(sandbox)
    settings = {"TRAIN_DATA_PATH": "paths.txt", "VALID_DATA_PATH": "paths.txt", "VOCAB_FILE": "v.json"}
    result = sandbox.bash("examples_training/mdm/example_training.sh", **settings)
    _assert_one_line(result, "VOCAB_FILE=v.json or MERGE_FILE=utils/data/gpt2-merges.txt: no such file")


def test_missing_gpt2_vocabulary_is_fetched(sandbox: Any, repository: Path) -> None:
    _with_data(sandbox)
    # utils and tools of this copy's own: no vocabulary, and a tool that reports how it was called and fails.
    for name in ("utils", "tools"):
        (sandbox.path / name).unlink()
        (sandbox.path / name).mkdir()
    for name in ("model_params.sh", "epoch_tokens.sh", "datapaths"):
        (sandbox.path / "utils" / name).symlink_to(repository / "utils" / name)
    (sandbox.path / "tools" / "fetch_gpt2_vocab.py").write_text("raise SystemExit('fetch called')\n", encoding="utf-8")
    settings = {"TRAIN_DATA_PATH": "paths.txt", "VALID_DATA_PATH": "paths.txt"}
    result = sandbox.bash("examples_training/mdm/example_training.sh", **settings)
    assert result.returncode == 2
    notes = result.stderr.splitlines()
    assert "fetch called" in notes
    assert notes[-1].startswith("error: GPT-2's vocabulary could not be fetched: put it at utils/data/gpt2-vocab.json")


def _with_data(sandbox: Any) -> None:
    for suffix in ("bin", "idx"):
        (sandbox.path / f"d.{suffix}").touch()
    (sandbox.path / "paths.txt").write_text("1.0 d\n", encoding="utf-8")
