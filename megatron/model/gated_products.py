"""An MLP's products with SwiGLU inside (the package quack-kernels), for training on Hopper GPUs.

The first product makes SwiGLU of what it has in its registers, beside the numbers that the backward pass needs; the
product of the backward pass that leads there makes the gradient, and SwiGLU again, which so is not kept. What it gains
stands in docs/performance.md.

Between both passes gate and up of a feature are neighbours: [g0, u0, g1, u1, ...]. Weights stay [gate; up], as
everywhere else. Each step is an operator of our own, so that compiled code can call it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from megatron.model.packages import hopper_obstacle, package_obstacle

PACKAGE: Final = "quack-kernels"
VERSION: Final = "0.6.5"
_MODULE: Final = "quack.gemm_interface"

FORWARD_TILE: Final = (128, 192, True, 1, 2)
"""Rows and columns of a tile, whether two of them take turns on a processor, cluster (docs/performance.md)."""
BACKWARD_TILE: Final = (128, 128, True, 2, 1)

NARROWEST: Final = 768
"""Width of the narrowest model that was trained so, but for one of 128, which did not gain: there the host is what
training waits for, and it starts more kernels (weights and their gradients change their order)."""
MULTIPLE: Final = 8
"""Of which the sizes of a layer are multiples: rows are read 16 bytes at a time."""


def gated_obstacle(*, device: torch.device, half_precision: bool, hidden_size: int, ffn_size: int) -> str | None:
    """Why MLPs of these sizes cannot have SwiGLU inside their products, in words; None if they can."""
    if (hardware := hopper_obstacle(device, half_precision)) is not None:
        return hardware
    if (sizes := size_obstacle(hidden_size, ffn_size)) is not None:
        return sizes
    return package_obstacle(PACKAGE, VERSION, _MODULE)


def size_obstacle(hidden_size: int, ffn_size: int) -> str | None:
    """The same as far as sizes decide it."""
    if hidden_size < NARROWEST:
        return f"it pays from --hidden-size {NARROWEST} on"
    if hidden_size % MULTIPLE or ffn_size % MULTIPLE:
        return f"it takes sizes that are multiples of {MULTIPLE}, and these are {hidden_size} and {ffn_size}"
    return None


def gated_mlp(x: Tensor, up_weight: Tensor, down_weight: Tensor, residual: Tensor | None) -> Tensor:
    """``residual + swiglu(x @ up_weight^T) @ down_weight^T``, or without the former: x [..., h], up_weight [2 ffn, h]
    of rows [gate; up], down_weight [h, ffn], residual [..., h] or None -> [..., h]."""
    out: Tensor = _GatedMLP.apply(x, up_weight, down_weight, residual)
    return out


def interleaved(weight: Tensor) -> Tensor:
    """[gate; up] [2 n, ...] -> [g0, u0, g1, ...]."""
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def apart(weight: Tensor) -> Tensor:
    """[g0, u0, g1, ...] [2 n, ...] -> [gate; up]."""
    return weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up_weight: Tensor, down_weight: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner, product = torch.ops.megatron.gated_product(rows, up_weight)
        ctx.save_for_backward(rows, up_weight, down_weight, inner)
        if residual is None:
            return (product @ down_weight.t()).view(x.shape)
        out = residual.clone()  # as in ``residual``
        torch.ops.megatron.add_product_(out, product, down_weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows, up_weight, down_weight, inner = ctx.saved_tensors
        grad_rows = grad.reshape(rows.shape)
        grad_inner, product = torch.ops.megatron.gated_product_gradient(grad_rows, down_weight, inner)
        grad_x = (grad_inner @ interleaved(up_weight)).view(grad.shape)
        grad_up = apart(grad_inner.t() @ rows)
        return grad_x, grad_up, grad_rows.t() @ product, grad if ctx.needs_input_grad[3] else None


@cache
def _library() -> Any:
    return importlib.import_module(_MODULE)


@cache
def _tile(rows: int, columns: int, take_turns: bool, cluster_rows: int, cluster_columns: int) -> Any:
    return importlib.import_module("quack.gemm_config").GemmConfig(
        tile_m=rows, tile_n=columns, pingpong=take_turns, cluster_m=cluster_rows, cluster_n=cluster_columns,
        is_dynamic_persistent=False, device_capacity=9,
    )  # fmt: skip


# Not ``custom_op``, whose checks cost the host time at every call.
torch.library.define("megatron::gated_product", "(Tensor x, Tensor weight) -> (Tensor, Tensor)")
torch.library.define(
    "megatron::gated_product_gradient", "(Tensor grad, Tensor weight, Tensor inner) -> (Tensor, Tensor)"
)


@torch.library.impl("megatron::gated_product", "cuda")
def _gated_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, h], weight [2 ffn, h] of rows [gate; up] -> x @ weight^T [n, 2 ffn], gate and up as neighbours, and SwiGLU
    of it [n, ffn]."""
    inner, product = _library().gemm_gated(
        x, weight.t(), activation="swiglu", concat_layout=("B",), tuned=False, config=_tile(*FORWARD_TILE)
    )
    return inner, product


@torch.library.register_fake("megatron::gated_product")
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0] // 2)


@torch.library.impl("megatron::gated_product_gradient", "cuda")
def _gated_product_gradient(grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """grad [n, h] of the MLP's result, weight [h, ffn] of its last product, inner [n, 2 ffn] as ``gated_product`` made
    it -> inner's gradient, and SwiGLU of inner [n, ffn]."""
    grad_inner, product = _library().gemm_dgated(
        grad.contiguous(), weight, inner, activation="swiglu", tuned=False, config=_tile(*BACKWARD_TILE),
        dynamic_scheduler=False,
    )  # fmt: skip
    return grad_inner, product


@torch.library.register_fake("megatron::gated_product_gradient")
def _(grad: Tensor, weight: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inner), inner.new_empty(inner.shape[0], inner.shape[1] // 2)


@register_flop_formula(torch.ops.megatron.gated_product)
def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.megatron.gated_product_gradient)
def _gradient_flops(grad_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * grad_shape[0] * weight_shape[0] * weight_shape[1]
