"""Checks between the concerns of a run, and those that need the number of processes.

Each raises :class:`megatron.errors.UserError` with one line that names the flag and the remedy.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron.errors import UserError

if TYPE_CHECKING:  # megatron.config calls this module
    from megatron.config import RunConfig

FP8_ALIGNMENT = 16
"""Sides of matrices that are multiplied in fp8 are multiples of it: cuBLAS wants rows of whole 16 bytes."""


def check_run(config: RunConfig) -> None:
    """Raise UserError where the concerns of ``config`` contradict each other; needs no knowledge of the processes."""
    _check_tensor_parallel(config)
    _check_pipeline(config)
    _check_fp8(config)
    _check_length(config)
    _check_data(config)
    # Without a global batch size, quantities in steps have no value yet: resolve_for_world builds a new RunConfig.
    if not config.evaluation.skip_train and config.batch.global_batch_size is not None:
        _check_schedule(config)


def resolve_for_world(config: RunConfig, world_size: int) -> RunConfig:
    """Return ``config`` with its global batch size filled in, checked against ``world_size`` processes.

    Raises UserError where the parallel sizes do not divide the processes, or a global batch (any size of a ramp) is not
    a whole number of micro-batches per data-parallel rank.
    """
    model_parallel = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    if world_size % model_parallel:
        raise UserError(
            f"--tensor-model-parallel-size x --pipeline-model-parallel-size = {model_parallel} does not divide "
            f"{world_size} processes: change one of them or the number of processes"
        )
    dp_size = world_size // model_parallel
    batch = config.batch
    if batch.global_batch_size is None:
        batch = dataclasses.replace(batch, global_batch_size=batch.micro_batch_size * dp_size)
    assert batch.global_batch_size is not None
    micro_batches(batch.micro_batch_size, dp_size, batch.global_batch_size)
    if batch.rampup_batch_size is not None:
        start, increment, _ = batch.rampup_batch_size
        for size in range(start, batch.global_batch_size, increment):
            micro_batches(batch.micro_batch_size, dp_size, size, flag="--rampup-batch-size")
    return dataclasses.replace(config, batch=batch)


def micro_batches(micro_batch_size: int, dp_size: int, batch_size: int, *, flag: str = "--global-batch-size") -> int:
    """Return the micro-batches per data-parallel rank in one global batch of ``batch_size`` samples.

    Raises UserError, naming ``flag``, where they do not come out whole.
    """
    if batch_size % (micro_batch_size * dp_size):
        raise UserError(
            f"{flag} {batch_size} is not divisible by --micro-batch-size {micro_batch_size} x {dp_size} "
            f"data-parallel ranks: use a multiple of {micro_batch_size * dp_size}"
        )
    return batch_size // (micro_batch_size * dp_size)


def _check_tensor_parallel(config: RunConfig) -> None:
    """Every layer, and with --sequence-parallel the tokens of a micro-batch, must divide over the ranks."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    flag, key = f"--tensor-model-parallel-size {ranks}", model.num_kv_heads * model.head_size
    if model.num_attention_heads % ranks:
        raise UserError(f"{flag} does not divide --num-attention-heads {model.num_attention_heads}: change one of them")
    if model.num_kv_heads % ranks and key % ranks:
        raise UserError(
            f"{flag} divides neither the {model.num_kv_heads} key/value heads (--num-key-value-heads) nor their "
            f"{key} features: change one of them"
        )
    if model.ffn_size % ranks:
        raise UserError(f"{flag} does not divide the MLP's width {model.ffn_size}: set --ffn-hidden-size")
    tokens = config.batch.micro_batch_size * config.batch.seq_length
    if config.parallel.sequence_parallel and tokens % ranks:
        raise UserError(
            f"--sequence-parallel: {flag} does not divide the {tokens} tokens of a micro-batch: "
            "change --seq-length or --micro-batch-size"
        )


def _check_pipeline(config: RunConfig) -> None:
    """Every stage needs a block, and DeepSpeed's pipeline has gradients and weights whole on every replica."""
    stages, blocks = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    flag = f"--pipeline-model-parallel-size {stages}"
    if stages == 1:
        return
    if config.parallel.no_pipeline_parallel:
        raise UserError(f"--no-pipeline-parallel contradicts {flag}: drop one of them")
    if stages > blocks:
        raise UserError(f"{flag} exceeds --num-layers {blocks}: every stage needs a block, so lower it")
    if config.parallel.zero_stage > 1:
        raise UserError(
            f"{flag} does not go with --zero-stage {config.parallel.zero_stage}: use --zero-stage 1, or "
            f"--tensor-model-parallel-size instead of a pipeline"
        )


