"""Two replicas whose micro-batches are played from recordings: gradients are summed as without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def test_replicas_train_as_without(spawn: Callable[..., list[Any]]) -> None:
    assert spawn("graph_ranks.py", 2) == [2, 2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replicas_train_as_without_on_gpus(spawn: Callable[..., list[Any]]) -> None:
    assert spawn("graph_ranks.py", 2, gpus=True) == [2, 2]
