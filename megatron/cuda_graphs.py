"""Micro-batches as CUDA graphs: recorded once for each size, then launched as one.

The kernels of a small model are over before Python has started the next ones. What is recorded is a whole forward and
backward pass, with what its hooks do: adding gradients to their fp32 sums. It runs the same kernels in the same order,
so nothing changes but the time between them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from megatron.objectives.base import Batch

MOST: Final = 16
"""Sizes that are recorded; batches of others are computed as if there were no graphs. Each graph takes some memory."""
_READ: Final = ("inputs", "positions", "targets", "weights", "scored")
"""What of a batch the model reads, where no batch has a mask."""

Play = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Play, Tensor]]
"""From a function of no arguments: what does on the device what the function does, and the tensor that it leaves its
result in. Whether the device does it at once, too, is not said."""


@dataclass(frozen=True)
class _Recording:
    """What one graph reads, what starts it, and where its loss stands then."""

    batch: Batch
    play: Play
    loss: Tensor


class MicroBatchGraphs:
    """``compute(batch, divisor)``, which works on the device alone, played from a recording for each size of batch.

    The first batch of a size is computed by itself, so that all that it needs is compiled and allocated; the second one
    is recorded.
    """

    def __init__(
        self, compute: Callable[[Batch, int], Tensor], device: torch.device, record: Record | None = None
    ) -> None:
        """``compute`` returns a scalar that has no graph of autograd; ``record`` is :class:`CudaRecorder` by itself."""
        self._compute = compute
        self._device = device
        self._record = CudaRecorder() if record is None else record
        self._recordings: dict[tuple[int, int], _Recording | None] = {}

    def __call__(self, batch: Batch, divisor: int) -> Tensor:
        """``compute`` of a ``batch`` in host memory; the result is the caller's to keep."""
        assert batch.attention_mask is None, "a batch with a mask has more to read"
        key = (divisor, -1 if batch.scored is None else len(batch.scored))
        if key not in self._recordings:
            if len(self._recordings) < MOST:
                self._recordings[key] = None
            return self._compute(batch.to(self._device, non_blocking=True), divisor)
        recording = self._recordings[key]
        if recording is None:
            static = copy.deepcopy(batch.to(self._device))  # on a CPU, too, not the caller's tensors
            recording = _Recording(static, *self._record(lambda: self._compute(static, divisor)))
            self._recordings[key] = recording
        for name in _READ:
            tensor: Tensor | None = getattr(batch, name)
            if tensor is not None:
                getattr(recording.batch, name).copy_(tensor, non_blocking=True)
        recording.play()
        return recording.loss.clone()


class CudaRecorder:
    """Records on a GPU. Graphs share their memory: one is over before the next begins, and only losses are kept."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Play, Tensor]:
        """See :data:`Record`. Nothing is computed before the first time that the graph is played."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads lock pages of the batches to come meanwhile, which the default mode would forbid them.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result
