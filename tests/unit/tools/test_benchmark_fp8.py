"""``benchmark.py fp8``: windows and differences by hand, the runs it starts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import benchmark, benchmark_fp8
from tools.benchmark_runs import write_random_data

SMALL = (
    "--model 7M --objectives ar --steps 4 --window 2 --micro-batch-size 2 --global-batch-size 2 --seq-length 32 "
    "--num-workers 0"
)


def steps(losses: list[float], speed: float) -> list[dict[str, float]]:
    """Training events."""
    return [{"loss": loss, "tokens_per_second": speed, "tflops": 1.0, "mfu": 0.1, "memory": 2.0} for loss in losses]


def test_windows_are_compared() -> None:
    found = benchmark_fp8.compare(
        {"bf16": steps([4.0, 2.0, 2.0, 2.0], 10.0), "fp8": steps([4.5, 1.5, 2.0, 1.984], 12.0)}, 2
    )
    assert found["losses"] == {"bf16": [3.0, 2.0], "fp8": [3.0, 1.992]}
    assert found["differences"] == pytest.approx([0.0, -0.004])
    assert found["largest_difference"] == pytest.approx(-0.004) and found["within"]
    assert found["speed"]["fp8"]["tokens_per_second"] == 12.0
    found = benchmark_fp8.compare({"bf16": steps([2.0], 1.0), "fp8": steps([2.02], 1.0)}, 1)
    assert found["largest_difference"] == pytest.approx(0.01) and not found["within"]


def test_runs_are_alike_but_for_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU without fp8 "both" runs are in fp32, so their losses are the same to the last bit."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert benchmark_fp8.PRECISIONS["fp8"] == [*benchmark_fp8.PRECISIONS["bf16"], "--fp8"]
    monkeypatch.setattr(benchmark_fp8, "PRECISIONS", {"bf16": [], "fp8": []})
    write_random_data(tmp_path / "data", 16, 60)
    monkeypatch.chdir(tmp_path)
    command = ["fp8", "--data-path", "data", *SMALL.split(), "--json", "figures.jsonl", "--extra", "--no-compile"]
    assert benchmark.main(command) == 0
    found = json.loads((tmp_path / "figures.jsonl").read_text())["objectives"]["ar"]
    assert found["differences"] == [0.0, 0.0] and found["within"]
    assert found["losses"]["bf16"] == found["losses"]["fp8"]
    assert found["losses"]["fp8"][0] == pytest.approx(10.8, abs=0.3), "untrained: the logarithm of the vocabulary"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7M, 4 steps of 2 x 32 tokens") and "largest 0.000%: within 0.5%" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (SMALL, "in bf16 failed"),
        (SMALL.replace("7M", "8M"), "--model 8M: no such row"),
        (SMALL.replace("--window 2", "--window 3"), "--steps 4 is no whole number of --window 3"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert benchmark.main(["fp8", "--data-path", str(tmp_path / "nothing"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
