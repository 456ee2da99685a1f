"""Collectives that autograd can differentiate and the compiler can see through. Each receives its ranks; None is a
process alone: nothing happens.

The pairs are those of Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3) and of its sequence parallelism
(Korthikanti et al., arXiv 2205.05198, section 4.2.2): what is a copy forward is a sum backward, what is gathered
forward is summed and scattered backward, and the other way round. Splits and gathers are along dimension 0.

PyTorch's functional collectives do the work: they are operators of a compiled graph like any other, so a block that is
cut over ranks is one graph, as a whole one is. (Graphs that end at each collective kept the host busy for longer than
a GPU needs for the blocks of two billion parameters.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the operators
from torch import Tensor

_functional = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """A process group as compiled code takes it: by its name in ``torch.distributed``, and its number of ranks."""

    name: str
    size: int


def copy_to_ranks(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The same tensor, on every rank already; its gradient is the sum of all ranks' gradients."""
    return x if ranks is None else _Copy.apply(x, ranks)


def sum_over_ranks(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of all ranks' ``x``, on every rank; each gets the gradient of the sum (which is the same on all)."""
    return x if ranks is None else _Sum.apply(x, ranks)


def gather_rows(x: Tensor, ranks: Ranks | None) -> Tensor:
    """[n, ...] of each rank -> [ranks * n, ...] on every rank; gradients are summed and scattered back."""
    return x if ranks is None else _Gather.apply(x, ranks)


def sum_and_scatter_rows(x: Tensor, ranks: Ranks | None) -> Tensor:
    """[n, ...] -> [n / ranks, ...]: this rank's rows of the sum of all ranks' ``x``; gradients are gathered."""
    return x if ranks is None else _Scatter.apply(x, ranks)


def gathered_linear(x: Tensor, weight: Tensor, ranks: Ranks) -> Tensor:
    """``gather_rows(x) @ weight^T``: x [n, in] of each rank, weight [out, in] -> [ranks * n, out].

    Keeps only this rank's rows for the backward pass and gathers them again there: sequence parallelism is for memory.
    """
    out: Tensor = _GatheredLinear.apply(x, weight, ranks)
    return out


def all_reduce(x: Tensor, ranks: Ranks, operation: str = "sum") -> Tensor:
    """The ``operation`` ("sum", "max") of all ranks' ``x``, without gradients."""
    return _done(_functional.all_reduce(x.contiguous(), operation, ranks.name))


def all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] of each rank -> [ranks * n, ...], without gradients."""
    return _done(_functional.all_gather_into_tensor(x.contiguous(), ranks.size, ranks.name))


def reduce_scatter(x: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] -> this rank's [n / ranks, ...] of the sum over ranks, without gradients."""
    assert x.shape[0] % ranks.size == 0, f"{x.shape[0]} rows over {ranks.size} ranks"
    return _done(_functional.reduce_scatter_tensor(x.contiguous(), "sum", ranks.size, ranks.name))


def _done(x: Tensor) -> Tensor:
    """What follows on this device waits for the collective that makes ``x``."""
    out: Tensor = _functional.wait_tensor(x)
    return out


@torch.library.custom_op("megatron::all_gather_after", mutates_args=())
def _all_gather_after(x: Tensor, after: Tensor, size: int, name: str) -> Tensor:
    """:func:`all_gather`, which needs ``after`` but does not read it.

    Told the gradient, the compiler cannot gather before the backward pass and keep the result, which it would otherwise
    do: what it can compute forward and may not compute twice, it keeps.
    """
    return all_gather(x, Ranks(name, size))


@_all_gather_after.register_fake
def _(x: Tensor, after: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty((x.shape[0] * size, *x.shape[1:]))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.ranks), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.ranks), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return reduce_scatter(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.ranks), None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        ctx.save_for_backward(x, weight)
        return all_gather(x, ranks) @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        grad_x = reduce_scatter(grad @ weight, ranks) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ torch.ops.megatron.all_gather_after(x, grad, ranks.size, ranks.name)
        return grad_x, grad_weight, None
