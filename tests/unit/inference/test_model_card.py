"""The card of an exported model says what the run recorded, and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.inference.loading import Description, LoadedModel
from megatron.inference.model_card import model_card
from megatron.run_metadata import Validation

EVENTS: list[dict[str, Any]] = [
    {"kind": "meta", "iteration": 0, "tokens_per_epoch": 500},
    {"kind": "train", "iteration": 10, "loss": 3.5},
    {"kind": "train", "iteration": 20, "loss": 3.25},
    {"kind": "train", "iteration": 30, "loss": 2.0},
]


@pytest.fixture
def trained(loaded_model: Callable[..., LoadedModel], tmp_path: Path) -> Callable[..., Description]:
    """``trained(objective, **metadata)``: a model of 25 steps whose run logged ``EVENTS``."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))

    def make(objective: str, **changes: Any) -> Description:
        found = loaded_model(objective).description
        config = {"optimizer": {"lr": 0.004, "bf16": True}, "objective": {"loss_weighting": "uniform"}}
        metadata = replace(
            found.metadata, iteration=25, consumed_samples=40, consumed_tokens=1280, config=config,
            validation=Validation(3.125, 0.25), **changes,
        )
        return replace(found, path=tmp_path / "global_step25", metadata=metadata)

    return make


def test_budget_recipe_and_losses(trained: Callable[..., Description]) -> None:
    card = model_card(trained("mdm"), "name")
    assert "| steps | 25 |" in card and "| tokens seen | 1,280 |" in card
    assert "| unique tokens | 500: 2.56 epochs |" in card
    assert "| learning rate | lr 0.004 |" in card and "| precision | bf16 yes |" in card
    assert "| objective | loss-weighting uniform |" in card
    assert "Validation: 3.1250 +/- 0.2500 (standard error) nats a token; negative ELBO, an upper bound" in card
    # Step 30 came after these weights.
    assert "Training, as last logged (step 20): 3.2500 nats a token." in card


def test_settings_of_the_other_objective_are_left_out(trained: Callable[..., Description]) -> None:
    card = model_card(trained("ar"), "name")
    assert "loss-weighting" not in card and "ELBO" not in card
    assert "nats a token; negative log-likelihood." in card


def test_a_run_without_its_log_has_no_more_than_the_checkpoint_says(
    trained: Callable[..., Description], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    card = model_card(trained("ar"), "name")
    assert "unique tokens" not in card and "as last logged" not in card and "Validation: 3.1250" in card
