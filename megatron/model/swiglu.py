"""SwiGLU (Shazeer, arXiv 2002.05202, eq. 6) between the two products of a feed-forward layer, with its own gradient.

What is kept for the backward pass is the input alone. In code compiled for a GPU the gradient is one kernel that reads
and writes every number once: the compiler, which puts both halves of the gradient together element by element, loads
five numbers for two, and takes 1.4 times as long (docs/performance.md). Code that is not compiled needs no Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton_package

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl


def swiglu(inner: Tensor) -> Tensor:
    """``silu(gate) * up`` of inner [..., 2 ffn] = [gate; up] -> [..., ffn]."""
    out: Tensor = _SwiGLU.apply(inner)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        on_gpu = inner.is_cuda and inner.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if TRITON and on_gpu and torch.compiler.is_compiling():
            out: Tensor = torch.ops.megatron.swiglu_gradient(inner, grad)
            return out
        return _gradient(inner, grad)


def _gradient(inner: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``inner`` [..., 2 ffn], from the one of the result, ``grad`` [..., ffn]."""
    gate, up = inner.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)


if TRITON:

    @triton.jit
    def _swiglu_gradient_kernel(inner, grad, out, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """One row's columns ``program_id(1) * block`` and following, of both halves."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        gate_at = row * (2 * width) + column
        gate = tl.load(inner + gate_at, inside).to(tl.float32)
        up = tl.load(inner + gate_at + width, inside).to(tl.float32)
        g = tl.load(grad + row * width + column, inside).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        tl.store(out + gate_at, (g * up * sigmoid * (1 + gate * (1 - sigmoid))).to(out.dtype.element_ty), inside)
        tl.store(out + gate_at + width, (g * gate * sigmoid).to(out.dtype.element_ty), inside)

    @torch.library.triton_op("megatron::swiglu_gradient", mutates_args=())
    def _swiglu_gradient(inner: Tensor, grad: Tensor) -> Tensor:
        """What :func:`_gradient` computes."""
        inner, grad = inner.contiguous(), grad.contiguous()
        out = torch.empty_like(inner)
        width = grad.shape[-1]
        block = min(triton.next_power_of_2(width), 4096)
        grid = (grad.numel() // width, triton.cdiv(width, block))
        torch.library.wrap_triton(_swiglu_gradient_kernel)[grid](inner, grad, out, width, block, num_warps=8)
        return out
