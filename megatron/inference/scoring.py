"""Losses of many short sequences: sorted by length, padded to the longest of their batch, spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron.distributed.agreement import gather_objects
from megatron.distributed.topology import Topology, single_process_topology
from megatron.inference.forward import final_hidden, kernels_for_any_shape, padding_mask, token_scores
from megatron.model.sharding import SequentialGPT

Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""


@dataclass(frozen=True)
class Row:
    """One forward pass of one sequence.

    Attributes:
        inputs: [s] what the model reads.
        where: [n] positions of ``inputs`` whose prediction is scored, n >= 1.
        targets: [n] the token that should be predicted there.
    """

    inputs: np.ndarray
    where: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Scores:
    """What the model said at the scored positions of one row: each [n].

    Attributes:
        nll: -log p(target), nats.
        correct: whether the target is the most probable token.
        confidence: log probability of the most probable token.
    """

    nll: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray


class Scorer:
    """Scores rows with one model. Every rank holds the whole model and must make the same calls."""

    def __init__(
        self,
        model: SequentialGPT,
        causal: bool,
        padding_id: int,
        batch_tokens: int,
        topology: Topology | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``batch_tokens``: positions of a batch, padding included. ``padding_id``: a token, never the mask id: padding
        lies outside attention, and what is predicted there is not looked at."""
        self.model = model
        self.causal = causal
        self.padding_id = padding_id
        self.batch_tokens = batch_tokens
        self.topology = topology or single_process_topology()
        assert self.topology.model_parallel_size == 1, "every rank holds the whole model"
        self.progress = progress

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Scores of every row, in order. A collective call with the same rows on every rank."""
        batches = batch_by_length([len(row.inputs) for row in rows], self.batch_tokens)
        rank, size = self.topology.rank, self.topology.world_size
        done, results = 0, []
        for batch in batches[rank::size]:
            # Results stay on the device until the end: no wait per batch.
            results.append(self._forward([rows[index] for index in batch]))
            done += len(batch) * size
            if self.progress is not None:
                self.progress(min(done, len(rows)), len(rows))
        own = torch.cat(results, dim=1).double().cpu().numpy() if results else np.zeros((3, 0))
        gathered = gather_objects(self.topology, own)
        scores: list[Scores | None] = [None] * len(rows)
        for part in range(size):
            start = 0
            for index in (index for batch in batches[part::size] for index in batch):
                stop = start + len(rows[index].where)
                nll, correct, confidence = gathered[part][:, start:stop]
                scores[index], start = Scores(nll, correct > 0, confidence), stop
        return [found for found in scores if found is not None]

    @torch.no_grad()
    def _forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """[3, n]: nll, correct and confidence at all scored positions of ``rows``, one row after the other."""
        device = next(self.model.parameters()).device
        lengths = np.array([len(row.inputs) for row in rows])
        width = int(lengths.max())
        inputs = np.full((len(rows), width), self.padding_id, dtype=np.int64)
        for row, line in zip(rows, inputs, strict=True):
            line[: len(row.inputs)] = row.inputs
        where = np.concatenate([row.where + index * width for index, row in enumerate(rows)])
        targets = np.concatenate([row.targets for row in rows])
        tokens, flat, wanted = (_send(x, device) for x in (inputs, where, targets))
        # A causal model never sees the padding behind a row; rows of one length have none.
        mask = None
        if not self.causal and int(lengths.min()) < width:
            mask = padding_mask(_send(lengths, device), width)
        positions = torch.arange(width, device=device).expand(len(rows), width)
        with kernels_for_any_shape():
            hidden = final_hidden(self.model, tokens, positions, mask).flatten(0, 1)  # [b * s, h]
        return torch.stack(token_scores(self.model, hidden.index_select(0, flat), wanted))


def _send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """``values`` on ``device``. From pageable memory a GPU would first finish all that it was asked for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def batch_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut the indices of ``lengths`` into batches, longest first: rows of a batch have nearly or exactly one length,
    and padded to its longest row it has at most ``batch_tokens`` positions (one row has any length)."""
    order = np.argsort(np.negative(np.asarray(lengths, dtype=np.int64)), kind="stable").tolist()
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches
