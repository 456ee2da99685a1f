"""The memory estimate: parameters are those of the layers, states what each ZeRO stage keeps, the fullest stage counts.

Whether the sum is what a GPU measures, only a GPU can tell.
"""

from __future__ import annotations

import dataclasses

import pytest

from megatron import budget, budget_cli
from megatron.config import ModelConfig
from megatron.memory import Memory, Split, estimate

MODEL = ModelConfig(
    num_layers=8, hidden_size=64, num_attention_heads=8, max_position_embeddings=128, normalization="rmsnorm",
    use_rotary_position_embeddings=True, swiglu=True, ffn_hidden_size=192, disable_bias_linear=True,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
VOCABULARY = 512


def memory(split: Split, micro_batches: int = 4, model: ModelConfig = MODEL) -> Memory:
    return estimate(
        model, split, vocabulary=VOCABULARY, micro_batch_size=2, seq_length=128, micro_batches=micro_batches
    )


@pytest.mark.parametrize("untied", [False, True])
def test_states_of_one_process_are_the_model_s(untied: bool) -> None:
    """bf16: 2 bytes a parameter, 4 of its gradient, 12 of the optimizer."""
    model = dataclasses.replace(MODEL, untie_embeddings_and_output_weights=untied)
    count = budget.parameter_count(model, VOCABULARY)
    found = memory(Split(gpus=1), model=model)
    assert (found.parameters, found.gradients, found.optimizer) == (2 * count, 4 * count, 12 * count)
    assert found.buffers == found.host == 0
    single = memory(Split(gpus=1, half=False), model=model)
    assert (single.parameters, single.gradients, single.optimizer) == (4 * count, 4 * count, 12 * count)


@pytest.mark.parametrize(("stage", "shares"), [(1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_zero_divides_over_replicas(stage: int, shares: tuple[int, int, int]) -> None:
    one, four = memory(Split(gpus=1)), memory(Split(gpus=4, zero_stage=stage))
    assert four.parameters == one.parameters / shares[0]
    assert four.gradients == one.gradients / shares[1]
    assert four.optimizer == one.optimizer / shares[2]
    assert four.activations == one.activations
    offloaded = memory(Split(gpus=4, zero_stage=stage, offload=True))
    assert offloaded.optimizer == 0 and offloaded.host >= 16 * one.parameters / 2 / 4


def test_an_offloaded_optimizer_reduces_through_a_bucket() -> None:
    """fp32 gradients pass through DeepSpeed's bucket of 5e8 numbers, also alone: seen on an H100 as 1.7 GB of 36.5."""
    model = budget.read_model_table()["2298M"].model(2048, hidden_dropout=0.0, attention_dropout=0.0)
    found = memory(Split(gpus=1, offload=True), model=model)
    assert found.gradients == 2 * found.parameters and found.buffers == 5e8 * 4


def test_tensor_parallelism_divides_matrices_and_activations() -> None:
    """Norms stay whole; with sequence parallelism everything that is kept is divided."""
    one, cut = memory(Split(gpus=1)), memory(Split(gpus=4, tensor=4))
    norms = 17 * 64
    assert cut.parameters == pytest.approx((one.parameters - 2 * norms) / 4 + 2 * norms)
    assert one.activations / 4 < cut.activations < one.activations
    assert memory(Split(gpus=4, tensor=4, sequence_parallel=True)).activations == pytest.approx(one.activations / 4)


def test_the_fullest_stage_counts() -> None:
    """Of four stages, the first holds most: the embedding, and as many micro-batches as there are stages."""
    two = memory(Split(gpus=4, pipeline=4))
    block = (budget.parameter_count(MODEL, VOCABULARY) - VOCABULARY * 64 - 64) / 8
    assert two.parameters == 2 * (2 * block + VOCABULARY * 64)
    assert two.head == 0
    assert memory(Split(gpus=4, pipeline=4), micro_batches=1).activations < two.activations


def test_recomputation_keeps_block_inputs() -> None:
    full = dataclasses.replace(MODEL, checkpoint_activations=True)
    some = dataclasses.replace(
        MODEL, recompute_granularity="full", recompute_method="block", recompute_num_layers=4
    )
    kept = [memory(Split(gpus=1), model=model).activations for model in (full, some, MODEL)]
    assert kept == sorted(kept) and kept[0] < kept[2] / 3


@pytest.mark.parametrize(("fp8", "streams"), [(False, 13.97), (True, 11.32)])
@pytest.mark.parametrize("name", ["425M", "2298M"])
def test_a_block_keeps_as_measured(name: str, fp8: bool, streams: float) -> None:
    """In residual streams (b s h numbers): four compiled blocks on an H100, MDM, bf16, after their forward pass."""
    row = budget.read_model_table()[name]
    model = row.model(2048, hidden_dropout=0.0, attention_dropout=0.0)
    more, less = (
        estimate(
            dataclasses.replace(model, num_layers=layers), Split(gpus=1, fp8=fp8),
            vocabulary=50_304, micro_batch_size=4, seq_length=2048,
        ).activations
        for layers in (13, 12)
    )  # fmt: skip
    assert (more - less) / (4 * 2048 * row.d_model * 2) == pytest.approx(streams, abs=0.05)


def test_the_command_prints_every_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert budget_cli.main("memory --model 2298M --gpus 8".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["split", "recompute", "GPU"]
    assert any(line.startswith("ZeRO 1, DP 2, TP 2, PP 2") for line in lines)
    assert all(float(line[45:].split()[0]) > 5 for line in lines[1:])
    assert budget_cli.main("memory --model 2298M --gpus 8 --fp8".split()) == 0
    fp8 = capsys.readouterr().out.splitlines()
    assert [line[:45] for line in fp8] == [line[:45] for line in lines]
    assert all(float(a[45:].split()[0]) < float(b[45:].split()[0]) for a, b in zip(fp8[1:7], lines[1:7], strict=True))
    assert budget_cli.main("memory --model 2298M --gpus 8 --bias-swiglu-fusion".split()) == 0
    gated = capsys.readouterr().out.splitlines()
    # Blocks keep as much as with --fp8, but for tensor parallelism, which has none of it.
    tensor = ["TP" in line for line in lines[1:]]
    assert any(tensor) and [a == b for a, b in zip(gated[1:], lines[1:], strict=True)] == tensor
    assert [a for a, cut in zip(gated[1:], tensor) if not cut] == [a for a in fp8[1:] if "TP" not in a]
    # Narrow models have none of it either.
    assert budget_cli.main("memory --model 57M".split()) == 0
    narrow = capsys.readouterr().out
    assert budget_cli.main("memory --model 57M --bias-swiglu-fusion".split()) == 0
    assert capsys.readouterr().out == narrow
    assert budget_cli.main("memory --model 2299M".split()) == 2
    assert "did you mean 2298M" in capsys.readouterr().err
    assert budget_cli.main("memory --model 2298M --gpus 0".split()) == 2
    assert "--gpus 0" in capsys.readouterr().err


@pytest.mark.parametrize(("dropout", "measured"), [(0.0, 29.7), (0.1, 29.8)])
def test_within_ten_percent_of_an_h100(dropout: float, measured: float) -> None:
    """docs/training.md: the 425M row on one H100, micro-batch 16, bf16, compiled; 1e9 bytes."""
    row = budget.read_model_table()["425M"]
    model = dataclasses.replace(
        MODEL, num_layers=row.layers, hidden_size=row.d_model, num_attention_heads=row.heads, ffn_hidden_size=row.ffn,
        kv_channels=row.head_size, max_position_embeddings=2048, hidden_dropout=dropout,
    )  # fmt: skip
    found = estimate(model, Split(gpus=1), vocabulary=50_304, micro_batch_size=16, seq_length=2048, micro_batches=16)
    assert found.gpu / 1e9 == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("name", "micro_batch", "measured"), [
    ("425M", 16, 25.3), ("425M", 32, 42.4), ("1143M", 16, 54.9), ("117M", 32, 16.6),
])  # fmt: skip
def test_with_swiglu_inside_of_products_too(name: str, micro_batch: int, measured: float) -> None:
    """docs/performance.md: one H200, MDM, bf16, FlashAttention; 1e9 bytes."""
    model = budget.read_model_table()[name].model(2048, hidden_dropout=0.0, attention_dropout=0.0)
    found = estimate(
        model, Split(gpus=1, gated=True), vocabulary=50_304, micro_batch_size=micro_batch, seq_length=2048,
        micro_batches=8,
    )  # fmt: skip
    assert found.gpu / 1e9 == pytest.approx(measured, rel=0.1)
