"""What must hold when ranks die, when a run is told to stop, and when it continues under another split.

Called by ``tools/benchmark.py parallel`` on real devices: NCCL dies otherwise than gloo does. Each check returns a row
with ``passed`` and a ``detail`` in words.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from megatron.checkpointing import CheckpointStore
from megatron.errors import UserError
from tools.benchmark_modes import Machine, Mode, torchrun
from tools.benchmark_parity import TOLERANCES, largest_differences, read_curve, small_flags, small_inputs
from tools.benchmark_runs import ENTRY_POINTS, ROOT, end_session, is_running

MINUTE: Final = 60.0
ENDLESS: Final = "--train-iters 100000 --no-compile --save-interval 5 --keep-last 1 --exit-signal-handler"
"""With the handler a rank that hangs in a collective outlives a launcher's SIGTERM: the harder case."""


def check_failures(
    arguments: argparse.Namespace, machine: Machine, directory: Path, report: Callable[[dict[str, Any]], None]
) -> None:
    """Run all checks, each in a directory of its own."""
    small_inputs(arguments, directory)
    checks: dict[str, Callable[[argparse.Namespace, Machine, Path, Path], dict[str, Any]]] = {
        "kill -9": killed_rank, "SIGTERM": told_to_stop, "DP to TP2": resplit,
    }  # fmt: skip
    for name, check in checks.items():
        row: dict[str, Any] = {"part": "failures", "check": name}
        if machine.out_of_time:
            report(row | {"error": "not run: --deadline"})
            continue
        home = directory / name.replace(" ", "-")
        home.mkdir()
        try:
            report(row | check(arguments, machine, directory, home))
        except UserError as error:
            report(row | {"passed": False, "detail": str(error)})


def killed_rank(arguments: argparse.Namespace, machine: Machine, inputs: Path, home: Path) -> dict[str, Any]:
    """SIGKILL the last rank between two saves: the run ends within a minute, non-zero, and goes on from its last save.
    """
    save = home / "save"
    flags = [*small_flags(arguments, inputs), *ENDLESS.split(), "--save", str(save), "--load", str(save)]
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            torchrun(machine.processes, [str(ROOT / ENTRY_POINTS["mdm"]), *flags]), stdout=log,
            stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, **machine.environment(machine.processes)},
        )  # fmt: skip
    ranks: dict[int, psutil.Process] = {}
    try:
        _wait_for_save([process], save, home / "log", machine.run_timeout)
        ranks = ranks_of(process.pid)
        if len(ranks) != machine.processes:
            raise UserError(f"found ranks {sorted(ranks)} under the launcher, not {machine.processes}")
        began = time.monotonic()
        ranks[machine.processes - 1].kill()
        code = _wait(process, MINUTE)
        seconds = time.monotonic() - began
        left = [rank for rank in ranks.values() if is_running(rank)]
    finally:
        end_session(process, *ranks.values())  # whose launcher may be gone
    tag = CheckpointStore(save).resolve()  # raises where the latest is not complete
    again = machine.run("mdm", [*flags, "--exit-interval", "5"], home / "again.log")
    return {
        "passed": code not in (None, 0) and not left and again.code == 0,
        "seconds": seconds,
        "detail": f"launcher ended with {code} after {seconds:.1f} s, {len(left)} ranks left, {tag} is complete, and "
        f"the run continued from it with exit code {again.code}" + (f": {again.last_words}" if again.code else ""),
    }


def told_to_stop(arguments: argparse.Namespace, machine: Machine, inputs: Path, home: Path) -> dict[str, Any]:
    """SIGTERM to every rank, as a job manager sends it: all save the step they are at, together, and exit with 0."""
    save = home / "save"
    flags = [*small_flags(arguments, inputs), *ENDLESS.split(), "--save", str(save)]
    ranks = machine.start_ranks("mdm", flags, home)
    try:
        _wait_for_save(ranks, save, home / "rank0.log", machine.run_timeout)
        began = time.monotonic()
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        codes = [_wait(rank, began + MINUTE - time.monotonic()) for rank in ranks]
        seconds = time.monotonic() - began
    finally:
        for rank in ranks:
            end_session(rank)
    tag, last = CheckpointStore(save).resolve(), max(read_curve(save / "metrics.jsonl"))
    return {
        "passed": set(codes) == {0} and tag == f"global_step{last}",
        "seconds": seconds,
        "detail": f"exit codes {codes} after {seconds:.1f} s; last step {last}, saved {tag}",
    }


def resplit(arguments: argparse.Namespace, machine: Machine, inputs: Path, home: Path) -> dict[str, Any]:
    """Half the steps data parallel, the other half on TP2 x DP N/2: the curve of a run that was never interrupted."""
    steps = arguments.curve_steps
    half = steps // 2
    common = [*small_flags(arguments, inputs), *f"--train-iters {steps} --no-compile".split()]
    saving = ["--save", str(home / "save"), "--load", str(home / "save")]
    dp = [*Mode("dp").arguments(home), "--tensor-model-parallel-size", "1"]  # whatever --extra says
    tp2 = ["--zero-stage", "1", "--tensor-model-parallel-size", "2"]
    runs = {
        "whole": [*common, *dp, "--metrics-file", str(home / "whole.jsonl")],
        "first half": [*common, *dp, *saving, "--exit-interval", str(half)],
        "second half": [*common, *tp2, *saving],
    }
    for name, flags in runs.items():
        run = machine.run("mdm", flags, home / f"{name}.log")
        if run.code != 0:
            raise UserError(f"{name}: exit code {run.code}: {run.last_words}")
    found, expected = read_curve(home / "save" / "metrics.jsonl"), read_curve(home / "whole.jsonl")
    loss, norm = largest_differences(found, expected, range(1, steps + 1))
    limits = TOLERANCES["fp32"]
    return {
        "passed": loss <= limits[0] and norm <= limits[1],
        "detail": f"{half} steps on DP {machine.processes}, then to {steps} on TP 2 x DP {machine.processes // 2}: "
        f"largest relative difference to a whole run in fp32: loss {loss:.1e}, gradient norm {norm:.1e}",
    }


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """rank -> process of the direct children of ``launcher`` that have a ``RANK``.

    A child that is being started has no environment yet: it is found once it runs.
    """
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error):
                if (rank := child.environ().get("RANK")) is not None:
                    found[int(rank)] = child
    return found


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, None where there is none in time."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def _wait_for_save(processes: list[subprocess.Popen[bytes]], save: Path, log: Path, timeout: float) -> None:
    """Wait for the first checkpoint and a second more; UserError where a process ends or ``timeout`` passes before."""
    end = time.monotonic() + timeout
    while not (save / "latest").exists():
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            words = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:])
            raise UserError(f"no checkpoint was written: {words}")
        time.sleep(0.1)
    time.sleep(1.0)


def failure_line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['check']:10} {row['error']}"
    return f"{row['check']:10} {'ok' if row['passed'] else 'FAILED'}: {row['detail']}"
