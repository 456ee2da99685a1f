"""Products of linear layers that are cut over tensor-parallel ranks, with messages under way beside them.

The layers are Megatron's (see ``tensor_parallel``); what is told here is the order of their work. What a rank can
multiply without the others, it multiplies while their part is on its way; what the others wait for, it makes first:

- What is gathered and multiplied (a column-parallel layer's input, a row-parallel layer's gradient) is multiplied at
  this rank's own rows while the others' arrive.
- What is multiplied and summed (a row-parallel layer's result) is made for the others and sent, then for itself.
- What is summed and stays whole (a row-parallel layer's result, without sequence parallelism) is made in halves, where
  one can be summed while the other is made.
- A column-parallel layer's two gradients are made one after the other: inputs are gathered again during the first
  product, and what that makes is summed over ranks during the second.

Each of these is one operator, in compiled code too: the compiler would wait for a message right after it is sent. It
also could not be kept from gathering inputs once and keeping them for the backward pass, which sequence parallelism is
there to avoid: an operator that needs the gradient cannot be computed before there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.distributed.collectives import Ranks, group_of
from megatron.distributed.messages import start_exchange, start_gathering, start_sum, sum_is_hidden

HALVED_FROM = 16384
"""Rows of a product that is worth making in halves: a message and a start cost time, however small they are."""


def column_product(x: Tensor, weight: Tensor, ranks: Ranks, sequence_parallel: bool) -> Tensor:
    """``x @ weight^T`` of a column-parallel layer: x [..., in], the same on every rank, weight [out / ranks, in] ->
    [..., out / ranks]. With sequence parallelism x is [n, in], this rank's rows, and the result
    [ranks * n, out / ranks]; only these rows are kept for the backward pass."""
    out: Tensor = _ColumnProduct.apply(x, weight, ranks, sequence_parallel)
    return out


def row_product(x: Tensor, weight: Tensor, ranks: Ranks, sequence_parallel: bool) -> Tensor:
    """The sum over ranks of ``x @ weight^T``, of a row-parallel layer: x [..., in / ranks], weight [out, in / ranks] ->
    [..., out], the same on every rank. With sequence parallelism x has ranks * n rows and the result is [n, out], this
    rank's rows of the sum."""
    out: Tensor = _RowProduct.apply(x, weight, ranks, sequence_parallel)
    return out


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ranks: Ranks, sequence_parallel: bool) -> Tensor:
        ctx.ranks, ctx.sequence_parallel = ranks, sequence_parallel
        ctx.save_for_backward(x, weight)
        if not sequence_parallel:
            return x @ weight.t()
        out: Tensor = torch.ops.megatron.gathered_product(x, weight.t(), ranks.size, ranks.name)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        grad_x, grad_weight = torch.ops.megatron.column_gradients(
            grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), weight, ctx.sequence_parallel, ranks.size,
            ranks.name,
        )  # fmt: skip
        return grad_x.view(x.shape), grad_weight, None, None


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ranks: Ranks, sequence_parallel: bool) -> Tensor:
        ctx.ranks, ctx.sequence_parallel = ranks, sequence_parallel
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        if sequence_parallel:
            out: Tensor = torch.ops.megatron.scattered_product(rows, weight.t(), ranks.size, ranks.name)
            return out
        return torch.ops.megatron.summed_product(rows, weight.t(), ranks.name).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        grad = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        if not ctx.sequence_parallel:
            return (grad @ weight).view(x.shape), grad.t() @ rows, None, None
        grad_x, grad_weight = torch.ops.megatron.row_gradients(grad, rows, weight, ranks.size, ranks.name)
        return grad_x.view(x.shape), grad_weight, None, None


# Not ``custom_op`` (see ``collectives``).
torch.library.define("megatron::gathered_product", "(Tensor x, Tensor weight, int size, str name) -> Tensor")
torch.library.define("megatron::scattered_product", "(Tensor x, Tensor weight, int size, str name) -> Tensor")
torch.library.define("megatron::summed_product", "(Tensor x, Tensor weight, str name) -> Tensor")
torch.library.define(
    "megatron::column_gradients",
    "(Tensor grad, Tensor x, Tensor weight, bool sequence_parallel, int size, str name) -> (Tensor, Tensor)",
)
torch.library.define(
    "megatron::row_gradients", "(Tensor grad, Tensor x, Tensor weight, int size, str name) -> (Tensor, Tensor)"
)


