"""Next-token prediction: the shift, the weights, and what ends of documents do."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.objectives import Autoregressive, Objective

EOD = 9
MakeObjective = Callable[..., Objective]


def test_shift_and_weights(make_objective: MakeObjective, make_tokens: Callable[..., Tensor]) -> None:
    tokens = make_tokens([0, 1, 2])
    objective = make_objective("ar")
    batch = objective.make_batch(tokens, torch.tensor([0, 1, 2]))
    assert isinstance(objective, Autoregressive) and objective.causal
    assert torch.equal(batch.inputs, tokens[:, :-1]) and torch.equal(batch.targets, tokens[:, 1:])
    assert torch.equal(batch.weights, torch.full((3, 32), 1 / 96))
    assert batch.weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert batch.counted.tolist() == [32.0] * 3
    assert batch.positions.tolist() == [list(range(32))] * 3
    assert batch.attention_mask is None and batch.scored is None
    assert batch.sample_ids.tolist() == [0, 1, 2]


def test_loss_is_the_mean_cross_entropy(make_objective: MakeObjective, make_tokens: Callable[..., Tensor]) -> None:
    tokens = make_tokens([0, 1])
    batch = make_objective("ar").make_batch(tokens, torch.tensor([0, 1]))
    logits = torch.randn(2, 32, 10, generator=torch.Generator().manual_seed(0))
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert (nll * batch.weights).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_pitfall_4_eod_mask_loss_skips_what_follows_an_eod(make_objective: MakeObjective) -> None:
    tokens = torch.tensor([[1, 2, EOD, 3, 4, EOD], [5, 6, 7, 8, 1, 2]])
    batch = make_objective("ar", seq_length=5, eod_mask_loss=True).make_batch(tokens, torch.tensor([0, 1]))
    # Inputs are 1 2 EOD 3 4: the prediction made at EOD (of 3) does not count; the prediction of the last EOD does.
    assert (batch.weights * 10).tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert batch.counted.tolist() == [4.0, 5.0]


def test_pitfall_4_documents_confine_positions_and_attention(make_objective: MakeObjective) -> None:
    tokens = torch.tensor([[1, EOD, 3, 4, 5]])
    objective = make_objective("ar", seq_length=4, reset_position_ids=True, reset_attention_mask=True)
    batch = objective.make_batch(tokens, torch.tensor([0]))
    assert batch.positions.tolist() == [[0, 1, 0, 1]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1]]


def test_a_row_does_not_depend_on_its_batch(make_objective: MakeObjective, make_tokens: Callable[..., Tensor]) -> None:
    objective = make_objective("ar", eod_mask_loss=True, reset_position_ids=True)
    together = objective.make_batch(make_tokens([3, 8]), torch.tensor([3, 8]), torch.tensor([0, 5]))
    for row, sample_id in enumerate([3, 8]):
        alone = objective.make_batch(make_tokens([sample_id]), torch.tensor([sample_id]))
        assert torch.equal(alone.positions[0], together.positions[row])
        assert torch.allclose(alone.weights[0] / 2, together.weights[row], rtol=1e-6, atol=0)


def test_evaluation_measures_the_same(make_objective: MakeObjective, make_tokens: Callable[..., Tensor]) -> None:
    objective = make_objective("ar", eod_mask_loss=True)
    evaluation = objective.for_evaluation(num_windows=4, num_mc=1)
    assert evaluation is not objective
    a = objective.make_batch(make_tokens([0]), torch.tensor([0]))
    b = evaluation.make_batch(make_tokens([0]), torch.tensor([0]))
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.weights, b.weights)


def test_wrong_length_is_caught_and_objectives_travel_to_workers(make_objective: MakeObjective) -> None:
    objective = pickle.loads(pickle.dumps(make_objective("ar")))
    with pytest.raises(AssertionError, match=r"32 \+ 1 tokens, not 32"):
        objective.make_batch(torch.zeros(1, 32, dtype=torch.int64), torch.tensor([0]))
