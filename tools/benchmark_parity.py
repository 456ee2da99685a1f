"""Every way to divide a run has the curve of one process: ``tools/benchmark.py parallel``, on GPUs over NCCL.

Small models, the real entry points under torchrun, dropout off, compiled or not. What differs is the order of sums:
in fp32 by rounding, in bf16 in the third or fourth digit.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

from megatron.budget import ModelRow
from megatron.errors import UserError
from megatron.metrics import read_metrics
from tools.benchmark_modes import ALONE, Machine, Mode
from tools.benchmark_runs import recipe_flags, write_inputs

TOLERANCES: Final = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 5e-2)}
"""Relative, of loss and gradient norm."""
DISTINCT: Final = 500
"""Tokens in the data, of 50,257: which they are is learned in a few steps, so that the curve is one."""

Report = Callable[[dict[str, Any]], None]
Curve = dict[int, tuple[float, float]]
"""iteration -> (loss, gradient norm)."""


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the small model whose curves are compared."""
    parser.add_argument("--small-model", nargs=4, type=int, default=(8, 256, 8, 256),
                        metavar=("LAYERS", "HIDDEN", "HEADS", "LENGTH"), help="where curves are compared [8 256 8 256]")
    parser.add_argument("--small-batch", nargs=2, type=int, default=(2, 16), metavar=("MICRO", "GLOBAL"),
                        help="its micro-batch and global batch [2 16]")
    parser.add_argument("--curve-steps", type=int, default=20, help="steps that are compared [20]")
    parser.add_argument("--compile", action="store_true",
                        help="compile the parity runs, as training on GPUs does [they are not compiled]")


def small_flags(arguments: argparse.Namespace, directory: Path) -> list[str]:
    """The small model on the data in ``directory``, with a rate that learns, and ``--extra``; no length, no precision,
    no mode.

    The rate is reached in half of the compared steps: at once, the norm falls to a quarter between two steps, and
    rounding alone moves it by a tenth there (seen in bf16 between one process compiled and not; warmed up, 6e-4).
    """
    layers, hidden, heads, length = arguments.small_model
    micro, batch = arguments.small_batch
    warmup = arguments.curve_steps // 2 * batch
    row = ModelRow("small", d_model=hidden, table_ffn=0, head_size=hidden // heads, heads=heads, layers=layers)
    return [
        *recipe_flags(row, directory, length, 0.0),
        *f"--lr 2e-3 --min-lr 2e-4 --lr-warmup-samples {warmup} --micro-batch-size {micro}".split(),
        *f"--global-batch-size {batch} --num-workers 1".split(),
        *arguments.extra,
    ]


def small_inputs(arguments: argparse.Namespace, directory: Path) -> None:
    """Data of the small runs: as many tokens as the compared steps read."""
    length, batch = arguments.small_model[3], arguments.small_batch[1]
    write_inputs(directory, (arguments.curve_steps * batch + 1) * length, DISTINCT)


def read_curve(metrics: Path) -> Curve:
    """Loss and gradient norm of every step that a metrics file has."""
    return {event["iteration"]: (event["loss"], event["grad_norm"]) for event in read_metrics(metrics, "train")}


def largest_differences(found: Curve, expected: Curve, iterations: Sequence[int]) -> tuple[float, float]:
    """Largest relative difference of losses and of gradient norms over ``iterations``.

    Raises:
        UserError: a curve lacks one of them, or a number is missing there.
    """
    worst = [0.0, 0.0]
    for iteration in iterations:
        for column in (0, 1):
            pair = [curve.get(iteration, (None, None))[column] for curve in (found, expected)]
            if pair[0] is None or pair[1] is None:
                raise UserError(f"step {iteration} is missing, or was not finite")
            worst[column] = max(worst[column], abs(pair[0] - pair[1]) / abs(pair[1]))
    return worst[0], worst[1]


def measure_parity(
    arguments: argparse.Namespace, machine: Machine, modes: Sequence[Mode], directory: Path, report: Report
) -> None:
    """Run every mode for every objective and precision, ``--jobs`` runs at a time, and report each beside one process.
    """
    small_inputs(arguments, directory)
    kinds = list(itertools.product(arguments.objectives, arguments.precisions))

    def curve(kind: tuple[str, str], mode: Mode, slot: int) -> Curve | str:
        """The curve, or why there is none."""
        if machine.out_of_time:
            return "not run: --deadline"
        objective, precision = kind
        home = directory / "-".join((*kind, mode.name))
        home.mkdir()
        flags = [
            *small_flags(arguments, directory), *mode.arguments(home, divide_all=True),
            "--compile" if arguments.compile else "--no-compile",
            "--train-iters", str(arguments.curve_steps), "--metrics-file", str(home / "metrics.jsonl"),
            *([] if precision == "fp32" else [f"--{precision}"]),
        ]  # fmt: skip
        try:
            run = machine.run(objective, flags, home / "log", alone=mode is ALONE, slot=slot)
            return read_curve(home / "metrics.jsonl") if run.code == 0 else f"exit code {run.code}: {run.last_words}"
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        wanted = dict(zip(kinds, pool.map(curve, kinds, itertools.repeat(ALONE), itertools.count())))
        runs = {pool.submit(curve, kind, mode, 0): (kind, mode) for kind in kinds for mode in modes}
        for finished in as_completed(runs):
            kind, mode = runs[finished]
            report(_row(kind, mode, finished.result(), wanted[kind], arguments.curve_steps))


def _row(kind: tuple[str, str], mode: Mode, found: Curve | str, expected: Curve | str, steps: int) -> dict[str, Any]:
    """One line of the table; ``error`` where there is no comparison."""
    row: dict[str, Any] = {"part": "parity", "objective": kind[0], "precision": kind[1], "mode": mode.name}
    if isinstance(expected, str):
        return row | {"error": f"one process: {expected}"}
    if isinstance(found, str):
        return row | {"error": found}
    try:
        loss, norm = largest_differences(found, expected, range(1, steps + 1))
    except UserError as error:
        return row | {"error": str(error)}
    limits = TOLERANCES[kind[1]]
    return row | {
        "first_loss": expected[1][0], "last_loss": expected[steps][0], "loss": loss, "grad_norm": norm,
        "passed": loss <= limits[0] and norm <= limits[1],
    }  # fmt: skip


def parity_line(row: Mapping[str, Any]) -> str:
    """A row of the table, in words that fit one line."""
    name = f"{row['objective'].upper():3} {row['precision']} {row['mode']:14}"
    if "error" in row:
        return f"{name} {row['error']}"
    return (
        f"{name} loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}, largest relative difference: loss "
        f"{row['loss']:.1e}, gradient norm {row['grad_norm']:.1e}  {'ok' if row['passed'] else 'TOO LARGE'}"
    )
