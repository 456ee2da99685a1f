"""Autoregressive objective: next-token cross entropy, -log p(x) = sum_i -log p(x_i | x_<i), for a causal model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron.objectives.attention_masking import RandomMasking
from megatron.objectives.base import Batch, Confinement, Objective
from megatron.objectives.orderings import TokenOrders


@dataclass(frozen=True)
class Autoregressive(Objective):
    """Inputs are tokens 0 .. s-1 of a sample, targets are tokens 1 .. s, every target weighs 1/(b*s).

    With ``eod_mask_loss`` a target whose predecessor in the text is eod weighs 0 (Megatron's rule: the first token of a
    document is not predicted from another document). Documents are found on the inputs.

    Two ablations of the training data: ``orders`` permutes each sample, tokens 1 .. s remaining the targets, each with
    its own weight; ``random_masking`` hides parts of the past, that is of the places before, in whichever order.
    """

    causal: ClassVar[bool] = True

    seq_length: int
    eod: int
    eod_mask_loss: bool
    confinement: Confinement
    orders: TokenOrders | None = None
    random_masking: RandomMasking | None = None

    def __post_init__(self) -> None:
        confined = self.confinement.reset_position_ids or self.confinement.reset_attention_mask
        assert self.orders is None or not confined, "orders run across documents: megatron.config refuses this"

    def make_batch(self, tokens: Tensor, sample_ids: Tensor, mc_ids: Tensor | None = None) -> Batch:
        """Shift ``tokens`` [b, s+1] by one, after permuting them if there are orders.

        Without an ablation there is no noise, and ``mc_ids`` changes nothing.
        """
        assert tokens.shape[1] == self.seq_length + 1, f"samples of {self.seq_length} + 1 tokens, not {tokens.shape[1]}"
        noise_ids = _noise_ids(sample_ids, mc_ids)
        counts = torch.ones((len(tokens), self.seq_length), dtype=torch.float32)  # [b, s], of the targets 1 .. s
        if self.eod_mask_loss:
            counts[tokens[:, :-1] == self.eod] = 0.0
        positions = self.confinement.positions(tokens[:, :-1])  # [b, s]
        if self.orders is not None:
            order = self.orders.draw(noise_ids, self.seq_length + 1)  # [b, s+1]
            tokens, positions = tokens.gather(1, order), order[:, :-1].contiguous()
            counts = counts.gather(1, order[:, 1:] - 1)
        inputs = tokens[:, :-1].contiguous()  # [b, s]
        return Batch(
            inputs=inputs,
            targets=tokens[:, 1:].contiguous(),
            weights=counts / counts.numel(),
            positions=positions,
            counted=counts.sum(dim=1),
            sample_ids=sample_ids,
            attention_mask=self._attention_mask(inputs, noise_ids),
        )

    def for_evaluation(self, num_windows: int, num_mc: int) -> Autoregressive:
        """The likelihood in raster order with all of the past: exact, so one Monte Carlo id is enough."""
        return replace(self, orders=None, random_masking=None)

    def _attention_mask(self, inputs: Tensor, noise_ids: Sequence[tuple[int, int]]) -> Tensor | None:
        """``Batch.attention_mask``: documents [b, s], or [b, 1, s, s] with random masking. None: all of the past."""
        documents = self.confinement.documents(inputs)
        if self.random_masking is None:
            return documents
        return self.random_masking.attention_mask(noise_ids, self.seq_length, documents)


def _noise_ids(sample_ids: Tensor, mc_ids: Tensor | None) -> list[tuple[int, int]]:
    """Each row's (sample id, Monte Carlo id), which name its noise."""
    samples = sample_ids.tolist()
    draws = [0] * len(samples) if mc_ids is None else mc_ids.tolist()
    return list(zip(samples, draws, strict=True))
