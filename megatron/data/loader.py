"""Batches for one data-parallel rank: which samples it gets, read and corrupted ahead of time in worker processes.

The order of samples is a property of the run, not of the rank: global batch [start, start + size) is cut into
micro-batches of ``micro_batch_size * dp_size`` samples, and rank r takes the r-th ``micro_batch_size`` of each.
Everything is a function of sample numbers, so a resumed run begins at its number and replays nothing.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from megatron.batch_schedule import BatchSchedule
from megatron.data.gpt_dataset import Dataset
from megatron.errors import UserError
from megatron.objectives.base import Batch, Objective

PREFETCH = 4
"""Micro-batches that each worker keeps ready, at least."""

MESSAGE_BYTES = 2**23
"""Of several micro-batches that a worker hands over together. Each message costs the training process about a
millisecond of Python (torch sends a file descriptor through a socket of its own), which small models feel."""

_RUN_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@dataclass(frozen=True)
class Rows:
    """The rows of one micro-batch."""

    samples: np.ndarray
    """[b] int64"""
    mc_ids: np.ndarray | None = None
    """[b] int64: Monte Carlo number of each row (evaluation)"""
    valid: np.ndarray | None = None
    """[b] bool: False for rows that only fill the micro-batch up (evaluation)"""


Plan = Callable[[], Iterator[Rows]]


def training_rows(schedule: BatchSchedule, consumed_samples: int, train_samples: int, micro_batch_size: int,
                  dp_rank: int, dp_size: int) -> Iterator[Rows]:
    """Rank ``dp_rank``'s micro-batches in order, of the whole global batches in [consumed_samples, train_samples).

    A last global batch that would go past ``train_samples`` is not begun. Raises UserError if ``consumed_samples`` is
    inside a global batch or one does not divide into micro-batches.
    """
    start = consumed_samples
    while (batch := schedule.batch_at(start)).start + batch.size <= train_samples:
        if batch.start != start:
            raise UserError(f"{start} consumed samples are not the end of a global batch: continue with the "
                            "--global-batch-size and --rampup-batch-size that the checkpoint was trained with")
        if batch.size % (micro_batch_size * dp_size):
            raise UserError(f"a global batch of {batch.size} samples (--global-batch-size, --rampup-batch-size) does "
                            f"not divide into --micro-batch-size {micro_batch_size} on {dp_size} data-parallel ranks")
        end = batch.start + batch.size
        for first in range(batch.start + dp_rank * micro_batch_size, end, micro_batch_size * dp_size):
            yield Rows(np.arange(first, first + micro_batch_size))
        start = end


def evaluation_rows(num_windows: int, num_mc: int, micro_batch_size: int, dp_rank: int,
                    dp_size: int) -> Iterator[Rows]:
    """Rank ``dp_rank``'s share of all (window, Monte Carlo id) rows, a window's rows one after another.

    Every rank gets equally many micro-batches of full size, because a forward pass may hold collectives; rows past the
    end repeat the last one and are not ``valid``. Over all ranks each row is valid exactly once.
    """
    rows, together = num_windows * num_mc, micro_batch_size * dp_size
    for start in range(0, rows, together):
        row = start + dp_rank * micro_batch_size + np.arange(micro_batch_size)
        inside = np.minimum(row, rows - 1)
        yield Rows(inside // num_mc, inside % num_mc, row < rows)


class BatchStream(Iterator[Batch]):
    """The batches of a plan, in its order. With workers they are made ahead, in processes that start at once.

    A batch that a worker could not make is made here, where the error is raised as it is. Draws nothing from torch's
    global generator (a loader that did would move the dropout of a resumed run).
    """

    def __init__(self, reader: _Reader, plan: Plan, micro_batch_size: int, num_workers: int, pin_memory: bool) -> None:
        self._reader, self._pin_memory = reader, pin_memory
        self._arrived: deque[Batch | Rows] = deque()
        self._messages: Iterator[_Message | Rows]
        if num_workers == 0:
            self._messages = plan()
        else:
            together = min(PREFETCH, max(1, MESSAGE_BYTES // (reader.bytes_of_row() * micro_batch_size)))
            loader = DataLoader(
                _Messages(reader), batch_size=None, sampler=_PlanSampler(plan, together), num_workers=num_workers,
                collate_fn=_pack, pin_memory=pin_memory, prefetch_factor=max(2, PREFETCH // together),
                worker_init_fn=_start_worker, generator=torch.Generator(),
            )
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _RUN_SIGNALS)  # workers are born with them blocked
            try:
                self._messages = iter(loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def __next__(self) -> Batch:
        while not self._arrived:
            message = next(self._messages)
            self._arrived.extend([message] if isinstance(message, Rows) else message.unpack())
        batch = self._arrived.popleft()
        if isinstance(batch, Batch):
            return batch
        try:
            made = self._reader[batch]
        except Exception:
            self.close()  # now, not whenever the traceback that holds this stream is collected
            raise
        return made.pin_memory() if self._pin_memory else made

    def close(self) -> None:
        """End the workers; also happens when the stream is dropped."""
        self._messages = iter(())
        self._arrived.clear()


def build_train_loader(dataset: Dataset, objective: Objective, schedule: BatchSchedule, *, consumed_samples: int,
                       train_samples: int, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1,
                       num_workers: int = 2, pin_memory: bool = False) -> BatchStream:
    """One rank's training micro-batches from ``consumed_samples`` on (see :func:`training_rows`), in order.

    ``num_workers`` 0 makes each batch when it is asked for, in this process. Raises UserError as :func:`training_rows`
    does, when the batch in question is asked for.
    """
    assert train_samples <= len(dataset)

    def plan() -> Iterator[Rows]:
        return training_rows(schedule, consumed_samples, train_samples, micro_batch_size, dp_rank, dp_size)

    return BatchStream(_Reader(dataset, objective), plan, micro_batch_size, num_workers, pin_memory)


def build_eval_batches(dataset: Dataset, objective: Objective, *, num_windows: int, num_mc: int,
                       micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1, num_workers: int = 0,
                       pin_memory: bool = False) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """One rank's share of an evaluation: (batch, window ids [b] int64, valid [b] bool), see :func:`evaluation_rows`.

    ``objective`` is what :meth:`Objective.for_evaluation` of the training objective returned. Sum what is ``valid``
    over all batches and ranks; note that a batch's weights hold 1/(b*s) with b = ``micro_batch_size``, rows that are
    not valid included.
    """
    assert 0 < num_windows <= len(dataset) and num_mc > 0

    def plan() -> Iterator[Rows]:
        return evaluation_rows(num_windows, num_mc, micro_batch_size, dp_rank, dp_size)

    reader = _Reader(dataset, objective)
    stream = BatchStream(reader, plan, micro_batch_size, num_workers, pin_memory)
    for batch, rows in zip(stream, plan(), strict=True):
        assert rows.valid is not None
        yield batch, torch.from_numpy(rows.samples), torch.from_numpy(rows.valid)


class _Reader:
    """Rows -> batch: reads the tokens and lets the objective make the noise."""

    def __init__(self, dataset: Dataset, objective: Objective) -> None:
        self.dataset, self.objective = dataset, objective

    def __getitem__(self, rows: Rows) -> Batch:
        tokens = np.empty((len(rows.samples), self.dataset.seq_length + 1), np.int64)  # [b, s+1]
        for i, sample in enumerate(rows.samples.tolist()):
            if i > 0 and sample == rows.samples[i - 1]:
                tokens[i] = tokens[i - 1]
            else:
                self.dataset.read_into(sample, tokens[i])
        mc_ids = None if rows.mc_ids is None else torch.from_numpy(rows.mc_ids)
        return self.objective.make_batch(torch.from_numpy(tokens), torch.from_numpy(rows.samples), mc_ids)

    def bytes_of_row(self) -> int:
        """What a row of a batch takes, masks and all."""
        tokens = torch.zeros((1, self.dataset.seq_length + 1), dtype=torch.int64)
        batch = self.objective.make_batch(tokens, torch.zeros(1, dtype=torch.int64))
        return sum(tensor.nbytes for tensor in vars(batch).values() if tensor is not None)


class _Messages(torch.utils.data.Dataset["list[Batch | Rows]"]):
    """What a worker makes at a time: batches, and the rows of those that it could not make."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def __getitem__(self, together: Sequence[Rows]) -> list[Batch | Rows]:
        made: list[Batch | Rows] = []
        for rows in together:
            try:
                made.append(self._reader[rows])
            except Exception:  # raised again where it can be seen
                made.append(rows)
        return made


