"""The plain loops that the entry points are compared with compute the same thing."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron import budget
from megatron.budget import ModelRow
from megatron.model.gpt import build_layers, initialize_weights
from megatron.model.sharding import SequentialGPT
from tools import benchmark_reference as reference

ROW = ModelRow("tiny", d_model=32, table_ffn=0, head_size=8, heads=4, layers=2)
VOCABULARY, LENGTH, BATCH = 96, 16, 3


@pytest.mark.parametrize("causal", [True, False])
def test_bare_model_is_ours(causal: bool) -> None:
    """As many parameters, and with the same weights the same loss and gradients."""
    config = ROW.model(LENGTH, attention_dropout=0.0, hidden_dropout=0.0)
    layers = build_layers(config, VOCABULARY, VOCABULARY, causal)
    initialize_weights(layers, config, 1)
    ours = SequentialGPT(layers, config)
    bare = reference.BareGPT(ROW, VOCABULARY, LENGTH, causal, 0.0)
    pairs = list(zip(ours.named_weights().values(), bare.parameters(), strict=True))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    assert sum(p.numel() for p in bare.parameters()) == budget.parameter_count(config, VOCABULARY)

    inputs, targets = torch.randint(VOCABULARY, (2, BATCH, LENGTH))
    weights = torch.full((BATCH, LENGTH), 1 / (BATCH * LENGTH)) if causal else torch.rand(BATCH, LENGTH)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    expected = ours(inputs, positions, targets, weights)
    found = bare(inputs, targets, None if causal else weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.backward()
    for mine, other in pairs:
        torch.testing.assert_close(other.grad, mine.grad, rtol=1e-4, atol=1e-6)


def test_dropout_reaches_every_branch() -> None:
    """Of a model in training, two passes differ; with dropout so high that nothing is left, logits are zero."""
    bare = reference.BareGPT(ROW, VOCABULARY, LENGTH, True, 0.5)
    inputs, targets = torch.randint(VOCABULARY, (2, BATCH, LENGTH))
    assert bare(inputs, targets, None) != bare(inputs, targets, None)
    assert bare.eval()(inputs, targets, None) == bare(inputs, targets, None)
    nothing = reference.BareGPT(ROW, VOCABULARY, LENGTH, True, 1.0)
    assert nothing(inputs, targets, None).item() == pytest.approx(math.log(VOCABULARY))


def test_gradients_add_up_in_fp32_and_weights_are_rounded_once() -> None:
    model = torch.nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    start = model.weight.detach().float()
    weights = reference.MasterWeights(model)
    small = [torch.full((3, 4), value, dtype=torch.bfloat16) for value in (1.0, 1 / 256, 1 / 256)]
    for gradient in small:  # in bf16, 1 + 1/256 is 1
        model.weight.grad = gradient.clone()
        weights.accumulate()
    total = torch.full((3, 4), 1 + 2 / 256)
    assert torch.equal(weights.master[0].grad, total)
    expected = start.clone().requires_grad_()
    expected.grad = total / total.norm()  # clipped to 1
    torch.optim.AdamW([expected], lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1).step()
    weights.step()
    torch.testing.assert_close(weights.master[0], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(model.weight, weights.master[0].bfloat16()) and weights.master[0].grad is None


def test_an_fp32_model_is_its_own_master() -> None:
    model = torch.nn.Linear(4, 3, bias=False)
    weights = reference.MasterWeights(model)
    assert weights.master[0] is model.weight
    model(torch.ones(2, 4)).sum().backward()
    before = model.weight.detach().clone()
    weights.accumulate()
    weights.step()
    assert not torch.equal(model.weight, before) and model.weight.grad is None


def settings(tmp_path: Path, **changes: object) -> argparse.Namespace:
    """A command line over ten windows of random tokens."""
    tokens = np.random.default_rng(0).integers(0, 50_000, 10 * LENGTH + 1, dtype=np.uint16)
    tokens.tofile(tmp_path / "data.bin")
    values = {
        "data": str(tmp_path / "data.bin"), "output": str(tmp_path / "out.json"), "model": "7M", "objective": "ar",
        "micro_batch_size": 2, "global_batch_size": 4, "seq_length": LENGTH, "steps": 2, "warmup": 1,
        "precision": "fp32",
    } | changes  # fmt: skip
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return reference.build_parser().parse_args(["bare", *flags])


def test_windows_follow_each_other_around_the_file(tmp_path: Path) -> None:
    arguments = settings(tmp_path, micro_batch_size=4)
    whole = torch.from_numpy(np.fromfile(arguments.data, dtype=np.uint16).astype(np.int64))
    batches = list(itertools.islice(reference.micro_batches(arguments, torch.device("cpu")), 5))
    rows = torch.cat(batches)  # [20, s + 1]: twice around ten windows
    for index, row in enumerate(rows):
        start = index % 10 * LENGTH
        assert torch.equal(row, whole[start : start + LENGTH + 1])


@pytest.mark.parametrize(("kind", "objective"), [("bare", "ar"), ("bare", "mdm"), ("transformers", "ar")])
def test_the_loop_trains(tmp_path: Path, kind: str, objective: str) -> None:
    """The first loss of small random weights is ln V (an ELBO of a few masks is near it), and both models are as large
    as the table's row says: the published count without its (4 L - 1) d, and with 47 rows of padding.
    """
    arguments = settings(tmp_path, objective=objective)
    figures = reference.measure(kind, arguments)
    row = budget.read_model_table()["7M"]
    padding = (50_304 - 50_257) * row.d_model
    assert figures["parameters"] == row.parameters - (4 * row.layers - 1) * row.d_model + padding
    assert figures["first_loss"] == pytest.approx(math.log(50_304), rel=0.01 if objective == "ar" else 0.5)
    flops = budget.flops_per_token(row.model(LENGTH), LENGTH, 50_257, causal=objective == "ar")
    assert figures["tflops"] * 1e12 == pytest.approx(figures["tokens_per_second"] * flops)
    assert figures["mfu"] is None and figures["memory_gb"] > 0


def test_the_command_writes_json(tmp_path: Path) -> None:
    arguments = settings(tmp_path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(arguments).items()
             if name not in ("kind", "compile")]  # fmt: skip
    assert reference.main(["bare", *flags]) == 0
    assert json.loads(arguments.output.read_text())["tokens_per_second"] > 0
    assert reference.main(["bare", *flags, "--model", "8M"]) == 2
