"""A model that trains in fp8: what the engine does with it equals plain PyTorch, and evaluation stays in bf16.

On a GPU where there is one, else on the CPU, whose ``torch._scaled_mm`` computes the same; only ``run.set_up`` insists
on a GPU. What the products themselves compute is in ``tests/unit/distributed/test_fp8.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
from megatron.data.indexed_dataset import IndexedDatasetWriter
from megatron.distributed.topology import Topology
from megatron.engine import Engine
from megatron.initialize import initialize, shut_down
from megatron.model.sharding import SequentialGPT
from megatron.objectives import Batch, build_objective
from megatron.run import build_model
from megatron.tokenizer import Vocabulary, build_vocabulary
from tools import benchmark
from tools.benchmark_fp8 import benchmark_fp8, table
from tools.prepare_quickstart import read_speeches

LENGTH, MICRO_BATCH, MICRO_BATCHES, SEED = 32, 4, 2, 1234
BLOCKS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """This process alone, on its GPU if it has one that can."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    yield initialize(ParallelConfig())
    shut_down()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return build_vocabulary(200, 64)


def configuration(fp8: bool = True, zero_stage: int = 1, **changes: Any) -> RunConfig:
    """A small model with biases, without dropout."""
    sizes: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": LENGTH,
        "normalization": "rmsnorm", "use_rotary_position_embeddings": True, "swiglu": True, "ffn_hidden_size": 96,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.1,
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(**sizes | changes),
        objective=ObjectiveConfig(objective="mdm"),
        batch=BatchConfig(
            micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH * MICRO_BATCHES, train_samples=64,
            seq_length=LENGTH,
        ),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=1.0, bf16=True, fp8=fp8),
        parallel=ParallelConfig(zero_stage=zero_stage, compile=False, seed=SEED),
        tokenizer=TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model="unused"),
        data=DataConfig(train_data_path=("unused",)),
    )  # fmt: skip


