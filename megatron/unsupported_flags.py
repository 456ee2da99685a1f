"""What to say of a flag that is not ours: the alternative to Megatron's well-known ones, else the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_ALWAYS_FUSED = "attention is always fused (--attention-backend says by whom): drop it"
_NO_KERNELS = "there are no hand-written kernels to switch: drop it, or choose with --compile/--no-compile"
_ONE_MODEL = "there is one model implementation: drop it"
_LONG_SEQUENCES = "not supported: for long sequences use --micro-batch-size 1 and --checkpoint-activations"
_DENSE_ONLY = "mixtures of experts are not supported: models are dense"
_IN_JSON = 'set it in the "fp16" section of the --deepspeed_config JSON'
_IN_SAMPLES = "count in samples: tokens / --seq-length"
_ALWAYS_LOGGED = "not a choice here: metrics.jsonl and TensorBoard get what is measured; drop it"
_RECOMPUTE = "not supported: use --recompute-granularity, --recompute-method and --recompute-num-layers"
_COMPLETE = "checkpoints are always complete: drop it"
_SCHEDULE = "the learning rate always follows this run's flags: drop it"

_ALTERNATIVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_ALWAYS_FUSED, ("--use-flash-attn", "--use-flash-attn-v1", "--use-flash-attn-v2", "--use-flash-attn-triton")),
    (_ALWAYS_FUSED, ("--attention-softmax-in-fp32", "--masked-softmax-fusion", "--no-masked-softmax-fusion")),
    (_ALWAYS_FUSED, ("--apply-query-key-layer-scaling", "--no-query-key-layer-scaling")),
    (_NO_KERNELS, ("--no-bias-gelu-fusion", "--no-bias-dropout-fusion", "--no-gradient-accumulation-fusion")),
    (_NO_KERNELS, ("--no-persist-layer-norm", "--no-async-tensor-model-parallel-allreduce")),
    (_ONE_MODEL, ("--use-mcore-models", "--transformer-impl", "--use-legacy-models", "--spec")),
    (_LONG_SEQUENCES, ("--context-parallel-size", "--ds-sequence-parallel-size", "--force-ds-sequence-parallel")),
    (_DENSE_ONLY, ("--num-experts", "--moe-expert-parallel-size", "--topk", "--expert-model-parallel-size")),
    (_IN_JSON, ("--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis")),
    (_IN_SAMPLES, ("--train-tokens", "--lr-decay-tokens", "--lr-warmup-tokens")),
    (_ALWAYS_LOGGED, ("--log-learning-rate-to-tensorboard", "--log-loss-scale-to-tensorboard", "--log-params-norm")),
    (_ALWAYS_LOGGED, ("--log-memory-to-tensorboard", "--log-world-size-to-tensorboard", "--log-throughput")),
    (_ALWAYS_LOGGED, ("--log-optimizer-states-to-tensorboard", "--log-num-zeros-in-grad", "--timing-log-level")),
    ("use --log-interval", ("--tensorboard-log-interval",)),
    (_RECOMPUTE, ("--distribute-saved-activations", "--partition-activations", "--contigious-checkpointing")),
    (_RECOMPUTE, ("--checkpoint-in-cpu", "--synchronize-each-layer")),
    ("use --checkpoint-activations", ("--deepspeed-activation-checkpointing",)),
    ("use --recompute-granularity selective", ("--recompute-activations",)),
    ("use --recompute-num-layers", ("--checkpoint-num-layers",)),
    (_COMPLETE, ("--no-save-optim", "--no-save-rng")),
    (_SCHEDULE, ("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler")),
    ("data parallelism is DeepSpeed's: drop it", ("--DDP-impl", "--no-contiguous-buffers-in-local-ddp")),
    ("use --zero-stage 1", ("--use-distributed-optimizer",)),
    ("use --cpu-optimizer", ("--cpu-torch-adam",)),
    ("use --no-pipeline-parallel", ("--no-pipeline-parallelism",)),
    ("interleaved stages are not supported: drop it", ("--num-layers-per-virtual-pipeline-stage",)),
    ("not supported: leave out --bf16 to train in fp32 throughout", ("--fp32-residual-connection",)),
    ("gradients always accumulate in fp32: drop it", ("--accumulate-allreduce-grads-in-fp32",)),
    ("weight decay is constant: use --weight-decay", ("--start-weight-decay", "--end-weight-decay")),
    ("weight decay is constant: use --weight-decay", ("--weight-decay-incr-style",)),
    ("use --use-rotary-position-embeddings, or neither for learned positions", ("--position-embedding-type",)),
    ("positions are rotary or learned, never absent", ("--no-position-embedding",)),
    ("learned positions are what you get without --use-rotary-position-embeddings", ("--add-position-embedding",)),
    ("use --rope-theta", ("--rotary-base",)),
    ("rotary positions always cover the whole head: drop it", ("--rotary-percent",)),
    ("use --num-key-value-heads", ("--group-query-attention", "--num-query-groups")),
    ("use --layernorm-epsilon, which serves RMSNorm too", ("--norm-epsilon", "--rmsnorm-epsilon")),
    ("not supported: use --swiglu, or neither for GELU", ("--squared-relu", "--openai-gelu", "--geglu")),
    ("use --tensor-model-parallel-size", ("--model-parallel-size",)),
    ("use --micro-batch-size", ("--batch-size",)),
    ("use --lr-warmup-fraction", ("--warmup",)),
    ("samples are always shuffled within their epoch, and resumed where they stopped: drop it", ("--dataloader-type",)),
    ("use --epoch-rule exact and --train-samples", ("--train-data-exact-num-epochs",)),
    ("the vocabulary comes from the tokenizer: drop it", ("--vocab-size", "--vocab-extra-ids", "--padded-vocab-size")),
    ("data files are mapped, not read ahead: drop it", ("--mmap-warmup",)),
    ("curricula and data-efficiency schedules are not supported: drop it", ("--curriculum-learning-legacy",)),
    ("use --skip-train", ("--eval-only",)),
    ("--profile always uses PyTorch's profiler, on rank 0: drop it", ("--use-pytorch-profiler", "--profile-ranks")),
)


def explain_unknown(flag: str, known: Sequence[str]) -> str:
    """Return one line on an unknown ``flag``: the alternative, or the nearest of the ``known`` flags."""
    for remedy, flags in _ALTERNATIVES:
        if flag in flags:
            return f"{flag}: {remedy}"
    nearest = difflib.get_close_matches(flag, known, n=1)
    return f"{flag} is no flag of this program: " + (f"did you mean {nearest[0]}?" if nearest else "see --help")
