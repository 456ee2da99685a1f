"""The settings that decide what is learned: model, objective, batch, optimizer.

Part of ``megatron.config``, which the rest of the program imports them from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron.errors import UserError
from megatron.options import Options, flag_of, is_default, option


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
    reset_attention_mask: bool = option(
        "tokens attend only inside their own document; slower with --attention-dropout (docs/training.md)", False
    )
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

    @property
    def loss_conditions(self) -> tuple[str, ...]:
        """The flags by which a loss is not that of the text alone, so that an MDM's is no bound of it either.

        Masks and positions that restart show an MDM where documents end, masked or not; an autoregressive model has
        read these ends. Without the ends' loss nobody pays for telling them from other tokens, and the two objectives
        leave out different targets.
        """
        shown = self.objective == "mdm"
        flags = (
            ("--reset-attention-mask", shown and self.reset_attention_mask),
            ("--reset-position-ids", shown and self.reset_position_ids),
            ("--eod-mask-loss", self.eod_mask_loss),
        )
        return tuple(flag for flag, given in flags if given)


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
    fp8: bool = option("with --bf16: multiply in fp8 within the blocks while training (Hopper and newer, Ada)", False)
    loss_scale: float | None = option("static fp16 loss scale instead of a dynamic one", None, above=0)
    max_nan_steps: int = option("stop after this many steps in a row with a loss that is not finite", 3, at_least=1)

    @property
    def half_precision(self) -> bool:
        """Whether parameters have 16 bits: --bf16 or --fp16."""
        return self.bf16 or self.fp16

    def _check(self) -> None:
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: keep one")
        if self.fp8 and not self.bf16:
            raise UserError("--fp8 needs --bf16, the format of everything between its products: add it")
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
