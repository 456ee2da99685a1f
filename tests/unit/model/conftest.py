"""Tiny models for the tests of ``megatron/model``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import _scoped_library

from megatron.config import ModelConfig
from megatron.model.gpt import build_layers, initialize_weights
from megatron.model.packages import package_obstacle
from megatron.model.sharding import SequentialGPT

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16,
    "normalization": "rmsnorm", "use_rotary_position_embeddings": True, "swiglu": True, "ffn_hidden_size": 48,
    "disable_bias_linear": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2,
}


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    """A tiny rotary, RMSNorm, SwiGLU configuration without dropout, with changes."""
    return lambda **changes: ModelConfig(**(SIZES | changes))


@pytest.fixture
def make_model(make_config: Callable[..., ModelConfig]) -> Callable[..., SequentialGPT]:
    """``make_model(causal, **changes)``: vocabulary 40 of which 37 are tokens; weights large enough to matter."""

    def make(causal: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any) -> SequentialGPT:
        config = make_config(**changes)
        layers = build_layers(config, vocabulary_size=40, num_tokens=37, causal=causal)
        initialize_weights(layers, config, seed)
        return SequentialGPT(layers, config).to(dtype)

    return make


def plain_attention(heads: Tensor, queries: int, keys: int, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v written out: what ``megatron::flash_attention`` says it returns."""
    query, key, value = (x.transpose(1, 2) for x in heads.split((queries, keys, keys), dim=2))
    key, value = (x.repeat_interleave(queries // keys, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / heads.shape[-1] ** 0.5  # [b, queries, s, s]
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), scores.logsumexp(dim=-1)


def plain_gradient(
    grad: Tensor, heads: Tensor, out: Tensor, logsumexp: Tensor, queries: int, keys: int, causal: bool
) -> Tensor:
    """PyTorch's, of :func:`plain_attention`."""
    with torch.enable_grad():
        heads = heads.detach().requires_grad_()
        return torch.autograd.grad(plain_attention(heads, queries, keys, causal)[0], heads, grad)[0]


@contextlib.contextmanager
def operators_on_cpu(note: Callable[[str], None], **functions: Callable[..., Any]) -> Iterator[None]:
    """Operators of ours that only GPUs have, by these ``functions`` on a CPU; ``note`` is told each call's name."""

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operator(*arguments: Any) -> Any:
            note(name)
            return function(*arguments)

        return operator

    with _scoped_library("megatron", "FRAGMENT") as library:
        for name, function in functions.items():
            library.impl(name, noted(name, function), "CPU")
        yield


@pytest.fixture
def flash_on_cpu() -> Iterator[set[str]]:
    """FlashAttention's operators on a CPU, in plain PyTorch; the names of those that were called."""
    called: set[str] = set()
    with operators_on_cpu(called.add, flash_attention=plain_attention, flash_attention_gradient=plain_gradient):
        yield called


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``hopper(package, version, capability)``: such a GPU, and such a package (version None: no package)."""

    def pretend(package: str, version: str | None, capability: tuple[int, int] = (9, 0)) -> None:
        def installed(name: str) -> str:
            assert name == package
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        package_obstacle.cache_clear()
        monkeypatch.setattr(importlib.metadata, "version", installed)
        monkeypatch.setattr(importlib, "import_module", lambda name: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")

    yield pretend
    package_obstacle.cache_clear()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of 16 positions: inputs (mask id 37 included), positions, targets, weights."""
    generator = torch.Generator().manual_seed(5)
    return {
        "inputs": torch.randint(0, 38, (3, 16), generator=generator),
        "positions": torch.arange(16).repeat(3, 1),
        "targets": torch.randint(0, 37, (3, 16), generator=generator),
        "weights": torch.rand(3, 16, generator=generator) / 48,
    }
