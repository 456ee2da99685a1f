"""run.json: what it records, and which changes of a run are refused, reported or let through."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
)
from megatron.config_record import from_dict
from megatron.distributed.topology import single_process_topology
from megatron.errors import UserError
from megatron.run_metadata import (
    CheckpointMetadata,
    Validation,
    as_json,
    changed_settings,
    check_compatible,
    describe_run,
    git_commit,
    read_metadata,
)
from megatron.tokenizer.vocabulary import build_vocabulary

VOCABULARY = build_vocabulary(512, 128)
MODEL = dict(num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=64, swiglu=True)


def run_config(*, objective: str = "ar", **changes: Any) -> RunConfig:
    """A small run; ``changes`` go to the concern that knows the name."""
    settings: dict[str, Any] = MODEL | {
        "micro_batch_size": 2, "global_batch_size": 4, "seq_length": 32, "train_samples": 100, "lr": 1e-3,
        "tokenizer_type": "HFTokenizer", "tokenizer_model": "t.json", "train_data_path": ("a",),
        "valid_data_path": ("b",), "use_rotary_position_embeddings": True,
    } | changes  # fmt: skip

    def concern(cls: Any) -> Any:
        return cls(**{name: settings.pop(name) for name in list(settings) if name in cls.__dataclass_fields__})

    config = RunConfig(
        model=concern(ModelConfig), batch=concern(BatchConfig), tokenizer=concern(TokenizerConfig),
        objective=ObjectiveConfig(objective=objective), optimizer=concern(OptimizerConfig), data=concern(DataConfig),
        parallel=concern(ParallelConfig), checkpoint=concern(CheckpointConfig),
    )  # fmt: skip
    assert not settings, settings
    return config


def saved_by(config: RunConfig, **arguments: Any) -> CheckpointMetadata:
    return describe_run(
        config, VOCABULARY, single_process_topology(), iteration=25, consumed_samples=100, commit="c0ffee", **arguments
    )


def test_everything_that_decides_results_is_recorded_and_reads_back(tmp_path: Path) -> None:
    config = run_config(rampup_batch_size=(2, 2, 10))
    metadata = saved_by(config, validation=Validation(3.5, None), extra={"nan_steps": 2})
    assert (metadata.tag, metadata.consumed_tokens, metadata.seed) == ("global_step25", 3200, 1234)
    assert metadata.vocabulary == {"num_tokens": 512, "padded_size": 640}
    assert metadata.world["world_size"] == metadata.world["data_parallel_size"] == 1
    assert {"megatron", "python", "torch", "deepspeed", "numpy"} <= metadata.versions.keys()
    assert metadata.git_commit == "c0ffee"
    (tmp_path / "run.json").write_text(json.dumps(as_json(metadata)))
    found = read_metadata(tmp_path)
    assert found == metadata
    assert from_dict(found.config) == config


def test_a_validation_loss_that_is_no_number_is_left_out() -> None:
    assert saved_by(run_config(), validation=Validation(float("nan"), 0.1)).validation is None


def test_the_same_run_may_continue() -> None:
    check_compatible(saved_by(run_config()), run_config(), VOCABULARY)
    # 8 * 64 // 3 // 64 * 64 = 128: spelling out a default is no change.
    spelled_out = run_config(ffn_hidden_size=128, num_key_value_heads=4, kv_channels=16)
    check_compatible(saved_by(run_config()), spelled_out, VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "--num-layers 2 -> 3"),
        ({"hidden_size": 128}, "--hidden-size 64 -> 128"),
        ({"ffn_hidden_size": 256}, "--ffn-hidden-size 128 -> 256"),
        ({"num_key_value_heads": 2}, "--num-key-value-heads 4 -> 2"),
        ({"kv_channels": 32}, "--kv-channels 16 -> 32"),
        ({"normalization": "rmsnorm"}, "--normalization layernorm -> rmsnorm"),
        ({"swiglu": False}, "--swiglu True -> False"),
        ({"disable_bias_linear": True}, "--disable-bias-linear False -> True"),
        (
            {"untie_embeddings_and_output_weights": True},
            "--untie-embeddings-and-output-weights False -> True",
        ),
        ({"use_rotary_position_embeddings": False}, "--use-rotary-position-embeddings True -> False"),
        ({"rope_theta": 5e5}, "--rope-theta 10000.0 -> 500000.0"),
    ],
)
def test_another_model_is_refused_also_for_finetuning(changes: dict[str, Any], message: str) -> None:
    for finetune in (False, True):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            check_compatible(saved_by(run_config()), run_config(**changes), VOCABULARY, finetune=finetune)
        assert str(caught.value).startswith("--load: checkpoint global_step25 holds another model: ")


def test_all_differences_stand_in_one_line() -> None:
    changed = run_config(num_layers=4, hidden_size=32, seed=5, objective="mdm")
    with pytest.raises(UserError) as caught:
        check_compatible(saved_by(run_config()), changed, build_vocabulary(700, 128))
    text = str(caught.value)
    for part in (
        "--num-layers 2 -> 4", "--hidden-size 64 -> 32", "tokens of the vocabulary 512 -> 700",
        "padded vocabulary (--make-vocab-size-divisible-by) 640 -> 768", "objective ar -> mdm", "--seed 1234 -> 5",
    ):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_positions_count_only_where_they_are_learned() -> None:
    longer: dict[str, Any] = {"max_position_embeddings": 128}
    check_compatible(saved_by(run_config()), run_config(**longer), VOCABULARY)
    learned = run_config(use_rotary_position_embeddings=False)
    with pytest.raises(UserError, match="--max-position-embeddings 64 -> 128"):
        check_compatible(saved_by(learned), run_config(use_rotary_position_embeddings=False, **longer), VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "mdm"}, "objective ar -> mdm"),
        ({"seq_length": 16}, "--seq-length 32 -> 16"),
        ({"seed": 7}, "--seed 1234 -> 7"),
        ({"unique_tokens": 1000}, "--unique-tokens None -> 1000"),
        ({"epoch_rule": "megatron"}, "--epoch-rule exact -> megatron"),
    ],
)
def test_another_order_of_samples_needs_finetune(changes: dict[str, Any], message: str) -> None:
    saved, config = saved_by(run_config()), run_config(**changes)
    with pytest.raises(UserError, match=f"cannot be continued with {message}: give the saved values, or --finetune"):
        check_compatible(saved, config, VOCABULARY)
    check_compatible(saved, config, VOCABULARY, finetune=True)


def test_measuring_needs_the_same_objective_but_no_order_of_samples() -> None:
    saved = saved_by(run_config())
    measuring = replace(run_config(seed=5), evaluation=EvaluationConfig(skip_train=True))
    check_compatible(saved, measuring, VOCABULARY)
    as_mdm = replace(measuring, objective=ObjectiveConfig(objective="mdm"))
    for finetune in (False, True):
        with pytest.raises(UserError, match="was trained as ar, this entry point measures mdm: use the other one"):
            check_compatible(saved, as_mdm, VOCABULARY, finetune=finetune)


def test_other_changes_are_reported_but_not_paths_and_intervals() -> None:
    saved = saved_by(run_config())
    assert changed_settings(saved, run_config()) == []
    changed = run_config(lr=1e-4, global_batch_size=8, save="elsewhere", save_interval=3, num_workers=7)
    assert sorted(changed_settings(saved, changed)) == ["--global-batch-size 4 -> 8", "--lr 0.001 -> 0.0001"]


def test_settings_of_another_version_do_not_break_the_report() -> None:
    saved = saved_by(run_config())
    older = replace(saved, config={name: dict(value) for name, value in saved.config.items() if name != "given"})
    del older.config["optimizer"]["lr"]
    older.config["optimizer"]["gone_since"] = 1
    assert changed_settings(older, run_config()) == []


def test_imported_weights_have_no_settings_that_could_have_changed() -> None:
    saved = saved_by(run_config())
    # As ``inference.loading.save_weights`` writes it: sizes resolved, nothing of optimizer, data and schedule.
    model = {name: saved.config["model"][name] for name in ("num_layers", "hidden_size", "max_position_embeddings")}
    config = {"model": model | {"ffn_hidden_size": 128, "kv_channels": 16}, "batch": {"seq_length": 16}}
    imported = replace(saved, config=config)
    assert saved.config["model"]["ffn_hidden_size"] is None and saved.shape["--ffn-hidden-size"] == 128
    assert changed_settings(imported, run_config()) == ["--seq-length 16 -> 32"]
    longer = run_config(seq_length=16, max_position_embeddings=128)
    assert changed_settings(imported, longer) == ["--max-position-embeddings 64 -> 128"]


def test_the_commit_is_that_of_the_working_tree(repository: Path) -> None:
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("not a git repository")
    assert (git_commit() or "").removesuffix("-dirty") == head.stdout.strip()


def test_no_git_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
