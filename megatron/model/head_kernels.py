"""Kernels of our own for the head and its loss, in Triton (see ``kernels``).

- ``softmax_terms``: the compiler's code reads logits twice from memory, and writes to other memory.
- ``narrow_head``: where hidden states are narrow, multiplying logits anew is faster than storing and loading them.

Both are called, not compiled: whoever calls them has the plain code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.model.kernels import TRITON, takes

if TRITON:
    import triton
    import triton.language as tl

ALIGNMENT = 8
"""Logits at whose multiples rows start, so that loads are wide."""

def has_softmax_terms(logits: Tensor) -> bool:
    """Whether :func:`softmax_terms` takes these logits [n, c]."""
    return takes(logits) and logits.is_contiguous() and logits.shape[1] % ALIGNMENT == 0


def softmax_terms(logits: Tensor, targets: Tensor, weights: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What :func:`megatron.model.cross_entropy.chunk_terms` says of the same arguments: nll [n] fp32, and softmax *
    weight [n, c], which here takes the place of the logits. ``weights`` are fp32."""
    rows, columns = logits.shape
    nll = torch.empty_like(weights)
    # A program reads its row twice, the second time from the GPU's cache if few rows are under way: two rows of 50,304
    # a processor are 26 MB of the 50 that an H100's holds. Three were slower, one too.
    programs = min(rows, 2 * torch.cuda.get_device_properties(logits.device).multi_processor_count)
    _softmax_kernel[(programs,)](
        logits, targets, weights, nll, rows, columns // ALIGNMENT, num_tokens, ALIGNMENT, 8192, num_warps=16
    )
    return nll, logits


@dataclass(frozen=True)
class _Tiles:
    """Sizes with which the kernels of ``narrow_head`` were fastest on an H100, for widths up to ``width``: rows and
    columns of a tile of logits and warps, of one that makes the gradient of hidden and one that makes the head's."""

    width: int
    by_rows: tuple[int, int, int]
    by_columns: tuple[int, int, int]

    @property
    def shared_memory(self) -> int:
        """Bytes that a processor holds of the factors (three tiles of the one that the loop is over), and some more."""
        (rows, columns, _), (inner_rows, inner_columns, _) = self.by_rows, self.by_columns
        return 2 * self.width * max(rows + 3 * columns, 3 * inner_rows + inner_columns) + 2**14


_TILES = (_Tiles(128, (64, 128, 4), (64, 64, 4)), _Tiles(256, (128, 64, 8), (64, 128, 8)))


