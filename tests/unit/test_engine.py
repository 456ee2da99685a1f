"""What the engine asks of DeepSpeed besides its mathematics: nothing waits for the device, nothing is copied twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
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
from megatron.initialize import initialize, shut_down
from megatron.objectives import build_objective
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


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """This process alone."""
    yield initialize(ParallelConfig())
    shut_down()


def trained(topology: Topology) -> Engine:
    """An engine in bf16 after ``STEPS`` steps."""
    engine = Engine(build_model(CONFIG, VOCABULARY, False, topology), CONFIG, topology, MICRO_BATCH * MICRO_BATCHES)
    objective = build_objective(
        CONFIG.objective, VOCABULARY, 0, 1234, LENGTH, BatchSchedule(MICRO_BATCH * MICRO_BATCHES)
    )
    size = (STEPS * MICRO_BATCHES, MICRO_BATCH)
    tokens = torch.randint(VOCABULARY.num_tokens, (*size, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    samples = torch.arange(size[0] * size[1]).view(size)
    stream = map(objective.make_batch, tokens, samples)
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
