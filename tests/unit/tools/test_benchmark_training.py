"""``benchmark.py train``: the command line it measures, its figures that do not depend on the clock, and its table."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tools import benchmark, benchmark_training


def figures_of(tmp_path: Path, command: str, *argv: str) -> dict[str, Any]:
    """Run the command and return what it wrote as JSON."""
    file = tmp_path / "figures.jsonl"
    assert benchmark.main([command, "--json", str(file), *argv]) == 0
    return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])


def _flag(command: Sequence[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_the_measured_run_is_the_row(tmp_path: Path) -> None:
    arguments = benchmark.build_parser().parse_args(
        "train --model 20M --objective ar --global-batch-size 12 --steps 5 --precision fp32 --no-compile "
        "--profile-steps 2 --extra --seed 7".split()
    )
    command = benchmark_training.train_command(arguments, tmp_path)
    assert command[1].endswith("/pretrain_gpt.py")
    shape = {"--num-layers": "5", "--hidden-size": "288", "--num-attention-heads": "7", "--kv-channels": "32"}
    assert {flag: _flag(command, flag) for flag in shape} == shape
    assert _flag(command, "--train-samples") == "84"  # five steps and two profiled ones
    assert (_flag(command, "--profile-step-start"), _flag(command, "--profile-step-end")) == ("6", "8")
    assert command[-2:] == ["--seed", "7"] and "--no-compile" in command and "--bf16" not in command
    arguments.objective, arguments.precision = "mdm", "bf16"
    command = benchmark_training.train_command(arguments, tmp_path)
    assert command[1].endswith("/pretrain_diff_gpt.py") and "--bf16" in command


def test_train_reports_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FLOPs by hand: 6 a weight of the 7M row's matrices, and the whole attention of 64 tokens, for a diffusion model;
    no device peak on a CPU, so no MFU. Weights near zero give ln V a token, and exact masks weigh them to just that.
    """
    figures = figures_of(tmp_path, *(
        "train --model 7M --objective mdm --micro-batch-size 2 --global-batch-size 4 --seq-length 64 --steps 4 "
        "--warmup 1 --num-workers 0 --precision fp32 --no-compile --compare bare "
        "--extra --mask-sampler exact --init-method-std 1e-6"
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
    # Every instant is under one heading; nothing runs beside this one process.
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert figures["shares"]["head and loss"] > 0 and figures["shares"]["optimizer"] > 0
    bare = figures["compare"]["bare"]
    assert bare["ratio"] == pytest.approx(figures["tokens_per_second"] / bare["tokens_per_second"])
    assert bare["tflops"] * 1e12 == pytest.approx(bare["tokens_per_second"] * flops, rel=1e-6)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed[2:4]] == ["this program", "bare"]
    assert printed[4].startswith("share of a step: data wait ")


@pytest.mark.parametrize(("flags", "named"), [
    ("--compare bare --precision fp16", "--precision bf16"),
    ("--compare transformers", "--objective ar"),
    ("--objective ar --compare bare transformers --dropout 0.1", "--dropout 0"),
    ("--model 8M", "--model 8M"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["train", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and named in error and error.count("\n") == 1


def test_a_comparison_that_fails_costs_only_its_row(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        model="7M", objective="ar", micro_batch_size=1, global_batch_size=1, seq_length=8, dropout=0.0,
        precision="fp32", steps=1, warmup=0, compile=None,
    )  # fmt: skip
    failed = benchmark_training._reference("bare", arguments, tmp_path)  # there is no data.bin
    assert set(failed) == {"error"} and "data.bin" in failed["error"]
    figures = {
        "model": "7M", "objective": "ar", "precision": "fp32", "micro_batch_size": 1, "global_batch_size": 1,
        "seq_length": 8, "dropout": 0.0, "steps_measured": 1, "tokens_per_second": 1234.5, "mfu": 0.5, "tflops": 12.34,
        "memory_gb": 1.25, "seconds_to_first_step": 3.0, "shares": None, "compare": {"bare": failed},
    }  # fmt: skip
    lines = list(benchmark_training.table(figures))
    assert lines[2].split() == ["this", "program", "1,234", "0.500", "12.3", "1.250", "3.000"]
    assert lines[3].startswith("bare             failed: ")
    assert len(lines) == 4
