"""Collectives that autograd can differentiate and the compiler can see through. Each receives its ranks; None is a
process alone: nothing happens.

The pairs are those of Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3) and of its sequence parallelism
(Korthikanti et al., arXiv 2205.05198, section 4.2.2): what is a copy forward is a sum backward, what is gathered
forward is summed and scattered backward, and the other way round. Splits and gathers are along dimension 0.

They are operators of our own, so that a block that is cut over ranks compiles to one graph, as a whole one does.
(Graphs that end at each collective kept the host busy for longer than a GPU needs for the blocks of two billion
parameters.)
What follows needs the result, so each runs on the stream that computes: waiting for another stream, as PyTorch's
functional collectives do, takes host and GPU longer. Those that have something to do beside them are in ``products``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group


@dataclass(frozen=True)
class Ranks:
    """A process group as compiled code takes it: by its name in ``torch.distributed``, and its number of ranks."""

    name: str
    size: int


def group_of(name: str) -> ProcessGroup:
    """The group that :class:`Ranks` know by its name."""
    return _resolve_process_group(cast(Any, name))  # newer releases have a type of their own for names


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


def all_reduce(x: Tensor, ranks: Ranks, operation: str = "sum") -> Tensor:
    """The ``operation`` ("sum", "max") of all ranks' ``x``, without gradients."""
    out: Tensor = torch.ops.megatron.all_reduce(x, operation, ranks.name)
    return out


def all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] of each rank -> [ranks * n, ...], without gradients."""
    out: Tensor = torch.ops.megatron.all_gather(x, ranks.size, ranks.name)
    return out


def reduce_scatter(x: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] -> this rank's [n / ranks, ...] of the sum over ranks, without gradients."""
    assert x.shape[0] % ranks.size == 0, f"{x.shape[0]} rows over {ranks.size} ranks"
    out: Tensor = torch.ops.megatron.reduce_scatter(x, ranks.size, ranks.name)
    return out


# Not ``custom_op``, whose checks cost the host time at every call.
torch.library.define("megatron::all_reduce", "(Tensor x, str operation, str name) -> Tensor")
torch.library.define("megatron::all_gather", "(Tensor x, int size, str name) -> Tensor")
torch.library.define("megatron::reduce_scatter", "(Tensor x, int size, str name) -> Tensor")


@torch.library.impl("megatron::all_reduce", ("cpu", "cuda"))
def _all_reduce(x: Tensor, operation: str, name: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation], group_of(name))
    return out


@torch.library.register_fake("megatron::all_reduce")
def _(x: Tensor, operation: str, name: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("megatron::all_gather", ("cpu", "cuda"))
def _all_gather(x: Tensor, size: int, name: str) -> Tensor:
    out = x.new_empty(x.shape[0] * size, *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group_of(name))
    return out


@torch.library.register_fake("megatron::all_gather")
def _(x: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0] * size, *x.shape[1:])


@torch.library.impl("megatron::reduce_scatter", ("cpu", "cuda"))
def _reduce_scatter(x: Tensor, size: int, name: str) -> Tensor:
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group_of(name))
    return out


@torch.library.register_fake("megatron::reduce_scatter")
def _(x: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0] // size, *x.shape[1:])


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
