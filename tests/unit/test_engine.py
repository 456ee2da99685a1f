"""What the engine asks of DeepSpeed besides its mathematics: nothing waits for the device, nothing is copied twice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator

from megatron import engine as engine_module
from megatron.batch_schedule import BatchSchedule
from megatron.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
)
from megatron.distributed.topology import Topology
from megatron.engine import Engine
from megatron.model import gpt
from megatron.objectives import build_objective
from megatron.objectives.base import Batch
from megatron.optimizer import build_optimizer
from megatron.run import build_model
from megatron.tokenizer import build_vocabulary

LENGTH, MICRO_BATCH, MICRO_BATCHES, STEPS = 16, 2, 3, 5
VOCABULARY = build_vocabulary(50, 8)
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, max_position_embeddings=LENGTH, hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    objective=ObjectiveConfig(objective="mdm"),
    batch=BatchConfig(
        micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH * MICRO_BATCHES, train_samples=60, seq_length=LENGTH
    ),
    optimizer=OptimizerConfig(lr=1e-2, bf16=True),
    parallel=ParallelConfig(zero_stage=1, compile=False),
    tokenizer=TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model="unused"),
    data=DataConfig(train_data_path=("unused",)),
)


def build(topology: Topology, config: RunConfig = CONFIG) -> Engine:
    """An engine in bf16 that has made no step."""
    return Engine(build_model(config, VOCABULARY, False, topology), config, topology, MICRO_BATCH * MICRO_BATCHES)


def make_batches(steps: int) -> list[Batch]:
    """All micro-batches of the steps."""
    objective = build_objective(
        CONFIG.objective, VOCABULARY, 0, 1234, LENGTH, BatchSchedule(MICRO_BATCH * MICRO_BATCHES)
    )
    size = (steps * MICRO_BATCHES, MICRO_BATCH)
    tokens = torch.randint(VOCABULARY.num_tokens, (*size, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return list(map(objective.make_batch, tokens, torch.arange(size[0] * size[1]).view(size)))


def trained(topology: Topology) -> Engine:
    """An engine in bf16 after ``STEPS`` steps."""
    engine, stream = build(topology), iter(make_batches(STEPS))
    assert all(engine.train_batch(stream, MICRO_BATCHES, 1e-2).applied for _ in range(STEPS))
    return engine


def test_no_micro_batch_waits_for_the_device(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's throughput timer would, from the third step on: on an H100 a row of 7M lost a tenth of its speed."""
    waits: list[None] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(None))
    trained(topology)
    assert not waits


def test_gradients_are_added_as_deepspeed_adds_them(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours makes no fp32 copy of each; the weights are the same to the bit."""
    copied: list[torch.dtype] = []
    original = torch.Tensor.to

    def to(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        copied.extend(y for y in arguments if y == torch.float32 and x.dtype == torch.bfloat16)
        return original(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found, ours = list(trained(topology).model.named_weights().values()), len(copied)
    monkeypatch.setattr(engine_module, "add_without_copies", lambda *_: None)
    expected = list(trained(topology).model.named_weights().values())
    assert len(copied) - 2 * ours == len(found) * MICRO_BATCHES * STEPS, "DeepSpeed's own way is what it was"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def build_adam(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Adam as a GPU gets it, ``fused``, or a CPU: PyTorch has both for CPUs."""
    monkeypatch.setattr(
        engine_module, "build_optimizer", lambda parameters, config, _: build_optimizer(parameters, config, fused)
    )


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam as a GPU gets it."""
    build_adam(monkeypatch, True)


def state_of(engine: Engine) -> list[torch.Tensor]:
    """fp32 weights, Adam's moments and count, and the bf16 weights: copies."""
    optimizer = engine._engine.optimizer
    parts = [*optimizer.fp32_groups_flat_partition, *engine.model.named_weights().values()]
    parts += [value for state in optimizer.optimizer.state.values() for value in state.values()]
    return [part.detach().clone() for part in parts]


@pytest.mark.parametrize("clip", [0.0, 1e-2, 1e4])
def test_a_step_without_waiting_is_deepspeeds(
    topology: Topology, monkeypatch: pytest.MonkeyPatch, fused: None, clip: float
) -> None:
    """Clipped to a norm, not clipped because the norm is below, and with clipping off."""
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, clip_grad=clip))
    norms, states = [], []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(engine_module, "step_without_waiting", lambda _: False)
        engine, stream = build(topology, config), iter(make_batches(STEPS))
        results = [engine.train_batch(stream, MICRO_BATCHES, 1e-2) for _ in range(STEPS)]
        assert all(result.applied for result in results) and [result.skipped for result in results] == (
            [None] * STEPS if ours else [False] * STEPS
        )
        norms.append([result.grad_norm for result in results])
        states.append(state_of(engine))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and min(norms[0]) > 1e-2
    for found, expected in zip(*states, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5 if found.dtype == torch.float32 else 2**-8, atol=1e-8)


