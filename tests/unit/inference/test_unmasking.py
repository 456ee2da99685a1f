"""The sampler against the exact joint distribution of a toy model, and what each setting promises."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.inference.generation import fill_masks
from megatron.inference.hub.unmasking import Unmasking, draw, unmask
from megatron.inference.loading import LoadedModel

MASK = 3
PROMPT = (2,)
LENGTH = 3


def log_probs(loaded: LoadedModel, tokens: Sequence[int]) -> np.ndarray:
    inputs = torch.tensor([list(tokens)])
    logits = loaded.model.logits(inputs, torch.arange(len(tokens)).unsqueeze(0))[0, :, :3]
    return torch.log_softmax(logits, dim=-1).numpy()


def order_probability(
    loaded: LoadedModel, text: Sequence[int], order: Sequence[int], temperature: float = 1.0
) -> float:
    """Probability that revealing the places in ``order`` gives ``text``."""
    total = 0.0
    for step, place in enumerate(order):
        shown = [MASK if p in order[step:] else token for p, token in enumerate(text)]
        values = log_probs(loaded, (*PROMPT, *shown))[len(PROMPT) + place] / temperature
        total += values[text[place]] - np.logaddexp.reduce(values)
    return math.exp(total)


def sample(loaded: LoadedModel, count: int, seed: int = 0, **settings: Any) -> list[tuple[int, ...]]:
    rows = [(*PROMPT, *[MASK] * LENGTH)] * count
    return [tuple(row[len(PROMPT) :]) for row in fill_masks(loaded, rows, Unmasking(**settings), seed)]


def check_distribution(found: Sequence[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    """Pearson's chi-square within five standard deviations of its mean; rare texts are counted together."""
    assert sum(expected.values()) == pytest.approx(1)
    total = len(found)
    cells = [[text] for text, p in expected.items() if total * p >= 5]
    cells.append([text for text, p in expected.items() if total * p < 5])
    counts = Counter(found)
    statistic = 0.0
    for cell in cells:
        wanted = total * sum(expected[text] for text in cell)
        statistic += (sum(counts[text] for text in cell) - wanted) ** 2 / max(wanted, 1.0)
    freedom = len(cells) - 1
    assert freedom >= 10
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


TEXTS = list(itertools.product(range(3), repeat=LENGTH))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_random_order_draws_from_the_any_order_joint(masked_model: LoadedModel, temperature: float) -> None:
    orders = list(itertools.permutations(range(LENGTH)))
    expected = {
        text: float(np.mean([order_probability(masked_model, text, order, temperature) for order in orders]))
        for text in TEXTS
    }
    check_distribution(sample(masked_model, 20_000, order="random", temperature=temperature), expected)
    with pytest.raises(AssertionError):  # the test can tell
        check_distribution(sample(masked_model, 20_000, order="confidence", temperature=temperature), expected)


def test_left_to_right_draws_from_the_chain_rule(masked_model: LoadedModel) -> None:
    expected = {text: order_probability(masked_model, text, range(LENGTH)) for text in TEXTS}
    check_distribution(sample(masked_model, 20_000, order="left-to-right", temperature=1.0), expected)
    # Blocks of one position are filled from the left whatever the order inside them.
    check_distribution(sample(masked_model, 20_000, order="random", block_length=1, temperature=1.0), expected)


def test_several_tokens_a_step_are_drawn_independently(masked_model: LoadedModel) -> None:
    alone = np.exp(log_probs(masked_model, (*PROMPT, MASK, MASK, MASK))[len(PROMPT) :])
    expected = {text: float(np.prod([alone[k, token] for k, token in enumerate(text)])) for text in TEXTS}
    check_distribution(sample(masked_model, 20_000, order="random", tokens_per_step=3, temperature=1.0), expected)


