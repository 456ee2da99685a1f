"""Dropout of the residual stream (Srivastava et al. 2014), and of what is added to it.

In code compiled for a GPU, the addition is one kernel that draws four random numbers at a time, and draws them again in
the backward pass instead of keeping which were dropped; the compiler draws one at a time and keeps a byte for each
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton_package

from megatron.distributed.tensor_parallel import TensorParallel, differs_by_rank

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl


def dropout(x: Tensor, probability: float, training: bool, tensor: TensorParallel) -> Tensor:
    """Dropout of the residual stream: alike on ranks that hold the same tokens, independent on those that do not."""
    if not training or probability == 0:
        return x
    if tensor.sequence_parallel:
        return differs_by_rank(tensor, lambda: F.dropout(x, probability), x.device)
    return F.dropout(x, probability)


def add_dropped(hidden: Tensor, x: Tensor, probability: float, training: bool, tensor: TensorParallel) -> Tensor:
    """``hidden + dropout(x)``, all [..., h]."""
    compiled = TRITON and x.is_cuda and x.dtype != torch.float64 and torch.compiler.is_compiling()
    if compiled and training and 0 < probability < 1 and tensor.group is None:
        out: Tensor = _AddDropped.apply(hidden, x, probability)
        return out
    return hidden + dropout(x, probability, training, tensor)


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, probability: float) -> Tensor:
        seed = torch.randint(2**62, (1,), device=x.device)
        ctx.save_for_backward(seed)
        ctx.probability = probability
        out: Tensor = torch.ops.megatron.add_dropped(hidden, x, seed, probability)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (seed,) = ctx.saved_tensors
        return grad, torch.ops.megatron.add_dropped(None, grad, seed, ctx.probability), None


if TRITON:

    @triton.jit
    def _add_dropped_kernel(  # type: ignore[no-untyped-def]
        hidden, x, seed, out, size, probability: tl.constexpr, block: tl.constexpr
    ):
        """Four times ``block`` numbers: a place of the generator serves one in each quarter."""
        offset = tl.arange(0, block)
        draws = tl.rand4x(tl.load(seed), tl.program_id(0) * block + offset)
        at = tl.program_id(0).to(tl.int64) * (4 * block) + offset
        for part in tl.static_range(4):
            inside = at < size
            value = tl.load(x + at, inside).to(tl.float32)
            value = tl.where(draws[part] >= probability, value * (1 / (1 - probability)), 0.0)
            if hidden is not None:
                value += tl.load(hidden + at, inside).to(tl.float32)
            tl.store(out + at, value.to(out.dtype.element_ty), inside)
            at += block

    @torch.library.triton_op("megatron::add_dropped", mutates_args=())
    def _add_dropped(hidden: Tensor | None, x: Tensor, seed: Tensor, probability: float) -> Tensor:
        """``hidden + dropout(x)``, or the latter alone. The same ``seed`` [1] int64 drops the same numbers."""
        x = x.contiguous()
        hidden = None if hidden is None else hidden.contiguous()
        out = torch.empty_like(x)
        block = 512
        torch.library.wrap_triton(_add_dropped_kernel)[(triton.cdiv(x.numel(), 4 * block),)](
            hidden, x, seed, out, x.numel(), probability, block
        )
        return out
