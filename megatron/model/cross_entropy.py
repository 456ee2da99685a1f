"""Head and cross entropy in one, chunk by chunk over rows: logits of all rows never exist at once, forward or backward.

With a vocabulary of 50,304 the fp32 logits of 16 x 2048 positions would take 6.6 GB, more than the rest of a small
model's activations. The gradient of a sum of cross entropies is known as soon as the logits are, so each chunk of rows
makes its share of the gradients while it is at hand, and the backward pass only scales them by the gradient of the
loss.

Tensor-parallel ranks each have the logits of a part of the vocabulary. For every row they agree on the largest logit
and sum the exponentials and the target's logit (Shoeybi et al., arXiv 1909.08053, section 3): three numbers a row
travel, logits never. The gradient of hidden is then a sum over ranks, which is whoever hands hidden in to take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.distributed.collectives import Ranks, all_reduce
from megatron.distributed.tensor_parallel import ALONE, TensorParallel
from megatron.model.kernels import scaled

MAX_CHUNK_ELEMENTS = 2**28
"""Logits of one chunk: 1 GB in fp32. Large chunks pass over the head's gradient less often, small ones take less
memory."""

Terms = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
AtOnce = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor] | None]
"""hidden [n, h], head [V, h], targets, weights, num_tokens -> nll [n] and both gradients without chunks, or None."""


def chunk_terms(logits: Tensor, targets: Tensor, weights: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of one chunk and the dense part of its gradient.

    ``logits`` [n, c] (overwritten beyond ``num_tokens``), ``targets`` [n] int64, ``weights`` [n] in the accumulation
    dtype. Returns nll [n] in the accumulation dtype and softmax * weight [n, c] in the dtype of the logits. Pure
    tensor code, so that it can be compiled into two passes over the logits.
    """
    logits[:, num_tokens:] = -torch.inf  # mask id and padding are no tokens: no probability, no gradient
    log_probs = F.log_softmax(logits, dim=-1, dtype=weights.dtype)
    nll = -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    return nll, log_probs.exp_().mul_(weights.unsqueeze(1)).to(logits.dtype)


