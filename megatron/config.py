"""Every setting of a run: frozen dataclasses, one per concern. A field's name is its flag's name.

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
from megatron.errors import UserError
from megatron.options import Options, flag_of, is_default, option

FETCH_GPT2 = "python tools/fetch_gpt2_vocab.py puts GPT-2's files into utils/data"
"""The remedy for a missing vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """Shape of the transformer. Defaults are Megatron's, dropout 0.1 included.

    Read the resolved sizes through the properties ``ffn_size``, ``head_size``, ``num_kv_heads`` and ``recompute``,
    never through the flags ``ffn_hidden_size``, ``kv_channels``, ``num_key_value_heads``: they are None where nobody
    set them.
    """

    num_layers: int = option("transformer blocks", at_least=1)
    hidden_size: int = option("width of the residual stream", at_least=1)
    num_attention_heads: int = option("query heads", at_least=1)
    ffn_hidden_size: int | None = option(
        "inner width of the MLP [4h; with --swiglu int((4h*2/3)/64)*64]", None, at_least=1
    )
    num_key_value_heads: int | None = option(
        "key/value heads (grouped-query attention) [as many as query heads]", None, at_least=1
    )
    kv_channels: int | None = option("width of one head [hidden size / heads]", None, at_least=1)
    max_position_embeddings: int = option("longest sequence the model accepts", at_least=1)
    use_rotary_position_embeddings: bool = option("rotary positions instead of learned ones", False)
    rope_theta: float = option("base of the rotary frequencies", 10000.0, above=0)
    normalization: str = option("normalisation layer", "layernorm", choices=("layernorm", "rmsnorm"))
    layernorm_epsilon: float = option("epsilon of the normalisation layers", 1e-5, above=0)
    swiglu: bool = option("SwiGLU MLP instead of GELU", False)
    disable_bias_linear: bool = option("linear layers without biases", False)
    untie_embeddings_and_output_weights: bool = option("separate matrices for embedding and head", False)
    init_method_std: float = option("standard deviation of the initial weights", 0.02, above=0)
    attention_dropout: float = option("dropout on attention probabilities", 0.1, at_least=0, below=1)
    hidden_dropout: float = option("dropout on the residual branches and the embedding", 0.1, at_least=0, below=1)
    make_vocab_size_divisible_by: int = option(
        "the padded vocabulary (tokens + mask id) is a multiple of this", 128, at_least=1
    )
    checkpoint_activations: bool = option(
        "recompute every block in the backward pass (same as full, uniform, 1 layer)", False
    )
    recompute_granularity: str | None = option(
        "recompute whole blocks, or the core attention only", None, choices=("full", "selective")
    )
    recompute_method: str | None = option("full: which blocks are recomputed", None, choices=("uniform", "block"))
    recompute_num_layers: int = option(
        "uniform: blocks per recomputed chunk; block: number of recomputed blocks", 1, at_least=1
    )

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP; the SwiGLU default keeps the parameter count of a GELU MLP of width 4h (Megatron)."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        # int((4h * 2/3) / 64) * 64 in whole numbers.
        return 8 * self.hidden_size // 3 // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads; each serves ``num_attention_heads / num_kv_heads`` query heads."""
        return self.num_key_value_heads if self.num_key_value_heads is not None else self.num_attention_heads

    @property
    def recompute(self) -> tuple[str, str | None, int] | None:
        """(granularity, method, layers) of activation recomputation, or None for none; method is None if selective."""
        if self.checkpoint_activations:
            return ("full", "uniform", self.recompute_num_layers)
        if self.recompute_granularity is None:
            return None
        return (self.recompute_granularity, self.recompute_method, self.recompute_num_layers)

    def _check(self) -> None:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}: change one of them, or set --kv-channels"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise UserError(
                f"--num-key-value-heads {self.num_kv_heads} does not divide --num-attention-heads "
                f"{self.num_attention_heads}: every key/value head must serve the same number of query heads"
            )
        if self.use_rotary_position_embeddings and self.head_size % 2:
            raise UserError(
                f"--use-rotary-position-embeddings needs an even head width, not {self.head_size}: set --kv-channels"
            )
        if self.ffn_size < 1:
            raise UserError(
                f"--hidden-size {self.hidden_size} is too small for --swiglu's default width: set --ffn-hidden-size"
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        """Megatron's rules: a method belongs to full recomputation and full recomputation to a method."""
        full = self.checkpoint_activations or self.recompute_granularity == "full"
        if self.checkpoint_activations and (self.recompute_granularity or self.recompute_method):
            raise UserError(
                "--checkpoint-activations already means --recompute-granularity full --recompute-method uniform: "
                "drop it or the other two"
            )
        if self.recompute_granularity == "full" and self.recompute_method is None:
            raise UserError("--recompute-granularity full needs --recompute-method uniform or block")
        if self.recompute_method is not None and not full:
            raise UserError(f"--recompute-method {self.recompute_method} needs --recompute-granularity full")
        if self.recompute_num_layers != 1 and not full:
            raise UserError("--recompute-num-layers needs --recompute-granularity full")
        if self.recompute_num_layers > self.num_layers:
            raise UserError(
                f"--recompute-num-layers {self.recompute_num_layers} exceeds --num-layers {self.num_layers}: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Options):
    """What is predicted and how noise is drawn; which of the two objectives it is, the entry point says."""

    objective: str = "ar"
    eod_mask_loss: bool = option("end-of-document tokens carry no loss", False)
    reset_position_ids: bool = option("positions restart after each end of document", False)
    reset_attention_mask: bool = option("tokens attend only inside their own document", False)
    randmask_ratio: float = option(
        "share of the positions that lose past positions, each with a probability of its own; none in validation",
        0.0,
        at_least=0,
        at_most=1,
        only="ar",
    )
    use_order_list: bool = option(
        "read each sequence in one of --num-order-list token orders; validation is left to right", False, only="ar"
    )
    num_order_list: int | None = option(
        "number of token orders, fixed for the run; order 0 is left to right", None, at_least=1, only="ar"
    )
    use_predefined_order: bool = option(
        "order i sorts position + i * N(0,1) instead of being a random permutation", False, only="ar"
    )
    time_sampler: str = option(
        "how masking levels t are drawn", "stratified", choices=("stratified", "uniform"), only="mdm"
    )
    mask_sampler: str = option(
        "independent masks, or an exact uniform number of them", "bernoulli", choices=("bernoulli", "exact"), only="mdm"
    )
    loss_weighting: str = option(
        "training weight of a masked token: 1/p, or the same for all; validation is always the ELBO",
        "elbo",
        choices=("elbo", "uniform"),
        only="mdm",
    )
    ar_ratio: float = option(
        "probability that a sequence's masks move to its end", 0.0, at_least=0, at_most=1, only="mdm"
    )
    low_noise_start: bool = option("begin training with low masking levels", False, only="mdm")
    low_noise_iter: int | None = option("iterations of --low-noise-start", None, at_least=1, only="mdm")
    low_noise_ratio: float | None = option(
        "t is multiplied by this during --low-noise-start", None, above=0, at_most=1, only="mdm"
    )
    num_mc: int = option("Monte Carlo noise draws per validation window", 1, at_least=1, only="mdm")

    def _check(self) -> None:
        if self.objective not in ("ar", "mdm"):
            raise ValueError(f"objective must be 'ar' or 'mdm', not {self.objective!r}")
        reader, ignored_by = ("pretrain_diff_gpt.py", "autoregressive")
        if self.objective == "mdm":
            reader, ignored_by = ("pretrain_gpt.py", "masked-diffusion")
        for setting in dataclasses.fields(self):
            if setting.metadata.get("only") not in (None, self.objective) and not is_default(self, setting):
                raise UserError(f"{flag_of(setting)} is for {reader}: {ignored_by} training ignores it")
        self._check_orders()
        if self.low_noise_start:
            for name in ("low_noise_iter", "low_noise_ratio"):
                if getattr(self, name) is None:
                    raise UserError(f"--low-noise-start needs --{name.replace('_', '-')}")
        elif self.low_noise_iter is not None or self.low_noise_ratio is not None:
            name = "--low-noise-iter" if self.low_noise_iter is not None else "--low-noise-ratio"
            raise UserError(f"{name} needs --low-noise-start")

    def _check_orders(self) -> None:
        """--use-order-list switches orders on, --num-order-list says how many, --use-predefined-order says which."""
        if not self.use_order_list:
            for flag, given in (
                ("--num-order-list", self.num_order_list is not None),
                ("--use-predefined-order", self.use_predefined_order),
            ):
                if given:
                    raise UserError(f"{flag} needs --use-order-list, which switches token orders on")
            return
        if self.num_order_list is None:
            raise UserError("--use-order-list needs --num-order-list, the number of token orders")
        if self.reset_attention_mask:
            raise UserError(
                "--reset-attention-mask does not go with --use-order-list: an order runs across the documents of a "
                "sample, and most tokens would be predicted without their own document: drop one of them"
            )
        if self.reset_position_ids:
            raise UserError(
                "--reset-position-ids does not go with --use-order-list: positions that repeat do not tell where a "
                "token stood: drop one of them"
            )


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Options):
    """How many samples a step and a run consume."""

    micro_batch_size: int = option("samples per rank and forward pass", at_least=1)
    global_batch_size: int | None = option(
        "samples per optimizer step [micro batch x data-parallel size]", None, at_least=1
    )
    rampup_batch_size: tuple[int, int, int] | None = option("start size, increment, samples of the ramp", None)
    train_samples: int | None = option("samples to train on (or --train-iters)", None, at_least=1)
    train_iters: int | None = option("steps to train for (or --train-samples)", None, at_least=1)
    seq_length: int = option("tokens per sample", at_least=1)

    def _check(self) -> None:
        if self.train_samples is not None and self.train_iters is not None:
            raise UserError("--train-samples and --train-iters exclude each other: keep one")
        if self.rampup_batch_size is None:
            return
        start, increment, samples = self.rampup_batch_size
        if self.global_batch_size is None:
            raise UserError("--rampup-batch-size needs --global-batch-size, the size at its end")
        if start < 1 or increment < 1 or samples < 0:
            raise UserError(f"--rampup-batch-size {start} {increment} {samples}: sizes start at 1, samples at 0")
        if start > self.global_batch_size or (self.global_batch_size - start) % increment:
            raise UserError(
                f"--rampup-batch-size {start} {increment} {samples} does not reach --global-batch-size "
                f"{self.global_batch_size} in whole steps of {increment}"
            )
        if self.train_iters is not None:
            raise UserError("--train-iters does not go with --rampup-batch-size: give --train-samples")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Options):
    """AdamW, its learning-rate schedule and the numeric format of training.

    The schedule in samples, whichever flags set it, is read from :class:`RunConfig` (``lr_decay_samples`` and so on).
    """

    optimizer: str = option("optimizer (AdamW)", "adam", choices=("adam",))
    adam_beta1: float = option("first Adam coefficient", 0.9, at_least=0, below=1)
    adam_beta2: float = option("second Adam coefficient", 0.999, at_least=0, below=1)
    adam_eps: float = option("Adam epsilon", 1e-8, above=0)
    weight_decay: float = option("decoupled weight decay, on matrices only", 0.01, at_least=0)
    clip_grad: float = option(
        "global gradient norm above which gradients are scaled down; 0 turns clipping off", 1.0, at_least=0
    )
    lr: float | None = option("peak learning rate", None, above=0)
    min_lr: float = option("lowest learning rate", 0.0, at_least=0)
    lr_decay_style: str = option("shape of the decay", "linear", choices=("constant", "linear", "cosine", "WSD"))
    lr_decay_samples: int | None = option("samples over which the rate decays [train samples]", None, at_least=1)
    lr_decay_iters: int | None = option("as --lr-decay-samples, in steps", None, at_least=1)
    lr_warmup_samples: int = option("samples of linear warm-up", 0, at_least=0)
    lr_warmup_iters: int = option("as --lr-warmup-samples, in steps", 0, at_least=0)
    lr_warmup_fraction: float | None = option("warm-up as a share of the decay samples", None, at_least=0, below=1)
    lr_wsd_decay_samples: int | None = option(
        "samples of the final decay of WSD [10 % of the decay samples]", None, at_least=1
    )
    lr_wsd_decay_style: str = option(
        "shape of WSD's final decay", "exponential", choices=("exponential", "linear", "cosine")
    )
    bf16: bool = option("bfloat16 parameters with fp32 master weights and gradient accumulation", False)
    fp16: bool = option("float16 parameters with fp32 master weights and dynamic loss scaling", False)
    loss_scale: float | None = option("static fp16 loss scale instead of a dynamic one", None, above=0)
    max_nan_steps: int = option("stop after this many steps in a row with a loss that is not finite", 3, at_least=1)

    def _check(self) -> None:
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: keep one")
        if self.loss_scale is not None and not self.fp16:
            raise UserError("--loss-scale needs --fp16: no other format scales the loss")
        if self.lr is not None and self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} exceeds --lr {self.lr}: lower it")
        if self.lr_decay_samples is not None and self.lr_decay_iters is not None:
            raise UserError("--lr-decay-samples and --lr-decay-iters exclude each other: keep one")
        warmups = {
            "--lr-warmup-fraction": self.lr_warmup_fraction,
            "--lr-warmup-samples": self.lr_warmup_samples,
            "--lr-warmup-iters": self.lr_warmup_iters,
        }
        given = [flag for flag, value in warmups.items() if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other: keep one")
        if self.lr_decay_style != "WSD":
            if self.lr_wsd_decay_samples is not None:
                raise UserError("--lr-wsd-decay-samples needs --lr-decay-style WSD")
            if self.lr_wsd_decay_style != "exponential":
                raise UserError("--lr-wsd-decay-style needs --lr-decay-style WSD")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Options):
    """How the run is split over processes, and the engine's own settings."""

    tensor_model_parallel_size: int = option("tensor-parallel ranks", 1, at_least=1)
    pipeline_model_parallel_size: int = option("pipeline stages", 1, at_least=1)
    sequence_parallel: bool = option(
        "divide norms, dropout and the residual stream between tensor-parallel ranks by tokens", False
    )
    no_pipeline_parallel: bool = option("use the plain engine even where a pipeline engine could run", False)
    zero_stage: int = option("ZeRO stage (0 runs as stage 1: the same mathematics)", 0, choices=(0, 1, 2, 3))
    cpu_optimizer: bool = option("keep optimizer state and step on the CPU", False)
    deepspeed: bool = option("accepted for Megatron-DeepSpeed scripts: DeepSpeed is always the engine", False)
    deepspeed_config: str | None = option("DeepSpeed JSON, checked against the flags", None, flag="--deepspeed_config")
    local_rank: int | None = option("set by launchers", None, at_least=0, flag="--local_rank")
    distributed_backend: str | None = option("collectives [nccl with GPUs, else gloo]", None, choices=("nccl", "gloo"))
    distributed_timeout_minutes: int = option("a collective that takes longer ends the run", 10, at_least=1)
    compile: bool | None = option("torch.compile the transformer blocks [on with a GPU, below ZeRO 3]", None)
    seed: int = option("seed of weights, data order, noise and dropout", 1234, at_least=0, below=2**63)

    def _check(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1: drop it")


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
