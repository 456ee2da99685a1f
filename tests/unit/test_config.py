"""Every wrong setting is refused with one line that names its flag; derived sizes and samples are right."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
    concern_types,
)
from megatron.config_checks import check_vocabulary, micro_batches, resolve_for_world
from megatron.errors import UserError
from megatron.options import flag_of


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{"num_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64} | changes
    )


def batch(**changes: Any) -> BatchConfig:
    return BatchConfig(
        **{"micro_batch_size": 2, "global_batch_size": 8, "train_samples": 800, "seq_length": 64} | changes
    )


def run(**changes: Any) -> RunConfig:
    whole = {
        "model": model(),
        "batch": batch(),
        "tokenizer": TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model="t.json"),
        "optimizer": OptimizerConfig(lr=1e-3),
        "data": DataConfig(train_data_path=("a",)),
    }
    return RunConfig(**whole | changes)


def tensor(ranks: int, **changes: Any) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=ranks, **changes)


def pipeline(stages: int, **changes: Any) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=stages, **changes)


FP8 = OptimizerConfig(lr=1e-3, bf16=True, fp8=True)
GPT2 = {"vocab_file": "v", "merge_file": "m"}
ORDERS: dict[str, Any] = {"use_order_list": True, "num_order_list": 4}

# (concern, settings, flags that the message must name)
WRONG: list[tuple[Any, dict[str, Any], list[str]]] = [
    (model, {"num_layers": 0}, ["--num-layers"]),
    (model, {"hidden_size": -1}, ["--hidden-size"]),
    (model, {"num_attention_heads": 0}, ["--num-attention-heads"]),
    (model, {"num_attention_heads": 5}, ["--hidden-size", "--num-attention-heads", "--kv-channels"]),
    (model, {"num_key_value_heads": 3}, ["--num-key-value-heads", "--num-attention-heads"]),
    (model, {"num_key_value_heads": 8}, ["--num-key-value-heads"]),
    (model, {"num_key_value_heads": 0}, ["--num-key-value-heads"]),
    (model, {"kv_channels": 0}, ["--kv-channels"]),
    (model, {"kv_channels": 3, "use_rotary_position_embeddings": True}, ["--use-rotary-position-embeddings"]),
    (model, {"ffn_hidden_size": 0}, ["--ffn-hidden-size"]),
    (model, {"hidden_size": 20, "swiglu": True}, ["--ffn-hidden-size", "--swiglu"]),
    (model, {"max_position_embeddings": 0}, ["--max-position-embeddings"]),
    (model, {"rope_theta": 0.0}, ["--rope-theta"]),
    (model, {"normalization": "batchnorm"}, ["--normalization", "rmsnorm"]),
    (model, {"layernorm_epsilon": 0.0}, ["--layernorm-epsilon"]),
    (model, {"init_method_std": float("nan")}, ["--init-method-std"]),
    (model, {"attention_dropout": 1.0}, ["--attention-dropout"]),
    (model, {"hidden_dropout": -0.1}, ["--hidden-dropout"]),
    (model, {"make_vocab_size_divisible_by": 0}, ["--make-vocab-size-divisible-by"]),
    (model, {"recompute_granularity": "half"}, ["--recompute-granularity"]),
    (model, {"recompute_granularity": "full"}, ["--recompute-granularity", "--recompute-method"]),
    (model, {"recompute_granularity": "selective", "recompute_method": "block"}, ["--recompute-method"]),
    (model, {"recompute_method": "uniform"}, ["--recompute-method", "--recompute-granularity"]),
    (model, {"recompute_num_layers": 2}, ["--recompute-num-layers"]),
    (model, {"checkpoint_activations": True, "recompute_num_layers": 3}, ["--recompute-num-layers", "--num-layers"]),
    (model, {"checkpoint_activations": True, "recompute_granularity": "full"}, ["--checkpoint-activations"]),
    (ObjectiveConfig, {"objective": "mdm", "ar_ratio": 1.5}, ["--ar-ratio"]),
    (ObjectiveConfig, {"objective": "mdm", "num_mc": 0}, ["--num-mc"]),
    (ObjectiveConfig, {"objective": "mdm", "time_sampler": "sobol"}, ["--time-sampler"]),
    (ObjectiveConfig, {"objective": "mdm", "low_noise_start": True}, ["--low-noise-start", "--low-noise-iter"]),
    (
        ObjectiveConfig,
        {"objective": "mdm", "low_noise_start": True, "low_noise_iter": 5},
        ["--low-noise-start", "--low-noise-ratio"],
    ),
    (ObjectiveConfig, {"objective": "mdm", "low_noise_iter": 5}, ["--low-noise-iter", "--low-noise-start"]),
    (ObjectiveConfig, {"objective": "mdm", "low_noise_ratio": 0.5}, ["--low-noise-ratio", "--low-noise-start"]),
    (ObjectiveConfig, {"objective": "mdm", "low_noise_ratio": 0.0}, ["--low-noise-ratio"]),
    (ObjectiveConfig, {"mask_sampler": "exact"}, ["--mask-sampler", "pretrain_diff_gpt.py"]),
    (ObjectiveConfig, {"loss_weighting": "uniform"}, ["--loss-weighting", "pretrain_diff_gpt.py"]),
    (ObjectiveConfig, {"objective": "mdm", "randmask_ratio": 0.5}, ["--randmask-ratio", "for pretrain_gpt.py"]),
    (ObjectiveConfig, {"randmask_ratio": 1.01}, ["--randmask-ratio"]),
    (ObjectiveConfig, {"use_order_list": True, "num_order_list": 0}, ["--num-order-list"]),
    (ObjectiveConfig, {"use_order_list": True}, ["--use-order-list", "--num-order-list"]),
    (ObjectiveConfig, {"num_order_list": 1}, ["--num-order-list", "--use-order-list"]),
    (ObjectiveConfig, {"use_predefined_order": True}, ["--use-predefined-order", "--use-order-list"]),
    (ObjectiveConfig, ORDERS | {"reset_attention_mask": True}, ["--reset-attention-mask", "--use-order-list"]),
    (ObjectiveConfig, ORDERS | {"reset_position_ids": True}, ["--reset-position-ids", "--use-order-list"]),
    (batch, {"micro_batch_size": 0}, ["--micro-batch-size"]),
    (batch, {"global_batch_size": 0}, ["--global-batch-size"]),
    (batch, {"seq_length": 0}, ["--seq-length"]),
    (batch, {"train_samples": 0}, ["--train-samples"]),
    (batch, {"train_iters": 3}, ["--train-samples", "--train-iters"]),
    (batch, {"rampup_batch_size": (3, 2, 100)}, ["--rampup-batch-size", "--global-batch-size"]),
    (batch, {"rampup_batch_size": (16, 2, 100)}, ["--rampup-batch-size", "--global-batch-size"]),
    (batch, {"rampup_batch_size": (2, 0, 100)}, ["--rampup-batch-size"]),
    (batch, {"rampup_batch_size": (2, 2, 100), "global_batch_size": None}, ["--global-batch-size"]),
    (
        batch,
        {"rampup_batch_size": (2, 2, 100), "train_samples": None, "train_iters": 5},
        ["--train-iters", "--rampup-batch-size"],
    ),
    (OptimizerConfig, {"optimizer": "sgd"}, ["--optimizer"]),
    (OptimizerConfig, {"adam_beta1": 1.0}, ["--adam-beta1"]),
    (OptimizerConfig, {"adam_beta2": -0.1}, ["--adam-beta2"]),
    (OptimizerConfig, {"adam_eps": 0.0}, ["--adam-eps"]),
    (OptimizerConfig, {"weight_decay": -1.0}, ["--weight-decay"]),
    (OptimizerConfig, {"clip_grad": -1.0}, ["--clip-grad"]),
    (OptimizerConfig, {"lr": 0.0}, ["--lr"]),
    (OptimizerConfig, {"lr": float("inf")}, ["--lr"]),
    (OptimizerConfig, {"lr": 1e-4, "min_lr": 1e-3}, ["--min-lr", "--lr"]),
    (OptimizerConfig, {"lr_decay_style": "step"}, ["--lr-decay-style", "WSD"]),
    (OptimizerConfig, {"lr_decay_samples": 5, "lr_decay_iters": 5}, ["--lr-decay-samples", "--lr-decay-iters"]),
    (OptimizerConfig, {"lr_warmup_samples": 5, "lr_warmup_iters": 5}, ["--lr-warmup-samples", "--lr-warmup-iters"]),
    (OptimizerConfig, {"lr_warmup_samples": 5, "lr_warmup_fraction": 0.1}, ["--lr-warmup-fraction"]),
    (OptimizerConfig, {"lr_warmup_fraction": 1.0}, ["--lr-warmup-fraction"]),
    (OptimizerConfig, {"lr_wsd_decay_samples": 5}, ["--lr-wsd-decay-samples", "--lr-decay-style"]),
    (OptimizerConfig, {"lr_wsd_decay_style": "cosine"}, ["--lr-wsd-decay-style", "--lr-decay-style"]),
    (OptimizerConfig, {"bf16": True, "fp16": True}, ["--bf16", "--fp16"]),
    (OptimizerConfig, {"loss_scale": 8.0}, ["--loss-scale", "--fp16"]),
    (OptimizerConfig, {"max_nan_steps": 0}, ["--max-nan-steps"]),
    (ParallelConfig, {"tensor_model_parallel_size": 0}, ["--tensor-model-parallel-size"]),
    (ParallelConfig, {"pipeline_model_parallel_size": 0}, ["--pipeline-model-parallel-size"]),
    (ParallelConfig, {"zero_stage": 4}, ["--zero-stage"]),
    (ParallelConfig, {"seed": -1}, ["--seed"]),
    (ParallelConfig, {"local_rank": -1}, ["--local_rank"]),
    (ParallelConfig, {"distributed_backend": "mpi"}, ["--distributed-backend"]),
    (ParallelConfig, {"distributed_timeout_minutes": 0}, ["--distributed-timeout-minutes"]),
    (ParallelConfig, {"distributed_timeout_minutes": 10**14}, ["--distributed-timeout-minutes"]),
    (TokenizerConfig, {"merge_file": "m"}, ["--vocab-file", "GPT2BPETokenizer", "fetch_gpt2_vocab"]),
    (TokenizerConfig, {"vocab_file": "v"}, ["--merge-file", "fetch_gpt2_vocab"]),
    (TokenizerConfig, {"tokenizer_type": "HFTokenizer"}, ["--tokenizer-model"]),
    (TokenizerConfig, {"tokenizer_model": "t", **GPT2}, ["--tokenizer-model"]),
    (TokenizerConfig, {"tokenizer_type": "SentencePiece"}, ["--tokenizer-type", "HFTokenizer"]),
    (DataConfig, {"data_path": ("a",), "train_data_path": ("b",)}, ["--data-path", "--train-data-path"]),
    (DataConfig, {"data_path": ("a",), "valid_data_path_file": "b"}, ["--data-path", "--valid-data-path-file"]),
    (DataConfig, {"test_data_path": ("a",), "test_data_path_file": "b"}, ["--test-data-path", "--test-data-path-file"]),
    (DataConfig, {"data_path": ("a",), "split": "1,2,3,4"}, ["--split"]),
    (DataConfig, {"data_path": ("a",), "split": "0,0,0"}, ["--split"]),
    (DataConfig, {"data_path": ("a",), "split": "90,ten"}, ["--split"]),
    (DataConfig, {"data_path": ("a",), "split": "nan,1"}, ["--split"]),
    (DataConfig, {"data_path": ("a",), "split": "90,-10"}, ["--split"]),
    (DataConfig, {"split": "90,10,0"}, ["--split", "--data-path"]),
    (DataConfig, {"num_workers": -1}, ["--num-workers"]),
    (DataConfig, {"unique_tokens": 0}, ["--unique-tokens"]),
    (DataConfig, {"data_impl": "lazy"}, ["--data-impl"]),
    (DataConfig, {"epoch_rule": "old"}, ["--epoch-rule"]),
    (EvaluationConfig, {"eval_interval": 0}, ["--eval-interval"]),
    (EvaluationConfig, {"eval_iters": -1}, ["--eval-iters"]),
    (EvaluationConfig, {"eval_windows": "some"}, ["--eval-windows"]),
    (EvaluationConfig, {"eval_windows": "0"}, ["--eval-windows"]),
    (CheckpointConfig, {"save": ""}, ["--save is empty"]),
    (DataConfig, {"train_data_path": ("1.0", "")}, ["--train-data-path is empty"]),
    (CheckpointConfig, {"save_interval": 5}, ["--save-interval", "--save"]),
    (CheckpointConfig, {"save": "d", "save_interval": 0}, ["--save-interval"]),
    (CheckpointConfig, {"async_save": True}, ["--async-save", "--save"]),
    (CheckpointConfig, {"load_tag": "global_step1"}, ["--load-tag", "--load"]),
    (CheckpointConfig, {"finetune": True}, ["--finetune", "--load"]),
    (CheckpointConfig, {"no_load_optim": True}, ["--no-load-optim", "--load"]),
    (CheckpointConfig, {"keep_last": -1}, ["--keep-last"]),
    (CheckpointConfig, {"keep_best": -1}, ["--keep-best"]),
    (CheckpointConfig, {"exit_interval": 0}, ["--exit-interval"]),
    (CheckpointConfig, {"exit_duration_in_mins": 0.0}, ["--exit-duration-in-mins"]),
    (LoggingConfig, {"log_interval": 0}, ["--log-interval"]),
    (LoggingConfig, {"tensorboard_queue_size": 5}, ["--tensorboard-queue-size", "--tensorboard-dir"]),
    (LoggingConfig, {"log_timers_to_tensorboard": True}, ["--log-timers-to-tensorboard", "--tensorboard-dir"]),
    (LoggingConfig, {"wandb_group": "g"}, ["--wandb-group", "--wandb-project"]),
    (LoggingConfig, {"profile": True}, ["--profile", "--profile-dir"]),
    (LoggingConfig, {"profile_step_start": 3}, ["--profile-step-start", "--profile"]),
    (
        LoggingConfig,
        {"profile": True, "profile_dir": "d", "profile_step_start": 12},
        ["--profile-step-end 12", "--profile-step-start 12"],
    ),
    (run, {"batch": batch(seq_length=65)}, ["--seq-length", "--max-position-embeddings"]),
    (run, {"objective": ObjectiveConfig(**ORDERS)}, ["--use-order-list", "--max-position-embeddings to 65"]),
    (run, {"batch": batch(train_samples=None)}, ["--train-samples", "--train-iters"]),
    (run, {"batch": batch(train_samples=7)}, ["--train-samples"]),
    (run, {"optimizer": OptimizerConfig()}, ["--lr"]),
    (run, {"optimizer": OptimizerConfig(lr=1.0, lr_warmup_samples=800)}, ["--lr-warmup-samples"]),
    (run, {"optimizer": OptimizerConfig(lr=1.0, lr_warmup_iters=100)}, ["--lr-warmup-iters"]),
    (
        run,
        {"optimizer": OptimizerConfig(lr=1.0, lr_decay_style="WSD", lr_warmup_samples=700, lr_wsd_decay_samples=101)},
        ["--lr-wsd-decay-samples"],
    ),
    (
        run,
        {"batch": batch(rampup_batch_size=(2, 2, 10)), "optimizer": OptimizerConfig(lr=1.0, lr_warmup_iters=1)},
        ["--lr-warmup-iters", "--rampup-batch-size"],
    ),
    (run, {"data": DataConfig()}, ["--train-data-path-file"]),
    (run, {"data": DataConfig(data_path=("a",), split="0,1,0")}, ["--train-data-path-file"]),
    (run, {"evaluation": EvaluationConfig(skip_train=True)}, ["--skip-train", "--valid-data-path"]),
    (ParallelConfig, {"sequence_parallel": True}, ["--sequence-parallel", "--tensor-model-parallel-size"]),
    (ParallelConfig, {"tp_comm_backend": "copy"}, ["--tp-comm-backend copy", "--tensor-model-parallel-size"]),
    (run, {"parallel": tensor(3)}, ["--tensor-model-parallel-size 3", "--num-attention-heads"]),
    (
        run,
        {"parallel": tensor(4), "model": model(kv_channels=2, num_key_value_heads=1)},
        ["--tensor-model-parallel-size 4", "--num-key-value-heads"],
    ),
    (run, {"parallel": tensor(4), "model": model(ffn_hidden_size=30)}, ["--ffn-hidden-size"]),
    (
        run,
        {"parallel": tensor(2, sequence_parallel=True), "batch": batch(seq_length=3, micro_batch_size=1)},
        ["--sequence-parallel", "--seq-length"],
    ),
    (run, {"parallel": pipeline(3)}, ["--pipeline-model-parallel-size 3"]),
    (run, {"parallel": pipeline(2, no_pipeline_parallel=True)}, ["--no-pipeline-parallel", "--pipeline-model-"]),
    (run, {"parallel": pipeline(2, zero_stage=2)}, ["--pipeline-model-parallel-size 2", "use --zero-stage 1"]),
    (run, {"parallel": pipeline(2, zero_stage=3)}, ["--zero-stage 3", "--tensor-model-parallel-size instead"]),
    (OptimizerConfig, {"fp8": True}, ["--fp8 needs --bf16"]),
    (OptimizerConfig, {"fp8": True, "fp16": True}, ["--fp8 needs --bf16"]),
    (run, {"optimizer": FP8, "model": model(hidden_size=40, num_attention_heads=4)}, ["--hidden-size 40"]),
    (run, {"optimizer": FP8, "model": model(kv_channels=6)}, ["--fp8", "the 24 query features", "--kv-channels"]),
    (
        run,
        {"optimizer": FP8, "model": model(kv_channels=4, num_key_value_heads=1)},
        ["--fp8", "the 24 query, key and value features", "--num-key-value-heads"],
    ),
    (
        run,
        {"optimizer": FP8, "model": model(ffn_hidden_size=48), "parallel": tensor(2)},
        ["--fp8", "multiples of 16", "MLP's width of 24 a rank (--ffn-hidden-size)", "--tensor-model-parallel-size 2"],
    ),
    (
        run,
        {"optimizer": FP8, "batch": batch(micro_batch_size=1, global_batch_size=1, seq_length=24)},
        ["--fp8", "the 24 tokens of a micro-batch", "--seq-length"],
    ),
    (run, {"optimizer": FP8, "parallel": tensor(2, sequence_parallel=True)}, ["--fp8", "--sequence-parallel"]),
    (ParallelConfig, {"compile": False, "activation_memory_budget": 0.5}, ["--activation-memory-budget", "drop it"]),
    (ParallelConfig, {"activation_memory_budget": 1.5}, ["--activation-memory-budget 1.5", "<= 1"]),
]


def _name(value: Any) -> str:
    """A test id without addresses, which differ between processes."""
    return getattr(value, "__name__", str(value))[:60]


@pytest.mark.parametrize(("build", "settings", "named"), WRONG, ids=_name)
def test_wrong_setting_is_refused_by_name(build: Any, settings: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(**settings)
    message = str(caught.value)
    assert "\n" not in message
    for name in named:
        assert name in message


def test_padded_vocabulary_must_divide() -> None:
    """It does not grow with the ranks: the flag that sets it is named."""
    check_vocabulary(run(parallel=tensor(4)), 128)
    with pytest.raises(UserError, match="--make-vocab-size-divisible-by to a multiple of 4"):
        check_vocabulary(run(parallel=tensor(4)), 130)


def test_permuted_inputs_need_one_learned_position_more() -> None:
    """Raster inputs end at position s - 1; in another order the sample's last token, at position s, can be an input."""
    orders = ObjectiveConfig(objective="ar", use_order_list=True, num_order_list=4)
    run(objective=orders, model=model(max_position_embeddings=65))
    run(objective=orders, model=model(use_rotary_position_embeddings=True))
    run(objective=ObjectiveConfig(use_order_list=True, num_order_list=1, use_predefined_order=True))


