"""Attention masks: from what a batch says to what attention computes with.

A batch brings document numbers [b, s], or what is visible [b, 1, s, s] (``objectives.base.Batch.attention_mask``). Once
a micro-batch, not once a block, that becomes one of two forms:

- a :class:`BlockMask` for FlexAttention (Dong et al., arXiv 2412.05496), compiled into the block: it skips tiles of
  128 x 128 in which everything is hidden, and asks the mask itself only in tiles that are cut;
- a dense mask [b, 1, s, s] for SDPA, which computes every pair and reads a value for each: everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Mask = Tensor | BlockMask
"""What attention computes with: dense [b, 1, s, s] bool, or FlexAttention's."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key), int scalars -> bool scalar: may this query attend to this key?"""

BlockMaskMaker = Callable[..., BlockMask]
"""``create_block_mask``, compiled or not."""

TILE = 128
"""FlexAttention's tiles; shorter sequences take another of its kernels, and gain nothing by it."""

HEAD_SIZES = range(16, 257)
"""Head sizes that FlexAttention's kernels take."""


def flex_obstacle(
    *, compiled: bool, device: torch.device, dtype: torch.dtype, head_size: int, length: int, dropout: float
) -> str | None:
    """Why a mask cannot go through FlexAttention, in words; None if it can. ``length`` of sequences, in tokens."""
    if device.type != "cuda" or not compiled:
        return "FlexAttention needs a GPU and --compile"
    if dropout > 0:
        return "FlexAttention has no dropout"
    if dtype not in (torch.bfloat16, torch.float16):
        return "FlexAttention is used in half precision"
    if head_size not in HEAD_SIZES:
        return f"FlexAttention takes heads of {HEAD_SIZES.start} to {HEAD_SIZES.stop - 1} features"
    if length < TILE:
        return f"FlexAttention is used from {TILE} positions on"
    return None


def dense_mask(mask: Tensor, causal: bool) -> Tensor:
    """[b, 1, s, s] bool, True where the query (dim 2) may attend to the key (dim 3).

    ``mask`` holds document numbers [b, s], and the mask is block-diagonal, lower triangular too if ``causal``; or it is
    already the result, which then says itself what of the future is visible.
    """
    if mask.dim() != 2:
        return mask
    same = mask[:, None, :, None] == mask[:, None, None, :]  # [b, 1, s, s]
    return same.tril_() if causal else same


def block_mask(mask: Tensor, causal: bool, make: BlockMaskMaker = create_block_mask) -> BlockMask:
    """What :func:`dense_mask` says of the same arguments, for FlexAttention."""
    length = mask.shape[-1]
    return make(_mask_mod(mask, causal), len(mask), None, length, length, device=mask.device)


def _mask_mod(mask: Tensor, causal: bool) -> MaskMod:
    """``mask`` pair by pair. A compiled block knows these functions by their code, so new tensors compile nothing."""

    def in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row, query] == mask[row, key]

    def in_past_of_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (mask[row, query] == mask[row, key]) & (query >= key)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row, 0, query, key]

    if mask.dim() != 2:
        return visible
    return in_past_of_document if causal else in_document
