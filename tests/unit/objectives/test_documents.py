"""--reset-attention-mask from tokens to logits: a document in a row of several is as it would be alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.model.sharding import SequentialGPT
from megatron.objectives import Objective

EOD = 9
RESETS = {"reset_attention_mask": True, "reset_position_ids": True}
MakeObjective = Callable[..., Objective]


@pytest.mark.parametrize("kind", ["ar", "mdm"])
def test_a_document_is_as_if_alone(
    make_objective: MakeObjective,
    make_tokens: Callable[..., Tensor],
    make_model: Callable[..., SequentialGPT],
    kind: str,
) -> None:
    """Logits of every document of a batch, cut out and run alone, in double precision."""
    ids, model = [0, 1, 2, 3], make_model(causal=kind == "ar")
    tokens = make_tokens(ids)  # one in ten is an end of document
    batch = make_objective(kind, **RESETS).make_batch(tokens, torch.tensor(ids))
    together = model.logits(batch.inputs, batch.positions, batch.attention_mask)[..., :10]
    clean, documents = tokens[:, :-1] if kind == "ar" else tokens[:, 1:], 0
    for row in range(4):
        ends = (clean[row] == EOD).nonzero().flatten().tolist()
        starts = [0, *(end + 1 for end in ends if end < 31)]
        for start, stop in zip(starts, [*starts[1:], 32]):
            alone = model.logits(batch.inputs[row : row + 1, start:stop], torch.arange(stop - start).unsqueeze(0))
            torch.testing.assert_close(together[row, start:stop], alone[0, :, :10], rtol=1e-9, atol=1e-9)
            documents += 1
    assert documents > 8


@pytest.mark.parametrize("kind", ["ar", "mdm"])
def test_nothing_in_the_batch_grows_with_the_square_of_its_length(
    make_objective: MakeObjective, make_tokens: Callable[..., Tensor], kind: str
) -> None:
    batch = make_objective(kind, **RESETS).make_batch(make_tokens([0, 1]), torch.tensor([0, 1]))
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        assert value is None or value.numel() <= 2 * 32, field.name


@given(
    rows=st.lists(st.lists(st.sampled_from([1, 2, EOD]), min_size=9, max_size=9), min_size=1, max_size=3),
    ratio=st.floats(0.1, 1),
)
def test_random_masks_hide_nothing_less_for_documents(
    make_objective: MakeObjective, rows: list[list[int]], ratio: float
) -> None:
    """With --randmask-ratio too, a pair is visible if the random mask shows it and no end of document lies between."""
    tokens, ids = torch.tensor(rows), torch.arange(len(rows))
    both = make_objective("ar", seq_length=8, randmask_ratio=ratio, **RESETS).make_batch(tokens, ids)
    random = make_objective("ar", seq_length=8, randmask_ratio=ratio).make_batch(tokens, ids).attention_mask
    assert both.attention_mask is not None and random is not None and both.attention_mask.shape == (len(rows), 1, 8, 8)
    for row, seen, shown in zip(rows, both.attention_mask[:, 0].tolist(), random[:, 0].tolist()):
        for query in range(8):
            for key in range(8):
                assert seen[query][key] == (shown[query][key] and EOD not in row[key:query])