def micro_batches(config: RunConfig, vocabulary: Vocabulary) -> list[Batch]:
    """The first step's batches, of random tokens."""
    schedule = BatchSchedule(config.batch.global_batch_size or 0)
    objective = build_objective(config.objective, vocabulary, 0, SEED, LENGTH, schedule)
    tokens = torch.randint(
        vocabulary.num_tokens, (MICRO_BATCHES, MICRO_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    ids = torch.arange(MICRO_BATCHES * MICRO_BATCH).view(MICRO_BATCHES, MICRO_BATCH)
    return [objective.make_batch(rows, samples) for rows, samples in zip(tokens, ids, strict=True)]


def built(config: RunConfig, vocabulary: Vocabulary, topology: Topology) -> SequentialGPT:
    """The model as a run builds it, in bf16."""
    model = build_model(config, vocabulary, False, topology)
    assert isinstance(model, SequentialGPT)
    return model.bfloat16().to(topology.device)


def plain_step(model: SequentialGPT, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients, added up in fp32, of the micro-batches by plain PyTorch."""
    total, sums = 0.0, {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for batch in (micro.to(next(model.parameters()).device) for micro in batches):
        loss = model(batch.inputs, batch.positions, batch.targets, batch.weights, None, batch.scored)
        total += loss.item() / len(batches)
        gradients = torch.autograd.grad(loss / len(batches), list(model.parameters()))
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += gradient
    return total, sums


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("biases", [True, False])
def test_a_step_equals_plain_pytorch(
    topology: Topology, vocabulary: Vocabulary, zero_stage: int, biases: bool
) -> None:
    changes = {} if biases else {"disable_bias_linear": True, "num_key_value_heads": 2}
    config = configuration(zero_stage=zero_stage, **changes)
    batches = micro_batches(config, vocabulary)
    loss, gradients = plain_step(built(configuration(**changes), vocabulary, topology), batches)
    engine = Engine(build_model(config, vocabulary, False, topology), config, topology, MICRO_BATCH * MICRO_BATCHES)
    result = engine.train_batch(iter(batches), MICRO_BATCHES, 1e-3)
    assert result.applied
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(norm(gradients), rel=2e-3)


def test_fp8_is_near_bf16_and_only_in_the_blocks(
    topology: Topology, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients differ by what fp8 rounds; each of the four layers of a block takes three fp8 products."""
    batches = micro_batches(configuration(), vocabulary)
    bf16 = plain_step(built(configuration(fp8=False), vocabulary, topology), batches)
    calls, multiply = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: calls.append(a[0].dtype) or multiply(*a, **k))
    fp8 = plain_step(built(configuration(), vocabulary, topology), batches)
    layers = 2 * len(BLOCKS) * MICRO_BATCHES
    assert calls.count(torch.float8_e4m3fn) == layers and calls.count(torch.float8_e5m2) == 2 * layers
    assert fp8[0] != bf16[0] and fp8[0] == pytest.approx(bf16[0], rel=0.01)
    for name, gradient in bf16[1].items():
        error = float((fp8[1][name] - gradient).norm() / gradient.norm())
        assert 0 < error < 0.25, f"{name}: {error}"


@pytest.mark.parametrize("recompute", [
    {"checkpoint_activations": True}, {"recompute_granularity": "selective"},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
])  # fmt: skip
def test_recomputation_changes_nothing(topology: Topology, vocabulary: Vocabulary, recompute: dict[str, Any]) -> None:
    batches = micro_batches(configuration(), vocabulary)
    expected = plain_step(built(configuration(), vocabulary, topology), batches)
    found = plain_step(built(configuration(**recompute), vocabulary, topology), batches)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def test_evaluation_is_that_of_bf16(topology: Topology, vocabulary: Vocabulary) -> None:
    """Before a step, where both engines have the same weights."""
    rows = []
    for fp8 in (True, False):
        config = configuration(fp8)
        engine = Engine(build_model(config, vocabulary, False, topology), config, topology, MICRO_BATCH * MICRO_BATCHES)
        rows.append(engine.eval_batches(iter(micro_batches(config, vocabulary)), MICRO_BATCHES))
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layer", BLOCKS)
def test_a_number_that_is_not_finite_is_noticed(
    topology: Topology, vocabulary: Vocabulary, layer: str, bad: float
) -> None:
    """Were it clamped to the largest fp8 number, the step would be taken."""
    config = configuration()
    model = build_model(config, vocabulary, False, topology)
    weights = {name: p for name, p in model.named_weights().items() if name.endswith(f".{layer}.weight")}
    assert len(weights) == config.model.num_layers
    with torch.no_grad():
        next(iter(weights.values())).view(-1)[7] = bad
    engine = Engine(model, config, topology, MICRO_BATCH * MICRO_BATCHES)
    before = [p.detach().clone() for p in model.named_weights().values()]
    result = engine.train_batch(iter(micro_batches(config, vocabulary)), MICRO_BATCHES, 1e-3)
    assert not result.applied and not math.isfinite(result.loss.item())
    after = engine.model.named_weights().values()
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(before, after, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_hundred_steps_have_the_loss_of_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both families on the bytes of the package's speeches, through the entry points: windows of 50 steps, to 0.5 %."""
    documents = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in read_speeches().texts]
    prefix = tmp_path / "speeches"
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add_documents(np.concatenate(documents), np.array([len(document) for document in documents]))
    figures = benchmark_fp8(benchmark.build_parser().parse_args(
        f"fp8 --data-path {prefix} --model 57M --steps 500 --seq-length 512 --micro-batch-size 32 "
        "--global-batch-size 32".split()
    ))  # fmt: skip
    with capsys.disabled():
        print("", *table(figures), sep="\n")
    for found in figures["objectives"].values():
        bf16 = found["losses"]["bf16"]
        assert len(bf16) == 10 and bf16[-1] < 0.7 * bf16[0], "the comparison means something: training moved"
        assert found["differences"] != [0.0] * 10, "fp8 was used"
        assert found["within"], found["differences"]
