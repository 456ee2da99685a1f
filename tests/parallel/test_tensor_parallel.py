"""A model cut over two and over four ranks is the whole model: losses, gradients, and what dropout guarantees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

KINDS = ["tensor 2", "tensor 2 sequence", "tensor 4", "tensor 4 sequence"]


@pytest.fixture(scope="module")
def reports(spawn: Callable[..., list[Any]]) -> list[Any]:
    """What each of four ranks computed."""
    return spawn("tensor_parallel_ranks.py", 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind} copied" for kind in KINDS)])
def test_loss_and_gradients_are_the_whole_models(reports: list[Any], kind: str) -> None:
    """In double precision, for every case: SwiGLU and GELU, few key/value heads, masks, scored rows, recomputation.

    With messages as collectives, and written into each other's memory.
    """
    cases = [case for found, case in reports[0]["differences"] if found == kind]
    assert len(cases) == 9 + (kind == "tensor 2 sequence")
    for report in reports:
        for case in cases:
            differences = report["differences"][kind, case]
            assert len(differences) >= 10
            wrong = {name: value for name, value in differences.items() if not value < 1e-10}
            assert not wrong, f"{kind}, {case}: {wrong}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor 2", "tensor 4"])
def test_fp8_of_each_part_is_the_whole_models(reports: list[Any], kind: str) -> None:
    """Each rank scales its own parts. All differ from the exact model by fp8's rounding, and agree with each other."""
    for report in reports:
        differences = report["fp8"][kind]
        assert len(differences) >= 10 and differences["loss"] < 0.02
        wrong = {name: value for name, value in differences.items() if not value < 0.15}
        assert not wrong, f"{kind}: {wrong}"
    assert max(reports[0]["fp8"][kind].values()) > 0.02, "fp8 was used"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_agrees_where_it_must_and_differs_where_it_must(reports: list[Any], kind: str) -> None:
    """Hidden states that every rank has are dropped alike; own heads and own tokens are dropped independently."""
    size, ranks = int(kind.split()[1]), [report["dropout"][kind] for report in reports]
    peers = ranks[:size]
    assert all(rank["recomputed alike"] for rank in ranks)
    assert all(torch.equal(rank["next"], peers[0]["next"]) for rank in peers), "generators must move on alike"
    for index, one in enumerate(peers):
        for other in peers[:index]:
            if "sequence" in kind:
                agree = (one["hidden"] == other["hidden"]).float().mean()
                # Independent: they agree where both keep or both drop, 0.7^2 + 0.3^2.
                assert abs(agree - 0.58) < 5 * (0.58 * 0.42 / one["hidden"].numel()) ** 0.5
            else:
                assert torch.equal(one["hidden"], other["hidden"])
            assert not torch.equal(one["attention"], other["attention"])
    for rank in peers:
        kept = rank["hidden"].float().mean()
        assert abs(kept - 0.7) < 5 * (0.7 * 0.3 / rank["hidden"].numel()) ** 0.5


@pytest.mark.slow
def test_a_compiled_block_is_one_graph_that_keeps_nothing_gathered(reports: list[Any]) -> None:
    """Forward it gathers the inputs of both column-parallel layers, and the one key/value head of which both ranks have
    a half. Backward it gathers those inputs again, instead of having kept them, and the gradients of both scattered
    sums. Gains of two norms have a gradient of all ranks' tokens."""
    forward = {"gathered_product": 2, "scattered_product": 2, "all_gather": 1}
    backward = {"row_gradients": 2, "column_gradients": 2, "reduce_scatter": 1, "all_reduce": 2}
    for report in reports:
        assert report["messages"] == [forward, backward]
        assert report["kept"] == [False, False]
