"""Messages of tensor-parallel ranks that are under way while the GPU multiplies.

They are collectives of ``torch.distributed``, or written by copy engines, where a run has opened these for a group
(:func:`use_slots`). NCCL's collectives are kernels. A large product fills all of a GPU's processors until it ends, so
that a kernel beside it either waits for that end or takes processors from the product: both take as long as one after
the other (docs/performance.md). Copy engines take none.

Each function here starts a message and returns what waits for its end and returns the result. What ``copy_engines``
says of messages under way holds for all: at most two at a time, and a result is used before the next but one starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import group_of
from megatron.distributed.copy_engines import Slots

Wait = Callable[[], Tensor]

_SLOTS: dict[str, Slots] = {}
"""By the name of their group, which is all that an operator in compiled code can be given: ``torch.distributed`` keeps
groups in the same way. Nowhere else does a module keep something that changes."""


def use_slots(name: str, slots: Slots | None) -> None:
    """Let messages of group ``name`` go through ``slots``; None: let them be collectives again."""
    if slots is None:
        _SLOTS.pop(name, None)
    else:
        _SLOTS[name] = slots


def sum_is_hidden(name: str) -> bool:
    """Whether a sum over group ``name`` can be under way beside a product without taking as long as after it. Copy
    engines do not add, so of more than two ranks each would have to send all it has to all others."""
    return name in _SLOTS and _SLOTS[name].size == 2


def start_sum(x: Tensor, name: str) -> Wait:
    """x [...] of each rank, contiguous -> x itself, which becomes the sum over ranks."""
    if sum_is_hidden(name):
        wait = _SLOTS[name].start([x, x], own=False)
        return lambda: x.add_(wait()[0])
    return _after(dist.all_reduce(x, group=group_of(name), async_op=True), x)


def start_gathering(x: Tensor, size: int, name: str) -> Wait:
    """x [n, ...] of each rank -> [size * n, ...]."""
    x = x.contiguous()
    if name in _SLOTS:
        wait = _SLOTS[name].start([x] * size, own=True)
        return lambda: wait().flatten(0, 1)
    gathered = x.new_empty(size * len(x), *x.shape[1:])
    return _after(dist.all_gather_into_tensor(gathered, x, group_of(name), async_op=True), gathered)


def start_exchange(parts: Sequence[Tensor], name: str) -> Wait:
    """parts: [n, ...] for each rank, contiguous -> [size - 1, n, ...], what the others have for this one. The part for
    this rank itself is not looked at."""
    if name in _SLOTS:
        return _SLOTS[name].start(parts, own=False)
    rank = group_of(name).rank()
    others = [part for to, part in enumerate(parts) if to != rank]
    sent = others[0].unsqueeze(0) if len(others) == 1 else torch.stack(others)
    received = torch.empty_like(sent)
    splits = [int(to != rank) for to in range(len(parts))]
    return _after(dist.all_to_all_single(received, sent, splits, splits, group_of(name), async_op=True), received)


def _after(work: dist.Work, result: Tensor) -> Wait:
    def wait() -> Tensor:
        work.wait()
        return result

    return wait
