"""Every way to run a model leaves out the attention kernels that are planned for one shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron.inference.generation import Sampling, generate_autoregressive, generate_masked
from megatron.inference.hub.unmasking import Unmasking
from megatron.inference.loading import LoadedModel
from megatron.inference.scoring import Row, Scorer


def test_cudnn_attention_is_left_out_and_comes_back(
    loaded_model: Callable[..., LoadedModel], scorer: Callable[..., Scorer], monkeypatch: Any
) -> None:
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    causal, masked = loaded_model("ar"), loaded_model("mdm")
    runs: list[Callable[[], object]] = [
        lambda: scorer(causal).score([Row(np.array([1, 2, 0]), np.array([1]), np.array([2]))]),
        lambda: scorer(masked).score([Row(np.array([1, 2, 3]), np.array([2]), np.array([2]))]),
        lambda: generate_autoregressive(causal, [[1, 2]], 3, Sampling()),
        lambda: generate_masked(masked, [[1, 2]], 3, Unmasking()),
    ]
    for run in runs:
        seen.clear()
        run()
        assert seen and not any(seen)
        assert torch.backends.cuda.cudnn_sdp_enabled()