class _PlanSampler(Sampler["list[Rows]"]):
    """What a DataLoader asks for "indices": the rows of the plan, ``together`` at a time."""

    def __init__(self, plan: Plan, together: int) -> None:
        self._plan, self._together = plan, together

    def __iter__(self) -> Iterator[list[Rows]]:
        rows = self._plan()
        while together := list(itertools.islice(rows, self._together)):
            yield together


Layout = tuple[tuple[str, torch.dtype, torch.Size, int], ...]
"""(field, dtype, shape, first byte) of each tensor of a batch."""


@dataclass(frozen=True)
class _Message:
    """Batches as one block of memory: torch hands each tensor of a worker over separately."""

    data: Tensor
    """[bytes] uint8"""
    parts: tuple[Layout | Rows, ...]
    """Where the tensors of each batch are, or the rows of one that could not be made."""

    def pin_memory(self, device: str | None = None) -> _Message:
        """The same block in page-locked memory (the name that DataLoader looks for)."""
        return _Message(self.data.pin_memory(), self.parts)

    def unpack(self) -> list[Batch | Rows]:
        """The batches; their tensors are views of the block."""
        return [part if isinstance(part, Rows) else Batch(**self._views(part)) for part in self.parts]

    def _views(self, layout: Layout) -> dict[str, Tensor]:
        return {name: self.data[first : first + shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for name, dtype, shape, first in layout}


def _pack(batches: Sequence[Batch | Rows]) -> _Message:
    """A worker's batches as they are sent."""
    parts: list[Layout | Rows] = []
    tensors: list[Tensor] = []
    size = 0
    for batch in batches:
        if isinstance(batch, Rows):
            parts.append(batch)
            continue
        layout = []
        for name, tensor in vars(batch).items():
            if tensor is not None:
                tensors.append(tensor)
                layout.append((name, tensor.dtype, tensor.shape, size))
                size += -(-tensor.nbytes // 64) * 64  # views need their dtype's alignment
        parts.append(tuple(layout))
    message = _Message(torch.empty(size, dtype=torch.uint8), tuple(parts))
    views = [view for part in parts if not isinstance(part, Rows) for view in message._views(part).values()]
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    return message


def _start_worker(worker: int) -> None:
    """Leave the run's signals to the run: Slurm, torchrun and Ctrl-C signal whole process groups.

    A worker that obeyed would break the step that its parent is about to finish and save. SIGTERM from the parent
    itself still ends it; a thread waits for that, since a Python handler does not learn who sent a signal.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    threading.Thread(target=_await_parents_signal, args=(os.getppid(),), daemon=True).start()


def _await_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