def test_a_step_that_is_not_finite_changes_nothing(topology: Topology, fused: None) -> None:
    """Not even Adam's count; and the next one is as if it had not been."""
    batches = make_batches(3)
    engine = build(topology)
    assert engine.train_batch(iter(batches[:3]), MICRO_BATCHES, 1e-2).applied
    before = state_of(engine)
    bad = [dataclasses.replace(batch, weights=batch.weights * math.inf) for batch in batches[3:6]]
    result = engine.train_batch(iter(bad), MICRO_BATCHES, 1e-2)
    assert result.skipped is None and not result.applied and not math.isfinite(result.grad_norm)
    assert all(torch.equal(one, other) for one, other in zip(before, state_of(engine), strict=True))
    assert engine.train_batch(iter(batches[6:]), MICRO_BATCHES, 1e-2).applied
    other = build(topology)
    for start in (0, 6):
        other.train_batch(iter(batches[start : start + 3]), MICRO_BATCHES, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(state_of(engine), state_of(other), strict=True))


def test_no_step_asks_the_device(topology: Topology, monkeypatch: pytest.MonkeyPatch, fused: None) -> None:
    """Whoever turns a tensor into a Python number waits for the GPU to come so far, and the GPU then for the host."""
    asked: list[str] = []
    engine, stream = build(topology), iter(make_batches(STEPS))
    engine.train_batch(stream, MICRO_BATCHES, 1e-2)  # the first makes Adam's state
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def ask(x: torch.Tensor, name: str = name, original: Any = original) -> Any:
            asked.append(name)
            return original(x)

        monkeypatch.setattr(torch.Tensor, name, ask)
    results = [engine.train_batch(stream, MICRO_BATCHES, 1e-2) for _ in range(STEPS - 1)]
    assert asked == []
    assert all(result.applied for result in results) and asked


def test_something_else_is_done_while_the_first_micro_batch_is_under_way(topology: Topology) -> None:
    read: list[Batch] = []
    at: list[int] = []

    def stream() -> Iterator[Batch]:
        for batch in make_batches(1):
            read.append(batch)
            yield batch

    build(topology).train_batch(stream(), MICRO_BATCHES, 1e-2, meanwhile=lambda: at.append(len(read)))
    assert at == [1] and len(read) == MICRO_BATCHES


def test_zero_3_gathers_the_last_norm_although_its_layer_is_not_called(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside compiled blocks, kernels compute it from the gain alone."""
    seen: list[torch.Size] = []

    def last_norm(norm: torch.nn.RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(norm.weight.shape)
        return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.eps)

    monkeypatch.setattr(gpt, "last_norm", last_norm)
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, normalization="rmsnorm"),
        parallel=dataclasses.replace(CONFIG.parallel, zero_stage=3),
    )  # fmt: skip
    losses = []
    for by_kernels in (True, False):
        engine, stream = build(topology, config), iter(make_batches(STEPS))
        last = next(module for module in engine.model.modules() if isinstance(module, gpt.FinalNorm))
        assert last.final_layernorm.weight.numel() == 0, "divided while it rests"
        last.by_kernels = by_kernels
        losses.append([engine.train_batch(stream, MICRO_BATCHES, 1e-2).loss.item() for _ in range(STEPS)])
    assert losses[0] == losses[1]
    assert seen == [torch.Size([16])] * STEPS * MICRO_BATCHES
