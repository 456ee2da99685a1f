"""Grids of runs: what is in them, what they cost, what is skipped, resumed and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from megatron.budget import published_parameter_count, read_model_table
from megatron.errors import UserError
from tools import sweep
from tools.sweep_grids import Task, grids, tasks

# A script that finishes, breaks off or waits as its MODE says, and answers a dry run with its length.
SCRIPT = """
for argument in "$@"; do declare "$argument"; done
save=output/checkpoints_run$N
if [[ ${DRY_RUN:-0} == 1 ]]; then
    [[ $MODE != wrong ]] || { echo "error: MODE is wrong" >&2; exit 2; }
    printf '%s\\n' --train-samples 1030 --global-batch-size 10 --seq-length 8
    printf '%s\\n' --hidden-size 64 --num-layers 2 --num-attention-heads 2 --kv-channels 32 --save "$save"
    exit 0
fi
mkdir -p "$save"
[[ $MODE != wait ]] || trap 'echo stopped >>started; exit 0' TERM INT USR1
echo "$N" >>started
case $MODE in
    finish) echo global_step103 >"$save/latest" ;;
    break) echo global_step40 >"$save/latest"; exit 1 ;;
    wait) while true; do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository root with one fake script."""
    (tmp_path / "examples_training" / "arm").mkdir(parents=True)
    (tmp_path / "examples_training" / "arm" / "example_fake.sh").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _fake(*modes: str) -> list[sweep.PlannedRun]:
    return sweep.plan_all([Task("arm", "fake", {"N": str(n), "MODE": mode}) for n, mode in enumerate(modes)])


@pytest.mark.parametrize("name", grids())
def test_every_run_of_every_grid_is_accepted_by_its_script(
    name: str, sandbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox.path)
    monkeypatch.setenv("PATH", sandbox.environment()["PATH"])
    monkeypatch.setenv("PYTHON", str(sandbox.answers / "python"))
    grid = grids()[name]
    planned = sweep.plan_all(tasks(grid, list(grid.points), {}))  # refuses two runs of one name
    assert len(planned) >= 4
    assert all(run.task.path.is_file() for run in planned)


def test_the_grids_hold_what_the_paper_did() -> None:
    known = grids()
    optima = {"arm": {("10", "217M"), ("30", "425M"), ("100", "724M")}}
    optima["mdm"] = {("10", "117M"), ("30", "217M"), ("100", "425M")}
    for family, best in optima.items():
        runs = [t.settings for t in tasks(known["chinchilla"], [family], {})]
        assert {settings["FLOPS_FACTOR"] for settings in runs} == {"6", "10", "30", "100"}
        assert best <= {(settings["FLOPS_FACTOR"], settings["MODEL_PARAM"]) for settings in runs}
    value = tasks(known["data_value"], ["mdm"], {})
    assert {"13B5", "13B5_2ep", "13B5_100ep", "40B_100ep"} <= {t.settings["DATA_CNT"] for t in value}
    assert all(t.settings["UNIQUE_TOKENS"] == t.settings["DATA_CNT"] for t in value)
    decay = tasks(known["weight_decay"], ["arm", "mdm"], {})
    assert len(decay) == 2 * 6 * 4
    assert {"WEIGHT_DECAY": "3.2", "HIDDEN_DROPOUT": "0.3", "ATTENTION_DROPOUT": "0.3"} in [t.settings for t in decay]


def test_what_the_guide_says_of_the_data_of_the_chinchilla_grid(repository: Path) -> None:
    table = read_model_table()
    needs = {}
    for task in tasks(grids()["chinchilla"], ["arm", "mdm"], {}):
        row = table[task.settings["MODEL_PARAM"]]
        flops = int(task.settings["FLOPS_FACTOR"]) * 10**18
        needs[task.family, row.name] = flops / 6 / published_parameter_count(row.d_model, row.layers) / 1e9
    beyond = {run: f"{tokens:.1f}B" for run, tokens in needs.items() if tokens > 41}
    assert beyond == {("mdm", "217M"): "76.6B", ("mdm", "306M"): "55.4B"}
    guide = (repository / "examples_training" / "README.md").read_text(encoding="utf-8")
    assert all(tokens in guide for tokens in beyond.values())


def test_set_adds_and_replaces_axes() -> None:
    grid = grids()["weight_decay"]
    runs = tasks(grid, ["arm"], {"WEIGHT_DECAY": ["0.1"], "SEED": ["1", "2", "3"]})
    assert len(runs) == 4 * 3
    assert {t.settings["WEIGHT_DECAY"] for t in runs} == {"0.1"}
    # Replacing a variable of the points leaves no run twice.
    assert len(tasks(grids()["chinchilla"], ["arm"], {"MODEL_PARAM": ["7M"]})) == 4
    with pytest.raises(UserError, match=r"--family mdm: there is no examples_training/mdm/example_order_list\.sh"):
        tasks(grids()["order_list"], ["mdm"], {})


def test_the_plan_is_the_scripts_own(sandbox: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(sandbox.path)
    arguments = ["chinchilla", "--family", "mdm", "--set", "FLOPS_FACTOR=10", "--set", "MODEL_PARAM=117M"]
    assert sweep.main([*arguments, "--dry-run", "--mfu", "0.5", "--peak-tflops", "1000"]) == 0
    header, row, _, total, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "run", "parameters", "samples", "tokens", "FLOPs", "GPU-days", "state"]
    name = "chinchilla_mdm_117M_6584834_c4_full"
    # 6 FLOPs a weight and token, and 12 layers x 12 x 768 x 2048 of attention: 1.305e19, at 5e14 a second 26,100 s.
    assert row.split() == ["0", name, "123.6M", "6,584,834", "13.49B", "1.00e+19", "0.30", "not", "started"]
    assert total.startswith("1 runs, 1e+19 FLOPs (6 N D): 0.3 GPU-days, 0.3 left")


def test_finished_runs_are_skipped_and_broken_ones_go_on(folder: Path, capfd: Any) -> None:
    planned = _fake("finish", "break", "finish")
    assert [run.steps for run in planned] == [103] * 3
    assert sweep.Runner().run(planned) == 1  # a failure does not keep the others from running
    assert (folder / "started").read_text().split() == ["0", "1", "2"]
    assert [sweep.state_of(run).word for run in planned] == ["finished", "broken off", "finished"]
    assert sweep.Runner().run(_fake("finish", "finish", "finish")) == 0
    assert (folder / "started").read_text().split() == ["0", "1", "2", "1"]
    output = capfd.readouterr()
    assert "[2/3] run1: goes on from step 40" in output.out
    assert "[3/3] run2: finished, skipped" in output.out
    assert "error: 1 of 3 runs failed: run1" in output.err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_stop_the_run_and_the_sweep(sent: signal.Signals, folder: Path) -> None:
    code = "from tools import sweep; from tools.sweep_grids import Task; import sys\n"
    code += "runs = [Task('arm', 'fake', {'N': str(n), 'MODE': 'wait'}) for n in range(2)]\n"
    code += "sys.exit(sweep.Runner().run(sweep.plan_all(runs)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(sweep.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    wait_until((folder / "started").exists, 60)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "stopped: the same command goes on from here" in output
    assert (folder / "started").read_text().split() == ["0", "stopped"]


def test_status_reads_the_metrics(folder: Path, capsys: Any) -> None:
    planned = _fake("finish", "finish")
    events = [
        {"kind": "meta", "event": "start", "iteration": 0, "time": time.time()},
        {"kind": "valid", "iteration": 10, "loss": 4.5, "stderr": 0.25, "epoch": 1.5},
        {"kind": "valid", "iteration": 20, "loss": 4.75, "stderr": 0.5, "epoch": 3.0},
        {"kind": "train", "iteration": 25, "loss": 3.25, "tokens_per_second": 12345.6, "time": time.time() - 300},
    ]
    planned[0].checkpoints.mkdir(parents=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (planned[0].checkpoints / "metrics.jsonl").write_text(lines + '{"kind": "tra', encoding="utf-8")
    (planned[0].checkpoints / "latest").write_text("global_step20", encoding="utf-8")
    sweep.print_status(planned)
    _, row, other, _, sums = capsys.readouterr().out.splitlines()
    losses = ["3.250", "4.5000 +/- 0.2500", "1.5", "4.7500 +/- 0.5000"]
    for cell in ["broken off", "25/103", *losses, "12,346", "5 min ago"]:
        assert cell in row
    assert other.split() == ["1", "run1", "not", "started", "0/103", *"------"]
    assert sums == "0 finished, 1 broken off, 1 not started"


WRONG = {
    "nonsense": "nonsense is no grid: take one of chinchilla, data_value",
    "lr --set SEED": "--set SEED: write NAME=VALUE",
    "lr --set SEED=1,,2": "--set SEED=1,,2: write NAME=VALUE",
    "lr --set DRY_RUN=0": "--set DRY_RUN=0: every run is planned by a dry run",
    "lr --mfu 0": "--mfu 0.0: it must be above 0 and at most 1",
    "lr --mfu nan": "--mfu nan: it must be above 0 and at most 1",
    "lr --mfu 40": "--mfu 40.0: it must be above 0 and at most 1",
    "lr --peak-tflops 0": "--peak-tflops 0.0: it must be above 0",
    "lr --peak-tflops -1": "--peak-tflops -1.0: it must be above 0",
    "lr --peak-tflops inf": "--peak-tflops inf: it must be above 0 and finite",
    "lr --status": "--dry-run and --status are two lists: give one of them",
    "lr --task 64": "--task 64: the grid has runs 0 to 63",
    "lr --set SEEDS=1": "SEEDS is no variable of the scripts",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments(line: str, sandbox: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(sandbox.path)
    assert sweep.main([*line.split(), "--dry-run"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert WRONG[line] in output.err


def test_two_runs_of_one_name_and_a_script_that_refuses(folder: Path) -> None:
    with pytest.raises(UserError, match="run0 stands for two runs"):
        sweep.plan_all([Task("arm", "fake", {"N": "0", "MODE": mode}) for mode in ("finish", "break")])
    with pytest.raises(UserError, match=r"example_fake\.sh N=0 MODE=wrong: MODE is wrong"):
        _fake("wrong")


def test_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["lr", "--dry-run"]) == 2
    assert "start tools/sweep.py from the repository root" in capsys.readouterr().err


def test_an_array_task_is_one_run(sandbox: Any) -> None:
    result = sandbox.bash("examples_training/sweep.sh", "order_list", "--dry-run", SLURM_ARRAY_TASK_ID="3")
    assert result.returncode == 0, result.stderr
    assert "_orders8" in result.stdout and result.stdout.startswith("task") and "\n1 runs" in result.stdout
