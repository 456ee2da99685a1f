"""What is summed up between two log lines, of steps whose outcome is known later."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.distributed.topology import single_process_topology
from megatron.engine import Reading, StepResult
from megatron.interval import Interval


def step(loss: float, norm: float, counted: float = 1.0, skipped: bool | None = None) -> StepResult:
    """A step as an engine reports it; without ``skipped`` the norm says whether it was applied."""
    return StepResult(torch.tensor(loss), torch.tensor(counted), Reading(torch.tensor(norm)), skipped, [], [])


def closed(*steps: StepResult) -> Interval:
    """An interval of these steps, all of whose outcomes are known."""
    interval = Interval()
    for result in steps:
        interval.begin(result, rate=0.5, size=4)
        if result is not steps[-1]:
            interval.end(result)
    interval.close(single_process_topology(), loss_scale=None)  # before the last one's outcome is known
    interval.end(steps[-1])
    return interval


def test_the_mean_is_over_applied_steps_and_counted_tokens() -> None:
    interval = closed(step(3.0, 1.0, counted=0.75), step(math.nan, math.nan), step(1.0, 2.0, counted=0.5))
    assert interval.mean_loss() == pytest.approx((4.0 + 2.0) / 2)
    assert (interval.steps, interval.applied, interval.samples) == (3, [True, False, True], 12)
    assert interval.grad_norm == 2.0 and interval.is_closed


def test_of_steps_that_changed_nothing_there_is_no_mean() -> None:
    interval = closed(step(2.0, math.inf))
    assert math.isnan(interval.mean_loss()) and interval.grad_norm is None


def test_a_host_that_knows_overrules_the_norm() -> None:
    """fp16 skips a step over its loss scale; fp32 has no norm in some of DeepSpeed's optimizers."""
    interval = closed(step(2.0, 1.0, skipped=True), step(5.0, math.nan, skipped=False))
    assert interval.mean_loss() == 5.0 and interval.applied == [False, True]
