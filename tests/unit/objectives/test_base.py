"""Document confinement against loops that spell it out; the capacity of scored positions; moving a batch."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.objectives.base import CAPACITY_STEPS, Batch, Confinement, scored_positions

EOD = 9
rows = st.lists(st.lists(st.sampled_from([1, 2, EOD]), min_size=7, max_size=7), min_size=1, max_size=3)


def documents_of(row: list[int]) -> list[list[int]]:
    """Index lists of the documents of ``row``: an eod ends the document that it belongs to."""
    documents: list[list[int]] = [[]]
    for index, token in enumerate(row):
        documents[-1].append(index)
        if token == EOD:
            documents.append([])
    return [document for document in documents if document]


@given(rows)
def test_positions_restart_after_each_eod(tokens: list[list[int]]) -> None:
    positions = Confinement(EOD, reset_position_ids=True, reset_attention_mask=False).positions(torch.tensor(tokens))
    expected = [[k for document in documents_of(row) for k in range(len(document))] for row in tokens]
    assert positions.tolist() == expected
    assert positions.dtype == torch.int64


@given(rows)
def test_documents_are_numbered_in_each_row(tokens: list[list[int]]) -> None:
    numbers = Confinement(EOD, reset_position_ids=False, reset_attention_mask=True).documents(torch.tensor(tokens))
    expected = [[d for d, document in enumerate(documents_of(row)) for _ in document] for row in tokens]
    assert numbers is not None and numbers.tolist() == expected
    assert numbers.dtype == torch.int32 and numbers.is_contiguous()


def test_without_the_flags_nothing_is_confined() -> None:
    confinement = Confinement(EOD, reset_position_ids=False, reset_attention_mask=False)
    tokens = torch.tensor([[1, EOD, 2, 3]] * 2)
    assert confinement.positions(tokens).tolist() == [[0, 1, 2, 3]] * 2
    assert confinement.positions(tokens).is_contiguous()
    assert confinement.documents(tokens) is None


def test_more_documents_than_a_byte_counts_stay_apart() -> None:
    confinement = Confinement(EOD, reset_position_ids=False, reset_attention_mask=True)
    numbers = confinement.documents(torch.full((1, 300), EOD))
    assert numbers is not None and numbers.tolist() == [list(range(300))]


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_scored_positions_cover_all_weights_and_repeat_none(b: int, s: int, share: float, seed: int) -> None:
    weighted = np.random.default_rng(seed).random((b, s)) < share
    indices = scored_positions(weighted).tolist()
    needed = set(np.flatnonzero(weighted).tolist())
    assert indices == sorted(set(indices)), "distinct and ascending"
    assert needed <= set(indices) <= set(range(b * s))
    step = -(-b * s // (16 * CAPACITY_STEPS)) * 16
    assert len(indices) == b * s or (len(indices) % step == 0 and 0 <= len(indices) - len(needed) <= step)


@pytest.mark.parametrize(("s", "step"), [(16, 16), (512, 32), (544, 48)])
def test_scored_positions_come_in_few_sizes(s: int, step: int) -> None:
    """Multiples of a 64th of 4 x s, which are multiples of 16, and all."""
    sizes = set()
    for count in range(4 * s + 1):
        weighted = np.zeros(4 * s, dtype=bool)
        weighted[:count] = True
        sizes.add(len(scored_positions(weighted.reshape(4, s))))
    assert sizes == {*range(step, 4 * s, step), 4 * s} and len(sizes) <= 64


def a_batch(**changes: Any) -> Batch:
    integers, floats = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    values = {"inputs": integers, "targets": integers, "weights": floats, "positions": integers}
    return Batch(**{**values, "counted": torch.ones(2), "sample_ids": torch.tensor([4, 5]), **changes})


def test_batch_moves_every_tensor_and_keeps_none() -> None:
    batch = a_batch(scored=torch.tensor([0, 1])).to("meta")
    assert batch.attention_mask is None
    for tensor in (batch.inputs, batch.targets, batch.weights, batch.positions, batch.counted, batch.scored):
        assert tensor is not None and tensor.device.type == "meta"
    assert a_batch().to("cpu", non_blocking=True).sample_ids.tolist() == [4, 5]


def test_batch_crosses_process_borders() -> None:
    copy = pickle.loads(pickle.dumps(a_batch()))
    assert torch.equal(copy.weights, a_batch().weights) and copy.scored is None


@pytest.mark.gpu
def test_batch_is_pinned_by_the_data_loader() -> None:
    batches: Any = [a_batch()]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=True)
    batch = next(iter(loader))
    assert batch.inputs.is_pinned() and batch.weights.is_pinned() and batch.scored is None
    assert batch.to("cuda", non_blocking=True).inputs.is_cuda
