"""What is summed up between two log lines, and a clock that stands still while something else than training goes on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron.distributed.topology import Topology
from megatron.engine import Reading, StepResult


@dataclass
class Interval:
    """Sums between two log lines. Losses stay on the device, and what it does not know yet is not asked for: a step is
    begun (:meth:`begin`) as soon as it is launched and ended (:meth:`end`) when its outcome is known."""

    losses: list[torch.Tensor] = field(default_factory=list)
    counted: list[torch.Tensor] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    samples: int = 0
    nan_steps: int = 0
    rate: float = 0.0
    grad_norm: float | None = None
    batch_size: int = 0
    loss_scale: float | None = None
    _began: float = field(default_factory=time.perf_counter)
    _reading: Reading | None = None
    paused_seconds: float = 0.0

    def begin(self, result: StepResult, rate: float, size: int) -> None:
        """Count a step of ``size`` samples that is under way."""
        self.losses.append(result.loss)
        self.counted.append(result.counted)
        self.samples += size
        self.rate, self.batch_size = rate, size

    def end(self, result: StepResult) -> None:
        """Say what became of the step begun before; the loss of one that was not applied is not part of the mean."""
        self.applied.append(result.applied)
        if result.applied:
            self.grad_norm = result.grad_norm

    @property
    def steps(self) -> int:
        """Steps begun."""
        return len(self.losses)

    def close(self, topology: Topology, loss_scale: float | None) -> None:
        """The last step has begun: have the losses sent to the host. A collective call of data-parallel ranks."""
        sums = torch.stack(
            [
                torch.stack([loss.float() for loss in self.losses]),
                torch.stack(self.counted).to(self.losses[0].device, torch.float32, non_blocking=True),
            ]
        )  # [2, steps]
        if topology.data_parallel_size > 1:
            dist.all_reduce(sums, group=topology.data_group)
        self._reading, self.loss_scale = Reading(sums[0] / sums[1]), loss_scale

    @property
    def is_closed(self) -> bool:
        """Whether it only waits to be written."""
        return self._reading is not None

    def mean_loss(self) -> float:
        """Mean over the applied steps of the loss a counted token, averaged over data-parallel ranks; NaN without any.
        """
        assert self._reading is not None and len(self.applied) == self.steps
        losses = self._reading.numbers()[torch.tensor(self.applied)]
        return float(losses.mean()) if len(losses) else math.nan

    def seconds(self) -> float:
        """Seconds since the interval began, validations and saves left out."""
        return time.perf_counter() - self._began - self.paused_seconds

    def paused(self) -> Pause:
        """Context in which the interval's clock stands still."""
        return Pause(self)


@dataclass
class Pause:
    """While it lasts the interval's clock stands still; ``seconds`` says afterwards how long that was."""

    interval: Interval
    began: float = 0.0
    seconds: float = 0.0

    def __enter__(self) -> Pause:
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.interval.paused_seconds += self.seconds
