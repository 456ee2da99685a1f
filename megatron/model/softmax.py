"""What cross entropy needs of a chunk of logits, by one kernel in their own place (see ``cross_entropy``).

A program reads its row twice and writes it once; so few rows are under way at a time that the GPU's cache still has the
row when it is read again. What the compiler makes of :func:`megatron.model.cross_entropy.chunk_terms` reads the memory
twice, and writes to other memory (docs/performance.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl

ALIGNMENT = 8
"""Rows start at multiples of so many logits, so that loads are wide."""


def has_kernel(logits: Tensor) -> bool:
    """Whether :func:`softmax_terms` takes these logits [n, c]."""
    aligned = logits.is_contiguous() and logits.shape[1] % ALIGNMENT == 0
    return TRITON and logits.is_cuda and aligned and logits.dtype != torch.float64


def softmax_terms(logits: Tensor, targets: Tensor, weights: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What :func:`megatron.model.cross_entropy.chunk_terms` says of the same arguments: nll [n] fp32, and softmax *
    weight [n, c], which here takes the place of the logits. ``weights`` are fp32."""
    rows, columns = logits.shape
    nll = torch.empty_like(weights)
    # Two rows of 50,304 a processor are 26 MB of the 50 that an H100's cache holds; three were slower, one too.
    programs = min(rows, 2 * torch.cuda.get_device_properties(logits.device).multi_processor_count)
    _softmax_kernel[(programs,)](
        logits, targets, weights, nll, rows, columns // ALIGNMENT, num_tokens, ALIGNMENT, 8192, num_warps=8
    )
    return nll, logits


if TRITON:

    @triton.jit
    def _softmax_kernel(  # type: ignore[no-untyped-def]
        logits, targets, weights, nll, rows, groups, tokens, alignment: tl.constexpr, block: tl.constexpr
    ):
        """Rows ``program_id(0)``, and on in steps of the number of programs. Exponentials are powers of two."""
        log2_e: tl.constexpr = 1.4426950408889634
        offset = tl.arange(0, block)
        columns = groups * alignment
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            at = logits + tl.cast(row, tl.int64) * groups * alignment
            target = tl.load(targets + row)
            logit = tl.load(at + target, target < tokens, -float("inf")).to(tl.float32)
            weight = tl.load(weights + row)
            top = -float("inf")
            total = tl.zeros((block,), tl.float32)
            for start in range(0, tokens, block):
                column = start + offset
                x = tl.load(at + column, column < tokens, -float("inf")).to(tl.float32) * log2_e
                higher = tl.maximum(top, tl.max(x, 0))
                total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
                top = higher
            normalizer = top + tl.log2(tl.sum(total, 0))
            tl.store(nll + row, normalizer / log2_e - logit)
            tl.debug_barrier()  # every thread has read the target's logit
            for start in range(0, columns, block):
                column = start + offset
                x = tl.load(at + column, column < tokens, -float("inf")).to(tl.float32) * log2_e
                p = tl.exp2(x - normalizer) * weight
                tl.store(at + column, p.to(logits.dtype.element_ty), column < columns)
