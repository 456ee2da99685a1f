"""The figures of the benchmarks that do not depend on the clock: counts, FLOPs, ratios, keys."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from tools import benchmark, benchmark_runs

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """``measure("data", ...)`` runs the command and returns what it wrote as JSON."""

    def run(command: str, *argv: str) -> dict[str, Any]:
        file = tmp_path / "figures.jsonl"
        assert benchmark.main([command, "--json", str(file), *argv]) == 0
        return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])

    return run


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's clock moves by two seconds a look; everybody else's is the true one."""
    ticks = itertools.count(step=2)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_random_data_hold_the_tokens_they_say(tmp_path: Path) -> None:
    tokens = benchmark_runs.write_random_data(tmp_path / "data", 50, 30.0, seed=3)
    dataset = IndexedDataset(str(tmp_path / "data"))
    documents = [dataset.document(i) for i in range(len(dataset))]
    assert len(documents) == 50 and sum(map(len, documents)) == tokens
    assert {int(document[-1]) for document in documents} == {50_256}
    assert all((document[:-1] < 50_256).all() for document in documents)
    assert 50 * 20 < tokens < 50 * 40


def test_data_counts_what_it_delivers(measure: Measure, ticking: None) -> None:
    figures = measure("data", "--documents", "300", "--epochs", "20", "--seq-length", "32", "--repeats", "3")
    assert (figures["documents"], figures["epochs"]) == (300, 20)
    # 100 micro-batches of 8 samples between two looks at the clock.
    assert figures["loader_tokens_per_second_a_worker"] == 100 * 8 * 32 / 2
    assert figures["sampler_start_seconds"] == 2
    assert figures["sampler_start_megabytes"] >= 0


def test_preprocess_compares_the_same_text(
    measure: Measure, ticking: None, tmp_path: Path, tokenizer_flags: list[str]
) -> None:
    texts = ["naïve café " * 40] * 25
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    figures = measure("preprocess", "--input", str(path), "--workers", "1", "--repeats", "1", *tokenizer_flags)
    megabytes = 25 * 40 * len("naïve café ".encode()) / 1e6
    assert figures["megabytes"] == pytest.approx(megabytes)
    assert figures["library_mb_per_second"] == figures["preprocess_mb_per_second"] == pytest.approx(megabytes / 2)
    assert figures["ratio"] == 1
