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
    from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 8
"""Numbers at whose multiples rows start, so that loads are wide."""


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
        logits, targets, weights, nll, rows, columns // ALIGNMENT, num_tokens, ALIGNMENT, 4096, 4, num_warps=16
    )
    return nll, logits


@dataclass(frozen=True)
class _Tiles:
    """Rows and columns of a tile of logits, warps, and tiles of the other factor under way: of the kernel that makes
    the gradient of hidden and of the one that makes the head's, with which they were fastest on an H200."""

    by_rows: tuple[int, int, int, int]
    by_columns: tuple[int, int, int, int]

    def shared_memory(self, width: int) -> int:
        """Bytes that a processor holds of the factors, ``width`` wide, and some more."""
        (rows, columns, _, ahead), (inner_rows, inner_columns, _, inner_ahead) = self.by_rows, self.by_columns
        return 2 * width * max(rows + ahead * columns, inner_ahead * inner_rows + inner_columns) + 2**14


_TILES = {
    128: _Tiles((64, 128, 4, 3), (64, 64, 4, 3)),
    224: _Tiles((64, 64, 4, 3), (64, 64, 4, 3)),
    256: _Tiles((128, 64, 8, 3), (64, 128, 8, 3)),
    288: _Tiles((128, 64, 8, 3), (64, 64, 4, 2)),
    320: _Tiles((128, 64, 8, 3), (64, 128, 8, 3)),
}
"""By the widest hidden states that they are for."""
MOST_PARTS = 3