def test_every_bounded_number_refuses_its_outside() -> None:
    """No bound stands in a field without being enforced: the check is generic, so walk all of them."""
    required = {"model": model, "batch": batch, "tokenizer": lambda **s: TokenizerConfig(**GPT2, **s)}
    checked = 0
    for name, cls in concern_types().items():
        build: Any = required.get(name, cls)
        for setting in dataclasses.fields(cls):
            bounds = {k: v for k, v in setting.metadata.items() if k in ("at_least", "above", "at_most", "below")}
            outside = {"at_least": -1, "above": 0, "at_most": 1, "below": 0}
            for kind, limit in bounds.items():
                if limit is not None:
                    with pytest.raises(UserError, match=flag_of(setting)):
                        build(**{setting.name: limit + outside[kind]})
                    checked += 1
    assert checked > 50


def test_model_sizes_are_resolved() -> None:
    plain = model()
    assert (plain.ffn_size, plain.head_size, plain.num_kv_heads, plain.recompute) == (384, 24, 4, None)
    chosen = model(ffn_hidden_size=100, kv_channels=8, num_key_value_heads=2, swiglu=True, num_attention_heads=6)
    assert (chosen.ffn_size, chosen.head_size, chosen.num_kv_heads) == (100, 8, 2)


@pytest.mark.parametrize("hidden", [*range(24, 400), 768, 896, 1280, 2176, 5120])
def test_swiglu_width_is_megatrons(hidden: int) -> None:
    assert model(hidden_size=hidden, num_attention_heads=1, swiglu=True).ffn_size == int((4 * hidden * 2 / 3) / 64) * 64


