"""Every setting of a run: frozen dataclasses, one per concern. A field's name is its flag's name.

Those that decide what is learned are written down in ``megatron.config_recipe``; those that say how and from which
files, here, with the run that holds them all. Everybody imports all of them from here.

``megatron.arguments`` builds the command line from these fields; nothing else reads ``sys.argv`` and nothing writes to
a configuration once it is built. Ranges and choices stand beside each field and are checked by
:class:`megatron.options.Options`; checks inside one concern stand in its ``_check``; checks between concerns stand in
``megatron.config_checks``, which :class:`RunConfig` calls. All raise :class:`megatron.errors.UserError` with one line
that names the flag.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field

from megatron import config_checks
from megatron.config_recipe import BatchConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from megatron.errors import UserError
from megatron.options import Options, flag_of, is_default, option

FETCH_GPT2 = "python tools/fetch_gpt2_vocab.py puts GPT-2's files into utils/data"
"""The remedy for a missing vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Options):
    """How the run is split over processes, and the engine's own settings."""

    tensor_model_parallel_size: int = option("tensor-parallel ranks", 1, at_least=1)
    pipeline_model_parallel_size: int = option("pipeline stages", 1, at_least=1)
    sequence_parallel: bool = option(
        "divide norms, dropout and the residual stream between tensor-parallel ranks by tokens", False
    )
    tp_comm_backend: str = option(
        "messages of tensor-parallel ranks beside matrix products: collective (--distributed-backend's), copy (by copy "
        "engines, between GPUs of one host), or auto: copy wherever it can be had",
        "collective", choices=("auto", "copy", "collective"),
    )
    no_pipeline_parallel: bool = option("use the plain engine even where a pipeline engine could run", False)
    zero_stage: int = option("ZeRO stage (0 runs as stage 1: the same mathematics)", 0, choices=(0, 1, 2, 3))
    cpu_optimizer: bool = option("keep optimizer state and step on the CPU", False)
    deepspeed: bool = option("accepted for Megatron-DeepSpeed scripts: DeepSpeed is always the engine", False)
    deepspeed_config: str | None = option("DeepSpeed JSON, checked against the flags", None, flag="--deepspeed_config")
    local_rank: int | None = option("set by launchers", None, at_least=0, flag="--local_rank")
    distributed_backend: str | None = option("collectives [nccl with GPUs, else gloo]", None, choices=("nccl", "gloo"))
    distributed_timeout_minutes: int = option(
        "a collective that takes longer ends the run", 10, at_least=1, at_most=10**6
    )
    compile: bool | None = option("torch.compile the transformer blocks [on with a GPU]", None)
    activation_memory_budget: float | None = option(
        "compiled blocks keep about this share of their activations and recompute the cheapest of the rest [all]", None,
        at_least=0, at_most=1,
    )
    attention_backend: str = option(
        "attention in training, where batches bring no masks: flash (FlashAttention, a package of its own), fused "
        "(PyTorch's), or auto: flash wherever it can be had",
        "auto", choices=("auto", "flash", "fused"),
    )
    enable_cuda_graph: bool | None = option(
        "launch each micro-batch of training as one CUDA graph [on with a GPU for narrow models]", None
    )
    no_bias_swiglu_fusion: bool = option("never compute SwiGLU inside the products around it", False)
    seed: int = option("seed of weights, data order, noise and dropout", 1234, at_least=0, below=2**63)

    def _check(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1: drop it")
        if self.tp_comm_backend == "copy" and self.tensor_model_parallel_size == 1:
            raise UserError("--tp-comm-backend copy needs --tensor-model-parallel-size above 1: drop it")
        if self.activation_memory_budget is not None and self.compile is False:
            raise UserError("--activation-memory-budget is the compiler's to keep: drop it, or --no-compile")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Options):
    """Which ids mean which text."""

    tokenizer_type: str = option("tokenizer", "GPT2BPETokenizer", choices=("GPT2BPETokenizer", "HFTokenizer"))
    vocab_file: str | None = option("GPT-2 vocabulary (json)", None)
    merge_file: str | None = option("GPT-2 merges", None)
    tokenizer_model: str | None = option("HFTokenizer: a tokenizer.json, a directory or a hub name", None)

    def _check(self) -> None:
        needed = {
            "GPT2BPETokenizer": {"--vocab-file": self.vocab_file, "--merge-file": self.merge_file},
            "HFTokenizer": {"--tokenizer-model": self.tokenizer_model},
        }
        for tokenizer_type, files in needed.items():
            for flag, value in files.items():
                if tokenizer_type == self.tokenizer_type and value is None:
                    hint = f"; {FETCH_GPT2}" if tokenizer_type == "GPT2BPETokenizer" else ""
                    raise UserError(f"--tokenizer-type {self.tokenizer_type} needs {flag}{hint}")
                if tokenizer_type != self.tokenizer_type and value is not None:
                    raise UserError(f"{flag} needs --tokenizer-type {tokenizer_type}, not {self.tokenizer_type}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """Which tokens are read, in which order."""

    data_path: tuple[str, ...] | None = option("prefixes or weight/prefix pairs, divided by --split", None)
    split: str = option("shares of --data-path for train, validation, test", "969,30,1")
    train_data_path: tuple[str, ...] | None = option("training prefixes or weight/prefix pairs", None)
    valid_data_path: tuple[str, ...] | None = option("validation prefixes or pairs", None)
    test_data_path: tuple[str, ...] | None = option("test prefixes or pairs", None)
    train_data_path_file: str | None = option("file of weight/prefix pairs for training", None)
    valid_data_path_file: str | None = option("the same for validation", None)
    test_data_path_file: str | None = option("the same for test", None)
    data_impl: str = option("data file format", "mmap", choices=("mmap",))
    data_cache_path: str | None = option(
        "directory of index caches [beside the data, else a temporary directory]", None
    )
    num_workers: int = option("loader processes per rank", 2, at_least=0)
    epoch_rule: str = option(
        "exact: every epoch visits every document once; megatron: all epochs shuffled together",
        "exact",
        choices=("exact", "megatron"),
    )
    unique_tokens: int | None = option("use only the first documents, up to this many tokens", None, at_least=1)

    @property
    def split_shares(self) -> tuple[float, float, float]:
        """Shares of ``--data-path`` for train, validation and test; they sum to 1, missing ones are 0."""
        try:
            shares = [float(share) for share in self.split.replace("/", ",").split(",")]
        except ValueError:
            shares = []
        total = sum(shares)
        # `not total > 0` also refuses NaN.
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or not total > 0 or math.isinf(total):
            raise UserError(f"--split {self.split!r} is not understood: give three shares such as 969,30,1")
        train, valid, test = (*shares, 0.0, 0.0)[:3]
        return train / total, valid / total, test / total

    def has(self, split: str) -> bool:
        """Return whether any flag names data for ``split`` ("train", "valid" or "test")."""
        if self.data_path is not None:
            return self.split_shares[("train", "valid", "test").index(split)] > 0
        return getattr(self, f"{split}_data_path") is not None or getattr(self, f"{split}_data_path_file") is not None

    def _check(self) -> None:
        _ = self.split_shares
        for split in ("train", "valid", "test"):
            flag = f"--{split}-data-path"
            paths, file = getattr(self, f"{split}_data_path"), getattr(self, f"{split}_data_path_file")
            if paths is not None and file is not None:
                raise UserError(f"{flag} and {flag}-file exclude each other: keep one")
            if self.data_path is not None and (paths is not None or file is not None):
                raise UserError(
                    f"--data-path and {flag if file is None else flag + '-file'} exclude each other: keep one"
                )
        if self.data_path is None and self.split != "969,30,1":
            raise UserError("--split divides --data-path, which is not given: drop it")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Options):
    """When and on what validation runs."""

    eval_interval: int = option("steps between validations", 1000, at_least=1)
    eval_iters: int = option("validation windows in units of the global batch", 100, at_least=0)
    eval_windows: str | None = option("number of validation windows, or 'all' (overrides --eval-iters)", None)
    skip_train: bool = option("only validate (and test)", False)

    def _check(self) -> None:
        if self.eval_windows in (None, "all"):
            return
        if not str(self.eval_windows).isdecimal() or int(self.eval_windows) < 1:
            raise UserError(f"--eval-windows {self.eval_windows}: give a number of windows of 1 or more, or 'all'")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Options):
    """What is saved, loaded and kept, and what stops the run."""

    save: str | None = option("checkpoint directory to write", None)
    load: str | None = option("checkpoint directory to continue from; empty or absent starts from scratch", None)
    load_tag: str | None = option("checkpoint to load instead of the latest, e.g. global_step1000", None)
    save_interval: int | None = option("steps between checkpoints [only at the end]", None, at_least=1)
    async_save: bool | None = option(
        "train on while a checkpoint is written, from a copy in host memory [on with a GPU, unless its optimizer is "
        "offloaded]", None,
    )
    keep_last: int = option("newest checkpoints kept (0 keeps all)", 2, at_least=0)
    keep_best: int = option("checkpoints with the lowest validation loss kept", 1, at_least=0)
    no_load_optim: bool = option("load weights without optimizer state", False)
    no_load_rng: bool = option("do not restore random number generators", False)
    finetune: bool = option("load weights only and start at sample 0", False)
    exit_interval: int | None = option("save and exit when the step is a multiple of this", None, at_least=1)
    exit_duration_in_mins: float | None = option("save and exit after this many minutes", None, above=0)
    exit_signal_handler: bool = option("save and exit on SIGTERM or SIGUSR1", False)
    kill_switch_file: str | None = option("save and exit when this file appears; it is then removed", None)

    def _check(self) -> None:
        if self.save_interval is not None and self.save is None:
            raise UserError("--save-interval needs --save, the directory to write to")
        if self.async_save and self.save is None:
            raise UserError("--async-save needs --save, the directory to write to")
        if self.load is None:
            for name in ("load_tag", "no_load_optim", "no_load_rng", "finetune"):
                if getattr(self, name):
                    raise UserError(f"--{name.replace('_', '-')} needs --load, the directory to load from")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Options):
    """Where numbers go."""

    log_interval: int = option("steps between training log lines", 100, at_least=1)
    metrics_file: str | None = option("jsonl of all log events [metrics.jsonl in the checkpoint directory]", None)
    tensorboard_dir: str | None = option("TensorBoard directory", None)
    tensorboard_queue_size: int = option("events buffered before a write", 1000, at_least=1)
    log_timers_to_tensorboard: bool = option("also write step times", False)
    log_batch_size_to_tensorboard: bool = option("also write the batch size", False)
    log_validation_ppl_to_tensorboard: bool = option("also write validation perplexity", False)
    wandb_project: str | None = option("Weights & Biases project (offline without a key)", None)
    wandb_exp_name: str | None = option("Weights & Biases run name", None)
    wandb_save_dir: str | None = option("Weights & Biases directory", None)
    wandb_group: str | None = option("Weights & Biases group", None)
    profile: bool = option("profile some steps of rank 0: a trace and the shares of the step", False)
    profile_step_start: int = option("first step that is profiled", 10, at_least=1)
    profile_step_end: int = option("first step that is not profiled any more", 12, at_least=2)
    profile_dir: str | None = option("where --profile writes trace.json.gz and shares.json", None)

    def _check(self) -> None:
        if self.profile and self.profile_dir is None:
            raise UserError("--profile needs --profile-dir, the directory to write to")
        if self.profile and self.profile_step_end <= self.profile_step_start:
            raise UserError(
                f"--profile-step-end {self.profile_step_end} is not above --profile-step-start "
                f"{self.profile_step_start}: no step would be profiled"
            )
        for setting in dataclasses.fields(self):
            if is_default(self, setting):
                continue
            if setting.name.endswith("_to_tensorboard") and self.tensorboard_dir is None and self.wandb_project is None:
                raise UserError(f"{flag_of(setting)} needs --tensorboard-dir or --wandb-project")
            if setting.name == "tensorboard_queue_size" and self.tensorboard_dir is None:
                raise UserError(f"{flag_of(setting)} needs --tensorboard-dir")
            if setting.name.startswith("wandb_") and self.wandb_project is None:
                raise UserError(f"{flag_of(setting)} needs --wandb-project")
            if setting.name.startswith("profile_") and not self.profile:
                raise UserError(f"{flag_of(setting)} needs --profile")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, complete. ``given`` names the fields set on the command line, so that defaults can be told from choices.

    Before :func:`megatron.config_checks.resolve_for_world` has run, ``batch.global_batch_size`` may be None, and the
    quantities in samples that derive from it cannot be asked for.
    """

    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batch: BatchConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        config_checks.check_run(self)

    def _in_samples(self, steps: int) -> int:
        assert self.batch.global_batch_size is not None, "resolve_for_world comes first"
        return steps * self.batch.global_batch_size

    @property
    def train_samples(self) -> int:
        """Samples the run trains on; 0 where ``--skip-train`` needs none."""
        if self.batch.train_samples is not None:
            return self.batch.train_samples
        return self._in_samples(self.batch.train_iters) if self.batch.train_iters is not None else 0

    @property
    def lr_decay_samples(self) -> int:
        """Samples from the start of training to the end of the decay (warm-up included, as in Megatron)."""
        if self.optimizer.lr_decay_samples is not None:
            return self.optimizer.lr_decay_samples
        if self.optimizer.lr_decay_iters is not None:
            return self._in_samples(self.optimizer.lr_decay_iters)
        return self.train_samples

    @property
    def lr_warmup_samples(self) -> int:
        """Samples of linear warm-up."""
        if self.optimizer.lr_warmup_fraction is not None:
            return int(self.optimizer.lr_warmup_fraction * self.lr_decay_samples)
        if self.optimizer.lr_warmup_iters:
            return self._in_samples(self.optimizer.lr_warmup_iters)
        return self.optimizer.lr_warmup_samples

    @property
    def lr_wsd_decay_samples(self) -> int:
        """Samples of WSD's final decay, which ends at ``lr_decay_samples``."""
        if self.optimizer.lr_wsd_decay_samples is not None:
            return self.optimizer.lr_wsd_decay_samples
        return self.lr_decay_samples // 10


def concern_types() -> dict[str, type[Options]]:
    """Return the class of every concern of a :class:`RunConfig` by its name there, in order."""
    hints = typing.get_type_hints(RunConfig)
    return {setting.name: hints[setting.name] for setting in dataclasses.fields(RunConfig) if setting.name != "given"}
