"""Wrong data on one rank must not leave the other ranks waiting inside a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron.errors import UserError
from megatron.objectives.base import Batch
from megatron.trace_shares import DATA


class LockstepBatches(Iterator[Batch]):
    """``batches``, with a batch of weight 0 standing in from the first UserError on, which ``error`` keeps.

    The rank that found it finishes the step with everybody, and the ranks then agree on the error. Asking them before
    the step instead would mean having all its micro-batches at hand, and a device that waits for the loader.
    """

    def __init__(self, batches: Iterator[Batch], micro_batch_size: int, seq_length: int) -> None:
        self.error: UserError | None = None
        self._batches = batches
        self._shape = (micro_batch_size, seq_length)
        self._mask: Tensor | None = None  # the last batch's attention mask

    def __next__(self) -> Batch:
        if self.error is None:
            try:
                with record_function(DATA):
                    batch = next(self._batches)
                self._mask = batch.attention_mask
                return batch
            except UserError as error:
                self.error = error
        return self._stand_in()

    def _stand_in(self) -> Batch:
        rows, length = self._shape
        tokens = torch.zeros(self._shape, dtype=torch.int64)  # [b, s]
        return Batch(
            inputs=tokens,
            targets=tokens,
            weights=torch.zeros(self._shape),
            positions=torch.arange(length).repeat(rows, 1),
            counted=torch.zeros(rows),
            sample_ids=torch.full((rows,), -1),
            # A pipeline's stages expect tensors like those before: one document, or all visible.
            attention_mask=None if self._mask is None else self._mask.new_ones(rows, *self._mask.shape[1:]),
        )