def test_recompute_is_resolved() -> None:
    assert model(checkpoint_activations=True).recompute == ("full", "uniform", 1)
    assert model(recompute_granularity="selective").recompute == ("selective", None, 1)
    blocks = model(recompute_granularity="full", recompute_method="block", recompute_num_layers=2)
    assert blocks.recompute == ("full", "block", 2)


def test_configuration_cannot_be_written() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run().model.num_layers = 3  # type: ignore[misc]


def test_defaults_that_decide_results_are_megatrons() -> None:
    config = run()
    assert (config.model.attention_dropout, config.model.hidden_dropout) == (0.1, 0.1)
    assert (config.model.init_method_std, config.model.layernorm_epsilon, config.model.rope_theta) == (0.02, 1e-5, 1e4)
    assert (config.parallel.seed, config.model.make_vocab_size_divisible_by) == (1234, 128)


def test_quantities_in_samples() -> None:
    config = run()
    assert (config.train_samples, config.lr_decay_samples, config.lr_warmup_samples) == (800, 800, 0)
    steps = run(
        batch=batch(train_samples=None, train_iters=50),
        optimizer=OptimizerConfig(lr=1.0, lr_decay_iters=40, lr_warmup_iters=3, lr_decay_style="WSD"),
    )
    assert (steps.train_samples, steps.lr_decay_samples, steps.lr_warmup_samples) == (400, 320, 24)
    assert steps.lr_wsd_decay_samples == 32
    share = run(optimizer=OptimizerConfig(lr=1.0, lr_decay_samples=333, lr_warmup_fraction=0.01))
    assert share.lr_warmup_samples == 3


