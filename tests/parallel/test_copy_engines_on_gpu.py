"""Products over two GPUs whose messages go by copy engines, beside the same over NCCL, and over and over again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_results_are_nccls_and_always_the_same(spawn: Callable[..., list[Any]]) -> None:
    """What a late message or one in the wrong place changes would differ between rounds."""
    for report in spawn("copy_engine_ranks.py", 2, gpus=True):
        for found in (report[False], report[True]):
            assert found["distance"] < 2**-8 and found["unlike"] == 0