def narrow_head(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """nll [n] fp32 of hidden [n, h] times the head [V, h], and the gradients of ``sum(nll * weights)``: hidden's in its
    dtype, the head's in fp32. None where the plain code is to be used: wide or not half precision.

    Logits never leave the processor: one kernel goes over the vocabulary for each few rows of hidden as attention goes
    over keys (Dao et al., arXiv 2205.14135, algorithm 1), and makes nll and the gradient of hidden; another goes over
    all rows for each few rows of the head. ``weights`` are fp32, ``targets`` below V; of one that is no token nll is
    infinite.
    """
    (rows, width), vocabulary = hidden.shape, len(head)
    if not (takes(hidden) and hidden.dtype == head.dtype != torch.float32 and width % ALIGNMENT == 0):
        return None
    if not (hidden.is_contiguous() and head.is_contiguous() and max(hidden.numel(), head.numel()) < 2**31):
        return None
    properties = torch.cuda.get_device_properties(hidden.device)
    tiles = next((tiles for tiles in _TILES if width <= tiles.width), None)
    if tiles is None or getattr(properties, "shared_memory_per_block_optin", 0) < tiles.shared_memory:
        return None
    nll, normalizers = torch.empty_like(weights), torch.empty_like(weights)
    grad_hidden = torch.empty_like(hidden)
    grad_head = torch.empty(vocabulary, width, dtype=torch.float32, device=head.device)
    block = max(16, triton.next_power_of_2(width))  # the least that is multiplied
    at, of, warps = tiles.by_rows
    _head_by_rows_kernel[(triton.cdiv(rows, at),)](
        hidden, head, targets, weights, nll, normalizers, grad_hidden, rows, num_tokens, width, block, at, of,
        num_warps=warps,
    )  # fmt: skip
    at, of, warps = tiles.by_columns
    _head_by_columns_kernel[(triton.cdiv(vocabulary, of),)](
        hidden, head, targets, weights, nll, normalizers, grad_head, rows, num_tokens, vocabulary, width, block, at, of,
        num_warps=warps,
    )  # fmt: skip
    return nll, grad_hidden, grad_head


if TRITON:

    @triton.jit
    def _softmax_kernel(  # type: ignore[no-untyped-def]
        logits, targets, weights, nll, rows, groups, tokens, alignment: tl.constexpr, block: tl.constexpr
    ):
        """Rows ``program_id(0)``, and on in steps of the number of programs. Exponentials are powers of two.

        Each thread has maxima of its own until the row's end: one for all would be agreed on in every round.
        """
        log2_e: tl.constexpr = 1.4426950408889634
        groups_of_block: tl.constexpr = block // alignment
        offset = tl.arange(0, groups_of_block)[:, None] * alignment + tl.arange(0, alignment)[None, :]
        columns = groups * alignment
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            at = logits + tl.cast(row, tl.int64) * groups * alignment
            target = tl.load(targets + row)
            logit = tl.load(at + target, target < tokens, -float("inf")).to(tl.float32)
            weight = tl.load(weights + row)
            top = tl.full((groups_of_block,), -3e38, tl.float32)  # finite: a group may have no token
            total = tl.zeros((groups_of_block,), tl.float32)
            for start in range(0, tokens, block):
                column = start + offset
                x = tl.load(at + column, column < tokens, -float("inf")).to(tl.float32) * log2_e
                higher = tl.maximum(top, tl.max(x, 1))
                total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
                top = higher
            highest = tl.max(top, 0)
            normalizer = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
            tl.store(nll + row, normalizer / log2_e - logit)
            tl.debug_barrier()  # every thread has read the target's logit
            for start in range(0, columns, block):
                column = start + offset
                x = tl.load(at + column, column < tokens, -float("inf")).to(tl.float32) * log2_e
                p = tl.exp2(x - normalizer) * weight
                tl.store(at + column, p.to(logits.dtype.element_ty), column < columns)

    @triton.jit
    def _add_tile(  # type: ignore[no-untyped-def]
        x, head, target, column, tokens, top, total, mean, width: tl.constexpr, block: tl.constexpr, last: tl.constexpr
    ):
        """Take ids ``column`` in: the largest logit, the sum of exponentials, and the head's rows weighted by them and
        added up, without the target's."""
        log2_e: tl.constexpr = 1.4426950408889634
        feature = tl.arange(0, block)
        inside = (feature < width)[None, :]
        if last:
            inside = inside & (column < tokens)[:, None]
        w = tl.load(head + column[:, None] * width + feature[None, :], inside, 0.0)
        logits = tl.dot(x, tl.trans(w))
        if last:
            logits = tl.where((column < tokens)[None, :], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1) * log2_e)
        p = tl.exp2(logits * log2_e - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        p = tl.where(target[:, None] == column[None, :], 0.0, p)
        return higher, total, tl.dot(p.to(w.dtype), w, mean * shrink[:, None])

    @triton.jit
    def _head_by_rows_kernel(  # type: ignore[no-untyped-def]
        hidden, head, targets, weights, nll, normalizers, grad_hidden, rows, tokens,
        width: tl.constexpr, block: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr,
    ):
        """nll and the gradient of hidden for ``row_block`` rows."""
        log2_e: tl.constexpr = 1.4426950408889634
        row = tl.program_id(0) * row_block + tl.arange(0, row_block)
        feature = tl.arange(0, block)
        inside = (row < rows)[:, None] & (feature < width)[None, :]
        at = row[:, None] * width + feature[None, :]
        x = tl.load(hidden + at, inside, 0.0)
        target = tl.load(targets + row, row < rows, 0).to(tl.int32)
        top = tl.full((row_block,), -float("inf"), tl.float32)
        total = tl.zeros((row_block,), tl.float32)
        mean = tl.zeros((row_block, block), tl.float32)
        column = tl.arange(0, column_block)
        whole = tokens // column_block * column_block
        for start in tl.range(0, whole, column_block, num_stages=3):
            top, total, mean = _add_tile(
                x, head, target, start + column, tokens, top, total, mean, width, block, False
            )
        if whole < tokens:
            top, total, mean = _add_tile(x, head, target, whole + column, tokens, top, total, mean, width, block, True)
        normalizer = top + tl.log2(total)
        w = tl.load(head + target[:, None] * width + feature[None, :], inside, 0.0).to(tl.float32)
        logit = tl.where(target < tokens, tl.sum(x.to(tl.float32) * w, 1), -float("inf"))
        loss = normalizer / log2_e - logit
        loss = tl.where(loss < 0.0, 0.0, loss)  # by rounding; NaN stays
        weight = tl.load(weights + row, row < rows, 0.0)
        # The target's row of the head counts by what its probability lacks to 1, which nll says without cancellation.
        grad = (mean / total[:, None] + (tl.exp2(-loss * log2_e) - 1)[:, None] * w) * weight[:, None]
        tl.store(nll + row, loss, row < rows)
        tl.store(normalizers + row, normalizer, row < rows)
        tl.store(grad_hidden + at, grad.to(grad_hidden.dtype.element_ty), inside)

    @triton.jit
    def _head_by_columns_kernel(  # type: ignore[no-untyped-def]
        hidden, head, targets, weights, nll, normalizers, grad_head, rows, tokens, vocabulary,
        width: tl.constexpr, block: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr,
    ):
        """The gradient of ``column_block`` rows of the head."""
        log2_e: tl.constexpr = 1.4426950408889634
        column = tl.program_id(0) * column_block + tl.arange(0, column_block)
        feature = tl.arange(0, block)
        at = column[:, None] * width + feature[None, :]
        w = tl.load(head + at, (column < tokens)[:, None] & (feature < width)[None, :], 0.0)
        total = tl.zeros((column_block, block), tl.float32)
        for start in tl.range(0, rows, row_block, num_stages=3):
            row = start + tl.arange(0, row_block)
            inside = row < rows
            x = tl.load(
                hidden + row[:, None] * width + feature[None, :], inside[:, None] & (feature < width)[None, :], 0.0
            )
            normalizer = tl.load(normalizers + row, inside, 0.0)
            weight = tl.load(weights + row, inside, 0.0)
            target = tl.load(targets + row, inside, -1).to(tl.int32)
            missing = (tl.exp2(-tl.load(nll + row, inside, 0.0) * log2_e) - 1) * weight
            p = tl.exp2(tl.dot(w, tl.trans(x)) * log2_e - normalizer[None, :]) * weight[None, :]
            p = tl.where(target[None, :] == column[:, None], missing[None, :], p)
            total = tl.dot(p.to(x.dtype), x, total)
        total = tl.where((column < tokens)[:, None], total, 0.0)
        tl.store(grad_head + at, total, (column < vocabulary)[:, None] & (feature < width)[None, :])