def test_confidence_keeps_the_most_probable_draw_first(masked_model: LoadedModel) -> None:
    hidden, text = list(range(LENGTH)), [MASK] * LENGTH
    while hidden:
        values = log_probs(masked_model, (*PROMPT, *text))[len(PROMPT) :]
        best = max(hidden, key=lambda place: values[place].max())
        text[best] = int(values[best].argmax())
        hidden.remove(best)
    assert sample(masked_model, 2) == [tuple(text)] * 2


def test_same_seed_same_text(masked_model: LoadedModel) -> None:
    settings: dict[str, Any] = {"order": "confidence", "temperature": 1.0}
    first = sample(masked_model, 50, seed=1, **settings)
    assert first == sample(masked_model, 50, seed=1, **settings) != sample(masked_model, 50, seed=2, **settings)


def test_rows_of_any_length_are_filled_as_if_alone(masked_model: LoadedModel) -> None:
    """Padding costs no step, changes nothing, and given tokens stay."""
    rows = [(2, 3, 3, 3, 3), (1, 3), (3, 0, 3, 1), (0, 1, 2), ()]
    steps: list[int] = []

    def on_step(tokens: Tensor, remaining: Tensor) -> None:
        steps.append(int(remaining.sum()))

    together = fill_masks(masked_model, rows, Unmasking(), on_step=on_step)
    assert steps == [4, 2, 1, 0]  # as many steps as the longest row has masks
    for row, filled in zip(rows, together, strict=True):
        assert fill_masks(masked_model, [row], Unmasking())[0] == filled
        assert len(filled) == len(row) and MASK not in filled
        assert all(a == b for a, b in zip(row, filled, strict=True) if a != MASK)


def test_no_query_sees_padding_and_padding_is_no_mask() -> None:
    seen: list[Tensor] = []

    def predict(tokens: Tensor, where: Tensor) -> Tensor:
        seen.append(tokens)
        return torch.zeros(len(where), 3)

    tokens = torch.tensor([[3, 3, 0], [3, 0, 0]])
    masked = torch.tensor([[True, True, False], [True, False, False]])
    unmask(predict, tokens, masked, MASK, Unmasking(tokens_per_step=2))
    assert len(seen) == 1 and torch.equal(seen[0], tokens)


def test_blocks_are_filled_one_after_the_other() -> None:
    asked: list[list[int]] = []

    def predict(tokens: Tensor, where: Tensor) -> Tensor:
        asked.append(where.tolist())
        return torch.zeros(len(where), 3)

    masked = torch.tensor([[False, True, False, True, True, True, True]])
    unmask(predict, torch.zeros(1, 7, dtype=torch.int64), masked, MASK, Unmasking(tokens_per_step=2, block_length=3))
    assert asked[0] == [1, 3, 4] and len(asked[1]) == 1 and set(asked[1]) < {1, 3, 4} and asked[2] == [5, 6]


def test_guidance_sharpens_towards_the_prompt(masked_model: LoadedModel) -> None:
    row = (2, 1, MASK)
    given = log_probs(masked_model, row)[2]
    blind = log_probs(masked_model, (MASK, MASK, MASK))[2]
    for weight in (0.5, 3.0):
        guided = (1 + weight) * given - weight * blind
        (filled,) = fill_masks(masked_model, [row], Unmasking(guidance=weight))
        assert filled[2] == guided.argmax()


def test_gumbel_noise_is_exact_in_the_tail() -> None:
    """A token of probability 1e-6 among 2 million draws: fp32 noise would be a little too rare there."""
    logits = torch.log(torch.tensor([[1 - 1e-3, 1e-3]])).expand(200_000, 2)
    drawn = draw(logits, 1.0, torch.Generator().manual_seed(0))
    assert float(drawn.sum()) == pytest.approx(200, abs=5 * math.sqrt(200))
    assert torch.equal(draw(logits[:3], 0.0, None), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": "best"}, {"tokens_per_step": 0}, {"block_length": 0}, {"temperature": -1}, {"guidance": -1},
        {"temperature": math.nan}, {"temperature": math.inf}, {"guidance": math.nan}, {"guidance": math.inf},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Unmasking(**wrong)
