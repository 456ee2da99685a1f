"""A compiled run compiles in its first steps and never again."""

from __future__ import annotations

import pytest
from training_faults import no_compilation_after
from training_runs import Corpus, Launcher

SHAPES = {
    "plain": "",
    "dropout": "--attention-dropout 0.1 --hidden-dropout 0.1",
    "recomputed": "--checkpoint-activations",
}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "shape"), [("mdm", "plain"), ("ar", "dropout"), ("mdm", "recomputed")])
def test_nothing_compiles_after_the_first_step(launch: Launcher, corpus: Corpus, objective: str, shape: str) -> None:
    """Heads of many sizes, dropout, recomputation: the compiled code of step 1 serves them all."""
    flags = corpus.flags("--train-iters 12 --compile --global-batch-size 16 --micro-batch-size 2", SHAPES[shape])
    result = launch(objective, flags, fault=(no_compilation_after, (1,)))
    assert result.code == 0, result.stderr
    assert "iteration       12/" in result.stdout
