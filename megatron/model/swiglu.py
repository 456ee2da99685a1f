"""SwiGLU (Shazeer, arXiv 2002.05202, eq. 6) between the two products of a feed-forward layer, with its own gradient.

What is kept for the backward pass is the input alone. In code compiled for a GPU the gradient is a kernel of our own
(``kernels``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model.kernels import in_compiled_code


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
        if in_compiled_code(inner):
            out: Tensor = torch.ops.megatron.swiglu_gradient(inner, grad)
            return out
        return _gradient(inner, grad)


def _gradient(inner: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``inner`` [..., 2 ffn], from the one of the result, ``grad`` [..., ffn]."""
    gate, up = inner.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=-1)