def parts_of(width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Into parts of how many columns hidden states of ``width`` are cut to be multiplied, and to how many columns zeros
    fill each part up: powers of two, which factors of products must be. Up to 128 columns stay together, and all do
    where parts would not be fewer columns."""
    filled, rest = _power_of_two(width), width
    sizes: list[int] = []
    while rest > 128 or (sizes and rest):
        sizes.append(rest if len(sizes) == MOST_PARTS - 1 else min(256, 1 << (rest.bit_length() - 1)))
        rest -= sizes[-1]
    parts = tuple(_power_of_two(size) for size in sizes)
    return (tuple(sizes), parts) if sizes and sum(parts) < filled else ((width,), (filled,))


def _power_of_two(size: int) -> int:
    """The least that is not below ``size``, nor below the 16 columns of the smallest product."""
    return max(16, 1 << (size - 1).bit_length())


_LARGEST_TOTAL = {torch.bfloat16: 2.0**96, torch.float16: 2.0**15}
"""A row's sum of exponentials, of which the first tile's largest is 1, below which none of it has overflown."""


def narrow_head(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """nll [n] fp32 of hidden [n, h] times the head [V, h], and the gradients of ``sum(nll * weights)``: hidden's in its
    dtype, the head's in fp32. None where the plain code is to be used: wide, not half precision, before Hopper.

    Logits never leave the processor: one kernel goes over the vocabulary for each few rows of hidden as attention goes
    over keys (Dao et al., arXiv 2205.14135, algorithm 1), and makes nll and the gradient of hidden; another goes over
    all rows for each few rows of the head. ``weights`` are fp32 and not negative, ``targets`` below V; of one that is
    no token nll is infinite.
    """
    (rows, width), vocabulary = hidden.shape, len(head)
    if not (takes(hidden) and hidden.dtype == head.dtype != torch.float32 and width % ALIGNMENT == 0):
        return None
    if not (hidden.is_contiguous() and head.is_contiguous() and max(hidden.numel(), head.numel()) < 2**31):
        return None
    if hidden.data_ptr() % 16 or head.data_ptr() % 16:  # TMA cannot start there
        return None
    properties = torch.cuda.get_device_properties(hidden.device)
    if properties.major < 9:  # without TMA, Triton 3.6 makes code for these kernels that keeps its numbers in memory
        return None
    tiles = next((tiles for widest, tiles in _TILES.items() if width <= widest), None)
    if tiles is None:
        return None
    sizes, parts = parts_of(width)
    if getattr(properties, "shared_memory_per_block_optin", 0) < tiles.shared_memory(sum(parts)):
        return None
    nll, normalizers, lacking = (torch.empty_like(weights) for _ in range(3))
    grad_hidden = torch.empty_like(hidden)
    grad_head = torch.empty(vocabulary, width, dtype=torch.float32, device=head.device)
    at, of, warps, ahead = tiles.by_rows
    has_target, count = _tiles_with_targets(targets, vocabulary, at, of)
    overflown = torch.empty(triton.cdiv(rows, at), dtype=torch.uint8, device=hidden.device)
    for again in (False, True):
        _head_by_rows_kernel[(len(overflown),)](
            hidden, head, *_tiles_of(head, of, parts), targets, weights, has_target, overflown, nll, normalizers,
            lacking, grad_hidden, rows, num_tokens, count, _LARGEST_TOTAL[hidden.dtype], width, sizes, parts, at, of,
            ahead, again, num_warps=warps,
        )  # fmt: skip
    at, of, warps, ahead = tiles.by_columns
    has_target, count = _tiles_with_targets(targets, vocabulary, at, of)
    _head_by_columns_kernel[(triton.cdiv(vocabulary, of),)](
        head, *_tiles_of(hidden, at, parts), targets, has_target, normalizers, lacking, grad_head, rows, num_tokens,
        vocabulary, count, width, sizes, parts, at, of, ahead, num_warps=warps,
    )  # fmt: skip
    return nll, grad_hidden, grad_head


def _tiles_of(x: Tensor, rows: int, parts: tuple[int, ...]) -> list[TensorDescriptor | None]:
    """What copies ``rows`` of x [n, h] at once, ``MOST_PARTS`` in number: for each part as many columns, or None."""
    found = [TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, part]) for part in parts]
    return found + [None] * (MOST_PARTS - len(parts))


def _tiles_with_targets(targets: Tensor, vocabulary: int, rows: int, columns: int) -> tuple[Tensor, int]:
    """Of logits cut into tiles, whether each holds a target (uint8, tiles of the first rows first), and how many tiles
    lie side by side: most hold none, and need not look for it number by number."""
    count = triton.cdiv(vocabulary, columns)
    found = torch.zeros(triton.cdiv(len(targets), rows) * count, dtype=torch.uint8, device=targets.device)
    row = torch.arange(len(targets), device=targets.device)
    return found.index_fill_(0, row // rows * count + targets // columns, 1), count


if TRITON:

    @triton.jit
    def _some_logits(at, column, columns, tokens, last: tl.constexpr):  # type: ignore[no-untyped-def]
        """Logits ``column`` of the row ``at``, -inf where there is no token. Loads are wide only if all of a group of
        columns is loaded or none."""
        if last:
            x = tl.load(at + column, column < columns, -float("inf")).to(tl.float32)
            return tl.where(column < tokens, x, -float("inf"))
        return tl.load(at + column).to(tl.float32)

    @triton.jit
    def _take_in(x, top, total):  # type: ignore[no-untyped-def]
        """The largest logit of each thread and the sum of exponentials below it, with ``x``."""
        log2_e: tl.constexpr = 1.4426950408889634
        higher = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x * log2_e - (higher * log2_e)[:, None])
        return higher, total * tl.exp2((top - higher) * log2_e) + tl.sum(p, 1)

    @triton.jit
    def _softmax_kernel(  # type: ignore[no-untyped-def]
        logits, targets, weights, nll, rows, groups, tokens, alignment: tl.constexpr, block: tl.constexpr,
        ahead: tl.constexpr,
    ):
        """Rows ``program_id(0)``, and on in steps of the number of programs. Exponentials are powers of two.

        Each thread has maxima of its own until the row's end: one for all would be agreed on in every round.
        """
        log2_e: tl.constexpr = 1.4426950408889634
        groups_of_block: tl.constexpr = block // alignment
        offset = tl.arange(0, groups_of_block)[:, None] * alignment + tl.arange(0, alignment)[None, :]
        columns = groups * alignment
        whole = tokens // block * block
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            at = logits + tl.cast(row, tl.int64) * groups * alignment
            target = tl.load(targets + row)
            logit = tl.load(at + target, target < tokens, -float("inf")).to(tl.float32)
            weight = tl.load(weights + row)
            top = tl.full((groups_of_block,), -1e38, tl.float32)  # finite: a group may have no token
            total = tl.zeros((groups_of_block,), tl.float32)
            for start in tl.range(0, whole, block, num_stages=ahead):
                top, total = _take_in(_some_logits(at, start + offset, columns, tokens, False), top, total)
            if whole < tokens:
                top, total = _take_in(_some_logits(at, whole + offset, columns, tokens, True), top, total)
            highest = tl.max(top, 0)
            normalizer = highest * log2_e + tl.log2(tl.sum(total * tl.exp2((top - highest) * log2_e), 0))
            tl.store(nll + row, normalizer / log2_e - logit)
            tl.debug_barrier()  # every thread has read the target's logit
            for start in tl.range(0, whole, block, num_stages=ahead):
                x = _some_logits(at, start + offset, columns, tokens, False)
                p = tl.exp2(x * log2_e - normalizer) * weight
                tl.store(at + start + offset, p.to(logits.dtype.element_ty))
            if whole < columns:
                x = _some_logits(at, whole + offset, columns, tokens, True)
                p = tl.exp2(x * log2_e - normalizer) * weight
                tl.store(at + whole + offset, p.to(logits.dtype.element_ty), whole + offset < columns)

    @triton.jit
    def _load_parts(  # type: ignore[no-untyped-def]
        at, inside, sizes: tl.constexpr, parts: tl.constexpr
    ):
        """The rows that begin at ``at``, if they are ``inside``, cut into matrices of ``sizes`` columns, filled up to
        ``parts``."""
        out = ()
        for part in tl.static_range(len(parts)):
            feature = tl.arange(0, parts[part])[None, :]
            within = inside[:, None] & (feature < sizes[part])
            out = out + (tl.load(at[:, None] + feature, within, 0.0),)  # type: ignore[assignment]
            at += sizes[part]
        return out

    @triton.jit
    def _copy_parts(first, second, third, row, sizes: tl.constexpr):  # type: ignore[no-untyped-def]
        """The same of rows ``row`` and following, by TMA, which needs no registers for addresses."""
        out = (first.load([row, 0]),)
        if len(sizes) > 1:
            out = out + (second.load([row, sizes[0]]),)  # type: ignore[assignment]
        if len(sizes) > 2:
            out = out + (third.load([row, sizes[0] + sizes[1]]),)  # type: ignore[assignment]
        return out

    @triton.jit
    def _product(x, w):  # type: ignore[no-untyped-def]
        """x w^T, both in parts."""
        out = tl.dot(x[0], tl.trans(w[0]))
        for part in tl.static_range(1, len(x)):
            out = tl.dot(x[part], tl.trans(w[part]), out)
        return out

    @triton.jit
    def _add_products(p, w, total):  # type: ignore[no-untyped-def]
        """total + p w, in parts."""
        out = ()
        for part in tl.static_range(len(w)):
            out = out + (tl.dot(p, w[part], total[part]),)  # type: ignore[assignment]
        return out

    @triton.jit
    def _zeros(rows: tl.constexpr, parts: tl.constexpr):  # type: ignore[no-untyped-def]
        out = ()
        for part in tl.static_range(len(parts)):
            out = out + (tl.full((rows, parts[part]), 0.0, tl.float32),)  # type: ignore[assignment]
        return out

    @triton.jit
    def _tile_of_logits(  # type: ignore[no-untyped-def]
        x, first, second, third, start, tokens, sizes: tl.constexpr, column_block: tl.constexpr, some: tl.constexpr
    ):
        """Rows ``start`` and following of the head, and their products with x; -inf, if there are ``some``, at ids that
        are none."""
        w = _copy_parts(first, second, third, start, sizes)
        logits = _product(x, w)
        if some:
            logits = tl.where((start + tl.arange(0, column_block) < tokens)[None, :], logits, -float("inf"))
        return w, logits

    @triton.jit
    def _add_tile(  # type: ignore[no-untyped-def]
        x, first, second, third, target, has_target, start, tokens, top, total, mean,
        sizes: tl.constexpr, column_block: tl.constexpr, last: tl.constexpr,
    ):
        """Take ids ``start`` and following in: the sum of exponentials, and the head's rows weighted by them and added
        up, without the target's."""
        log2_e: tl.constexpr = 1.4426950408889634
        hit = tl.load(has_target + start // column_block)
        column = tl.arange(0, column_block)
        w, logits = _tile_of_logits(x, first, second, third, start, tokens, sizes, column_block, last)
        p = tl.exp2(logits * log2_e - top[:, None])
        total += tl.sum(p, 1)
        if hit:
            p = tl.where((target - start)[:, None] == column[None, :], 0.0, p)
        return total, _add_products(p.to(w[0].dtype), w, mean)

    @triton.jit
    def _head_by_rows_kernel(  # type: ignore[no-untyped-def]
        hidden, head, first, second, third, targets, weights, has_target, overflown, nll, normalizers, lacking,
        grad_hidden, rows, tokens, count, largest: tl.constexpr, width: tl.constexpr, sizes: tl.constexpr,
        parts: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr, ahead: tl.constexpr,
        again: tl.constexpr,
    ):
        """nll and the gradient of hidden for ``row_block`` rows; ``again``, only where it was ``overflown``."""
        log2_e: tl.constexpr = 1.4426950408889634
        if again:  # noqa: SIM102  (decided when this is compiled)
            if tl.load(overflown + tl.program_id(0)) == 0:
                return
        row = tl.program_id(0) * row_block + tl.arange(0, row_block)
        inside = row < rows
        x = _load_parts(hidden + row * width, inside, sizes, parts)
        target = tl.load(targets + row, inside, 0).to(tl.int32)
        has_target += tl.program_id(0) * count
        # Exponentials are of what a logit is above the first tile's largest: a maximum that is kept up to date in every
        # tile, and what was added up before it scaled to it, takes as long as the products. Where some logits are too
        # far above, all is done once more with the largest of all.
        w, logits = _tile_of_logits(x, first, second, third, 0, tokens, sizes, column_block, True)
        top = tl.max(logits, 1)
        if again:
            for start in tl.range(column_block, tokens, column_block, num_stages=ahead):
                w, logits = _tile_of_logits(x, first, second, third, start, tokens, sizes, column_block, True)
                top = tl.maximum(top, tl.max(logits, 1))
        top *= log2_e
        total = tl.zeros((row_block,), tl.float32)
        mean = _zeros(row_block, parts)
        whole = tokens // column_block * column_block
        for start in tl.range(0, whole, column_block, num_stages=ahead):
            total, mean = _add_tile(
                x, first, second, third, target, has_target, start, tokens, top, total, mean, sizes, column_block, False
            )  # fmt: skip
        if whole < tokens:
            total, mean = _add_tile(
                x, first, second, third, target, has_target, whole, tokens, top, total, mean, sizes, column_block, True
            )  # fmt: skip
        if not again:
            tl.store(overflown + tl.program_id(0), tl.max((total < largest).to(tl.int32) ^ 1, 0))
        normalizer = top + tl.log2(total)
        w = _load_parts(head + target * width, inside, sizes, parts)
        logit = tl.zeros((row_block,), tl.float32)
        for part in tl.static_range(len(parts)):
            logit += tl.sum(x[part].to(tl.float32) * w[part].to(tl.float32), 1)
        logit = tl.where(target < tokens, logit, -float("inf"))
        loss = normalizer / log2_e - logit
        loss = tl.where(loss < 0.0, 0.0, loss)  # by rounding; NaN stays
        weight = tl.load(weights + row, inside, 0.0)
        # The target's row of the head counts by what its probability lacks to 1, which nll says without cancellation.
        lacks = (tl.exp2(-loss * log2_e) - 1) * weight
        tl.store(nll + row, loss, inside)
        tl.store(normalizers + row, normalizer - tl.log2(weight), inside)
        tl.store(lacking + row, lacks, inside)
        at = grad_hidden + row * width
        for part in tl.static_range(len(parts)):
            grad = mean[part] * (weight / total)[:, None] + lacks[:, None] * w[part].to(tl.float32)
            feature = tl.arange(0, parts[part])[None, :]
            within = inside[:, None] & (feature < sizes[part])
            tl.store(at[:, None] + feature, grad.to(grad_hidden.dtype.element_ty), within)
            at += sizes[part]

    @triton.jit
    def _add_rows(  # type: ignore[no-untyped-def]
        w, first, second, third, targets, has_target, normalizers, lacking, column, start, rows, total,
        sizes: tl.constexpr, row_block: tl.constexpr, last: tl.constexpr,
    ):
        """Take rows ``start`` and following in: hidden weighted by the gradients of the logits and added up."""
        log2_e: tl.constexpr = 1.4426950408889634
        hit = tl.load(has_target)
        row = start + tl.arange(0, row_block)
        x = _copy_parts(first, second, third, start, sizes)
        if last:
            normalizer = tl.load(normalizers + row, row < rows, float("inf"))
        else:
            normalizer = tl.load(normalizers + row)
        p = tl.exp2(_product(w, x) * log2_e - normalizer[None, :])
        if hit:
            target = tl.load(targets + row, row < rows, -1).to(tl.int32)
            lacks = tl.load(lacking + row, row < rows, 0.0)
            p = tl.where(target[None, :] == column[:, None], lacks[None, :], p)
        return _add_products(p.to(x[0].dtype), x, total)

    @triton.jit
    def _head_by_columns_kernel(  # type: ignore[no-untyped-def]
        head, first, second, third, targets, has_target, normalizers, lacking, grad_head, rows, tokens, vocabulary,
        count, width: tl.constexpr, sizes: tl.constexpr, parts: tl.constexpr, row_block: tl.constexpr,
        column_block: tl.constexpr, ahead: tl.constexpr,
    ):
        """The gradient of ``column_block`` rows of the head. ``normalizers`` have the rows' weights in them, and
        ``lacking`` is the gradient of the targets' logits."""
        column = tl.program_id(0) * column_block + tl.arange(0, column_block)
        w = _load_parts(head + column * width, column < tokens, sizes, parts)
        total = _zeros(column_block, parts)
        has_target += tl.program_id(0)
        whole = rows // row_block * row_block
        for start in tl.range(0, whole, row_block, num_stages=ahead):
            total = _add_rows(
                w, first, second, third, targets, has_target, normalizers, lacking, column, start, rows, total,
                sizes, row_block, False,
            )  # fmt: skip
            has_target += count
        if whole < rows:
            total = _add_rows(
                w, first, second, third, targets, has_target, normalizers, lacking, column, whole, rows, total,
                sizes, row_block, True,
            )  # fmt: skip
        at = grad_head + column * width
        for part in tl.static_range(len(parts)):
            feature = tl.arange(0, parts[part])[None, :]
            grad = tl.where((column < tokens)[:, None], total[part], 0.0)
            tl.store(at[:, None] + feature, grad, (column < vocabulary)[:, None] & (feature < sizes[part]))
            at += sizes[part]
