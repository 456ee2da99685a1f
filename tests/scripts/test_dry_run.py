"""What each experiment script would run: every row and budget parses, and the published runs come out."""

from __future__ import annotations

import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.budget import read_model_table
from megatron.data.indexed_dataset import IndexedDatasetWriter

FAMILIES = ("arm", "mdm")
FLOPS_FACTORS = ("6", "10", "30", "100")
COMMON = "training chinchilla data_value multi_node_training lr_exploration weight_decay"
EXPECTED = {"arm": f"{COMMON} order_list attention_dropout token_masking", "mdm": f"{COMMON} left_to_right"}
# Where our scripts differ from the published ones on purpose: validation on more windows, names of our own.
DELIBERATE = {"--eval-iters", "--wandb-project", "--wandb-exp-name", "--wandb-group"}
ADDED = {"--hidden-dropout", "--attention-dropout", "--seed", "--exit-signal-handler"}


def test_every_script_of_the_interface_is_there(script_names: list[str]) -> None:
    expected = {f"{family}/example_{name}" for family, names in EXPECTED.items() for name in names.split()}
    assert expected <= set(script_names)


def test_scripts_are_short(repository: Path, script: str) -> None:
    lines = (repository / f"examples_training/{script}.sh").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 160


def test_every_row_parses(script: str, sandbox: Any, parsed: Any) -> None:
    table = read_model_table()
    runs = list(sandbox.dry_runs(script, [[f"MODEL_PARAM={name}"] for name in table]))
    for row, run in zip(table.values(), runs, strict=True):
        config = parsed(run)
        model = config.model
        assert (model.hidden_size, model.num_attention_heads, model.num_layers) == (row.d_model, row.heads, row.layers)
        assert (model.head_size, model.ffn_size) == (row.head_size, row.ffn)
        assert config.optimizer.bf16 and config.train_samples >= 256
        assert run.deepspeed["train_micro_batch_size_per_gpu"] == config.batch.micro_batch_size
        assert run.deepspeed["train_batch_size"] == config.batch.global_batch_size
        assert run.deepspeed["gradient_clipping"] == config.optimizer.clip_grad
        assert run.deepspeed["zero_optimization"]["stage"] == config.parallel.zero_stage
        assert f"_{row.name}_" in run.variant
        assert json.loads((sandbox.path / run.value("--deepspeed_config")).read_text()) == run.deepspeed
    assert len({run.variant for run in runs}) == len(table)  # no two rows share checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_every_budget_has_the_published_length(family: str, sandbox: Any, parsed: Any) -> None:
    table = read_model_table()
    points = [(name, factor) for name in table for factor in FLOPS_FACTORS]
    settings = [[f"MODEL_PARAM={name}", f"FLOPS_FACTOR={factor}"] for name, factor in points]
    variants = set()
    runs = sandbox.dry_runs(f"{family}/example_chinchilla", settings)
    for (name, factor), run in zip(points, runs, strict=True):
        row = table[name]
        ffn = int((4 * row.d_model * 2 / 3) / 64) * 64
        count = 4 * row.layers * row.d_model**2 + 3 * row.layers * row.d_model * ffn
        count += 6 * row.layers * row.d_model + 50257 * row.d_model
        tokens = math.floor(Fraction(int(factor) * 10**18, 6) / count)
        samples = round(Fraction(tokens, 2048))
        config = parsed(run)
        assert config.train_samples == config.lr_decay_samples == samples
        assert config.lr_warmup_samples == max(round(Fraction(samples, 100)), 100)
        variants.add(run.variant)
    assert len(variants) == len(points)


