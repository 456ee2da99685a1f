"""FlashAttention (Shah et al., arXiv 2407.08608) of the package flash-attn-4, for training on Hopper GPUs.

Its backward pass is faster there than what PyTorch's SDPA finds (docs/performance.md has the times); its forward pass
is not, so it is used where there will be a backward pass. It is also told where to write: the gradients of queries,
keys and values come side by side, as the gradient of the product that made them, and nobody has to put them together.

Both passes are operators of our own, so that compiled code can call them. The package's functions underneath are not
part of its interface, so one version of it is taken and no other. It is optional: SDPA does all the same.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from megatron.model.packages import hopper_obstacle, package_obstacle

PACKAGE: Final = "flash-attn-4"
VERSION: Final = "4.0.0b36"
_MODULE: Final = "flash_attn.cute.interface"
HEAD_SIZES: Final = range(32, 129, 32)
SHORTEST: Final = 64
"""Positions of the shortest sequences that were compared with attention written out."""


def flash_attention(heads: Tensor, counts: tuple[int, int], causal: bool) -> Tensor:
    """Attention of ``heads`` [b, s, q + 2 kv, head_size], queries, keys and values with ``counts`` = (q, kv) ->
    [b, s, q, head_size]. Scores are scaled by head_size^-1/2; a key/value head serves q / kv query heads in a row."""
    out: Tensor = _FlashAttention.apply(heads, *counts, causal)
    return out


def flash_obstacle(
    *, device: torch.device, half_precision: bool, head_size: int, length: int, dropout: float
) -> str | None:
    """Why FlashAttention cannot serve a training run on sequences of ``length`` tokens, in words; None if it can.

    ``dropout`` is attention's.
    """
    if (hardware := hopper_obstacle(device, half_precision)) is not None:
        return hardware
    if dropout > 0:
        return f"it has no dropout, and there is --attention-dropout {dropout}"
    if head_size not in HEAD_SIZES:
        return (
            f"it takes heads of {HEAD_SIZES.start} to {HEAD_SIZES[-1]} features in steps of {HEAD_SIZES.step}, and "
            f"these have {head_size}"
        )
    if length < SHORTEST:
        return f"it is used from {SHORTEST} positions on"
    return package_obstacle(PACKAGE, VERSION, _MODULE)


@cache
def _library() -> Any:
    # What it says about an argument of its own when it compiles a kernel is nothing to a user.
    warnings.filterwarnings("ignore", "Argument aux_data ", UserWarning)
    return importlib.import_module(_MODULE)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, queries: int, keys: int, causal: bool) -> Tensor:
        out, logsumexp = torch.ops.megatron.flash_attention(heads, queries, keys, causal)
        ctx.save_for_backward(heads, out, logsumexp)
        ctx.counts, ctx.causal = (queries, keys), causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        heads, out, logsumexp = ctx.saved_tensors
        grad_heads = torch.ops.megatron.flash_attention_gradient(grad, heads, out, logsumexp, *ctx.counts, ctx.causal)
        return grad_heads, None, None, None


# Not ``custom_op``, whose checks cost the host time at every call.
torch.library.define(
    "megatron::flash_attention", "(Tensor heads, int queries, int keys, bool causal) -> (Tensor, Tensor)"
)
torch.library.define(
    "megatron::flash_attention_gradient",
    "(Tensor grad, Tensor heads, Tensor out, Tensor logsumexp, int queries, int keys, bool causal) -> Tensor",
)


@torch.library.impl("megatron::flash_attention", "cuda")
def _forward(heads: Tensor, queries: int, keys: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [b, s, queries, head_size], and the logarithms of its softmax' sums [b, queries, s] fp32."""
    parts = heads.split((queries, keys, keys), dim=2)
    result = _library()._flash_attn_fwd(*parts, softmax_scale=heads.shape[-1] ** -0.5, causal=causal, return_lse=True)
    return result[0], result[1]


@torch.library.register_fake("megatron::flash_attention")
def _(heads: Tensor, queries: int, keys: int, causal: bool) -> tuple[Tensor, Tensor]:
    batch, length, _, size = heads.shape
    logsumexp = heads.new_empty(batch, queries, length, dtype=torch.float32)
    return heads.new_empty(batch, length, queries, size), logsumexp


@torch.library.impl("megatron::flash_attention_gradient", "cuda")
def _gradient(
    grad: Tensor, heads: Tensor, out: Tensor, logsumexp: Tensor, queries: int, keys: int, causal: bool
) -> Tensor:
    """Of ``heads``, from the gradient of ``out``."""
    grad_heads = torch.empty_like(heads, memory_format=torch.contiguous_format)
    parts, grads = (x.split((queries, keys, keys), dim=2) for x in (heads, grad_heads))
    _library()._flash_attn_bwd(
        *parts, out, grad.contiguous(), logsumexp, softmax_scale=heads.shape[-1] ** -0.5, causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(), **dict(zip(("dq", "dk", "dv"), grads)),
    )  # fmt: skip
    return grad_heads


@torch.library.register_fake("megatron::flash_attention_gradient")
def _(grad: Tensor, heads: Tensor, out: Tensor, logsumexp: Tensor, queries: int, keys: int, causal: bool) -> Tensor:
    return heads.new_empty(heads.shape)


@register_flop_formula(torch.ops.megatron.flash_attention)
def _flops(heads_shape: Sequence[int], queries: int, keys: int, causal: bool, *_: Any, **__: Any) -> int:
    """As PyTorch counts SDPA: the compiler weighs what to compute again by it (``--activation-memory-budget``)."""
    batch, length, _heads, size = heads_shape
    return 4 * batch * queries * length**2 * size
