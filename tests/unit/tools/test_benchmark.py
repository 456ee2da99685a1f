"""The figures of the benchmarks that do not depend on the clock: counts, FLOPs, ratios, keys; and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from tools import benchmark

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
    tokens = benchmark.write_random_data(tmp_path / "data", 50, 30.0, seed=3)
    dataset = IndexedDataset(str(tmp_path / "data"))
    documents = [dataset.document(i) for i in range(len(dataset))]
    assert len(documents) == 50 and sum(map(len, documents)) == tokens
    assert {int(document[-1]) for document in documents} == {50_256}
    assert all((document[:-1] < 50_256).all() for document in documents)
    assert 50 * 20 < tokens < 50 * 40


def _flag(command: Sequence[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_the_measured_run_is_the_row(tmp_path: Path) -> None:
    arguments = benchmark.build_parser().parse_args(
        "train --model 20M --objective ar --global-batch-size 12 --steps 5 --precision fp32 --no-compile "
        "--extra --seed 7".split()
    )
    command = benchmark.train_command(arguments, tmp_path)
    assert command[1].endswith("/pretrain_gpt.py")
    shape = {"--num-layers": "5", "--hidden-size": "288", "--num-attention-heads": "7", "--kv-channels": "32"}
    assert {flag: _flag(command, flag) for flag in shape} == shape
    assert _flag(command, "--train-samples") == "60"
    assert command[-3:] == ["--no-compile", "--seed", "7"] and "--bf16" not in command
    arguments.objective, arguments.precision = "mdm", "bf16"
    command = benchmark.train_command(arguments, tmp_path)
    assert command[1].endswith("/pretrain_diff_gpt.py") and "--bf16" in command


def test_train_reports_the_run(measure: Measure) -> None:
    """FLOPs by hand: 6 a weight of the 7M row's matrices, and the whole attention of 64 tokens, for a diffusion model;
    no device peak on a CPU, so no MFU. Weights near zero give ln V a token, and exact masks weigh them to just that.
    """
    figures = measure(*(
        "train --model 7M --objective mdm --micro-batch-size 2 --global-batch-size 4 --seq-length 64 --steps 4 "
        "--warmup 1 --num-workers 0 --precision fp32 --no-compile --extra --mask-sampler exact --init-method-std 1e-6"
    ).split())  # fmt: skip
    assert {name: figures[name] for name in ("model", "objective", "dropout", "precision")} == {
        "model": "7M", "objective": "mdm", "dropout": 0.0, "precision": "fp32",
    }  # fmt: skip
    assert (figures["micro_batch_size"], figures["global_batch_size"], figures["steps_measured"]) == (2, 4, 3)
    weights = 3 * (4 * 128 * 128 + 3 * 128 * 320) + 50_257 * 128
    flops = 6 * weights + 12 * 3 * 128 * 64
    assert figures["tflops"] * 1e12 == pytest.approx(figures["tokens_per_second"] * flops, rel=1e-6)
    assert figures["mfu"] is None
    assert figures["memory_gb"] > 0 and figures["seconds_to_first_step"] > 0
    assert figures["first_loss"] == pytest.approx(math.log(50_257), rel=1e-4)


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


def test_an_unknown_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["train", "--model", "8M"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model 8M") and error.count("\n") == 1
