"""``benchmark.py parallel``: which modes there are, what is compared, and all of it with two processes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from waiting import wait_until

from megatron.arguments import parse_arguments
from megatron.config_checks import resolve_for_world
from megatron.errors import UserError
from megatron.trace_shares import WINDOW, read_trace
from tools import benchmark, benchmark_parallel
from tools.benchmark_failures import ranks_of
from tools.benchmark_modes import Machine, available_modes, machine_at_hand
from tools.benchmark_parity import largest_differences, parity_line, small_flags
from tools.benchmark_runs import end_session, is_running
from tools.benchmark_scaling import SCALING_HEADER, scaling_line

SMALL = "--small-model 2 32 2 32 --small-batch 2 8 --curve-steps 4"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_modes_are_those_that_the_processes_allow() -> None:
    data = ["dp", "zero2", "zero3", "offload", "zero3-offload"]
    assert list(available_modes(3)) == data
    assert list(available_modes(2)) == [*data, "tp2", "tp2-sequence", "pp2"]
    assert set(available_modes(8)) - set(available_modes(2)) == {
        "tp4", "tp4-sequence", "pp4", "tp8", "tp8-sequence", "pp8", "tp2-pp2"
    }  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_every_mode_is_a_run_that_the_program_accepts(tmp_path: Path, processes: int) -> None:
    """The small model and its batch divide over all of them, and each mode is what its name says."""
    arguments = benchmark.build_parser().parse_args(["parallel"])
    for name, mode in available_modes(processes).items():
        flags = [*small_flags(arguments, tmp_path), "--train-iters", "20", *mode.arguments(tmp_path, divide_all=True)]
        config = resolve_for_world(parse_arguments("mdm", flags), processes)
        sizes = (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
        expected = (int(name[2]) if name.startswith("tp") else 1, int(name[-1]) if "pp" in name else 1)
        assert sizes == expected, name
        assert config.parallel.sequence_parallel == (name.endswith("-sequence") or name == "tp2-pp2")
        assert config.parallel.zero_stage == (int(name[4]) if name.startswith("zero") else 1)
        assert config.parallel.cpu_optimizer == (name == "offload")
        if config.parallel.zero_stage == 3:
            assert config.parallel.deepspeed_config is not None
            zero = json.loads(Path(config.parallel.deepspeed_config).read_text())["zero_optimization"]
            assert zero["stage3_param_persistence_threshold"] == 0
            assert ("offload_param" in zero) == (name == "zero3-offload")


def test_what_is_measured_unless_modes_are_named() -> None:
    machine = Machine(8, gpu=True, run_timeout=1.0)
    names = [mode.name for mode in benchmark_parallel._chosen(None, machine, "parity")]
    assert {"tp2", "tp8-sequence", "pp8", "tp2-pp2", "zero3-offload"} < set(names) and "tp4" not in names
    names = [mode.name for mode in benchmark_parallel._chosen(None, machine, "scaling")]
    assert {"tp2-sequence", "pp2", "dp"} < set(names) and not {"tp2", "zero3-offload"} & set(names)
    with pytest.raises(UserError, match=r"--modes tp3: with 8 processes there are dp, "):
        benchmark_parallel._chosen(["tp3"], machine, "parity")


def test_devices_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    machine = Machine(2, gpu=True, run_timeout=1.0)
    assert [machine.environment(1, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "6", "4"]
    assert "CUDA_VISIBLE_DEVICES" not in machine.environment(2)
    assert Machine(2, gpu=False, run_timeout=1.0).environment(2)["CUDA_VISIBLE_DEVICES"] == ""
    assert not [name for name in machine.environment(2) if name.startswith("NCCL")]


def test_too_few_devices(monkeypatch: pytest.MonkeyPatch, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["parallel"]) == 2
    assert capsys.readouterr().err.startswith("error: --processes: 0 is not several")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--processes 4: this host has 2 GPUs"):
        machine_at_hand(4, 1.0, None)


def test_differences_are_the_largest_of_each_column() -> None:
    expected = {1: (2.0, 1.0), 2: (4.0, 8.0), 3: (1.0, 1.0)}
    found = {1: (2.0, 1.1), 2: (5.0, 8.0), 3: (9.0, 9.0)}
    assert largest_differences(found, expected, [1, 2]) == pytest.approx((0.25, 0.1))
    with pytest.raises(UserError, match="step 4 is missing"):
        largest_differences(found, expected, [4])


def test_ranks_are_the_launcher_s_children_with_a_rank() -> None:
    """And ending the launcher ends them, in sessions of their own as torchrun starts them."""
    script = (
        "import os, subprocess, sys, time\n"
        "for rank in ('0', '1', None):\n"
        "    extra = {} if rank is None else {'RANK': rank}\n"
        "    subprocess.Popen(['sleep', '60'], env=os.environ | extra, start_new_session=True)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment,
                               start_new_session=True)  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        children = psutil.Process(process.pid).children()
        wait_until(lambda: len(ranks_of(process.pid)) == 2, 30)  # Popen returns before the child has its environment
        ranks = ranks_of(process.pid)
        assert set(ranks) == {0, 1} and set(ranks.values()) < set(children) and len(children) == 3
        assert all(map(is_running, children))
    finally:
        end_session(process)
        process.stdout.close()
    wait_until(lambda: not any(map(is_running, children)), 30)  # a busy machine takes a while to deliver the signal


def test_lines() -> None:
    row = {"model": "425M", "objective": "mdm", "mode": "dp", "tokens_per_second": 300_000.0, "efficiency": 0.97,
           "mfu": 0.5, "memory_gb": 36.0, "device_memory_gb": [40.0, 41.5], "communication": 0.01,
           "collectives": 0.08}  # fmt: skip
    assert scaling_line(row).split() == ["425M", "MDM", "dp", "300,000", "0.970", "0.500", "36.0", "41.5", "0.010",
                                         "0.080"]  # fmt: skip
    assert len(scaling_line(row)) == len(SCALING_HEADER)
    row = {"objective": "ar", "precision": "bf16", "mode": "pp2", "error": "exit code 1: error: x"}
    assert parity_line(row) == "AR  bf16 pp2            exit code 1: error: x"


def run(tmp_path: Path, flags: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and rows of the command with two processes."""
    file = tmp_path / "rows.jsonl"
    code = benchmark.main(["parallel", "--processes", "2", "--json", str(file), *SMALL.split(), *flags.split()])
    return code, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_parity_and_scaling(tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(
        tmp_path,
        "--parts parity scaling --modes tp2-sequence --objectives ar --precisions fp32 --jobs 1 --models 7M:2 "
        f"--seq-length 32 --accumulation 2 --precision fp32 --steps 3 --warmup 1 --profile-dir {tmp_path / 'traces'}",
    )
    assert code == 0, capsys.readouterr().out
    parity, alone, split = rows
    assert parity["passed"] and parity["loss"] < 1e-5 and parity["grad_norm"] < 1e-5
    assert parity["first_loss"] != parity["last_loss"]
    assert (alone["mode"], alone["devices"], alone["efficiency"]) == ("alone", 1, 1.0)
    assert (split["mode"], split["devices"]) == ("tp2-sequence", 2)
    assert split["efficiency"] == pytest.approx(split["tokens_per_second"] / alone["tokens_per_second"] / 2)
    assert split["communication"] > 0 and sum(split["shares"].values()) == pytest.approx(1)
    assert split["memory_gb"] > 0
    for row in (alone, split):
        traces = tmp_path / "traces" / f"7M-{row['mode']}"
        assert json.loads((traces / "shares.json").read_text())["shares"] == row["shares"]
        assert any(event["name"] == WINDOW for event in read_trace(traces / "trace.json.gz"))


@pytest.mark.slow
def test_what_must_hold_when_something_fails(tmp_path: Path, no_gpu: None) -> None:
    code, rows = run(tmp_path, "--parts failures")
    assert code == 0, rows
    assert [row["check"] for row in rows] == ["kill -9", "SIGTERM", "DP to TP2"]
    assert all(row["passed"] for row in rows)
    assert rows[0]["seconds"] < 60 and "exit codes [0, 0]" in rows[1]["detail"]


@pytest.mark.slow
def test_a_run_that_fails_is_a_row(tmp_path: Path, no_gpu: None) -> None:
    """What fails costs its own row and the exit code; past the deadline nothing is started."""
    flags = "--parts scaling --modes dp --models 7M:2 --seq-length 32 --accumulation 1 --precision fp32"
    code, rows = run(tmp_path, f"{flags} --extra --log-interval 0")
    assert code == 1
    assert all(row["error"].startswith("exit code ") and "--log-interval 0" in row["error"] for row in rows)
    assert [row["mode"] for row in rows] == ["alone", "dp"]
    curves = "--parts parity --modes dp --objectives ar --precisions fp32"
    code, rows = run(tmp_path, f"{curves} --extra --log-interval 0")
    assert code == 1 and "--log-interval 0" in rows[2]["error"]
    code, rows = run(tmp_path, f"{flags} --deadline 0")
    assert code == 1 and {row["error"] for row in rows[3:]} == {"not run: --deadline"}
