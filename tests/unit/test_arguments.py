"""The command line gives what it says, and whatever it cannot give is one line that names the flag."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron.arguments import build_parser, parse_arguments
from megatron.config import RunConfig, concern_types
from megatron.config_record import describe, from_dict, to_dict
from megatron.errors import UserError
from megatron.options import flag_of

Objective = Literal["ar", "mdm"]
MINIMAL = (
    "--num-layers 2 --hidden-size 96 --num-attention-heads 4 --max-position-embeddings 64 --micro-batch-size 2 "
    "--global-batch-size 8 --seq-length 64 --train-samples 800 --lr 1e-3 --vocab-file v.json --merge-file m.txt "
    "--train-data-path-file train.txt"
)


def parse(text: str = "", objective: Objective = "ar") -> RunConfig:
    return parse_arguments(objective, f"{MINIMAL} {text}".split())


def error_of(text: str, objective: Objective = "ar") -> str:
    with pytest.raises(UserError) as caught:
        parse(text, objective)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def published(shared_dir: Path) -> dict[str, tuple[Objective, dict[str, str | Literal[True]]]]:
    runs = json.loads((shared_dir / "fixtures" / "published_arguments.json").read_text("utf-8"))
    result: dict[str, tuple[Objective, dict[str, str | Literal[True]]]] = {}
    for name, run in runs.items():
        flags = dict(run["arguments"])
        result[name] = ("mdm" if flags.pop("entry") == "pretrain_diff_gpt.py" else "ar", flags)
    return result


def test_published_runs_parse_to_the_same_values(shared_dir: Path) -> None:
    runs = published(shared_dir)
    assert len(runs) == 3
    settings = {flag_of(f): (concern, f.name) for concern, f in all_settings()}
    for objective, flags in runs.values():
        argv = [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, value])]
        config = parse_arguments(objective, ["--local_rank=0", *argv])
        assert config.objective.objective == objective
        assert config.parallel.local_rank == 0
        for flag, value in flags.items():
            concern, name = settings[flag]
            read = getattr(getattr(config, concern), name)
            assert read == (float(value) if isinstance(read, int | float) else value), flag
        assert config.given == {settings[flag][1] for flag in flags} | {"local_rank"}


def all_settings() -> list[tuple[str, dataclasses.Field[Any]]]:
    return [(name, f) for name, cls in concern_types().items() for f in dataclasses.fields(cls) if f.metadata]


# Every flag of the interface that these two entry points read by now.
INTERFACE = """
--tensor-model-parallel-size --pipeline-model-parallel-size --no-pipeline-parallel --num-layers --hidden-size
--ffn-hidden-size --num-attention-heads --num-key-value-heads --kv-channels --seq-length
--max-position-embeddings --use-rotary-position-embeddings --rope-theta --normalization
--layernorm-epsilon --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --init-method-std
--attention-dropout --hidden-dropout --make-vocab-size-divisible-by
--micro-batch-size --global-batch-size --rampup-batch-size --train-samples --train-iters --seed --bf16 --fp16
--optimizer --adam-beta1 --adam-beta2 --adam-eps --lr --min-lr --lr-decay-style
--lr-decay-samples --lr-warmup-samples --lr-warmup-fraction --clip-grad --weight-decay --cpu-optimizer
--checkpoint-activations --recompute-granularity --recompute-method --recompute-num-layers
--vocab-file --merge-file --tokenizer-type --tokenizer-model --data-impl
--train-data-path-file --valid-data-path-file --test-data-path-file --train-data-path --valid-data-path --data-path
--split --data-cache-path --num-workers --reset-position-ids --reset-attention-mask --eod-mask-loss
--save --load --load-tag --save-interval --no-load-optim --no-load-rng --finetune --exit-interval
--exit-duration-in-mins --exit-signal-handler --kill-switch-file --log-interval --eval-interval --eval-iters
--skip-train --tensorboard-dir --tensorboard-queue-size --log-timers-to-tensorboard --log-batch-size-to-tensorboard
--log-validation-ppl-to-tensorboard --wandb-project --wandb-exp-name --wandb-save-dir --wandb-group
--deepspeed --deepspeed_config --zero-stage --local_rank --local-rank
--ar-ratio --low-noise-start --low-noise-iter --low-noise-ratio --num-mc
--randmask-ratio --num-order-list --use-order-list --use-predefined-order
--time-sampler --mask-sampler --loss-weighting --epoch-rule --unique-tokens
--eval-windows --compile --no-compile --keep-last --keep-best --metrics-file
"""


def test_interface_is_complete() -> None:
    known = {name for action in build_parser("mdm")._actions for name in action.option_strings}
    assert not set(INTERFACE.split()) - known


def test_values_of_every_kind() -> None:
    config = parse(
        "--seed=7 --swiglu --no-compile --rampup-batch-size 4 2 100 --valid-data-path 0.5 a 0.5 b --eval-windows all "
        "--exit-duration-in-mins 1.5 --local-rank 3"
    )
    assert config.parallel.seed == 7 and config.model.swiglu and config.parallel.compile is False
    assert config.batch.rampup_batch_size == (4, 2, 100)
    assert config.data.valid_data_path == ("0.5", "a", "0.5", "b")
    assert config.evaluation.eval_windows == "all"
    assert config.checkpoint.exit_duration_in_mins == 1.5
    assert config.parallel.local_rank == 3
    assert parse().parallel.compile is None and parse("--compile").parallel.compile is True


def test_last_of_a_repeated_flag_counts() -> None:
    assert parse("--lr 1e-4 --lr 5e-4").optimizer.lr == 5e-4


def test_process_arguments_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *MINIMAL.split(), "--seed", "99"])
    assert parse_arguments("ar").parallel.seed == 99


def test_missing_flags_are_all_named() -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments("ar", [])
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--micro-batch-size", "--seq-length"):
        assert flag in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--num-layer 3", ["--num-layer ", "--num-layers?"]),
        ("--num_layers 3", ["--num_layers", "--num-layers?"]),
        ("--deepspeed-config x", ["--deepspeed-config", "--deepspeed_config?"]),
        ("--learning-rte=3", ["--learning-rte is no flag"]),
        ("--zzzzqqqq", ["--zzzzqqqq", "--help"]),
        ("--seq 64", ["--seq is no flag"]),  # abbreviations are refused
        ("--use-flash-attn", ["--use-flash-attn", "--attention-backend"]),
        ("--num-experts 8", ["--num-experts", "dense"]),
        ("--DDP-impl local", ["--DDP-impl", "DeepSpeed"]),
        ("--context-parallel-size 2", ["--context-parallel-size", "--checkpoint-activations"]),
        ("--fp32-residual-connection", ["--fp32-residual-connection", "--bf16"]),
        ("--use-mcore-models", ["--use-mcore-models"]),
        ("--train-tokens 100", ["--train-tokens", "--seq-length"]),
        ("--sequence-parallel", ["--sequence-parallel", "--tensor-model-parallel-size"]),
        ("--randmask-ratio 1.5", ["--randmask-ratio 1.5"]),
        ("--num-order-list 4", ["--num-order-list", "--use-order-list"]),
        ("--use-order-list", ["--use-order-list", "--num-order-list"]),
        ("--use-predefined-order", ["--use-predefined-order", "--use-order-list"]),
        ("stray", ["stray", "--train-data-path-file"]),
        ("--swiglu True", ["--swiglu takes no value", "True"]),
        ("--swiglu=True", ["--swiglu takes no value", "True"]),
        ("--compile 1", ["--compile takes no value"]),
        ("--lr 1 2", ["--lr has one value too many", "'2'"]),
        ("--num-workers two", ["--num-workers", "'two' is not a whole number"]),
        ("--train-samples 1e6", ["--train-samples", "'1e6'"]),
        ("--lr fast", ["--lr", "'fast' is not a number"]),
        ("--lr nan", ["--lr nan"]),
        ("--seed", ["--seed", "expected one argument"]),
        ("--rampup-batch-size 16 16", ["--rampup-batch-size", "expected 3 arguments"]),
        ("--zero-stage 5", ["--zero-stage 5", "0, 1, 2, 3"]),
        ("--lr-decay-style polynomial", ["--lr-decay-style polynomial", "cosine"]),
    ],
)
def test_what_cannot_be_placed_is_explained(text: str, expected: list[str]) -> None:
    message = error_of(text)
    for words in expected:
        assert words in message


@pytest.mark.parametrize(
    "text",
    [
        "--time-sampler stratified",  # the default's value: still a flag nobody reads
        "--mask-sampler exact",
        "--loss-weighting elbo",
        "--ar-ratio 0.5",
        "--low-noise-start",
        "--low-noise-iter 5",
        "--low-noise-ratio 0.5",
        "--num-mc 1",
    ],
)
def test_autoregressive_training_refuses_diffusion_flags(text: str) -> None:
    message = error_of(text)
    assert text.split()[0] in message and "pretrain_diff_gpt.py" in message


@pytest.mark.parametrize(
    "text", ["--randmask-ratio 0", "--use-order-list", "--num-order-list 4", "--use-predefined-order"]
)
def test_diffusion_training_refuses_autoregressive_flags(text: str) -> None:
    message = error_of(text, "mdm")
    assert text.split()[0] in message and "is for pretrain_gpt.py" in message


def test_autoregressive_flags_are_read_by_autoregressive_training() -> None:
    text = "--randmask-ratio 0.5 --use-order-list --num-order-list 16 --use-predefined-order"
    objective = parse(f"{text} --use-rotary-position-embeddings").objective
    assert (objective.randmask_ratio, objective.num_order_list) == (0.5, 16)
    assert objective.use_order_list and objective.use_predefined_order
    assert parse("--randmask-ratio 0").objective.randmask_ratio == 0


def test_diffusion_flags_are_read_by_diffusion() -> None:
    config = parse(
        "--time-sampler uniform --num-mc 4 --low-noise-start --low-noise-iter 5 --low-noise-ratio 0.5", "mdm"
    )
    objective = config.objective
    assert (objective.objective, objective.time_sampler, objective.num_mc) == ("mdm", "uniform", 4)
    assert (objective.low_noise_start, objective.low_noise_iter, objective.low_noise_ratio) == (True, 5, 0.5)


def test_every_boolean_flag_takes_no_value() -> None:
    hints = {name: typing.get_type_hints(cls) for name, cls in concern_types().items()}
    booleans = [flag_of(f) for concern, f in all_settings() if hints[concern][f.name] in (bool, bool | None)]
    assert len(booleans) > 20
    for flag in booleans:
        assert re.match(f"{flag}(/--no-{flag[2:]})? takes no value", error_of(f"{flag}=False", "mdm"))
        assert f"{flag} takes no value" in error_of(f"{flag} False", "mdm")


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_help_lists_what_the_objective_reads(objective: Objective, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(objective, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert ("--num-mc" in text) == (objective == "mdm")
    assert "--attention-dropout X" in text and "[0.1]" in text and "[10 % of the decay samples]" in text
    for name in concern_types():
        assert f"\n{name}:\n" in text


def test_record_survives_json() -> None:
    for config in (
        parse("--rampup-batch-size 4 2 100 --valid-data-path 0.5 a 0.5 b --no-compile"),
        parse("--num-mc 8 --eval-windows 32 --bf16", "mdm"),
    ):
        again = from_dict(json.loads(json.dumps(to_dict(config))))
        assert again == config
        assert again.given == config.given


def test_record_of_another_version() -> None:
    record = to_dict(parse("", "mdm"))
    older = json.loads(json.dumps(record))
    del older["objective"]["mask_sampler"], older["logging"]
    assert from_dict(older) == parse("", "mdm")
    newer = json.loads(json.dumps(record))
    newer["model"]["num_experts"] = 8
    newer["curriculum"] = {}
    with pytest.raises(UserError, match=r"curriculum, model\.num_experts.*newer version"):
        from_dict(newer)
    damaged = json.loads(json.dumps(record))
    del damaged["model"]["num_layers"]
    with pytest.raises(UserError, match=r"model\.num_layers"):
        from_dict(damaged)


def banner(text: str = "", objective: Objective = "ar") -> str:
    return " ".join(" ".join(describe(parse(text, objective))).split())


def test_banner_marks_what_nobody_set() -> None:
    text = banner()
    assert "attention-dropout 0.1*" in text and "hidden-dropout 0.1*" in text and "seed 1234*" in text
    assert "note: no flag set --attention-dropout 0.1 and --hidden-dropout 0.1" in text
    assert "num-layers 2," in text and "lr 0.001," in text and "tokens 51200" in text
    assert "train-samples 800," in text and "lr-decay-samples 800*" in text and "lr-warmup-samples 0*" in text


def test_banner_does_not_mark_a_default_that_was_typed() -> None:
    text = banner("--attention-dropout 0.1 --hidden-dropout 0 --seed 1234 --lr-warmup-fraction 0.1")
    assert "attention-dropout 0.1," in text and "hidden-dropout 0.0," in text
    assert "note:" not in text and "seed 1234*" not in text
    assert "lr-warmup-samples 80," in text


def test_banner_shows_resolved_sizes_and_what_is_read() -> None:
    text = banner("--swiglu --train-data-path-file x.txt")
    assert "ffn-hidden-size 256*" in text and "kv-channels 24*" in text and "num-key-value-heads 4*" in text
    for unread in ("time-sampler", "rope-theta", "lr-wsd-decay-style", "split", "num-workers"):
        assert unread not in text
    assert "time-sampler stratified*" in banner("", "mdm")


def test_banner_fits_a_terminal() -> None:
    for line in describe(parse("--save " + "d" * 20, "mdm")):
        assert len(line) <= 120
