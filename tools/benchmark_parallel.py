"""Several devices of one host: parity, scaling and what happens when something fails.

Called by ``tools/benchmark.py parallel``, for any number of GPUs (and, small, for processes on a CPU). Each figure is
printed, and appended to ``--json``, as soon as it is known, so that a run that is cut short has not run for nothing.
Variables such as NCCL_NVLS_ENABLE stay as the environment sets them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from megatron.errors import UserError
from tools.benchmark_failures import check_failures, failure_line
from tools.benchmark_modes import Machine, Mode, available_modes, machine_at_hand
from tools.benchmark_parity import add_shape_arguments, measure_parity, parity_line
from tools.benchmark_scaling import SCALING_HEADER, add_scaling_arguments, measure_scaling, scaling_line

PARTS: Final = ("parity", "failures", "scaling")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py parallel``."""
    parser.add_argument("--processes", type=int, help="GPUs to use; on a CPU, processes [all GPUs]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[parity failures scaling]")
    parser.add_argument("--modes", nargs="+", help="ways to divide, of dp, zero2, zero3, offload, zero3-offload, tpN, "
                        "tpN-sequence, ppN, tp2-pp2 [for parity all but those between 2 and all GPUs, for scaling "
                        "without zero3-offload and plain tpN]")
    parser.add_argument("--objectives", nargs="+", choices=("ar", "mdm"), default=["ar", "mdm"], help="for parity")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"],
                        help="for parity")
    parser.add_argument("--jobs", type=int, default=3, help="parity runs at a time [3]; they share the devices")
    parser.add_argument("--run-timeout", type=float, default=300.0, help="seconds after which a run is given up [300]")
    parser.add_argument("--deadline", type=float, help="seconds after which no further run is started")
    add_shape_arguments(parser)
    add_scaling_arguments(parser)


def benchmark_parallel(arguments: argparse.Namespace) -> int:
    """Measure what ``--parts`` asks for; returns 1 where a run failed or was not run, a curve differed or a check did
    not hold.

    Raises:
        UserError: too few devices, or a mode that their number does not allow.
    """
    machine = machine_at_hand(arguments.processes, arguments.run_timeout, arguments.deadline)
    chosen = {part: _chosen(arguments.modes, machine, part) for part in PARTS}
    print(f"{machine.processes} x {torch.cuda.get_device_name() if machine.gpu else 'CPU process'}", flush=True)
    failed = False
    lines = {"parity": parity_line, "failures": failure_line, "scaling": scaling_line}

    def report(row: dict[str, Any]) -> None:
        nonlocal failed
        failed |= "error" in row or row.get("passed") is False
        print(lines[row["part"]](row), flush=True)
        if arguments.json:
            with open(arguments.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory() as name:
        for part in arguments.parts:
            directory = Path(name) / part
            directory.mkdir()
            print(f"\n{part}" + (f"\n{SCALING_HEADER}" if part == "scaling" else ""), flush=True)
            if part == "parity":
                measure_parity(arguments, machine, chosen[part], directory, report)
            elif part == "scaling":
                measure_scaling(arguments, machine, chosen[part], directory, report)
            else:
                check_failures(arguments, machine, directory, report)
    return int(failed)


def _chosen(names: Sequence[str] | None, machine: Machine, part: str) -> list[Mode]:
    """The modes by name, or those worth trying; UserError for a name that is none."""
    available = available_modes(machine.processes)
    if names is None:
        sizes = {2, machine.processes}
        names = ["dp", "zero2", "zero3", "offload", "zero3-offload"]
        names += [name for size in sorted(sizes) for name in (f"tp{size}", f"tp{size}-sequence", f"pp{size}")]
        names.append("tp2-pp2")
        if part == "scaling":
            names = [name for name in names if name != "zero3-offload" and not name.removeprefix("tp").isdecimal()]
        return [available[name] for name in names if name in available]
    for name in names:
        if name not in available:
            raise UserError(f"--modes {name}: with {machine.processes} processes there are {', '.join(available)}")
    return [available[name] for name in names]
