"""Which attention a run trains with: what ``--attention-backend`` asks for, what stands in its way, what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron import backends, run
from megatron.distributed import agreement
from megatron.distributed.topology import Topology, single_process_topology
from megatron.errors import UserError
from megatron.model.attention import Attention
from tests.unit.test_run_metadata import VOCABULARY, run_config

BF16: dict[str, Any] = {"bf16": True, "attention_dropout": 0.0}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], Topology]:
    """``gpu(obstacle)``: a topology on a GPU where FlashAttention meets that obstacle, or none."""

    def pretend(obstacle: str | None) -> Topology:
        def asked(**found: Any) -> str | None:
            device = found.pop("device")
            assert found == {"half_precision": True, "head_size": 16, "length": 32, "dropout": 0.0}
            return obstacle if device.type == "cuda" else "no GPU"

        monkeypatch.setattr(backends, "flash_obstacle", asked)
        return replace(single_process_topology(), device=torch.device("cuda"))

    return pretend


@pytest.mark.parametrize(("backend", "obstacle", "said"), [
    ("auto", None, "attention: FlashAttention 4.0.0b36 in training, PyTorch's in validation and for masks"),
    ("flash", None, "attention: FlashAttention 4.0.0b36 in training, PyTorch's in validation and for masks"),
    ("auto", "it is not there", "attention: PyTorch's (not FlashAttention: it is not there)"),
    ("fused", None, "attention: PyTorch's (--attention-backend fused)"),
])  # fmt: skip
def test_a_run_on_a_gpu_says_what_it_uses(
    gpu: Callable[[str | None], Topology], backend: str, obstacle: str | None, said: str
) -> None:
    topology = gpu(obstacle)
    config = run_config(attention_backend=backend, **BF16)
    found = backends.flash_obstacle_of(config, topology)
    backends.require_flash(config, found)
    assert backends.on_attention(config, topology, found) == [said]


def test_what_is_asked_for_and_cannot_be_had_ends_the_run(gpu: Callable[[str | None], Topology]) -> None:
    config = run_config(attention_backend="flash", **BF16)
    with pytest.raises(UserError) as error:
        backends.require_flash(config, backends.flash_obstacle_of(config, gpu("it is not there")))
    assert str(error.value) == "--attention-backend flash: it is not there; or use --attention-backend auto"


@pytest.mark.parametrize(("changes", "flag"), [
    ({"reset_attention_mask": True}, "--reset-attention-mask"), ({"randmask_ratio": 0.5}, "--randmask-ratio"),
])  # fmt: skip
def test_masks_on_every_batch_leave_it_nothing_to_do(
    gpu: Callable[[str | None], Topology], changes: dict[str, Any], flag: str
) -> None:
    config = run_config(attention_backend="flash", **BF16)
    config = replace(config, objective=replace(config.objective, **changes))
    with pytest.raises(UserError, match=f"it has no masks, and {flag} gives every batch one"):
        backends.require_flash(config, backends.flash_obstacle_of(config, gpu(None)))


def test_what_one_rank_lacks_no_rank_uses(
    gpu: Callable[[str | None], Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = gpu(None)
    monkeypatch.setattr(agreement, "gather_objects", lambda topology, own: [own, None, "it is not there", "nor here"])
    said = "attention: PyTorch's (not FlashAttention: it is not there)"
    config = run_config(**BF16)
    assert backends.on_attention(config, topology, backends.flash_obstacle_of(config, topology)) == [said]


def test_measuring_needs_no_gradient(gpu: Callable[[str | None], Topology]) -> None:
    """And takes the flags of a training run as they are."""
    config = run_config(attention_backend="flash", **BF16)
    config = replace(config, evaluation=replace(config.evaluation, skip_train=True))
    obstacle = backends.flash_obstacle_of(config, gpu(None))
    assert obstacle == "it is for training"
    backends.require_flash(config, obstacle)
    assert backends.on_attention(config, gpu(None), obstacle) == []


def test_on_a_cpu_nothing_is_said_and_auto_is_pytorchs() -> None:
    config = run_config(**BF16)
    obstacle = backends.flash_obstacle_of(config, single_process_topology())
    assert obstacle == "it needs a GPU"
    assert backends.on_attention(config, single_process_topology(), obstacle) == []


@pytest.mark.parametrize(("backend", "obstacle", "expected"), [
    ("auto", None, True), ("flash", None, True), ("auto", "it is not there", False), ("fused", None, False),
])  # fmt: skip
def test_the_model_has_what_was_said(
    monkeypatch: pytest.MonkeyPatch, backend: str, obstacle: str | None, expected: bool
) -> None:
    monkeypatch.setattr(backends, "flash_obstacle", lambda **_: obstacle)
    config = run_config(attention_backend=backend, **BF16)
    model: Any = run.build_model(config, VOCABULARY, True, single_process_topology())
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) == 2 and all(layer.flash is expected for layer in layers)