def _check_fp8(config: RunConfig) -> None:
    """Every side of every matrix that is multiplied in fp8 must be a multiple of ``FP8_ALIGNMENT``."""
    if not config.optimizer.fp8:
        return
    if config.parallel.sequence_parallel:
        raise UserError("--fp8 does not go with --sequence-parallel, whose products are not in fp8: drop one of them")
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    query, key = model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size
    sizes = {
        f"--hidden-size {model.hidden_size}": model.hidden_size,
        f"the {query // ranks} query features of a rank (--kv-channels, --num-attention-heads)": query // ranks,
        f"the {(query + 2 * key) // ranks} query, key and value features of a rank (--kv-channels, "
        "--num-key-value-heads)": (query + 2 * key) // ranks,
        f"the MLP's width of {model.ffn_size // ranks} a rank (--ffn-hidden-size)": model.ffn_size // ranks,
        f"the {config.batch.micro_batch_size * config.batch.seq_length} tokens of a micro-batch (--seq-length, "
        "--micro-batch-size)": config.batch.micro_batch_size * config.batch.seq_length,
    }
    for name, size in sizes.items():
        if size % FP8_ALIGNMENT:
            split = f" with --tensor-model-parallel-size {ranks}" if ranks > 1 else ""
            raise UserError(f"--fp8 needs multiples of {FP8_ALIGNMENT}, which {name}{split} is not: change it")


def check_vocabulary(config: RunConfig, padded_size: int) -> None:
    """Raise UserError where the padded vocabulary does not divide over tensor-parallel ranks; it never depends on them.
    """
    ranks = config.parallel.tensor_model_parallel_size
    if padded_size % ranks:
        raise UserError(
            f"--tensor-model-parallel-size {ranks} does not divide the padded vocabulary of {padded_size}: set "
            f"--make-vocab-size-divisible-by to a multiple of {ranks}"
        )


def _check_length(config: RunConfig) -> None:
    """The model must accept the sequences; a run to train must say how long and at which rate."""
    batch = config.batch
    if batch.seq_length > config.model.max_position_embeddings:
        raise UserError(
            f"--seq-length {batch.seq_length} exceeds --max-position-embeddings "
            f"{config.model.max_position_embeddings}: raise the latter"
        )
    if config.evaluation.skip_train:
        return
    learned = not config.model.use_rotary_position_embeddings
    permuted = (config.objective.num_order_list or 1) > 1
    if learned and permuted and batch.seq_length == config.model.max_position_embeddings:
        raise UserError(
            f"--use-order-list can put a sample's last token, at position {batch.seq_length}, among the inputs: raise "
            f"--max-position-embeddings to {batch.seq_length + 1}, or use --use-rotary-position-embeddings"
        )
    if batch.train_samples is None and batch.train_iters is None:
        raise UserError("give --train-samples or --train-iters (or --skip-train)")
    if config.optimizer.lr is None:
        raise UserError("--lr is required for training")


def _check_data(config: RunConfig) -> None:
    """What is to be read must be named."""
    data = config.data
    if config.evaluation.skip_train:
        if not data.has("valid") and not data.has("test"):
            raise UserError("--skip-train needs --valid-data-path(-file), --test-data-path(-file) or --data-path")
    elif not data.has("train"):
        raise UserError("training needs --train-data-path-file, --train-data-path or --data-path")
    if data.epoch_rule == "megatron" and config.parallel.seed >= 2**32:
        raise UserError(f"--epoch-rule megatron shuffles with a --seed below 2^32, not {config.parallel.seed}")


def _check_schedule(config: RunConfig) -> None:
    """Training must hold one step, and the warm-up must end before the decay does."""
    batch, optimizer = config.batch, config.optimizer
    first = batch.rampup_batch_size[0] if batch.rampup_batch_size is not None else batch.global_batch_size
    assert first is not None
    if config.train_samples < first:
        raise UserError(f"--train-samples {config.train_samples} is less than one global batch of {first}: raise it")
    if batch.rampup_batch_size is not None:
        for flag, value in (
            ("--lr-decay-iters", optimizer.lr_decay_iters),
            ("--lr-warmup-iters", optimizer.lr_warmup_iters),
        ):
            if value:
                raise UserError(f"{flag} does not go with --rampup-batch-size: count in samples")
    warmup, decay = config.lr_warmup_samples, config.lr_decay_samples
    if warmup >= decay:
        flag = "--lr-warmup-iters" if optimizer.lr_warmup_iters else "--lr-warmup-samples"
        raise UserError(f"{flag} amounts to {warmup} samples, which is not below the {decay} of the decay: shorten it")
    if optimizer.lr_decay_style == "WSD" and warmup + config.lr_wsd_decay_samples > decay:
        raise UserError(
            f"--lr-wsd-decay-samples {config.lr_wsd_decay_samples} and a warm-up of {warmup} do not fit into the "
            f"{decay} samples of the decay: shorten one"
        )