def test_epoch_runs_round_down(sandbox: Any) -> None:
    run = sandbox.dry_run("arm/example_training", "DATA_CNT=24743247", "EPOCH_CNT=7")
    assert run.value("--train-samples") == str(24743247 * 7 // 2048) == "84571"
    assert run.value("--lr-warmup-samples") == "845"


PUBLISHED = {
    "mdm chinchilla 117M FLOPS_FACTOR=10": (
        "mdm/example_chinchilla", {"MODEL_PARAM": '("${PARAM_117M[@]}")', "FLOPS_FACTOR": "10"}, "6584834", "65848",
    ),
    "arm chinchilla 217M FLOPS_FACTOR=10": (
        "arm/example_chinchilla", {"MODEL_PARAM": '("${PARAM_217M[@]}")', "FLOPS_FACTOR": "10"}, "3741565", "37416",
    ),
    "mdm epochs 425M 100M x 500": (
        "mdm/example_training",
        {"MODEL_PARAM": '("${PARAM_425M[@]}")', "DATA_CNT": '"${DATA_100M}"', "EPOCH_CNT": "500"}, "24402441", "244024",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_come_out(name: str, sandbox: Any) -> None:
    script, edits, samples, warmup = PUBLISHED[name]
    run = sandbox.dry_run(str(sandbox.edited(script, edits)))
    assert run.value("--train-samples") == run.value("--lr-decay-samples") == samples
    assert run.value("--lr-warmup-samples") == warmup


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_arguments_are_equal(name: str, sandbox: Any, shared_dir: Path) -> None:
    published = json.loads((shared_dir / "fixtures" / "published_arguments.json").read_text())[name]
    script, edits, *_ = PUBLISHED[name]
    run = sandbox.dry_run(str(sandbox.edited(script, edits)))
    ours = _as_mapping(run.arguments)
    theirs = dict(published["arguments"])
    assert theirs.pop("entry") == run.entry
    assert set(ours) - set(theirs) == ADDED
    assert set(theirs) <= set(ours)
    for flag, value in theirs.items():
        if value != "<path>" and flag not in DELIBERATE:
            assert _same(ours[flag], value), flag
    assert run.deepspeed == published["deepspeed_config"]


def _as_mapping(arguments: list[str]) -> dict[str, str | bool]:
    values: dict[str, str | bool] = {}
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if word.startswith("--"):
            assert word not in values, word
            values[word] = True if following.startswith("--") else following
    return values


def _same(ours: str | bool, theirs: str | bool) -> bool:
    if ours == theirs:
        return True
    try:
        return float(ours) == float(theirs)
    except ValueError:
        return False


@pytest.mark.parametrize("family", FAMILIES)
def test_families_differ_in_the_entry_point_only(family: str, sandbox: Any) -> None:
    run = sandbox.dry_run(f"{family}/example_training", VARIANT="x", MASTER_PORT="1")
    other = sandbox.dry_run(f"{'mdm' if family == 'arm' else 'arm'}/example_training", VARIANT="x", MASTER_PORT="1")
    assert run.entry != other.entry
    assert (run.launch, run.arguments, run.deepspeed) == (other.launch, other.arguments, other.deepspeed)


def test_multi_node_uses_zero_1_and_the_cpu(sandbox: Any) -> None:
    for family in FAMILIES:
        run = sandbox.dry_run(f"{family}/example_multi_node_training")
        assert run.value("--zero-stage") == "1" and "--cpu-optimizer" in run.arguments
        assert run.deepspeed["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
        plain = sandbox.dry_run(f"{family}/example_multi_node_training", CPU_OFFLOAD="0", TP_SIZE="2", PP_SIZE="4")
        assert "--cpu-optimizer" not in plain.arguments
        assert plain.value("--tensor-model-parallel-size") == "2"
        assert plain.value("--pipeline-model-parallel-size") == "4"


ABLATIONS = {
    "mdm/example_left_to_right": ("AR_RATIO=0.25", ["--ar-ratio", "0.25"]),
    "arm/example_token_masking": ("RANDMASK_RATIO=0.75", ["--randmask-ratio", "0.75"]),
    "arm/example_attention_dropout": ("ATTENTION_DROPOUT=0.75", ["--attention-dropout", "0.75"]),
    "arm/example_order_list": (
        "NUM_ORDER_LIST=16",
        ["--use-order-list", "--num-order-list", "16", "--use-predefined-order"],
    ),
    "arm/example_weight_decay": ("WEIGHT_DECAY=3.2", ["--weight-decay", "3.2"]),
    "mdm/example_lr_exploration": ("ADAM_BETA2=0.99", ["--adam-beta2", "0.99"]),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_reach_the_command_line(name: str, sandbox: Any) -> None:
    setting, words = ABLATIONS[name]
    run = sandbox.dry_run(name, setting)
    assert " ".join(words) in " ".join(run.arguments)
    assert run.variant != sandbox.dry_run(name).variant


def test_warm_up_share(sandbox: Any) -> None:
    epochs = sandbox.dry_run("mdm/example_training", WARMUP_PERCENT="5")
    assert int(epochs.value("--lr-warmup-samples")) == int(epochs.value("--train-samples")) * 5 // 100
    budget = sandbox.dry_run("mdm/example_lr_exploration", "WARMUP_PERCENT=5")
    assert int(budget.value("--lr-warmup-samples")) == round(6584834 * 0.05)


def test_every_variable_of_the_interface_is_honoured(sandbox: Any) -> None:
    settings = {
        "MICRO_BATCH_SIZE": ("4", "--micro-batch-size"), "GLOBAL_BATCH_SIZE": ("512", "--global-batch-size"),
        "SEQ_LEN": ("1024", "--seq-length"), "TP_SIZE": ("2", "--tensor-model-parallel-size"),
        "PP_SIZE": ("3", "--pipeline-model-parallel-size"), "ZERO_STAGE": ("2", "--zero-stage"),
        "VALID_DATA_PATH": ("utils/datapaths/val_slimpajama.txt", "--valid-data-path-file"),
        "TRAIN_DATA_PATH": ("utils/datapaths/train_slimpajama_full.txt", "--train-data-path-file"),
        "VOCAB_FILE": ("my vocab.json", "--vocab-file"), "MERGE_FILE": ("my merges.txt", "--merge-file"),
        "SAVE_INTERVAL": ("11", "--save-interval"), "EVAL_INTERVAL": ("12", "--eval-interval"),
        "LOG_INTERVAL": ("13", "--log-interval"), "EVAL_ITERS": ("14", "--eval-iters"),
        "WANDB_PROJECT": ("a project", "--wandb-project"), "WANDB_GROUP": ("a group", "--wandb-group"),
        "WANDB_EXP_NAME": ("a name", "--wandb-exp-name"), "SEED": ("7", "--seed"), "LR": ("1e-3", "--lr"),
        "HIDDEN_DROPOUT": ("0", "--hidden-dropout"), "UNIQUE_TOKENS": ("1000000", "--unique-tokens"),
    }  # fmt: skip
    environment = {name: value for name, (value, _) in settings.items()}
    run = sandbox.dry_run("arm/example_training", OUTPUT_DIR="out put", VARIANT="my run", **environment)
    for name, (value, flag) in settings.items():
        assert run.value(flag) == value, name
    assert run.value("--save") == run.value("--load") == "out put/checkpoints_my run"
    assert run.value("--tensorboard-dir") == "out put/tensorboard_my run"
    assert run.value("--wandb-save-dir") == "out put/wandb_my run"
    assert run.value("--kill-switch-file") == "out put/kill-switch-my run"
    assert run.value("--deepspeed_config") == "ds_configs/my run.json"
    as_arguments = sandbox.dry_run(
        "arm/example_training", "OUTPUT_DIR=out put", "VARIANT=my run", *(f"{k}={v}" for k, v in environment.items())
    )
    assert as_arguments.arguments == run.arguments


def test_no_wandb_without_a_project(sandbox: Any) -> None:
    assert not [word for word in sandbox.dry_run("arm/example_training", WANDB_PROJECT="").arguments if "wandb" in word]


def test_extra_arguments_come_last(sandbox: Any, parsed: Any) -> None:
    run = sandbox.dry_run("arm/example_training", EXTRA_ARGS="--lr 1e-3  --num-workers 5")
    assert run.arguments[-4:] == ["--lr", "1e-3", "--num-workers", "5"]
    assert parsed(run).optimizer.lr == 1e-3
    edit = {"EPOCH_CNT": '1\nEXTRA_ARGS=(--metrics-file "a b.jsonl")'}
    script = sandbox.edited("arm/example_training", edit)
    assert sandbox.dry_run(str(script), "EPOCH_CNT=1").arguments[-2:] == ["--metrics-file", "a b.jsonl"]


def test_an_edited_script_is_another_run(sandbox: Any) -> None:
    variants = [
        sandbox.dry_run("mdm/example_training", *settings.split()).variant
        for settings in (
            "", "EPOCH_CNT=101", "MODEL_PARAM=489M", "SEED=1", "LR=1e-3", "WEIGHT_DECAY=1", "HIDDEN_DROPOUT=0",
            "GLOBAL_BATCH_SIZE=128", "TRAIN_DATA_PATH=utils/datapaths/train_slimpajama_100m.txt", "PRECISION=fp32",
            "UNIQUE_TOKENS=1000", "EXTRA_ARGS=--eod-mask-loss", "EXTRA_ARGS=--low-noise-start",
        )
    ]  # fmt: skip
    variants.append(sandbox.dry_run("arm/example_training").variant)
    assert len(set(variants)) == len(variants)
    for same in ("EXTRA_ARGS=--skip-train", "NUM_GPUS=2", "MICRO_BATCH_SIZE=4", "ZERO_STAGE=1", "EVAL_ITERS=1"):
        assert sandbox.dry_run("mdm/example_training", same).variant == variants[0], same
    extra = "EXTRA_ARGS=--eod-mask-loss --exit-interval 3"
    assert sandbox.dry_run("mdm/example_training", extra).variant == variants[11]


def test_a_budget_beyond_one_epoch_is_noted(sandbox: Any) -> None:
    with IndexedDatasetWriter(sandbox.path / "d", np.uint16) as writer:
        writer.add_document(np.zeros(1000, np.uint16))
    (sandbox.path / "paths.txt").write_text("1.0 d\n", encoding="utf-8")
    script = "examples_training/mdm/example_chinchilla.sh"
    settings = {"DRY_RUN": "1", "NUM_GPUS": "0"}
    noted = "note: FLOPS_FACTOR=10 is 13485740760 tokens for 117M, but the training data have {}: they repeat\n"
    unknown = sandbox.bash(script, **settings)  # no data here
    assert unknown.returncode == 0 and "repeat" not in unknown.stderr
    known = sandbox.bash(script, TRAIN_DATA_PATH="paths.txt", **settings)
    assert known.returncode == 0 and noted.format(1000) in known.stderr
    assert known.stdout.startswith("{")
    first = sandbox.bash(script, TRAIN_DATA_PATH="paths.txt", UNIQUE_TOKENS="500", **settings)
    assert noted.format(500) in first.stderr
    assert noted.format(2000) in sandbox.bash(script, UNIQUE_TOKENS="2000", **settings).stderr
    enough = sandbox.bash(script, UNIQUE_TOKENS="40B", **settings)
    assert enough.returncode == 0 and "repeat" not in enough.stderr
    epochs = sandbox.bash("examples_training/mdm/example_training.sh", TRAIN_DATA_PATH="paths.txt", **settings)
    assert epochs.returncode == 0 and "repeat" not in epochs.stderr  # on purpose


def test_a_spooled_copy_runs_from_the_submit_directory(sandbox: Any, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    script = shutil.copy(sandbox.path / "examples_training/mdm/example_training.sh", spool / "slurm_script")
    result = sandbox.bash(str(script), cwd=spool, DRY_RUN="1", SLURM_SUBMIT_DIR=str(sandbox.path))
    assert result.returncode == 0 and "pretrain_diff_gpt.py" in result.stdout, result.stderr


def test_slurm_headers(repository: Path, script: str) -> None:
    text = (repository / f"examples_training/{script}.sh").read_text(encoding="utf-8")
    for option in ("signal=B:USR1@", "requeue", "open-mode=append", "nodes=", "gpus-per-node="):
        assert f"#SBATCH --{option}" in text
    # Slurm reads no directive after the first command.
    assert re.search(r"(?m)^[^#\n]", text).start() > text.rindex("#SBATCH")  # type: ignore[union-attr]
