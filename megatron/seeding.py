"""Noise as a pure function of (seed, stream, sample id, Monte Carlo id): no generator state to share or restore.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a keyed bijection of a counter.
The key holds (seed, stream) and the counter holds (block, Monte Carlo id, sample id), so every purpose of every sample
owns 2^66 numbers that overlap with nobody's. Whoever asks (any rank, any pipeline stage, any loader process, before or
after a resume) gets the same numbers for the same sample and independent ones for another.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

_WORD = (1 << 64) - 1


class Stream(enum.IntEnum):
    """What a number is drawn for. One value per purpose; a value is never reused or renumbered (runs would change)."""

    TIME = 1
    MASK = 2
    ORDER = 3
    AR_RATIO = 4
    RANDMASK = 5
    EVALUATION_TIME = 6
    EVALUATION_MASK = 7
    TORCH = 8
    ORDER_LIST = 9


class _Key(ISeedSequence):
    """Philox's key, word for word, in the guise of a seed: with ``Philox(key=...)`` numpy first asks the operating
    system for entropy, only to throw it away, which takes longer than the numbers of a short row.
    """

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert n_words == len(self._words) and dtype is np.uint64, "numpy's Philox asks for its key"
        return self._words


def random_words(seed: int, stream: Stream, sample_id: int, mc_id: int, count: int) -> np.ndarray:
    """The first ``count`` random words, uint64 [count], of the sequence that the other arguments name.

    The generator's raw output, not that of ``Generator`` methods, whose algorithms numpy may change between versions.
    ``seed``, ``sample_id`` and ``mc_id`` are taken modulo 2^64.
    """
    counter = np.array([0, mc_id & _WORD, sample_id & _WORD, 0], dtype=np.uint64)  # word 0 counts the blocks of four
    key: Any = _Key(seed & _WORD, int(stream))  # numpy's own annotations do not know of its seed interface
    return np.random.Philox(key, counter=counter).random_raw(count)


def uniforms(seed: int, stream: Stream, sample_id: int, mc_id: int, count: int) -> np.ndarray:
    """The first ``count`` numbers, float64 [count], uniform in [0, 1), made of :func:`random_words`."""
    return unit_interval(random_words(seed, stream, sample_id, mc_id, count))


def unit_interval(raw: np.ndarray) -> np.ndarray:
    """Numbers uniform in [0, 1), float64 in the shape of the uint64 random words ``raw``: their upper 53 bits."""
    return (raw >> np.uint64(11)) * 2.0**-53


def integer(seed: int, stream: Stream, sample_id: int, mc_id: int, bound: int) -> int:
    """One integer uniform in 0 .. ``bound - 1`` (``bound`` >= 1, far below 2^53: the bias is ``bound`` / 2^53)."""
    return min(int(uniforms(seed, stream, sample_id, mc_id, 1)[0] * bound), bound - 1)


def permutation(seed: int, stream: Stream, sample_id: int, mc_id: int, count: int) -> np.ndarray:
    """Uniform random permutation of 0 .. ``count - 1``, int64 [count]: the argsort of ``count`` uniforms."""
    return np.argsort(uniforms(seed, stream, sample_id, mc_id, count), kind="stable")


def derive(seed: int, *words: int) -> int:
    """A seed in 0 .. 2^63 - 1 for a generator that wants one number: BLAKE2b of ``seed`` and ``words``, in order."""
    packed = b"".join((word & _WORD).to_bytes(8, "little") for word in (seed, *words))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int, data_parallel_rank: int, pipeline_parallel_rank: int = 0) -> None:
    """Seed torch's default generators (CPU and every GPU), which only dropout uses, from the run seed and the rank.

    Data-parallel ranks and pipeline stages drop different units; ranks that hold the same samples and layers
    (tensor-parallel peers) drop the same ones, and draw what must differ between them through
    ``tensor_parallel.differs_by_rank``. Weight initialisation must not follow this call: weights do not depend on the
    rank.
    """
    stage = (pipeline_parallel_rank,) if pipeline_parallel_rank else ()
    torch.manual_seed(derive(seed, Stream.TORCH, data_parallel_rank, *stage))
