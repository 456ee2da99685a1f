"""Validation as a measurement: fixed windows, fixed noise, a mean with its standard error.

Windows are the first ``N`` of the validation files in file order; their noise depends on the window and the Monte Carlo
number only, so every evaluation of every run measures with common random numbers and differences between runs are
paired.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron.config import RunConfig
from megatron.data.gpt_dataset import Dataset
from megatron.data.loader import build_eval_batches
from megatron.data.lockstep import LockstepBatches
from megatron.distributed.agreement import agree_on_error
from megatron.distributed.topology import Topology
from megatron.engine import Engine
from megatron.errors import UserError
from megatron.objectives.base import Batch, Objective


@dataclass(frozen=True)
class Measurement:
    """A loss and how well it is known.

    Attributes:
        loss: nats per counted token; for MDM the negative ELBO, an upper bound of the negative log-likelihood.
        stderr: standard error of ``loss`` over windows (their Monte Carlo noise included), as if these were
            independent: docs/evaluation.md says what it is good for.
        bits_per_byte: the same loss per UTF-8 byte of text.
        windows: number of windows; num_mc: noise draws per window.
        seconds: wall-clock time.
    """

    loss: float
    stderr: float
    bits_per_byte: float
    windows: int
    num_mc: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def ratio_with_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Ratio of two totals over windows and its standard error (linearised ratio estimator, Cochran 1977, eq. 2.46).

    With equal counts it is the mean of the windows' losses and the usual s / sqrt(n). One window has no error: NaN.
    """
    ratio = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return ratio, math.nan
    residuals = sums - ratio * counts
    return ratio, float(np.sqrt(np.square(residuals).sum() * len(sums) / (len(sums) - 1)) / counts.sum())


class Validator:
    """Measures one dataset (validation or test) with the evaluation twin of the training objective."""

    def __init__(
        self, dataset: Dataset, objective: Objective, config: RunConfig, token_bytes: np.ndarray, topology: Topology
    ) -> None:
        self.dataset = dataset
        self.windows = number_of_windows(config, len(dataset))
        # AR is exact: more noise draws would repeat the same number.
        self.num_mc = config.objective.num_mc if config.objective.objective == "mdm" else 1
        self.objective = objective.for_evaluation(self.windows, self.num_mc)
        self._micro_batch_size = config.batch.micro_batch_size
        self._token_bytes = token_bytes
        self._topology = topology

    def describe(self) -> str:
        """What is measured, for the start of a run."""
        mdm = (
            f", {self.num_mc} noise draws a window (--num-mc), fixed for every run"
            if self.objective.causal is False
            else ""
        )
        return f"{self.windows} of {len(self.dataset)} windows of {self.dataset.seq_length} tokens{mdm}"

    def fingerprint(self) -> str:
        """A name of the windows: another one where their number, or the first's or last's tokens are others."""
        digest = hashlib.blake2b(f"{self.windows}".encode(), digest_size=8)
        for window in (0, self.windows - 1):
            digest.update(self.dataset[window].tobytes())
        return digest.hexdigest()

    def measure(self, engine: Engine) -> Measurement:
        """Evaluate the engine's model; a collective call."""
        start = time.perf_counter()
        # Per window: nats, counted tokens, bytes of the targets; each summed over the Monte Carlo draws.
        totals = np.zeros((3, self.windows))
        batches = build_eval_batches(
            self.dataset,
            self.objective,
            num_windows=self.windows,
            num_mc=self.num_mc,
            micro_batch_size=self._micro_batch_size,
            dp_rank=self._topology.data_parallel_rank,
            dp_size=self._topology.data_parallel_size,
        )
        read: list[tuple[np.ndarray, np.ndarray]] = []

        def counted() -> Iterator[Batch]:
            """The batches; what is to know of them besides their losses is taken down, so that none has to be kept."""
            for batch, window_ids, valid in batches:
                keep = valid.numpy()
                ids = window_ids.numpy()[keep]
                if self._topology.reports_loss:
                    np.add.at(totals[1], ids, batch.counted.double().numpy()[keep])
                    np.add.at(totals[2], ids, self._bytes(batch)[keep])
                read.append((ids, keep))
                yield batch

        # Only one rank may hold the window that cannot be read.
        feed = LockstepBatches(counted(), self._micro_batch_size, self.dataset.seq_length)
        together = self._micro_batch_size * self._topology.data_parallel_size
        # Results stay on the device until the end: no wait per batch.
        results = engine.eval_batches(feed, -(-self.windows * self.num_mc // together))
        with agree_on_error(self._topology):
            if feed.error is not None:
                raise feed.error
        if self._topology.reports_loss:
            positions = self._micro_batch_size * self.dataset.seq_length
            for rows, (ids, keep) in zip(results, read, strict=True):
                # weights hold 1/(b*s): undo it to get nats per row.
                np.add.at(totals[0], ids, rows.double().cpu().numpy()[keep] * positions)
        totals = self._sum_over_ranks(totals)
        loss, stderr = ratio_with_error(totals[0], totals[1])
        nats = loss * totals[1].sum()
        return Measurement(
            loss=loss,
            stderr=stderr,
            bits_per_byte=nats / math.log(2) / max(1.0, totals[2].sum()),
            windows=self.windows,
            num_mc=self.num_mc,
            seconds=time.perf_counter() - start,
        )

    def _bytes(self, batch: Batch) -> np.ndarray:
        """[b]: UTF-8 bytes of the targets that the loss counts."""
        found = self._token_bytes[batch.targets.numpy()]  # [b, s]
        if self.objective.causal:
            # With --eod-mask-loss the first token of a document is not predicted. (MDM leaves out eod, which has no
            # bytes; a weight of 0 says there that the token was not masked this time.)
            found = found * (batch.weights.numpy() != 0)
        return found.sum(axis=1)

    def _sum_over_ranks(self, totals: np.ndarray) -> np.ndarray:
        if self._topology.world_size == 1:
            return totals
        summed = torch.from_numpy(totals)
        dist.all_reduce(summed, group=self._topology.control_group)  # one rank of each replica has its rows
        return summed.numpy()


def number_of_windows(config: RunConfig, available: int) -> int:
    """Windows that a validation uses: ``--eval-windows``, else ``--eval-iters`` global batches, never more than there
    are.

    Raises:
        UserError: the data set holds no window.
    """
    if available < 1:
        raise UserError(
            f"validation data hold no window of --seq-length {config.batch.seq_length} + 1 tokens: use more data"
        )
    asked = config.evaluation.eval_windows
    if asked == "all":
        return available
    if asked is not None:
        return min(available, int(asked))
    assert config.batch.global_batch_size is not None, "resolve_for_world comes first"
    return min(available, config.evaluation.eval_iters * config.batch.global_batch_size)
