"""The loss of training in fp8 beside that of training in bf16: the same row, seed, data, order and noise.

Called by ``tools/benchmark.py fp8``. Both runs are the real entry point, one after the other on the same GPU. A step's
loss is noise, though the same noise in both runs, so means over windows of steps are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megatron.errors import UserError
from megatron.metrics import read_metrics
from tools.benchmark_runs import (
    ENTRY_POINTS,
    ROOT,
    batch_flags,
    medians,
    python,
    recipe_flags,
    run_to_end,
    table_row,
    write_tokenizer,
)

PRECISIONS: Final = {"bf16": ["--bf16"], "fp8": ["--bf16", "--fp8"]}
TOLERANCE = 0.005
"""Largest difference of a window's loss, relative, that counts as the same curve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py fp8``."""
    parser.add_argument("--data-path", type=Path, required=True, help="prefix of token files (ids of GPT-2)")
    parser.add_argument("--model", default="117M", help="row of utils/model_params.sh [117M]")
    parser.add_argument("--objectives", nargs="+", choices=tuple(ENTRY_POINTS), default=["mdm", "ar"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--window", type=int, default=50, help="steps whose losses are averaged [50]")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further flags of both runs, last")


def benchmark_fp8(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every objective in both precisions and compare their losses and speeds.

    Raises:
        UserError: no such row, steps that are no whole number of windows, or a run failed.
    """
    row = table_row(arguments.model)
    if arguments.steps < 1 or arguments.window < 1 or arguments.steps % arguments.window:
        raise UserError(f"--steps {arguments.steps} is no whole number of --window {arguments.window}: change one")
    names = ("model", "steps", "window", "micro_batch_size", "global_batch_size", "seq_length")
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in names} | {"objectives": {}}
    for objective in arguments.objectives:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            write_tokenizer(directory / "tokenizer.json")
            common = recipe_flags(row, directory, arguments.seq_length, 0.0) + batch_flags(arguments, arguments.steps)
            common += ["--train-data-path", str(arguments.data_path.resolve()), "--lr-warmup-fraction", "0.1"]
            runs = {
                precision: _run(objective, [*common, *flags, *arguments.extra], directory / precision)
                for precision, flags in PRECISIONS.items()
            }
        figures["objectives"][objective] = compare(runs, arguments.window)
    return figures


def _run(objective: str, flags: Sequence[str], stem: Path) -> list[dict[str, Any]]:
    """The training events of one run.

    Raises:
        UserError: it failed.
    """
    metrics = stem.with_suffix(".jsonl")
    command = python(str(ROOT / ENTRY_POINTS[objective]), *flags, "--metrics-file", str(metrics))
    run = run_to_end(command, stem.with_suffix(".log"))
    if run.code != 0:
        raise UserError(f"the {objective} run in {stem.name} failed with exit code {run.code}: {run.last_words}")
    return read_metrics(metrics, "train")


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]], window: int) -> dict[str, Any]:
    """Mean loss of each window of steps in both runs, their relative differences, and the speeds behind the first one.

    ``runs``: training events by precision, one a step.
    """
    losses = {
        name: [
            statistics.fmean(step["loss"] for step in steps[start : start + window])
            for start in range(0, len(steps), window)
        ]
        for name, steps in runs.items()
    }
    differences = [fp8 / bf16 - 1 for bf16, fp8 in zip(losses["bf16"], losses["fp8"], strict=True)]
    largest = max(differences, key=abs)
    return {
        "losses": losses,
        "differences": differences,
        "largest_difference": largest,
        "within": abs(largest) < TOLERANCE,
        "speed": {name: medians(steps[window:] or steps) for name, steps in runs.items()},
    }


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures as lines to print."""
    yield (
        f"{figures['model']}, {figures['steps']} steps of {figures['global_batch_size']} x {figures['seq_length']} "
        f"tokens, micro-batch {figures['micro_batch_size']}; mean loss of {figures['window']} steps"
    )
    for objective, found in figures["objectives"].items():
        yield f"{objective.upper():>12} {'bf16':>9} {'fp8':>9} {'fp8 / bf16 - 1':>15}"
        rows = zip(found["losses"]["bf16"], found["losses"]["fp8"], found["differences"], strict=True)
        for index, (bf16, fp8, difference) in enumerate(rows, start=1):
            yield f"{'to ' + str(index * figures['window']):>12} {bf16:9.4f} {fp8:9.4f} {difference:15.3%}"
        verdict = "within" if found["within"] else "NOT within"
        yield f"largest {found['largest_difference']:.3%}: {verdict} {TOLERANCE:.1%}"
        yield "; ".join(
            f"{name} {speed['tokens_per_second']:,.0f} tokens/s, {speed['memory_gb']:.1f} GB"
            for name, speed in found["speed"].items()
        )
