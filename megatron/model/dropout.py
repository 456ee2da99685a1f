"""Dropout of the residual stream (Srivastava et al. 2014), and of what is added to it.

In code compiled for a GPU both are one kernel of our own (``kernels``), which draws its random numbers again in the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.distributed.tensor_parallel import SEED_STEP, TensorParallel, differs_by_rank
from megatron.model.kernels import in_compiled_code

_SEEDS = 2**62
_STEP = SEED_STEP % _SEEDS
"""Between ranks; the compiler, to which a second rank in one process is a variable, has no larger integers."""


def dropout(x: Tensor, probability: float, training: bool, tensor: TensorParallel) -> Tensor:
    """Dropout of the residual stream: alike on ranks that hold the same tokens, independent on those that do not."""
    if not training or probability == 0:
        return x
    if tensor.sequence_parallel:
        return differs_by_rank(tensor, lambda: F.dropout(x, probability), x.device)
    return F.dropout(x, probability)


def add_dropped(hidden: Tensor, x: Tensor, probability: float, training: bool, tensor: TensorParallel) -> Tensor:
    """``hidden + dropout(x)``, all [..., h]."""
    if training and 0 < probability < 1 and in_compiled_code(x):
        # The seed is drawn alike on all ranks; with sequence parallelism each has tokens of its own.
        shift = tensor.rank * _STEP % _SEEDS if tensor.sequence_parallel else 0
        out: Tensor = _AddDropped.apply(hidden, x, probability, shift)
        return out
    return hidden + dropout(x, probability, training, tensor)


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, probability: float, shift: int) -> Tensor:
        seed = torch.randint(_SEEDS, (1,), device=x.device) + shift
        ctx.save_for_backward(seed)
        ctx.probability = probability
        out: Tensor = torch.ops.megatron.add_dropped(hidden, x, seed, probability)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return grad, torch.ops.megatron.add_dropped(None, grad, seed, ctx.probability), None, None