def test_warmup_may_end_just_before_the_decay() -> None:
    assert run(optimizer=OptimizerConfig(lr=1.0, lr_warmup_samples=799)).lr_warmup_samples == 799


def test_skip_train_needs_neither_length_nor_rate() -> None:
    config = run(
        batch=batch(train_samples=None),
        optimizer=OptimizerConfig(),
        data=DataConfig(valid_data_path=("a",)),
        evaluation=EvaluationConfig(skip_train=True),
    )
    assert config.train_samples == 0


def test_split_shares() -> None:
    data = DataConfig(data_path=("a",), split="969, 30, 1")
    assert data.split_shares == pytest.approx((0.969, 0.03, 0.001))
    assert DataConfig(data_path=("a",), split="9,1").split_shares == pytest.approx((0.9, 0.1, 0.0))
    assert [data.has(split) for split in ("train", "valid", "test")] == [True, True, True]
    assert not DataConfig(data_path=("a",), split="9,1").has("test")


def test_global_batch_is_filled_in_for_the_world() -> None:
    config = run(batch=batch(global_batch_size=None, train_samples=None, train_iters=5))
    resolved = resolve_for_world(config, world_size=4)
    assert (resolved.batch.global_batch_size, resolved.train_samples) == (8, 40)
    assert config.batch.global_batch_size is None
    assert resolve_for_world(run(), world_size=2) == run()


