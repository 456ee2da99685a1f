"""Whether a run trains with SwiGLU inside of products: what stands in the way, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron import backends, run
from megatron.distributed.topology import single_process_topology
from megatron.model.mlp import MLP
from tests.unit.test_run_metadata import VOCABULARY, run_config

PLAIN: dict[str, Any] = {"bf16": True, "swiglu": True, "disable_bias_linear": True, "ffn_hidden_size": 192}
ON_GPU = replace(single_process_topology(), device=torch.device("cuda"))


def asked(**found: Any) -> None:
    """Nothing is in the way."""
    assert found.pop("device").type == "cuda"
    assert found == {"half_precision": True, "hidden_size": 64, "ffn_size": 192}


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "SwiGLU: inside of products (quack-kernels 0.6.5) in training"),
    ({"no_bias_swiglu_fusion": True}, "SwiGLU: between products (not inside: --no-bias-swiglu-fusion)"),
    ({"disable_bias_linear": False}, "SwiGLU: between products (not inside: it has no biases: --disable-bias-linear)"),
    ({"fp8": True}, "SwiGLU: between products (not inside: it has no fp8)"),
    ({"compile": False}, "SwiGLU: between products (not inside: it is for compiled code, and there is --no-compile)"),
    ({"tensor_model_parallel_size": 2},
     "SwiGLU: between products (not inside: it has no messages beside it, and there is --tensor-model-parallel-size)"),
])  # fmt: skip
def test_a_run_on_a_gpu_says_where(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    monkeypatch.setattr(backends, "gated_obstacle", asked)
    config = run_config(**(PLAIN | changes))
    assert backends.on_gated_products(config, ON_GPU, backends.gated_obstacle_of(config, ON_GPU)) == [said]


def test_without_swiglu_nothing_is_said() -> None:
    config = run_config(bf16=True, swiglu=False)
    assert backends.gated_obstacle_of(config, ON_GPU) == "there is none"
    assert backends.on_gated_products(config, ON_GPU, "there is none") == []


def test_on_a_cpu_nothing_is_said() -> None:
    topology = single_process_topology()
    obstacle = backends.gated_obstacle_of(run_config(**PLAIN), topology)
    assert obstacle == "it needs a GPU"
    assert backends.on_gated_products(run_config(**PLAIN), topology, obstacle) == []


@pytest.mark.parametrize("obstacle", [None, "it is not there"])
def test_the_model_has_what_was_said(monkeypatch: pytest.MonkeyPatch, obstacle: str | None) -> None:
    monkeypatch.setattr(backends, "gated_obstacle", lambda **_: obstacle)
    model: Any = run.build_model(run_config(**PLAIN), VOCABULARY, True, single_process_topology())
    layers = [module for module in model.modules() if isinstance(module, MLP)]
    assert len(layers) == 2 and all(layer.gated_products is (obstacle is None) for layer in layers)
