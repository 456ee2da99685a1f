"""``python -m megatron.budget``: figures against published numbers and hand counts, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from megatron.budget import read_model_table
from megatron.budget_cli import main


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Any:
    """``figures("--model 7M ...")``: what ``run --json`` prints."""

    def run(arguments: str) -> dict[str, Any]:
        assert main(["run", "--json", *arguments.split()]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", "--flops-factor", "10", "--model", "117M"]) == 0
    assert capsys.readouterr().out.split() == [
        "MODEL_PARAM_CNT=123587328",
        "TOKENS=13485740760",
        "TRAIN_SAMPLES=6584834",
        "WARMUP_SAMPLES=65848",
    ]
    assert main(["samples", "--data", "DATA_100M", "--epochs", "500"]) == 0
    assert "TRAIN_SAMPLES=24402441\nWARMUP_SAMPLES=244024\n" in capsys.readouterr().out


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 55
    assert ["425M", "416.9"] in [line.split()[:2] for line in lines]


def test_a_run_of_the_paper_by_its_budget(figures: Any) -> None:
    """MDM's optimum at 1e19 FLOPs; model FLOPs, days and bytes by hand."""
    found = figures("--model 117M --flops-factor 10 --data 13B5_10ep --gpus 8 --mfu 0.5 --peak-tflops 1000")
    assert (found["parameters"], found["tokens"]) == (123_587_328, 13_485_740_760)
    assert (found["train_samples"], found["warmup_samples"], found["steps"]) == (6_584_834, 65_848, 25_722)
    assert found["epochs"] == pytest.approx(10.0, abs=0.02)
    assert found["flops"] == 6 * 123_587_328 * 6_584_834 * 2048
    weights = 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 50_257 * 768
    assert found["model_flops"] == (6 * weights + 12 * 12 * 768 * 2048) * 6_584_834 * 2048
    assert found["days"] == pytest.approx(26_100 / 8 / 86_400, rel=1e-4)
    norms = (2 * 12 + 1) * 768
    assert found["trained_parameters"] == weights + 47 * 768 + norms  # the vocabulary padded to 50,304
    assert found["checkpoint_bytes"] == 14 * found["trained_parameters"]
    assert found["disk_bytes"] == (2 + 1 + 1) * found["checkpoint_bytes"]  # newest, best, the one being written


def test_a_run_of_the_paper_by_its_epochs(figures: Any) -> None:
    found = figures("--model 425M --data 100M --epochs 500")
    assert (found["tokens"], found["train_samples"], found["warmup_samples"]) == (49_976_199_500, 24_402_441, 244_024)
    assert (found["epochs"], found["unique_tokens"]) == (500, 99_952_399)
    assert found["flops"] == pytest.approx(1.25e20, rel=0.01)  # the paper says 1.24e20
    causal = figures("--model 425M --data 100M --epochs 500 --objective ar")
    attention = 12 * 18 * 1280 * 2048 * 24_402_441 * 2048
    assert found["model_flops"] - causal["model_flops"] == attention // 2


def test_a_shape_is_the_row_it_repeats(figures: Any) -> None:
    """Also where heads are narrower than the model, and the formula is not its size."""
    for name in ("20M", "425M"):
        row = read_model_table()[name]
        shape = f"--num-layers {row.layers} --hidden-size {row.d_model}"
        if name == "20M":
            shape += f" --num-attention-heads {row.heads} --kv-channels {row.head_size}"
        own, same = figures(f"{shape} --flops-factor 1"), figures(f"--model {name} --flops-factor 1")
        assert {**own, "model": ""} == {**same, "model": ""}
    wide = figures("--num-layers 2 --hidden-size 10 --ffn-hidden-size 7")
    assert wide["parameters"] == 4 * 2 * 100 + 3 * 2 * 10 * 7 + 6 * 2 * 10 + 50_257 * 10


def test_a_size_alone(figures: Any) -> None:
    """Without a shape attention is not known: time is that of 6 N D, the checkpoint that of all the parameters."""
    found = figures("--parameters 1000000000 --flops-factor 10 --peak-tflops 1000 --mfu 0.5")
    assert found["tokens"] == int(1e19 / 6e9)
    assert found["model_flops"] is found["trained_parameters"] is None
    assert found["days"] == pytest.approx(20_000 / 86_400, rel=1e-5)
    assert found["checkpoint_bytes"] == 14 * 10**9
    assert "tokens" not in figures("--parameters 5")


def test_the_readable_table() -> None:
    """Through ``python -m``: every figure on a line of its own."""
    command = "run --model 425M --flops-factor 10 --data 100M --gpus 8"
    done = subprocess.run(
        [sys.executable, "-m", "megatron.budget", *command.split()], capture_output=True, text=True, check=True
    )
    lines = {line[:12].strip(): line[13:] for line in done.stdout.splitlines()}
    assert lines["parameters"] == "416,887,040 by the published formula; 416,856,320 are trained"
    assert lines["epochs"] == "40 over 99,952,399 unique tokens"
    assert lines["samples"] == "1,952,093 of 2,048 tokens"
    assert lines["steps"] == "7,625 of 256 samples"
    assert lines["FLOPs"] == "1.000e+19 = 6 N D"
    assert lines["time"].startswith("0.0448 days on 8 GPUs, FLOPs with attention at 40% MFU of 989 TFLOP/s")
    assert lines["checkpoint"].startswith("5.84 GB") and lines["disk"].startswith("23.3 GB for 3 checkpoints")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("samples --flops-factor 10 --model 118M", "--model 118M"),
        ("samples --flops-factor 10", "--flops-factor needs --model"),
        ("samples --flops-factor 10 --model 117M --epochs 2", "--epochs"),
        ("samples --data 100M", "--epochs"),
        ("samples --data 1e8 --epochs 2", "--data 1e8"),
        ("samples --data 100M --epochs 0", "--epochs 0"),
        ("samples --data 100M --epochs 1 --seq-length 0", "--seq-length 0"),
        ("", "--table"),
        ("--table samples", "--table"),
        ("run --model 418M --flops-factor 1", "--model 418M"),
        ("run --flops-factor 1", "--model, --parameters, or --num-layers"),
        ("run --model 7M --parameters 3", "one of --model, --parameters"),
        ("run --num-layers 3", "--hidden-size"),
        ("run --num-layers 3 --hidden-size 0", "--hidden-size 0"),
        ("run --num-layers 3 --hidden-size 9 --num-attention-heads 2", "--hidden-size 9"),
        ("run --parameters 0", "--parameters 0"),
        ("run --model 7M --flops-factor 1 --epochs 2", "--flops-factor and --epochs"),
        ("run --model 7M --flops-factor -1", "--flops-factor"),
        ("run --model 7M --data 100M", "--epochs"),
        ("run --model 7M --data 100M --epochs 0", "--epochs 0"),
        ("run --model 7M --data 1000 --epochs 1", "--global-batch-size"),
        ("run --model 7M --gpus 0", "--gpus 0"),
        ("run --model 7M --mfu 40", "--mfu 40"),
        ("run --model 7M --peak-tflops 0", "--peak-tflops 0"),
        ("run --model 7M --gpus many", "--gpus"),
        ("run --modl 7M", "--modl"),
    ],
)
def test_refusals_are_one_line(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
