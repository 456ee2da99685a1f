"""Normalisation of the residual stream: LayerNorm or RMSNorm (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

In code compiled for a GPU, RMSNorm's gradient and the residual connection's, which meet where the stream parts, are
computed and added by a kernel of our own (``kernels``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.distributed.tensor_parallel import (
    ALONE,
    TensorParallel,
    TokenParallelLayerNorm,
    TokenParallelRMSNorm,
)
from megatron.model.kernels import in_compiled_code


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
    if not (isinstance(norm, nn.RMSNorm) and in_compiled_code(hidden)):
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
