"""The statistics of a validation: mean, standard error, number of windows."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from megatron.errors import UserError
from megatron.evaluation import Validator, number_of_windows, ratio_with_error


def test_equal_counts_give_the_mean_and_its_standard_error():
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.5, size=200)
    mean, error = ratio_with_error(losses * 64, np.full(200, 64.0))
    assert mean == pytest.approx(losses.mean())
    assert error == pytest.approx(losses.std(ddof=1) / math.sqrt(200))


def test_unequal_counts_give_nats_per_counted_token():
    rng = np.random.default_rng(1)
    # Simulation as the second source: the spread of the ratio over many replications is its standard error.
    replications = []
    errors = []
    for _ in range(3000):
        counts = rng.integers(20, 64, size=50).astype(float)
        sums = counts * 2.0 + rng.normal(0, 8.0, size=50)
        ratio, error = ratio_with_error(sums, counts)
        replications.append(ratio)
        errors.append(error)
    assert np.mean(replications) == pytest.approx(2.0, abs=0.002)
    assert np.mean(errors) == pytest.approx(np.std(replications), rel=0.05)


def test_one_window_has_no_error():
    assert math.isnan(ratio_with_error(np.array([3.0]), np.array([1.0]))[1])


def config(eval_windows=None, eval_iters=10, global_batch_size=8):
    return SimpleNamespace(
        evaluation=SimpleNamespace(eval_windows=eval_windows, eval_iters=eval_iters),
        batch=SimpleNamespace(global_batch_size=global_batch_size, micro_batch_size=2, seq_length=16),
    )


def test_windows_are_fixed_and_never_exhausted():
    assert number_of_windows(config(), 1000) == 80
    assert number_of_windows(config(), 33) == 33  # PITFALLS 10: fewer windows than asked are all used, every time
    assert number_of_windows(config("all"), 1000) == 1000
    assert number_of_windows(config("25"), 1000) == 25
    with pytest.raises(UserError, match="no window of --seq-length 16"):
        number_of_windows(config(), 0)


def test_windows_are_known_by_their_number_and_tokens() -> None:
    def fingerprint(tokens: np.ndarray, windows: int) -> str:
        validator = Validator.__new__(Validator)
        validator.windows, validator.dataset = windows, tokens
        return validator.fingerprint()

    tokens = np.arange(60, dtype=np.int64).reshape(10, 6)
    changed = tokens.copy()
    changed[4, 5] = 0
    same = fingerprint(tokens, 5)
    assert same == fingerprint(tokens.copy(), 5) and len(same) == 16
    assert len({same, fingerprint(tokens, 4), fingerprint(changed, 5), fingerprint(tokens[1:], 5)}) == 4
