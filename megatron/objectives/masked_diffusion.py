"""Masked (absorbing-state) diffusion: predict masked tokens from the visible ones, weighted to a bound on -log p(x).

What is estimated. Let h(p) = sum_i E[-log p_model(x_i | x, i masked and each other token masked with probability p)].
With the linear schedule alpha_t = 1 - t the continuous-time negative ELBO is NELBO = int_0^1 h(p) dp (MDLM, arXiv
2406.07524, Eqs. 10-11; LLaDA, arXiv 2502.09992, Eq. 3; SMDM, arXiv 2410.18514, Sec. 2; RADD, arXiv 2406.03736, whose
Theorem 1 lets the network ignore t). Both mask samplers below estimate it, per token (divided by L = s):

- ``bernoulli``: t ~ U(0,1), p = (1 - eps) t + eps, each token masked with probability p, each masked token weighs 1/p.
  Its mean is 1/(1 - eps) int_eps^1 h(p) dp: the NELBO with its first 0.1 % cut off and the rest averaged. It is not
  below the NELBO (so still an upper bound) whenever h(p) on [0, eps] is not above its mean, that is, when more context
  does not make prediction worse.
- ``exact``: l = 1 + floor(t L), exactly l tokens masked, each weighs L/l. Its mean is sum_l (1/l) E_l[sum of masked
  NLL] = NELBO without truncation, since int_0^1 C(L,l) p^(l-1) (1-p)^(L-l) dp = 1/l; it is also the any-order
  autoregressive negative log-likelihood, E over orders of sum_k -log p(x_o(k) | x_o(<k)) (RADD, Theorem 2; LLaDA, Eq.
  6). The number of masked tokens does not fluctuate at a given t, so its variance is lower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron.objectives.base import Batch, Confinement, Objective, scored_positions
from megatron.objectives.masking_levels import EvaluationLevels, LevelSampler
from megatron.seeding import Stream, uniforms

EPSILON = 1e-3
"""Smallest masking probability of the Bernoulli sampler: bounds the weight 1/p by 1000."""

EVALUATION_SEED = 20250714
"""Seeds the noise of every evaluation of every run: validation losses of two runs differ by their models only."""

EVALUATION_MASK_SAMPLER = "exact"
"""Evaluation ignores --mask-sampler: exact counts mean no truncation, lower variance, and one measure for every run."""


@dataclass(frozen=True)
class MaskedDiffusion(Objective):
    """Targets are tokens 1 .. s of a sample (the autoregressive targets); inputs are these with ``mask_id`` where
    masked.

    A masked token weighs 1/p (or L/l) / (b*s), a visible one 0; a row without masked tokens contributes 0. With
    ``eod_mask_loss`` eod targets weigh 0, though they may be masked in the inputs like any token. Documents are found
    on the clean tokens, never on the masked inputs. With probability ``ar_ratio`` a row's masks move to its end, their
    number and weight kept.
    """

    causal: ClassVar[bool] = False

    seq_length: int
    mask_id: int
    eod: int
    seed: int
    mask_stream: Stream
    levels: LevelSampler
    mask_sampler: str
    loss_weighting: str
    ar_ratio: float
    eod_mask_loss: bool
    confinement: Confinement

    def make_batch(self, tokens: Tensor, sample_ids: Tensor, mc_ids: Tensor | None = None) -> Batch:
        """Mask tokens 1 .. s of ``tokens`` [b, s+1]; noise is a pure function of (seed, sample id, Monte Carlo id)."""
        assert tokens.shape[1] == self.seq_length + 1, f"samples of {self.seq_length} + 1 tokens, not {tokens.shape[1]}"
        clean = tokens[:, 1:].contiguous()  # [b, s]
        masked, token_weight = self.draw_masks(sample_ids, mc_ids)  # [b, s] bool, [b] float64
        masked_inputs = torch.from_numpy(masked)

        weighted, counted = masked, np.full(len(masked), self.seq_length)
        if self.eod_mask_loss:
            is_eod = (clean == self.eod).numpy()  # [b, s]
            weighted, counted = masked & ~is_eod, self.seq_length - is_eod.sum(axis=1)
        weights = weighted * (token_weight[:, None] / masked.size)  # [b, s]; masked.size = b*s
        return Batch(
            inputs=clean.masked_fill(masked_inputs, self.mask_id),
            targets=clean,
            weights=torch.from_numpy(weights.astype(np.float32)),
            positions=self.confinement.positions(clean),
            counted=torch.from_numpy(counted.astype(np.float32)),
            sample_ids=sample_ids,
            attention_mask=self.confinement.documents(clean),
            scored=scored_positions(weighted),
        )

    def for_evaluation(self, num_windows: int, num_mc: int) -> MaskedDiffusion:
        """The NELBO on fixed levels and masks: no --ar-ratio, --low-noise-start or uniform weights, no run's seed."""
        return replace(
            self,
            seed=EVALUATION_SEED,
            mask_stream=Stream.EVALUATION_MASK,
            levels=EvaluationLevels(EVALUATION_SEED, num_windows, num_mc),
            mask_sampler=EVALUATION_MASK_SAMPLER,
            loss_weighting="elbo",
            ar_ratio=0.0,
        )

    def draw_masks(self, sample_ids: Tensor, mc_ids: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Masks [b, s] bool, True = masked, and each row's weight of a masked token, float64 [b], before 1/(b*s)."""
        samples = sample_ids.tolist()
        draws = [0] * len(samples) if mc_ids is None else mc_ids.tolist()
        masked = np.empty((len(samples), self.seq_length), dtype=bool)
        weight = np.empty(len(samples))
        for row, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            noise = uniforms(self.seed, self.mask_stream, sample, draw, self.seq_length)
            masked[row], weight[row] = self._mask_row(self.levels.level(sample, draw), noise)
            if self.ar_ratio > 0 and uniforms(self.seed, Stream.AR_RATIO, sample, draw, 1)[0] < self.ar_ratio:
                masked[row] = move_to_end(masked[row])
        return masked, weight

    def _mask_row(self, t: float, noise: np.ndarray) -> tuple[np.ndarray, float]:
        """Mask [s] and weight of a masked token at level ``t``, from ``noise`` [s] uniform in [0, 1).

        With ``loss_weighting="uniform"`` the weight is 1 / (mean masked share over t ~ U(0,1)), the ELBO's at t = 1/2:
        the weights of all masked tokens are equal and the expected sum over a row is L, as with the ELBO.
        """
        length = len(noise)
        if self.mask_sampler == "bernoulli":
            p = (1 - EPSILON) * t + EPSILON
            mask, share, mean_share = noise < p, p, (1 + EPSILON) / 2
        else:
            count = min(1 + int(t * length), length)
            mask = np.zeros(length, dtype=bool)
            mask[np.argpartition(noise, count - 1)[:count]] = True
            share, mean_share = count / length, (length + 1) / (2 * length)
        return mask, 1 / (share if self.loss_weighting == "elbo" else mean_share)


def move_to_end(mask: np.ndarray) -> np.ndarray:
    """As many True as in ``mask`` [s], all at the end; none stays none (``[-0:]`` would be everything)."""
    return np.arange(len(mask)) >= len(mask) - np.count_nonzero(mask)