@dataclass(frozen=True)
class _Vocabulary:
    """This rank's part of the vocabulary: local ids 0 .. ``tokens - 1`` are tokens, ``columns`` are multiplied."""

    first: int
    tokens: int
    columns: int

    @staticmethod
    def of(weight: Tensor, num_tokens: int, tensor: TensorParallel) -> _Vocabulary:
        rows = len(weight)
        first = tensor.rank * rows
        # Rows that are worth multiplying: all tokens, and padding up to the 16 bytes that fast products want. As many
        # on every rank (the first has the most), since all must cut the same chunks.
        columns = min(rows, -(-num_tokens // 8) * 8)
        return _Vocabulary(first, max(0, min(rows, num_tokens - first)), columns)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, num_tokens: int,
                         terms: Terms = chunk_terms, tensor: TensorParallel = ALONE,
                         at_once: AtOnce | None = None) -> Tensor:
    """``sum(nll * weights)`` of the head's predictions, differentiable in ``hidden`` and ``weight``.

    hidden [n, h], weight [V, h] in the same dtype, targets [n] int64 below ``num_tokens``, weights [n] fp32 (not
    differentiated). Rows with weight 0 contribute exactly 0. Softmax and sums are fp32 (fp64 for fp64 inputs), matrix
    products in the inputs' dtype, the head's gradient is accumulated over chunks in fp32. Returns a scalar, fp32 or
    fp64. With tensor parallelism ``weight`` is this rank's [V / ranks, h], and hidden's gradient its share of the sum.
    ``terms`` and ``at_once`` are what compiled code has instead of :func:`chunk_terms` and of chunks.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, weights, num_tokens, terms, tensor, at_once)
    return weighted_nll(hidden, weight, targets, weights, num_tokens, tensor).sum()


@torch.no_grad()
def weighted_nll(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, num_tokens: int,
                 tensor: TensorParallel = ALONE) -> Tensor:
    """nll * weights of each row [n], fp32 or fp64, without gradients; arguments as :func:`linear_cross_entropy`."""
    exact = _accumulation_dtype(hidden.dtype)
    own = _Vocabulary.of(weight, num_tokens, tensor)
    parts = []
    for rows in _chunks(len(hidden), own.columns):
        logits = hidden[rows] @ weight[: own.columns].t()
        if tensor.ranks is not None:
            parts.append(_nll_over_ranks(logits.to(exact), targets[rows] - own.first, own, tensor.ranks)[0])
            continue
        logits[:, num_tokens:] = -torch.inf
        normalizer = logits.to(exact).logsumexp(dim=-1)
        parts.append(normalizer - logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1))
    return _weigh(torch.cat(parts), weights.to(exact))


def _nll_over_ranks(
    logits: Tensor, targets: Tensor, own: _Vocabulary, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy from this rank's logits [n, c] (overwritten by their exponentials) and local target ids [n].

    Returns nll [n], exp(logits - m) [n, c] and its sum over the whole vocabulary [n]; m is the row's largest logit.
    """
    logits[:, own.tokens :] = -torch.inf
    top = all_reduce(logits.amax(dim=-1), ranks, "max")
    logits -= top.unsqueeze(1)
    inside, index = _inside(targets, own)
    target = torch.where(inside, logits.gather(1, index).squeeze(1), 0.0)
    exponentials = logits.exp_()
    sums = all_reduce(torch.stack((exponentials.sum(dim=-1), target)), ranks)  # [2, n]
    return sums[0].log() - sums[1], exponentials, sums[0]


def _inside(targets: Tensor, own: _Vocabulary) -> tuple[Tensor, Tensor]:
    """Which local target ids [n] this rank has a column for, and a valid column index for each [n, 1]."""
    inside = (targets >= 0) & (targets < own.columns)
    return inside, targets.masked_fill(~inside, 0).unsqueeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward makes loss and gradients chunk by chunk; backward scales the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, num_tokens: int,
                terms: Terms, tensor: TensorParallel, at_once: AtOnce | None) -> Tensor:
        """See :func:`linear_cross_entropy`."""
        exact = _accumulation_dtype(hidden.dtype)
        weights = weights.to(exact)
        scale = torch.ones((), dtype=exact, device=hidden.device)
        if hidden.dtype != exact:
            # Weights are of the order 1/(b*s); probabilities times that would underflow in half precision.
            scale = weights.max().clamp_min(torch.finfo(exact).tiny)
            weights = weights / scale
        ctx.weight_dtype = weight.dtype
        ctx.compiled = terms is not chunk_terms or at_once is not None
        own = _Vocabulary.of(weight, num_tokens, tensor)
        found = None
        if at_once is not None and tensor.ranks is None:
            found = at_once(hidden, weight, targets, weights, num_tokens)
        if found is not None:
            nll, *gradients = found
            ctx.save_for_backward(*gradients, scale)
            return _weigh(nll, weights).sum() * scale
        head = weight[: own.columns]  # [c, h]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        for rows in _chunks(len(hidden), own.columns):
            chunk, target, share = hidden[rows], targets[rows], weights[rows]
            if tensor.ranks is not None:
                nll, grad_logits = _terms_over_ranks(chunk @ head.t(), target - own.first, share, own, tensor.ranks)
            else:
                nll, grad_logits = terms(chunk @ head.t(), target, share, num_tokens)
                _set_target(grad_logits, target.unsqueeze(1), nll, share)
            loss += _weigh(nll, share).sum()
            torch.mm(grad_logits, head, out=grad_hidden[rows])
            grad_weight = _accumulate(grad_weight, grad_logits, chunk, weight, exact)
            del grad_logits  # before the next chunk's are made
        assert grad_weight is not None, "a batch has at least one row"
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and weight, for the gradient of the scalar loss."""
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        scale = (scale * grad_loss).view(1)  # not a scalar, which would be rounded to the other factor's dtype
        hidden = scaled(grad_hidden, scale, grad_hidden.dtype, ctx.compiled) if ctx.needs_input_grad[0] else None
        weight = scaled(grad_weight, scale, ctx.weight_dtype, ctx.compiled) if ctx.needs_input_grad[1] else None
        return hidden, weight, None, None, None, None, None, None


def _set_target(grad_logits: Tensor, index: Tensor, nll: Tensor, share: Tensor, inside: Tensor | None = None) -> None:
    """Write the targets' entries, share * (p - 1), into the gradient of the logits [n, c] at columns ``index`` [n, 1].

    From nll they keep their precision when p rounds to 1. Rows that are not ``inside`` stay as they are.
    """
    entries = torch.expm1(-nll).mul_(share).to(grad_logits.dtype).unsqueeze(1)
    if inside is not None:
        entries = torch.where(inside.unsqueeze(1), entries, grad_logits.gather(1, index))
    grad_logits.scatter_(1, index, entries)


def _terms_over_ranks(
    logits: Tensor, targets: Tensor, weights: Tensor, own: _Vocabulary, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """nll [n] and the gradient of this rank's logits [n, c], as :func:`chunk_terms` but with the targets' entries."""
    nll, exponentials, normalizer = _nll_over_ranks(logits.to(weights.dtype), targets, own, ranks)
    grad_logits = exponentials.mul_((weights / normalizer).unsqueeze(1)).to(logits.dtype)
    inside, index = _inside(targets, own)
    _set_target(grad_logits, index, nll, weights, inside)
    return nll, grad_logits


def _accumulate(total: Tensor | None, grad_logits: Tensor, hidden: Tensor, weight: Tensor,
                exact: torch.dtype) -> Tensor:
    """Add a chunk's gradient [c, h] to the head's [V, h], which is ``exact``; rows beyond c stay zero."""
    columns = grad_logits.shape[1]
    first = total is None
    if total is None:
        total = torch.empty(weight.shape, dtype=exact, device=weight.device)
        total[columns:] = 0
    own = total[:columns]
    if exact == hidden.dtype:
        torch.addmm(own, grad_logits.t(), hidden, beta=0 if first else 1, out=own)
    elif hidden.is_cuda and exact == torch.float32:
        # The product adds to fp32 itself: no half-precision copy of it is written, read and added.
        torch.addmm(own, grad_logits.t(), hidden, out_dtype=exact, beta=0 if first else 1, out=own)
    elif first:
        own.copy_(grad_logits.t() @ hidden)
    else:
        own += grad_logits.t() @ hidden
    return total


def _weigh(nll: Tensor, weights: Tensor) -> Tensor:
    """nll * weights, 0 where the weight is 0 even if nll is infinite (a target that is no token)."""
    return torch.where(weights == 0, 0.0, nll * weights)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(rows: int, columns: int) -> list[slice]:
    """Equal chunks of rows, each with at most ``MAX_CHUNK_ELEMENTS`` logits."""
    count = max(1, -(-rows * columns // MAX_CHUNK_ELEMENTS))
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
