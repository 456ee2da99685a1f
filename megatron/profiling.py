"""``--profile``: some steps under PyTorch's profiler, a trace to look at and the shares of the step by heading.

Ranges that the headings need stand where the work is: around the wait for the next batch (``data.lockstep``) and around
the optimizer step (``engine``). Without ``--profile`` they cost about a microsecond each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.config import LoggingConfig
from megatron.distributed.topology import Topology
from megatron.errors import UserError
from megatron.files import describe, write_atomically
from megatron.tokenizer import Vocabulary
from megatron.trace_shares import HEADINGS, WINDOW, Shares, read_trace, step_shares

TRACE: Final = "trace.json.gz"
SUMMARY: Final = "shares.json"


class StepProfiler:
    """Profiles steps ``--profile-step-start`` to ``--profile-step-end`` - 1 of rank 0; elsewhere it does nothing.

    The device is idle when the profile begins and when it ends, so that what is launched inside also runs inside.
    """

    def __init__(
        self, config: LoggingConfig, topology: Topology, vocabulary: Vocabulary,
        report: Callable[[Shares, int], None],
    ) -> None:
        """``report`` is called with the shares and the number of steps when they are known.

        Raises:
            UserError: ``--profile-dir`` cannot be made.
        """
        self._config = config
        self._device = topology.device
        self._sizes = _vocabulary_sizes(vocabulary, topology.tensor_parallel_size)
        self._report = report
        self._profile: profile | None = None
        self._window: record_function | None = None
        self._steps = 0
        self._active = config.profile and topology.rank == 0
        if self._active:
            assert config.profile_dir is not None
            try:
                Path(config.profile_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--profile-dir {config.profile_dir} cannot be made: {describe(error)}") from error

    @property
    def is_running(self) -> bool:
        """Whether what is launched now is profiled, or the next step will be."""
        return self._profile is not None

    def begin_step(self, number: int) -> None:
        """Say that step ``number`` of the run (from 1) is about to begin."""
        if not self._active or number not in (self._config.profile_step_start - 1, self._config.profile_step_start):
            return
        if self._profile is None:
            # In the step before: the device's tracing takes seconds to set up.
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.prepare_trace()
        if number == self._config.profile_step_start:
            self._wait()
            self._profile.start_trace()
            self._window = record_function(WINDOW)
            self._window.__enter__()

    def end_step(self, number: int) -> None:
        """Say that step ``number`` has ended; after the last profiled one, write the trace and report."""
        if self._window is None:
            return
        self._steps += 1
        if number >= self._config.profile_step_end - 1:
            self.finish()

    def finish(self) -> None:
        """End the profile, if one is running: at its last step, or where the run ends before."""
        if self._window is None or self._profile is None:
            return
        self._wait()
        self._window.__exit__(None, None, None)
        self._profile.stop_trace()
        assert self._config.profile_dir is not None
        directory = Path(self._config.profile_dir)
        self._profile.export_chrome_trace(str(directory / TRACE))
        self._profile = self._window = None
        self._active = False
        shares = step_shares(read_trace(directory / TRACE), self._sizes)
        write_atomically(directory / SUMMARY, json.dumps(summary(shares, self._steps), indent=1) + "\n")
        self._report(shares, self._steps)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def summary(shares: Shares, steps: int) -> dict[str, Any]:
    """What ``shares.json`` holds: the shares, and the twenty kernels that took longest, in seconds of all steps."""
    return {
        "steps": steps,
        "seconds": shares.seconds,
        "shares": shares.shares,
        "collectives": shares.collectives,
        "kernels": [dataclasses.asdict(kernel) for kernel in shares.kernels[:20]],
    }


def in_words(shares: Shares, steps: int) -> str:
    """One line for the console."""
    parts = [f"{heading} {shares.shares[heading]:.1%}" for heading in HEADINGS if shares.shares[heading] >= 5e-4]
    return f"profile of {steps} steps, {shares.seconds / steps * 1e3:.1f} ms each: {', '.join(parts)}"


def _vocabulary_sizes(vocabulary: Vocabulary, ranks: int) -> frozenset[int]:
    """Dimensions that only the head's matrices have: this rank's padded rows, and the columns it multiplies."""
    rows, tokens = vocabulary.padded_size // ranks, vocabulary.num_tokens
    return frozenset({rows, tokens, min(rows, -(-tokens // 8) * 8)})
