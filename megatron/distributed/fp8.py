"""Products of linear layers in 8-bit floating point (``--fp8``), through ``torch._scaled_mm``.

Each factor of a product is divided by one number, so that its largest magnitude becomes the largest of its format, and
rounded: e4m3 (3 bits of mantissa, up to 448) for inputs and weights, e5m2 (2 bits, up to 57344) for gradients
(Micikevicius et al., arXiv 2209.05433). The products are summed in fp32 and come out in bf16, multiplied by both
numbers. The numbers are found anew for each product from the tensor itself ("current" or "dynamic" scaling): nothing is
kept from step to step, so there is nothing in checkpoints. Tensor-parallel ranks scale their own parts by numbers of
their own, since each undoes its own scaling; they need not agree.

A factor that is not finite makes the whole result so: its largest magnitude is infinite or NaN, and so is the number
that multiplies the result (infinity times a zero, or NaN).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.errors import UserError

CAPABILITY = (8, 9)
"""Least CUDA compute capability with fp8 products: Ada and Hopper."""

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2

SMALLEST_PEAK = 1e-24
"""Tensors below it are scaled as if they reached it: zeros stay zeros instead of 0 / 0, and the product of two scales
stays a normal fp32 number. A gradient's largest entry is many orders larger."""


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T`` and both its gradients as fp8 products: x [..., in] bf16, weight [out, in] -> [..., out] bf16.

    in, out and the number of rows of x are multiples of 16 (``config_checks`` sees to it).
    """
    out: Tensor = _Fp8Linear.apply(x, weight)
    return out


def require_fp8(device: torch.device) -> None:
    """Raise UserError where ``device`` has no fp8 products."""
    if device.type != "cuda":
        raise UserError("--fp8 needs a GPU: leave it out")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        needed, has = (".".join(map(str, version)) for version in (CAPABILITY, capability))
        raise UserError(
            f"--fp8 needs a GPU of compute capability {needed} or above (Ada, Hopper and newer), and "
            f"{torch.cuda.get_device_name(device)} has {has}: leave it out"
        )


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What to divide ``x`` by so that its largest magnitude is the largest of ``dtype``: a scalar, fp32."""
    peak = x.abs().amax().float()
    # `where`, not `clamp`: NaN is not smaller and stays. Besides, in a kernel that takes the smaller or larger of two
    # numbers, as torch 2.13 writes it, Triton can garble fp8 stores (triton-lang/triton 11111, pytorch/ao 4652).
    return torch.where(peak < SMALLEST_PEAK, SMALLEST_PEAK, peak) / torch.finfo(dtype).max


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / scale`` rounded to ``dtype``.

    Nothing is clamped: the largest entry is off by the division's rounding, or by one to bf16 that compiled code leaves
    out, 0.4 % and less, which rounds to the largest number of the format. Conversions that saturate and others agree.
    """
    return (x.float() / scale).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [n, in]
        scales = scale_of(rows, FORWARD), scale_of(weight, FORWARD)
        # Not the fp8 copies: ZeRO 3 takes the weight away until the backward pass and would leave its copy whole, and
        # the compiler makes the input again, copy included, out of what it keeps anyway.
        ctx.save_for_backward(rows, weight, *scales)
        ctx.shape = x.shape
        # One accumulator over the whole sum is exact enough forward, and faster (as in Transformer Engine).
        y = _multiply(
            quantize(rows, scales[0], FORWARD), quantize(weight, scales[1], FORWARD).t(), *scales, fast=True
        )  # [n, out]
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight, input_scale, weight_scale = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])  # [n, out]
        grad_scale = scale_of(grad_rows, GRADIENT)
        rounded = quantize(grad_rows, grad_scale, GRADIENT)
        by_columns = _by_columns(quantize(weight, weight_scale, FORWARD))  # [out, in]
        grad_x = _multiply(rounded, by_columns, grad_scale, weight_scale).view(ctx.shape)
        by_columns = _by_columns(quantize(rows, input_scale, FORWARD))  # [n, in]
        grad_weight = _multiply(rounded.t().contiguous(), by_columns, grad_scale, input_scale)  # [out, in]
        return grad_x, grad_weight


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix, laid out by columns, as the second factor of a product must be."""
    return x.t().contiguous().t()


def _multiply(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool = False) -> Tensor:
    """``(a a_scale) @ (b b_scale)``: a [n, k] by rows, b [k, m] by columns, both fp8 -> [n, m] bf16."""
    out: Tensor = torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return out
