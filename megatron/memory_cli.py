"""The table of ``python -m megatron.budget memory``: every sensible split of a run, and what it needs of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron.budget import ModelRow
from megatron.memory import Split, estimate

COLUMNS = ("GPU", "params", "grads", "Adam", "buffers", "kept", "head", "host")


def print_splits(
    row: ModelRow, gpus: int, *, vocabulary: int, micro_batch_size: int, global_batch_size: int, seq_length: int,
    dropout: float, gpu_bytes: float, fp8: bool = False, gated: bool = False,
) -> None:  # fmt: skip
    """Print one line a split, with and without recomputation, in 1e9 bytes; ``*`` marks those below ``gpu_bytes``.

    ``vocabulary``: padded rows. Splits that do not divide the global batch are left out.
    """
    print(f"{'split':<34} {'recompute':<10} " + " ".join(f"{column:>7}" for column in COLUMNS) + "   GB")
    for split in _splits(row, gpus, fp8):
        split = replace(split, gated=gated)
        micro_batches, rest = divmod(global_batch_size, micro_batch_size * split.data)
        if rest:
            continue
        for recompute in (False, True):
            model = row.model(
                seq_length, hidden_dropout=dropout, attention_dropout=dropout, checkpoint_activations=recompute
            )
            found = estimate(
                model, split, vocabulary=vocabulary, micro_batch_size=micro_batch_size, seq_length=seq_length,
                micro_batches=micro_batches,
            )  # fmt: skip
            parts = (found.gpu, found.parameters, found.gradients, found.optimizer, found.buffers, found.activations,
                     found.head, found.host)  # fmt: skip
            fits = "*" if found.gpu < gpu_bytes else ""
            numbers = " ".join(f"{part / 1e9:7.1f}" for part in parts)
            print(f"{_in_words(split):<34} {'full' if recompute else 'none':<10} {numbers} {fits}".rstrip())


def _splits(row: ModelRow, gpus: int, fp8: bool) -> Iterator[Split]:
    """Splits worth considering: each way by itself, tensor parallelism within a node, both together. Tensor parallelism
    is that of sequences too, which ``fp8`` rules out.
    """
    for zero in (1, 2, 3):
        yield Split(gpus=gpus, zero_stage=zero, fp8=fp8)
    for zero in (1, 2):
        yield Split(gpus=gpus, zero_stage=zero, offload=True, fp8=fp8)
    sizes = [size for size in (2, 4, 8) if size <= gpus and gpus % size == 0]
    for size in sizes:
        if row.heads % size == 0 and row.ffn % size == 0:
            yield Split(gpus=gpus, tensor=size, sequence_parallel=not fp8, fp8=fp8)
    for size in sizes:
        if size <= row.layers:
            yield Split(gpus=gpus, pipeline=size, fp8=fp8)
    if gpus % 4 == 0 and row.heads % 2 == 0:
        yield Split(gpus=gpus, tensor=2, pipeline=2, sequence_parallel=not fp8, fp8=fp8)


def _in_words(split: Split) -> str:
    words = [f"ZeRO {split.zero_stage}" + (" offload" if split.offload else "")]
    for name, size in (("DP", split.data), ("TP", split.tensor), ("PP", split.pipeline)):
        words += [f"{name} {size}"] if size > 1 else []
    return ", ".join(words)
