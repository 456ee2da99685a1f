"""Random attention masks: self always visible, the future never, the past hidden with the published probabilities."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.model.sharding import SequentialGPT
from megatron.objectives import Autoregressive, Objective
from megatron.objectives.attention_masking import RandomMasking

EOD = 9
MakeObjective = Callable[..., Objective]
MakeTokens = Callable[..., Tensor]


def hidden_pairs(ratio: float, length: int, samples: int, seed: int = 11) -> np.ndarray:
    """[samples, length, length] bool: which of the past is hidden (False on and above the diagonal)."""
    mask = RandomMasking(seed, ratio).attention_mask([(sample, 0) for sample in range(samples)], length)[:, 0]
    return (~mask).tril(-1).numpy()


@given(st.integers(0, 2**63 - 1), st.integers(1, 40), st.floats(0, 1), st.integers(1, 3))
def test_self_is_always_visible_and_the_future_never(seed: int, length: int, ratio: float, rows: int) -> None:
    mask = RandomMasking(seed, ratio).attention_mask([(sample, 0) for sample in range(rows)], length)
    assert mask.shape == (rows, 1, length, length) and mask.dtype == torch.bool
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not mask.triu(1).any()


def test_ratio_0_hides_nothing() -> None:
    mask = RandomMasking(1, 0.0).attention_mask([(0, 0)], 33)
    assert torch.equal(mask[0, 0], torch.ones(33, 33, dtype=torch.bool).tril())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_hidden_share_of_a_row(ratio: float) -> None:
    """A row's expected hidden share is r (0.999/2 + 0.001), whatever its length; rows are independent."""
    length = 128
    hidden = hidden_pairs(ratio, length, samples=60)
    shares = hidden[:, 1:].sum(axis=2) / np.arange(1, length)  # [60, 127]
    expected = ratio * 0.5005
    for part in (shares, shares[:, :63], shares[:, 63:]):  # the two halves are cut from the noise differently
        assert abs(part.mean() - expected) < 4 * part.std() / part.size**0.5


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_share_of_chosen_positions(ratio: float) -> None:
    """A chosen row of q past positions loses none with probability E[(1 - p)^q] = (0.999^(q+1) / (q+1)) / 0.999."""
    length, samples = 64, 400
    last = hidden_pairs(ratio, length, samples)[:, 32:].any(axis=2)  # [400, 32]
    chosen_but_whole = np.array([0.999**q / (q + 1) for q in range(32, length)])
    expected = ratio * (1 - chosen_but_whole)
    assert abs(last.mean() - expected.mean()) < 4 * (expected.mean() * (1 - expected.mean()) / last.size) ** 0.5


@pytest.mark.parametrize("row", [1, 3, 4, 7])
def test_probability_of_a_row_is_uniform(row: int) -> None:
    """If p is uniform and the past positions are lost independently, every number of lost ones is equally likely."""
    n = 16_000
    counts = np.bincount(hidden_pairs(1.0, 8, n)[:, row].sum(axis=1), minlength=row + 1)
    nodes, node_weights = np.polynomial.legendre.leggauss(16)
    p = 0.5005 + 0.4995 * nodes  # quadrature over p in [0.001, 1]
    binomial = [np.prod([(row - i) / (i + 1) for i in range(k)]) * p**k * (1 - p) ** (row - k) for k in range(row + 1)]
    expected = n * np.array([(node_weights * values).sum() / 2 for values in binomial])
    critical = {1: 10.8, 3: 16.3, 4: 18.5, 7: 24.3}[row]  # 0.1 % level of chi-square with `row` degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum() < critical


@pytest.mark.parametrize("length", [7, 8])
def test_pairs_share_noise_only_through_their_row(length: int) -> None:
    """Covariance of two hidden pairs: var(p) = 0.999^2 / 12 inside a row, 0 between rows. All pairs, so that a number
    used twice would show."""
    n = 16_000
    below = np.tril_indices(length, -1)
    hidden = hidden_pairs(1.0, length, n)[:, below[0], below[1]]  # [n, pairs], ordered by row
    centred = hidden - hidden.mean(axis=0)
    covariance = centred.T @ centred / n
    same_row = below[0][:, None] == below[0][None, :]
    expected = np.where(same_row, 0.999**2 / 12, 0.0)
    np.fill_diagonal(expected, 0.5005 * 0.4995)
    assert np.abs(covariance - expected).max() < 4.5 * 0.25 / n**0.5
    # Nor in other samples.
    again = centred.T @ np.roll(centred, 1, axis=0) / n
    assert np.abs(again).max() < 4.5 * 0.25 / n**0.5


def test_all_probabilities_occur() -> None:
    """From 0.001 to 1: the hidden share of long rows, against the uniform distribution (Kolmogorov-Smirnov)."""
    shares = np.sort(hidden_pairs(1.0, 2048, 1)[0, 1024:].mean(axis=1) * 2048 / np.arange(1024, 2048))
    assert np.abs((shares - 0.001) / 0.999 - (np.arange(1024) + 0.5) / 1024).max() < 1.63 / 32 + 0.01
    assert shares[0] < 0.01 and shares[-1] > 0.99


