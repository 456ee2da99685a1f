"""Run a grid of experiments, one run each: finished runs are skipped, broken ones go on from their last checkpoint.

    python tools/sweep.py weight_decay --family arm --dry-run     what would run, and what it costs
    python tools/sweep.py weight_decay --family arm               one after another, on this machine
    python tools/sweep.py weight_decay --family arm --status      how far each is, from metrics.jsonl
    sbatch --array=0-23%4 examples_training/sweep.sh weight_decay --family arm

--set adds an axis to a grid or replaces one: --set SEED=1,2,3 --set MODEL_PARAM=57M. Its names are the scripts'
variables.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import budget
from megatron.errors import UserError
from megatron.files import read_text
from megatron.metrics import of_training, on_last_windows, read_metrics
from tools.sweep_grids import FAMILIES, SCRIPTS, Task, grids, tasks

STATUS_COLUMNS: Final = (
    "task", "run", "state", "step", "train loss", "best valid loss", "at epoch", "last valid loss", "tokens/s",
    "updated",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """A task and what its script says it would do.

    Attributes:
        name: the run's VARIANT; checkpoints: its directory.
        samples, tokens, steps: length; parameters: by the published formula; flops: 6 N D; model_flops: with
            attention, what the MFU of a run's log counts.
    """

    task: Task
    name: str
    checkpoints: Path
    samples: int
    tokens: int
    steps: int
    parameters: int
    model_flops: int

    @property
    def flops(self) -> int:
        """C = 6 N D."""
        return budget.training_flops(self.parameters, self.tokens)


@dataclass(frozen=True)
class State:
    """How far a run is: ``finished``, ``broken off`` (or running elsewhere) or ``not started``."""

    word: str
    saved_steps: int
    events: list[dict[str, Any]]


def plan(task: Task) -> PlannedRun:
    """Ask the script itself, by a dry run.

    Raises:
        UserError: the script refuses the settings; its own message.
    """
    environment = {**_environment(), "DRY_RUN": "1"}
    result = subprocess.run(
        ["bash", str(task.path), *task.arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        message = lines[-1].removeprefix("error: ")
        raise UserError(f"{task.path} {' '.join(task.arguments)}: {message}")
    words = result.stdout.splitlines()

    def value(flag: str) -> str:
        last = len(words) - 1 - words[::-1].index(flag)  # the last one counts
        return words[last + 1]

    samples, seq_length = int(value("--train-samples")), int(value("--seq-length"))
    layers, width = int(value("--num-layers")), int(value("--hidden-size"))
    heads, head_size = int(value("--num-attention-heads")), int(value("--kv-channels"))
    model = budget.published_model(layers, width, heads, head_size, seq_length)
    tokens = samples * seq_length
    flops = budget.flops_per_token(model, seq_length, budget.GPT2_VOCABULARY, causal=task.family == "arm")
    checkpoints = Path(value("--save"))
    return PlannedRun(
        task=task,
        name=checkpoints.name.removeprefix("checkpoints_"),
        checkpoints=checkpoints,
        samples=samples,
        tokens=tokens,
        steps=samples // int(value("--global-batch-size")),
        parameters=budget.published_parameter_count(width, layers),
        model_flops=tokens * flops,
    )


def plan_all(runs: Sequence[Task]) -> list[PlannedRun]:
    """Plan every task, several at a time; two runs of one name are an error, since they would share checkpoints."""
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        planned = list(pool.map(plan, runs))
    seen: dict[str, Task] = {}
    for run in planned:
        if run.name in seen:
            raise UserError(
                f"{run.name} stands for two runs ({' '.join(seen[run.name].arguments)}; "
                f"{' '.join(run.task.arguments)}): set VARIANT to tell them apart"
            )
        seen[run.name] = run.task
    return planned


def state_of(run: PlannedRun) -> State:
    """Read the run's checkpoint directory."""
    saved, events = 0, []
    latest = read_text(run.checkpoints / "latest")
    if latest is not None:
        digits = latest.strip().removeprefix("global_step")
        saved = int(digits) if digits.isdecimal() else 0
    metrics = run.checkpoints / "metrics.jsonl"
    if metrics.is_file():
        events = of_training(read_metrics(metrics))
    if saved >= run.steps:
        return State("finished", saved, events)
    return State("broken off" if saved or events else "not started", saved, events)


def print_plan(planned: Sequence[PlannedRun], mfu: float, peak_tflops: float) -> None:
    """One line a run, and the sum."""

    def days(runs: Sequence[PlannedRun]) -> float:
        flops = sum(run.model_flops for run in runs)
        return budget.training_days(flops, gpus=1, mfu=mfu, peak=peak_tflops * 1e12)

    states = [state_of(run).word for run in planned]
    rows = [("task", "run", "parameters", "samples", "tokens", "FLOPs", "GPU-days", "state")]
    for index, run in enumerate(planned):
        rows.append((
            str(index), run.name, f"{run.parameters / 1e6:.1f}M", f"{run.samples:,}", f"{run.tokens / 1e9:.2f}B",
            f"{run.flops:.2e}", f"{days([run]):.2f}", states[index],
        ))  # fmt: skip
    _print_table(rows)
    left = [run for run, state in zip(planned, states) if state != "finished"]
    total = sum(run.flops for run in planned)
    print(f"\n{len(planned)} runs, {total:.3g} FLOPs (6 N D): {days(planned):.1f} GPU-days, {days(left):.1f} left")
    print(f"(with attention, {mfu:.0%} MFU of {peak_tflops:g} TFLOP/s: --mfu, --peak-tflops; validation not counted)")


