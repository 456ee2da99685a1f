"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34), in the "rotate halves" layout of Megatron and Llama.

Feature i of a head is paired with feature i + head_size/2, and the pair is rotated by position * theta^(-2i /
head_size). Angles come from the positions of the batch, not from the place in the sequence, so tokens may be permuted
or restart at each document. Nothing here is stored in a checkpoint.

In code compiled for a GPU, the gradients of queries, keys and values are rotated back and put side by side by one
kernel that reads and writes every number once (docs/performance.md). Code that is not compiled needs no Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl

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
    if TRITON and heads.is_cuda and heads.dtype != torch.float64 and torch.compiler.is_compiling():
        out: Heads = _SplitHeads.apply(heads, query, key, table)
        return out
    return _split_heads(heads, query, key, table)


def _split_heads(heads: Tensor, query: int, key: int, table: Tensor) -> Heads:
    # Queries and keys stand next to each other and turn by the same angles: one call for both.
    both, value = heads.split((query + key, key), dim=2)
    return *rotate(both, table).split((query, key), dim=2), value


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, query: int, key: int, table: Tensor) -> Heads:
        ctx.save_for_backward(table)
        return _split_heads(heads, query, key, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        return torch.ops.megatron.split_heads_gradient(*grads, table), None, None, None


if TRITON:

    @triton.jit
    def _turn_back(  # type: ignore[no-untyped-def]
        grad, out, cos, sin, head, feature, stride, count: tl.constexpr, half: tl.constexpr
    ):
        """Gradient of the heads of one position before their rotation."""
        inside = (head[:, None] < count) & (feature[None, :] < half)
        at = grad + head[:, None] * stride + feature[None, :]
        first = tl.load(at, inside).to(tl.float32)
        second = tl.load(at + half, inside).to(tl.float32)
        to = out + head[:, None] * (2 * half) + feature[None, :]
        tl.store(to, (first * cos + second * sin).to(out.dtype.element_ty), inside)
        tl.store(to + half, (second * cos - first * sin).to(out.dtype.element_ty), inside)

    @triton.jit
    def _split_heads_gradient_kernel(  # type: ignore[no-untyped-def]
        query, key, value, table, out, length,
        query_row, query_place, query_head, key_row, key_place, key_head, value_row, value_place, value_head,
        queries: tl.constexpr, keys: tl.constexpr, half: tl.constexpr,
        query_block: tl.constexpr, key_block: tl.constexpr, half_block: tl.constexpr, size_block: tl.constexpr,
    ):
        """One position: its queries and keys turned back, its values copied."""
        position = tl.program_id(0).to(tl.int64)
        row, place = position // length, position % length
        feature = tl.arange(0, half_block)
        cos = tl.load(table + position * (2 * half) + feature, feature < half)[None, :]
        sin = tl.load(table + position * (2 * half) + half + feature, feature < half)[None, :]
        out += position * ((queries + 2 * keys) * (2 * half))
        head = tl.arange(0, query_block)
        query += row * query_row + place * query_place
        _turn_back(query, out, cos, sin, head, feature, query_head, queries, half)
        out += queries * (2 * half)
        head = tl.arange(0, key_block)
        key += row * key_row + place * key_place
        _turn_back(key, out, cos, sin, head, feature, key_head, keys, half)
        out += keys * (2 * half)
        whole = tl.arange(0, size_block)
        inside = (head[:, None] < keys) & (whole[None, :] < 2 * half)
        at = value + row * value_row + place * value_place + head[:, None] * value_head + whole[None, :]
        tl.store(out + head[:, None] * (2 * half) + whole[None, :], tl.load(at, inside), inside)

    @torch.library.triton_op("megatron::split_heads_gradient", mutates_args=())
    def _split_heads_gradient(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        """Gradient of ``split_heads``' heads [b, s, q + 2 kv, head_size] from those of its results."""
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        table = table.contiguous()
        batch, length, queries, size = query.shape
        keys = key.shape[2]
        out = query.new_empty(batch, length, queries + 2 * keys, size)
        blocks = (triton.next_power_of_2(n) for n in (queries, keys, size // 2, size))
        torch.library.wrap_triton(_split_heads_gradient_kernel)[(batch * length,)](
            query, key, value, table, out, length,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], queries, keys, size // 2, *blocks,
        )
        return out
