"""Where a branch joins the residual stream again: the last product of attention or MLP, dropped out, is added to it.

In code compiled for a GPU, without dropout, the product itself adds to the stream's memory. By itself the compiler
writes what the product makes and lets another kernel read, add and write it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.distributed.tensor_parallel import RowParallelLinear
from megatron.model.dropout import add_dropped
from megatron.model.gated_products import gated_mlp
from megatron.model.kernels import in_compiled_code
from megatron.model.mlp import MLP


def joins_alone(layer: RowParallelLinear, probability: float, training: bool) -> bool:
    """Whether ``join``, in code compiled for a GPU, ends in a kernel that the compiler does not write."""
    return (training and probability > 0) or layer.is_one_product


def join(hidden: Tensor, layer: RowParallelLinear, x: Tensor, probability: float, training: bool) -> Tensor:
    """``hidden + dropout(layer(x))``: hidden [..., h] in the form that ``layer`` makes, x [..., in]."""
    dropped = training and probability > 0
    if layer.is_one_product and not dropped and in_compiled_code(x):
        out: Tensor = _AddProduct.apply(hidden, x, layer.weight)
        return out
    return add_dropped(hidden, layer(x), probability, training, layer.tensor)


def join_mlp(hidden: Tensor, mlp: MLP, x: Tensor, probability: float, training: bool) -> Tensor:
    """``hidden + dropout(mlp(x))``, all [..., h] in the form that the MLP makes."""
    if not mlp.multiplies_gated(x):
        return join(hidden, mlp.dense_4h_to_h, mlp.inner(x), probability, training)
    weights = (mlp.dense_h_to_4h.weight, mlp.dense_4h_to_h.weight)
    if training and probability > 0:
        return add_dropped(hidden, gated_mlp(x, *weights, None), probability, training, mlp.dense_4h_to_h.tensor)
    return gated_mlp(x, *weights, hidden)


class _AddProduct(torch.autograd.Function):
    """hidden [..., h] + x [..., in] @ weight^T [in, h]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = hidden.clone()  # which the compiler leaves out where nothing else reads it
        torch.ops.megatron.add_product_(out, x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [n, h]
        return grad, (rows @ weight).view(x.shape), rows.t() @ x.reshape(-1, x.shape[-1])


# Not ``custom_op``, whose checks take as long as a small product does.
torch.library.define("megatron::add_product_", "(Tensor(a!) total, Tensor x, Tensor weight) -> ()")


@torch.library.impl("megatron::add_product_", ("cpu", "cuda"))
def _add_product(total: Tensor, x: Tensor, weight: Tensor) -> None:
    total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


@torch.library.register_fake("megatron::add_product_")
def _(total: Tensor, x: Tensor, weight: Tensor) -> None:
    return None
