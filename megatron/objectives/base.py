"""What an objective is: a pure map from clean tokens and sample ids to a :class:`Batch`.

An objective never sees the model and the model never sees the objective: every loss is ``sum(nll * weights)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

CAPACITY_STEPS = 64
"""``Batch.scored`` comes in so many sizes at most: libraries choose a kernel, and keep memory, for each."""

MULTIPLE = 16
"""Of which those sizes are multiples, unless all positions are scored: products in fp8 want that."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b sequences of s positions, ready for the model. The loss is ``sum(nll * weights)``.

    ``weights`` hold everything: the objective's own weight (1/p), ignored positions (0) and the mean over the
    micro-batch (1/(b*s)). Gradients averaged over micro-batches and ranks are therefore those of the global-batch mean,
    however it is split.
    """

    inputs: Tensor
    """[b, s] int64: what the model reads."""
    targets: Tensor
    """[b, s] int64: the clean tokens that the model predicts."""
    weights: Tensor
    """[b, s] float32: the loss is sum(nll * weights)."""
    positions: Tensor
    """[b, s] int64: position of each token in its sequence, or in its document with --reset-position-ids."""
    counted: Tensor
    """[b] float32: tokens of each row that the loss is a mean over: s, or fewer with --eod-mask-loss. The loss in nats
    per counted token is ``loss / (sum(counted) / (b*s))``."""
    sample_ids: Tensor
    """[b] int64: where the row comes from; names the samples of a step that went wrong."""
    attention_mask: Tensor | None = None
    """What positions may attend to. None: all, or the past if causal. [b, s] int32: the number of each position's
    document; it attends only inside its document (and there to the past, if causal). [b, 1, s, s] bool: True where the
    query (dim 2) may attend to the key (dim 3); such a mask leaves out the future itself, if it has to."""
    scored: Tensor | None = None
    """[capacity] int64, ascending and distinct indices into b*s: all positions with weight != 0, filled up with
    positions of weight 0 to one of 64 sizes. Known on the CPU, so that the GPU never waits to learn a shape. None:
    all positions."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: torch.device | str | None = None) -> Batch:
        """The same batch in page-locked memory (the name that ``torch.utils.data.DataLoader`` looks for)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})


class Objective(ABC):
    """A training objective: immutable, picklable (loader workers hold one), and without global randomness."""

    causal: ClassVar[bool]
    """How the model must be built: each position sees its past only (True) or everything (False)."""

    @abstractmethod
    def make_batch(self, tokens: Tensor, sample_ids: Tensor, mc_ids: Tensor | None = None) -> Batch:
        """Build the batch of ``tokens`` [b, s+1] int64, rows ``sample_ids`` [b] int64 of the sample order.

        ``mc_ids`` [b] int64 numbers repeated noise draws of one sample (None: all 0). A row of the result depends on
        its own row of the arguments (and the seed) only, but for the 1/(b*s) in the weights.
        """

    @abstractmethod
    def for_evaluation(self, num_windows: int, num_mc: int) -> Objective:
        """A new objective that measures: sample ids are window numbers 0 .. ``num_windows - 1``, Monte Carlo ids are
        0 .. ``num_mc - 1``; training ablations are off, and noise is fixed, the same for every run whatever its
        seed."""


@dataclass(frozen=True)
class Confinement:
    """--reset-position-ids and --reset-attention-mask: what a position sees of the sequence and what it is numbered.

    Documents are separated by ``eod``, and an eod belongs to the document that it ends: the next document starts after
    it.
    """

    eod: int
    reset_position_ids: bool
    reset_attention_mask: bool

    def positions(self, tokens: Tensor) -> Tensor:
        """[b, s] int64: 0 .. s-1, or from 0 again at every start of a document among the clean ``tokens`` [b, s]."""
        index = torch.arange(tokens.shape[1]).expand(tokens.shape)
        if not self.reset_position_ids:
            return index.contiguous()
        starts = torch.where(self._follows_eod(tokens), index, 0)
        return index - starts.cummax(dim=1).values

    def documents(self, tokens: Tensor) -> Tensor | None:
        """[b, s] int32: number of each position's document, from 0 in every row of the clean ``tokens`` [b, s].

        None without the flag. s numbers a row instead of the mask's s*s: the model makes a mask of them.
        """
        if not self.reset_attention_mask:
            return None
        return self._follows_eod(tokens).cumsum(dim=1, dtype=torch.int32)

    def _follows_eod(self, tokens: Tensor) -> Tensor:
        follows = torch.zeros_like(tokens, dtype=torch.bool)  # [b, s]
        follows[:, 1:] = tokens[:, :-1] == self.eod
        return follows


def scored_positions(weighted: np.ndarray) -> Tensor:
    """``Batch.scored`` for ``weighted`` [b, s] bool, True where the weight is not 0.

    The size is the smallest multiple of b*s / 64, itself rounded up to a multiple of 16, that holds them (at least one
    multiple, at most b*s); it is filled up with the first positions of weight 0, which add exactly 0 to the loss and to
    its gradients.
    """
    chosen = weighted.reshape(-1).copy()  # [b*s]
    step = -(-chosen.size // (CAPACITY_STEPS * MULTIPLE)) * MULTIPLE
    needed = int(np.count_nonzero(chosen))
    capacity = min(max(1, -(-needed // step)) * step, chosen.size)
    chosen[np.flatnonzero(~chosen)[: capacity - needed]] = True
    return torch.from_numpy(np.flatnonzero(chosen))