@torch.library.impl("megatron::gathered_product", ("cpu", "cuda"))
def _gathered_product(x: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    """x [n, in] of each rank, weight [in, out] -> all ranks' x @ weight [size * n, out]."""
    return _product_of_gathered(x, weight, size, name)[0]


def _product_of_gathered(x: Tensor, weight: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    """The same, and all ranks' x, which stays until the next message but one."""
    wait = start_gathering(x, size, name)
    out = x.new_empty(size * len(x), weight.shape[1])
    own, others = _own_and_others(len(x), name, size)
    torch.mm(x, weight, out=out[own])
    gathered = wait()
    for rows in others:
        torch.mm(gathered[rows], weight, out=out[rows])
    return out, gathered


@torch.library.register_fake("megatron::gathered_product")
def _(x: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0] * size, weight.shape[1])


@torch.library.impl("megatron::scattered_product", ("cpu", "cuda"))
def _scattered_product(x: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    """x [size * n, in], weight [in, out] -> this rank's rows [n, out] of the sum of all ranks' x @ weight."""
    rows = len(x) // size
    own, others = _own_and_others(rows, name, size)
    product = x.new_empty(len(x), weight.shape[1])
    for part in others:
        torch.mm(x[part], weight, out=product[part])
    wait = start_exchange(product.chunk(size), name)
    out = torch.mm(x[own], weight, out=product[own])
    return _total(out, wait())


def _total(own: Tensor, received: Tensor) -> Tensor:
    """own [n, ...] + received [ranks - 1, n, ...], in memory of its own."""
    return own + (received[0] if len(received) == 1 else received.sum(dim=0))


@torch.library.register_fake("megatron::scattered_product")
def _(x: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0] // size, weight.shape[1])


@torch.library.impl("megatron::column_gradients", ("cpu", "cuda"))
def _column_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, sequence_parallel: bool, size: int, name: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight [out, in] from grad [m, out]; x is [m / size, in] with sequence parallelism, else
    [m, in] on every rank."""
    if not sequence_parallel:
        wait = start_sum(grad @ weight, name)
        grad_weight = grad.t() @ x
        return wait(), grad_weight
    wait_for_x = start_gathering(x, size, name)
    partial = grad @ weight
    own = _own_and_others(len(x), name, size)[0]
    wait = start_exchange(partial.chunk(size), name)
    grad_weight = grad.t() @ wait_for_x()
    return _total(partial[own], wait()), grad_weight


@torch.library.register_fake("megatron::column_gradients")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, sequence_parallel: bool, size: int, name: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.impl("megatron::row_gradients", ("cpu", "cuda"))
def _row_gradients(grad: Tensor, x: Tensor, weight: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    """Gradients of x [size * n, in] and weight [out, in] from grad [n, out], this rank's rows."""
    grad_x, gathered = _product_of_gathered(grad, weight, size, name)
    return grad_x, gathered.t() @ x


@torch.library.register_fake("megatron::row_gradients")
def _(grad: Tensor, x: Tensor, weight: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.impl("megatron::summed_product", ("cpu", "cuda"))
def _summed_product(x: Tensor, weight: Tensor, name: str) -> Tensor:
    """x [m, in], weight [in, out] -> the sum of all ranks' x @ weight [m, out]."""
    if len(x) >= HALVED_FROM and sum_is_hidden(name):
        return _sum_of_halves(x, weight, name)
    return start_sum(x @ weight, name)()


def _sum_of_halves(x: Tensor, weight: Tensor, name: str) -> Tensor:
    out = x.new_empty(len(x), weight.shape[1])
    waits = []
    for rows, part in zip(x.tensor_split(2), out.tensor_split(2)):
        torch.mm(rows, weight, out=part)
        waits.append(start_sum(part, name))
    for wait in waits:
        wait()
    return out


@torch.library.register_fake("megatron::summed_product")
def _(x: Tensor, weight: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _own_and_others(rows: int, name: str, size: int) -> tuple[slice, list[slice]]:
    """Of ``size`` times ``rows`` rows, those of this rank, and the others in at most two pieces."""
    rank = group_of(name).rank()
    own = slice(rank * rows, (rank + 1) * rows)
    others = [slice(0, own.start), slice(own.stop, size * rows)]
    return own, [piece for piece in others if piece.stop > piece.start]