def test_checks_that_waited_for_the_global_batch_are_made_up() -> None:
    config = run(
        batch=batch(global_batch_size=None, train_samples=None, train_iters=5),
        optimizer=OptimizerConfig(lr=1.0, lr_warmup_samples=40),
    )
    resolve_for_world(config, world_size=5)
    with pytest.raises(UserError, match="--lr-warmup-samples"):
        resolve_for_world(config, world_size=4)


def test_global_batch_must_be_whole_micro_batches() -> None:
    assert micro_batches(2, 2, 8) == 2
    with pytest.raises(UserError, match=r"--global-batch-size 8 .*--micro-batch-size 2 x 3"):
        resolve_for_world(run(), world_size=3)
    ramp = run(batch=batch(rampup_batch_size=(2, 2, 10)))
    assert resolve_for_world(ramp, world_size=1) == ramp
    with pytest.raises(UserError, match=r"--rampup-batch-size 2 .*2 data-parallel ranks"):
        resolve_for_world(ramp, world_size=2)


def test_flags_by_which_a_loss_is_not_the_texts_own() -> None:
    """Restarting masks show an MDM the documents' ends; an autoregressive model has read them."""
    restarts = {"reset_attention_mask": True, "reset_position_ids": True}
    assert ObjectiveConfig(objective="ar", **restarts).loss_conditions == ()
    assert ObjectiveConfig(objective="ar", eod_mask_loss=True).loss_conditions == ("--eod-mask-loss",)
    assert ObjectiveConfig(objective="mdm").loss_conditions == ()
    assert ObjectiveConfig(objective="mdm", eod_mask_loss=True, **restarts).loss_conditions == (
        "--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"
    )  # fmt: skip