def print_status(planned: Sequence[PlannedRun]) -> None:
    """One line a run from its ``metrics.jsonl``."""
    rows = [STATUS_COLUMNS]
    for index, run in enumerate(planned):
        state = state_of(run)
        train = [event for event in state.events if event["kind"] == "train"]
        valid = on_last_windows(state.events)
        best = min(valid, key=lambda event: event["loss"]) if valid else None
        rows.append((
            str(index),
            run.name,
            state.word,
            f"{max([state.saved_steps, *(event['iteration'] for event in train)])}/{run.steps}",
            _number(train[-1].get("loss"), ".3f") if train else "-",
            _loss(best),
            _number(best.get("epoch"), ".1f") if best else "-",
            _loss(valid[-1]) if valid else "-",
            _number(train[-1].get("tokens_per_second"), ",.0f") if train else "-",
            _ago(state.events[-1].get("time")) if state.events else "-",
        ))
    _print_table(rows)
    words = [state_of(run).word for run in planned]
    print("\n" + ", ".join(f"{words.count(word)} {word}" for word in ("finished", "broken off", "not started")))


class Runner:
    """Starts runs one after another and hands on the signals that end them."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, planned: Sequence[PlannedRun]) -> int:
        """Run what is not finished; a run that fails does not keep the others from running. Returns the exit code."""
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        }
        failed = []
        try:
            for index, run in enumerate(planned):
                state = state_of(run)
                title = f"[{index + 1}/{len(planned)}] {run.name}"
                if state.word == "finished":
                    print(f"{title}: finished, skipped", flush=True)
                    continue
                begin = f"goes on from step {state.saved_steps}" if state.saved_steps else "starts"
                print(f"{title}: {begin}", flush=True)
                code = self._start(run.task)
                if self._stopped:
                    print("stopped: the same command goes on from here", flush=True)
                    return code
                if code != 0:
                    failed.append(run.name)
                    print(f"{title}: failed with exit code {code}", file=sys.stderr, flush=True)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if failed:
            print(f"error: {len(failed)} of {len(planned)} runs failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0

    def _start(self, task: Task) -> int:
        # A session of its own: the terminal's Ctrl-C comes here once and is handed on.
        self._child = subprocess.Popen(
            ["bash", str(task.path), *task.arguments], env=_environment(), start_new_session=True
        )
        if self._stopped:  # a signal between two runs
            self._child.terminate()
        return self._child.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def _environment() -> dict[str, str]:
    return {"PYTHON": sys.executable, **os.environ}


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _loss(event: dict[str, Any] | None) -> str:
    if event is None:
        return "-"
    stderr = event.get("stderr")
    return f"{event['loss']:.4f}" + ("" if stderr is None else f" +/- {stderr:.4f}")


def _ago(moment: float | None) -> str:
    if moment is None:
        return "-"
    minutes = (time.time() - moment) / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"


def _axes(settings: Sequence[str]) -> dict[str, list[str]]:
    axes = {}
    for setting in settings:
        name, sign, values = setting.partition("=")
        if not sign or not name or not all(values.split(",")):
            raise UserError(f"--set {setting}: write NAME=VALUE or NAME=VALUE,VALUE")
        if name == "DRY_RUN":
            raise UserError(f"--set {setting}: every run is planned by a dry run; --dry-run stops after that")
        axes[name] = values.split(",")
    return axes


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {name:18s}{grid.about}" for name, grid in grids().items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"grids:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", help="a name below")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, help="arm, mdm or both [all that have the script]")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE,...", help="an axis")
    parser.add_argument("--task", type=int, metavar="N", help="only this run of the grid: for a Slurm array")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost")
    parser.add_argument("--status", action="store_true", help="list how far the runs are")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches [0.4]")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of one GPU, dense bf16 [989: H100]")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.dry_run and options.status:
        raise UserError("--dry-run and --status are two lists: give one of them")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: it must be above 0 and at most 1")
    if not 0 < options.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops {options.peak_tflops}: it must be above 0 and finite")


def _selected(options: argparse.Namespace) -> list[Task]:
    if not SCRIPTS.is_dir():
        raise UserError(f"start tools/sweep.py from the repository root, not from {Path.cwd()}")
    known = grids()
    if options.grid not in known:
        raise UserError(f"{options.grid} is no grid: take one of {', '.join(known)}")
    grid = known[options.grid]
    runs = tasks(grid, options.family or list(grid.points), _axes(options.set))
    if options.task is None:
        return runs
    if not 0 <= options.task < len(runs):
        raise UserError(f"--task {options.task}: the grid has runs 0 to {len(runs) - 1}")
    return [runs[options.task]]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        planned = plan_all(_selected(options))
        if options.dry_run:
            print_plan(planned, options.mfu, options.peak_tflops)
        elif options.status:
            print_status(planned)
        else:
            return Runner().run(planned)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
