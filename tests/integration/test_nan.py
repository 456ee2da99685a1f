"""A loss that is not finite: nothing learns from it, it is counted and named, and many in a row end the run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training_faults import hold_writes, poison
from training_runs import Corpus, Fault, Launcher, curve, events, tensors

pytestmark = pytest.mark.slow

STEPS = 8
BATCH = 8  # RECIPE's global batch: step k reads samples 8 (k - 1) .. 8 k - 1, in micro-batches of 4
EVERY_STEP = f"--train-iters {STEPS} --save-interval 1 --keep-last 0 --eval-interval 100 --lr-warmup-samples 8"


def samples_of(*steps: int) -> list[int]:
    """One sample of each step, in its second micro-batch."""
    return [BATCH * (step - 1) + 5 for step in steps]


def state(save: Path, iteration: int) -> dict[str, Any]:
    """Parameters and optimizer state of a checkpoint, without DeepSpeed's counters, by file and name."""
    found = tensors(save / f"global_step{iteration}", "*states.pt")
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_not_finite_were_skipped(save: Path, stdout: str, bad: list[int], micro_batches: list[list[int]]) -> None:
    """Steps ``bad`` changed nothing, all others did; they are counted, and the log names their micro-batches."""
    states = {i: state(save, i) for i in range(1, STEPS + 1)}
    for i in range(2, STEPS + 1):
        assert same(states[i], states[i - 1]) == (i in bad), f"step {i}"
    for event in events(save, "train"):
        is_bad = event["iteration"] in bad
        assert (event["loss"] is None) == is_bad
        assert event["nan_steps"] == event["skipped_steps"] == int(is_bad)
    for step, ids in zip(bad, micro_batches, strict=True):
        assert re.search(rf"iteration {step} is not finite and was not applied: loss (nan|inf) on samples "
                         rf"{re.escape(str(ids))}", stdout), stdout  # fmt: skip
    named = [event["samples"] for event in events(save, "meta") if event["event"] == "not_finite"]
    assert named == [[ids] for ids in micro_batches]
    extra = json.loads((save / f"global_step{STEPS}" / "run.json").read_text())["extra"]
    assert extra["nan_steps"] == len(bad)


@pytest.mark.parametrize(
    ("objective", "precision", "value"),
    [("ar", "", math.nan), ("mdm", "", math.inf), ("ar", "--bf16", math.nan), ("mdm", "--bf16", math.inf)],
)
def test_a_bad_step_changes_nothing_and_training_goes_on(
    objective: str, precision: str, value: float, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    bad = [3, 4, 6, 7]  # never three in a row
    fault = (poison, (samples_of(*bad), value))
    finished = launch(objective, corpus.flags(EVERY_STEP, precision, f"--save {tmp_path}"), fault=fault)
    assert finished.code == 0, finished
    second_halves = [list(range(BATCH * step - 4, BATCH * step)) for step in bad]
    assert_not_finite_were_skipped(tmp_path, finished.stdout, bad, second_halves)
    losses = [loss for loss, _, _ in curve(tmp_path).values() if loss is not None]
    assert losses[-1] < losses[0]


def test_one_of_two_ranks_has_the_bad_sample(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    argv = corpus.flags(EVERY_STEP, f"--save {tmp_path}")
    fault: Fault = (poison, (samples_of(3, 5), math.nan))  # rank 1 reads samples 4 .. 7 of each step
    finished = launch.ranks("mdm", [argv] * 2, [fault] * 2)
    assert [process.code for process in finished] == [0, 0], finished
    assert_not_finite_were_skipped(tmp_path, finished[0].stdout, [3, 5], [[20, 21, 22, 23], [36, 37, 38, 39]])


@pytest.mark.parametrize(("objective", "ranks", "more"), [("ar", 1, ""), ("mdm", 2, ""), ("mdm", 2, "--async-save")])
def test_too_many_in_a_row_stop_the_run_and_cost_nothing(
    objective: str, ranks: int, more: str, corpus: Corpus, launch: Launcher, tmp_path: Path
) -> None:
    """With --async-save the last good checkpoint is still being written when the run ends."""
    flags = f"--train-iters {STEPS} --save-interval 3 --max-nan-steps 2"
    straight, save = tmp_path / "straight", tmp_path / "save"
    argv = corpus.flags(flags, f"--save {straight}", dropout=0.1)
    assert [p.code for p in launch.ranks(objective, [argv] * ranks, [None] * ranks)] == [0] * ranks
    argv = corpus.flags(flags, f"--save {save} --load {save}", more, dropout=0.1)
    fault: Fault = (poison, (samples_of(4, 5, 6), math.nan))
    if more:
        fault = (hold_writes, (fault,))
    finished = launch.ranks(objective, [argv] * ranks, [fault] * ranks)
    assert [process.code for process in finished] == [1] * ranks, finished
    said = [line for line in finished[0].stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "2 steps in a row were not finite (--max-nan-steps)" in said[0]
    assert "iteration 5" in said[0] and str(save) in said[0]
    assert not any("Traceback" in process.stderr for process in finished)
    assert {path.name for path in save.glob("global_step*")} == {"global_step3"}
    assert (save / "latest").read_text() == "global_step3"
    # The samples turn out to be fine: the run goes on from the checkpoint as if nothing had happened.
    assert [p.code for p in launch.ranks(objective, [argv] * ranks, [None] * ranks)] == [0] * ranks
    assert curve(save) == curve(straight) and len(curve(save)) == STEPS
    assert same(state(save, STEPS), state(straight, STEPS))


def test_a_learning_rate_that_is_far_too_high(corpus: Corpus, launch: Launcher, tmp_path: Path) -> None:
    argv = corpus.flags(
        f"--train-iters {STEPS} --lr 1e30 --lr-warmup-samples 8 --save-interval 1 --eval-interval 1 --save {tmp_path}"
    )
    finished = launch("ar", argv)
    assert finished.code == 1 and finished.stderr.startswith("error: 3 steps in a row were not finite"), finished
    assert finished.stderr.count("\n") == 1
    # Whatever the ruined weights measure, the best is the lowest number, and the checkpoints are whole.
    losses = {e["iteration"]: e["loss"] for e in events(tmp_path, "valid") if e["loss"] is not None}
    assert json.loads((tmp_path / "best.json").read_text())["loss"] == min(losses.values())
    assert launch("ar", [*argv, "--load", str(tmp_path), "--skip-train"]).code == 0