def test_batch_has_the_mask_and_nothing_else_changes(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    ids = [0, 1, 2]
    plain = make_objective("ar").make_batch(make_tokens(ids), torch.tensor(ids))
    masked = make_objective("ar", randmask_ratio=0.5).make_batch(make_tokens(ids), torch.tensor(ids))
    for name in ("inputs", "targets", "positions", "weights", "counted"):
        assert torch.equal(getattr(plain, name), getattr(masked, name))
    assert plain.attention_mask is None and masked.attention_mask is not None
    expected = RandomMasking(1234, 0.5).attention_mask([(sample, 0) for sample in ids], 32)
    assert torch.equal(masked.attention_mask, expected)
    off = make_objective("ar", randmask_ratio=0.0).make_batch(make_tokens(ids), torch.tensor(ids))
    assert off.attention_mask is None


def test_pitfall_10_off_in_evaluation(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    training = make_objective("ar", randmask_ratio=1.0)
    evaluation = training.for_evaluation(num_windows=2, num_mc=1)
    assert evaluation.make_batch(make_tokens([0, 1]), torch.tensor([0, 1])).attention_mask is None
    assert isinstance(training, Autoregressive) and training.random_masking is not None


def test_documents_and_random_masks_both_count(make_objective: MakeObjective) -> None:
    tokens = torch.tensor([[1, 2, 3, EOD, 4, 5, 6, 7, 8], [1, EOD, 2, EOD, 3, 4, 5, 6, 7]])
    resets = {"reset_attention_mask": True, "reset_position_ids": True}
    ids = torch.tensor([0, 1])
    both = make_objective("ar", seq_length=8, randmask_ratio=0.8, **resets)
    documents = make_objective("ar", seq_length=8, **resets).make_batch(tokens, ids).attention_mask
    random = make_objective("ar", seq_length=8, randmask_ratio=0.8).make_batch(tokens, ids).attention_mask
    batch = both.make_batch(tokens, ids)
    assert documents is not None and random is not None and batch.attention_mask is not None
    same = torch.tensor([[[a == b for b in row] for a in row] for row in documents.tolist()])  # [b, s, s]
    assert documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2, 2]]
    assert torch.equal(batch.attention_mask, same.unsqueeze(1) & random)
    assert batch.attention_mask.diagonal(dim1=2, dim2=3).all()
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 2, 3]]
    evaluation = both.for_evaluation(2, 1).make_batch(tokens, ids).attention_mask
    assert evaluation is not None and torch.equal(evaluation, documents)


def test_masks_apply_to_permuted_places(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    orders = {"use_order_list": True, "num_order_list": 4}
    ids = torch.arange(4)
    plain = make_objective("ar", **orders).make_batch(make_tokens([0, 1, 2, 3]), ids)
    both = make_objective("ar", randmask_ratio=0.5, **orders).make_batch(make_tokens([0, 1, 2, 3]), ids)
    assert torch.equal(plain.positions, both.positions) and torch.equal(plain.inputs, both.inputs)
    assert both.attention_mask is not None and not both.attention_mask.triu(1).any()


def test_every_rank_and_split_agrees(make_objective: MakeObjective, make_tokens: MakeTokens) -> None:
    ids = list(range(8))
    objective = make_objective("ar", randmask_ratio=0.5)
    whole = objective.make_batch(make_tokens(ids), torch.tensor(ids)).attention_mask
    assert whole is not None
    torch.manual_seed(99)
    state = torch.get_rng_state()
    rebuilt = pickle.loads(pickle.dumps(make_objective("ar", randmask_ratio=0.5)))
    for part in ([0, 1], [7], [3, 5, 6]):
        mask = rebuilt.make_batch(make_tokens(part), torch.tensor(part)).attention_mask
        assert torch.equal(mask, whole[part])
    assert torch.equal(torch.get_rng_state(), state)
    assert len({mask.numpy().tobytes() for mask in whole}) == 8, "each sample has a mask of its own"
    redrawn = objective.make_batch(make_tokens([0]), torch.tensor([0]), torch.tensor([1])).attention_mask
    other_seed = make_objective("ar", randmask_ratio=0.5, seed=5).make_batch(make_tokens([0]), torch.tensor([0]))
    for other in (redrawn, other_seed.attention_mask):
        assert other is not None and not torch.equal(other[0], whole[0])


FROZEN = ["1", "01", "001", "0001", "11111", "101111", "1011111"]


def test_masks_of_a_seed_never_change() -> None:
    """Another algorithm would change every run that is going on."""
    mask = RandomMasking(1234, 0.7).attention_mask([(3, 0)], 7)[0, 0]
    assert ["".join("01"[visible] for visible in row[: q + 1]) for q, row in enumerate(mask.tolist())] == FROZEN


def test_the_model_sees_what_is_visible_and_nothing_else(
    make_objective: MakeObjective, make_tokens: MakeTokens, make_model: Callable[..., SequentialGPT]
) -> None:
    """With one layer, the logits of a query move with a token if and only if the mask shows it the token."""
    model, ids = make_model(num_layers=1), torch.tensor([0, 1, 2])
    objective = make_objective("ar", seq_length=12, randmask_ratio=0.8)
    tokens = make_tokens([0, 1, 2], 12)
    batch = objective.make_batch(tokens, ids)
    logits = model.logits(batch.inputs, batch.positions, batch.attention_mask)
    assert batch.attention_mask is not None
    seen = torch.zeros(3, 12, 12, dtype=torch.bool)
    for key in range(12):
        inputs = batch.inputs.clone()
        inputs[:, key] = (inputs[:, key] + 1) % 9
        moved = model.logits(inputs, batch.positions, batch.attention_mask) != logits
        seen[:, :, key] = moved[..., :10].any(dim=-1)
    assert torch.equal(seen, batch.attention_mask[:, 0])
