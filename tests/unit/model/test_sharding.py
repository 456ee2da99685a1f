"""The model as an engine sees it: loss, scored rows, recomputation, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.model import sharding
from megatron.model.sharding import SequentialGPT, compile_blocks, plan_recomputation

Batch = dict[str, torch.Tensor]
Make = Callable[..., SequentialGPT]


def gradients(model: SequentialGPT, loss: torch.Tensor) -> list[torch.Tensor]:
    """Gradient of every parameter, in order."""
    return list(torch.autograd.grad(loss, list(model.parameters())))


def kept_bytes(model: SequentialGPT, batch: Batch) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(sizes.values())


def plain_loss(model: SequentialGPT, batch: Batch) -> torch.Tensor:
    """[b] sums of nll * weights from full logits."""
    logits = model.logits(batch["inputs"], batch["positions"])
    nll = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none").view(3, 16)
    return (nll * batch["weights"]).sum(dim=1)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_loss_and_gradients_equal_full_logits(make_model: Make, batch: Batch, causal: bool, untied: bool) -> None:
    model = make_model(causal, torch.float64, untie_embeddings_and_output_weights=untied)
    loss, expected = model(**batch), plain_loss(model, batch).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for gradient, wanted in zip(gradients(model, loss), gradients(model, expected)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)


def test_scored_positions_are_enough(make_model: Make, batch: Batch) -> None:
    """Weights non-zero on part of the positions, one row without any; capacity filled up with zero-weight positions."""
    model = make_model(False, torch.float64)
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[1] = False
    batch["weights"] = batch["weights"] * keep
    needed = int(keep.sum())
    scored = torch.argsort((~keep).flatten().to(torch.int8), stable=True)[: -(-needed // 6) * 6].sort()[0]
    assert len(scored) > needed
    full, part = model(**batch), model(**batch, scored=scored)
    torch.testing.assert_close(part, full, rtol=1e-12, atol=0)
    for gradient, wanted in zip(gradients(model, part), gradients(model, full)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)
    expected = plain_loss(model, batch).detach()
    for chosen in (None, scored):
        rows = model(**batch, scored=chosen, reduction="rows")
        assert rows.shape == (3,) and rows[1] == 0 and not rows.requires_grad
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("changes", [
    {}, {"checkpoint_activations": True},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
], ids=["kept", "recomputed", "block"])
def test_the_last_mlp_sees_scored_positions_only(make_model: Make, batch: Batch, changes: dict[str, Any]) -> None:
    model = make_model(False, **changes)
    batch["weights"].view(-1)[24:] = 0
    seen: list[int] = []
    for layer in model.layers[1:3]:
        layer.mlp.dense_4h_to_h.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 32))
    model(**batch, scored=torch.arange(24))
    assert seen == [48, 24]


RECOMPUTE: list[dict[str, Any]] = [
    {"checkpoint_activations": True},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "selective"},
]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("changes", RECOMPUTE, ids=lambda changes: "-".join(map(str, changes.values())))
def test_recomputation_changes_nothing(make_model: Make, batch: Batch, changes: dict[str, Any], dropout: float) -> None:
    """The same losses and gradients to the bit, dropout included: its generator is put back for the second pass."""
    results = []
    for extra in ({}, changes):
        model = make_model(num_layers=3, hidden_dropout=dropout, attention_dropout=dropout, **extra)
        torch.manual_seed(0)
        loss = model(**batch)
        results.append([loss, *gradients(model, loss)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("changes", RECOMPUTE, ids=lambda changes: "-".join(map(str, changes.values())))
def test_recomputation_keeps_fewer_tensors(make_model: Make, batch: Batch, changes: dict[str, Any]) -> None:
    assert kept_bytes(make_model(num_layers=3, **changes), batch) < kept_bytes(make_model(num_layers=3), batch)


def test_plan(make_model: Make) -> None:
    def plan(**changes: Any) -> list[tuple[int, bool]]:
        model = make_model(num_layers=5, **changes)
        runs = plan_recomputation(model.config, list(model.layers[1:-2]))
        return [(len(blocks), recomputed) for blocks, recomputed in runs]

    full = {"recompute_granularity": "full"}
    assert plan() == plan(recompute_granularity="selective") == [(5, False)]
    assert plan(checkpoint_activations=True) == [(1, True)] * 5
    assert plan(**full, recompute_method="uniform", recompute_num_layers=2) == [(2, True), (2, True), (1, True)]
    assert plan(**full, recompute_method="block", recompute_num_layers=2) == [(1, True), (1, True), (3, False)]


@pytest.mark.parametrize(("shallow", "together"), [(3, True), (2, False)], ids=["shallow", "deep"])
@pytest.mark.parametrize("changes", [{}, RECOMPUTE[0], RECOMPUTE[3]], ids=["plain", "full", "selective"])
@pytest.mark.parametrize("counts", [(), (48, 40, 24)], ids=["all", "scored"])
def test_blocks_compile_to_one_graph(
    make_model: Make,
    batch: Batch,
    changes: dict[str, Any],
    shallow: int,
    together: bool,
    counts: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All blocks are one compiled frame, or share one but for a last block that sees scored positions; later steps
    compile nothing, names and numbers stay."""
    monkeypatch.setattr(sharding, "BLOCKS_IN_ONE_GRAPH", shallow)
    torch.compiler.reset()
    plain, model = make_model(num_layers=3, **changes), make_model(num_layers=3, **changes)
    graphs: list[int] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """A backend that changes nothing and notes how many attentions the graph holds."""
        called = [str(node.target) for node in graph.graph.nodes]
        graphs.append(sum("scaled_dot_product" in name or "checkpoint" in name for name in called))
        return graph.forward

    compile_blocks(model, backend=record)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for count in counts or (48, 48):
        batch["weights"].view(-1)[count:] = 0
        loss, expected = model(**batch, scored=torch.arange(count) if counts else None), plain(**batch)
        torch.testing.assert_close(loss, expected)
        for gradient, wanted in zip(gradients(model, loss), gradients(plain, expected)):
            torch.testing.assert_close(gradient, wanted)
    whole = together and changes != RECOMPUTE[0]  # blocks that are recomputed whole are compiled one by one
    blocks = [3] if whole else [1, 1] if counts else [1]
    assert graphs == [*blocks, 0]  # and the loss, for any number of rows
    torch.compiler.reset()


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_follows_fp32(make_model: Make, batch: Batch, causal: bool) -> None:
    """bf16 parameters, as DeepSpeed holds them: the loss is fp32 and within bf16 noise of the fp32 model's."""
    loss = make_model(causal, torch.bfloat16)(**batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, make_model(causal)(**batch), rtol=3e-2, atol=0)


@torch._functorch.config.patch("activation_memory_budget", 1.0)  # monkeypatch would leave it hidden
def test_memory_budget(make_model: Make, batch: Batch) -> None:
    """A smaller share keeps fewer bytes for the backward pass; loss and gradients stay."""
    sizes = []
    for budget in (None, 0.5, 0.0):
        torch.compiler.reset()
        plain, model = make_model(num_layers=3), make_model(num_layers=3)
        compile_blocks(model, backend="aot_eager_decomp_partition", memory_budget=budget)
        sizes.append(kept_bytes(model, batch))
        loss, expected = model(**batch), plain(**batch)
        torch.testing.assert_close(loss, expected)
        for gradient, wanted in zip(gradients(model, loss), gradients(plain, expected)):
            torch.testing.assert_close(gradient, wanted)
    assert sizes[2] < 0.6 * sizes[1] < 0.5 * sizes[0]
    torch.compiler.reset()
