"""Training speed of one row of the model table, where the time goes, and the same row without this program.

Called by ``tools/benchmark.py train``. The measured run is the real entry point, DeepSpeed, loader and noise included;
``--compare`` measures a plain loop (``benchmark_reference``) on the same machine in the same call. Steps after the
measured ones are profiled; the profiler slows them, so their speed does not count. MFU is against the GPU's bf16 peak,
also with ``--extra --fp8``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.metrics import read_metrics
from tools.benchmark_runs import (
    ENTRY_POINTS,
    ROOT,
    batch_flags,
    medians,
    profile_flags,
    profiled,
    python,
    recipe_flags,
    run_to_end,
    table_row,
    write_inputs,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py train``."""
    parser.add_argument("--model", default="425M", help="row of utils/model_params.sh [425M]")
    parser.add_argument("--objective", choices=("ar", "mdm"), default="mdm")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--global-batch-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps in all, without those profiled")
    parser.add_argument("--warmup", type=int, default=3, help="steps left out of the medians")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--profile-steps", type=int, default=1, help="steps profiled after the others, 0 for none [1]")
    parser.add_argument("--profile-dir", type=Path, help="keep the profile's trace here")
    parser.add_argument("--compare", nargs="+", choices=("bare", "transformers"), default=[],
                        help="also measure a plain PyTorch loop, or one around transformers' Llama (--objective ar)")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further flags of the entry point, last")


def train_command(arguments: argparse.Namespace, directory: Path) -> list[str]:
    """The command line of the measured run: the published recipe on one row of the model table."""
    steps = arguments.steps + arguments.profile_steps
    flags = recipe_flags(table_row(arguments.model), directory, arguments.seq_length, arguments.dropout)
    flags += batch_flags(arguments, steps)
    flags += ["--zero-stage", str(arguments.zero_stage), "--metrics-file", str(directory / "metrics.jsonl")]
    flags += [] if arguments.precision == "fp32" else [f"--{arguments.precision}"]
    flags += [] if arguments.compile is None else ["--compile" if arguments.compile else "--no-compile"]
    if arguments.profile_steps:
        flags += profile_flags(directory, arguments.steps + 1, arguments.profile_steps)
    return python(str(ROOT / ENTRY_POINTS[arguments.objective]), *flags, *arguments.extra)


def benchmark_train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the entry point, then what it is compared with, and summarise their metrics.

    Raises:
        UserError: no such row, a comparison that does not exist, or the run failed.
    """
    table_row(arguments.model)
    _check_comparisons(arguments)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokens = arguments.global_batch_size * (arguments.steps + arguments.profile_steps) * arguments.seq_length
        write_inputs(directory, tokens)
        run = run_to_end(train_command(arguments, directory), directory / "log")
        if run.code != 0:
            raise UserError(f"the run failed with exit code {run.code}: {run.last_words}")
        steps = read_metrics(directory / "metrics.jsonl", "train")
        profile = profiled(directory / "metrics.jsonl")
        if profile is not None and arguments.profile_dir is not None:
            shutil.copytree(directory / "profile", arguments.profile_dir, dirs_exist_ok=True)
        compared = {kind: _reference(kind, arguments, directory) for kind in arguments.compare}
    measured = steps[arguments.warmup : arguments.steps] or steps[arguments.steps - 1 : arguments.steps]
    names = ("model", "objective", "dropout", "micro_batch_size", "global_batch_size", "seq_length", "precision")
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    figures |= medians(measured)
    figures |= {
        "seconds_to_first_step": steps[0]["time"] - run.began,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "steps_measured": len(measured),
        "shares": None if profile is None else profile["shares"],
        "compare": compared,
    }
    for other in compared.values():
        if "tokens_per_second" in other:
            other["ratio"] = figures["tokens_per_second"] / other["tokens_per_second"]
    return figures


def _check_comparisons(arguments: argparse.Namespace) -> None:
    """Raise UserError for comparisons that would not be of the same thing."""
    if arguments.compare and arguments.precision == "fp16":
        raise UserError("--compare does not scale losses: use --precision bf16 or fp32")
    if "transformers" in arguments.compare and arguments.objective != "ar":
        raise UserError("--compare transformers is a causal Llama: use --objective ar")
    if "transformers" in arguments.compare and arguments.dropout > 0:
        raise UserError("--compare transformers has no dropout on its residual branches: use --dropout 0")


def _reference(kind: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Figures of a plain loop over the same tokens, in a process of its own; ``error`` instead where it failed."""
    output = directory / f"{kind}.json"
    command = python(
        str(ROOT / "tools" / "benchmark_reference.py"), kind, "--data", str(directory / "data.bin"), "--output",
        str(output),
    )  # fmt: skip
    for name in ("model", "objective", "micro_batch_size", "global_batch_size", "seq_length", "dropout", "precision",
                 "steps", "warmup"):  # fmt: skip
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += [] if arguments.compile is None else ["--compile" if arguments.compile else "--no-compile"]
    run = run_to_end(command, directory / f"{kind}.log")
    if run.code != 0:
        return {"error": run.last_words}
    figures: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    figures["seconds_to_first_step"] = figures.pop("first_step_at") - run.began
    return figures


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures as lines to print."""
    yield (
        f"{figures['model']} {figures['objective'].upper()}, {figures['precision']}, micro-batch "
        f"{figures['micro_batch_size']}, global batch {figures['global_batch_size']}, sequence "
        f"{figures['seq_length']}, dropout {figures['dropout']:g}; medians of {figures['steps_measured']} steps"
    )
    columns = {"tokens_per_second": "tokens/s", "mfu": "MFU", "tflops": "TFLOP/s", "memory_gb": "memory GB",
               "seconds_to_first_step": "first step s", "ratio": "ours / this"}  # fmt: skip
    yield " ".join([f"{'':16}", *(f"{title:>12}" for title in columns.values())])
    for name, row in {"this program": figures, **figures["compare"]}.items():
        if "error" in row:
            yield f"{name:16} failed: {row['error']}"
            continue
        yield " ".join([f"{name:16}", *(f"{_number(key, row.get(key)):>12}" for key in columns)]).rstrip()
    if figures["shares"]:
        yield "share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in figures["shares"].items())


def _number(key: str, value: float | None) -> str:
    if value is None:
        return ""
    decimals = {"tokens_per_second": 0, "mfu": 3, "ratio": 3}.get(key, 1 if value >= 10 else 3)
    return f"{value:,.{decimals}f}"
