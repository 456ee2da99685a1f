"""What stands in for a batch that cannot be read has the form of the batches before it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron.data.lockstep import LockstepBatches
from megatron.errors import UserError
from megatron.objectives.base import Batch


def two_batches(mask: Tensor | None) -> Iterator[Batch]:
    """One batch of three rows of four tokens, then a defect."""
    whole = torch.ones(3, 4, dtype=torch.int64)
    yield Batch(whole, whole, torch.ones(3, 4), whole, torch.full((3,), 4.0), torch.arange(3), mask)
    raise UserError("data.bin is too short")


@pytest.mark.parametrize("mask", [
    None,
    torch.tensor([[0, 0, 1, 2]] * 3, dtype=torch.int32),
    torch.zeros(3, 1, 4, 4, dtype=torch.bool),
], ids=["none", "documents", "bool"])  # fmt: skip
def test_stand_in(mask: Tensor | None) -> None:
    batches = LockstepBatches(two_batches(mask), 3, 4)
    first, second, third = (next(batches) for _ in range(3))
    assert batches.error is not None and "data.bin" in str(batches.error)
    for batch in (second, third):
        assert batch.weights.abs().sum() == 0 and batch.counted.sum() == 0
        for name in ("inputs", "targets", "weights", "positions", "counted", "sample_ids", "attention_mask"):
            one, other = getattr(first, name), getattr(batch, name)
            assert (one is None) == (other is None), name
            assert one is None or (one.shape, one.dtype) == (other.shape, other.dtype), name
        # Every position sees something, itself at least: a softmax over nothing would be NaN.
        assert batch.attention_mask is None or (batch.attention_mask == 1).all()
