"""Which steps are profiled, what is written, and that nothing happens without ``--profile``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import LoggingConfig
from megatron.distributed.topology import single_process_topology
from megatron.errors import UserError
from megatron.profiling import StepProfiler, in_words
from megatron.tokenizer import Vocabulary
from megatron.trace_shares import HEADINGS, Shares, read_trace


def profiled(directory: Path, steps: int, **flags: Any) -> list[tuple[Shares, int]]:
    """Reports of a loop of ``steps`` steps in which step n multiplies matrices of n rows."""
    reports: list[tuple[Shares, int]] = []
    config = LoggingConfig(**({"profile": True, "profile_dir": str(directory / "profile")} | flags))
    profiler = StepProfiler(
        config, single_process_topology(), Vocabulary(100, 128), lambda shares, count: reports.append((shares, count))
    )
    for number in range(1, steps + 1):
        profiler.begin_step(number)
        torch.ones(number, 3) @ torch.ones(3, 5)
        profiler.end_step(number)
    profiler.finish()
    return reports


def rows(directory: Path) -> list[int]:
    """The steps that a trace shows."""
    events = read_trace(directory / "profile" / "trace.json.gz")
    return [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::mm"]


@pytest.mark.parametrize(
    ("start", "end", "steps", "seen"),
    [(3, 5, 6, [3, 4]), (1, 2, 3, [1]), (1, 3, 5, [1, 2]), (2, 9, 3, [2, 3])],
)
def test_the_steps_asked_for(tmp_path: Path, start: int, end: int, steps: int, seen: list[int]) -> None:
    ((shares, count),) = profiled(tmp_path, steps, profile_step_start=start, profile_step_end=end)
    assert rows(tmp_path) == seen and count == len(seen)
    written = json.loads((tmp_path / "profile" / "shares.json").read_text())
    assert written["steps"] == len(seen) and written["shares"] == pytest.approx(shares.shares)
    assert written["kernels"] and written["kernels"][0]["seconds"] > 0
    assert in_words(shares, count).startswith(f"profile of {len(seen)} steps, ")


def test_a_run_that_ends_before_writes_nothing(tmp_path: Path) -> None:
    assert profiled(tmp_path, 3) == []
    assert list((tmp_path / "profile").iterdir()) == []


def test_without_the_flag_nothing_happens(tmp_path: Path) -> None:
    assert profiled(tmp_path, 12, profile=False, profile_dir=None) == []
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    with pytest.raises(UserError, match=r"--profile-dir .* cannot be made"):
        profiled(tmp_path, 1)


def test_words_name_what_is_there() -> None:
    shares = dict.fromkeys(HEADINGS, 0.0) | {"attention": 0.25, "idle": 0.75}
    line = in_words(Shares(0.2, shares, 0.0, []), 4)
    assert line == "profile of 4 steps, 50.0 ms each: attention 25.0%, idle 75.0%"
