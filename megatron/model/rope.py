"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34), in the "rotate halves" layout of Megatron and Llama.

Feature i of a head is paired with feature i + head_size/2, and the pair is rotated by position * theta^(-2i /
head_size). Angles come from the positions of the batch, not from the place in the sequence, so tokens may be permuted
or restart at each document. Nothing here is stored in a checkpoint.

In code compiled for a GPU, kernels of our own (``kernels``) turn queries and keys in their place, beside the values, so
that nothing is kept twice. The gradients of all three are put side by side, turned back, or turned back in their place
where they already are (``flash_attention``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.model.kernels import in_compiled_code

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries [b, s, heads, head_size], keys and values [b, s, kv heads, head_size]."""


def rotary_table(positions: Tensor, head_size: int, theta: float) -> Tensor:
    """Cosines, then sines, of the rotation angles: positions [b, s] int64 -> [b, s, head_size] fp32.

    Always fp32: a bf16 angle is wrong by up to four radians at position 2048.
    """
    features = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (features / head_size)  # [head_size / 2]
    angles = positions.float().unsqueeze(-1) * frequencies  # [b, s, head_size / 2]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate every head of x [b, s, heads, head_size] by the angles of ``table`` [b, s, head_size]; keeps x's dtype.

    The products are formed in fp32 (or wider, as x is) and rounded once.
    """
    cos, sin = table.unsqueeze(2).chunk(2, dim=-1)  # each [b, s, 1, head_size / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def split_heads(heads: Tensor, counts: tuple[int, int], table: Tensor | None) -> Heads:
    """Queries, keys and values of ``heads`` [b, s, q + 2 kv, head_size], ``counts`` = (q, kv).

    With a ``table`` [b, s, head_size] queries and keys are rotated by its angles.
    """
    query, key = counts
    if table is None:
        return heads.split((query, key, key), dim=2)
    if in_compiled_code(heads):
        out: Heads = _SplitHeads.apply(heads, query, key, table)
        return out
    # Queries and keys stand next to each other and turn by the same angles: one call for both.
    both, value = heads.split((query + key, key), dim=2)
    return *rotate(both, table).split((query, key), dim=2), value


def turn_heads(heads: Tensor, count: int, table: Tensor | None) -> Tensor:
    """``heads`` [b, s, n, head_size], the first ``count`` rotated by the angles of ``table`` [b, s, head_size] if there
    is one."""
    if table is None:
        return heads
    if in_compiled_code(heads):
        out: Tensor = _TurnHeads.apply(heads, count, table)
        return out
    turning, others = heads.split((count, heads.shape[2] - count), dim=2)
    return torch.cat((rotate(turning, table), others), dim=2)


def _turned(heads: Tensor, count: int, table: Tensor, back: bool) -> Tensor:
    # The compiler leaves the copy out where nothing else reads the heads.
    turned = heads.clone(memory_format=torch.contiguous_format)
    torch.ops.megatron.rotate_heads_(turned, count, table, back)
    return turned


class _TurnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, count: int, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        ctx.count = count
        return _turned(heads, count, table, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _turned(grad, ctx.count, table, back=True), None, None


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, query: int, key: int, table: Tensor) -> Heads:
        ctx.save_for_backward(table)
        out: Heads = _turned(heads, query + key, table, back=False).split((query, key, key), dim=2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        return torch.ops.megatron.split_heads_gradient(*grads, table), None, None, None
