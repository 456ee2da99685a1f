"""Normalisation of the residual stream: LayerNorm or RMSNorm (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

In code compiled for a GPU, RMSNorm is a kernel of our own (``kernels``), unless the compiler makes what it reads in the
same kernel. Its gradient and the residual connection's, which meet where the stream parts, are computed and added by
another. That one reads what the norm made, which the product that follows keeps anyway, and not the residual stream,
which so need not be kept.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.distributed.tensor_parallel import (
    ALONE,
    TensorParallel,
    TokenParallelLayerNorm,
    TokenParallelRMSNorm,
)
from megatron.model.kernels import SMALLEST_GAIN, in_compiled_code, takes


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


def branch(norm: nn.Module, hidden: Tensor, alone: bool = False) -> tuple[Tensor, Tensor]:
    """Where the residual stream parts: (hidden itself, ``norm(hidden)``), both [..., h].

    ``alone``: nothing that the compiler writes code for makes hidden, so it cannot make both at once.
    """
    if not (in_compiled_code(hidden) and _has_kernels(norm, hidden)):
        return hidden, norm(hidden)
    kept, normal = _Branch.apply(hidden, _gain(norm), norm.eps, alone)
    return kept, normal


def last_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """``norm(hidden)`` [..., h] of a stream that ends there, in code that is not compiled; by the same kernels."""
    if not (takes(hidden) and _has_kernels(norm, hidden)):
        normal: Tensor = norm(hidden)
    else:
        normal = _LastNorm.apply(hidden, _gain(norm), norm.eps)
    return normal


def _has_kernels(norm: nn.Module, hidden: Tensor) -> TypeGuard[nn.RMSNorm]:
    # What the norm made, divided by the gain, is the normalised row again; fp16 has no numbers small enough for that.
    return isinstance(norm, nn.RMSNorm) and hidden.dtype != torch.float16


def _gain(norm: nn.RMSNorm) -> Tensor:
    return norm.gain() if isinstance(norm, TokenParallelRMSNorm) else norm.weight


class _Branch(torch.autograd.Function):
    """hidden [..., h], gain [h] -> (hidden, RMSNorm of it)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Tensor, eps: float, kernel: bool) -> tuple[Tensor, Tensor]:
        if kernel:
            normal, scale = torch.ops.megatron.row_norm(hidden, gain, eps)
        else:
            wide = hidden.float()
            scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()  # [..., 1]
            normal = (wide * scale * _divisible(gain)).to(hidden.dtype)
        ctx.save_for_backward(normal, gain, scale)
        return hidden.view_as(hidden), normal

    @staticmethod
    def backward(ctx: Any, grad_kept: Tensor, grad_normal: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normal, gain, scale = ctx.saved_tensors
        grad, partial = torch.ops.megatron.branch_gradient(normal, gain, scale, grad_kept, grad_normal)
        return grad, partial.sum(dim=0).to(gain.dtype), None, None


class _LastNorm(torch.autograd.Function):
    """hidden [..., h], gain [h] -> RMSNorm of it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
        normal, scale = torch.ops.megatron.row_norm(hidden, gain, eps)
        ctx.save_for_backward(normal, gain, scale)
        return normal

    @staticmethod
    def backward(ctx: Any, grad_normal: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, gain, scale = ctx.saved_tensors
        grad, partial = torch.ops.megatron.branch_gradient(normal, gain, scale, None, grad_normal)
        return grad, partial.sum(dim=0).to(gain.dtype), None


def _divisible(gain: Tensor) -> Tensor:
    return torch.where(gain.abs() < SMALLEST_GAIN, SMALLEST_GAIN, gain)
