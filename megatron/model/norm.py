"""Normalisation of the residual stream: LayerNorm or RMSNorm (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

In code compiled for a GPU, RMSNorm has its own gradient: one kernel that reads the normalised hidden state and both
gradients that meet there, the norm's and the residual connection's, and writes their sum (docs/performance.md). Code
that is not compiled needs no Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton_package

from megatron.config import ModelConfig
from megatron.distributed.tensor_parallel import (
    ALONE,
    TensorParallel,
    TokenParallelLayerNorm,
    TokenParallelRMSNorm,
)

TRITON = has_triton_package()  # PyTorch brings it where it can drive a GPU
if TRITON:
    import triton
    import triton.language as tl


def build_norm(config: ModelConfig, tensor: TensorParallel = ALONE) -> nn.Module:
    """Normalisation over the last dimension (width ``hidden_size``), as ``--normalization`` says; gains 1, biases 0.

    PyTorch's own layers: both compute in fp32 inside when the input is half precision. As in Megatron, LayerNorm has
    its bias whatever ``--disable-bias-linear`` says (that flag is about linear layers), and RMSNorm has none.
    """
    if tensor.sequence_parallel:
        kind = TokenParallelRMSNorm if config.normalization == "rmsnorm" else TokenParallelLayerNorm
        return kind(config.hidden_size, config.layernorm_epsilon, tensor)
    if config.normalization == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


def branch(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Where the residual stream parts: (hidden itself, ``norm(hidden)``), both [..., h]."""
    compiled = TRITON and hidden.is_cuda and torch.compiler.is_compiling()
    if not compiled or not isinstance(norm, nn.RMSNorm) or hidden.dtype == torch.float64:
        return hidden, norm(hidden)
    gain = norm.gain() if isinstance(norm, TokenParallelRMSNorm) else norm.weight
    kept, normal = _Branch.apply(hidden, gain, norm.eps)
    return kept, normal


class _Branch(torch.autograd.Function):
    """hidden [..., h], gain [h] -> (hidden, RMSNorm of it)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, gain)
        ctx.eps = eps
        wide = hidden.float()
        scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        return hidden.view_as(hidden), (wide * scale * gain).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad_kept: Tensor, grad_normal: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, gain = ctx.saved_tensors
        grad, partial = torch.ops.megatron.branch_gradient(hidden, gain, grad_kept, grad_normal, ctx.eps)
        return grad, partial.sum(dim=0).to(gain.dtype), None


if TRITON:

    @triton.jit
    def _branch_gradient_kernel(  # type: ignore[no-untyped-def]
        hidden, gain, grad_kept, grad_normal, out, partial, rows,
        eps: tl.constexpr, width: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
    ):
        """Rows ``program_id(0)``, and on in steps of the number of programs; of them, the gain's gradient too."""
        column = tl.arange(0, block)
        inside = column < width
        g = tl.load(gain + column, inside, 0.0).to(tl.float32)
        grad_gain = tl.zeros((block,), tl.float32)
        for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=stages):
            at = tl.cast(row, tl.int64) * width + column
            x = tl.load(hidden + at, inside, 0.0).to(tl.float32)
            dy = tl.load(grad_normal + at, inside, 0.0).to(tl.float32)
            kept = tl.load(grad_kept + at, inside, 0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
            along = tl.sum(dy * g * x, 0) * scale / width  # of the gradient, along the normalised row
            normal = x * scale
            grad_gain += dy * normal
            grad = kept + scale * (dy * g - normal * along)
            tl.store(out + at, grad.to(out.dtype.element_ty), inside)
        tl.store(partial + tl.program_id(0) * width + column, grad_gain, inside)

    @torch.library.triton_op("megatron::branch_gradient", mutates_args=())
    def _branch_gradient(
        hidden: Tensor, gain: Tensor, grad_kept: Tensor, grad_normal: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Gradient of hidden [..., h], and of the gain in parts [programs, h] fp32 that are yet to be summed."""
        hidden, grad_kept, grad_normal = (x.contiguous() for x in (hidden, grad_kept, grad_normal))
        out = torch.empty_like(hidden)
        width = hidden.shape[-1]
        rows = hidden.numel() // width
        # Four programs a processor keep the memory busy, if each loads rows ahead; there is shared memory for narrow
        # ones.
        programs = 4 * torch.cuda.get_device_properties(hidden.device).multi_processor_count
        partial = torch.empty(programs, width, dtype=torch.float32, device=hidden.device)
        block = triton.next_power_of_2(width)
        stages = 3 if block * hidden.element_size() <= 2**14 else 1
        torch.library.wrap_triton(_branch_gradient_kernel)[(programs,)](
            hidden, gain, grad_kept, grad_normal, out, partial, rows, eps, width, block, stages,
            num_warps=min(16, max(1, block // 512)),
        )
        return out, partial
