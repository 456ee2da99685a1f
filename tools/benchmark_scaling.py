"""Speed of every way to divide a run against one device times their number: ``tools/benchmark.py parallel``.

Weak scaling: each device has as much work a step as the one it is compared with, ``--accumulation`` micro-batches.
Speeds are medians of the steps between warm-up and the profiled last one, whose trace of rank 0 gives the shares. What
a pipeline's stage waits for another counts as communication: NCCL receives in a kernel.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.metrics import read_metrics
from tools.benchmark_modes import ALONE, Machine, Mode
from tools.benchmark_runs import medians, profile_flags, profiled, recipe_flags, table_row, write_inputs

Report = Callable[[dict[str, Any]], None]


def add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the measured runs."""
    parser.add_argument("--models", nargs="+", type=_model, default=[("425M", 16), ("2298M", 4)], metavar="ROW[:MICRO]",
                        help="rows of utils/model_params.sh with their micro-batch sizes [425M:16 2298M:4]")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches a step for each device [8]")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps in all, without the profiled one [6]")
    parser.add_argument("--warmup", type=int, default=3, help="steps left out of the medians [3]")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the measured runs [bf16]")
    parser.add_argument("--scaling-objective", choices=("ar", "mdm"), default="mdm")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--profile-dir", type=Path, help="keep traces of rank 0 here, a folder for each row and mode")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[],
                        help="further flags of all runs, to which their modes add; comes last")


def _model(text: str) -> tuple[str, int]:
    """``425M:16`` -> ("425M", 16); micro-batch 8 where none is given."""
    name, _, micro = text.partition(":")
    if micro and not (micro.isdecimal() and int(micro)):
        raise argparse.ArgumentTypeError(f"{text!r}: the micro-batch is a number of 1 or more")
    return name, int(micro or 8)


def measure_scaling(
    arguments: argparse.Namespace, machine: Machine, modes: Sequence[Mode], directory: Path, report: Report
) -> None:
    """Measure each model on one device and then in every mode, one run at a time."""
    for name, _ in arguments.models:
        table_row(name)
    for name, micro in arguments.models:
        home = directory / name
        home.mkdir()
        sequences = micro * arguments.accumulation * machine.processes * (arguments.steps + 1)
        write_inputs(home, sequences * arguments.seq_length)
        alone: float | None = None
        for mode in (ALONE, *modes):
            devices = 1 if mode is ALONE else machine.processes
            row = {"part": "scaling", "model": name, "objective": arguments.scaling_objective, "mode": mode.name,
                   "devices": devices, "micro_batch_size": micro}  # fmt: skip
            row |= _measure(arguments, machine, mode, home, name, micro)
            speed = row.get("tokens_per_second")
            alone = speed if mode is ALONE else alone
            row["efficiency"] = None if speed is None or alone is None else speed / (alone * devices)
            report(row)


def _measure(
    arguments: argparse.Namespace, machine: Machine, mode: Mode, home: Path, name: str, micro: int
) -> dict[str, Any]:
    """Figures of one run, or ``error``."""
    if machine.out_of_time:
        return {"error": "not run: --deadline"}
    directory = home / mode.name
    directory.mkdir()
    batch = micro * arguments.accumulation * (1 if mode is ALONE else machine.processes)
    flags = [
        *recipe_flags(table_row(name), home, arguments.seq_length, 0.0), *mode.arguments(directory),
        *f"--micro-batch-size {micro} --global-batch-size {batch} --train-iters {arguments.steps + 1}".split(),
        *f"--num-workers {arguments.num_workers} --metrics-file {directory / 'metrics.jsonl'}".split(),
        *profile_flags(directory, arguments.steps + 1, 1),
        *([] if arguments.precision == "fp32" else [f"--{arguments.precision}"]),
        *arguments.extra,
    ]  # fmt: skip
    try:
        with _device_memory(machine) as peaks:
            run = machine.run(arguments.scaling_objective, flags, directory / "log", alone=mode is ALONE)
    except UserError as error:
        return {"error": str(error)}
    if run.code != 0:
        return {"error": f"exit code {run.code}: {run.last_words}"}
    steps = read_metrics(directory / "metrics.jsonl", "train")
    profile = profiled(directory / "metrics.jsonl") or {"shares": {}, "collectives": None}
    if arguments.profile_dir is not None:
        shutil.copytree(directory / "profile", arguments.profile_dir / f"{name}-{mode.name}", dirs_exist_ok=True)
    return {
        **medians(steps[arguments.warmup : arguments.steps] or steps[:1]),
        "device_memory_gb": sorted(peaks.values(), reverse=True)[: 1 if mode is ALONE else machine.processes],
        "seconds_to_first_step": steps[0]["time"] - run.began,
        "shares": profile["shares"],
        "communication": profile["shares"].get("communication"),
        "collectives": profile["collectives"],
    }


@contextmanager
def _device_memory(machine: Machine) -> Iterator[dict[str, float]]:
    """Peaks of what every GPU has in use, all of it, in 1e9 bytes: looked up twice a second while the block runs."""
    peaks: dict[str, float] = {}
    if not machine.gpu:
        yield peaks
        return
    done = threading.Event()

    def look() -> None:
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        while not done.wait(0.5):
            try:
                output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return  # the figures do without
            for line in output.splitlines():
                index, _, used = line.partition(", ")
                if used.strip().isdecimal():
                    peaks[index] = max(peaks.get(index, 0.0), int(used) * 2**20 / 1e9)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def scaling_line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    name = f"{row['model']:>6} {row['objective'].upper():3} {row['mode']:14}"
    if "error" in row:
        return f"{name} {row['error']}"
    numbers = [
        f"{row['tokens_per_second']:12,.0f}", _share(row["efficiency"]), _share(row["mfu"]),
        f"{row['memory_gb']:9.1f}", f"{max(row['device_memory_gb']):9.1f}" if row["device_memory_gb"] else f"{'':9}",
        _share(row["communication"]), _share(row["collectives"]),
    ]  # fmt: skip
    return " ".join([name, *numbers])


SCALING_HEADER = (
    f"{'model':>6} {'':3} {'mode':14} {'tokens/s':>12} {'efficiency':>10} {'MFU':>10} {'rank 0 GB':>9} "
    f"{'GPU GB':>9} {'comm.':>10} {'overlapped':>10}"
)


def _share(value: float | None) -> str:
    return f"{'':10}" if value is None else f"{value:10.3f}"
