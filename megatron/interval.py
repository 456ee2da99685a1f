"""What is summed up between two log lines, and a clock that stands still while something else than training goes on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron.distributed.topology import Topology
from megatron.engine import StepResult


@dataclass
class Interval:
    """Sums between two log lines. Losses stay on the device until :meth:`mean_loss`, so a step waits for nothing."""

    losses: list[torch.Tensor] = field(default_factory=list)
    counted: list[torch.Tensor] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    applied: int = 0
    nan_steps: int = 0
    rate: float = 0.0
    grad_norm: float | None = None
    batch_size: int = 0
    _began: float = field(default_factory=time.perf_counter)
    paused_seconds: float = 0.0

    def add(self, result: StepResult, rate: float, size: int) -> None:
        """Count an applied step."""
        self.losses.append(result.loss)
        self.counted.append(result.counted)
        self.grad_norm = result.grad_norm
        self.applied += 1
        self._count(rate, size)

    def add_skipped(self, rate: float, size: int) -> None:
        """Count a step that was not applied; its loss is not part of the mean."""
        self._count(rate, size)

    def _count(self, rate: float, size: int) -> None:
        self.steps += 1
        self.samples += size
        self.rate, self.batch_size = rate, size

    def mean_loss(self, topology: Topology) -> float:
        """Mean over the applied steps of the loss a counted token, averaged over data-parallel ranks; NaN without
        any.
        """
        if not self.losses:
            return math.nan
        sums = torch.stack(
            [
                torch.stack([loss.float() for loss in self.losses]),
                torch.stack(self.counted).to(self.losses[0].device, torch.float32),
            ]
        )  # [2, steps]
        if topology.data_parallel_size > 1:
            dist.all_reduce(sums, group=topology.data_group)
        return float((sums[0] / sums[1]).mean())

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
