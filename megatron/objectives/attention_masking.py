"""--randmask-ratio: attention masks that hide random parts of the past (token masking on AR, arXiv 2507.15857).

Each position of a sequence is chosen with probability r. A chosen position draws its own u ~ U(0, 1) and loses each of
its past positions with probability p = (1 - eps) u + eps, eps = 1e-3 (the masking probability of the diffusion
objective at level u), independently of each other; never itself. Positions that are not chosen see all of their past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.objectives.masked_diffusion import EPSILON
from megatron.seeding import Stream, random_words, unit_interval

_RESOLUTION = 1 << 16
"""Hiding is decided by 16-bit numbers, four to a random word: p is a multiple of 2^-16."""


@dataclass(frozen=True)
class RandomMasking:
    """Causal masks with random parts of the past hidden: pure functions of (seed, sample id, Monte Carlo id)."""

    seed: int
    ratio: float
    """Probability, in 0 .. 1, that a position is chosen to lose past positions."""

    def attention_mask(
        self, noise_ids: Sequence[tuple[int, int]], length: int, documents: Tensor | None = None
    ) -> Tensor:
        """[b, 1, length, length] bool, True where the query (dim 2) may attend to the key (dim 3).

        ``noise_ids`` are the b rows' (sample id, Monte Carlo id); ``documents`` [b, length] int32 number each
        position's document, outside of which everything is hidden (None: one document a row).
        """
        visible = np.empty((len(noise_ids), 1, length, length), dtype=bool)
        for row, (sample, draw) in enumerate(noise_ids):
            self._fill(visible[row, 0], sample, draw)
        if documents is not None:
            # numpy compares the pairs several times faster than torch on one core, and 16-bit numbers faster still.
            number = documents.numpy().astype(np.int16 if length < 2**15 else np.int32, copy=False)
            visible &= number[:, None, :, None] == number[:, None, None, :]
        return torch.from_numpy(visible).tril_()

    def _fill(self, visible: np.ndarray, sample_id: int, mc_id: int) -> None:
        """Write the mask of one sequence into ``visible`` [s, s]; what it writes above the diagonal means nothing.

        Only the past needs random numbers, half of the square: row q of the first half reads its q numbers from the
        left end of row q of ``numbers``, and row s-1-q reads its own from the right end of the same row.
        """
        length = len(visible)
        half = (length + 1) // 2
        count = -(-half * length // 4)
        raw = random_words(self.seed, Stream.RANDMASK, sample_id, mc_id, 2 * length + count)
        chosen, level = unit_interval(raw[: 2 * length]).reshape(2, length)  # each [s]
        p = np.where(chosen < self.ratio, (1 - EPSILON) * level + EPSILON, 0.0)
        threshold = np.minimum(np.rint(p * _RESOLUTION), _RESOLUTION - 1).astype(np.uint16)  # [s]
        # Little-endian whatever the machine: every rank cuts the same four numbers from a word.
        numbers = raw[2 * length :].astype("<u8", copy=False).view("<u2")[: half * length].reshape(half, length)
        np.greater_equal(numbers, threshold[:half, None], out=visible[:half])
        opposite = numbers[: length - half][::-1, ::-1]  # [s - half, s]; row s-1-q of the mask is row q of numbers
        np.greater_equal(opposite, threshold[half:, None], out=visible[half:])
        np.fill_diagonal(visible, True)
